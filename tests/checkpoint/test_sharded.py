"""Our checkpoints: any layout loads them exactly, training continues as if uninterrupted, incomplete ones are never visible."""

import dataclasses
import json

import pytest
import torch
import torch.distributed as dist
from ranks import RankFailed, run_ranks
from toys import GPT2_LIKE, LLAMA_LIKE, assemble, assert_close, make_role, weight_blocks

from megatron_rlhf.checkpoint import integrity, sharded
from megatron_rlhf.checkpoint.sharded import SavedRole
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.model import ModelConfig, ParallelConfig, Positions, Precision, RopeScaling
from megatron_rlhf.config.training import OptimizerConfig
from megatron_rlhf.parallel.pipeline import Microbatch
from megatron_rlhf.parallel.vocab import token_logprobs
from megatron_rlhf.trainers.step import TrainedRole

# 67 x 32 tied embeddings are not a multiple of 128 numbers: Megatron-Core pads their gradient bucket.
MODELS = {"gpt2": GPT2_LIKE, "llama": LLAMA_LIKE}
LAYOUTS = {
    "one_rank": (1, ParallelConfig()),
    "tp2_sp": (2, ParallelConfig(tensor=2, sequence=True)),
    "pp2_virtual2": (2, ParallelConfig(pipeline=2, virtual_stages=2)),
    "dp2_distributed": (2, ParallelConfig(distributed_optimizer=True)),
    "tp2_pp2": (4, ParallelConfig(tensor=2, pipeline=2)),
    "pp2_dp2_distributed": (4, ParallelConfig(pipeline=2, distributed_optimizer=True)),
    "tp2_dp2_distributed": (4, ParallelConfig(tensor=2, distributed_optimizer=True)),
    "tp4": (4, ParallelConfig(tensor=4)),
    "one_distributed": (1, ParallelConfig(distributed_optimizer=True)),
}


def trained_role(model, parallel, seed=0):
    role = make_role(MODELS[model], parallel, seed=seed)
    # Epsilon well above rounding: gradients that are 0 by symmetry do not move weights by noise.
    return TrainedRole.create(role, OptimizerConfig(lr=1e-2, epsilon=1e-4), Precision.fp32)


def update(trained, seed):
    """One update on four sequences, divided among data-parallel ranks."""
    layout = trained.role.layout
    tokens = torch.randint(0, 67, (4, 10), generator=torch.Generator().manual_seed(seed))

    def microbatch(row):
        def loss_of(logits):
            loss = -token_logprobs(logits[:, :-1], tokens[row : row + 1, 1:], layout.groups.tp).sum() / 36
            return loss, {"loss": loss.detach()}

        return Microbatch(tokens[row : row + 1], loss_of)

    done = trained.update([microbatch(row) for row in range(layout.dp_rank, 4, layout.dp_size)], 1e-2)
    return done.statistics["loss"], done.grad_norm


def save(folder, model, parallel):
    """Two updates, a checkpoint, two more updates: the figures of the later ones."""
    trained = trained_role(model, parallel)
    update(trained, 0), update(trained, 1)
    with sharded.writing(folder) as aside:
        sharded.save_role(aside, SavedRole(trained.role, trained.optimizer))
        sharded.write_meta(aside, {"policy": trained.role}, {"step": 2})
    saved = weight_blocks(trained.role)
    return saved, [update(trained, 2), update(trained, 3)], weight_blocks(trained.role)


