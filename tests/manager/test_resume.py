"""Sessions that outlive their links, at a real manager with either exit; clients and their packets are the test's."""

import contextlib
import os
import signal
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from scapy.layers.inet import ICMP, IP
from socket_exits import Session, Stream

from peers import POD, Client, Manager, Wire, ended, eventually, lab, running_manager
from pod import inside
from tpvpn.bundle import DRAIN
from tpvpn.lab import Lab
from tpvpn.manager.server import MAX_SESSIONS
from tpvpn.proto.session import Held, Offer
from tpvpn.wire import frame

__all__ = ["lab"]
TOKENS = b"ann: token-of-ann\nbob: token-of-bob\n"
CLUSTER = "10.130.0.80"


def options(directory: Path, *more: str) -> tuple[str, ...]:
    (directory / "tokens").write_bytes(TOKENS)
    return ("--token-file", str(directory / "tokens"), *more)


@pytest.fixture(scope="module", params=["kernel", "socket"])
def manager(lab: Lab, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Manager]:
    directory = tmp_path_factory.mktemp("resume")
    with running_manager(lab, directory, *options(directory, "--exit", request.param, "--linger", "30")) as manager:
        yield manager


@contextlib.contextmanager
def joined(
    manager: Manager, held: Held, link: int = 0, kind: type[Client] = Client, **changed: object
) -> Iterator[Client]:
    """Another link of a session."""
    token, secret = changed.pop("token", manager.token), changed.pop("secret", held.secret)
    with contextlib.closing(kind(manager.dial())) as client:
        offer = replace(held.wanted(Offer("laptop"), link), **changed)
        client.shake_hands(token, offer, secret=secret)  # type: ignore[arg-type]
        yield client


def sessions(manager: Manager) -> int:
    return manager.metrics()["tpvpn_manager_sessions"]


def quit(client: Client, manager: Manager) -> None:
    """As a client does it."""
    client.say("goodbye", reason="the client quits")
    eventually(lambda: sessions(manager) == 0, 3, "the session is over")


def test_a_session_is_there_when_its_client_comes_again(manager: Manager) -> None:
    with manager.session() as first:
        assert first.echo()
    manager.says(rf"event=link-end session={first.terms.session} .* link=0 links=0")
    assert sessions(manager) == 1
    with joined(manager, first.held) as again:
        assert again.terms == first.terms
        assert again.held == first.held
        assert again.terms.linger == 30
        assert again.echo()
        manager.says(rf"event=session-resume session={first.terms.session} user=ann .* link=0 security=plain")
        quit(again, manager)
    manager.says(rf"event=session-end session={first.terms.session} .*reason=.the client said goodbye")


def test_a_connection_outlives_its_link(lab: Lab, manager: Manager) -> None:
    with inside(lab.namespace("cluster")):
        server = socket.create_server((CLUSTER, 0))
    with server, contextlib.ExitStack() as stack:
        first = stack.enter_context(contextlib.closing(Session(manager.dial())))
        first.shake_hands(manager.token, Offer("laptop"))
        stream = Stream(first, CLUSTER, server.getsockname()[1], 4001)
        stream.connect()
        connected, _ = server.accept()
        stack.enter_context(connected)
        stream.send("PA", b"before")
        assert connected.recv(100) == b"before"
        first.close()
        manager.says(rf"event=link-end session={first.terms.session}")
        connected.sendall(b"meanwhile")
        again = stream._session = stack.enter_context(joined(manager, first.held, kind=Session))
        assert stream.expect(lambda _, data: len(data) == 9) == b"meanwhile"
        stream.send("PA", b"after")
        assert connected.recv(100) == b"after"
        quit(again, manager)


FOREIGN = {
    "without a proof": {"secret": None},
    "with the token for a secret": {"secret": b"token-of-ann"},
    "with a guess": {"secret": bytes(32)},
    "as somebody else": {"token": b"token-of-bob"},
    "of a session that there is not": {"session": "0" * 16},
}


@pytest.mark.parametrize("how", FOREIGN)
def test_nobody_else_has_it(manager: Manager, how: str) -> None:
    """He has a session of his own in its place, with other addresses."""
    with manager.session() as first, joined(manager, first.held, 1, **FOREIGN[how]) as other:
        assert other.terms.session != first.terms.session
        assert other.terms.ipv4 != first.terms.ipv4
        assert other.held.secret != first.held.secret
        assert first.echo()
        assert other.echo()
        other.say("goodbye")
        quit(first, manager)


