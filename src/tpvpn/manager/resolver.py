"""A session's questions to the pod's resolver: DNS frames in, DNS frames out (docs/reference/wire.md).

It reads of a message the header, the question and where its records end; the client gets the answer's bytes as they
are, but for the id. It decides nothing about names, and keeps none: the client has the cache.

How it works. Each nameserver has one connected UDP socket, since a socket for each question costs more than the
question; each question there has a random id of ours, and an answer must match both (RFC 5452 section 9.1). A question
that is not answered within AGAIN goes to the next nameserver; where that is the same one, on a new socket: connection
tracking may lead the old one to a pod that is gone. The old one stays until nothing waits on it. What a nameserver
cannot say in a datagram is asked again over TCP. One timer looks at all that wait: one for each would cost more than
the question.
"""

import asyncio
import contextlib
import secrets
import socket
from dataclasses import dataclass, field
from functools import partial

from tpvpn.bundle import Bundle
from tpvpn.exposition import Histogram
from tpvpn.manager.nameservers import Nameserver, Nameservers
from tpvpn.wire import dns, frame

AGAIN, PATIENCE = 1.0, 2.5
"""Seconds until a question is sent again, and until it has failed."""
SILENT = 30.0
"""Seconds for which a nameserver that let a question wait is asked after the others."""
MAX_WAITING, MAX_CONNECTIONS = 1000, 16
"""Of a session; a question that finds all connections taken waits for one."""
MAX_QUESTION = 4096
"""Bytes; no resolver library's is longer, and those that wait are kept."""
MAX_QUEUED = frame.MAX_PAYLOAD
"""Bytes on a link that takes no more; behind them answers are dropped, long before the link would be."""
_DURATIONS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_ID = 2
_TICK = 0.1
_AT_ONCE = 64
_ROOM = 1 << 20
"""Bytes of answers that may come at once; the kernel gives what net.core.rmem_max allows."""
_DATAGRAM = 1232
"""Bytes of a question; a longer one could be cut to fragments on its way (DNS flag day 2020)."""


@dataclass(slots=True)
class Counters:
    """Of all sessions."""

    questions: int = 0
    failed: int = 0
    """Answered by us that there is no answer."""
    dropped: int = 0
    """Frames that were no question, and answers that the client did not take."""
    durations: Histogram = field(default_factory=lambda: Histogram(_DURATIONS))
    """Seconds from a question that was asked to its answer, or until it had failed."""


@dataclass(slots=True, eq=False)
class _Asked:
    identity: bytes
    """The client's, of the frame."""
    message: bytes
    end: int
    """Of its question."""
    servers: list[Nameserver]
    """Those that have not refused."""
    deadline: float
    due: float = 0.0
    turn: int = 0
    sent: "dict[_Channel, int]" = field(default_factory=dict["_Channel", int])
    """Where an answer may still come from, and under which id."""
    task: asyncio.Task[bytes] | None = None
    """Asks over TCP."""

    def is_answer(self, data: bytes) -> bool:
        """Whether it answers this question; a name may come back in other letters (RFC 4343)."""
        if len(data) < self.end or not data[2] & dns.QR >> 8 or data[4:6] != b"\0\1":
            return False
        fixed, head = self.end - 4, dns.HEADER.size
        return (
            data[fixed : self.end] == self.message[fixed : self.end]
            and data[head:fixed].lower() == self.message[head:fixed].lower()
        )


class _Channel:
    """A connected UDP socket, and the questions that wait on it; OSError when nothing leads there."""

    def __init__(self, server: Nameserver) -> None:
        self.server = server
        self.waiting: dict[int, _Asked] = {}
        self.socket = socket.socket(server.family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _ROOM)
        try:
            self.socket.connect(server.address)
        except BaseException:
            self.socket.close()
            raise
        self.fd = self.socket.fileno()

    def send(self, asked: _Asked) -> None:
        """Send it under a new id; OSError when the one before was refused, or this one is."""
        number = secrets.randbits(16)
        while number in self.waiting:
            number = secrets.randbits(16)
        self.waiting[number] = asked
        asked.sent[self] = number
        with contextlib.suppress(BlockingIOError):  # a full queue drops; it is sent again
            self.socket.send(dns.with_identity(asked.message, number))


