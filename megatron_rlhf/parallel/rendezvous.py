"""Where the ranks meet, and who has come: a minute is enough to say which ranks are missing, and where they should be."""

import contextlib
import datetime
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby

import torch.distributed as dist

from megatron_rlhf.config.errors import RunFailed, UserError
from megatron_rlhf.config.launch import Launch, expected_nodes, node_name

SECONDS_OF_SILENCE = 60.0
_POLL = 0.2
_ONE_TRY = 5.0
_LAST_WORDS = 10.0
"""For the launcher to end the others, when the first rank has said why."""


def meet(launch: Launch, timeout_s: float, silence_s: float = SECONDS_OF_SILENCE) -> dist.Store:
    """The store of a world whose ranks have all come. The first rank holds it.

    Raises:
        RunFailed: on every rank, after `timeout_s`; the first rank's names those that are missing.
        UserError: when the first rank cannot listen on the port.
    """
    host, port = address()
    store: dist.Store
    if launch.rank == 0:
        try:
            # Over its own loopback: whether the others can reach the address is for them to find out.
            store = dist.TCPStore("localhost", int(port), is_master=True, wait_for_workers=False)
        except dist.DistNetworkError as error:
            raise UserError(
                f"MASTER_PORT={port} cannot be opened on {node_name()}: {str(error).splitlines()[0]}"
            ) from error
        _arrive(store, launch)
        _receive(store, launch, host, int(port), timeout_s, silence_s)
    else:
        store = _reach(launch, host, int(port), timeout_s, silence_s)
        _arrive(store, launch)
        _wait_for_all(store, timeout_s)
    return store


def _arrive(store: dist.Store, launch: Launch) -> None:
    store.set(f"arrived {launch.rank}", node_name())
    store.add("arrived", 1)


def _receive(store: dist.Store, launch: Launch, host: str, port: int, timeout_s: float, silence_s: float) -> None:
    """On the first rank: wait for the others, and say from time to time who is missing."""
    began = said = time.monotonic()
    while store.add("arrived", 0) < launch.world_size:
        now = time.monotonic()
        if now - began > timeout_s:
            missing = _tell(store, launch, host, port, now - began)
            store.set("met", "no")
            nodes = _missing_nodes(store, launch)
            fault = f" At fault: node {','.join(nodes)}." if nodes else ""
            raise RunFailed(f"{missing} The job ends (run.rendezvous_timeout_s={timeout_s:g}).{fault}")
        if now - said > silence_s:
            said = now
            print(f"rendezvous: {_tell(store, launch, host, port, now - began)}", file=sys.stderr, flush=True)
        time.sleep(_POLL)
    store.set("met", "yes")


def _wait_for_all(store: dist.Store, timeout_s: float) -> None:
    try:
        store.wait(["met"], datetime.timedelta(seconds=timeout_s + _LAST_WORDS))
        if store.get("met") == b"yes":
            return
    except (dist.DistError, RuntimeError):  # the first rank has gone, and has said why
        pass
    time.sleep(_LAST_WORDS)
    raise RunFailed("not all ranks have arrived: the first rank says which")


def _reach(launch: Launch, host: str, port: int, timeout_s: float, silence_s: float) -> dist.Store:
    """Connect to the first rank's store, which may not be there yet."""
    began = said = time.monotonic()
    while True:
        found = _connect(host, port)
        if not isinstance(found, str):
            return found
        now = time.monotonic()
        problem = (
            f"rank {launch.rank} on {node_name()} gets no answer from rank 0 at {host}:{port} for {now - began:.0f} s "
            f"({found}). Is MASTER_ADDR={host} an address of rank 0's node, and can other nodes reach its port?"
        )
        if now - began > timeout_s:
            raise RunFailed(f"{problem} The job ends (run.rendezvous_timeout_s={timeout_s:g}).")
        if now - said > silence_s and launch.local_rank == 0:  # one rank of each node
            said = now
            print(f"rendezvous: {problem}", file=sys.stderr, flush=True)
        time.sleep(1.0)


