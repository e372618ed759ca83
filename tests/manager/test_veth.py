"""The veth pair in a TUN's place: what passes through its sockets is what would pass through a TUN."""

import contextlib
import errno
import os
import socket
from collections.abc import Iterator

import pytest
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.packet import Packet, Raw

from pod import inside, namespace, readable, run
from tpvpn.manager.veth import Veth
from tpvpn.netlink import RouteSocket
from tpvpn.tun import Tun, open_tun
from tpvpn.wire.vnet import EMPTY, GSO_TCP4, HEADER_LENGTH, NEEDS_CHECKSUM, Header, Offload

SESSION4, SESSION6, HOST4, HOST6 = "246.0.0.9", "fd74:7076:706e::9", "10.1.1.1", "fd00::1"
UDP_SEGMENT = 103  # linux/udp.h
TCP_OFFLOADS = Offload.CHECKSUM | Offload.TSO4 | Offload.TSO6 | Offload.ECN


@contextlib.contextmanager
def a_device(kind: str, offload: bool = True) -> Iterator[tuple[Tun | Veth, str]]:
    """A device in a namespace of its own, whose host has addresses."""
    with namespace("veth") as name, inside(name), contextlib.closing(RouteSocket()) as netlink:
        run("ip", "address", "add", HOST4, "dev", "lo")
        run("ip", "address", "add", HOST6, "dev", "lo")
        opened = Veth("dev0", netlink, offload=offload) if kind == "veth" else open_tun("dev0", offload=offload)
        with contextlib.closing(opened):
            index = socket.if_nametoindex("dev0")
            netlink.bring_up(index, mtu=1500, queue_length=500, ipv6=True)
            for address in (SESSION4, SESSION6):
                netlink.add_host_route(address, index, 116)
            yield opened, name


def received(device: Tun | Veth, *queues: int) -> bytes | None:
    """The next packet of one of these queues."""
    if not (ready := readable([*queues], 2)):
        return None
    into = memoryview(bytearray(1 << 17))
    length = device.reader(ready[0])(into)
    return None if length is None else bytes(into[:length])


def write(device: Tun | Veth, header: Header | bytes, packet: Packet) -> int:
    head = header if isinstance(header, bytes) else header.pack()
    return device.write(device.fd, memoryview(head + bytes(packet)))


def big_send(device: Tun | Veth, size: int = 30_000) -> bytes:
    """What the device gives of a server's answer that is longer than many segments."""
    with socket.create_server((HOST4, 80)) as server:
        ip = IP(src=SESSION4, dst=HOST4)
        write(device, EMPTY, ip / TCP(sport=7, dport=80, flags="S", seq=1, window=60000, options=[("MSS", 1460)]))
        synack = received(device, device.fd)
        assert synack is not None
        answer = IP(synack[HEADER_LENGTH:])[TCP]
        assert answer.flags == "SA"
        write(device, EMPTY, ip / TCP(sport=7, dport=80, flags="A", seq=2, ack=answer.seq + 1, window=60000))
        accepted, _ = server.accept()
        with accepted:
            accepted.send(bytes(size))
            data = received(device, device.fd)
            assert data is not None
            return data


@pytest.mark.parametrize("kind", ["tun", "veth"])
def test_what_the_kernel_hands_out_uncut_has_the_same_header(kind: str) -> None:
    with a_device(kind) as (device, _):
        device.set_offloads(TCP_OFFLOADS)
        data = big_send(device)
        header = Header.unpack(data)
        assert header.gso_type == GSO_TCP4
        assert header.flags & NEEDS_CHECKSUM
        assert header.gso_size == 1460
        assert (header.checksum_start, header.checksum_offset) == (20, 16)
        assert len(data) > HEADER_LENGTH + 3 * 1460


