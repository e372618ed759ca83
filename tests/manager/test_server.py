"""The manager's port as strangers find it: a real manager from the zipapp, real garbage, and clients that go on."""

import contextlib
import os
import random
import socket
import struct
import time
from collections.abc import Iterator

import pytest
from scapy.layers.inet import ICMP, IP, UDP
from scapy.packet import Raw

from peers import (
    POD,
    UPGRADE,
    Client,
    Manager,
    Wire,
    ended,
    eventually,
    lab,
    running_manager,
)
from pod import inside, run
from tpvpn.errors import ManagerError
from tpvpn.lab import Lab
from tpvpn.manager.server import MAX_SESSIONS, MAX_STRANGERS, PATIENCE
from tpvpn.proto import message
from tpvpn.proto.session import ClientHandshake, Offer
from tpvpn.wire import frame

__all__ = ["lab"]
SLACK = 1.5  # seconds: the machine has other things to do


@pytest.fixture(scope="module")
def manager(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Manager]:
    with running_manager(lab, tmp_path_factory.mktemp("manager")) as manager:
        yield manager


# -- HTTP --------------------------------------------------------------------------------------------------------------


def test_health(manager: Manager) -> None:
    assert manager.get("/healthz")[::2] == (200, "ok\n")
    assert manager.get("/healthz?verbose=1")[0] == 200
    status, head, body = manager.get("/healthz", "HEAD")
    assert (status, body) == (200, "")
    assert "Content-Length: 3" in head


@pytest.mark.parametrize(
    ("request_", "status", "field"),
    [
        ("GET /other HTTP/1.1\r\n\r\n", 404, ""),
        ("POST /healthz HTTP/1.1\r\nContent-Length: 0\r\n\r\n", 405, "Allow: GET, HEAD"),
        ("POST /v1/session HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: tpvpn\r\n\r\n", 405, "Allow: GET, HEAD"),
        ("GET /v1/session HTTP/1.1\r\n\r\n", 426, "Upgrade: tpvpn"),
        ("GET /v1/session HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n", 426, "Upgrade: tpvpn"),
        ("GET /v1/session HTTP/1.1\r\nUpgrade: tpvpn\r\n\r\n", 426, "Upgrade: tpvpn"),
        ("hello\r\n\r\n", 400, ""),
        ("GET /\r\n\r\n", 400, ""),
        ("GET / HTTP/3\r\n\r\n", 400, ""),
        ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, ""),
    ],
)
def test_other_requests_are_answered(manager: Manager, request_: str, status: int, field: str) -> None:
    with manager.dial() as connected:
        connected.sendall(request_.encode())
        answer = b"".join(iter(lambda: connected.recv(65536), b"")).decode()
    assert answer.startswith(f"HTTP/1.1 {status} ")
    assert field in answer
    assert "Connection: close" in answer


# -- garbage -----------------------------------------------------------------------------------------------------------

NOISE = random.Random(3)
GARBAGE = {
    "nothing": b"",
    "random bytes": NOISE.randbytes(3000),
    "a megabyte": NOISE.randbytes(1 << 20),
    "half a request": b"GET /v1/ses",
    "half a head": b"GET /v1/session HTTP/1.1\r\nHost: x\r\n",
    "an endless line": b"GET /" + b"a" * (1 << 18),
    "huge headers": b"GET / HTTP/1.1\r\n" + b"X-Padding: 0123456789\r\n" * 10_000,
    "http/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0",
    "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + NOISE.randbytes(500),
    "ssh": b"SSH-2.0-OpenSSH_9.9\r\n",
    "zeros": bytes(100_000),
    "line ends": b"\r\n" * 50_000,
    "frames before the upgrade": frame.encode(frame.CONTROL, message.encode("hello", version=1)) * 50,
    "an upgrade alone": UPGRADE,
    "a long frame": UPGRADE + frame.HEADER.pack(frame.CONTROL << 24 | 0xFFFFFF) + bytes(5000),
    "half a frame": UPGRADE + frame.HEADER.pack(frame.CONTROL << 24 | 4000) + b'{"type":',
    "packets before the hello": UPGRADE + frame.encode(frame.PACKET, bytes(60)) * 50,
    "kinds of the future": UPGRADE + frame.encode(200, bytes(4000)) * 20,
    "no JSON": UPGRADE + frame.encode(frame.CONTROL, NOISE.randbytes(100)),
    "deep JSON": UPGRADE + frame.encode(frame.CONTROL, b"[" * 4000),
    "a hello without members": UPGRADE + frame.encode(frame.CONTROL, message.encode("hello")),
    "a goodbye": UPGRADE + frame.encode(frame.CONTROL, message.encode("goodbye", reason="")),
}


