"""A whole PPO iteration (sampling, judging, one update of policy and critic) against TRL's PPOTrainer.

Both start from the same folders of transformers and read the same prompts, with one epoch and one minibatch; TRL runs in
its own environment (`--peer-python`) and waits while ours runs, and the other way round. Without `--varied` all prompts
have `--prompt` tokens and all responses `--response`; with it prompts have 8 to 64, and one token in 64 ends a response,
after at least 4 (TRL has no minimum) and at most 128.
"""

import argparse
import json
import math
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.side_by_side import report, sizes
from benchmarks.small_world import make_world
from megatron_rlhf.compose import compose_config
from megatron_rlhf.config.checking.checks import check_ppo
from megatron_rlhf.config.stages import PPOConfig
from megatron_rlhf.parallel import runtime
from megatron_rlhf.runs.session import Session
from megatron_rlhf.trainers.ppo import PPOTrainer
from megatron_rlhf.trainers.setup.stages import BUILD

LR = 1e-5
OUR_WORLD = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "PYTHONPATH")
PEER = Path(__file__).parent / "peers" / "trl_ppo.py"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Shape, lengths, and where TRL is."""
    parser.add_argument("--peer-python", help="python of an environment with trl 1.12.0")
    parser.add_argument(
        "--peer-micro-batch", type=int, default=32, help="rows of TRL's microbatches at most, default 32"
    )
    parser.add_argument("--varied", action="store_true", help="texts of many lengths")
    parser.add_argument("--old-logprobs", choices=("sampled", "recomputed"), default="sampled")
    parser.add_argument("--set", nargs="*", default=[], help="more keys of ours")
    sizes(parser, layers=4, hidden=256, heads=4, vocab=1024, batch=32, rounds=5, threads=2, micro_batch_tokens=2048)
    parser.add_argument("--prompt", type=int, default=64, help="tokens, default 64")
    parser.add_argument("--response", type=int, help="tokens, default 64, or 128 if --varied")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Iterations of both in turn; without `--peer-python` only ours."""
    options.response = options.response or (128 if options.varied else 64)
    torch.set_num_threads(options.threads)
    seconds: dict[str, list[float]] = {"megatron_rlhf": []}
    versions: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        make_world(Path(folder), options)
        trainer = our_trainer(Path(folder), options)
        peer = Peer(Path(folder), options) if options.peer_python else None
        if peer is not None:
            versions = {f"peer's {name}": version for name, version in peer.ready["versions"].items()}
            check_same_models(trainer, peer.ready)
            seconds["TRL"] = []
        in_turn(trainer, peer.iterate if peer is not None else None, seconds)
        if peer is not None:
            peer.close()
    runtime.shutdown()
    made = report(seconds, options.batch, "samples/s")
    return {**made, "versions": {**made["versions"], **versions}}


def our_trainer(folder: Path, options: argparse.Namespace) -> PPOTrainer:
    """As the command line builds it; two iterations more than are counted."""
    shortest = min(4, options.response) if options.varied else options.response
    overrides = [
        f"run.dir={folder / 'run'}",
        f"policy.init_from={folder / 'policy'}",
        f"reward.init_from={folder / 'reward'}",
        f"data.prompts={folder / 'prompts.jsonl'}",
        f"data.max_prompt_tokens={options.prompt}",
        "data.max_per_user=null",
        "data.deduplicate_prefix_tokens=null",
        f"rollout.max_response_tokens={options.response}",
        f"rollout.min_response_tokens={shortest}",
        f"rollout.batch_size={options.batch}",
        f"ppo.iterations={options.rounds + 2}",
        f"ppo.batch_size={options.batch}",
        f"ppo.minibatch_size={options.batch}",
        f"ppo.micro_batch_tokens={options.micro_batch_tokens}",
        "ppo.ptx_coef=0",
        "ppo.ema_decay=0",
        "ppo.warmup_iterations=0",
        f"ppo.old_logprobs={options.old_logprobs}",
        f"policy.optimizer.lr={LR}",
        f"value.optimizer.lr={LR}",
        *options.set,
    ]
    config, resolved = compose_config("ppo", PPOConfig, overrides)
    check_ppo(config)
    runtime.initialize()
    return BUILD["ppo"](config, Session.open("ppo", config, resolved))


def in_turn(trainer: PPOTrainer, other: Callable[[], float] | None, seconds: dict[str, list[float]]) -> None:
    """Run the trainer; before each of its iterations the other has one. An iteration of ours includes its logging.

    The first of each does not count, nor does ours at the end, which is followed by a checkpoint.
    """
    step, last, began = trainer.train_step, trainer.total_steps - 1, 0.0

    def watched() -> dict[str, float]:
        nonlocal began
        if trainer.step > 1:
            seconds["megatron_rlhf"].append(time.perf_counter() - began)
        if other is not None and trainer.step < last:
            took = other()
            if trainer.step > 0:
                seconds["TRL"].append(took)
        began = time.perf_counter()
        return step()

    trainer.train_step = watched  # type: ignore[method-assign]
    trainer.run()


class Peer:
    """TRL in a process of its own."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        settings = {
            "threads": options.threads,
            "batch": options.batch,
            "micro_batch": math.gcd(options.batch, options.peer_micro_batch),
            "response": options.response,
            "varied": options.varied,
            "lr": LR,
        }
        command = [options.peer_python, str(PEER), str(folder), json.dumps(settings)]
        alone = {name: value for name, value in os.environ.items() if name not in OUR_WORLD}
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=alone)
        self.ready = self._answer()

    def iterate(self) -> float:
        """Seconds of one iteration."""
        assert self._process.stdin is not None
        began = time.perf_counter()
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        self._answer()
        return time.perf_counter() - began

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the peer ended with exit code {self._process.wait()}")
        return json.loads(line)


def check_same_models(trainer: PPOTrainer, peer: dict[str, Any]) -> None:
    """Both read the first prompt alike."""
    tokens = torch.as_tensor(trainer.prompts[0].tokens).long().unsqueeze(0)
    (reward,) = trainer.roles.reward.models.values()
    ours = {
        "logprob": float(trainer.policy.role.logprobs(tokens, 1).sum()),
        "score": float(reward.values(tokens, 1)[0, -1]),
    }
    for name, value in ours.items():
        assert math.isclose(value, peer[name], rel_tol=1e-4, abs_tol=1e-4), (name, value, peer[name])
