"""Parallel layouts as objects: which rank does what for one model, and the process groups for it."""

import functools
import types
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.utils import GlobalMemoryBuffer

from megatron_rlhf.config.model import ParallelConfig

# The order of the dimensions is Megatron-Core's: tensor-parallel ranks are neighbours, pipeline stages far apart.
_DIMENSIONS = ["tp", "cp", "ep", "dp", "pp"]

# Field of ProcessGroupCollection -> dimensions it spans. There are no experts: their groups are those of the dense model.
_GROUPS: dict[str, tuple[str, ...]] = {
    "tp": ("tp",),
    "cp": ("cp",),
    "ep": ("ep",),
    "dp": ("dp",),
    "pp": ("pp",),
    "dp_cp": ("cp", "dp"),
    "tp_cp": ("tp", "cp"),
    "tp_dp": ("tp", "dp"),
    "tp_dp_cp": ("tp", "cp", "dp"),
    "mp": ("tp", "pp"),
    "intra_dist_opt": ("tp", "cp", "ep", "dp", "pp"),
}
_ALIASES = {
    "expt_tp": "tp",
    "tp_ep": "tp",
    "tp_ep_pp": "mp",
    "expt_dp": "dp_cp",
    "intra_dp_cp": "dp_cp",
    "intra_expt_dp": "dp_cp",
}

# Global of `megatron.core.parallel_state` -> our group, for code that still reads the globals.
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
}
_GLOBAL_RANKS = {
    "_EMBEDDING_GLOBAL_RANKS": "embd",
    "_POSITION_EMBEDDING_GLOBAL_RANKS": "pos_embd",
    "_PIPELINE_GLOBAL_RANKS": "pp",
    "_DATA_PARALLEL_GLOBAL_RANKS": "dp",
    "_TENSOR_MODEL_PARALLEL_GLOBAL_RANKS": "tp",
    "_MODEL_PARALLEL_GLOBAL_RANKS": "mp",
    "_CONTEXT_PARALLEL_GLOBAL_RANKS": "cp",
    "_DATA_PARALLEL_GLOBAL_RANKS_WITH_CP": "dp_cp",
}


@dataclass
class ParallelLayout:
    """Tensor x pipeline x context x data parallelism over a range of ranks.

    `with layout:` installs its groups in `megatron.core.parallel_state`; layouts nest, and leaving one brings back the
    one before. Creating a layout is collective over the whole world, also for ranks outside it.
    """

    config: ParallelConfig
    ranks: range
    groups: ProcessGroupCollection
    every_group: dict[str, Any]
    _saved: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def create(cls, config: ParallelConfig, ranks: range | None = None) -> "ParallelLayout":
        """Create the groups. `ranks` is a contiguous part of the world; the whole of it by default."""
        ranks = ranks or range(dist.get_world_size())
        data = len(ranks) // config.model_ranks
        assert data * config.model_ranks == len(ranks), (
            f"tensor {config.tensor} x pipeline {config.pipeline} x context {config.context} does not divide {len(ranks)} ranks"
        )
        grid = HyperCommGrid(
            [config.tensor, config.context, 1, data, config.pipeline], _DIMENSIONS, rank_offset=ranks.start
        )
        groups = {name: _own_group(grid.get_rank_enum(list(dimensions))) for name, dimensions in _GROUPS.items()}
        pipelines = grid.get_rank_enum("pp")
        groups["embd"] = _own_group([sorted({stages[0], stages[-1]}) for stages in pipelines])
        groups["pos_embd"] = _own_group([[stages[0]] for stages in pipelines])
        groups.update({name: groups[source] for name, source in _ALIASES.items()})
        collection = ProcessGroupCollection(**{k: v for k, v in groups.items() if k != "tp_dp"}, inter_dist_opt=None)
        return cls(config=config, ranks=ranks, groups=collection, every_group=groups)

    def __enter__(self) -> "ParallelLayout":
        self._saved.append({name: getattr(parallel_state, name) for name in self._globals})
        _install(parallel_state, self._globals)
        return self

    def __exit__(self, *exception: object) -> None:
        _install(parallel_state, self._saved.pop())

    def seed(self, seed: int) -> None:
        """Seed weights and dropout: alike on tensor-parallel ranks where they must be, different elsewhere."""
        if not self.is_member:
            return
        with self:
            model_parallel_cuda_manual_seed(
                seed + 100 * self.pp_rank + 10_000 * self.groups.dp_cp.rank(), force_reset_rng=True
            )

    @functools.cached_property
    def _globals(self) -> dict[str, Any]:
        """What `megatron.core.parallel_state` holds inside this layout."""
        values: dict[str, Any] = {name: self.every_group[group] for name, group in _GLOBALS.items()}
        for name, group in _GLOBAL_RANKS.items():
            members = self.every_group[group]
            values[name] = None if members is None else dist.get_process_group_ranks(members)
        values["_GLOBAL_MEMORY_BUFFER"] = GlobalMemoryBuffer()
        values["_VIRTUAL_PIPELINE_MODEL_PARALLEL_WORLD_SIZE"] = self.virtual_stages
        values["_VIRTUAL_PIPELINE_MODEL_PARALLEL_RANK"] = 0 if self.virtual_stages else None
        return values

    @property
    def is_member(self) -> bool:
        """This rank is part of the layout."""
        return dist.get_rank() in self.ranks

    @property
    def spans_world(self) -> bool:
        """Every rank of the job is part of the layout."""
        return len(self.ranks) == dist.get_world_size()

    @property
    def virtual_stages(self) -> int | None:
        """Model chunks on each pipeline rank, None where the plain schedule runs (Megatron-Core's convention)."""
        return self.config.virtual_stages if self.config.virtual_stages > 1 else None

    @property
    def tp_rank(self) -> int:
        return self.groups.tp.rank()

    @property
    def pp_rank(self) -> int:
        return self.groups.pp.rank()

    @property
    def dp_rank(self) -> int:
        return self.groups.dp.rank()

    @property
    def dp_size(self) -> int:
        return len(self.ranks) // self.config.model_ranks

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.config.pipeline - 1

    @property
    def describes(self) -> str:
        """For messages: 'tensor 2 x pipeline 2 x data 1'."""
        return f"tensor {self.config.tensor} x pipeline {self.config.pipeline} x data {self.dp_size}"


def _own_group(enumeration: list[list[int]]) -> dist.ProcessGroup | None:
    return _shared_group(dist.group.WORLD, tuple(map(tuple, enumeration)))


@functools.cache
def _shared_group(world: dist.ProcessGroup, enumeration: tuple[tuple[int, ...], ...]) -> dist.ProcessGroup | None:
    """This rank's group among `enumeration`. Groups are dear (threads, sockets, NCCL buffers), and many dimensions, and
    layouts of other roles, span the same ranks: one group serves them all."""
    group, _ = dist.new_subgroups_by_enumeration([list(ranks) for ranks in enumeration])
    return group


def _install(module: types.ModuleType, values: dict[str, Any]) -> None:
    for name, value in values.items():
        setattr(module, name, value)
