"""What a developer has open through a session, all at once, and what becomes of it while the connection is lost.

Each part runs in threads of its own, its near end on the laptop and its far end in the cluster: a transfer in both
directions, compared byte by byte; a shell that is idle; numbered datagrams; a ping. Each knows its longest gap.
"""

import contextlib
import hashlib
import itertools
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from peers import eventually
from pod import inside

HOST = "10.130.0.80"
BLOCK = 1 << 16
MEGABYTE = 1 << 20


@dataclass
class Seen:
    """When something came, by time.monotonic()."""

    at: list[float] = field(default_factory=list)

    def now(self) -> None:
        self.at.append(time.monotonic())

    def gaps(self, since: float = 0.0) -> list[float]:
        """The times without anything that ended after `since`, and what goes on still."""
        ends = [*self.at, time.monotonic()]
        return [after - before for before, after in itertools.pairwise(ends) if after > since]

    def gap(self, since: float = 0.0) -> float:
        """The longest of them."""
        return max(self.gaps(since), default=0.0)

    def first_after(self, when: float) -> float | None:
        """How long after that time something came first."""
        return next((one - when for one in self.at if one > when), None)


class Part:
    """Threads that end when they have nothing more to do, or at `stop()`; what failed in one is raised there."""

    def __init__(self) -> None:
        self.stopping = threading.Event()
        self._threads: list[threading.Thread] = []
        self._errors: list[BaseException] = []
        self._sockets: list[socket.socket] = []

    def run(self, work: Callable[..., None], *arguments: object) -> None:
        def working() -> None:
            try:
                work(*arguments)
            except BaseException as error:
                if not self.stopping.is_set():
                    self._errors.append(error)

        self._threads.append(threading.Thread(target=working, daemon=True))
        self._threads[-1].start()

    def own(self, one: socket.socket) -> socket.socket:
        """It is closed at the end."""
        self._sockets.append(one)
        return one

    @property
    def failed(self) -> BaseException | None:
        return self._errors[0] if self._errors else None

    def stop(self) -> None:
        self.stopping.set()
        for one in self._sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()
        if self._errors:
            raise self._errors[0]


def connected(near: str, far: str, part: Part) -> tuple[socket.socket, socket.socket]:
    """A connection from the laptop to the cluster, both ends."""
    with inside(far), socket.create_server((HOST, 0)) as server:
        port = server.getsockname()[1]
        with inside(near):
            one = socket.create_connection((HOST, port), timeout=10)
        other, _ = server.accept()
    for end in (one, other):
        end.settimeout(None)
        part.own(end)
    return one, other


