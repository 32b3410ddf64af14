"""Which rank is in which group, compared with Megatron-Core's own initialisation; nesting; parts of the world."""

import pytest
import torch.distributed as dist
from megatron.core import parallel_state
from ranks import run_ranks

from megatron_rlhf.config.model import ParallelConfig
from megatron_rlhf.parallel.layout import ParallelLayout

LAYOUTS = [
    ParallelConfig(),
    ParallelConfig(tensor=2),
    ParallelConfig(tensor=4, pipeline=2),
    ParallelConfig(tensor=2, pipeline=2),
    ParallelConfig(pipeline=4),
    ParallelConfig(pipeline=2, virtual_stages=2),
]
# Not set by Megatron-Core unless asked for, or unused without several optimizer instances and without experts.
NOT_OURS = {
    "_EXPERT_MODEL_PARALLEL_RANKS",
    "_HIERARCHICAL_CONTEXT_PARALLEL_GROUPS",
    "_GLOBAL_PROCESS_GROUP_LIST",
    "_HYBRID_DP_CP_GROUPS",
}


def installed() -> dict[str, object]:
    """Every global of Megatron-Core's that is a group, ranks or a number, as plain numbers."""
    found: dict[str, object] = {}
    for name, value in vars(parallel_state).items():
        if name in NOT_OURS or not name.isupper():
            continue
        if isinstance(value, dist.ProcessGroup):
            found[name] = dist.get_process_group_ranks(value)
        elif isinstance(value, list | int):
            found[name] = value
    return found


def compare_with_megatron():
    """For each layout: (what our code installs, what Megatron-Core's own initialisation sets) on this rank."""
    results = []
    for config in LAYOUTS:
        layout = ParallelLayout.create(config)
        with layout:
            ours = installed()
            positions = layout.tp_rank, layout.pp_rank, layout.dp_rank, layout.dp_size
            theirs_inside = (
                parallel_state.get_tensor_model_parallel_rank(),
                parallel_state.get_pipeline_model_parallel_rank(),
                parallel_state.get_data_parallel_rank(),
                parallel_state.get_data_parallel_world_size(),
            )
            assert positions == theirs_inside
            assert layout.is_first_stage == parallel_state.is_pipeline_first_stage(ignore_virtual=True)
            assert layout.is_last_stage == parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        parallel_state.initialize_model_parallel(
            config.tensor,
            config.pipeline,
            virtual_pipeline_model_parallel_size=layout.virtual_stages,
            create_gloo_process_groups=False,
        )
        results.append((ours, installed()))
        parallel_state.destroy_model_parallel()
        parallel_state._EMBEDDING_GLOBAL_RANKS = (
            None  # not reset by Megatron-Core: middle stages keep those of the last layout
        )
        parallel_state._POSITION_EMBEDDING_GLOBAL_RANKS = None
    return results


def test_groups_are_those_of_megatron_core_on_every_rank():
    for rank, results in enumerate(run_ranks(8, compare_with_megatron, timeout=120)):
        for config, (ours, theirs) in zip(LAYOUTS, results, strict=True):
            assert len(theirs) > 20
            for name, value in theirs.items():
                assert ours.get(name) == value, f"rank {rank}, {config}: {name}"


def nested():
    outer = ParallelLayout.create(ParallelConfig(tensor=2))
    inner = ParallelLayout.create(ParallelConfig(pipeline=2))

    def sizes():
        return (
            parallel_state.get_tensor_model_parallel_world_size(),
            parallel_state.get_pipeline_model_parallel_world_size(),
        )

    seen = []
    with outer:
        seen.append(sizes())
        with inner, outer, inner:
            seen.append(sizes())
        seen.append(sizes())
        with pytest.raises(ZeroDivisionError), inner:
            raise ZeroDivisionError
        seen.append(sizes())
    return seen, parallel_state.model_parallel_is_initialized()


def test_layouts_nest_and_leave_no_trace():
    assert run_ranks(2, nested) == [([(2, 1), (1, 2), (2, 1), (2, 1)], False)] * 2


def two_halves():
    left = ParallelLayout.create(ParallelConfig(tensor=2), ranks=range(0, 2))
    right = ParallelLayout.create(ParallelConfig(pipeline=2), ranks=range(2, 4))
    mine = left if dist.get_rank() in left.ranks else right
    return [dist.get_process_group_ranks(group) for group in (mine.groups.tp, mine.groups.pp, mine.groups.dp)]


def test_a_layout_may_cover_part_of_the_world():
    left_0, left_1, right_0, right_1 = run_ranks(4, two_halves)
    assert left_0 == [[0, 1], [0], [0]]
    assert left_1 == [[0, 1], [1], [1]]
    assert right_0 == [[2], [2, 3], [2]]
    assert right_1 == [[3], [2, 3], [3]]


def test_a_layout_that_does_not_divide_its_ranks_prints_the_arithmetic(world):
    with pytest.raises(AssertionError, match="tensor 2 x pipeline 1 x context 1 does not divide 1 ranks"):
        ParallelLayout.create(ParallelConfig(tensor=2))


def test_descriptions(world):
    layout = ParallelLayout.create(ParallelConfig())
    assert layout.describes == "tensor 1 x pipeline 1 x data 1"
    assert layout.virtual_stages is None
    assert layout.is_first_stage
    assert layout.is_last_stage
