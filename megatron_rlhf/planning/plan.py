"""A plan: what the fullest GPU holds in each phase of a training step, how long the phases take, what the run costs."""

import functools
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field

from megatron_rlhf.config.cluster import ClusterConfig
from megatron_rlhf.planning.placement import GIB, PlacedModel
from megatron_rlhf.planning.speed.save import PlannedSave, SavedModel, steps_between_saves
from megatron_rlhf.planning.state import Bytes, frozen_bytes, trained_bytes

SAVING = "save"


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
        return {kind: size for kind, size in self._held(rank).items() if phase not in self.rests.get(kind, ())}

    def host_bytes_on(self, rank: int) -> float:
        """What a rank's host keeps room for: the kinds that rest there."""
        return sum(size for kind, size in self._held(rank).items() if self.rests.get(kind))

    def _held(self, rank: int) -> Bytes:
        return self._by_stage[self.placed.stage_of(rank)] if rank in self.placed.ranks else {}

    @functools.cached_property
    def _by_stage(self) -> list[Bytes]:
        stages = range(self.placed.parallel.pipeline)
        if self.trained:
            return [trained_bytes(self.placed, stage, self.average) for stage in stages]
        return [frozen_bytes(self.placed, stage) for stage in stages]


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
        return self._by_stage[self.placed.stage_of(rank)] if rank in self.placed.ranks else {}

    @functools.cached_property
    def _by_stage(self) -> list[Mapping[str, float]]:
        return [self.memory(stage) for stage in range(self.placed.parallel.pipeline)]


@dataclass(frozen=True)
class Plan:
    """A stage of the recipe on a cluster."""

    stage: str
    cluster: ClusterConfig
    roles: Sequence[PlannedRole]
    phases: Sequence[PlannedPhase]
    steps: int
    settings: Mapping[str, float | None]
    """Keys other than layouts that determine memory and speed, with their values."""
    background_save: bool = False
    """`run.async_save`."""

    @functools.cached_property
    def fullest(self) -> tuple[int, PlannedPhase, float]:
        """The rank and the phase in which most memory is held, and how many bytes."""
        phases = [*self.phases, self._save_phase]
        found = [(rank, phase, self._bytes_in(rank, phase)) for rank in self._distinct_ranks() for phase in phases]
        return max(found, key=lambda entry: entry[2])

    @functools.cached_property
    def save(self) -> PlannedSave:
        """A checkpoint: all that trains."""
        trained = [SavedModel(role.placed, role.average) for role in self.roles if role.trained]
        return PlannedSave(trained, self.cluster, self.background_save)

    @functools.cached_property
    def _save_phase(self) -> PlannedPhase:
        first = self.roles[0].placed
        stages = first.gpus // first.parallel.pipeline

        def memory(stage: int) -> dict[str, float]:
            return {"average": self.save.gpu_bytes(first.first + stage * stages)}

        return PlannedPhase(SAVING, self.save.seconds, 0.0, first, memory, part=SAVING)

    @functools.cached_property
    def host(self) -> Bytes:
        """Host memory of the fullest node, by kind."""
        per_node = self.cluster.gpus_per_node
        firsts = sorted({rank // per_node * per_node for rank in self._distinct_ranks()})
        nodes = [range(first, first + per_node) for first in firsts]
        return max(map(self._host_of, nodes), key=lambda held: sum(held.values()))

    def _host_of(self, node: range) -> Bytes:
        resting = sum(role.host_bytes_on(rank) for role in self.roles for rank in node)
        return {
            "processes": len(node) * self.cluster.process_gib * GIB,
            "offloaded": resting,
            "checkpoint": sum(map(self.save.host_bytes, node)),
        }

    @property
    def save_every(self) -> int:
        """Steps between checkpoints that lose least time: `run.save_every=auto`."""
        return steps_between_saves(self.step_seconds, self.save.seconds, self.cluster)

    @property
    def peak_bytes(self) -> float:
        return self.fullest[2]

    @property
    def capacity_bytes(self) -> float:
        """Bytes of a GPU that training tensors may use."""
        return (self.cluster.memory_gib - self.cluster.reserved_gib) * GIB

    @property
    def host_bytes(self) -> float:
        return sum(self.host.values())

    @property
    def host_capacity_bytes(self) -> float:
        return self.cluster.host_memory_gib * GIB

    @property
    def fits_gpu(self) -> bool:
        return self.peak_bytes <= self.capacity_bytes

    @property
    def fits(self) -> bool:
        return self.fits_gpu and self.host_bytes <= self.host_capacity_bytes

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

    def phase_bytes(self) -> dict[str, float]:
        """The most that a GPU holds in each phase, the writing of a checkpoint among them."""
        ranks = self._distinct_ranks()
        return {
            phase.name: max(self._bytes_in(rank, phase) for rank in ranks) for phase in [*self.phases, self._save_phase]
        }

    def _bytes_in(self, rank: int, phase: PlannedPhase) -> float:
        state = sum(sum(role.bytes_on(rank, phase.name).values()) for role in self.roles)
        return state + sum(phase.bytes_on(rank).values())

    def arithmetic(self) -> str:
        """The sums that determine whether it fits, in GiB."""
        cluster = self.cluster
        gpu = (
            f"{_sum(self.memory())} = {self.peak_bytes / GIB:.1f} GiB, which {_compared(self.fits_gpu)} the "
            f"{cluster.memory_gib:g} - {cluster.reserved_gib:g} reserved = {self.capacity_bytes / GIB:.1f} GiB of a GPU "
            f"({cluster.name})"
        )
        if self.host_bytes <= self.host_capacity_bytes:
            return gpu
        host = f"{_sum({'host': self.host})} = {self.host_bytes / GIB:.1f} GiB, which is more than the "
        return f"{gpu}; {host}{cluster.host_memory_gib:g} GiB of a node"

    def _distinct_ranks(self) -> list[int]:
        """One rank for each combination of pipeline stages of the roles."""
        placed = [role.placed for role in self.roles]
        return sorted({rank for p in placed for rank in p.ranks[:: p.gpus // p.parallel.pipeline]})


def _sum(held: Mapping[str, Bytes]) -> str:
    terms = [(f"{name} {kind}", size / GIB) for name, kinds in held.items() for kind, size in kinds.items()]
    return " + ".join(f"{term} {size:.1f}" for term, size in terms if size >= 0.05)


def _compared(fits: bool) -> str:
    return "fits" if fits else "is more than"


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
