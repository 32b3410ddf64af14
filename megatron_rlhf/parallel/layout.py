"""Parallel layouts as objects: which rank does what for one model, and the process groups for it."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_rlhf.config.model import ParallelConfig
from megatron_rlhf.parallel import compat
from megatron_rlhf.parallel.groups import megatron_globals
from megatron_rlhf.parallel.groups.communicators import own_group

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


@dataclass
class ParallelLayout:
    """Tensor x pipeline x context x data parallelism over a range of ranks.

    `with layout:` installs its groups in `megatron.core.parallel_state`; layouts nest, and leaving one restores the
    previous one. Creating a layout is collective over the whole world, also for ranks outside it.
    """

    config: ParallelConfig
    ranks: range
    groups: ProcessGroupCollection
    every_group: dict[str, Any]
    _saved: list[dict[str, Any]] = field(default_factory=list)
    watch: Callable[[int, int], object] | None = None
    """Told how much of some work of this layout is done, and how much there is: 0 at its beginning."""

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
        groups = {name: own_group(grid.get_rank_enum(list(dimensions))) for name, dimensions in _GROUPS.items()}
        pipelines = grid.get_rank_enum("pp")
        groups["embd"] = own_group([sorted({stages[0], stages[-1]}) for stages in pipelines])
        groups["pos_embd"] = own_group([[stages[0]] for stages in pipelines])
        for name, source in [*_ALIASES.items(), *compat.GROUP_FIELDS.items()]:
            groups[name] = groups[source]
        collection = ProcessGroupCollection(**{k: v for k, v in groups.items() if k != "tp_dp"}, inter_dist_opt=None)
        return cls(config=config, ranks=ranks, groups=collection, every_group=groups)

    def __enter__(self) -> "ParallelLayout":
        self._saved.append(megatron_globals.install(self._globals))
        return self

    def __exit__(self, *exception: object) -> None:
        megatron_globals.install(self._saved.pop())

    def seed(self, seed: int) -> None:
        """Seed weights and dropout: the same on tensor-parallel ranks where they must be, different elsewhere."""
        if not self.is_member:
            return
        with self:
            model_parallel_cuda_manual_seed(
                seed + 100 * self.pp_rank + 10_000 * self.groups.dp_cp.rank(), force_reset_rng=True
            )

    @functools.cached_property
    def _globals(self) -> dict[str, Any]:
        return megatron_globals.values(self.every_group, self.virtual_stages)

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
        """Model chunks on each pipeline rank, None for the non-interleaved schedule (Megatron-Core's convention)."""
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

    def first_rank_of(self, dp_rank: int) -> int:
        """The rank, of the world, that holds the first part of a replica."""
        return self.ranks.start + dp_rank * self.config.tensor * self.config.context

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
