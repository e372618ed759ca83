"""One client's session at the manager: its links and what carries its packets, on a place at the exit.

It outlives its links, so that what the client's programs have open does. It knows nothing of how the client was
authenticated, nor of other sessions. What its client has changed at the exit
costs the process time that is everybody's: only the latest change waits, as long as the one before it makes it.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Protocol

from tpvpn.bundle import Bundle
from tpvpn.errors import LinkLostError, ProtocolError, TpvpnError
from tpvpn.heartbeat import Heartbeat
from tpvpn.link import Link
from tpvpn.manager import resolver
from tpvpn.proto import config, message, ping
from tpvpn.proto.session import Terms
from tpvpn.pump import Counters
from tpvpn.transport.stream import Stream
from tpvpn.wire import frame
from tpvpn.wire.vnet import Offload

GRACE = 1.0
"""Seconds in which a client is to take its goodbye."""
IDLE, DEAD = 20.0, 45.0
"""Seconds: it is the client who asks first whether this end lives (proto/liveness)."""
MAX_PADDED = ping.MAX_IN_FLIGHT * ping.MAX_PADDING
"""Bytes that wait for a client: behind more than whoever measures lets wait, answers to pings have no padding."""
REST = 9
"""How many times as long as a change took the session rests from changes: they have a tenth of the time at most."""


class Carrier(Protocol):
    """Carries a session's packets between its links and the cluster, from `start()` to `stop()`."""

    @property
    def counters(self) -> Counters: ...
    def start(self) -> None: ...
    def stop(self) -> None:
        """Harmless when it is stopped."""
        ...

    def link_again(self) -> None:
        """There was no link for a while: what may be lost of what was sent goes again."""
        ...


class Place(Protocol):
    """What an exit gives a session: addresses of its own, and what carries the packets from and to them."""

    @property
    def ipv4(self) -> str | None: ...
    @property
    def ipv6(self) -> str | None: ...
    def agree(self, offloads: Offload) -> Offload:
        """Keep to those of the client's offloads that the exit has too; which they are."""
        ...

    def attach(self, bundle: Bundle, on_frame: Callable[[int, bytes], None]) -> Carrier:
        """What takes the links over when it is started; `on_frame(kind, payload)` gets all that is not a packet."""
        ...

    def set_virtual(self, pairs: Sequence[config.Pair]) -> None:
        """Map these virtual subnets and no others, for new flows; a TpvpnError says why nothing changed."""
        ...

    def close(self) -> None:
        """Give the addresses back, with all that leads to them."""
        ...


@dataclass(frozen=True, slots=True)
class Visitor:
    """Whose a session is, and how it came."""

    user: str
    """The name of its token."""
    name: str
    """What the client calls itself."""
    peer: str
    security: str
    """"tls", or "plain"."""
    version: int


