"""The manager's one port: health, metrics and sessions.

Theory of operation. Each connection is a task. Until its client has proved that it knows a token it is a stranger: it
has PATIENCE seconds in all and a few kilobytes, and when there are too many strangers the oldest one is dropped, so
that garbage costs bounded time and memory and keeps nobody out. Then a `Session` takes the stream over.

With a certificate no session is plain: TLS is there from the first byte on, or begins behind the upgrade, where a proxy
(the API server's) is to see HTTP. Health and metrics are served either way: probes know no certificate.
"""

import asyncio
import contextlib
import logging
import os
import secrets
import socket
import ssl
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

from tpvpn.errors import ManagerError, ProtocolError, TpvpnError
from tpvpn.manager import audit, http, metrics, register
from tpvpn.manager.session import Place, Session, Visitor
from tpvpn.proto import message
from tpvpn.proto.handshake import NONCE_LENGTH
from tpvpn.proto.session import ManagerHandshake, Offer, RefusedError, Terms
from tpvpn.proto.sessions import Question
from tpvpn.transport.inner_tls import FIRST_BYTE, InnerTlsStream
from tpvpn.transport.stream import NO_CERTIFICATE, Stream
from tpvpn.transport.tcp import authority, fit_to_path, tune
from tpvpn.transport.upgrade import ENCRYPTED, MAX_HEAD, PATH, PROTOCOL
from tpvpn.wire import frame, vnet
from tpvpn.wire.vnet import Offload

log = logging.getLogger("tpvpn.manager")

PATIENCE = 5.0
"""Seconds a stranger has to become a session."""
MAX_STRANGERS = 64
MAX_SESSIONS = 250
LINGER = 600.0
"""Seconds for which a session outlives its last link."""
_WANTED = {
    (PROTOCOL, ENCRYPTED): "it takes encrypted sessions alone: use tls:// and the pin of its certificate",
    (ENCRYPTED, PROTOCOL): "it has no certificate to encrypt with: start it with --tls-cert and --tls-key",
}
"""What a client is told that asks for the one where the other is spoken."""


class Exit(Protocol):
    """How packets leave: the kernel's forwarding, or sockets."""

    @property
    def kinds(self) -> dict[int, str | None]:
        """For each IP version the name on the wire of how it leaves; None: it is not carried."""
        ...

    @property
    def mtu(self) -> int: ...
    def add_session(self, wanted4: str | None, wanted6: str | None, *, offload: bool) -> Place: ...
    def facts(self) -> dict[str, object]:
        """What a client should know of how packets leave."""
        ...

    def dropped(self) -> dict[str, int]:
        """Packets dropped so far, by reason."""
        ...

    def load(self) -> metrics.Load | None:
        """What sockets have open; None where there are none."""
        ...


