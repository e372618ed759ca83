"""A manager with the socket exit in a real pod, as nobody and without a capability; scapy plays its clients."""

import asyncio
import contextlib
import os
import re
import selectors
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Self

import pytest
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6
from scapy.packet import Packet, Raw

from peers import Client, dropped, eventually
from pod import inside, pod_and_cluster, sysctl
from tpvpn.bundle import Bundle
from tpvpn.lab.restricted import UNPRIVILEGED
from tpvpn.link import Link
from tpvpn.manager.socket_carrier import SocketCarrier
from tpvpn.manager.socket_exit import MAX_MEMORY, SocketExit
from tpvpn.proto.flow import Pool
from tpvpn.proto.session import Offer, Terms
from tpvpn.transport import stream as transport
from tpvpn.wire import frame

TOKEN = b"token-of-ann"
FLOWS = 1000
"""Of an exit within the test."""
INSTALLED = (sys.executable, "-m", "tpvpn", "manager")


@pytest.fixture(scope="module")
def place() -> Iterator[tuple[str, str]]:
    """The namespaces of a pod, where everybody may ping, and of a cluster."""
    with pod_and_cluster() as (pod, cluster):
        sysctl(pod, "ipv4/ping_group_range", "0 2147483647")
        yield pod, cluster


class Session(Client):
    """A session whose packets are bare."""

    def next_packet(self, patience: float = 2.0) -> Packet | None:
        with contextlib.suppress(TimeoutError):
            while True:
                kind, payload = self.receive(patience)
                if kind == frame.PACKET:
                    return IP(payload) if payload[0] >> 4 == 4 else IPv6(payload)
        return None

    def to(self, address: str, **fields: object) -> Packet:
        """The start of a packet to an address."""
        if ":" in address:
            return IPv6(src=self.terms.ipv6, dst=address, **fields)
        return IP(src=self.terms.ipv4, dst=address, **fields)

    def ask(self, packet: Packet) -> Packet:
        self.packet(packet)
        answer = self.next_packet()
        assert answer is not None, "no answer"
        return answer

    def silent(self, packet: Packet) -> bool:
        self.packet(packet)
        return self.next_packet(0.3) is None


class Stream:
    """A TCP client made of packets, in order, without retransmission."""

    def __init__(self, session: Session, address: str, port: int, source_port: int) -> None:
        self._session, self._address, self._ports = session, address, (source_port, port)
        self.seq, self.ack = 1000, 0
        self.window = 65535
        self.options: list[tuple[str, int]] = []  # of the SYN
        self._acknowledged, self._offered = 1001, 65535

    def segment(self, flags: str, data: bytes = b"") -> Packet:
        source, port = self._ports
        fields = TCP(sport=source, dport=port, flags=flags, seq=self.seq, ack=self.ack, window=self.window)
        if "S" in flags:
            fields.options = self.options
        self.seq += len(data) + ("S" in flags) + ("F" in flags)
        return self._session.to(self._address) / fields / (Raw(data) if data else b"")

    def send(self, flags: str, data: bytes = b"") -> None:
        self._session.packet(self.segment(flags, data))

    def connect(self) -> None:
        answer = self._session.ask(self.segment("S"))
        assert answer[TCP].flags == "SA", answer.summary()
        self.ack = answer[TCP].seq + 1
        self.send("A")

    def latest_window(self) -> int:
        """The window when all that was sent is acknowledged and nothing more comes."""
        while (packet := self._session.next_packet(0.02 if self._acknowledged == self.seq else 1)) is not None:
            self._acknowledged, self._offered = packet[TCP].ack, packet[TCP].window
        assert self._acknowledged == self.seq
        return self._offered

    def expect(self, done: Callable[[TCP, bytes], bool], patience: float = 3.0) -> bytes:
        """Take and acknowledge segments until one satisfies; the bytes of all."""
        data = b""
        while True:
            packet = self._session.next_packet(patience)
            assert packet is not None, f"only {len(data)} bytes came"
            if TCP not in packet or packet[TCP].dport != self._ports[0]:
                continue
            got = packet[TCP]
            payload = bytes(got.payload) if isinstance(got.payload, Raw) else b""
            if got.seq == self.ack:
                data += payload
                self.ack += len(payload) + ("F" in got.flags)
                if payload or "F" in got.flags:
                    self.send("A")
            if done(got, data):
                return data


def talk(session: Session, cluster: str, address: str) -> Stream:
    """A connection to a server in the cluster that carried bytes both ways; the server has finished."""
    with inside(cluster):
        server = socket.create_server((address, 8080), family=socket.AF_INET6 if ":" in address else socket.AF_INET)
    with server:
        stream = Stream(session, address, 8080, 4001)
        stream.connect()
        connected, _ = server.accept()
        with connected:
            stream.send("PA", b"question")
            assert connected.recv(100) == b"question"
            connected.sendall(b"answer")
            assert stream.expect(lambda _, data: len(data) == 6) == b"answer"
    return stream


