"""The stub resolver on the device's own addresses: questions from programs of this host, over UDP and TCP.

What is the cluster's goes through the exchange and is cached; all else goes to the servers that this host had before,
byte by byte. Which is which is said by `decide`; the server knows no policy. The same question is asked once at a time,
whoever asks it meanwhile: each gets the answer with an id and letters of its own.

A cluster on this very host may ask this host's resolver for what it does not know, and that is us. `probe` asks the
cluster for a name that only we can answer: when that question comes to us, what we ask of the cluster comes back too,
and such a question is answered NXDOMAIN instead of waiting for itself.
"""

import asyncio
import contextlib
import logging
import secrets
import socket
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from tpvpn.dns import answers
from tpvpn.dns.answers import Query, RefusedError
from tpvpn.dns.cache import Cache
from tpvpn.dns.exchange import Exchange
from tpvpn.dns.policy import DOMAIN, Decision
from tpvpn.dns.tcp import Respond, TcpServer
from tpvpn.dns.upstream import Upstream
from tpvpn.route.prefix import Prefix
from tpvpn.wire import dns
from tpvpn.wire.dns import MalformedError, Rcode

_log = logging.getLogger(__name__)

ASKERS = 4_000
"""Those who wait for an answer at a time; more are answered SERVFAIL at once."""
LOOP = "tpvpn-loop"
"""The label under which no name is but those by which we look for a loop."""
_AT_ONCE = 32
"""Datagrams taken from a socket before others have their turn."""
_LONGEST_QUERY = 4_096
"""Bytes of a datagram; a question with all that may be behind it is shorter."""


@dataclass(slots=True)
class Counters:
    """What became of questions."""

    cluster: int = 0
    elsewhere: int = 0
    nowhere: int = 0
    address: int = 0
    cached: int = 0
    joined: int = 0
    """Those that were on the way already."""
    looped: int = 0
    refused: int = 0
    failed: int = 0
    dropped: int = 0


@dataclass(frozen=True, slots=True)
class _Asker:
    """Who waits: the question, and where its answer goes."""

    query: Query
    respond: Respond


