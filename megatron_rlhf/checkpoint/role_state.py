"""What a checkpoint holds of a role, as this rank sees it: weights, optimizer, average, random state.

Megatron-Core gives every weight its place in the whole model. Nothing is gathered: equal ranks (data parallelism) share
weights evenly, and each handles the moments that its distributed optimizer owns.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, merge, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.state_dict_utils import extract_nonpersistent, extract_sharded_base
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor

from megatron_rlhf.checkpoint.parts import Part, Run, parts_of, runs_of, share
from megatron_rlhf.models.roles import Role

Entry: TypeAlias = ShardedTensor | ShardedTensorFactory
OPTIMIZER, RANDOM = "optimizer", "random"


@dataclasses.dataclass
class SavedRole:
    """The parts of a role that go into a checkpoint."""

    role: Role
    optimizer: MegatronOptimizer | None = None
    average: Sequence[Mapping[str, tuple[int, Tensor]]] | None = None
    """For each chunk, by the names of its parameters: an average that is saved in place of the weights. Each rank has a
    part: where it begins in the flattened parameter, and its elements."""


class RoleState:
    """A role's state on one rank: `shared` runs, which equal ranks hold too, and its `own`; objects; and what is common."""

    def __init__(self, saved: SavedRole, is_loading: bool, without: Any = lambda name: False, with_random: bool = True):
        """`without`: names of weights and other states of the model to leave out."""
        self.group = saved.role.layout.groups.dp_cp
        self.trains_some_layers = saved.role.trains_some_layers
        metadata = {"chained_optim_avoid_prefix": True, "dp_cp_group": self.group}
        self.model: list[dict[str, Any]] = []
        for chunk in saved.role.modules:
            state = chunk.sharded_state_dict(metadata=metadata)
            self.model.append({name: entry for name, entry in state.items() if not without(name)})
        self.optimizer: dict[str, Any] = {}
        self.own: list[Run] = []
        self.shared: list[Run] = []
        averages = saved.average or [{}] * len(self.model)
        for state, average in zip(self.model, averages, strict=True):
            assert average.keys() <= state.keys()
            for name, entry in state.items():
                if isinstance(entry, Entry):
                    if name in average:
                        self.own += runs_of(entry, *average[name])
                    else:
                        self.shared += runs_of(entry, 0, _flat(entry.data))
        if saved.optimizer is not None:
            self._add_optimizer(saved.optimizer, metadata)
        self.objects = {
            entry.unique_key: entry
            for entry in nested_values([*self.model, self.optimizer])
            if isinstance(entry, ShardedObject)
        }
        if saved.optimizer is not None and with_random:
            ranks = saved.role.layout.ranks
            place = (len(ranks),), (dist.get_rank() - ranks.start,)
            random = ShardedObject(RANDOM, None if is_loading else _random_state(), *place, replica_id=0)
            self.objects[random.unique_key] = random
            self.random_key: str | None = random.unique_key
        else:
            self.random_key = None

    def _add_optimizer(self, optimizer: MegatronOptimizer, metadata: dict[str, Any]) -> None:
        parts = optimizer.chained_optimizers
        if not any(isinstance(part, DistributedOptimizer) for part in parts):
            keyed = {f"model{i}" if len(self.model) > 1 else "model": state for i, state in enumerate(self.model)}
            # "is_loading" allocates the moments where there was no update yet (a critic's warmup, skipped steps): a
            # checkpoint without them could not be resumed.
            self.optimizer = optimizer.sharded_state_dict(keyed, is_loading=True, metadata=metadata)
            if self.trains_some_layers:
                self.optimizer = dict_list_map_inplace(_by_layer, self.optimizer)
            for entry in nested_values(self.optimizer):
                if isinstance(entry, Entry):
                    self.shared += runs_of(entry, 0, _flat(entry.data))
            return
        (part,) = parts
        places = {id(entry.data): entry for state in self.model for entry in state.values() if isinstance(entry, Entry)}
        for parameter, start, tensors in owned_state(part):
            entry = places[id(parameter)]
            for name, values in tensors.items():
                moment = dataclasses.replace(entry, key=f"optimizer.state.{name}.{entry.key}")
                moment = _by_layer(moment) if self.trains_some_layers else moment
                self.own += runs_of(moment, start, _flat(values))
        self.optimizer = part.state_dict()

    def to_write(self) -> tuple[list[Part], dict[str, Any], dict[str, Any]]:
        """This rank's parts, its objects by their names in the checkpoint, and what is the same on all ranks."""
        mine = share(filter(_is_written, self.shared), self.group.rank(), self.group.size())
        objects = {key: entry.data for key, entry in self.objects.items() if _is_main(entry.replica_id)}
        common = extract_nonpersistent({OPTIMIZER: self.optimizer})[1] if self.optimizer else {}
        return parts_of([*mine, *filter(_is_written, self.own)]), objects, extract_sharded_base(common)[1]

    def to_read(self) -> list[Part]:
        """This rank's parts; `exchange` brings those that equal ranks read."""
        return parts_of([*share(self.shared, self.group.rank(), self.group.size()), *self.own])

    def exchange(self) -> None:
        """Gives equal ranks what each of them has read. Collective over the layout."""
        for rank in range(self.group.size() if self.group.size() > 1 else 0):
            for run in share(self.shared, rank, self.group.size()):
                dist.broadcast(run.data, group_src=rank, group=self.group)

    def loaded_optimizer(self, common: dict[str, Any]) -> dict[str, Any]:
        """The optimizer's state dict: its tensors, which have been read, and what was common."""
        kept, rest = extract_nonpersistent(self.optimizer)
        sharded, _ = extract_sharded_base(rest)
        dict_list_map_inplace(lambda entry: entry.unwrap(), kept)
        dict_list_map_inplace(lambda entry: entry.data, sharded)
        return merge(merge(common[OPTIMIZER], kept), sharded)


