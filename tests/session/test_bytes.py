"""What goes through a session arrives: every byte, every size, every error; as without it."""

import contextlib
import errno
import hashlib
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from laptop import Laptop

from peers import eventually
from pod import inside
from tpvpn.lab.topology import POD_CIDR, POD_CIDR6, PODS, PODS6, SERVICES, SERVICES6

V4, V6 = socket.AF_INET, socket.AF_INET6
CHUNK, PAGE = 1 << 20, 1 << 12
GIGABYTE = 1_000_000_000
ECHO = 7
UDP_MAX: dict[int, int] = {V4: 65535 - 20 - 8, V6: 65535 - 8}
"""The largest datagram: the length field of IPv4 counts the header, that of IPv6 does not (RFC 8200 section 3)."""
NODE = {"192.0.2.10", "10.132.0.1", "2001:db8:2::10", "fd10:132::1"}
both = pytest.mark.parametrize(("family", "pod"), [(V4, PODS[0]), (V6, PODS6[0])], ids=["IPv4", "IPv6"])


@pytest.fixture(scope="module", autouse=True)
def session(laptop: Laptop) -> Iterator[None]:
    with laptop.connected():
        yield


def listener(laptop: Laptop, family: int, address: str, kind: int = socket.SOCK_STREAM) -> socket.socket:
    """A socket bound to a free port of the cluster."""
    with inside(laptop.lab.namespace("cluster")):
        bound = socket.socket(family, kind)
    bound.bind((address, 0))
    bound.settimeout(30)
    return bound


# -- streams -----------------------------------------------------------------------------------------------------------


def stream(seed: bytes, length: int) -> Iterator[memoryview]:
    """Random bytes, the same for a seed; each page carries its place, so that none can stand for another."""
    block = bytearray(hashlib.shake_256(seed).digest(CHUNK))
    view = memoryview(block)
    for start in range(0, length, CHUNK):
        for at in range(0, CHUNK, PAGE):
            block[at : at + 8] = (start + at).to_bytes(8)
        yield view[: length - start]


def send(connected: socket.socket, seed: bytes, length: int) -> str:
    """Send a stream and the end; its hash."""
    digest = hashlib.sha256()
    for chunk in stream(seed, length):
        connected.sendall(chunk)
        digest.update(chunk)
    connected.shutdown(socket.SHUT_WR)
    return digest.hexdigest()


def receive(connected: socket.socket) -> tuple[int, str]:
    """Receive to the end: how much that was, and its hash."""
    digest, total, buffer = hashlib.sha256(), 0, bytearray(CHUNK)
    view = memoryview(buffer)
    while length := connected.recv_into(buffer):
        digest.update(view[:length])
        total += length
    return total, digest.hexdigest()


@pytest.mark.parametrize(("family", "address"), [(V4, SERVICES[1]), (V6, PODS6[0])], ids=["IPv4", "IPv6"])
@pytest.mark.parametrize("up", [True, False], ids=["up", "down"])
def test_a_gigabyte_is_byte_exact(laptop: Laptop, family: int, address: str, up: bool) -> None:
    with listener(laptop, family, address) as server, laptop.socket(family) as near, ThreadPoolExecutor(2) as pool:
        server.listen()
        near.settimeout(30)
        near.connect(server.getsockname())
        far, _ = server.accept()
        with far:
            far.settimeout(30)
            sender, receiver = (near, far) if up else (far, near)
            sent = pool.submit(send, sender, f"{family} {up}".encode(), GIGABYTE)
            received = pool.submit(receive, receiver)
            assert received.result() == (GIGABYTE, sent.result())


@both
def test_both_ways_at_once_with_a_half_close(laptop: Laptop, family: int, pod: str) -> None:
    length = 50_000_000
    with listener(laptop, family, pod) as server, laptop.socket(family) as near, ThreadPoolExecutor(4) as pool:
        server.listen()
        near.settimeout(30)
        near.connect(server.getsockname())
        far, _ = server.accept()
        with far:
            far.settimeout(30)
            ups = pool.submit(send, near, b"up", length), pool.submit(receive, far)
            downs = pool.submit(send, far, b"down", length), pool.submit(receive, near)
            for sent, received in (ups, downs):
                assert received.result() == (length, sent.result())


# -- datagrams ---------------------------------------------------------------------------------------------------------


@both
def test_datagrams_of_every_size(laptop: Laptop, family: int, pod: str) -> None:
    """Around what fits the MTU of 1500, and fragmented both ways up to the largest there is."""
    fits = 1500 - 8 - (20 if family == V4 else 40)
    with laptop.socket(family, socket.SOCK_DGRAM) as asking:
        asking.settimeout(5)
        asking.connect((pod, ECHO))
        for size in (0, 1, fits - 1, fits, fits + 1, 2 * fits, 8192, 30_000, UDP_MAX[family]):
            sent = hashlib.shake_256(str(size).encode()).digest(size)
            asking.send(sent)
            assert asking.recv(65536) == sent, size


