"""Seconds of exchanges between ranks: latency, and bytes over the slowest link."""

import math
from dataclasses import dataclass

from megatron_rlhf.config.cluster import ClusterConfig
from megatron_rlhf.planning.placement import PlacedModel

_MICROSECOND = 1e-6
_GB = 1e9


@dataclass(frozen=True)
class Group:
    """Ranks that exchange something."""

    ranks: int
    in_node: int
    """How many of them share a node."""

    @classmethod
    def every(cls, stride: int, ranks: int, cluster: ClusterConfig) -> "Group":
        """Every `stride`-th rank of a consecutive range."""
        return cls(ranks, max(1, min(ranks, cluster.gpus_per_node // stride)))

    @property
    def leaves_node(self) -> bool:
        return self.ranks > self.in_node


def tensor_group(placed: PlacedModel, cluster: ClusterConfig) -> Group:
    return Group.every(1, placed.parallel.tensor, cluster)


def context_group(placed: PlacedModel, cluster: ClusterConfig) -> Group:
    return Group.every(placed.parallel.tensor, placed.parallel.context, cluster)


def data_group(placed: PlacedModel, cluster: ClusterConfig) -> Group:
    """Ranks that sum gradients: data and context parallelism."""
    return Group.every(placed.parallel.tensor, placed.data * placed.parallel.context, cluster)


def gather(size: float, group: Group, cluster: ClusterConfig) -> float:
    """Each rank gets the others' parts of a tensor of `size` bytes; scattering a sum takes as long.

    A ring leaves each node once, and there are as many rings as members of the node, each over a network port of its own.
    """
    if group.ranks == 1:
        return 0.0
    rate = cluster.node_gb_per_s
    if group.leaves_node:
        rate = min(rate, group.in_node * cluster.network_gb_per_s)
    hops = math.ceil(math.log2(group.ranks))
    moved = (group.ranks - 1) / group.ranks * size
    return moved / (rate * cluster.link_efficiency * _GB) + hops * _latency(group.leaves_node, cluster)


def all_reduce(size: float, group: Group, cluster: ClusterConfig) -> float:
    """Scatter sums, then gather them."""
    return 2 * gather(size, group, cluster)


def message(size: float, placed: PlacedModel, cluster: ClusterConfig) -> float:
    """From a pipeline stage to the next."""
    leaves_node = placed.gpus > cluster.gpus_per_node
    rate = cluster.network_gb_per_s if leaves_node else cluster.node_gb_per_s
    return size / (rate * cluster.link_efficiency * _GB) + _latency(leaves_node, cluster)


def _latency(leaves_node: bool, cluster: ClusterConfig) -> float:
    return _MICROSECOND * (cluster.network_latency_us if leaves_node else cluster.node_latency_us)
