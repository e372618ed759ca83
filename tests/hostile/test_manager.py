"""A manager that knows the token and means ill: the laptop goes on unharmed, or ends with a clear sentence."""

import contextlib
import os
import re
import secrets
import signal
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6EchoRequest, IPv6
from scapy.packet import Packet, Raw

from peers import SWITCH, Laptop, Wire, lab, laptop, serving
from pod import inside, readable
from tpvpn.lab import Lab
from tpvpn.proto import message
from tpvpn.proto.session import ManagerHandshake, Terms
from tpvpn.wire import frame
from tpvpn.wire.vnet import EMPTY, Header

__all__ = ["lab", "laptop"]

OWN4, OWN6 = "246.0.0.7", "fd74:7076:706e::7"
SERVICE = "10.130.0.80"
OFFLOADS = ["checksum", "tso4", "tso6", "ecn", "uso4", "uso6"]
TERMS = Terms("s1", OWN4, OWN6, 1500, OFFLOADS, {"ipv4": "kernel", "ipv6": "kernel"}, "pod-0")
LISTENED = 4567


def take_in(connected: socket.socket, terms: Terms = TERMS, behind: bytes = b"") -> Wire:
    """The handshake as an honest manager does it; `behind` comes together with the welcome."""
    wire = Wire(connected)
    wire.head()
    connected.sendall(SWITCH)
    handshake = ManagerHandshake({"ann": b"token-of-ann"}, bytes(32), secrets.token_bytes(32))
    wire.send(frame.CONTROL, handshake.greeting)
    handshake.receive(wire.receive()[1])
    connected.sendall(frame.encode(frame.CONTROL, handshake.welcome(terms)) + behind)
    return wire


# -- what it grants ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ({"mtu": 1}, "names an MTU of 1 bytes"),
        ({"mtu": 70_000}, "names an MTU of 70000 bytes"),
        ({"mtu": 1279}, "names an MTU of 1279 bytes"),
        ({"ipv4": None, "ipv6": None}, "gives no address"),
        ({"ipv4": "127.0.0.1"}, "gives this laptop 127.0.0.1, which may be another host's"),
        ({"ipv4": "192.0.2.1"}, "gives this laptop 192.0.2.1"),  # the laptop's gateway
        ({"ipv4": "10.1.2.3"}, "gives this laptop 10.1.2.3"),  # inside its VPN
        ({"ipv4": SERVICE}, f"gives this laptop {SERVICE}"),
        ({"ipv6": "fd10:1::3"}, "gives this laptop fd10:1::3"),
        ({"ipv4": "224.0.0.1"}, "gives this laptop 224.0.0.1"),
        ({"ipv4": "246.0.0.1/0"}, "'246.0.0.1/0' as its ipv4 address"),
        ({"exit": {"ipv4": ["kernel"]}}, "no kind of exit for ipv4"),
        ({"facts": None}, "no proper facts"),
    ],
    ids=str,
)
def test_absurd_terms(laptop: Laptop, members: dict[str, Any], said: str) -> None:
    def handle(connected: socket.socket) -> None:
        take_in(connected, replace(TERMS, **members))
        connected.recv(1000)

    with serving(laptop.lab, handle) as url:
        end = laptop.failing(url)
    assert end.code == 6, end.said
    assert said in end.sentence


@pytest.mark.parametrize(
    "members",
    [
        {"mtu": 576, "ipv6": None},
        {"mtu": 65_535},
        {"ipv4": None},
        {"offloads": []},
        {"offloads": ["tso4", "ecn"]},
        {"offloads": ["checksum", "ecn", "uso4"]},
        {"offloads": ["teleport"] * 1000},
        {"exit": {}},
        {"pod": "\x1b]0;owned\x07" * 1000, "session": "\x1b[2J"},
    ],
    ids=lambda members: str(members)[:40],
)
def test_unusual_terms(laptop: Laptop, members: dict[str, Any]) -> None:
    def handle(connected: socket.socket) -> None:
        take_in(connected, replace(TERMS, **members)).hear("goodbye")

    with serving(laptop.lab, handle) as url:
        end = laptop.ended(laptop.connect(url, "--", "true"))
    assert end.code == 0, end.said
    assert end.said.replace("\n", "").isprintable()


