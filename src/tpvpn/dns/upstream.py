"""The DNS servers that this host had before: questions for them, as they came, over UDP or TCP.

Each server has one connected UDP socket with a random port, which is replaced now and then, and each question a random
id on it (RFC 5452). A server that says nothing for a second, that cannot be reached or that could not find out is no
answer: the next one is asked, while the answer of the first is still welcome. A truncated answer is passed on: the
asker comes again over TCP then, and is carried over TCP.
"""

import asyncio
import contextlib
import secrets
import socket
from collections.abc import Callable, Sequence
from functools import partial

from tpvpn.wire import dns

PATIENCE = 2.8
"""Seconds; the client has its SERVFAIL within 3."""
PATIENCE_EACH = 1.0
"""Seconds until the next server is asked too."""
LIMIT = 1_000
"""Questions on the way at a time."""
USES = 256
"""Questions that a socket, and so a port, is good for."""
PORT = 53
_AT_ONCE = 64
_FAILED = (dns.Rcode.SERVFAIL, dns.Rcode.NOTIMP, dns.Rcode.REFUSED)
"""What the resolver library goes on to the next server for (glibc, resolv/res_send.c)."""

Done = Callable[[bytes | None], None]


class Upstream:
    """Asks the servers of `set`, each in turn."""

    def __init__(self, port: int = PORT) -> None:
        self._port = port
        self._servers: tuple[str, ...] = ()
        self._ways: dict[str, _Way] = {}
        self._asking: set[_Asking] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def set(self, servers: Sequence[str]) -> None:
        """Ask these from now on, in this order; IPv6 addresses may have a zone."""
        self._servers = tuple(dict.fromkeys(servers))
        for gone in self._ways.keys() - set(self._servers):
            self._ways.pop(gone).retire()

    def ask(self, message: bytes, done: Done, *, tcp: bool = False) -> None:
        """Ask; `done` has the answer with the question's id, or None when no server had one in time."""
        if not self._servers or len(self._asking) + len(self._tasks) >= LIMIT:
            done(None)
        elif tcp:
            task = asyncio.get_running_loop().create_task(self._over_tcp(message, done))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        else:
            asking = _Asking(
                message, done, [partial(self._way, server) for server in self._servers], self._asking.discard
            )
            self._asking.add(asking)
            asking.next()

    def close(self) -> None:
        """Forget all questions, unanswered."""
        for task in self._tasks:
            task.cancel()
        for asking in list(self._asking):
            asking.forget()
        self.set(())

    def _way(self, server: str) -> "_Way":
        way = self._ways.get(server)
        if way is None or way.uses >= USES:
            if way:
                way.retire()
            way = self._ways[server] = _Way(server, self._port)
        return way

    async def _over_tcp(self, message: bytes, done: Done) -> None:
        answer: bytes | None = None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE):
                for server in self._servers:
                    patience = PATIENCE if server == self._servers[-1] else PATIENCE_EACH
                    with contextlib.suppress(OSError, EOFError, TimeoutError):
                        async with asyncio.timeout(patience):
                            answer = await _ask_over_tcp(server, self._port, message)
                            if answer[3] & dns.RCODE not in _FAILED:
                                break
        done(answer)