def _connect(host: str, port: int) -> dist.Store | str:
    """The first rank's store there, or why there is none."""
    try:
        socket.create_connection((host, port), timeout=_ONE_TRY).close()
    except OSError as error:
        return error.strerror or str(error)
    try:
        with _without_stderr():  # pages of it, for every try
            wait = datetime.timedelta(seconds=_ONE_TRY)
            return dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=wait)
    except (dist.DistError, RuntimeError):
        return "what listens there is not a rank"


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
    """What libraries print on the screen is dropped."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _tell(store: dist.Store, launch: Launch, host: str, port: int, seconds: float) -> str:
    """Who has arrived, who has not, and where they are expected."""
    here, missing = _arrivals(store, launch.world_size)
    expected = expected_nodes(launch.world_size)
    awaited = (
        "; ".join(f"{_ranks(ranks)}, expected on {node}" for node, ranks in _by_node((r, expected[r]) for r in missing))
        if expected
        else f"{_ranks(missing)}, to be started with this MASTER_ADDR and MASTER_PORT, and with RANK and WORLD_SIZE"
    )
    arrived = ", ".join(f"{_ranks(ranks)} on {node}" for node, ranks in _by_node(here.items()))
    own = _connect(host, port)
    wrong = f" MASTER_ADDR={host} is no address of rank 0's node {node_name()}: {own}." if isinstance(own, str) else ""
    return (
        f"after {seconds:.0f} s {len(here)} of {launch.world_size} ranks have arrived (MASTER_ADDR={host}, MASTER_PORT={port}): "
        f"{arrived}. Not arrived: {awaited}.{wrong}"
    )


def _arrivals(store: dist.Store, world_size: int) -> tuple[dict[int, str], list[int]]:
    here = {
        rank: store.get(f"arrived {rank}").decode() for rank in range(world_size) if store.check([f"arrived {rank}"])
    }
    return here, [rank for rank in range(world_size) if rank not in here]


def _missing_nodes(store: dist.Store, launch: Launch) -> list[str]:
    expected = expected_nodes(launch.world_size)
    missing = _arrivals(store, launch.world_size)[1]
    return list(dict.fromkeys(expected[rank] for rank in missing)) if expected else []


def _by_node(ranks: Iterable[tuple[int, str]]) -> Iterator[tuple[str, list[int]]]:
    for node, of_node in groupby(ranks, lambda pair: pair[1]):
        yield node, [rank for rank, _ in of_node]


def _ranks(ranks: list[int]) -> str:
    """rank 3; ranks 0-7, 9."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    shown = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"


def address(environment: Mapping[str, str] = os.environ) -> tuple[str, str]:
    """Address and port where the ranks meet: from MASTER_ADDR and MASTER_PORT, and from Slurm for what they do not say.

    Raises:
        UserError: for an invalid port, and if neither gives one.
    """
    host, port = environment.get("MASTER_ADDR", ""), environment.get("MASTER_PORT", "")
    job = environment.get("SLURM_JOB_ID", "")
    if port and not (port.isdecimal() and 0 < int(port) < 2**16):
        raise UserError(f"MASTER_PORT={port}: a port is a whole number from 1 to 65535")
    if not port and not job.isdecimal() and host:
        raise UserError(
            f"MASTER_ADDR={host} is set and MASTER_PORT is not: set it to a port that is free there, the same on all ranks"
        )
    return host or _first_node(environment), port or str(20000 + int(job if job.isdecimal() else "0") % 20000)


def _first_node(environment: Mapping[str, str]) -> str:
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    if not nodes:
        raise UserError(
            "MASTER_ADDR is not set and there is no SLURM_JOB_NODELIST to take it from: use torchrun or srun"
        )
    first = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    name = first.stdout.split()[0]
    shown = subprocess.run(["scontrol", "show", "node", name], capture_output=True, text=True, check=False).stdout
    address = re.search(r"NodeAddr=(\S+)", shown)
    host = address.group(1) if address else name
    try:
        socket.gethostbyname(host)
    except OSError as error:
        raise UserError(f"node {name} ({host}) cannot be resolved from {socket.gethostname()}: {error}") from error
    return host
