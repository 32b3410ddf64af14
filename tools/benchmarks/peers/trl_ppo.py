"""TRL's PPOTrainer, one iteration for each line on stdin; what it says is JSON, one line each.

Runs in an environment of its own (`pip install trl==1.12.0 accelerate transformers torch`), started by
`tools/benchmark.py ppo`, and imports nothing of ours.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ.update(TRL_EXPERIMENTAL_SILENCE="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
import torch
import transformers
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # whatever libraries print


def say(**figures: object) -> None:
    answers.write(json.dumps(figures) + "\n")
    answers.flush()


class OneAtATime(TrainerCallback):
    """Waits for a line before each iteration."""

    def on_train_begin(self, *args, **kwargs) -> None:
        wait()

    def on_step_end(self, *args, **kwargs) -> None:
        say(done=True)
        wait()


def wait() -> None:
    if not sys.stdin.readline():
        os._exit(0)


def main() -> None:
    folder, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(settings["threads"])
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder / "policy") for _ in range(2))
    reward, value = (AutoModelForSequenceClassification.from_pretrained(folder / "reward") for _ in range(2))
    prompts = [
        tokenizer(json.loads(line)["prompt"])["input_ids"] for line in (folder / "prompts.jsonl").open(encoding="utf-8")
    ]
    with torch.no_grad():
        first = torch.tensor([prompts[0]])
        logits, score = policy(first).logits[0].log_softmax(-1), reward(first).logits.item()
        logprob = logits[:-1].gather(1, first[0, 1:, None]).sum().item()
    data = Dataset.from_list([{"input_ids": prompt} for prompt in prompts])
    batch = settings["batch"]
    config = PPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=settings["micro_batch"],
        gradient_accumulation_steps=batch // settings["micro_batch"],
        num_mini_batches=1,
        num_ppo_epochs=1,
        total_episodes=batch * 10_000,
        response_length=settings["response"],
        local_rollout_forward_batch_size=batch,
        stop_token="eos" if settings["varied"] else None,
        temperature=1.0,
        kl_coef=0.02,
        learning_rate=settings["lr"],
        num_sample_generations=0,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
    )
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=data,
        eval_dataset=data.select(range(8)),
        callbacks=[OneAtATime()],
    )
    versions = {"trl": trl.__version__, "transformers": transformers.__version__, "torch": torch.__version__}
    say(logprob=logprob, score=score, versions=versions)
    trainer.train()


if __name__ == "__main__":
    main()