class _Asking:
    """A question that goes from server to server."""

    def __init__(
        self, message: bytes, done: Done, ways: "list[Callable[[], _Way]]", over: "Callable[[_Asking], None]"
    ) -> None:
        self.message = message
        self._done, self._over = done, over
        self._ways = ways
        self._asked: list[tuple[_Way, int]] = []
        self._answer: bytes | None = None
        loop = asyncio.get_running_loop()
        self._deadline = loop.time() + PATIENCE
        self._timer = loop.call_at(self._deadline, self._settle)

    def next(self) -> None:
        """Ask the next server; when there is none left, those that may still say something once more."""
        self._timer.cancel()
        while self._ways:
            way = self._ways.pop(0)()
            if (identity := way.ask(self)) is not None:
                self._asked.append((way, identity))
                break
        else:
            if not self._asked:
                self._settle()
                return
            for way, identity in self._asked:
                way.send(identity, self.message)
        loop = asyncio.get_running_loop()
        again = loop.time() + PATIENCE_EACH
        if again < self._deadline:
            self._timer = loop.call_at(again, self.next)
        else:
            self._timer = loop.call_at(self._deadline, self._settle)

    def take(self, way: "_Way", identity: int, answer: bytes | None) -> None:
        """What a server said; None when it cannot be reached."""
        self._asked.remove((way, identity))
        self._answer = answer or self._answer
        if answer and answer[3] & dns.RCODE not in _FAILED:
            self._settle()
        elif self._ways or not self._asked:
            self.next()

    def forget(self) -> None:
        """Nobody waits for it any more."""
        self._timer.cancel()
        self._over(self)
        for way, identity in self._asked:
            way.forget(identity)

    def _settle(self) -> None:
        self.forget()
        self._done(self._answer and self.message[:2] + self._answer[2:])


class _Way:
    """The UDP socket to one server, and who waits for what; closed when it is retired and nobody waits."""

    def __init__(self, server: str, port: int) -> None:
        self.uses = 0
        self._waiting: dict[int, _Asking] = {}
        self._retired = False
        self._loop = asyncio.get_running_loop()
        self._socket: socket.socket | None = None
        with contextlib.suppress(OSError):
            family, kind, _, _, address = socket.getaddrinfo(
                server, port, type=socket.SOCK_DGRAM, flags=socket.AI_NUMERICHOST
            )[0]
            one = socket.socket(family, kind)
            try:
                one.setblocking(False)
                one.connect(address)  # no route: each question tries again with a new socket
            except OSError:
                one.close()
                raise
            self._socket = one
            self._loop.add_reader(one, self._on_readable)

    def ask(self, asking: _Asking) -> int | None:
        """Send a question; the id under which its answer comes, None when the server cannot be reached."""
        self.uses += 1
        while (identity := secrets.randbits(16)) in self._waiting:
            pass
        if not self.send(identity, asking.message):
            self.uses = USES
            return None
        self._waiting[identity] = asking
        return identity

    def send(self, identity: int, message: bytes) -> bool:
        """Send a question, once more perhaps; whether that was possible."""
        if not self._socket:
            return False
        try:
            self._socket.send(dns.with_identity(message, identity))
        except BlockingIOError:
            pass  # as good as lost on the way
        except OSError:
            return False
        return True

    def forget(self, identity: int) -> None:
        """Whoever asked under this id waits no more."""
        self._waiting.pop(identity, None)
        if self._retired and not self._waiting:
            self._close()

    def retire(self) -> None:
        """Take no more questions."""
        self._retired = True
        if not self._waiting:
            self._close()

    def _close(self) -> None:
        if self._socket:
            self._loop.remove_reader(self._socket)
            self._socket.close()
            self._socket = None

    def _on_readable(self) -> None:
        for _ in range(_AT_ONCE):
            if not self._socket:
                return
            try:
                message = self._socket.recv(dns.MAX_LENGTH)
            except BlockingIOError:
                return
            except OSError:  # ICMP: no such port or host, for one of those that were sent
                self._fail()
                return
            identity = int.from_bytes(message[:2])
            asking = self._waiting.get(identity)
            if asking and dns.is_answer(dns.with_identity(asking.message, identity), message):
                self._waiting.pop(identity)
                asking.take(self, identity, message)
                self.forget(identity)

    def _fail(self) -> None:
        self.uses = USES
        waiting, self._waiting = self._waiting, {}
        for identity, asking in waiting.items():
            asking.take(self, identity, None)
        self.forget(-1)


async def _ask_over_tcp(server: str, port: int, message: bytes) -> bytes:
    reader, writer = await asyncio.open_connection(server, port)
    try:
        writer.write(len(message).to_bytes(2) + message)
        while True:
            answer = await reader.readexactly(int.from_bytes(await reader.readexactly(2)))
            if dns.is_answer(message, answer):
                return answer
    finally:
        writer.close()