def throw(connected: socket.socket, garbage: bytes) -> None:
    """Send as much of it as the other end wants to have."""
    with contextlib.suppress(OSError):
        connected.sendall(garbage)


def test_garbage_costs_bounded_time_and_disturbs_nobody(manager: Manager) -> None:
    with manager.session() as client, contextlib.ExitStack() as stack:
        strangers = [stack.enter_context(manager.dial()) for _ in GARBAGE]
        began = time.monotonic()
        for connected, garbage in zip(strangers, GARBAGE.values(), strict=True):
            throw(connected, garbage)
        with manager.session() as other:  # beside all of them
            assert client.echo()
            assert other.echo()
        for name, connected in zip(GARBAGE, strangers, strict=True):
            ended(connected, max(0.1, began + PATIENCE + SLACK - time.monotonic()))
            assert time.monotonic() - began < PATIENCE + SLACK, name
        assert client.echo()


def test_a_slow_stranger_has_no_more_time_than_a_silent_one(manager: Manager) -> None:
    """A byte now and then earns no patience, neither in the request nor in the handshake."""
    with manager.dial() as slow, manager.dial() as slower, manager.session() as client:
        slow.sendall(b"GET /")
        slower.sendall(UPGRADE)
        began = time.monotonic()
        waiting = {slow: b"x", slower: frame.encode(200, b"x")}
        while waiting and time.monotonic() - began < PATIENCE + SLACK:
            for connected in list(waiting):
                connected.settimeout(0.05)
                try:
                    connected.sendall(waiting[connected])
                    if not connected.recv(1000):
                        del waiting[connected]
                except TimeoutError:
                    continue
                except ConnectionError:
                    del waiting[connected]
        assert not waiting
        assert time.monotonic() - began > PATIENCE - SLACK
        assert client.echo()


def test_thousands_of_garbage_connections_cost_bounded_memory(manager: Manager) -> None:
    short = [garbage[:9000] for garbage in GARBAGE.values()]

    def bombard(count: int) -> None:
        for number in range(count):
            with manager.dial() as connected:
                throw(connected, short[number % len(short)])
        eventually(lambda: manager.descriptors() <= quiet, PATIENCE + SLACK, "descriptors are given back")

    with manager.session() as client:
        quiet = manager.descriptors()
        bombard(200)
        before = manager.rss()
        bombard(2000)
        assert manager.rss() - before < 2048
        assert client.echo()
        with manager.session() as other:
            assert other.echo()


def test_too_many_strangers_push_the_oldest_out(manager: Manager) -> None:
    before = manager.refused("crowded")
    with manager.session() as client, contextlib.ExitStack() as stack:
        strangers = [stack.enter_context(manager.dial()) for _ in range(MAX_STRANGERS + 20)]
        began = time.monotonic()
        for oldest in strangers[:20]:
            ended(oldest, 2)
        with manager.session() as other:
            assert other.echo()
            assert client.echo()
        assert time.monotonic() - began < 2
        for young in strangers[-10:]:
            young.settimeout(0.01)
            with pytest.raises(TimeoutError):
                young.recv(1)
        assert manager.refused("crowded") >= before + 20


# -- handshakes --------------------------------------------------------------------------------------------------------


def begun(manager: Manager) -> Wire:
    """A client that has asked for the upgrade and not yet read the greeting."""
    client = Client(manager.dial())
    client.upgrade()
    return client


def hello(manager: Manager, greeting: bytes, token: bytes, name: str = "laptop") -> bytes:
    answer = ClientHandshake(token, bytes(32), os.urandom(32), Offer(name)).receive(greeting)
    assert answer is not None
    return answer


def test_a_wrong_token_is_refused_counted_and_logged(manager: Manager) -> None:
    before = manager.refused("token")
    with pytest.raises(ManagerError, match="--token-file"), manager.session(b"wrong", "mallory\x1b[2J"):
        pass
    manager.says(r'WARNING event=token-refused client="mallory\?\[2J" peer=192\.0\.2\.2:\d+\n')
    assert manager.refused("token") == before + 1


