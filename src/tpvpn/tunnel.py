"""The client's end of a session: shake hands with a manager over a stream, then pump packets and carry questions.

It knows nothing of routes or of the helper: it is given a stream and, later, a TUN.
"""

import asyncio
import secrets
from collections.abc import Callable, Sequence

from tpvpn.errors import LinkLostError, ManagerError, SessionEndedError, TpvpnError
from tpvpn.link import Link
from tpvpn.proto import config, message
from tpvpn.proto.handshake import NONCE_LENGTH, ClientSide
from tpvpn.proto.session import ClientHandshake, Offer, Terms
from tpvpn.pump import Counters, OwnAddress, Pump
from tpvpn.transport.stream import Stream
from tpvpn.transport.tcp import DEAD_AFTER
from tpvpn.tun import Tun
from tpvpn.wire import frame

HANDSHAKE_TIMEOUT = 10.0
CONFIG_TIMEOUT = 10.0
HEARTBEAT = 5.0
"""Seconds between two pings to the manager; they cost some 15 bytes a second."""


async def shake_hands(stream: Stream, early: bytes, token: bytes, offer: Offer) -> tuple[Terms, bytes]:
    """The manager's terms, and the bytes behind its welcome. ManagerError when there will be no session."""
    handshake = ClientHandshake(token, stream.certificate_hash, secrets.token_bytes(NONCE_LENGTH), offer)
    rest = await converse(stream, early, handshake)
    assert handshake.terms
    return handshake.terms, rest


async def converse(stream: Stream, early: bytes, handshake: ClientSide) -> bytes:
    """Go through a handshake; the bytes behind the manager's answer. ManagerError when there is none."""
    decoder = frame.Decoder(frame.MAX_PAYLOAD)
    decoder.receive(early)
    try:
        async with asyncio.timeout(HANDSHAKE_TIMEOUT):
            while True:
                for kind, payload in decoder.frames():
                    if kind != frame.CONTROL:
                        continue
                    if request := handshake.receive(payload):
                        await stream.send_all(frame.encode(frame.CONTROL, request))
                    if handshake.done:
                        return decoder.remainder()
                data = await stream.receive(frame.MAX_PAYLOAD_BEFORE_WELCOME)
                if not data:
                    raise ManagerError("the manager closed the connection in the middle of the handshake: see its log")
                decoder.receive(data)
    except TimeoutError as error:
        raise ManagerError(f"the manager said no welcome within {HANDSHAKE_TIMEOUT:.0f} s: see its log") from error
    except OSError as error:
        raise ManagerError(f"the connection broke in the middle of the handshake: {error.strerror or error}") from error


class Tunnel:
    """Carries packets between a TUN and a manager until `close()`; `on_end(error)` is called when the link is lost."""

    def __init__(
        self,
        stream: Stream,
        early: bytes,
        tun: Tun,
        terms: Terms,
        on_end: Callable[[TpvpnError], None],
        on_dns: Callable[[int, bytes], None] = lambda _identity, _message: None,
    ) -> None:
        self._on_end = on_end
        self._on_dns = on_dns
        self._loop = asyncio.get_running_loop()
        self._beats = self._beats_answered = 0
        self._heard: int = 0
        self._ended: TpvpnError | None = None
        self._changing = asyncio.Lock()
        self._changes = 0
        self._answer: asyncio.Future[str | None] | None = None
        self._link = Link(stream, self._end, early)
        own = OwnAddress("destination", terms.ipv4, terms.ipv6)
        self._pump = Pump(tun, self._link, own, self._on_frame, offload=bool(terms.offloads))
        self._pump.start()
        self._proved = self._loop.time()
        self._due = self._proved + HEARTBEAT
        self._beating = self._loop.call_at(self._due, self._beat)

    @property
    def counters(self) -> Counters:
        """What was carried and dropped so far."""
        return self._pump.counters

    async def set_virtual(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Have the manager map each virtual subnet to the cluster's own, in the place of all pairs before.

        ManagerError when it refuses or says nothing; the link's error when that ends meanwhile.
        """
        async with self._changing:
            if self._ended:
                raise self._ended
            self._changes += 1
            self._answer = self._loop.create_future()
            self._link.send(frame.CONTROL, config.encode_change(self._changes, pairs))
            try:
                async with asyncio.timeout(CONFIG_TIMEOUT):
                    refused = await self._answer
            except TimeoutError as error:
                raise ManagerError(
                    f"the manager did not confirm the virtual subnets within {CONFIG_TIMEOUT:.0f} s: "
                    "upgrade it, an older one does not know them"
                ) from error
            finally:
                self._answer = None
        if refused is not None:
            raise ManagerError(f"the manager refuses the virtual subnets: {message.printable(refused, 300)}")

    def ask(self, identity: int, message: bytes) -> None:
        """Have the manager ask its own resolver; what that says comes to `on_dns` with the same identity, if at all."""
        if not self._ended:
            self._link.send(frame.DNS, identity.to_bytes(2) + message)

    def close(self) -> None:
        """Say goodbye and close the link."""
        self._settle(LinkLostError("the session was closed"))
        self._pump.stop()
        self._link.send(frame.CONTROL, message.encode("goodbye", reason="the client quits"))
        self._link.close()

    def _beat(self) -> None:
        """Ask for a sign of life, which also keeps whoever is in between from ending an idle connection."""
        now, heard = self._loop.time(), self._beats_answered + self._pump.counters.received_packets
        if heard != self._heard or now > self._due + HEARTBEAT:  # this process, or the whole laptop, had slept
            self._heard, self._proved = heard, now
        if now - self._proved >= DEAD_AFTER:
            self._end(LinkLostError(f"the manager did not answer for {DEAD_AFTER} s"))
            return
        self._due = now + HEARTBEAT
        self._beating = self._loop.call_at(self._due, self._beat)
        self._beats += 1
        self._link.send(frame.CONTROL, message.encode("ping", id=self._beats))

    def _on_frame(self, kind: int, payload: bytes) -> None:
        if kind == frame.DNS:
            self._on_dns(int.from_bytes(payload[:2]), payload[2:])
        if kind != frame.CONTROL:
            return  # kinds of a later version are skipped (docs/protocol.md)
        what = message.decode(payload)
        if what["type"] == "ping":
            self._link.send(frame.CONTROL, message.encode("pong", id=message.member(what, "id", int)))
        elif what["type"] == "pong":
            self._beats_answered += 1
        elif what["type"] == "config" and self._answer and what.get("id") == self._changes:
            if not self._answer.done():
                self._answer.set_result(message.optional(what, "error", str))
        elif what["type"] in ("goodbye", "error"):
            reason = what.get("reason") or what.get("message")
            lost = LinkLostError if what.get("again") is True else SessionEndedError
            self._end(lost(f"the manager ended the session: {message.printable(str(reason), 300)}"))

    def _end(self, error: TpvpnError) -> None:
        self._settle(error)
        self._on_end(error)

    def _settle(self, error: TpvpnError) -> None:
        """The session is over: nobody waits for an answer any more."""
        self._ended = error
        self._beating.cancel()
        if self._answer and not self._answer.done():
            self._answer.set_exception(error)