class Server:
    """Answers what comes to `sockets` (UDP sockets and TCP listeners, bound) until `close()`."""

    def __init__(
        self,
        sockets: Sequence[socket.socket],
        exchange: Exchange,
        upstream: Upstream,
        decide: Callable[[str, int], Decision],
    ) -> None:
        self.virtual: tuple[tuple[Prefix, Prefix], ...] = ()
        self.domain = DOMAIN
        self.looping = False
        self.counters = Counters()
        self._exchange, self._upstream, self._decide = exchange, upstream, decide
        self._loop = asyncio.get_running_loop()
        self._cache = Cache()
        self._flights: dict[Hashable, list[_Asker]] = {}
        self._askers = 0
        self._probing, self._came_back = "", False
        for one in sockets:
            one.setblocking(False)
        self._datagrams = [one for one in sockets if one.type == socket.SOCK_DGRAM]
        for one in self._datagrams:
            self._loop.add_reader(one, self._on_readable, one)
        self._tcp = TcpServer([one for one in sockets if one.type == socket.SOCK_STREAM], partial(self._take, tcp=True))

    def changed(self) -> None:
        """Policy, addresses or link are others: what was answered before may be wrong now."""
        self._cache.clear()
        self._flights = {}  # who waits is answered, but nobody joins any more, and nothing of it is cached

    async def resolve(self, name: str, kind: int) -> tuple[Decision, bytes | None]:
        """What is decided of a question, and the answer to who asks it; MalformedError when it is no name."""
        message = dns.query(dns.labels(name), kind, 0)
        answer: asyncio.Future[bytes] = self._loop.create_future()
        self._take(message, partial(_settle, answer))
        return self._decide(Query.read(message).question.name, kind), await answer or None

    async def probe(self) -> bool:
        """Whether questions that the cluster does not know come back to us; to be asked after each `attach`."""
        name = f"{secrets.token_hex(8)}.{LOOP}"
        answer: asyncio.Future[bytes | None] = self._loop.create_future()
        self._probing, self._came_back = name, False
        self._exchange.ask(dns.query(dns.labels(name), dns.A, 0), partial(_settle, answer))
        await answer
        self.looping = self._came_back
        return self.looping

    def close(self) -> None:
        """Close the sockets; who waits gets no answer."""
        for one in self._datagrams:
            self._loop.remove_reader(one)
            one.close()
        self._datagrams = []
        self._tcp.close()

    # -- questions --

    def _on_readable(self, one: socket.socket) -> None:
        for _ in range(_AT_ONCE):
            try:
                message, sender = one.recvfrom(_LONGEST_QUERY)
            except OSError:
                return
            self._take(message, partial(_send, one, sender), tcp=False)

    def _take(self, message: bytes, respond: Respond, *, tcp: bool = True) -> None:
        """Answer, now or later. `respond` is called once, with nothing when there must be no answer."""
        if len(message) < dns.HEADER.size or message[2] & dns.QR >> 8:
            self.counters.dropped += 1
            respond(b"")
            return
        try:
            query = Query.read(message)
        except (MalformedError, RefusedError) as error:
            self.counters.refused += 1
            respond(dns.reply(message, error.rcode if isinstance(error, RefusedError) else Rcode.FORMERR))
            return
        if not tcp:
            respond = partial(_fit, respond, query.limit)
        if known := self._cache.get(query.key, self._loop.time()):
            self.counters.cached += 1
            respond(query.answered(known))
            return
        self._look_up(_Asker(query, respond), tcp)

    def _look_up(self, asker: _Asker, tcp: bool) -> None:
        query, name = asker.query, asker.query.question.name
        if name.endswith(f".{LOOP}"):
            if name == self._probing:
                self.looping = self._came_back = True
            self.counters.looped += 1
            asker.respond(query.denied(Rcode.NXDOMAIN))
            return
        decision = self._decide(name, query.question.type)
        _log.debug("%s (type %d) is asked %s: %s", name, query.question.type, decision.where, decision.because)
        match decision.where:
            case "nowhere":
                self.counters.nowhere += 1
                asker.respond(query.denied(Rcode.NXDOMAIN))
            case "address" if decision.address:
                self.counters.address += 1
                asker.respond(query.known(decision.address))
            case "elsewhere":
                self.counters.elsewhere += 1
                self._ask_elsewhere(asker, decision, tcp)
            case _:
                self.counters.cluster += 1
                self._ask_cluster(asker, decision, name)

    # -- who is asked --

    def _ask_cluster(self, asker: _Asker, decision: Decision, name: str) -> None:
        query = asker.query
        if self.looping and not f".{name}".endswith(f".{self.domain}") and self._is_asked(query):
            self.counters.looped += 1
            asker.respond(query.denied(Rcode.NXDOMAIN))
            return
        if (askers := self._join(query.key, asker)) is None:
            return
        try:
            message = query.asking(_labels(decision, query))
        except MalformedError:
            self._fail(query.key, askers)
            return
        self._exchange.ask(message, partial(self._cluster_said, query, askers, decision))

    def _is_asked(self, query: Query) -> bool:
        """Whether the cluster is being asked this, in whatever way."""
        return any(isinstance(key, tuple) and key[:2] == query.key[:2] for key in self._flights)

    def _cluster_said(self, query: Query, askers: list[_Asker], decision: Decision, answer: bytes | None) -> None:
        current = self._flights.get(query.key) is askers
        try:
            if answer is None:
                raise MalformedError("there is none")
            answer = answers.recursive(answers.translated(answers.sound(answer), self.virtual))
            if decision.asked is not None or decision.below:
                below = decision.below and (dns.labels(self.domain), dns.labels(decision.below))
                answer = answers.alias(answer, query, below or ((), ()))
        except MalformedError:
            self._fail(query.key, askers)
            return
        if current:
            self._cache.put(query.key, answer, self._loop.time())
        for one in self._land(query.key, askers):
            one.respond(one.query.answered(answer))

    def _ask_elsewhere(self, asker: _Asker, decision: Decision, tcp: bool) -> None:
        """Ask verbatim. Who asks the very same, but for the id, waits for the same answer: so a question that comes
        back through another resolver of this host ends.
        """
        query = asker.query
        key = (tcp, query.message[2:])
        if (askers := self._join(key, asker)) is None:
            return
        try:
            message = query.message if decision.asked is None else query.asking(_labels(decision, query))
        except MalformedError:
            self._fail(key, askers)
            return
        self._upstream.ask(message, partial(self._server_said, key, askers, decision), tcp=tcp)

    def _server_said(self, key: Hashable, askers: list[_Asker], decision: Decision, answer: bytes | None) -> None:
        if answer is not None and decision.asked is not None:
            try:
                answer = answers.alias(answer, askers[0].query)
            except MalformedError:
                answer = None
        if answer is None:
            self._fail(key, askers)
            return
        for one in self._land(key, askers):
            one.respond(one.query.message[:2] + answer[2:])

    # -- who waits --

    def _join(self, key: Hashable, asker: _Asker) -> list[_Asker] | None:
        """Wait for an answer; those who wait when this one is the first, whose question is to be asked, else None."""
        if self._askers >= ASKERS:
            self.counters.failed += 1
            asker.respond(dns.reply(asker.query.message, Rcode.SERVFAIL))
            return None
        self._askers += 1
        if askers := self._flights.get(key):
            self.counters.joined += 1
            askers.append(asker)
            return None
        askers = self._flights[key] = [asker]
        return askers

    def _land(self, key: Hashable, askers: list[_Asker]) -> list[_Asker]:
        """These wait no more."""
        self._askers -= len(askers)
        if self._flights.get(key) is askers:
            del self._flights[key]
        return askers

    def _fail(self, key: Hashable, askers: list[_Asker]) -> None:
        for one in self._land(key, askers):
            self.counters.failed += 1
            one.respond(dns.reply(one.query.message, Rcode.SERVFAIL))


def _labels(decision: Decision, query: Query) -> tuple[bytes, ...]:
    return query.question.labels if decision.asked is None else dns.labels(decision.asked)


def _settle(future: asyncio.Future[Any], value: Any) -> None:
    if not future.done():  # who asked may wait no more
        future.set_result(value)


def _fit(respond: Respond, limit: int, answer: bytes) -> None:
    respond(answers.fitted(answer, limit))


def _send(one: socket.socket, to: object, answer: bytes) -> None:
    """Send a datagram; when there is no room for it, it is lost as any may be."""
    if answer:
        with contextlib.suppress(OSError):
            one.sendto(answer, to)  # type: ignore[arg-type]