class Session:
    """Runs until its client says goodbye, this end does, or it had no link for `linger` seconds.

    `on_over(session, reason)` is called once, when all its links are closed.
    """

    def __init__(
        self,
        name: str,
        visitor: Visitor,
        place: Place,
        names: resolver.Counters,
        linger: float,
        on_over: "Callable[[Session, str], None]",
        *,
        offload: bool,
    ) -> None:
        self.name, self.visitor, self.place = name, visitor, place
        self.terms: Terms
        """What its client was granted, and each link of it is told."""
        self.secret = b""
        self.since, self.began = datetime.now(UTC), time.monotonic()
        self._linger, self._on_over = linger, on_over
        self._loop = asyncio.get_running_loop()
        self._bundle = Bundle(offload=offload)
        self._links = dict[Link, Heartbeat]()
        self._resolver = resolver.Resolver(self._bundle, names)
        self._carrier = place.attach(self._bundle, self._on_frame)
        self._carrier.start()
        self._reason: str | None = None
        self._leaving: asyncio.TimerHandle | None = None
        self.lingers_since: float | None = None
        """When its last link was lost, by the loop's clock."""
        self._change: tuple[int, Sequence[tuple[str, str]]] | None = None
        self._changing: asyncio.TimerHandle | None = None
        self._rested = 0.0

    @property
    def counters(self) -> Counters:
        """What was carried and dropped so far."""
        return self._carrier.counters

    @property
    def links(self) -> int:
        """How many it has; none while it lingers."""
        return len(self._links)

    async def carry(self, stream: Stream, early: bytes, number: int) -> str:
        """Have another link, until it is lost or the session is over; why, in words for the log."""
        ended: asyncio.Future[str] = self._loop.create_future()

        def end(error: TpvpnError) -> None:
            if not ended.done():
                ended.set_result(str(error))

        if self._reason is not None:
            return self._reason
        if self._leaving:
            self._leaving.cancel()
        self.lingers_since = None
        was_linked, link = self._bundle.is_linked, Link(stream, end, early)
        self._links[link] = Heartbeat(link, self._bundle, IDLE, DEAD)
        self._bundle.join(number, link)
        if not was_linked:
            self._carrier.link_again()
        why = "the manager shuts down"
        try:
            why = await ended
            return why
        finally:
            self._links.pop(link).stop()
            link.close()
            self._bundle.drop(link)
            self._wait_for_another(why)

    def _wait_for_another(self, why: str) -> None:
        if self._links:
            return
        if self._reason is not None:
            self._finish()
        elif not self._linger:
            self.end(why)
        else:
            self.lingers_since = self._loop.time()
            self._leaving = self._loop.call_later(self._linger, self.end, f"no link for {self._linger:g} s")

    def say_goodbye(self, reason: str, *, again: bool = False) -> None:
        """Tell the client that the session ends, and end it when the connection has taken that, or does not soon.

        `again`: the client may open it anew, here or at another manager.
        """
        self._carrier.stop()
        self._resolver.close()
        for link in self._bundle.links:
            link.send(frame.CONTROL, message.encode("goodbye", reason=reason, again=again))
        if any(link.congested for link in self._links):
            self._bundle.on_drained = partial(self.end, reason)
            self._loop.call_later(GRACE, self.end, reason)
        else:
            self.end(reason)

    def end(self, reason: str) -> None:
        """End it without a word to the client."""
        if self._reason is not None:
            return
        self._reason = reason
        for link in list(self._links):
            link.fail(LinkLostError(reason))
        if not self._links:
            self._finish()

    def _finish(self) -> None:
        for timer in (self._leaving, self._changing):
            if timer:
                timer.cancel()
        self._carrier.stop()
        self._resolver.close()
        assert self._reason is not None
        self._on_over(self, self._reason)

    def _on_frame(self, kind: int, payload: bytes) -> None:
        if kind == frame.CONTROL:
            self._on_control(payload, self._bundle.speaking)
        elif kind == frame.DNS:
            self._resolver.ask(payload)
        # kinds of a later version are skipped (docs/reference/wire.md)

    def _on_control(self, payload: bytes, link: Link) -> None:
        what = message.decode(payload)
        if what["type"] == "ping":
            link.send(frame.CONTROL, ping.answer(what, 0 if link.queued > MAX_PADDED else ping.MAX_PADDING))
        elif what["type"] == "config":
            self._take_change(*config.change(what))
        elif what["type"] == "goodbye":
            self.end("the client said goodbye")
        elif what["type"] == "hello":
            raise ProtocolError("a second hello in a session")

    def _take_change(self, number: int, pairs: Sequence[tuple[str, str]]) -> None:
        if self._change:
            self._answer(self._change[0], "a later change took its place")
        else:
            self._changing = self._loop.call_later(max(0, self._rested - time.monotonic()), self._make_change)
        self._change = number, pairs

    def _make_change(self) -> None:
        assert self._change
        (number, pairs), self._change = self._change, None
        began = time.monotonic()  # uvloop's own time stands still within a callback
        try:
            self.place.set_virtual(config.mapping(pairs))
        except TpvpnError as error:
            self._answer(number, str(error))
        else:
            self._answer(number, None)
        now = time.monotonic()
        self._rested = now + REST * (now - began)

    def _answer(self, number: int, error: str | None) -> None:
        self._bundle.send(frame.CONTROL, config.encode_answer(number, error))
