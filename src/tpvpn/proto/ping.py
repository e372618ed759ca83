"""Pings and their answers: whether the other end is there, how far it is, and, padded, how much the way carries.

Pure. A `pong` has the id of its ping, and as many bytes of padding as that asked for, up to MAX_PADDING.
"""

from tpvpn.proto import message
from tpvpn.proto.message import Message

MAX_PADDING = 1 << 16
"""Bytes of padding that one answer has at most."""


def encode(identity: int, *, padding: int = 0, wanted: int = 0) -> bytes:
    """A ping with bytes of padding, for an answer with as many as are wanted."""
    members: dict[str, object] = {"wanted": wanted} if wanted else {}
    return message.encode("ping", id=identity, **members, **_padded(padding))


def answer(ping: Message) -> bytes:
    """The pong to a ping; ProtocolError when that has no proper id, or wants what is no number."""
    wanted = message.optional(ping, "wanted", int) or 0
    return message.encode("pong", id=message.member(ping, "id", int), **_padded(min(wanted, MAX_PADDING)))


def _padded(length: int) -> dict[str, str]:
    return {"padding": "x" * length} if length > 0 else {}
