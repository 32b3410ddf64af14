"""PPO-ptx with advantages from several samples of a prompt, beside the value model's: more rows for a finished miniature.

torchrun --nproc-per-node 2 examples/miniature/estimators.py [output folder of run.py] [key=value ...]
"""

import json
import sys
from pathlib import Path

from measure import Answers, closing_table
from run import Miniature

from megatron_rlhf.cli import exit_code_on_failure
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.monitoring.report import text_table
from megatron_rlhf.parallel import runtime
from megatron_rlhf.parallel.collectives import on_first_rank

SAMPLES = 4
"""Of a prompt; the number of episodes is the same with each estimator."""


class Estimators(Miniature):
    """The last stage once more, with each estimator that needs no value model."""

    def run(self) -> None:
        if not (self.output / "answers_ppo_ptx").is_dir():
            raise UserError(f"{self.output} holds no finished miniature: run examples/miniature/run.py first")
        answers = {"SFT": self.known("sft"), "PPO-ptx, gae": self.known("ppo_ptx")}
        for estimator in ("rloo", "grpo", "reinforce_baseline"):
            chosen = [f"ppo.advantages={estimator}", f"ppo.samples_per_prompt={SAMPLES}"]
            self.stage("ppo", f"ppo_{estimator}", *self.text(), *self.ppo(), always=chosen)
            answers[f"PPO-ptx, {estimator}"] = self.answers(f"ppo_{estimator}")
        on_first_rank(lambda: self.write(answers))

    def known(self, model: str) -> Answers:
        return Answers.read(self.output / f"answers_{model}", self.output / model)

    def write(self, answers: dict[str, Answers]) -> None:
        rows = closing_table(answers)
        (self.output / "estimators.json").write_text(json.dumps(rows, indent=1))
        print(f"\n{text_table(rows)}")


if __name__ == "__main__":
    arguments = sys.argv[1:]
    folder = Path(arguments.pop(0)) if arguments and "=" not in arguments[0] else Path("runs/miniature")
    with exit_code_on_failure():
        runtime.initialize()
        Estimators(folder, arguments).run()
    runtime.shutdown()