class Manager:
    """The running process."""

    def __init__(self, pod: str, process: subprocess.Popen[bytes], log: Path, port: int) -> None:
        self.pod, self.process, self._log, self.port = pod, process, log, port

    @property
    def said(self) -> str:
        return self._log.read_text()

    @contextlib.contextmanager
    def session(self, **offer: object) -> Iterator[Session]:
        with inside(self.pod):
            connected = socket.create_connection(("127.0.0.1", self.port), timeout=5)
        with contextlib.closing(Session(connected)) as session:
            session.shake_hands(TOKEN, Offer("laptop", **offer))  # type: ignore[arg-type]
            yield session

    def dropped(self) -> dict[str, int]:
        """Packets dropped so far, by reason."""
        with inside(self.pod), socket.create_connection(("127.0.0.1", self.port), timeout=5) as connected:
            connected.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
            answer = b"".join(iter(lambda: connected.recv(65536), b"")).decode()
        return dropped(answer)

    def status(self, key: str) -> str:
        """A line of /proc/PID/status."""
        found = re.search(rf"^{key}:\s+(.*)$", Path(f"/proc/{self.process.pid}/status").read_text(), re.MULTILINE)
        assert found
        return found[1]

    def rss(self) -> int:
        """Resident memory in KiB."""
        return int(self.status("VmRSS").split()[0])

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def cpu(self) -> float:
        """Seconds of processor time used so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def manager_in(
    pod: str, *options: str, rights: Sequence[str] = UNPRIVILEGED, program: Sequence[str] = INSTALLED
) -> Iterator[Manager]:
    """A manager in the pod, that may nothing."""
    with tempfile.TemporaryDirectory(prefix="tpvpn-tests-") as name:
        Path(name).chmod(0o755)  # pytest's own are for their user alone
        with _manager_in(pod, Path(name), [*rights, *program], options) as manager:
            yield manager


@contextlib.contextmanager
def _manager_in(pod: str, directory: Path, program: Sequence[str], options: Sequence[str]) -> Iterator[Manager]:
    tokens, log = directory / "tokens", directory / "log"
    tokens.write_bytes(b"ann: " + TOKEN + b"\n")
    linger = () if "--linger" in options else ("--linger", "0")
    options = ["--listen", "127.0.0.1:0", "--token-file", str(tokens), *linger, *options]
    command = ["nsenter", f"--net=/run/netns/{pod}", *program, *options]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    listening = re.compile(r"listening on \S+ port (\d+)")
    try:
        eventually(lambda: process.poll() is not None or listening.search(log.read_text()) is not None, 10)
        found = listening.search(log.read_text())
        assert found, log.read_text()
        yield Manager(pod, process, log, int(found[1]))
        assert "Traceback" not in log.read_text(), log.read_text()
    finally:
        process.terminate()
        process.wait(15)


# -- an exit within the test ---------------------------------------------------------------------------------------


class WoundLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock runs, and can be put forward."""

    ahead = 0.0

    def time(self) -> float:
        return super().time() + self.ahead


class ExitWithin:
    """A socket exit in a thread that is in the pod, with one session: a test sees what it counts, and winds its clock.

    `memory`: bytes that the buffers of all flows may hold.
    """

    def __init__(self, pod: str, memory: int) -> None:
        self._pod, self._memory = pod, memory
        self._selector = selectors.DefaultSelector()
        self._loop = WoundLoop(self._selector)
        self._failed: list[str] = []
        self._loop.set_exception_handler(lambda _, context: self._failed.append(str(context)))
        self.carrier: SocketCarrier
        self.session: Session

    def wind(self, seconds: float) -> None:
        """So much time passes, and what is due happens."""
        passed = threading.Event()

        def put_forward() -> None:
            self._loop.ahead += seconds
            self._loop.call_soon(lambda: self._loop.call_soon(passed.set))  # timers that are due come before it

        self._loop.call_soon_threadsafe(put_forward)
        assert passed.wait(5)

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """Nothing is looked at meanwhile: what happens is seen at once, in its order."""
        begun, done = threading.Event(), threading.Event()
        self._loop.call_soon_threadsafe(lambda: (begun.set(), done.wait(5)))
        assert begun.wait(5)
        yield
        done.set()

    def stop(self) -> None:
        """As when the manager says goodbye."""
        stopped = threading.Event()
        self._loop.call_soon_threadsafe(lambda: (self.carrier.stop(), stopped.set()))
        assert stopped.wait(5)

    @contextlib.contextmanager
    def running(self) -> Iterator[Self]:
        ours, theirs = socket.socketpair()
        ready = threading.Event()

        def work() -> None:
            with inside(self._pod):
                asyncio.set_event_loop(self._loop)
                self._loop.run_until_complete(self._begin(theirs))
                ready.set()
                self._loop.run_forever()
                self.carrier.stop()
                self._link.close()
                self._loop.run_until_complete(asyncio.sleep(0))
                self._watched = len(self._selector.get_map())
                self._loop.close()

        thread = threading.Thread(target=work)
        thread.start()
        try:
            assert ready.wait(5)
            with contextlib.closing(Session(ours)) as self.session:
                place = self._place
                self.session.terms = Terms("", place.ipv4, place.ipv6, 1500, [], {}, "", {})
                yield self
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            thread.join()
        assert not self._failed
        assert (self.carrier.pool.used, self.carrier.table.half_open, self.carrier.table.flows) == (0, 0, {})
        assert self._watched == 1, "the loop watches descriptors that are closed, beside its own"
        assert sum(self.carrier.pool.take(0) for _ in range(FLOWS + 10)) == FLOWS

    async def _begin(self, connected: socket.socket) -> None:
        exit = SocketExit(clock=self._loop.time)
        exit.open()
        exit.pool = Pool(FLOWS, self._memory)
        self._place = exit.add_session(None, None, offload=False)
        self._link, bundle = Link(transport.Stream(connected), lambda _: None), Bundle(offload=False)
        self.carrier = self._place.attach(bundle, lambda *_: None)
        self.carrier.start()
        bundle.join(0, self._link)


@contextlib.contextmanager
def exit_within(pod: str, memory: int = MAX_MEMORY) -> Iterator[ExitWithin]:
    """Nothing of it may be left in the end."""
    with ExitWithin(pod, memory).running() as exit:
        yield exit
