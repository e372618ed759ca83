"""The connections of a whole session: how many, how old, and what becomes of it when there is none."""

import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from laptop import ALLOWED, CLUSTER4, Laptop, Session

from peers import eventually
from pod import inside
from tpvpn.lab.topology import PODS

CUT = ("ss", "-K", "dst", "192.0.2.10")


def status(laptop: Laptop) -> dict:
    shown = json.loads(laptop.tpvpn("status", "--output", "json").stdout)
    return shown["sessions"][0]


def connections(laptop: Laptop) -> set[str]:
    """The local ports of the connections to the manager."""
    lines = laptop.sh("ss -Htn state established dst 192.0.2.10").splitlines()
    return {line.split()[2] for line in lines}


def without_manager(laptop: Laptop, session: Session) -> None:
    """Nothing but a refusal answers there from now on."""
    laptop.sh("nft add table ip tests; nft add chain ip tests out { type filter hook output priority 0\\; }")
    laptop.sh("nft add rule ip tests out ip daddr 192.0.2.10 tcp dport 7070 reject with tcp reset")


@pytest.fixture
def wall(laptop: Laptop):
    """A firewall of the laptop's own, that tests may close."""
    yield
    laptop.run("nft", "delete", "table", "ip", "tests")


def test_a_connection_that_is_cut_is_made_anew_at_once(laptop: Laptop) -> None:
    with laptop.connected() as session:
        laptop.reaches("cluster", CLUSTER4)
        before, began = status(laptop), time.monotonic()
        laptop.sh(" ".join(CUT))
        eventually(lambda: status(laptop)["reconnects"] == 1, 3, "connected again")
        assert time.monotonic() - began < 2
        laptop.reaches("cluster", CLUSTER4)
        now = status(laptop)
        assert (now["manager"], now["addresses"]) == (before["manager"], before["addresses"])
        assert (now["state"], now["links"]) == ("ready", 1)
        session.says("; connecting again")
        session.says("connected again after 0.")


def test_while_there_is_none_status_says_so(laptop: Laptop, wall: None) -> None:
    with laptop.connected() as session:
        without_manager(laptop, session)
        laptop.sh(" ".join(CUT))
        eventually(lambda: status(laptop)["state"] == "reconnecting", 3, "reconnecting")
        assert status(laptop)["links"] == 0
        assert "default: reconnecting" in laptop.tpvpn("status").stdout
        session.says("no connection yet: cannot reach the manager at 192.0.2.10:7070")
        laptop.run("nft", "delete", "table", "ip", "tests")
        eventually(lambda: status(laptop)["state"] == "ready", 5, "ready")
        laptop.reaches("cluster", CLUSTER4)
        assert session.said.count("no connection yet") == 1, "what is the same is said once"


def test_a_session_gives_up_when_it_is_told_to(laptop: Laptop, wall: None) -> None:
    before = laptop.state()
    with laptop.connected(*ALLOWED, "--give-up-after", "2") as session:
        without_manager(laptop, session)
        began = time.monotonic()
        laptop.sh(" ".join(CUT))
        assert session.wait(10) == 7
        assert 2 < time.monotonic() - began < 5
        last = session.said.strip().splitlines()[-1]
        assert last.startswith("tpvpn: the connection is lost, and no other is to be had: cannot reach the manager")
    laptop.run("nft", "delete", "table", "ip", "tests")
    laptop.is_as(before)


def test_or_at_once(laptop: Laptop) -> None:
    with laptop.connected(*ALLOWED, "--give-up-after", "0") as session:
        laptop.sh(" ".join(CUT))
        assert session.wait(5) == 7
        assert "connecting again" not in session.said


def test_a_connection_is_renewed_before_it_is_old(laptop: Laptop) -> None:
    with laptop.connected(*ALLOWED, "--max-link-age", "0.01") as session:
        (first,) = connections(laptop)
        eventually(lambda: status(laptop)["reconnects"] >= 3, 10, "renewed")
        laptop.reaches("cluster", CLUSTER4)
        assert first not in connections(laptop) or status(laptop)["reconnects"] < 5
        assert "connecting again" not in session.said
        assert "connected again" not in session.said, "what is planned is not worth a word"