def load(folder, model, parallel):
    """Load over other weights and moments: the loaded weights, and the figures of two more updates."""
    trained = trained_role(model, parallel, seed=1)
    update(trained, 9)
    sharded.load_role(folder, SavedRole(trained.role, trained.optimizer))
    loaded = weight_blocks(trained.role)
    return loaded, [update(trained, 2), update(trained, 3)], weight_blocks(trained.role)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Made on demand: (folder, weights saved, later figures, later weights) by model and layout."""
    cache = {}

    def get(model, layout):
        if (model, layout) not in cache:
            folder = tmp_path_factory.mktemp(f"{model}_{layout}") / "step_2"
            ranks, parallel = LAYOUTS[layout]
            results = run_ranks(ranks, save, folder, model, parallel, timeout=400)
            cache[model, layout] = (
                folder,
                assemble([saved for saved, _, _ in results], 67),
                results[0][1],
                assemble([later for _, _, later in results], 67),
            )
        return cache[model, layout]

    return get


PAIRS = [
    ("one_rank", "tp2_sp", "llama"),
    ("one_rank", "pp2_virtual2", "gpt2"),
    ("tp2_pp2", "one_rank", "gpt2"),
    ("pp2_virtual2", "tp4", "llama"),
    ("dp2_distributed", "one_distributed", "gpt2"),
    ("pp2_dp2_distributed", "one_distributed", "gpt2"),
    ("pp2_dp2_distributed", "tp2_dp2_distributed", "llama"),
]


@pytest.mark.parametrize(("source", "target", "model"), PAIRS)
def test_any_layout_loads_what_any_other_saved(source, target, model, checkpoints):
    folder, saved, figures, later = checkpoints(model, source)
    ranks, parallel = LAYOUTS[target]
    results = run_ranks(ranks, load, folder, model, parallel, timeout=400)
    assert_close(assemble([loaded for loaded, _, _ in results], 67), saved, relative=0)
    for _, again, _ in results:
        for (loss, norm), (expected_loss, expected_norm) in zip(again, figures, strict=True):
            assert loss == pytest.approx(expected_loss, rel=1e-6)
            assert norm == pytest.approx(expected_norm, rel=2e-5)
    # Wrong moments would show at once: two steps of Adam at 0.01 against weights of 0.15.
    assert_close(assemble([blocks for _, _, blocks in results], 67), later, relative=1e-5)


@pytest.mark.parametrize("layout", ["one_rank", "tp2_pp2", "pp2_virtual2", "dp2_distributed"])
def test_the_same_layout_goes_on_bit_for_bit(layout, checkpoints):
    folder, saved, figures, later = checkpoints("gpt2", layout)
    ranks, parallel = LAYOUTS[layout]
    results = run_ranks(ranks, load, folder, "gpt2", parallel, timeout=400)
    assert results[0][1] == figures
    assert_close(assemble([loaded for loaded, _, _ in results], 67), saved, relative=0)
    assert_close(assemble([blocks for _, _, blocks in results], 67), later, relative=0)


@pytest.mark.parametrize(("source", "target"), [("one_rank", "one_distributed"), ("dp2_distributed", "one_rank")])
def test_switching_the_distributed_optimizer_on_or_off_is_refused(source, target, checkpoints):
    with pytest.raises(RankFailed, match="two kinds of optimizer state do not convert"):
        test_any_layout_loads_what_any_other_saved(source, target, "gpt2", checkpoints)


# --- weights of one role into another --------------------------------------------------------------------------------


def start_critic_from_policy(folder, keep_head):
    role = make_role(GPT2_LIKE, name="value", scalar=True, seed=5)
    head = role.modules[0].output_layer.weight.detach().clone()
    sharded.load_weights(folder, role, "policy", keep_head=keep_head)
    kept = torch.equal(head, role.modules[0].output_layer.weight)
    return weight_blocks(role), kept


def test_a_critic_starts_from_a_language_model_with_its_own_head(checkpoints):
    folder, saved, *_ = checkpoints("gpt2", "tp2_pp2")
    ((blocks, kept),) = run_ranks(1, start_critic_from_policy, folder, True)
    loaded = assemble([blocks], 67)
    assert kept
    body = {name: array for name, array in loaded.items() if not name.startswith("output_layer")}
    assert_close(body, {name: saved[name] for name in body}, relative=0)


# --- writing ---------------------------------------------------------------------------------------------------------


def write(folder, fail=False, keep_last=0, text="whole"):
    with sharded.writing(folder, keep_last) as aside:
        if dist.get_rank() == 0:
            (aside / "part").write_text(text)
        if fail:
            raise OSError("disk full, on purpose")
        (aside / sharded.META).write_text(json.dumps({"format": sharded.FORMAT, "roles": {}, "state": {}}))


def test_a_checkpoint_appears_whole_with_its_pointer(tmp_path, world):
    write(tmp_path / "step_1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_1"]
    assert (tmp_path / "latest").read_text() == "step_1"
    assert sharded.latest(tmp_path) == tmp_path / "step_1"


def test_an_exception_leaves_no_trace_and_the_one_before_is_latest(tmp_path, world):
    write(tmp_path / "step_1")
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path / "step_2", fail=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_1"]
    assert sharded.latest(tmp_path) == tmp_path / "step_1"


def test_an_exception_while_replacing_a_checkpoint_keeps_the_old_one(tmp_path, world):
    write(tmp_path / "step_1", text="old")
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path / "step_1", fail=True, text="new")
    assert (tmp_path / "step_1" / "part").read_text() == "old"
    write(tmp_path / "step_1", text="new")
    assert (tmp_path / "step_1" / "part").read_text() == "new"


def test_what_a_killed_process_left_is_passed_over_and_written_anew(tmp_path, world):
    write(tmp_path / "step_1")
    (tmp_path / ".step_2.writing").mkdir()
    (tmp_path / ".step_2.writing" / "half").touch()
    (tmp_path / "step_3").mkdir()
    (tmp_path / "latest").write_text("step_3")
    assert sharded.latest(tmp_path) == tmp_path / "step_1"
    write(tmp_path / "step_2")
    assert sorted(path.name for path in (tmp_path / "step_2").iterdir()) == [
        integrity.MANIFEST,
        sharded.META,
        "part",
    ]
    assert sharded.latest(tmp_path) == tmp_path / "step_2"


def test_without_a_pointer_the_highest_whole_step_is_the_newest(tmp_path, world):
    for step in (9, 10, 2):
        write(tmp_path / f"step_{step}")
    (tmp_path / "latest").unlink()
    assert sharded.latest(tmp_path) == tmp_path / "step_10"
    assert sharded.latest(tmp_path / "nothing") is None


def test_only_the_last_checkpoints_are_kept(tmp_path, world):
    write(tmp_path / "epoch_1")
    for step in (5, 10, 15):
        write(tmp_path / f"step_{step}", keep_last=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch_1", "latest", "step_10", "step_15"]
    write(tmp_path / "step_20", keep_last=0)
    assert len(list(tmp_path.glob("step_*"))) == 3


def test_find_checkpoint(tmp_path, world):
    run = tmp_path / "run"
    write(run / "checkpoints" / "step_3")
    assert sharded.find_checkpoint(run, "policy.init_from") == run / "checkpoints" / "step_3"
    assert sharded.find_checkpoint(run / "checkpoints", "policy.init_from") == run / "checkpoints" / "step_3"
    assert sharded.find_checkpoint(run / "checkpoints" / "step_3", "k") == run / "checkpoints" / "step_3"
    write(run / "checkpoints" / "epoch_1")
    sharded.point(run / "checkpoints", "best", "epoch_1")
    assert sharded.find_checkpoint(run, "k") == run / "checkpoints" / "epoch_1"
    with pytest.raises(UserError, match=r"policy\.init_from=.*nowhere: no such folder"):
        sharded.find_checkpoint(tmp_path / "nowhere", "policy.init_from")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"policy\.init_from=.*empty is neither a checkpoint"):
        sharded.find_checkpoint(tmp_path / "empty", "policy.init_from")


def test_broken_and_foreign_meta_files_are_named(tmp_path):
    (tmp_path / sharded.META).write_text('{"format": 1,\n "roles": }')
    with pytest.raises(UserError, match=r"meta\.json:2: broken JSON"):
        sharded.read_meta(tmp_path)
    (tmp_path / sharded.META).write_text('{"format": 99}')
    with pytest.raises(UserError, match="format 99, this version reads format 1"):
        sharded.read_meta(tmp_path)


def test_a_shape_in_meta_json_that_no_model_has():
    for name, value in (("num_layers", 1_000_000), ("hidden_size", 10**9), ("num_attention_heads", 0)):
        content = sharded.model_to_json(GPT2_LIKE) | {name: value}
        with pytest.raises(UserError, match=rf"meta\.json: .*{name}={value} must be at least 1"):
            sharded.model_from_json(content)


def test_every_field_of_a_model_survives_meta_json():
    odd = ModelConfig(
        num_layers=3,
        hidden_size=8,
        num_attention_heads=2,
        vocab_size=5,
        positions=Positions.rope,
        rope_scaling=RopeScaling.llama3,
        rope_base=5e5,
        head_dim=6,
        norm_epsilon=1e-6,
        qk_norm=True,
    )
    for model in (odd, *MODELS.values()):
        again = sharded.model_from_json(json.loads(json.dumps(sharded.model_to_json(model))))
        assert dataclasses.asdict(again) == dataclasses.asdict(model)