@pytest.mark.parametrize("kind", ["tun", "veth"])
def test_what_is_written_uncut_arrives_whole(kind: str) -> None:
    with a_device(kind) as (device, _), socket.create_server((HOST4, 80)) as server:
        ip, ports = IP(src=SESSION4, dst=HOST4), {"sport": 7, "dport": 80}
        write(device, EMPTY, ip / TCP(**ports, flags="S", seq=1, options=[("MSS", 1460)]))
        answer = received(device, device.fd)
        assert answer is not None
        ack = IP(answer[HEADER_LENGTH:])[TCP].seq + 1
        body = os.urandom(20_000)
        segment = IP(bytes(ip / TCP(**ports, flags="PA", seq=2, ack=ack, chksum=0) / Raw(body)))
        pseudo = sum(int.from_bytes(bytes(segment)[at : at + 2], "big") for at in range(12, 20, 2)) + 6 + 20 + len(body)
        segment[TCP].chksum = (pseudo & 0xFFFF) + (pseudo >> 16)
        write(device, Header(NEEDS_CHECKSUM, GSO_TCP4, 40, 1460, 20, 16), segment)
        accepted, _ = server.accept()
        with accepted:
            accepted.settimeout(2)
            with accepted.makefile("rb") as stream:  # MSG_WAITALL does not wait on a socket with a timeout
                assert stream.read(len(body)) == body


@pytest.mark.parametrize("kind", ["tun", "veth"])
def test_a_client_without_offloads_gets_whole_packets(kind: str) -> None:
    with a_device(kind, offload=False) as (device, _):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"hello", (SESSION4, 53))
        data = received(device, device.fd, device.prompt_fd)
        assert data is not None
        packet = IP(data)
        told = packet[UDP].chksum
        del packet[UDP].chksum
        assert IP(bytes(packet))[UDP].chksum == told
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as receiver:
            receiver.bind((HOST6, 53))
            receiver.settimeout(2)
            device.write(device.fd, memoryview(bytes(IPv6(src=SESSION6, dst=HOST6) / UDP(sport=9, dport=53) / b"six")))
            assert receiver.recv(100) == b"six"


def test_tcp_has_its_queue_and_all_else_the_prompt_one() -> None:
    with a_device("veth") as (device, _):
        for address in (SESSION4, SESSION6):
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            with (
                socket.socket(family, socket.SOCK_STREAM) as stream,
                socket.socket(family, socket.SOCK_DGRAM) as datagram,
            ):
                stream.setblocking(False)
                stream.connect_ex((address, 80))
                datagram.sendto(b"x", (address, 80))
                for queue, protocol in ((device.fd, TCP), (device.prompt_fd, UDP)):
                    data = received(device, queue)
                    assert data is not None
                    assert protocol in (IPv6 if ":" in address else IP)(data[HEADER_LENGTH:])
        assert device.reader(device.fd)(memoryview(bytearray(2000))) is None


def test_the_kernel_cuts_what_was_not_agreed_on() -> None:
    with a_device("veth") as (device, _):
        device.set_offloads(TCP_OFFLOADS)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 1000)
            sender.sendto(bytes(3000), (SESSION4, 53))
        lengths = [len(received(device, device.prompt_fd) or b"") for _ in range(3)]
        assert lengths == [HEADER_LENGTH + 20 + 8 + 1000] * 3
        device.set_offloads(Offload(0))
        assert device.offloads == Offload(0)
        data = big_send(device)
        assert Header.unpack(data) == Header.unpack(EMPTY)
        assert len(data) == HEADER_LENGTH + 1500


@pytest.mark.parametrize("kind", ["tun", "veth"])
@pytest.mark.parametrize("length", [0, 1, HEADER_LENGTH - 1, HEADER_LENGTH, HEADER_LENGTH + 5])
def test_what_is_too_short_for_a_packet_is_refused(kind: str, length: int) -> None:
    with a_device(kind) as (device, _), pytest.raises(OSError) as refused:
        device.write(device.fd, memoryview(bytes(length)))
    assert refused.value.errno == errno.EINVAL


@pytest.mark.parametrize("header", [Header(0, GSO_TCP4, 0xFFFF, 1460), Header(NEEDS_CHECKSUM, 0, 0, 0, 0xFFFF, 16)])
def test_a_header_that_no_kernel_would_take_is_refused(header: Header) -> None:
    with a_device("veth") as (device, _):
        with pytest.raises(OSError) as refused:
            write(device, header, IP(src=SESSION4, dst=HOST4) / UDP())
        assert refused.value.errno == errno.EINVAL
