"""Watches the links of a session: asks their other ends for a sign of life, and tells the bundle which are silent.

When is `proto/liveness`'s to say. A ping and its pong cost some 40 bytes a second on a link that is idle.
"""

import asyncio
import time

from tpvpn.bundle import Bundle
from tpvpn.errors import LinkLostError
from tpvpn.link import Link
from tpvpn.proto import ping
from tpvpn.proto.liveness import DEAD, IDLE, TICK, Liveness
from tpvpn.wire import frame


class Heartbeat:
    """One link's, from its making until `stop()`; a link that is dead fails."""

    def __init__(self, link: Link, bundle: Bundle, idle: float = IDLE, dead: float = DEAD) -> None:
        self.is_silent = False
        self.changed = asyncio.Event()
        """Set whenever `is_silent` has changed."""
        self._link, self._bundle, self._dead = link, bundle, dead
        self._liveness = Liveness(_now(), idle, dead)
        self._received, self._batches, self._asked = link.received, link.batches, 0
        self._sent_at = 0.0
        self._is_answered = True
        self.rtt: float | None = None
        """Seconds that the last answer took which was waited for."""
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(TICK, self._look)

    def stop(self) -> None:
        """Look no more."""
        self._timer.cancel()

    def urge(self) -> None:
        """Something says that the link may be lost."""
        if self._liveness.urge(_now()):
            self._ask()

    def measure(self) -> None:
        """Somebody wants to know how long an answer takes now."""
        if self._is_answered:
            self._ask()

    def answered(self, identity: int) -> None:
        """The other end answered that question."""
        if identity == self._asked and not self._is_answered:
            self.rtt, self._is_answered = _now() - self._sent_at, True

    def _look(self) -> None:
        self._timer = self._loop.call_later(TICK, self._look)
        link, now = self._link, _now()
        heard, spoke = link.received != self._received, link.batches != self._batches
        self._received, self._batches = link.received, link.batches
        if self._liveness.look(now, heard=heard, spoke=spoke):
            self._ask()
        self._tell(self._liveness.is_silent(now))
        link.check()
        if self._liveness.is_dead(now):
            link.fail(LinkLostError(f"the other end did not answer for {self._dead:.0f} s"))

    def _ask(self) -> None:
        self._asked += 1
        self._sent_at, self._is_answered = _now(), False
        self._link.send(frame.CONTROL, ping.encode(self._asked))

    def _tell(self, silent: bool) -> None:
        if silent != self.is_silent:
            self.is_silent = silent
            self._bundle.set_silent(self._link, silent)
            self.changed.set()


def _now() -> float:
    """Seconds, those in which the laptop slept included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
