"""A plan: what the fullest GPU holds in each phase of a training step, how long the phases take, what the run costs."""

import functools
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field

from megatron_rlhf.config.cluster import ClusterConfig
from megatron_rlhf.planning.placement import GIB, PlacedModel
from megatron_rlhf.planning.state import Bytes, frozen_bytes, trained_bytes


@dataclass(frozen=True)
class PlannedRole:
    """A model that stays in memory."""

    name: str
    placed: PlacedModel
    trained: bool
    average: bool = False
    rests: Mapping[str, Container[str]] = field(default_factory=dict)
    """Kind of memory -> phases in which it is in the host's memory instead."""

    def bytes_on(self, rank: int, phase: str) -> Bytes:
        """What a rank's GPU holds in a phase, by kind."""
        if rank not in self.placed.ranks:
            return {}
        stage = self.placed.stage_of(rank)
        held = trained_bytes(self.placed, stage, self.average) if self.trained else frozen_bytes(self.placed, stage)
        return {kind: size for kind, size in held.items() if phase not in self.rests.get(kind, ())}


@dataclass(frozen=True)
class PlannedPhase:
    """A part of a training step."""

    name: str
    seconds: float
    flops: float
    """Model FLOPs over all GPUs."""
    placed: PlacedModel
    memory: Callable[[int], Mapping[str, float]]
    """Pipeline stage of `placed` -> bytes that only this phase holds, by kind."""
    bubble: float | None = None
    """Share of the phase in which a pipeline stage waits; None where there is no pipeline schedule."""

    part: str = "update"
    """Phases of one part of the step run in parallel where they are on different ranks."""

    def bytes_on(self, rank: int) -> Mapping[str, float]:
        return self.memory(self.placed.stage_of(rank)) if rank in self.placed.ranks else {}


@dataclass(frozen=True)
class Plan:
    """A stage of the recipe on a cluster."""

    stage: str
    cluster: ClusterConfig
    roles: Sequence[PlannedRole]
    phases: Sequence[PlannedPhase]
    steps: int
    microbatch: str
    """The settings other than layouts that determine memory, for the report."""

    @property
    def layouts(self) -> dict[str, str]:
        """Role -> its layout in words."""
        return {role.name: describe_layout(role.placed) for role in self.roles}

    @functools.cached_property
    def fullest(self) -> tuple[int, PlannedPhase, float]:
        """The rank and the phase in which most memory is held, and how many bytes."""
        found = []
        for rank in self._distinct_ranks():
            for phase in self.phases:
                state = sum(sum(role.bytes_on(rank, phase.name).values()) for role in self.roles)
                found.append((rank, phase, state + sum(phase.bytes_on(rank).values())))
        return max(found, key=lambda entry: entry[2])

    @property
    def peak_bytes(self) -> float:
        return self.fullest[2]

    @property
    def capacity_bytes(self) -> float:
        """Bytes of a GPU that training tensors may use."""
        return (self.cluster.memory_gib - self.cluster.reserved_gib) * GIB

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.capacity_bytes

    @property
    def step_seconds(self) -> float:
        """Where roles are on separate ranks, each part of the step takes as long as its slower side."""
        sides: dict[str, dict[range, float]] = {}
        for phase in self.phases:
            part = sides.setdefault(phase.part, {})
            part[phase.placed.ranks] = part.get(phase.placed.ranks, 0.0) + phase.seconds
        return sum(max(part.values()) for part in sides.values())

    @property
    def hours(self) -> float:
        return self.steps * self.step_seconds / 3600

    @property
    def gpu_hours(self) -> float:
        return self.hours * self.cluster.gpus

    @property
    def price(self) -> float:
        return self.gpu_hours * self.cluster.price_per_gpu_hour

    @property
    def flops(self) -> float:
        """Model FLOPs of the whole run."""
        return self.steps * sum(phase.flops for phase in self.phases)

    def memory(self) -> dict[str, Bytes]:
        """Bytes on the fullest GPU: role -> kind -> bytes, and last what the fullest phase adds."""
        rank, phase, _ = self.fullest
        held = {role.name: on for role in self.roles if (on := role.bytes_on(rank, phase.name))}
        return {**held, f"{phase.name} phase": {kind: size for kind, size in phase.bytes_on(rank).items() if size}}

    def arithmetic(self) -> str:
        """The sum that determines whether it fits, in GiB."""
        terms = [
            f"{name} {kind} {size / GIB:.1f}"
            for name, kinds in self.memory().items()
            for kind, size in kinds.items()
            if size / GIB >= 0.05
        ]
        cluster = self.cluster
        comparison = "fits" if self.fits else "is more than"
        return (
            f"{' + '.join(terms)} = {self.peak_bytes / GIB:.1f} GiB, which {comparison} the {cluster.memory_gib:g} - "
            f"{cluster.reserved_gib:g} reserved = {self.capacity_bytes / GIB:.1f} GiB of a GPU ({cluster.name})"
        )

    def _distinct_ranks(self) -> list[int]:
        """One rank for each combination of pipeline stages of the roles."""
        placed = [role.placed for role in self.roles]
        return sorted({rank for p in placed for rank in p.ranks[:: p.gpus // p.parallel.pipeline]})


def describe_layout(placed: PlacedModel) -> str:
    """For tables, such as 'tensor 8 x pipeline 8 x data 4, recompute full'."""
    parallel = placed.parallel
    text = f"tensor {parallel.tensor} x pipeline {parallel.pipeline}"
    if parallel.virtual_stages > 1:
        text += f" x virtual {parallel.virtual_stages}"
    if parallel.context > 1:
        text += f" x context {parallel.context}"
    text += f" x data {placed.data}"
    marks = [name for name in ("sequence", "distributed_optimizer") if getattr(parallel, name)]
    marks += [] if parallel.recompute.value == "none" else [f"recompute {parallel.recompute.value}"]
    return ", ".join([text, *marks]).replace("_", " ")
