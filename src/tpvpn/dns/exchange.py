"""Questions over the tunnel, whichever link it has just then.

Each has a random id of its own on the way, and is forgotten when its answer comes or PATIENCE is over. A link that is
lost is no answer yet: the next one is asked again. It knows nothing of sockets, policies or caches.
"""

import asyncio
import secrets
from collections.abc import Callable
from dataclasses import dataclass

from tpvpn.wire import dns

PATIENCE = 2.8
"""Seconds; the client has its SERVFAIL within 3."""
LIMIT = 1_000
"""Questions on the way at a time."""

Done = Callable[[bytes | None], None]
Send = Callable[[int, bytes], None]


@dataclass(frozen=True, slots=True)
class _Question:
    message: bytes
    """As it was sent, with the id of the way."""
    identity: bytes
    """That of the asker."""
    done: Done
    timer: asyncio.TimerHandle


class Exchange:
    """Asks what is at the other end of `attach`'s `send`; answers come to `receive`."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._send: Send | None = None
        self._waiting: dict[int, _Question] = {}

    def attach(self, send: Send) -> None:
        """There is a link: what waits is sent over it."""
        self._send = send
        for identity, question in list(self._waiting.items()):
            send(identity, question.message)

    def detach(self) -> None:
        """There is no link for now: questions wait for the next one."""
        self._send = None

    def ask(self, message: bytes, done: Done) -> None:
        """Ask; `done` has the answer with the question's id, or None when there was none in time."""
        if len(self._waiting) >= LIMIT:
            done(None)
            return
        while (identity := secrets.randbits(16)) in self._waiting:
            pass
        timer = self._loop.call_later(PATIENCE, self._settle, identity, None)
        sent = dns.with_identity(message, identity)
        self._waiting[identity] = _Question(sent, message[:2], done, timer)
        if self._send:
            self._send(identity, sent)

    def receive(self, identity: int, message: bytes) -> None:
        """Take what came over the link; what answers no question is dropped."""
        question = self._waiting.get(identity)
        if question and dns.is_answer(question.message, message):
            self._settle(identity, question.identity + message[2:])

    def _settle(self, identity: int, answer: bytes | None) -> None:
        question = self._waiting.pop(identity)
        question.timer.cancel()
        question.done(answer)
