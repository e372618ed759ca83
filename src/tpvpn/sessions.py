"""A manager's sessions, asked for over any transport, and ended: the client's end of `tpvpn manager sessions`."""

import secrets
from typing import Protocol

from tpvpn.proto.handshake import NONCE_LENGTH
from tpvpn.proto.sessions import Answer, Question, SessionsHandshake
from tpvpn.transport.stream import Stream
from tpvpn.tunnel import converse


class Transport(Protocol):
    """A way to a manager."""

    @property
    def token(self) -> bytes: ...
    async def resolve(self) -> list[str]: ...
    async def dial(self, addresses: list[str]) -> tuple[Stream, bytes]: ...


async def ask(transport: Transport, question: Question) -> Answer:
    """What the manager answers. ManagerError when it refuses, or is not to be reached; ClusterError."""
    stream, early = await transport.dial(await transport.resolve())
    try:
        nonce = secrets.token_bytes(NONCE_LENGTH)
        handshake = SessionsHandshake(transport.token, stream.certificate_hash, nonce, question)
        await converse(stream, early, handshake)
    finally:
        stream.close()
    assert handshake.answered
    return handshake.answered
