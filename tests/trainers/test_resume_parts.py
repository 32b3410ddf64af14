"""Each part of a checkpoint's state matters: a resume that omits one ends with other numbers, and the comparison shows it."""

import shutil
from collections.abc import Callable

import pytest
from kill_bench import Stage
from ranks import run_ranks
from recipe import run_stage

MIDDLE = {"sft": 4, "ppo": 2}
PPO = ("ppo.ema_decay=0.9", "ppo.ptx_ratio=3")


def random_state() -> None:
    from megatron_rlhf.checkpoint import sharded

    sharded.restore_random_state = lambda state: None


def data_order() -> None:
    from megatron_rlhf.data.batches import ShuffledBatches

    ShuffledBatches.load_state_dict = lambda self, state: None  # type: ignore[method-assign]


def kl_coefficient() -> None:
    from megatron_rlhf.algorithms.kl import AdaptiveKLController

    AdaptiveKLController.load_state_dict = lambda self, state: None  # type: ignore[method-assign]


def pretraining_cursor() -> None:
    from megatron_rlhf.trainers.ppo import PPOTrainer

    load = PPOTrainer.load_state_dict

    def forget(self, state):
        load(self, {**state, "pretraining_cursor": 0})

    PPOTrainer.load_state_dict = forget  # type: ignore[method-assign]


def next_text() -> None:
    from megatron_rlhf.trainers.sft import SFTTrainer

    load = SFTTrainer.load_state_dict

    def forget(self, state):
        load(self, {**state, "texts_seen": 0})

    SFTTrainer.load_state_dict = forget  # type: ignore[method-assign]


def moving_average() -> None:
    from megatron_rlhf.checkpoint import sharded

    load = sharded.load_role

    def forget(folder, saved):
        if not saved.role.name.endswith("_ema"):
            load(folder, saved)

    sharded.load_role = forget


def moments() -> None:
    from megatron_rlhf.checkpoint import sharded

    load = sharded.load_role

    def forget(folder, saved):
        load(folder, saved)
        if saved.optimizer is not None:
            for part in saved.optimizer.chained_optimizers:
                for state in part.optimizer.state.values():
                    state["exp_avg_sq"].zero_()

    sharded.load_role = forget


FORGOTTEN: list[tuple[str, Callable[[], None] | None, list[str]]] = [
    ("sft", None, []),
    ("ppo", None, []),
    ("sft", random_state, ["metrics", "checkpoint"]),
    ("sft", data_order, ["metrics", "checkpoint"]),
    ("sft", next_text, ["metrics", "checkpoint"]),
    ("sft", moments, ["metrics", "checkpoint"]),
    ("ppo", data_order, ["metrics", "samples", "checkpoint"]),
    ("ppo", kl_coefficient, ["metrics", "checkpoint"]),
    ("ppo", pretraining_cursor, ["metrics", "checkpoint"]),
    ("ppo", moving_average, ["checkpoint"]),
]


def resume(stage: str, arguments: list[str], forget: Callable[[], None] | None) -> None:
    if forget is not None:
        forget()
    run_stage(stage, arguments)


@pytest.fixture(scope="module")
def halves(recipe):
    """Whole runs, and runs that stopped in the middle."""
    made = {}
    for name, middle in MIDDLE.items():
        stage = made[name] = Stage(name, recipe, ranks=1, more=PPO if name == "ppo" else ())
        stage.finish(f"parts_{name}_whole")
        run_ranks(1, run_stage, name, [*stage.arguments(f"parts_{name}_half"), f"run.stop_at_step={middle}"])
    return made


@pytest.mark.slow
@pytest.mark.parametrize(("name", "forget", "expected"), FORGOTTEN)
def test_what_is_forgotten_shows(recipe, halves, name, forget, expected):
    run = f"parts_{name}_{forget.__name__ if forget else 'nothing'}"
    shutil.copytree(recipe.root / f"parts_{name}_half", recipe.root / run, symlinks=True)
    run_ranks(1, resume, name, halves[name].arguments(run), forget)
    found = halves[name].differences(run, f"parts_{name}_whole")
    assert set(expected) <= set(found), found
    assert bool(expected) == bool(found), found
