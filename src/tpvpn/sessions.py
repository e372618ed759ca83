"""A manager's sessions, asked for over any transport, and ended: the client's end of `tpvpn manager sessions`."""

import secrets
from collections.abc import Sequence

from tpvpn.errors import ClusterError, ManagerError, TpvpnError
from tpvpn.proto.handshake import NONCE_LENGTH
from tpvpn.proto.sessions import Answer, Question, SessionsHandshake
from tpvpn.transport.stream import Dialler
from tpvpn.tunnel import converse


async def ask_each(transports: Sequence[Dialler], question: Question) -> Answer:
    """What the pods of one manager answer, together. Errors as of `ask`, when all of them give one."""
    answers, errors = list[Answer](), list[TpvpnError]()
    for transport in transports:
        try:
            answers.append(await ask(transport, question))
        except (ClusterError, ManagerError) as error:  # the session that is to be ended is another pod's
            errors.append(error)
    if not answers:
        raise errors[0]
    sessions = [one for answer in answers for one in answer.sessions]
    return Answer(answers[0].user, sessions, [one for answer in answers for one in answer.ended])


async def ask(transport: Dialler, question: Question) -> Answer:
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
