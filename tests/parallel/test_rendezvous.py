"""Ranks that do not come are named, with the node where they should be. The ranks are threads here."""

import contextlib
import re
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from commands import free_port

from megatron_rlhf.config.errors import RunFailed, UserError
from megatron_rlhf.config.launch import Launch, expected_nodes, node_names
from megatron_rlhf.parallel import rendezvous

PATIENCE = 6.0
"""Seconds in which a rank has tried more than once, and said so, on a busy machine, too."""


@pytest.fixture
def port(monkeypatch) -> int:
    port = free_port()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.setattr(rendezvous, "_LAST_WORDS", 0.1)
    monkeypatch.setattr(rendezvous, "_ONE_TRY", 0.3)
    return port


def meet(*launches: Launch, timeout_s: float = 1.5, silence_s: float = 0.4):
    """What each of these ranks gets: its store, or the exception."""
    with ThreadPoolExecutor(len(launches)) as pool:
        joined = [pool.submit(rendezvous.meet, launch, timeout_s, silence_s) for launch in launches]
        return [future.exception() or future.result() for future in joined]


def test_all_that_come_have_one_store(port):
    stores = meet(*(Launch(rank, 3, rank) for rank in range(3)), timeout_s=20)
    stores[1].set("word", "given")
    assert stores[0].get("word") == stores[2].get("word") == b"given"


def test_a_node_that_never_starts_is_named(port, monkeypatch, capfd):
    for name, value in (("SLURM_STEP_NODELIST", "gpu[07-09]"), ("SLURM_STEP_TASKS_PER_NODE", "2,1(x2)")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURMD_NODENAME", "gpu07")
    first, second = meet(Launch(0, 4, 0), Launch(1, 4, 1), timeout_s=PATIENCE)
    assert isinstance(first, RunFailed) and isinstance(second, RunFailed)
    missing = (
        rf"2 of 4 ranks have arrived \(MASTER_ADDR=127\.0\.0\.1, MASTER_PORT={port}\): ranks 0-1 on gpu07\. "
        r"Not arrived: rank 2, expected on gpu08; rank 3, expected on gpu09\."
    )
    assert re.search(missing, str(first))
    assert str(first).endswith("(run.rendezvous_timeout_s=6). At fault: node gpu08,gpu09.")
    said = capfd.readouterr().err
    assert re.search(r"^rendezvous: after \d s " + missing, said, re.MULTILINE), "before it ends"


def test_an_address_that_does_not_answer_is_named(port, capfd):
    (failed,) = meet(Launch(3, 4, 0), timeout_s=PATIENCE)
    assert isinstance(failed, RunFailed)
    assert f"gets no answer from rank 0 at 127.0.0.1:{port}" in str(failed)
    assert "Connection refused" in str(failed)
    assert "rendezvous: rank 3 on" in capfd.readouterr().err


def test_a_stranger_at_the_address_is_told_apart(port, capfd):
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", port))
        stranger.listen()
        greeter = threading.Thread(target=greet, args=(stranger,), daemon=True)
        greeter.start()
        (failed,) = meet(Launch(3, 4, 0), timeout_s=PATIENCE)
    assert isinstance(failed, RunFailed)
    assert "what listens there is not a rank" in str(failed)
    said = capfd.readouterr().err
    assert said.startswith("rendezvous: rank 3 on") and "frame #" not in said


def greet(stranger: socket.socket) -> None:
    """As a web server answers whatever it gets."""
    with contextlib.suppress(OSError):
        while True:
            connection, _ = stranger.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 4)


def test_an_address_of_another_machine_is_named(port, monkeypatch):
    monkeypatch.setattr(rendezvous, "_connect", lambda host, port: "Connection refused")
    (failed,) = meet(Launch(0, 2, 0))
    assert "MASTER_ADDR=127.0.0.1 is no address of rank 0's node" in str(failed)


def test_one_rank_of_a_node_speaks(port, capfd):
    (failed,) = meet(Launch(3, 4, 3))
    assert isinstance(failed, RunFailed)
    assert "rendezvous:" not in capfd.readouterr().err


def test_a_port_in_use_is_named(port):
    (store,) = meet(Launch(0, 1, 0))
    (refused,) = meet(Launch(0, 1, 0))
    assert store.get("met") == b"yes"
    assert isinstance(refused, UserError) and f"MASTER_PORT={port} cannot be opened" in str(refused)


@pytest.mark.parametrize(
    ("listed", "names"),
    [
        ("n1", ["n1"]),
        ("n[1-3,7]", ["n1", "n2", "n3", "n7"]),
        ("gpu[09-11],login", ["gpu09", "gpu10", "gpu11", "login"]),
        ("a[1-2]-ib,b", ["a1-ib", "a2-ib", "b"]),
        ("rack[0-1]n[08-9],r[2]", ["rack0n08", "rack0n09", "rack1n08", "rack1n09", "r2"]),
        ("", []),
    ],
)
def test_slurms_lists_of_nodes(listed, names):
    assert node_names(listed) == names


@pytest.mark.parametrize(
    ("environment", "nodes"),
    [
        ({"SLURM_STEP_NODELIST": "n[1-3]", "SLURM_STEP_TASKS_PER_NODE": "2(x2),1"}, "n1 n1 n2 n2 n3"),
        ({"SLURM_JOB_NODELIST": "n[1-3]", "SLURM_TASKS_PER_NODE": "2(x2),1"}, "n1 n1 n2 n2 n3"),
        ({"SLURM_STEP_NODELIST": "n[1-3]", "SLURM_STEP_TASKS_PER_NODE": "2(x3)"}, ""),
        (
            {"SLURM_STEP_NODELIST": "n[1-3]", "SLURM_STEP_TASKS_PER_NODE": "2(x2),1", "SLURM_DISTRIBUTION": "cyclic"},
            "n1 n2 n3 n1 n2",
        ),
        (
            {"SLURM_STEP_NODELIST": "n[1-3]", "SLURM_STEP_TASKS_PER_NODE": "2(x2),1", "SLURM_DISTRIBUTION": "plane=2"},
            "",
        ),
        ({}, ""),
    ],
)
def test_where_a_rank_is_expected(environment, nodes):
    assert expected_nodes(5, environment) == nodes.split()