def test_a_replayed_or_altered_hello_is_refused(manager: Manager) -> None:
    with contextlib.closing(begun(manager)) as first:
        recorded = hello(manager, first.receive()[1], manager.token)
        first.send(frame.CONTROL, recorded)
        assert first.hear("welcome")
    with contextlib.closing(begun(manager)) as second:
        second.receive()
        second.send(frame.CONTROL, recorded)
        assert "token" in second.hear("error")["message"]
        ended(second.socket, 1)
    with contextlib.closing(begun(manager)) as third:
        altered = hello(manager, third.receive()[1], manager.token).replace(b"laptop", b"lapdog")
        third.send(frame.CONTROL, altered)
        assert "token" in third.hear("error")["message"]


def test_another_version_is_named(manager: Manager) -> None:
    with contextlib.closing(begun(manager)) as client:
        greeting = client.receive()[1]
        client.send(frame.CONTROL, hello(manager, greeting, manager.token).replace(b'"version":1', b'"version":9'))
        assert client.hear("error")["message"] == (
            "the client speaks protocol version 9, this manager 1: upgrade the manager"
        )


def test_a_hello_behind_the_request_and_packets_behind_the_hello(manager: Manager) -> None:
    """Whatever is cut or joined: the manager speaks first, so only what follows the greeting can be early."""
    with contextlib.closing(Client(manager.dial())) as client:
        client.socket.sendall(UPGRADE[:30])
        client.socket.sendall(UPGRADE[30:])
        client.head()
        answer = hello(manager, client.receive()[1], manager.token)
        ping = frame.encode(frame.CONTROL, message.encode("ping", id=7))
        client.socket.sendall(frame.encode(frame.CONTROL, answer) + ping + ping[:5])
        assert client.hear("welcome")
        assert client.hear("pong")["id"] == 7
        client.socket.sendall(ping[5:])
        assert client.hear("pong")["id"] == 7


