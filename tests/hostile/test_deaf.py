"""A client that sends at full rate and never reads: its session pauses or ends, memory is bounded, others go on."""

import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.packet import Packet, Raw

from peers import POD, Client, Manager, eventually, lab, running_manager
from tpvpn.lab import Lab
from tpvpn.lab.servers import ECHO_PORT, HTTP_PORT
from tpvpn.proto import ping
from tpvpn.wire import frame

__all__ = ["lab"]

pytestmark = pytest.mark.alone

SECONDS = 3.0
MEMORY = 40 << 10
"""KiB that one session may cost a manager, whatever it does."""


@pytest.fixture(scope="module", params=["kernel", "socket"])
def manager(request: pytest.FixtureRequest, lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Manager]:
    with running_manager(lab, tmp_path_factory.mktemp("deaf"), "--exit", request.param) as manager:
        yield manager


def pings(own: str) -> list[Packet | bytes]:
    return [IP(src=own, dst=POD) / ICMP(id=1, seq=number) / Raw(bytes(1400)) for number in range(64)]


def datagrams(own: str) -> list[Packet | bytes]:
    """To a server that gives them back, from many ports."""
    return [IP(src=own, dst=POD) / UDP(sport=number, dport=ECHO_PORT) / Raw(bytes(1400)) for number in range(1, 513)]


def openings(own: str) -> list[Packet | bytes]:
    return [IP(src=own, dst=POD) / TCP(sport=number, dport=HTTP_PORT, flags="S") for number in range(1, 4001)]


def questions(own: str) -> list[Packet | bytes]:
    """Whose answers are 1,600 times as long: control frames."""
    return [frame.encode(frame.CONTROL, ping.encode(1, wanted=ping.MAX_PADDING))] * 10_000


@pytest.mark.parametrize("kind", [pings, datagrams, openings, questions])
def test_who_sends_and_never_reads_harms_nobody(manager: Manager, kind: Callable[[str], list[Packet | bytes]]) -> None:
    descriptors = manager.descriptors()
    with manager.session() as honest:
        assert honest.echo()
        before = manager.rss()
        with manager.session() as deaf:
            assert deaf.terms.ipv4
            sent = kind(deaf.terms.ipv4)
            frames = [one if isinstance(one, bytes) else frame.encode(frame.PACKET, bytes(one)) for one in sent]
            deaf.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            until = time.monotonic() + SECONDS
            sending = threading.Thread(target=send, args=(deaf, frames, until))
            sending.start()
            slowest = 0.0
            while sending.is_alive():
                began = time.monotonic()
                assert honest.echo()
                slowest = max(slowest, time.monotonic() - began)
            assert slowest < 1
            assert manager.rss() - before < MEMORY
        eventually(lambda: manager.metrics()["tpvpn_manager_sessions"] == 1, 10, "the session is over")
        assert honest.echo()
    eventually(lambda: manager.descriptors() <= descriptors, 10, "every socket is closed")


def send(deaf: Client, frames: list[bytes], until: float) -> None:
    """As fast as the manager takes them; also when it takes none any more it is not left before the time."""
    stream = b"".join(frames)
    deaf.socket.settimeout(0.2)
    rest = memoryview(stream)
    while time.monotonic() < until:
        try:
            rest = rest[deaf.socket.send(rest) :] or memoryview(stream)
        except TimeoutError:
            continue
        except ConnectionError:
            return
