"""A kernel exit in a real pod as its tests use it: packets are written into sessions' TUNs, and read there."""

import contextlib
import time
from collections.abc import Iterator

import pytest
from scapy.layers.inet import IP
from scapy.layers.inet6 import IPv6
from scapy.packet import Packet

from pod import inside, pod_and_cluster, readable
from tpvpn.manager.kernel_exit import ExitSession, KernelExit
from tpvpn.wire.vnet import EMPTY, HEADER_LENGTH


@pytest.fixture(scope="module")
def place() -> Iterator[tuple[str, str]]:
    """The namespaces of a pod and of a cluster."""
    with pod_and_cluster() as names:
        yield names


@contextlib.contextmanager
def exit_in(
    pod: str, *sessions: tuple[str | None, str | None], **options
) -> Iterator[tuple[KernelExit, list[ExitSession]]]:
    """An open exit with sessions that want these addresses."""
    way_out = KernelExit(**options)
    opened: list[ExitSession] = []
    with inside(pod):
        way_out.open()
    try:
        for wanted in sessions:
            with inside(pod):
                opened.append(way_out.add_session(*wanted, offload=True))
        yield way_out, opened
    finally:
        for session in opened:
            session.close()
        with inside(pod):
            way_out.close()


def send(session: ExitSession, packet: Packet) -> None:
    session.tun.write(session.tun.fd, memoryview(EMPTY + bytes(packet)))


def receive(session: ExitSession, seconds: float = 2) -> Packet | None:
    """The next packet for the session, whatever queue it is in; what the kernel says of itself (MLD) is passed over."""
    deadline = time.monotonic() + seconds
    while ready := readable([session.tun.fd, session.tun.prompt_fd], max(0, deadline - time.monotonic())):
        buffer = memoryview(bytearray(1 << 17))
        length = session.tun.reader(ready[0])(buffer) or 0
        data = bytes(buffer[HEADER_LENGTH:length])
        packet = IP(data) if data[0] >> 4 == 4 else IPv6(data)
        if packet.dst in (session.ipv4, session.ipv6):
            return packet
    return None


def ask(session: ExitSession, packet: Packet) -> Packet:
    send(session, packet)
    answer = receive(session)
    assert answer is not None, "no answer"
    return answer


def silent(session: ExitSession, packet: Packet) -> bool:
    send(session, packet)
    return receive(session, 0.2) is None