def test_several_share_the_traffic(laptop: Laptop) -> None:
    with laptop.connected(*ALLOWED, "--links", "3") as session:
        eventually(lambda: status(laptop)["links"] == 3, 5, "three links")
        assert len(connections(laptop)) == 3
        for _ in range(5):
            laptop.reaches("cluster", CLUSTER4)
        gone = connections(laptop).pop()
        laptop.sh(f"ss -K dst 192.0.2.10 sport = {gone.rpartition(':')[2]}")
        laptop.reaches("cluster", CLUSTER4)
        eventually(lambda: status(laptop)["links"] == 3, 5, "three links again")
        assert session.said.count("took us in") == 1
        assert "forgotten" not in session.said


@contextlib.contextmanager
def flooded(laptop: Laptop, up: bool) -> Iterator[None]:
    """More bytes than the session takes, one way."""
    with inside(laptop.lab.namespace("cluster")):
        listening = socket.create_server((PODS[0], 0))
    with listening, laptop.socket(socket.AF_INET) as near:
        near.settimeout(10)
        near.connect(listening.getsockname())
        far, _ = listening.accept()
        with far, ThreadPoolExecutor(2) as pool:
            pool.submit(send, near if up else far)
            pool.submit(receive, far if up else near)
            try:
                yield
            finally:
                for end in (near, far):
                    with contextlib.suppress(OSError):  # it has ended already
                        end.shutdown(socket.SHUT_RDWR)


def send(connected: socket.socket) -> None:
    chunk = bytes(1 << 20)
    while True:
        connected.sendall(chunk)


def receive(connected: socket.socket) -> None:
    buffer = bytearray(1 << 20)
    while connected.recv_into(buffer):
        pass


@pytest.mark.parametrize("up", [True, False], ids=["up", "down"])
def test_the_manager_hears_the_goodbye_in_the_middle_of_traffic(laptop: Laptop, up: bool) -> None:
    """Else it would keep the address, and what is open, for as long as it waits for lost sessions."""
    said = 'reason="the client said goodbye"'
    for _ in range(5):
        before = laptop.lab.log("manager").read_text().count(said)
        with contextlib.ExitStack() as traffic:
            with laptop.connected():
                traffic.enter_context(flooded(laptop, up))
                laptop.reaches("cluster", CLUSTER4[:1])
            eventually(lambda: laptop.lab.log("manager").read_text().count(said) > before, 3, "it heard it")  # noqa: B023


def test_a_manager_that_comes_back_without_the_session_resets_what_was_open(laptop: Laptop) -> None:
    with laptop.connected() as session:
        before = status(laptop)
        connected = laptop.socket(socket.AF_INET)
        connected.settimeout(10)
        connected.connect((CLUSTER4[0], 80))
        os.kill(laptop.process("node", "manager"), signal.SIGKILL)
        laptop.lab.start_manager()
        with connected, pytest.raises(ConnectionError):
            connected.recv(1)
        session.says("the manager had forgotten the session: a new one has begun, and 1 connection was reset", 5)
        eventually(lambda: status(laptop)["state"] == "ready", 5, "ready")
        assert status(laptop)["addresses"] == before["addresses"]
        laptop.reaches("cluster", CLUSTER4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--links", "0"), "--links 0: a session has 1 to 8 connections"),
        (("--links", "9"), "--links 9: a session has 1 to 8 connections"),
        (("--max-link-age", "0"), "--max-link-age wants minutes"),
        (("--max-link-age", "nan"), "--max-link-age wants minutes"),
        (("--give-up-after", "-1"), "--give-up-after wants seconds"),
        (("--give-up-after", "nan"), "--give-up-after wants seconds"),
    ],
)
def test_what_makes_no_sense_is_refused(laptop: Laptop, options: tuple[str, str], said: str) -> None:
    done = laptop.connect(*options)
    assert (done.returncode, said in done.stderr) == (2, True), done.stderr
