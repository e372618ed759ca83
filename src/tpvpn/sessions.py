"""A manager's sessions, asked for over any transport, and ended: the client's end of `tpvpn manager sessions`."""

import secrets

from tpvpn.engine import Transport
from tpvpn.proto.handshake import NONCE_LENGTH
from tpvpn.proto.sessions import Answer, Question, SessionsHandshake
from tpvpn.tunnel import converse


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