# -- in a session ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (frame.HEADER.pack(frame.PACKET << 24 | 70_000) + bytes(70_000), "a frame of kind 0 with 70000 bytes"),
        (frame.HEADER.pack(frame.CONTROL << 24 | 0x100001), "a frame of kind 1 with 1048577 bytes"),
        (frame.HEADER.pack(77 << 24 | 0xFFFFFF), "a frame of kind 77 with 16777215 bytes"),
        (frame.encode(frame.CONTROL, b"\x80" * 1000), "not JSON"),
        (frame.encode(frame.CONTROL, b"[" * 1_000_000), "not JSON"),
        (frame.encode(frame.CONTROL, b"[]"), "without a type"),
        (frame.encode(frame.CONTROL, message.encode("ping", id="x")), "no proper id"),
        (frame.encode(frame.CONTROL, message.encode("ping", id=True)), "no proper id"),
        (frame.encode(frame.CONTROL, message.encode("hello")), "a second hello"),
        (frame.encode(frame.CONTROL, message.encode("goodbye", reason="\x1b[2J")), "said goodbye"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_session_that_breaks_the_protocol_ends_alone(manager: Manager, data: bytes, reason: str) -> None:
    with manager.session() as honest, manager.session() as client:
        manager.logged.write_text("")
        client.socket.sendall(data)
        ended(client.socket, 2)
        manager.says(f"event=session-end session=.* user=ann .*{reason}")
        assert honest.echo()


def test_a_truncated_frame_ends_with_its_connection(manager: Manager) -> None:
    with manager.session() as honest:
        with manager.session() as client:
            client.socket.sendall(frame.HEADER.pack(frame.PACKET << 24 | 1000) + bytes(10))
        eventually(lambda: manager.metrics()["tpvpn_manager_sessions"] == 1, 2)
        assert honest.echo()


def test_what_a_later_version_may_send_is_skipped(manager: Manager) -> None:
    with manager.session() as client:
        for kind in (3, 99, 255):
            client.send(kind, b"from the future")
            client.send(kind, b"")
        client.say("weather", rain=True)
        assert client.answers()
        assert client.echo()


def test_packets_that_the_kernel_refuses_are_counted(manager: Manager) -> None:
    before = manager.dropped()
    with manager.session(offloads=["checksum", "tso4"]) as client:
        packet = bytes(IP(src=client.terms.ipv4, dst=POD) / ICMP())
        for header in (struct.pack("<BBHHHH", 1, 1, 60_000, 1, 60_000, 9), b"\xff" * 10, b"\0\x03" + bytes(8)):
            client.send(frame.PACKET, header + packet)
        client.send(frame.PACKET, b"")
        client.send(frame.PACKET, bytes(10))
        client.send(frame.PACKET, bytes(10) + packet[:20])
        client.say("ping", id=1)
        assert client.hear("pong")
    after = manager.dropped()
    dropped = ("malformed", "foreign")
    assert sum(after[name] - before[name] for name in dropped) >= 4
    assert after["malformed"] > before["malformed"]


def test_a_packet_from_a_wrong_source_is_dropped_and_counted(manager: Manager, lab: Lab) -> None:
    with inside(lab.namespace("cluster")):
        listening = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with listening, manager.session() as client:
        listening.bind((POD, 5999))
        listening.settimeout(2)
        before = manager.dropped()["foreign"]
        own = client.terms.ipv4
        for source in ("192.0.2.2", "10.132.0.1", "246.0.0.200", "127.0.0.1", own):
            client.packet(IP(src=source, dst=POD) / UDP(sport=4000, dport=5999) / Raw(source.encode()))
        assert listening.recv(100) == own.encode()
        assert manager.dropped()["foreign"] == before + 4


def test_nothing_passes_between_sessions(manager: Manager) -> None:
    before = manager.dropped()["between_sessions"]
    with manager.session() as one, manager.session() as other:
        one.packet(IP(src=one.terms.ipv4, dst=other.terms.ipv4) / UDP(dport=9) / Raw(b"hello neighbour"))
        one.packet(IP(src=one.terms.ipv4, dst=other.terms.ipv4) / ICMP())
        assert one.echo()  # what was sent before it has been judged
        assert other.next_packet(0.2) is None
        assert other.echo()
    assert manager.dropped()["between_sessions"] == before + 2


def test_a_client_that_asks_and_never_listens_is_left(manager: Manager) -> None:
    with manager.session() as honest, manager.session() as deaf:
        before = manager.rss()
        ping = frame.encode(frame.CONTROL, message.encode("ping", id=10**4000)) * 20
        deaf.socket.settimeout(0.2)
        deadline = time.monotonic() + 10
        rest = ping
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < deadline:
                with contextlib.suppress(TimeoutError):
                    rest = rest[deaf.socket.send(rest) :] or ping
        assert time.monotonic() < deadline
        manager.says('reason="the other end takes no more data"')
        assert manager.rss() - before < 20_000
        assert honest.echo()


def test_addresses_and_devices_are_given_back(manager: Manager, lab: Lab) -> None:
    before = manager.descriptors()
    for number in range(60):
        offloads = [["tso4"], ["checksum", "ecn"], ["checksum", "tso6", "uso4"], [], ["x"]][number % 5]
        with manager.session(offloads=offloads) as client:
            if number % 2:
                client.say("goodbye", reason="done")
    eventually(lambda: "tpvpn-s" not in run("ip", "-n", lab.namespace("node"), "link"), 2)
    assert manager.descriptors() <= before


def test_a_wanted_address_is_given_when_it_is_free(manager: Manager) -> None:
    with manager.session(ipv4="246.5.6.7", ipv6="fd74:7076:706e:5::7") as one:
        assert (one.terms.ipv4, one.terms.ipv6) == ("246.5.6.7", "fd74:7076:706e:5::7")
        with manager.session(ipv4="246.5.6.7", ipv6="2001:db8::1") as other:
            assert other.terms.ipv4 != "246.5.6.7"
            assert other.terms.ipv6.startswith("fd74:7076:706e:")
            assert other.echo()


def test_all_sessions_taken(manager: Manager) -> None:
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(manager.session()) for _ in range(MAX_SESSIONS)]
        assert len({client.terms.ipv4 for client in clients}) == MAX_SESSIONS
        with pytest.raises(ManagerError, match=f"this manager is full: it has {MAX_SESSIONS} sessions"):
            stack.enter_context(manager.session())
        assert clients[0].echo()
        assert clients[-1].echo()
        clients[7].say("goodbye", reason="")
        ended(clients[7].socket, 2)
        assert stack.enter_context(manager.session()).echo()
