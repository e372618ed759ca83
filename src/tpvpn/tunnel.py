"""The client's end of a session: shake hands with a manager over a stream, then pump packets and carry questions.

It knows nothing of routes or of the helper: it is given a TUN, and streams, each of which becomes a link. It outlives
its links: what is there to do when one is lost is not its concern (`keeper`).
"""

import asyncio
import itertools
import secrets
from collections.abc import Callable, Sequence
from functools import partial

from tpvpn.bundle import Bundle
from tpvpn.errors import LinkLostError, ManagerError, SessionEndedError, TpvpnError
from tpvpn.heartbeat import Heartbeat
from tpvpn.link import Link
from tpvpn.proto import config, message, ping
from tpvpn.proto.handshake import NONCE_LENGTH, ClientSide
from tpvpn.proto.message import Message
from tpvpn.proto.session import ClientHandshake, Held, Offer, Terms
from tpvpn.pump import Counters, OwnAddress, Pump
from tpvpn.speed import Speed
from tpvpn.transport.stream import Stream
from tpvpn.tun import Device
from tpvpn.wire import frame

HANDSHAKE_TIMEOUT = 10.0
CONFIG_TIMEOUT = 10.0
SPEED_TIMEOUT = 5.0
PARTING = 1.0
"""Seconds in which the manager is to hear our goodbye."""
_CLOSED = "the session was closed"
GOODBYE = frame.encode(frame.CONTROL, message.encode("goodbye", reason="the client quits"))


async def shake_hands(
    stream: Stream, early: bytes, token: bytes, offer: Offer, secret: bytes | None = None
) -> tuple[Held, bytes]:
    """The session that the link belongs to, and the bytes behind the welcome; `secret` is that of the one offered.

    ManagerError when there will be none.
    """
    handshake = ClientHandshake(token, stream.certificate_hash, secrets.token_bytes(NONCE_LENGTH), offer, secret)
    rest = await converse(stream, early, handshake)
    assert handshake.held
    return handshake.held, rest


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


class ClientLink:
    """One link of a tunnel, from its joining until it is lost or another has taken its place."""

    def __init__(self, stream: Stream, early: bytes, bundle: Bundle, number: int) -> None:
        self.lost: asyncio.Future[TpvpnError] = asyncio.get_running_loop().create_future()
        self._bundle = bundle
        self._link = Link(stream, self._on_lost, early)
        self._heartbeat = Heartbeat(self._link, bundle)
        bundle.join(number, self._link)

    @property
    def is_well(self) -> bool:
        """Its other end is there, as far as can be told."""
        return not self.lost.done() and not self._heartbeat.is_silent

    async def trouble(self) -> None:
        """Return when it is lost or silent."""
        while self.is_well:
            self._heartbeat.changed.clear()
            changed = asyncio.ensure_future(self._heartbeat.changed.wait())
            try:
                await asyncio.wait((changed, self.lost), return_when=asyncio.FIRST_COMPLETED)
            finally:
                changed.cancel()

    def urge(self) -> None:
        """Something says that it may be lost: find out soon."""
        self._heartbeat.urge()

    def measure(self) -> float | None:
        """The seconds that an answer took the last time; another one is asked for."""
        self._heartbeat.measure()
        return self._heartbeat.rtt

    def answered(self, link: Link, identity: int) -> None:
        """The other end of a link, which may be another one's, answered a question."""
        if link is self._link:
            self._heartbeat.answered(identity)

    def fail(self, error: TpvpnError) -> None:
        """It is lost."""
        self._link.fail(error)

    def close(self) -> None:
        """Close it, whatever is on its way."""
        self._heartbeat.stop()
        self._link.close()
        self._bundle.drop(self._link)

    def _on_lost(self, error: TpvpnError) -> None:
        self._heartbeat.stop()
        self.lost.set_result(error)
        self._bundle.drop(self._link)


