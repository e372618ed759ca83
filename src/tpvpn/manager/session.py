"""One client's session at the manager: its link and its pump, on a place at the exit.

It knows nothing of how the client was authenticated, nor of other sessions.
"""

import asyncio
from functools import partial
from typing import Protocol

from tpvpn.errors import ProtocolError, TpvpnError
from tpvpn.link import Link
from tpvpn.proto import message
from tpvpn.pump import Counters, OwnAddress, Pump
from tpvpn.transport.stream import Stream
from tpvpn.tun import Tun
from tpvpn.wire import frame


class Place(Protocol):
    """What an exit gives a session: a TUN of its own, and the addresses that lead to it."""

    @property
    def tun(self) -> Tun: ...
    @property
    def ipv4(self) -> str | None: ...
    @property
    def ipv6(self) -> str | None: ...
    def close(self) -> None:
        """Give device and addresses back."""
        ...


class Session:
    """Runs until its link is lost, its client says goodbye, or this end does."""

    def __init__(self, name: str, user: str, place: Place, *, offload: bool) -> None:
        self.name, self.user, self.place = name, user, place
        self.counters = Counters()
        self._offload = offload
        self._link: Link | None = None
        self._pump: Pump | None = None
        self._ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def run(self, stream: Stream, early: bytes) -> str:
        """Carry packets until the session ends; why it ended, in words for the log."""
        link = self._link = Link(stream, self._on_lost, early)
        own = OwnAddress("source", self.place.ipv4, self.place.ipv6)
        pump = self._pump = Pump(self.place.tun, link, own, self._on_frame, offload=self._offload)
        self.counters = pump.counters
        pump.start()
        try:
            return await self._ended
        finally:
            pump.stop()
            link.close()

    def say_goodbye(self, reason: str) -> None:
        """Tell the client that the session ends, and end it as soon as the connection has taken that."""
        if self._link and self._pump:
            self._pump.stop()
            self._link.send(frame.CONTROL, message.encode("goodbye", reason=reason))
            if self._link.congested:
                self._link.on_drained = partial(self._end, reason)
                return
        self._end(reason)

    def _on_frame(self, kind: int, payload: bytes) -> None:
        if kind != frame.CONTROL or not self._link:
            return  # kinds of a later version are skipped (docs/protocol.md)
        what = message.decode(payload)
        if what["type"] == "ping":
            self._link.send(frame.CONTROL, message.encode("pong", id=message.member(what, "id", int)))
        elif what["type"] == "goodbye":
            self._end("the client said goodbye")
        elif what["type"] == "hello":
            raise ProtocolError("a second hello in a session")

    def _on_lost(self, error: TpvpnError) -> None:
        self._end(str(error))

    def _end(self, reason: str) -> None:
        if not self._ended.done():
            self._ended.set_result(reason)