def owned_state(part: DistributedOptimizer) -> Iterator[tuple[Tensor, int, dict[str, Tensor]]]:
    """(parameter, start, tensors): master weights and moments of the elements, from `start` on, that this rank owns."""
    if not part.optimizer.state:  # before the first update; it has no other way to allocate them
        part.load_state_dict(part.state_dict())
        for state in part.optimizer.state.values():
            for moment in state.values():
                moment.zero_()
    for parameter, (buffer, dtype, bucket) in part.model_param_gbuf_map.items():
        owned = part.gbuf_ranges[buffer][dtype][bucket]["param_map"][parameter]["param"]
        tensors = part._get_main_param_and_optimizer_states(parameter)
        yield parameter, owned.start, {name: tensor for name, tensor in tensors.items() if name != "step"}


def _by_layer(part: Any) -> Any:
    """A tensor that is stacked over layers under its own layer's name: a stack would have to hold all layers."""
    if isinstance(part, ShardedTensorFactory):
        build = part.build_fn
        return dataclasses.replace(part, build_fn=lambda *args: dict_list_map_inplace(_by_layer, build(*args)))
    if not isinstance(part, ShardedTensor) or part.prepend_axis_num == 0:
        return part
    names = {"global_shape", "global_offset", "axis_fragmentations"}
    changes: dict[str, Any] = {name: value[1:] for name in names if (value := getattr(part, name)) is not None}
    key = part.key.replace("layers.", f"layers.{part.global_offset[0]}.")
    return dataclasses.replace(part, key=key, prepend_axis_num=part.prepend_axis_num - 1, **changes)


def restore_random_state(state: Mapping[str, Any]) -> None:
    torch.cuda.set_rng_state(state["default"])
    get_cuda_rng_tracker().set_states(state["tracker"])


def _random_state() -> dict[str, Any]:
    return {"default": torch.cuda.get_rng_state(), "tracker": get_cuda_rng_tracker().get_states()}


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().view(-1)


def _is_written(run: Run) -> bool:
    """Of copies over tensor parallelism and stages one is written. Copies over data parallelism share the work."""
    replica = run.placed.replica_id
    assert isinstance(replica, tuple) and len(replica) == 3, f"{run.placed.key}: replicas by stage, tensor and data"
    return _is_main(replica[:-1])


def _is_main(replica: int | Sequence[int]) -> bool:
    return not any(replica if isinstance(replica, Sequence) else (replica,))
