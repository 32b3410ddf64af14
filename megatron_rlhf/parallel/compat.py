"""What differs between the two versions of Megatron-Core that are supported: 0.16.1 (below Python 3.12) and 0.19 (from there).

Everything else in the package works with both versions. Each entry says what changed and when; features are detected
directly, never by version number.
"""

import dataclasses
import importlib.util
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state, resharding
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec

# 0.19 can shard weights further and gather them when they are used ("GTP weight rematerialisation"). It is off here: the groups
# that shard have one rank, like that of experts ("ep"), and the groups that span them are the ones without it.
_FIELDS = {
    "gtp_remat": "ep",
    "expt_gtp_remat": "ep",
    "dp_cp_gtp_remat": "dp_cp",
    "expt_dp_gtp_remat": "expt_dp",
    "tp_ep_pp_with_egtp_remat": "tp_ep_pp",
}
_GLOBALS = {
    "_GTP_WEIGHT_REMAT_GROUP": "ep",
    "_EXPERT_GTP_WEIGHT_REMAT_GROUP": "ep",
    "_DATA_PARALLEL_GROUP_WITH_GTP_REMAT": "dp",
    "_DATA_PARALLEL_GROUP_WITH_CP_WITH_GTP_REMAT": "dp_cp",
    "_INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP_WITH_GTP_REMAT": "intra_dp_cp",
    "_EXPERT_DATA_PARALLEL_GROUP_WITH_GTP_REMAT": "expt_dp",
    "_INTRA_PARTIAL_EXPERT_DATA_PARALLEL_GROUP_WITH_GTP_REMAT": "intra_expt_dp",
    "_EXPERT_TENSOR_MODEL_PIPELINE_PARALLEL_GROUP_WITH_EGTP": "tp_ep_pp",
}
_GLOBAL_RANKS = {"_GTP_WEIGHT_REMAT_GLOBAL_RANKS": "ep", "_EXPERT_GTP_WEIGHT_REMAT_GLOBAL_RANKS": "ep"}


def _of_parallel_state(names: dict[str, str]) -> dict[str, str]:
    return {name: group for name, group in names.items() if hasattr(parallel_state, name)}


_known_fields = {field.name for field in dataclasses.fields(ProcessGroupCollection)}
GROUP_FIELDS = {name: group for name, group in _FIELDS.items() if name in _known_fields}
"""Field of ProcessGroupCollection that 0.16.1 lacks -> name of the layout's group; empty on 0.16.1."""
GLOBALS = _of_parallel_state(_GLOBALS)
"""Global of `parallel_state` that 0.16.1 lacks -> name of the layout's group."""
GLOBAL_RANKS = _of_parallel_state(_GLOBAL_RANKS)
"""The same for globals that list a group's ranks."""


DYNAMIC_ENGINE = importlib.util.find_spec("megatron.core.inference.sampling") is not None
"""Whether its dynamic inference engine lets the caller sample, since 0.19."""


def dense_mlp(submodules: MLPSubmodules) -> Any:
    """What a layer's specification holds for a dense MLP: since 0.18 a function that builds it, before that a ModuleSpec."""
    build = getattr(MLP, "as_mlp_submodule", None)
    return ModuleSpec(module=MLP, submodules=submodules) if build is None else partial(build, submodules=submodules)


def plan_resharding(source: torch.nn.Module, target: torch.nn.Module) -> Any:
    """Which rank sends which part of which weight to which. Collective over the world. The old name is deprecated since 0.17."""
    build = getattr(resharding, "build_local_reshard_plan", None) or resharding.build_centralized_reshard_plan
    return build(source, target)


def gradients_for_norm(optimizer: Any) -> list[torch.Tensor]:
    """Those of an optimizer's gradients that count towards a norm on this rank. 0.19 dropped `main` from the name."""
    get = getattr(optimizer, "get_grads_for_grad_norm", None) or optimizer.get_main_grads_for_grad_norm
    return get()