class Resolver:
    """Runs until `close()`."""

    def __init__(self, bundle: Bundle, counters: Counters) -> None:
        self._bundle, self._counters = bundle, counters
        self._loop = asyncio.get_running_loop()
        self._nameservers = Nameservers()
        self._waiting: set[_Asked] = set()
        self._channels: dict[Nameserver, _Channel] = {}
        self._silent: dict[Nameserver, float] = {}
        """Until when those that did not answer come last."""
        self._connections = asyncio.Semaphore(MAX_CONNECTIONS)
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    def ask(self, payload: bytes) -> None:
        """A DNS frame of the client's."""
        identity, message = payload[:_ID], payload[_ID:]
        if self._closed or len(message) < dns.HEADER.size or message[2] & dns.QR >> 8:
            self._counters.dropped += 1
            return
        self._counters.questions += 1
        if len(self._waiting) >= MAX_WAITING:
            self._counters.failed += 1
            self._deliver(identity, dns.reply(message, dns.Rcode.SERVFAIL))
        elif message[2] & dns.OPCODE >> 8:
            self._deliver(identity, dns.reply(message, dns.Rcode.NOTIMP))
        elif (end := _end_of_question(message)) is None:
            self._deliver(identity, dns.reply(message, dns.Rcode.FORMERR))
        else:
            now = self._loop.time()
            servers = sorted(self._nameservers.at(now), key=lambda one: self._silent.get(one, now) > now)
            asked = _Asked(identity, message, end, servers, now + PATIENCE)
            self._waiting.add(asked)
            self._send(asked)
            if not self._timer:
                self._timer = self._loop.call_later(_TICK, self._on_tick)

    def close(self) -> None:
        """Ask and answer no more; harmless when it is closed."""
        self._closed = True
        if self._timer:
            self._timer.cancel()
        channels, self._channels = self._channels, {}
        for asked in list(self._waiting):
            self._forget(asked)
        for channel in channels.values():
            self._close(channel)

    def _send(self, asked: _Asked) -> None:
        """To the nameserver whose turn it is, of those that can be had; it has failed where none can."""
        asked.due = min(self._loop.time() + AGAIN, asked.deadline)
        while asked.servers:
            server = asked.servers[asked.turn % len(asked.servers)]
            if len(asked.message) > _DATAGRAM:
                self._begin_tcp(asked, server)
                return
            try:
                channel = self._channel(server, asked)
            except OSError:  # no way there, or no descriptor
                asked.servers.remove(server)
                continue
            try:
                channel.send(asked)
            except OSError:
                self._give_up(channel)
            return
        self._fail(asked)

    def _channel(self, server: Nameserver, asked: _Asked) -> _Channel:
        """The socket to a nameserver; a new one when this question was not answered on it."""
        channel = self._channels.get(server)
        if channel is None or channel in asked.sent:
            channel = self._channels[server] = _Channel(server)
            self._loop.add_reader(channel.fd, self._on_readable, channel)
        return channel

    def _on_readable(self, channel: _Channel) -> None:
        for _ in range(_AT_ONCE):
            try:
                data = channel.socket.recv(dns.MAX_LENGTH)
            except BlockingIOError:
                return
            except OSError:  # ICMP says that nobody listens there; libuv watches such a socket no more, too
                self._give_up(channel)
                return
            asked = channel.waiting.get(int.from_bytes(data[:_ID]))
            if asked is None or not asked.is_answer(data):
                continue
            if dns.is_truncated(data):
                self._begin_tcp(asked, channel.server)
            else:
                self._answer(asked, data)
            if channel.socket.fileno() < 0:  # that was the last that an old one was kept for
                return

    def _give_up(self, channel: _Channel) -> None:
        """A nameserver refuses: what waits for it alone goes to the next at once."""
        if self._channels.get(channel.server) is channel:
            del self._channels[channel.server]
        waiting, channel.waiting = list(channel.waiting.values()), {}
        self._close(channel)
        for asked in waiting:
            asked.sent.pop(channel, None)
            if channel.server in asked.servers:
                asked.servers.remove(channel.server)
            if not asked.servers:
                self._fail(asked)
            elif not asked.sent:
                self._send(asked)

    def _begin_tcp(self, asked: _Asked, server: Nameserver) -> None:
        self._leave_channels(asked)
        asked.due = asked.deadline
        asked.task = self._loop.create_task(self._ask_over_tcp(asked.message, server))
        asked.task.add_done_callback(partial(self._on_tcp, asked))

    async def _ask_over_tcp(self, message: bytes, server: Nameserver) -> bytes:
        """What comes back, whatever it is; OSError when nothing does."""
        number = secrets.randbits(16)
        question = len(message).to_bytes(2) + dns.with_identity(message, number)  # RFC 1035 section 4.2.2
        async with self._connections:
            with socket.socket(server.family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as connected:
                await self._loop.sock_connect(connected, server.address)
                await self._loop.sock_sendall(connected, question)
                length = int.from_bytes(await self._exactly(connected, 2))
                data = await self._exactly(connected, length)
        return data if data[:_ID] == number.to_bytes(_ID) else b""

    async def _exactly(self, connected: socket.socket, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = await self._loop.sock_recv(connected, count - len(data))
            if not more:
                raise ConnectionResetError("the nameserver closed the connection")
            data += more
        return data

    def _on_tcp(self, asked: _Asked, task: asyncio.Task[bytes]) -> None:
        if task.cancelled():
            return
        try:
            data = task.result()
        except OSError:
            data = b""
        if asked.is_answer(data):
            self._answer(asked, data)
        else:
            self._fail(asked)

    def _on_tick(self) -> None:
        now = self._loop.time()
        for asked in [one for one in self._waiting if one.due <= now]:
            if asked not in self._waiting:  # one before it found that its nameserver refuses
                continue
            if asked.deadline <= now:
                self._fail(asked)
            else:
                self._silent[asked.servers[asked.turn % len(asked.servers)]] = now + SILENT
                asked.turn += 1
                self._send(asked)
        self._timer = self._loop.call_later(_TICK, self._on_tick) if self._waiting else None

    def _answer(self, asked: _Asked, data: bytes) -> None:
        self._forget(asked)
        self._deliver(asked.identity, asked.message[:_ID] + data[_ID:])

    def _fail(self, asked: _Asked) -> None:
        self._forget(asked)
        self._counters.failed += 1
        self._deliver(asked.identity, dns.reply(asked.message, dns.Rcode.SERVFAIL))

    def _deliver(self, identity: bytes, message: bytes) -> None:
        if self._bundle.queued > MAX_QUEUED:
            self._counters.dropped += 1
        else:
            self._bundle.send(frame.DNS, identity + message)

    def _forget(self, asked: _Asked) -> None:
        self._counters.durations.observe(self._loop.time() - asked.deadline + PATIENCE)
        self._waiting.discard(asked)
        self._leave_channels(asked)
        if asked.task:
            asked.task.cancel()

    def _leave_channels(self, asked: _Asked) -> None:
        for channel, number in asked.sent.items():
            channel.waiting.pop(number, None)
            if not channel.waiting and self._channels.get(channel.server) is not channel:
                self._close(channel)
        asked.sent.clear()

    def _close(self, channel: _Channel) -> None:
        if channel.socket.fileno() >= 0:
            self._loop.remove_reader(channel.fd)
            channel.socket.close()


def _end_of_question(message: bytes) -> int | None:
    """Where the one question of a message ends; None when it is malformed or too long."""
    if len(message) > MAX_QUESTION:
        return None
    try:
        end = dns.question(message).end
        for _ in dns.records(message, end):
            pass
    except dns.MalformedError:
        return None
    return end
