"""One client's session at the manager: its link and what carries its packets, on a place at the exit.

It knows nothing of how the client was authenticated, nor of other sessions. What its client has changed at the exit
costs the process time that is everybody's: only the latest change waits, as long as the one before it makes it.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Protocol

from tpvpn.errors import ProtocolError, TpvpnError
from tpvpn.link import Link
from tpvpn.manager import resolver
from tpvpn.proto import config, message
from tpvpn.pump import Counters
from tpvpn.transport.stream import Stream
from tpvpn.wire import frame
from tpvpn.wire.vnet import Offload

GRACE = 1.0
"""Seconds in which a client is to take its goodbye."""
REST = 9
"""How many times as long as a change took the session rests from changes: they have a tenth of the time at most."""


class Carrier(Protocol):
    """Carries a session's packets between its link and the cluster, from `start()` to `stop()`."""

    @property
    def counters(self) -> Counters: ...
    def start(self) -> None: ...
    def stop(self) -> None: ...


class Place(Protocol):
    """What an exit gives a session: addresses of its own, and what carries the packets from and to them."""

    @property
    def ipv4(self) -> str | None: ...
    @property
    def ipv6(self) -> str | None: ...
    def agree(self, offloads: Offload) -> Offload:
        """Keep to those of the client's offloads that the exit has too; which they are."""
        ...

    def attach(self, link: Link, on_frame: Callable[[int, bytes], None]) -> Carrier:
        """What takes the link over when it is started; `on_frame(kind, payload)` gets all that is not a packet."""
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
    """Runs until its link is lost, its client says goodbye, or this end does."""

    def __init__(self, name: str, visitor: Visitor, place: Place, names: resolver.Counters) -> None:
        self.name, self.visitor, self.place = name, visitor, place
        self._names = names
        self.since, self.began = datetime.now(UTC), time.monotonic()
        self.gone = asyncio.Event()
        """Its addresses are free again."""
        self._link: Link | None = None
        self._carrier: Carrier | None = None
        self._resolver: resolver.Resolver | None = None
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[str] = self._loop.create_future()
        self._change: tuple[int, Sequence[tuple[str, str]]] | None = None
        self._changing: asyncio.TimerHandle | None = None
        self._rested = 0.0

    @property
    def counters(self) -> Counters:
        """What was carried and dropped so far."""
        return self._carrier.counters if self._carrier else Counters()

    async def run(self, stream: Stream, early: bytes) -> str:
        """Carry packets until the session ends; why it ended, in words for the log."""
        link = self._link = Link(stream, self._on_lost, early)
        asking = self._resolver = resolver.Resolver(link, self._names)
        try:
            self._carrier = self.place.attach(link, self._on_frame)
            self._carrier.start()
            return await self._ended
        finally:
            if self._changing:
                self._changing.cancel()
            if self._carrier:
                self._carrier.stop()
            asking.close()
            link.close()

    def say_goodbye(self, reason: str, *, again: bool = False) -> None:
        """Tell the client that the session ends, and end it when the connection has taken that, or does not soon.

        `again`: the client may open it anew, here or at another manager.
        """
        if self._link and self._carrier and self._resolver:
            self._carrier.stop()
            self._resolver.close()
            self._link.send(frame.CONTROL, message.encode("goodbye", reason=reason, again=again))
            if self._link.congested:
                self._link.on_drained = partial(self.end, reason)
                self._loop.call_later(GRACE, self.end, reason)
                return
        self.end(reason)

    def end(self, reason: str) -> None:
        """End it without a word to the client."""
        if not self._ended.done():
            self._ended.set_result(reason)

    def _on_frame(self, kind: int, payload: bytes) -> None:
        if not self._link or not self._resolver:
            return
        if kind == frame.CONTROL:
            self._on_control(payload, self._link)
        elif kind == frame.DNS:
            self._resolver.ask(payload)
        # kinds of a later version are skipped (docs/protocol.md)

    def _on_control(self, payload: bytes, link: Link) -> None:
        what = message.decode(payload)
        if what["type"] == "ping":
            link.send(frame.CONTROL, message.encode("pong", id=message.member(what, "id", int)))
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
        if self._link:
            self._link.send(frame.CONTROL, config.encode_answer(number, error))

    def _on_lost(self, error: TpvpnError) -> None:
        self.end(str(error))
