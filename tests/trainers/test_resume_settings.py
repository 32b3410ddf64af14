"""Settings that are changed at resume: applied, so that the numbers change accordingly, or refused before anything is built."""

import pytest
import torch
from ranks import run_ranks
from recipe import read_metrics, run_stage
from test_average import update
from toys import GPT2_LIKE, make_role

from megatron_rlhf.checkpoint import sharded
from megatron_rlhf.checkpoint.sharded import SavedRole
from megatron_rlhf.config.model import ParallelConfig, Precision
from megatron_rlhf.config.training import OptimizerConfig
from megatron_rlhf.trainers.step import TrainedRole

FIRST = {"betas": (0.9, 0.95), "epsilon": 1e-8, "weight_decay": 0.0}
THEN = {"betas": (0.5, 0.6), "epsilon": 1e-3, "weight_decay": 0.3}
LR = 2e-5


def trained_role(distributed: bool, settings: dict) -> TrainedRole:
    role = make_role(GPT2_LIKE, ParallelConfig(distributed_optimizer=distributed))
    return TrainedRole.create(role, OptimizerConfig(**{"lr": LR, "clip_norm": 0.0, **settings}), Precision.fp32)


@pytest.mark.parametrize("distributed", [False, True])
def test_adam_goes_on_with_the_new_settings(world, tmp_path, distributed):
    """torch's own Adam, whose settings are changed between two steps, with the same gradients."""
    trained = trained_role(distributed, FIRST)
    parameters = dict(trained.role.modules[0].named_parameters())
    reference = {name: torch.nn.Parameter(p.detach().clone()) for name, p in parameters.items()}
    groups = [[p for p in reference.values() if (p.dim() > 1) is matrix] for matrix in (True, False)]
    adam = torch.optim.AdamW([{"params": group} for group in groups], lr=LR, weight_decay=0.0)

    def step(trained: TrainedRole, seed: int, settings: dict) -> None:
        update(trained, seed)
        for name, parameter in trained.role.modules[0].named_parameters():
            reference[name].grad = parameter.main_grad.clone()
        for group, decays in zip(adam.param_groups, (True, False), strict=True):
            decay = settings["weight_decay"] if decays else 0.0
            group.update(betas=settings["betas"], eps=settings["epsilon"], weight_decay=decay)
        adam.step()

    for seed in range(3):
        step(trained, seed, FIRST)
    with sharded.writing(tmp_path / "step_3") as aside:
        sharded.save_role(aside, SavedRole(trained.role, trained.optimizer))
        sharded.write_meta(aside, {"policy": trained.role}, {})
    resumed = trained_role(distributed, {**THEN, "lr": 10 * LR})  # the peak; a step is told its rate
    sharded.load_role(tmp_path / "step_3", SavedRole(resumed.role, resumed.optimizer))
    before = {name: p.detach().clone() for name, p in reference.items()}
    for seed in range(3, 6):
        step(resumed, seed, THEN)
    for name, parameter in resumed.role.modules[0].named_parameters():
        moved = reference[name].detach() - before[name]
        torch.testing.assert_close(parameter.detach() - before[name], moved, rtol=1e-2, atol=1e-7)


REFUSED = {
    "batch": ("sft.batch_size=6", r"sft\.batch_size=6, was 12: .*step_2 cannot be resumed"),
    "seed": ("run.seed=5", r"run\.seed=5, was 1234"),
    "mix": ("data.pretraining_mix=0.5", r"data\.pretraining_mix=0\.5, was 0\.25"),
    "precision": ("precision=bf16", r"precision=bf16, was fp32"),
    "limit": ("data.max_prompt_tokens=4", r"data\.max_prompt_tokens.*other demonstrations|nothing left"),
    "model": ("model.num_layers=2", r"model, policy\.init_from: .*other shape of the policy \(num_layers 2, was 4\)"),
    "length": ("sft.max_steps=1", r"sft\.epochs, sft\.max_steps: .*step_2 is at step 2, after the end .* of 1 steps"),
    "validation": ("data.validation=null", r"data\.validation, .*other validation data"),
}


@pytest.fixture(scope="module")
def stopped(recipe):
    run_ranks(1, run_stage, "sft", recipe.sft("sft_settings", "sft.epochs=2", "run.stop_at_step=2"), timeout=400)
    return recipe.root / "sft_settings"


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_another_run_is_refused_and_nothing_changes(recipe, stopped, name):
    override, says = REFUSED[name]
    before = {
        path: path.read_bytes()
        for path in stopped.rglob("*")
        if path.is_file() and path.name not in ("log.txt", ".lock")
    }
    with pytest.raises(AssertionError, match=says):
        run_ranks(
            1, run_stage, "sft", recipe.sft(stopped.name, "sft.epochs=2", override, "run.resume=true"), timeout=400
        )
    for path, content in before.items():
        assert path.read_bytes() == content, path


def test_a_longer_schedule_is_taken(recipe):
    name = "sft_longer"
    run_ranks(1, run_stage, "sft", recipe.sft(name, "sft.epochs=1"), timeout=400)
    run_ranks(1, run_stage, "sft", recipe.sft(name, "sft.epochs=2", "run.resume=true"), timeout=400)
    rows = read_metrics(recipe.root / name)
    assert [row["step"] for row in rows] == list(range(1, 7))
    assert [row["samples"] for row in rows] == [12.0 * step for step in range(1, 7)]
    assert "from here on sft.epochs=2 (was 1)" in (recipe.root / name / "log.txt").read_text()


def test_files_may_have_moved(recipe, tmp_path):
    """The content decides, not the name."""
    name = "sft_moved_data"
    run_ranks(1, run_stage, "sft", recipe.sft(name, "run.stop_at_step=1"), timeout=400)
    moved = tmp_path / "elsewhere.jsonl"
    moved.write_bytes((recipe.root / "demonstrations.jsonl").read_bytes())
    more = (f"data.demonstrations={moved}", f"data.validation={moved}", "run.resume=true")
    run_ranks(1, run_stage, "sft", recipe.sft(name, *more), timeout=400)
    assert len(read_metrics(recipe.root / name)) == 3


def test_ppo_goes_on_with_the_models_and_batches_it_began_with(recipe, stopped):
    """No checkpoint holds the reference and the reward model: replacing them would go unnoticed."""
    sft, reward_model = recipe.root / "sft", recipe.root / "reward_model"

    def run(policy, *more):
        run_ranks(1, run_stage, "ppo", recipe.ppo("ppo_settings", policy, reward_model, *more), timeout=400)

    run(sft, "run.stop_at_step=1")
    with pytest.raises(AssertionError, match=r"policy\.init_from: .*step_1 was trained with other weights to start"):
        run(stopped, "run.resume=true")
    with pytest.raises(AssertionError, match=r"ppo\.batch_size=5, was 10: .*step_1 cannot be resumed"):
        run(sft, "ppo.batch_size=5", "run.resume=true")
    run(sft / "checkpoints" / (sft / "checkpoints" / "best").read_text(), "ppo.kl_coef=0.5", "run.resume=true")
    rows = read_metrics(recipe.root / "ppo_settings")
    assert [row["kl/coef"] for row in rows] == [0.02, 0.5, 0.5]
