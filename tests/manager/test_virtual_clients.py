"""Virtual subnets as clients ask a running manager for them: what it answers, and what a hostile one costs others."""

import contextlib
import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from peers import POD, Client, Manager, ended, eventually, lab, running_manager
from pod import run
from tpvpn.lab import Lab
from tpvpn.manager.server import MAX_SESSIONS, MAX_STRANGERS
from tpvpn.proto import config, message
from tpvpn.wire import frame

__all__ = ["lab"]

PODS, SERVICES = ["246.132.0.0/16", "10.132.0.0/16"], ["246.130.0.0/16", "10.130.0.0/16"]
SIX = ["fd74:7077:132::/64", "fd10:132::/64"]
VIRTUAL = "246.132.0.10"  # POD
MANY = [[f"246.{128 + number}.0.0/16", f"10.{number}.0.0/16"] for number in range(config.MAX_PAIRS)]


@pytest.fixture(scope="module")
def manager(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Manager]:
    """It starts with the usual limit of descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    with running_manager(lab, tmp_path_factory.mktemp("manager")) as manager:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        yield manager


def change(client: Client, *pairs: list[str], number: int = 1) -> str | None:
    """Ask for a mapping; None when it is in force, else why it is not."""
    client.say("config", id=number, virtual=list(pairs))
    answer = client.hear("config")
    assert answer["id"] == number
    assert answer.keys() <= {"type", "id", "error"}
    return answer.get("error")


def ruleset(lab: Lab) -> str:
    return run("ip", "netns", "exec", lab.namespace("node"), "nft", "list", "ruleset")


def mappings(lab: Lab) -> int:
    """How many sessions have one."""
    return ruleset(lab).count("table inet tpvpn-s")


def test_a_mapping_comes_changes_and_goes(manager: Manager, lab: Lab) -> None:
    with manager.session() as client:
        assert not client.echo(VIRTUAL, 0.2)
        assert change(client, PODS, SERVICES, SIX) is None
        assert client.echo(VIRTUAL)
        assert client.echo(POD)
        assert client.echo("246.130.0.80")
        assert change(client, SERVICES, number=2) is None
        assert not client.echo(VIRTUAL, 0.2)
        assert change(client, number=-(10**30)) is None
        assert not client.echo("246.130.0.80", 0.2)
        assert mappings(lab) == 0
        assert change(client, PODS) is None
        assert mappings(lab) == 1
    eventually(lambda: mappings(lab) == 0, 2, "a session's mapping goes with it")


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        ([*MANY, SERVICES], "65 virtual subnets are too many"),
        ([SERVICES, ["nonsense", "10.0.0.0/8"]], "'nonsense' is no subnet"),
        ([SERVICES, SERVICES], "overlap"),
        ([SERVICES, ["246.130.7.0/24", "10.0.0.0/24"]], "overlap"),
        ([["10.99.0.0/16", "10.130.0.0/16"]], "no virtual subnet"),
        ([["246.0.0.0/24", "10.130.0.0/24"]], "no virtual subnet"),
        ([["246.130.0.0/16", "fd10::/16"]], "different sizes"),
        ([["246.130.0.0/16", "10.130.0.0/24"]], "different sizes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_mapped_is_said_and_changes_nothing(
    manager: Manager, lab: Lab, pairs: list[list[str]], said: str
) -> None:
    with manager.session() as client:
        assert change(client, PODS) is None
        before = ruleset(lab)
        assert said in (change(client, *pairs, number=2) or "")
        assert ruleset(lab) == before
        assert client.echo(VIRTUAL)


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({}, "no proper id"),
        ({"id": 1}, "no proper virtual"),
        ({"id": "1", "virtual": []}, "no proper id"),
        ({"id": 1, "virtual": {}}, "no proper virtual"),
        ({"id": 1, "virtual": [["246.130.0.0/16"]]}, "no pair of subnets"),
        ({"id": 1, "virtual": [[1, 2]]}, "no pair of subnets"),
        ({"id": 1, "virtual": [PODS] * 9 + [None]}, "no pair of subnets"),
        ({"id": 1, "virtual": ["x" * 900_000]}, "no pair of subnets"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_malformed_config_ends_its_session_alone(
    manager: Manager, lab: Lab, members: dict[str, Any], reason: str
) -> None:
    with manager.session() as honest, manager.session() as client:
        assert change(honest, PODS) is None
        assert change(client, SERVICES) is None
        manager.logged.write_text("")
        client.say("config", **members)
        ended(client.socket, 2)
        manager.says(f"event=session-end session=.* user=ann .*{reason}")
        eventually(lambda: mappings(lab) == 1, 2)
        assert honest.echo(VIRTUAL)


def test_hundreds_of_replacements_disturb_nobody(manager: Manager, lab: Lab) -> None:
    """Each has another mapping, all are answered, and what the last one said holds."""
    with manager.session() as honest, manager.session() as client:
        assert change(honest, PODS) is None
        before, began, slowest = manager.rss(), time.monotonic(), 0.0
        for number in range(200):
            # The other's virtual subnet is among them, and leads elsewhere; now and then there are none.
            pairs = MANY[number % 4 : number % 4 + number % 33]
            assert change(client, *pairs, number=number) is None
            if number % 20 == 0:
                asked = time.monotonic()
                assert honest.echo(VIRTUAL)
                slowest = max(slowest, time.monotonic() - asked)
        assert change(client, SERVICES) is None
        assert slowest < 1
        assert time.monotonic() - began < 30
        assert manager.rss() - before < 4096
        assert mappings(lab) == 2
        assert client.echo("246.130.0.80")
        assert honest.echo(VIRTUAL)


def cpu_seconds(manager: Manager) -> float:
    user, system = Path(f"/proc/{manager.process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def test_changes_have_a_small_part_of_the_managers_time(manager: Manager) -> None:
    with manager.session() as client:
        used, began = cpu_seconds(manager), time.monotonic()
        for _ in range(50):
            assert change(client, *MANY) is None
        assert cpu_seconds(manager) - used < (time.monotonic() - began) / 3


def test_of_a_flood_of_changes_the_last_one_holds_and_nobody_is_disturbed(manager: Manager, lab: Lab) -> None:
    with manager.session() as honest, manager.session() as client:
        assert change(honest, PODS) is None
        flood = [MANY] * 1999 + [[SERVICES]]
        frames = [
            frame.encode(frame.CONTROL, message.encode("config", id=number, virtual=pairs))
            for number, pairs in enumerate(flood)
        ]
        before, began = manager.rss(), time.monotonic()
        client.socket.sendall(b"".join(frames))
        assert honest.echo(VIRTUAL)
        answers = [client.hear("config") for _ in flood]
        assert time.monotonic() - began < 20
        assert [answer["id"] for answer in answers] == list(range(2000))
        assert {answer.get("error") for answer in answers} == {None, "a later change took its place"}
        assert answers[-1] == {"type": "config", "id": 1999}
        assert manager.rss() - before < 20_000
        assert mappings(lab) == 2
        assert client.echo("246.130.0.80")
        assert not client.echo("246.138.0.1", 0.1)
        assert honest.echo(VIRTUAL)


def test_a_flood_of_changes_whose_answers_nobody_reads(manager: Manager) -> None:
    with manager.session() as honest, manager.session() as deaf:
        one = frame.encode(frame.CONTROL, message.encode("config", id=10**4000, virtual=[])) * 20
        deaf.socket.settimeout(0.2)
        deadline, rest = time.monotonic() + 10, one
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < deadline:
                with contextlib.suppress(TimeoutError):
                    rest = rest[deaf.socket.send(rest) :] or one
        assert time.monotonic() < deadline
        manager.says('reason="the other end takes no more data"')
        assert honest.echo()


def test_a_session_that_ends_with_a_change_before_it_leaves_nothing(manager: Manager, lab: Lab) -> None:
    asked = [frame.encode(frame.CONTROL, config.encode_change(1, [(pair[0], pair[1]) for pair in MANY]))]
    goodbye = frame.encode(frame.CONTROL, message.encode("goodbye", reason="done"))
    for data in (asked, [*asked, *asked, goodbye], [*asked, b"\x01\xff\xff\xff"], [*asked, frame.encode(1, b"[]")]):
        with manager.session() as client:
            assert change(client, PODS) is None
            client.socket.sendall(b"".join(data))
    eventually(lambda: mappings(lab) == 0, 2)
    assert manager.get("/healthz")[0] == 200


def test_random_configs_end_a_session_or_are_answered(manager: Manager, lab: Lab) -> None:
    with manager.session() as honest:
        assert change(honest, PODS) is None
        before = ruleset(lab)
        for _ in range(40):
            with manager.session() as client, contextlib.suppress(EOFError, ConnectionError):
                noise = os.urandom(12).hex()
                for virtual in ([[noise, "10.0.0.0/8"]], [[PODS[0], noise]], [[noise]]):
                    client.say("config", id=1, virtual=virtual)
                    assert client.hear("config")["error"]
        eventually(lambda: ruleset(lab) == before, 2)
        assert honest.echo(VIRTUAL)


@pytest.mark.alone
def test_all_sessions_have_a_mapping(manager: Manager, lab: Lab) -> None:
    """More descriptors than the limit with which the manager was started."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(manager.session()) for _ in range(MAX_SESSIONS)]
        for client in clients:
            assert change(client, PODS) is None
        assert mappings(lab) == MAX_SESSIONS
        strangers = [stack.enter_context(manager.dial()) for _ in range(MAX_STRANGERS)]
        eventually(lambda: manager.descriptors() > 1024, 2, f"all sessions and {len(strangers)} strangers")
        assert clients[0].echo(VIRTUAL)
        assert clients[-1].echo(VIRTUAL)
    eventually(lambda: mappings(lab) == 0, 20)
