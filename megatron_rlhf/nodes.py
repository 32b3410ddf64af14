"""The nodes of a job, compared: a line for each healthy one, and by name those that are broken, slow, or different.

One process a node (`DOCTOR=1 sbatch slurm/...`). Each examines its own node, multiplies matrices on each of its GPUs, and
sums a buffer with each of its two neighbours in a ring: a node that is slow with both is named, else the pair is.
"""

import dataclasses
import datetime
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from megatron_rlhf import doctor
from megatron_rlhf.config.launch import Launch, node_name

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

SECONDS_FOR_ALL = 120.0
"""For the last node to start after the first one, and to examine itself in addition to `doctor.SELF_TEST_TIMEOUT`."""
SECONDS_OF_A_PAIR = 90
SLOW_PRODUCT, SLOW_PAIR = 0.9, 0.7
"""Below this share of the median, a node or a pair is named."""
_BUFFER = {"cuda": 2**28, "cpu": 2**24}
"""Bytes that a pair sums up."""


@dataclasses.dataclass
class Node:
    """What one node says about itself."""

    name: str
    versions: dict[str, str]
    """Finding -> detail, of those that are ok."""
    tflops: float = 0.0
    """Rate of a matrix product on its slowest GPU (bf16), or on its cores (fp32)."""
    broken: str = ""
    """What is broken, and how to fix it."""


def examine(self_test: bool) -> Node:
    """This process's node."""
    findings = doctor.examine()
    if self_test and not doctor.broken(findings):
        findings.append(doctor.self_test())
    versions = {f.name: f.detail for f in findings if f.state == doctor.OK}
    if wrong := doctor.broken(findings):
        return Node(node_name(), versions, broken="; ".join(f"{f.name}: {f.detail} (fix: {f.fix})" for f in wrong))
    return Node(node_name(), versions, product_rate())


def product_rate() -> float:
    """TFLOP/s of a large matrix product, on the slowest of this node's GPUs."""
    import torch

    if not torch.cuda.is_available():
        return _product_rate("cpu", torch.float32, 512)
    return min(_product_rate(f"cuda:{i}", torch.bfloat16, 8192) for i in range(torch.cuda.device_count()))


def _product_rate(device: str, dtype: "torch.dtype", size: int, times: int = 20) -> float:
    import torch

    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = 0.0
    for _ in range(3):
        _synchronize(device)
        began = time.perf_counter()
        for _ in range(times):
            a @ b
        _synchronize(device)
        best = max(best, times * 2 * size**3 / (time.perf_counter() - began))
    return best / 1e12


def check(launch: Launch, self_test: bool) -> int:
    """Examine all nodes; the first rank prints the report. Returns this process's exit code."""
    from megatron_rlhf.parallel import rendezvous

    store = rendezvous.meet(launch, SECONDS_FOR_ALL)
    store.set_timeout(datetime.timedelta(seconds=doctor.SELF_TEST_TIMEOUT + SECONDS_FOR_ALL))
    node = examine(self_test)
    store.set(f"node {launch.rank}", json.dumps(dataclasses.asdict(node)))
    store.set(f"address {launch.rank}", _own_address())
    nodes = [Node(**json.loads(store.get(f"node {rank}"))) for rank in range(launch.world_size)]
    for pairs in ring(launch.world_size):
        for pair in pairs:
            if launch.rank in pair and not any(nodes[rank].broken for rank in pair):
                _measure(store, pair, launch.rank)
    code = 0
    if launch.rank == 0:
        measured = {
            pair: json.loads(store.get(_key(pair)))
            for pairs in ring(launch.world_size)
            for pair in pairs
            if not any(nodes[rank].broken for rank in pair)
        }
        text, code = report(nodes, measured)
        print(text, flush=True)
        store.set("told", "yes")
        store.wait([f"left {rank}" for rank in range(1, launch.world_size)])  # the store ends with this rank
    else:
        store.wait(["told"])
        store.set(f"left {launch.rank}", "yes")
    return code


def ring(size: int) -> list[list[tuple[int, int]]]:
    """Each node with its neighbour, in rounds in which no node is in two pairs."""
    pairs = [(i, i + 1) for i in range(size - 1)] + ([(0, size - 1)] if size > 2 else [])
    rounds: list[list[tuple[int, int]]] = []
    for pair in pairs:
        free = (r for r in rounds if not {node for other in r for node in other} & set(pair))
        chosen = next(free, None)
        if chosen is None:
            rounds.append(chosen := [])
        chosen.append(pair)
    return rounds