@both
def test_pings_of_every_size(laptop: Laptop, family: int, pod: str) -> None:
    fits = 1500 - 8 - (20 if family == V4 else 40)
    for size in (0, 56, fits - 1, fits, fits + 1, 8192, 65507):
        answered = laptop.sh(f"ping -n -c 1 -W 5 -s {size} {pod}")
        assert f"{size + 8} bytes from {pod}" in answered


def test_a_packet_that_may_not_be_fragmented_and_is_too_large(laptop: Laptop) -> None:
    refused = laptop.run("ping", "-M", "do", "-c", "1", "-s", "1473", PODS[0])
    assert refused.returncode == 1
    assert "mtu=1500" in refused.stderr
    assert "1480 bytes from" in laptop.sh(f"ping -M do -c 1 -W 5 -s 1472 {PODS[0]}")


# -- errors, there and back --------------------------------------------------------------------------------------------


@both
def test_a_closed_udp_port_is_unreachable_in_both_directions(laptop: Laptop, family: int, pod: str) -> None:
    """ICMP's answer to a datagram finds its sender, on the laptop as in the cluster."""
    with laptop.socket(family, socket.SOCK_DGRAM) as near:
        near.settimeout(5)
        near.connect((pod, 9))
        near.send(b"to nobody")
        with pytest.raises(ConnectionRefusedError):
            near.recv(10)
    with listener(laptop, family, pod, socket.SOCK_DGRAM) as far:
        with laptop.socket(family, socket.SOCK_DGRAM) as near:
            near.sendto(b"hello", far.getsockname())
            _, sender = far.recvfrom(10)
        far.connect(sender)
        far.settimeout(0.5)
        with pytest.raises(ConnectionRefusedError):
            for _ in range(3):  # sockets at the manager cannot refuse what they have taken, but what comes next
                far.send(b"too late")
                with contextlib.suppress(TimeoutError):
                    far.recv(10)


@both
def test_traceroute_shows_the_manager_and_the_pod(laptop: Laptop, family: int, pod: str) -> None:
    for probe in ([], ["--icmp"], ["--tcp", "--port=80"]):
        traced = laptop.run("traceroute", "-n", "-q", "1", "-w", "3", "-N", "1", *probe, pod).stdout
        first, *others = re.findall(r"^ *\d+  (\S+)", traced, re.MULTILINE)
        assert first in NODE, traced
        assert others == [pod], traced


@both
def test_a_closed_tcp_port_refuses_at_once(laptop: Laptop, family: int, pod: str) -> None:
    with laptop.socket(family) as near:
        near.settimeout(5)
        began = time.monotonic()
        with pytest.raises(ConnectionRefusedError):
            near.connect((pod, 81))
        assert time.monotonic() - began < 1


@pytest.mark.parametrize(
    ("family", "dead"),
    [(V4, POD_CIDR.replace("0.0/16", "9.9")), (V6, POD_CIDR6.replace("::/64", "::9:9"))],
    ids=["IPv4", "IPv6"],
)
def test_a_dead_host_does_not_refuse(laptop: Laptop, family: int, dead: str) -> None:
    """No SYN is answered that nobody answered: it times out, or the node says that it finds no such host."""
    with laptop.socket(family) as near:
        near.settimeout(5)
        with pytest.raises(OSError) as failed:
            near.connect((dead, 80))
    unreachable = failed.value.errno == errno.EHOSTUNREACH
    assert unreachable or isinstance(failed.value, TimeoutError), failed.value


@both
def test_a_connection_that_is_reset_is_reset(laptop: Laptop, family: int, pod: str) -> None:
    with listener(laptop, family, pod) as server, laptop.socket(family) as near:
        server.listen()
        near.settimeout(5)
        near.connect(server.getsockname())
        far, _ = server.accept()
        far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        far.close()
        with pytest.raises(ConnectionResetError):
            near.recv(1)


def test_a_hundred_connections_at_once(laptop: Laptop) -> None:
    """Services and pods, both families, all open together; each gets its own bytes back."""
    with ThreadPoolExecutor(1) as pool, listener(laptop, V6, SERVICES6[0]) as server:
        server.listen(100)
        farther: list[socket.socket] = []
        pool.submit(lambda: [farther.append(server.accept()[0]) for _ in range(100)])
        nearer = [laptop.socket(V6) for _ in range(100)]
        for number, near in enumerate(nearer):
            near.settimeout(5)
            near.connect(server.getsockname())
            near.send(str(number).encode())
        eventually(lambda: len(farther) == 100, 5, "accepted")
        for far in farther:
            far.settimeout(5)
            far.send(far.recv(10))
        assert [near.recv(10) for near in nearer] == [str(number).encode() for number in range(100)]
        for one in (*nearer, *farther):
            one.close()
