"""The globals of `megatron.core.parallel_state`: where a layout is written because Megatron-Core still reads it there."""

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import GlobalMemoryBuffer

from megatron_rlhf.parallel import compat

# Global -> name of the layout's group.
_GLOBALS = {
    "_TENSOR_MODEL_PARALLEL_GROUP": "tp",
    "_PIPELINE_MODEL_PARALLEL_GROUP": "pp",
    "_MODEL_PARALLEL_GROUP": "mp",
    "_EMBEDDING_GROUP": "embd",
    "_POSITION_EMBEDDING_GROUP": "pos_embd",
    "_DATA_PARALLEL_GROUP": "dp",
    "_TENSOR_AND_DATA_PARALLEL_GROUP": "tp_dp",
    "_EXPERT_MODEL_PARALLEL_GROUP": "ep",
    "_EXPERT_TENSOR_PARALLEL_GROUP": "expt_tp",
    "_EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP": "tp_ep",
    "_EXPERT_TENSOR_MODEL_PIPELINE_PARALLEL_GROUP": "tp_ep_pp",
    "_EXPERT_DATA_PARALLEL_GROUP": "expt_dp",
    "_INTRA_PARTIAL_EXPERT_DATA_PARALLEL_GROUP": "intra_expt_dp",
    "_CONTEXT_PARALLEL_GROUP": "cp",
    "_DATA_PARALLEL_GROUP_WITH_CP": "dp_cp",
    "_INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP": "intra_dp_cp",
    "_TENSOR_AND_CONTEXT_PARALLEL_GROUP": "tp_cp",
    "_TENSOR_AND_DATA_PARALLEL_GROUP_WITH_CP": "tp_dp_cp",
    "_INTRA_DISTRIBUTED_OPTIMIZER_INSTANCE_GROUP": "intra_dist_opt",
    **compat.GLOBALS,
}
# Global -> name of the group whose ranks it lists.
_GLOBAL_RANKS = {
    "_EMBEDDING_GLOBAL_RANKS": "embd",
    "_POSITION_EMBEDDING_GLOBAL_RANKS": "pos_embd",
    "_PIPELINE_GLOBAL_RANKS": "pp",
    "_DATA_PARALLEL_GLOBAL_RANKS": "dp",
    "_TENSOR_MODEL_PARALLEL_GLOBAL_RANKS": "tp",
    "_MODEL_PARALLEL_GLOBAL_RANKS": "mp",
    "_CONTEXT_PARALLEL_GLOBAL_RANKS": "cp",
    "_DATA_PARALLEL_GLOBAL_RANKS_WITH_CP": "dp_cp",
    **compat.GLOBAL_RANKS,
}


def values(groups: Mapping[str, dist.ProcessGroup | None], virtual_stages: int | None) -> dict[str, Any]:
    """Values of the globals inside a layout with these groups, by their names in `ProcessGroupCollection`."""
    found: dict[str, Any] = {name: groups[group] for name, group in _GLOBALS.items()}
    for name, group in _GLOBAL_RANKS.items():
        members = groups[group]
        found[name] = None if members is None else dist.get_process_group_ranks(members)
    found["_GLOBAL_MEMORY_BUFFER"] = GlobalMemoryBuffer()
    found["_VIRTUAL_PIPELINE_MODEL_PARALLEL_WORLD_SIZE"] = virtual_stages
    found["_VIRTUAL_PIPELINE_MODEL_PARALLEL_RANK"] = 0 if virtual_stages else None
    return found


def install(globals_: Mapping[str, Any]) -> dict[str, Any]:
    """Set the globals; returns their previous values."""
    before = {name: getattr(parallel_state, name) for name in globals_}
    for name, value in globals_.items():
        setattr(parallel_state, name, value)
    return before