def block(seed: int, number: int) -> bytes:
    """Block `number` of the data of a seed: no two are equal."""
    return hashlib.blake2b(struct.pack(">QQ", seed, number), digest_size=64).digest() * (BLOCK // 64)


class Transfer(Part):
    """So many bytes each way at so many a second; `done` when all have come as they were sent."""

    def __init__(self, near: str, far: str, size: int, rate: float, seed: int = 1) -> None:
        super().__init__()
        self.up, self.down = Seen(), Seen()
        self._size, self._rate, self._complete = size, rate, 0
        for number, seen in enumerate((self.up, self.down)):
            ends = connected(near, far, self)
            sender, receiver = ends if number == 0 else ends[::-1]
            self.run(self._send, sender, seed + number)
            self.run(self._compare, receiver, seed + number, seen)

    @property
    def done(self) -> bool:
        if self.failed:
            raise self.failed
        return self._complete == 2

    def gap(self, since: float) -> float:
        return max(self.up.gap(since), self.down.gap(since))

    def goes_on(self, when: float) -> float | None:
        """How long after that time both directions had moved again."""
        both = self.up.first_after(when), self.down.first_after(when)
        return None if None in both else max(one for one in both if one is not None)

    def _send(self, sender: socket.socket, seed: int) -> None:
        began = time.monotonic()
        for number in range(self._size // BLOCK):
            sender.sendall(block(seed, number))
            ahead = (number + 1) * BLOCK / self._rate - (time.monotonic() - began)
            if ahead > 0 and self.stopping.wait(ahead):
                return

    def _compare(self, receiver: socket.socket, seed: int, seen: Seen) -> None:
        buffer = bytearray(BLOCK)
        for number in range(self._size // BLOCK):
            have = 0
            while have < BLOCK:
                count = receiver.recv_into(memoryview(buffer)[have:])
                if not count:
                    raise EOFError(f"the connection ended in block {number}")
                have += count
                seen.now()
            assert buffer == block(seed, number), f"block {number} is another one"
        self._complete += 1


class Shell(Part):
    """A connection that says nothing until it is asked."""

    def __init__(self, near: str, far: str) -> None:
        super().__init__()
        self._near, far_end = connected(near, far, self)
        self.run(self._echo, far_end)

    def answers(self, seconds: float = 10) -> float:
        """How long its answer took; TimeoutError when there is none."""
        began, line = time.monotonic(), hashlib.sha256(str(time.monotonic()).encode()).digest()
        self._near.settimeout(seconds)
        self._near.sendall(line)
        answer = b""
        while len(answer) < len(line):
            data = self._near.recv(100)
            if not data:
                raise EOFError("the shell ended")
            answer += data
        assert answer == line
        return time.monotonic() - began

    def _echo(self, far_end: socket.socket) -> None:
        while data := far_end.recv(1000):
            far_end.sendall(data)


class Datagrams(Part):
    """Numbered ones, so many a second, that come back."""

    def __init__(self, near: str, far: str, every: float = 0.02) -> None:
        super().__init__()
        with inside(far):
            far_end = self.own(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        far_end.bind((HOST, 0))
        with inside(near):
            near_end = self.own(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        near_end.connect(far_end.getsockname())
        self.sent, self.seen, self.numbers = 0, Seen(), set[int]()
        for one in (near_end, far_end):
            one.settimeout(0.2)
        self.run(self._echo, far_end)
        self.run(self._send, near_end, every)
        self.run(self._receive, near_end)

    @property
    def lost(self) -> int:
        return self.sent - len(self.numbers)

    def _send(self, near_end: socket.socket, every: float) -> None:
        while not self.stopping.wait(every):
            with contextlib.suppress(OSError):  # what ICMP says of the one before
                near_end.send(struct.pack(">Q", self.sent) + bytes(100))
            self.sent += 1

    def _receive(self, near_end: socket.socket) -> None:
        while not self.stopping.is_set():
            with contextlib.suppress(TimeoutError, ConnectionError):
                self.numbers.add(struct.unpack_from(">Q", near_end.recv(1000))[0])
                self.seen.now()

    def _echo(self, far_end: socket.socket) -> None:
        while not self.stopping.is_set():
            with contextlib.suppress(TimeoutError, ConnectionError):
                data, peer = far_end.recvfrom(1000)
                far_end.sendto(data, peer)


class Pings(Part):
    """Echo requests by a raw socket, and their answers."""

    def __init__(self, near: str, every: float = 0.02) -> None:
        super().__init__()
        with inside(near):
            near_end = self.own(socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP))
        near_end.connect((HOST, 0))
        near_end.settimeout(0.2)
        self.sent, self.seen, self.round_trips = 0, Seen(), dict[int, float]()
        self._sent_at: dict[int, float] = {}
        self._identity = id(self) >> 4 & 0xFFFF
        self.run(self._send, near_end, every)
        self.run(self._receive, near_end)

    def _send(self, near_end: socket.socket, every: float) -> None:
        while not self.stopping.wait(every):
            number = self.sent & 0xFFFF
            self._sent_at[number] = time.monotonic()
            body = struct.pack(">BBHHH", 8, 0, 0, self._identity, number)
            total = sum(struct.unpack(">4H", body))
            checksum = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
            with contextlib.suppress(OSError):
                near_end.send(struct.pack(">BBHHH", 8, 0, checksum, self._identity, number))
            self.sent += 1

    def _receive(self, near_end: socket.socket) -> None:
        while not self.stopping.is_set():
            with contextlib.suppress(TimeoutError, ConnectionError):
                data = near_end.recv(2000)
                kind, _, _, identity, number = struct.unpack_from(">BBHHH", data, (data[0] & 0xF) * 4)
                if (kind, identity) == (0, self._identity):
                    self.round_trips[number] = time.monotonic() - self._sent_at[number]
                    self.seen.now()


@dataclass
class Traffic:
    """All of it."""

    transfer: Transfer
    shell: Shell
    datagrams: Datagrams
    pings: Pings

    def finishes(self, seconds: float) -> None:
        """The transfer must be complete in that time, and the shell answer."""
        eventually(lambda: self.transfer.done, seconds, "the transfer is complete")
        self.shell.answers()


@contextlib.contextmanager
def traffic(near: str, far: str, seconds: float, size: int = 100 * MEGABYTE) -> Iterator[Traffic]:
    """From the laptop's namespace to the cluster's; the transfer takes about so long when nothing happens."""
    with contextlib.ExitStack() as stack:
        parts = (Transfer(near, far, size, size / seconds), Shell(near, far), Datagrams(near, far), Pings(near))
        for part in parts:
            stack.callback(part.stop)
        running = Traffic(*parts)
        running.shell.answers()
        eventually(lambda: bool(running.pings.seen.at and running.datagrams.seen.at), 5, "ping and datagrams")
        yield running