class Tunnel:
    """Carries packets between a TUN and a manager until `close()`, whenever there is a link.

    `on_change()` is called when there is one, or none any more.
    """

    def __init__(
        self,
        tun: Device,
        terms: Terms,
        on_dns: Callable[[int, bytes], None] = lambda _identity, _message: None,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self._on_dns = on_dns
        self._loop = asyncio.get_running_loop()
        self._ended: TpvpnError = LinkLostError("there is no connection yet")
        self._changing = asyncio.Lock()
        self._changes = 0
        self._answer: asyncio.Future[str | None] | None = None
        self._measuring = asyncio.Lock()
        self._speed: Speed | None = None
        self._own_pings = itertools.count(-1, -1)
        """Identities of pings that no link's heartbeat has."""
        self._bundle = Bundle(offload=bool(terms.offloads))
        self._bundle.on_change = on_change
        self._links: list[ClientLink] = []
        self.is_dismissed = False
        """The manager that had the session has it no more, and said so."""
        own = OwnAddress("destination", terms.ipv4, terms.ipv6)
        self._pump = Pump(tun, self._bundle, own, self._on_frame, offload=bool(terms.offloads))
        self._pump.start()

    def join(self, number: int, stream: Stream, early: bytes) -> ClientLink:
        """Have another link, in the place of the one of that number if there is any."""
        link = ClientLink(stream, early, self._bundle, number)
        self._links.append(link)
        link.lost.add_done_callback(lambda lost: self._on_lost(link, lost.result()))
        return link

    def leave_others(self, link: ClientLink) -> None:
        """This link is of a new session: the others are of one that is over, whatever they say still."""
        for other in self._links:
            if other is not link:
                other.fail(LinkLostError("the session has begun anew"))
        self.is_dismissed = False

    def _on_lost(self, link: ClientLink, error: TpvpnError) -> None:
        self._links = [one for one in self._links if one is not link]
        self._stop_measuring(error)
        if not self.is_linked:
            self._settle(error)

    def _settle(self, error: TpvpnError) -> None:
        """Nobody waits for an answer any more."""
        self._ended = error
        self._stop_measuring(error)
        if self._answer and not self._answer.done():
            self._answer.set_exception(error)

    def _stop_measuring(self, error: TpvpnError) -> None:
        if self._speed:
            self._speed.fail(error)

    @property
    def is_linked(self) -> bool:
        """There is a link whose other end is there, as far as can be told."""
        return self._bundle.is_linked

    @property
    def links(self) -> int:
        """How many carry."""
        return sum(link.is_well for link in self._links)

    def measure(self) -> float | None:
        """Seconds to the manager and back, of the fastest link; measured again for the next time."""
        return min((rtt for link in self._links if link.is_well and (rtt := link.measure()) is not None), default=None)

    async def measure_speed(self) -> tuple[float, float]:
        """Bytes a second up and down, at least; takes a second or some more.

        LinkLostError when nothing answers in time; the error of a link that is lost meanwhile; ManagerError when the
        manager cannot.
        """
        async with self._measuring:
            if not self.is_linked:
                raise LinkLostError("the manager is silent now") if self._links else self._ended
            self._speed = speed = Speed(partial(self._bundle.send, frame.CONTROL), self._own_pings)
            try:
                async with asyncio.timeout(SPEED_TIMEOUT):
                    return await speed.up(), await speed.down()
            except TimeoutError:
                why = f"this took longer than {SPEED_TIMEOUT:.0f} s, so the connection is very slow, or silent"
                raise LinkLostError(why) from None
            finally:
                self._speed = None

    @property
    def counters(self) -> Counters:
        """What was carried and dropped so far."""
        return self._pump.counters

    def urge(self) -> None:
        """Something says that links may be lost, as the network of the laptop is another one: find out soon."""
        for link in self._links:
            link.urge()

    async def set_virtual(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Have the manager map each virtual subnet to the cluster's own, in the place of all pairs before.

        ManagerError when it refuses or says nothing; the link's error when the last one is lost meanwhile.
        """
        async with self._changing:
            if not self.is_linked:
                raise self._ended
            self._changes += 1
            self._answer = self._loop.create_future()
            self._bundle.send(frame.CONTROL, config.encode_change(self._changes, pairs))
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
        self._bundle.send(frame.DNS, identity.to_bytes(2) + message)

    async def leave(self) -> None:
        """Say goodbye, wait until the manager has heard it, which ends all links, or seems not to, and `close()`.

        A goodbye may wait behind packets; and to close a socket that has something to read resets the connection
        (RFC 2525 section 2.17), by which the other end may lose it.
        """
        self._pump.stop()
        self._bundle.on_change = lambda: None
        self._stop_measuring(LinkLostError(_CLOSED))  # nothing follows a goodbye
        try:
            self._bundle.send(frame.CONTROL, GOODBYE[frame.HEADER_LENGTH :])
            if self.is_linked:
                await asyncio.wait([link.lost for link in self._links], timeout=PARTING)
        finally:
            self.close()

    def close(self) -> None:
        """Close all links at once."""
        self._settle(LinkLostError(_CLOSED))
        self._pump.stop()
        self._bundle.on_change = lambda: None
        for link in self._links:
            link.close()

    def _on_frame(self, kind: int, payload: bytes) -> None:
        if kind == frame.DNS:
            self._on_dns(int.from_bytes(payload[:2]), payload[2:])
        if kind != frame.CONTROL:
            return  # kinds of a later version are skipped (docs/reference/wire.md)
        what, link = message.decode(payload), self._bundle.speaking
        if what["type"] == "ping":
            link.send(frame.CONTROL, ping.answer(what, 0))
        elif what["type"] == "pong":
            self._on_pong(link, what)
        elif what["type"] == "config" and self._answer and what.get("id") == self._changes:
            if not self._answer.done():
                self._answer.set_result(message.optional(what, "error", str))
        elif what["type"] in ("goodbye", "error"):
            reason = what.get("reason") or what.get("message")
            self.is_dismissed = what.get("again") is True
            lost = LinkLostError if self.is_dismissed else SessionEndedError
            link.fail(lost(f"the manager ended the session: {message.printable(str(reason), 300)}"))

    def _on_pong(self, link: Link, pong: Message) -> None:
        identity = message.member(pong, "id", int)
        if self._speed:
            self._speed.answered(identity, len(message.optional(pong, "padding", str) or ""))
        for one in self._links:
            one.answered(link, identity)