def report(nodes: Sequence[Node], pairs: Mapping[tuple[int, int], float | str]) -> tuple[str, int]:
    """The text, and the exit code: 1 if a node or a connection is broken.

    `pairs`: GB/s of the nodes' neighbours, or what went wrong.
    """
    healthy = [i for i, node in enumerate(nodes) if not node.broken]
    remarks = {i: _remarks(i, [nodes[j] for j in healthy], nodes[i]) for i in healthy}
    rates = [rate for rate in pairs.values() if not isinstance(rate, str)]
    slow = {
        pair for pair, rate in pairs.items() if isinstance(rate, str) or rate < SLOW_PAIR * statistics.median(rates)
    }
    lines, unexplained = [], set(slow)
    for i in healthy:
        mine = {pair for pair in pairs if i in pair}
        if len(mine) > 1 and mine <= slow:
            remarks[i].append("slow or no connection with both neighbours")
            unexplained -= mine
    for i in sorted(healthy, key=lambda i: bool(remarks[i])):
        ring_rates = ", ".join(
            f"{rate:.3g} GB/s with {nodes[sum(pair) - i].name}"
            for pair, rate in pairs.items()
            if i in pair and not isinstance(rate, str)
        )
        about = [f"{nodes[i].tflops:.3g} TFLOP/s", ring_rates, *(f"{k} {v}" for k, v in nodes[i].versions.items())]
        state = f"SLOW OR DIFFERENT: {'; '.join(remarks[i])}" if remarks[i] else "ok"
        lines.append(f"{nodes[i].name}: {state}: {', '.join(filter(None, about))}")
    for pair in sorted(unexplained):
        first, second, rate = nodes[pair[0]].name, nodes[pair[1]].name, pairs[pair]
        said = rate if isinstance(rate, str) else f"{rate:.3g} GB/s, the median is {statistics.median(rates):.3g}"
        lines.append(f"{first} with {second}: SLOW OR BROKEN: {said}")
    broken = [node for node in nodes if node.broken]
    lines += [f"{node.name}: BROKEN: {node.broken}" for node in broken]
    if broken:
        lines.append(
            f"{len(broken)} of {len(nodes)} nodes are broken. At fault: node {','.join(n.name for n in broken)}."
        )
    return "\n".join(lines), int(bool(broken) or any(isinstance(rate, str) for rate in pairs.values()))


def _remarks(index: int, healthy: Sequence[Node], node: Node) -> list[str]:
    """What is unlike the others."""
    found = []
    median = statistics.median(other.tflops for other in healthy)
    if node.tflops < SLOW_PRODUCT * median:
        found.append(f"matrix products at {node.tflops:.3g} TFLOP/s, the median is {median:.3g}")
    for name in sorted({name for other in healthy for name in other.versions}):
        usual, count = Counter(other.versions.get(name, "none") for other in healthy).most_common(1)[0]
        mine = node.versions.get(name, "none")
        if mine != usual and count > len(healthy) / 2:
            found.append(f"{name} is {mine}, elsewhere {usual}")
    return found


def _measure(store: "dist.Store", pair: tuple[int, int], rank: int) -> None:
    """Run this node's half of a pair in a process of its own: it may hang. The lower rank says what came out."""
    lower = rank == pair[0]
    if lower:
        with socket.socket() as free:
            free.bind(("", 0))
            store.set(f"port {pair}", str(free.getsockname()[1]))
    world = {
        "RANK": str(int(not lower)),
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": store.get(f"address {pair[0]}").decode(),
        "MASTER_PORT": store.get(f"port {pair}").decode(),
    }
    try:
        done = subprocess.run(
            [sys.executable, "-m", "megatron_rlhf.nodes"],
            env={**doctor.separate_environment(), **world},
            capture_output=True,
            text=True,
            timeout=SECONDS_OF_A_PAIR,
        )
        said = done.stdout.strip().splitlines()[-1] if done.returncode == 0 else json.dumps(_why(done.stderr))
    except subprocess.TimeoutExpired:
        said = json.dumps(f"no answer within {SECONDS_OF_A_PAIR} s")
    if lower:
        store.set(_key(pair), said)


def _why(printed: str) -> str:
    return doctor.first_exception(printed) or (printed.strip().splitlines() or ["it ended without a word"])[-1]


def _key(pair: tuple[int, int]) -> str:
    return f"rate {pair[0]} {pair[1]}"


def _own_address() -> str:
    """The address by which this node reaches the first one: its neighbours most likely reach it there, too."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as route:
        try:
            route.connect((os.environ["MASTER_ADDR"], 9))
            return str(route.getsockname()[0])
        except OSError:
            return socket.gethostname()


def _synchronize(device: "str | torch.device") -> None:
    import torch

    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def _pair() -> None:
    """One of two processes: GB/s of summing up a buffer."""
    import torch
    import torch.distributed as dist

    from megatron_rlhf.parallel import collectives, runtime

    runtime.initialize(SECONDS_OF_A_PAIR / 2)
    device = collectives.device()
    buffer = torch.ones(_BUFFER[device.type] // 4, device=device)
    best = 0.0
    for _ in range(5):
        _synchronize(device)
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(buffer)
        _synchronize(device)
        best = max(best, buffer.numel() * 4 / (time.perf_counter() - began))
    print(json.dumps(best / 1e9), flush=True)
    runtime.shutdown()


if __name__ == "__main__":
    _pair()