# -- what ends a session -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "code", "said"),
    [
        (b"", 7, "the connection was closed by the other end"),
        (
            frame.encode(frame.CONTROL, message.encode("goodbye", reason="\x1b[2Jbye")),
            7,
            r"ended the session: \?\[2Jbye",
        ),
        (frame.encode(frame.CONTROL, message.encode("goodbye")), 7, "the manager ended the session"),
        (frame.encode(frame.CONTROL, message.encode("goodbye", reason=[[{}]] * 9)), 7, "the manager ended the session"),
        (frame.encode(frame.CONTROL, message.encode("error", message="x" * 10**5)), 7, "the manager ended the session"),
        (frame.HEADER.pack(70_000) + bytes(70_000), 6, "a frame of kind 0 with 70000 bytes"),
        (frame.HEADER.pack(1 << 24 | 0x100001), 6, "a frame of kind 1 with 1048577 bytes"),
        (frame.HEADER.pack(0xFFFFFFFF), 6, "a frame of kind 255 with 16777215 bytes"),
        (frame.encode(frame.CONTROL, b"[" * (1 << 20)), 6, "a control frame that is not JSON"),
        (frame.encode(frame.CONTROL, b'{"type":' * 10_000), 6, "a control frame that is not JSON"),
        (
            frame.encode(frame.CONTROL, b'{"type":"ping","id":' + b"9" * 5000 + b"}"),
            6,
            "a control frame that is not JSON",
        ),
        (frame.encode(frame.CONTROL, b"null"), 6, "a control frame without a type"),
        (frame.encode(frame.CONTROL, message.encode("ping", id=1.5)), 6, "no proper id"),
        (frame.encode(frame.CONTROL, message.encode("ping", id={"a": []})), 6, "no proper id"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
@pytest.mark.parametrize("early", [True, False], ids=["with the welcome", "later"])
def test_what_ends_a_session(laptop: Laptop, sent: bytes, code: int, said: str, early: bool) -> None:
    def handle(connected: socket.socket) -> None:
        wire = take_in(connected, behind=sent if early else b"")
        if not early:
            wire.say("ping", id=1)
            wire.hear("pong")
            connected.sendall(sent)
        if not sent:
            return
        while connected.recv(1 << 16):
            pass

    with serving(laptop.lab, handle) as url:
        end = laptop.failing(url)
    assert end.code == code, end.said
    assert re.search(said, end.sentence), end.said
    assert len(end.sentence) < 500
    assert end.said.replace("\n", "").isprintable()


def test_a_reset(laptop: Laptop) -> None:
    def handle(connected: socket.socket) -> None:
        take_in(connected)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    with serving(laptop.lab, handle) as url:
        end = laptop.failing(url)
    assert (end.code, "the connection to the other end broke: Connection reset by peer" in end.sentence) == (7, True)


# -- what a session survives -------------------------------------------------------------------------------------------


@dataclass
class Session:
    """A client in a hostile manager's hands, while `hostile` runs."""

    laptop: Laptop
    wire: Wire
    answers: list[bytes] = field(default_factory=list)
    """Packets that the laptop sent."""

    def inject(self, packet: Packet | bytes, header: bytes = EMPTY) -> None:
        self.wire.send(frame.PACKET, header + bytes(packet))

    def settle(self) -> None:
        """Wait until the laptop has taken all that was sent, and keep the packets that it sent."""
        number = secrets.randbits(30)
        self.wire.say("ping", id=number)
        while True:
            kind, payload = self.wire.receive()
            if kind == frame.PACKET:
                self.answers.append(payload[len(EMPTY) :])
            elif kind == frame.CONTROL and message.decode(payload) == {"type": "pong", "id": number}:
                return

    def answered(self) -> list[Packet]:
        """Packets from the laptop's own address, once it had time to answer (MLD comes from none)."""
        with contextlib.suppress(TimeoutError):
            while True:
                kind, payload = self.wire.receive(0.3)
                if kind == frame.PACKET:
                    self.answers.append(payload[len(EMPTY) :])
        packets = [IP(one) if one[0] >> 4 == 4 else IPv6(one) for one in self.answers]
        return [packet for packet in packets if packet.src in (OWN4, OWN6)]

    def traffic(self) -> dict[str, int]:
        return self.laptop.status()["sessions"][0]["traffic"]  # type: ignore[index]


@contextlib.contextmanager
def hostile(laptop: Laptop, terms: Terms = TERMS) -> Iterator[Session]:
    """A session that runs, and must still run at the end; then it is ended by the laptop."""
    taken: list[Wire] = []
    done = threading.Event()

    def handle(connected: socket.socket) -> None:
        taken.append(take_in(connected, terms))
        done.wait(60)

    with serving(laptop.lab, handle) as url:
        client = laptop.connect(url)
        try:
            assert client.stderr
            while "ready" not in (line := client.stderr.readline()):
                assert line, "the client ended"
            session = Session(laptop, taken[0])
            yield session
            session.settle()
            client.send_signal(signal.SIGTERM)
            end = laptop.ended(client)
            assert end.code == 0, end.said
            assert re.fullmatch("tpvpn: session default lasted [^\n]*\n", end.said), end.said
        finally:
            done.set()
            client.kill()
            client.communicate()


@dataclass
class Listeners:
    """Sockets on the laptop that nobody beyond the tunnel may reach, and one that asked first."""

    datagrams: list[socket.socket]
    streams: list[socket.socket]

    def reached(self) -> list[socket.socket]:
        sockets = self.datagrams + self.streams
        ready = readable([one.fileno() for one in sockets], 0.3)
        return [one for one in sockets if one.fileno() in ready]


@pytest.fixture
def listeners(lab: Lab) -> Iterator[Listeners]:
    with contextlib.ExitStack() as stack, inside(lab.namespace("laptop")):
        found = Listeners([], [])
        for family in (socket.AF_INET, socket.AF_INET6):
            datagram = stack.enter_context(socket.socket(family, socket.SOCK_DGRAM))
            datagram.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                datagram.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            datagram.bind(("", LISTENED))
            found.datagrams.append(datagram)
            found.streams.append(stack.enter_context(socket.create_server(("", LISTENED), family=family)))
        yield found


def test_no_packet_for_another_address_gets_in(laptop: Laptop, listeners: Listeners) -> None:
    foreign = [
        "192.0.2.2",
        "192.0.2.1",
        "127.0.0.1",
        "10.8.0.2",
        "10.1.2.3",
        "255.255.255.255",
        "224.0.0.1",
        "246.0.0.8",
    ]
    foreign6 = ["2001:db8:2::2", "fd10:8::2", "::1", "ff02::1", "fd74:7076:706e::8", f"::ffff:{OWN4}"]
    with hostile(laptop) as session:
        for address in foreign:
            for packet in (UDP(dport=LISTENED), TCP(dport=LISTENED, flags="S"), ICMP()):
                session.inject(IP(src=SERVICE, dst=address) / packet)
        for address in foreign6:
            for packet in (UDP(dport=LISTENED), TCP(dport=LISTENED, flags="S"), ICMPv6EchoRequest()):
                session.inject(IPv6(src="fd10:130::80", dst=address) / packet)
        session.settle()
        assert listeners.reached() == []
        assert session.answered() == []
        assert session.traffic()["foreign_packets"] == 3 * (len(foreign) + len(foreign6))


def test_no_new_flow_gets_in_but_answers_do(laptop: Laptop, listeners: Listeners) -> None:
    with hostile(laptop) as session:
        for source in (SERVICE, "192.0.2.10", "127.0.0.1", "10.1.2.3", OWN4):
            for packet in (UDP(dport=LISTENED), TCP(dport=LISTENED, flags="S"), TCP(dport=LISTENED, flags="A"), ICMP()):
                session.inject(IP(src=source, dst=OWN4) / packet)
        for packet in (UDP(dport=LISTENED), TCP(dport=LISTENED, flags="S"), ICMPv6EchoRequest()):
            session.inject(IPv6(src="fd10:130::80", dst=OWN6) / packet)
        session.inject(IP(src=SERVICE, dst=OWN4) / ICMP(type=5, gw="192.0.2.66") / Raw(bytes(28)))  # redirect
        session.settle()
        assert listeners.reached() == []
        assert session.answered() == []
        asking = listeners.datagrams[0]
        asking.sendto(b"question", (SERVICE, 7))
        question = next(one for one in session.answered() if UDP in one and one.dst == SERVICE)
        session.inject(IP(src=SERVICE, dst=OWN4) / UDP(sport=7, dport=LISTENED) / Raw(b"answer"))
        session.inject(IP(src=SERVICE, dst=OWN4) / UDP(sport=8, dport=LISTENED) / Raw(b"another's answer"))
        assert (question.src, listeners.reached()) == (OWN4, [asking])
        assert asking.recv(100) == b"answer"
        assert listeners.reached() == []


def headers() -> Iterator[tuple[bytes, bytes]]:
    """Virtio-net headers that lie, and the packets behind them."""
    tcp = bytes(IP(src=SERVICE, dst=OWN4) / TCP(dport=LISTENED) / Raw(bytes(60_000)))
    udp = bytes(IP(src=SERVICE, dst=OWN4) / UDP(dport=LISTENED) / Raw(bytes(60_000)))
    for gso_type in (1, 3, 4, 5, 0x81, 0x85, 0xFF):
        for gso_size in (0, 1, 7, 1448, 65_535):
            for header_length in (0, 40, 54, 65_535):
                for start, offset in ((0, 0), (20, 16), (65_535, 65_535), (19, 65_530)):
                    header = Header(1, gso_type, header_length, gso_size, start, offset)
                    yield header.pack(), udp if gso_type & 0x7F in (3, 5) else tcp
    for _ in range(300):
        yield os.urandom(10), tcp[: secrets.randbelow(200)]


def test_lying_headers_and_truncated_packets(laptop: Laptop, listeners: Listeners) -> None:
    packet = bytes(IP(src=SERVICE, dst=OWN4) / UDP(dport=LISTENED) / Raw(b"x" * 100))
    with hostile(laptop) as session:
        for header, lying in headers():
            session.inject(lying, header)
        for length in range(len(packet)):
            session.inject(packet[:length])
        for length in range(len(EMPTY)):
            session.wire.send(frame.PACKET, bytes(length))
        session.settle()
        assert listeners.reached() == []
        assert session.answered() == []
        assert session.traffic()["invalid_packets"] > 300


def test_frames_that_mean_nothing(laptop: Laptop) -> None:
    with hostile(laptop) as session:
        wire = session.wire
        for kind in (frame.DNS, 3, 128, 255):
            for payload in (b"", b"\0", bytes(1 << 20), os.urandom(1 << 16)):
                wire.send(kind, payload)
        wire.send(frame.CONTROL, message.encode("config", filler="x" * ((1 << 20) - 40)))
        wire.send(frame.CONTROL, b'{"type":"config","nested":' + b"[" * 500 + b"]" * 500 + b"}")
        for _ in range(3):
            wire.say("welcome", session="again")
            wire.say("greeting", versions=[1])
            wire.say("pong", id=5)
        session.settle()
        assert session.traffic()["received_packets"] == 0


def test_a_flood_of_pings_whose_answers_nobody_reads(laptop: Laptop) -> None:
    """The client bounds what it keeps for such a manager, and gives it up."""

    def handle(connected: socket.socket) -> None:
        take_in(connected)
        ping = frame.encode(frame.CONTROL, message.encode("ping", id=10**4000)) * 20
        while True:
            connected.sendall(ping)

    with serving(laptop.lab, handle) as url:
        end = laptop.failing(url, seconds=15)
    assert end.code == 7, end.said
    assert "the other end takes no more data" in end.sentence


def test_silence_for_ever(laptop: Laptop) -> None:
    """A session is not ended by it, and Ctrl-C is heard."""

    def handle(connected: socket.socket) -> None:
        take_in(connected)
        while connected.recv(1 << 16):
            pass

    with serving(laptop.lab, handle) as url:
        client = laptop.connect(url)
        assert client.stderr
        while "ready" not in client.stderr.readline():
            assert client.poll() is None
        client.send_signal(signal.SIGINT)
        assert laptop.ended(client, 3).code == 130