def test_several_links_carry_one_session(manager: Manager) -> None:
    with manager.session() as first, joined(manager, first.held, 1) as second, joined(manager, first.held, 7) as third:
        links = (first, second, third)
        assert {one.terms.session for one in links} == {first.terms.session}
        assert sessions(manager) == 1
        for one in links:
            one.packet(IP(src=first.terms.ipv4, dst=POD) / ICMP(id=77))
        came = [packet for one in links for packet in packets(one) if ICMP in packet and packet[ICMP].id == 77]
        assert len(came) == 3
        for one in links:
            assert one.answers(), "a ping of the link comes back by it"
        quit(second, manager)
        for one in links:
            assert ended(one.socket, 3) < 3


def packets(client: Client) -> Iterator[IP]:
    while (packet := client.next_packet(0.5)) is not None:
        yield packet


def test_one_of_several_that_is_lost_takes_nothing_along(manager: Manager) -> None:
    with manager.session() as first:
        with joined(manager, first.held, 1):
            pass
        manager.says(rf"event=link-end session={first.terms.session} .* link=1 links=1")
        assert all(first.echo() for _ in range(5))
        quit(first, manager)


def test_a_new_link_takes_the_place_of_one_that_is_read_for_a_while(manager: Manager) -> None:
    with manager.session() as old, joined(manager, old.held) as new:
        old.packet(IP(src=old.terms.ipv4, dst=POD) / ICMP(id=5))
        answer = new.next_packet()
        assert answer is not None
        assert answer[ICMP].id == 5
        assert DRAIN - 0.5 < ended(old.socket, DRAIN + 2) < DRAIN + 1
        assert new.echo()
        assert sessions(manager) == 1
        quit(new, manager)


def test_garbage_ends_the_link_and_not_the_session(manager: Manager) -> None:
    with manager.session() as first, joined(manager, first.held, 1) as bad:
        bad.send(frame.CONTROL, b"no json")
        ended(bad.socket, 3)
        assert first.echo()
        quit(first, manager)


def test_a_session_without_links_ends_when_its_time_is_over(lab: Lab, tmp_path: Path) -> None:
    with running_manager(lab, tmp_path, "--linger", "0.5") as manager:
        with manager.session() as first:
            pass
        manager.says(rf"event=session-end session={first.terms.session} .*reason=.no link for 0.5 s")
        assert sessions(manager) == 0
        with joined(manager, first.held) as again:
            assert again.terms.session != first.terms.session
            assert (again.terms.ipv4, again.terms.ipv6) == (first.terms.ipv4, first.terms.ipv6), "they were free"
            assert again.echo()


def test_a_full_manager_has_room_where_nobody_is(lab: Lab, tmp_path: Path) -> None:
    with running_manager(lab, tmp_path, "--exit", "socket", "--linger", "100") as manager:
        with manager.session() as oldest:
            pass
        manager.says("event=link-end")
        with contextlib.ExitStack() as stack:
            for _ in range(MAX_SESSIONS - 1):
                stack.enter_context(manager.session())
            assert sessions(manager) == MAX_SESSIONS
            stack.enter_context(manager.session())
            manager.says(rf"event=session-end session={oldest.terms.session} .*reason=.its room was needed")
            assert sessions(manager) == MAX_SESSIONS
            with contextlib.closing(Client(manager.dial())) as one_more, pytest.raises(Exception, match="full"):
                one_more.shake_hands(manager.token, Offer("laptop"))


def test_a_manager_that_ends_tells_every_link(lab: Lab, tmp_path: Path) -> None:
    with running_manager(lab, tmp_path, "--linger", "100") as manager:
        with manager.session() as lingering:
            pass
        with manager.session() as first, joined(manager, first.held, 1) as second:
            os.kill(manager.process.pid, signal.SIGTERM)
            for one in (first, second):
                assert goodbye(one) == {"type": "goodbye", "reason": "the manager shuts down", "again": True}
                ended(one.socket, 3)
        assert manager.process.wait(5) == 0
        assert lingering.terms.session in manager.log()


def goodbye(client: Wire) -> object:
    return client.hear("goodbye")


def test_a_lingering_session_holds_its_addresses_and_no_descriptor(manager: Manager) -> None:
    """But for its device's, at the kernel exit."""
    with manager.session():
        pass
    eventually(lambda: "links=0" in manager.log().splitlines()[-1], 3, "it lingers")
    before = manager.descriptors()
    for _ in range(3):
        with manager.session() as other:
            assert other.echo()
            other.say("goodbye")
            ended(other.socket, 3)
    eventually(lambda: manager.descriptors() <= before, 3, "descriptors are given back")