class Server:
    """Serves until cancelled; `tokens()` gives the tokens as they are now."""

    def __init__(
        self,
        exit: Exit,
        tokens: Callable[[], Mapping[str, bytes]],
        tls: tuple[ssl.SSLContext, bytes] | None = None,
        linger: float = LINGER,
    ) -> None:
        self.exit, self._tokens, self._tls, self._linger = exit, tokens, tls, linger
        self.sessions: dict[str, Session] = {}
        self.counted = metrics.Counted()
        self._strangers: dict[asyncio.Task[None], None] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self, listening: socket.socket) -> None:
        """Accept for ever; out of descriptors is waited out, not fatal."""
        loop = asyncio.get_running_loop()
        looking = loop.create_task(metrics.look_at_lag(self.counted.lag))
        try:
            await self._accept_all(listening)
        finally:
            looking.cancel()

    async def _accept_all(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        listening.setblocking(False)
        failing = False
        while True:
            try:
                connected, peer = await loop.sock_accept(listening)
            except OSError as error:
                if not failing:
                    log.warning("cannot accept connections, they wait: %s", error.strerror)
                failing = True
                await asyncio.sleep(0.1)
                continue
            failing = False
            task = loop.create_task(self._serve(connected, _shown(peer)))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Say goodbye to every client and end every connection."""
        for session in list(self.sessions.values()):
            session.say_goodbye("the manager shuts down", again=True)
        for task in self._strangers:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=1)

    async def _serve(self, connected: socket.socket, peer: str) -> None:
        """One connection from accept to close; a stranger's error ends that connection alone."""
        stream = Stream(connected)
        self._enter()
        try:
            async with asyncio.timeout(PATIENCE):
                tune(connected)
                fit_to_path(connected)
                accepted = await self._accept(stream, peer)
            self._leave()
            if accepted:
                await self._carry(*accepted)
        except RefusedError as error:
            self.counted.refused["token"] += 1
            audit.refused(peer, str(error))
        except (TpvpnError, OSError, TimeoutError) as error:
            self.counted.refused[_reason(error)] += 1
            log.warning("%s: %s", peer, str(error) or f"not a session within {PATIENCE:.0f} s")
        finally:
            self._leave()
            stream.close()
            connected.close()

    async def _carry(self, session: Session, number: int, stream: Stream, early: bytes) -> None:
        reason = await session.carry(stream, early, number)
        if session.name in self.sessions:
            audit.lost_link(session, number, reason)

    def _over(self, session: Session, reason: str) -> None:
        audit.ended(session, reason)
        self._forget(session)

    def _forget(self, session: Session) -> None:
        del self.sessions[session.name]
        self.counted.finish(session.counters)
        session.place.close()

    def _enter(self) -> None:
        """Count the running task as a stranger, and drop the oldest when they are too many."""
        task = asyncio.current_task()
        assert task
        self._strangers[task] = None
        if len(self._strangers) > MAX_STRANGERS:
            oldest = next(iter(self._strangers))
            del self._strangers[oldest]
            self.counted.refused["crowded"] += 1
            oldest.cancel()

    def _leave(self) -> None:
        task = asyncio.current_task()
        if task:
            self._strangers.pop(task, None)

    async def _accept(self, stream: Stream, peer: str) -> tuple[Session, int, Stream, bytes] | None:
        """Read the request; a session, the number of the link, its stream and the bytes behind its hello.

        None when it was answered.
        """
        protocol = PROTOCOL
        if self._tls:
            if await _first_byte(stream) == FIRST_BYTE:
                stream = await _secure(stream, b"", *self._tls)
            else:
                protocol = ENCRYPTED
        request = await self._request(stream)
        if request is None:
            return None
        if (request.method, request.path, request.upgrade) != ("GET", PATH, protocol):
            await stream.send_all(self._answer(request, protocol))
            return None
        await stream.send_all(http.switch(protocol))
        if self._tls and protocol == ENCRYPTED:
            return await self._shake_hands(await _secure(stream, request.rest, *self._tls), b"", peer)
        return await self._shake_hands(stream, request.rest, peer)

    async def _request(self, stream: Stream) -> http.Request | None:
        """The request's head; None when the client leaves before it is whole."""
        data = b""
        try:
            while (request := http.parse(data)) is None:
                more = await stream.receive(MAX_HEAD)
                if not more:
                    return None
                data += more
        except ProtocolError:
            await stream.send_all(http.response(400, "this is no HTTP/1 request\n"))
            raise
        return request

    def _answer(self, request: http.Request, protocol: str) -> bytes:
        status, text, *fields = self._content(request, protocol)
        return http.response(status, text, *fields, head=request.method == "HEAD")

    def _content(self, request: http.Request, protocol: str) -> tuple[int, str] | tuple[int, str, str]:
        """Status, text, and what RFC 9110 wants to stand beside the status (sections 15.5.6 and 15.5.22)."""
        if request.method not in ("GET", "HEAD"):
            return 405, "only GET is served here\n", "Allow: GET, HEAD"
        if request.path == "/healthz":
            return 200, "ok\n"
        if request.path == "/metrics":
            return 200, self._metrics()
        if request.path == PATH:
            wanted = _WANTED.get((request.upgrade, protocol), f"ask for an upgrade to {protocol}")
            return 426, f"{wanted}\n", f"Upgrade: {protocol}"
        return 404, "nothing here\n"

    def _metrics(self) -> str:
        exit, sessions = self.exit, self.sessions.values()
        return metrics.render(self.counted, sessions, exit.kinds, exit.dropped(), exit.load(), MAX_SESSIONS)

    async def _shake_hands(self, stream: Stream, early: bytes, peer: str) -> tuple[Session, int, Stream, bytes] | None:
        """A session for a hello; None when the client asked about sessions, and was answered."""
        handshake = ManagerHandshake(self._tokens(), stream.certificate_hash, secrets.token_bytes(NONCE_LENGTH))
        await stream.send_all(frame.encode(frame.CONTROL, handshake.greeting))
        decoder = frame.Decoder(frame.MAX_PAYLOAD_BEFORE_WELCOME)
        decoder.receive(early)
        try:
            asked = handshake.receive(await _control_frame(stream, decoder))
            if isinstance(asked, Question):
                answer = register.answer(handshake.user, asked, self.sessions, self.exit.kinds)
                await stream.send_all(frame.encode(frame.CONTROL, handshake.sessions(answer)))
                return None
            visitor = _visitor(handshake, asked, stream, peer)
            held = self._held(handshake, asked)
            session = held or self._open(visitor, asked)
        except RefusedError:
            await self._send_error(stream, "the token is not one of this manager's: check --token-file")
            raise
        except TpvpnError as error:
            await self._send_error(stream, str(error))
            raise
        welcome = handshake.welcome(session.terms)
        if held:
            session.visitor = visitor
            self.counted.resumed += session.links == 0
            audit.resumed(session, asked.link)
        else:
            session.secret = handshake.secret
            self.counted.sessions += 1
            audit.opened(session)
        try:
            await stream.send_all(frame.encode(frame.CONTROL, welcome))
        except BaseException:
            if not held:
                session.end("its client left in the middle of the handshake")
            raise
        self.counted.links += 1
        return session, asked.link, stream, decoder.remainder()

    async def _send_error(self, stream: Stream, text: str) -> None:
        with contextlib.suppress(OSError):
            await stream.send_all(frame.encode(frame.CONTROL, message.encode("error", message=text)))

    def _held(self, handshake: ManagerHandshake, offer: Offer) -> Session | None:
        """The session that this client has and takes up again."""
        session = self.sessions.get(offer.session or "")
        if session and session.visitor.user == handshake.user and handshake.resumes(offer, session.secret):
            return session
        return None

    def _open(self, visitor: Visitor, offer: Offer) -> Session:
        """A session at the exit, with the offloads that both ends have; it lingers until its first link is there."""
        self._make_room()
        place = self.exit.add_session(offer.ipv4, offer.ipv6, offload=bool(offer.offloads))
        try:
            offloads = place.agree(vnet.from_names(offer.offloads))
            name, names, linger = secrets.token_hex(8), self.counted.names, self._linger
            session = Session(name, visitor, place, names, linger, self._over, offload=bool(offer.offloads))
        except OSError:
            place.close()
            raise
        session.terms = self._terms(session, offloads)
        self.sessions[session.name] = session
        return session

    def _make_room(self) -> None:
        """When there are too many sessions, the one goes that has had no link for the longest time."""
        if len(self.sessions) < MAX_SESSIONS:
            return
        lingering = [one for one in self.sessions.values() if one.lingers_since is not None]
        if not lingering:
            raise ManagerError(f"this manager is full: it has {MAX_SESSIONS} sessions")
        min(lingering, key=lambda one: one.lingers_since or 0.0).end("its room was needed")

    def _terms(self, session: Session, offloads: Offload) -> Terms:
        place = session.place
        return Terms(
            session=session.name,
            ipv4=place.ipv4,
            ipv6=place.ipv6,
            mtu=self.exit.mtu,
            offloads=vnet.names(offloads),
            exit={f"ipv{version}": kind for version, kind in self.exit.kinds.items()},
            pod=socket.gethostname(),
            facts=_facts() | self.exit.facts(),
            linger=int(self._linger),
        )


def _reason(error: Exception) -> str:
    """Why a connection became no link, as one of `metrics.REFUSALS`."""
    if isinstance(error, TimeoutError):
        return "timeout"
    if isinstance(error, OSError):
        return "connection"
    return "protocol" if isinstance(error, ProtocolError) else "capacity"


def _visitor(handshake: ManagerHandshake, offer: Offer, stream: Stream, peer: str) -> Visitor:
    security = "plain" if stream.certificate_hash == NO_CERTIFICATE else "tls"
    return Visitor(handshake.user, offer.name, peer, security, handshake.version)


async def _first_byte(stream: Stream) -> int:
    """The first byte of a connection, which stays there; -1 when the client leaves before it."""
    while True:
        try:
            first = stream.socket.recv(1, socket.MSG_PEEK)
            return first[0] if first else -1
        except BlockingIOError:
            await stream.readable()


async def _secure(stream: Stream, early: bytes, context: ssl.SSLContext, certificate: bytes) -> Stream:
    secured = InnerTlsStream(stream, context, early, certificate)
    await secured.handshake()
    return secured


def _shown(peer: tuple[str, int]) -> str:
    # IPv4 on a socket of both families (RFC 4291 section 2.5.5.2)
    return authority(peer[0].removeprefix("::ffff:"), peer[1])


def _facts() -> dict[str, object]:
    """What a client may want to know of the pod: its resolvers, its own addresses, the API server's service."""
    facts: dict[str, object] = {"addresses": list(_own_addresses())}
    with contextlib.suppress(OSError):
        facts["resolv_conf"] = Path("/etc/resolv.conf").read_text()[:2048]
    if service := os.environ.get("KUBERNETES_SERVICE_HOST"):
        facts["api_service"] = service
    return facts


def _own_addresses() -> Iterator[str]:
    """The source address of each family by the way out; connecting a datagram socket sends nothing."""
    for family, far in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as looking:
            looking.connect((far, 9))
            yield looking.getsockname()[0]


async def _control_frame(stream: Stream, decoder: frame.Decoder) -> bytes:
    """The next control frame; ProtocolError when another kind or the end comes first."""
    while True:
        for kind, payload in decoder.frames():
            if kind == frame.CONTROL:
                return payload
            if kind == frame.PACKET:
                raise ProtocolError("the client sent packets before it was welcome")
        data = await stream.receive(frame.MAX_PAYLOAD_BEFORE_WELCOME)
        if not data:
            raise ProtocolError("the client left in the middle of the handshake")
        decoder.receive(data)
