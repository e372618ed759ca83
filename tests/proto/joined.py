"""Two terminators joined in memory by a path that loses, repeats, delays and reorders on purpose; time is virtual.

application ── Connection ══ path there ══ Connection ── application
                             path back
"""

import heapq
import itertools
import random
from dataclasses import dataclass, field

from tpvpn.proto.tcp import PEER_CLOSED, RESET, Connection, Limits, State, reset_for
from tpvpn.wire.tcp import Segment

MSS = 1460


@dataclass
class Path:
    """One direction: seconds of delay, and the shares of segments that are lost, repeated or late by up to `jitter`."""

    delay: float = 0.005
    loss: float = 0.0
    repeat: float = 0.0
    late: float = 0.0
    jitter: float = 0.02
    cut: bool = False
    """Nothing comes through."""


@dataclass
class Application:
    """What one end has to say and has heard; it takes at most `greed` bytes at a time."""

    to_say: bytes = b""
    said: int = 0
    heard: bytearray = field(default_factory=bytearray)
    greed: int = 1 << 30
    closes: bool = True
    """FIN behind what it says."""
    closed: bool = False
    peer_closed: bool = False
    was_reset: bool = False


class Joined:
    """A client (active) and a server (passive) end, their applications and the path between them."""

    def __init__(
        self,
        *,
        seed: int = 1,
        there: Path | None = None,
        back: Path | None = None,
        limits: tuple[Limits, Limits] = (Limits(MSS), Limits(MSS)),
        isns: tuple[int, int] = (1000, 5000),
        accepts: bool = True,
    ) -> None:
        self.random = random.Random(seed)
        self.paths = there or Path(), back or Path()
        self.ends = Connection(limits[0]), Connection(limits[1])
        self.applications = Application(), Application()
        self.now = 100.0
        self.sent = [0, 0]
        self.payload_sent = [0, 0]
        self.log: list[tuple[float, int, Segment]] = []
        self._order = itertools.count()
        self._flying: list[tuple[float, int, int, Segment]] = []
        self._isns, self._accepts = isns, accepts
        self.ends[0].connect(self.now, isns[0])

    def put(self, to: int, segment: Segment, delay: float = 0.0) -> None:
        """Let a segment arrive at an end."""
        heapq.heappush(self._flying, (self.now + delay, next(self._order), to, segment))

    def run(self, seconds: float = 1e9, until=None) -> None:
        """Go on until nothing more happens, the time is over or the condition holds."""
        end = self.now + seconds
        self._turn()
        while not (until and until()):
            times = [self._flying[0][0]] if self._flying else []
            times += [at for connection in self.ends if (at := connection.next_timeout()) is not None]
            hungry = zip(self.ends, self.applications, strict=True)
            times += [self.now + 0.001 for connection, one in hungry if one.greed and connection.readable]
            if not times or min(times) > end:
                self.now = end if seconds < 1e9 else self.now
                return
            self.now = max(self.now, min(times))
            while self._flying and self._flying[0][0] <= self.now:
                _, _, to, segment = heapq.heappop(self._flying)
                if not self.ends[to].is_closed:
                    self.ends[to].receive_segment(segment, self.now)
                elif answer := reset_for(segment):
                    self._put_on_path(to, answer)
            for connection in self.ends:
                connection.handle_timeout(self.now)
            self._turn()

    def open(self) -> None:
        """Run until both ends are established; neither closes by itself."""
        for application in self.applications:
            application.closes = False
        self.run(60, lambda: all(end.state is State.ESTABLISHED for end in self.ends))
        assert all(end.state is State.ESTABLISHED for end in self.ends)

    def _turn(self) -> None:
        if self._accepts and self.ends[1].is_requested:
            self.ends[1].accept(self.now, self._isns[1])
        for index in (0, 1):
            self._serve(index)
            self._send(index)

    def _serve(self, index: int) -> None:
        connection, application = self.ends[index], self.applications[index]
        events = connection.take_events()
        application.peer_closed |= bool(events & PEER_CLOSED)
        application.was_reset |= bool(events & RESET)
        taken = min(connection.readable, application.greed)
        application.heard += b"".join(connection.peek())[:taken]
        connection.consume(taken)
        connection.keep()
        assert connection.readable <= 1 << 20
        if room := connection.writable:
            piece = application.to_say[application.said : application.said + min(room, 65_483)]
            connection.write(piece)
            application.said += len(piece)
        done = application.said == len(application.to_say)
        if (
            done
            and application.closes
            and not application.closed
            and connection.state
            in (
                State.ESTABLISHED,
                State.CLOSE_WAIT,
            )
        ):
            application.closed = True
            connection.shutdown_write()

    def _send(self, index: int) -> None:
        while segments := self.ends[index].segments_to_send(self.now):
            for segment in segments:
                self.sent[index] += 1
                self.payload_sent[index] += len(segment.payload)
                self.log.append((self.now, index, segment))
                self._put_on_path(index, segment)
            if self.ends[index].state in (State.CLOSED, State.LISTEN):
                break
            self._serve(index)

    def _put_on_path(self, index: int, segment: Segment) -> None:
        path = self.paths[index]
        for _ in range(1 + (self.random.random() < path.repeat)):
            if not path.cut and self.random.random() >= path.loss:
                late = self.random.random() * path.jitter if self.random.random() < path.late else 0
                self.put(1 - index, segment, path.delay + late)
