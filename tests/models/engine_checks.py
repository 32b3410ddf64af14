"""What engine_stand_in.py checks on each rank, once Megatron-Core is imported with Transformer Engine's layers."""

import dataclasses
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.extensions.transformer_engine import TELayerNormColumnParallelLinear
from toys import GPT2_LIKE, LLAMA_LIKE, weight_blocks

from megatron_rlhf.checkpoint import sharded
from megatron_rlhf.checkpoint.sharded import SavedRole
from megatron_rlhf.config.model import ParallelConfig, Positions, Precision
from megatron_rlhf.models.layers import spec
from megatron_rlhf.models.roles import Role
from megatron_rlhf.parallel.layout import ParallelLayout

MODELS = {
    "gpt2": GPT2_LIKE,
    "llama": LLAMA_LIKE,
    "qwen3": dataclasses.replace(LLAMA_LIKE, qk_norm=True),
    "neox": dataclasses.replace(
        GPT2_LIKE, parallel_residual=True, positions=Positions.rope, rope_fraction=0.25, tied_embeddings=False
    ),
}


def build(model, layout, scalar, engine):
    spec.transformer_engine_serves = lambda: engine
    role = Role.build("policy", model, layout, Precision.fp32, scalar)
    (module,) = role.modules
    assert isinstance(module.decoder.layers[0].mlp.linear_fc1, TELayerNormColumnParallelLinear) is engine
    return role


def saved_names(role):
    """Name, shape and place of all that a checkpoint stores of this rank's part, except Transformer Engine's own state."""
    found = set()
    with role.layout:
        for entry in role.modules[0].sharded_state_dict(metadata={"dp_cp_group": role.layout.groups.dp_cp}).values():
            for part in entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]:
                if not part.key.endswith("_extra_state"):
                    found.add((part.key, tuple(part.global_shape), tuple(part.global_offset), part.replica_id))
    return found


def weights(role):
    return {(block.name, str(block.place)): block.values for block in weight_blocks(role)}


def check(rank: int, ranks: int, folder: Path) -> None:
    """The whole test; raises AssertionError."""
    store = dist.FileStore(str(folder / "store"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    layout = ParallelLayout.create(ParallelConfig(tensor=ranks))
    layout.seed(1)
    for name, model in MODELS.items():
        for scalar in (False, True):
            plain, engine = (build(model, layout, scalar, use) for use in (False, True))
            assert saved_names(plain), name
            assert saved_names(plain) == saved_names(engine), f"{name}: {saved_names(plain) ^ saved_names(engine)}"
    # A run without Transformer Engine continues with it, and then without it again.
    plain, engine = (build(LLAMA_LIKE, layout, False, use) for use in (False, True))
    for source, target, step in ((plain, engine, "step_1"), (engine, plain, "step_2")):
        with sharded.writing(folder / step) as aside:
            sharded.save_role(aside, SavedRole(source))
            sharded.write_meta(aside, {"policy": source}, {})
        with torch.no_grad():
            for parameter in target.modules[0].parameters():
                parameter.fill_(7.0)
        sharded.load_role(folder / step, SavedRole(target))
        expected, loaded = weights(source), weights(target)
        assert expected.keys() == loaded.keys()
        assert all((loaded[block] == values).all() for block, values in expected.items())
