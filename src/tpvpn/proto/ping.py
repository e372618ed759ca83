"""Pings and their answers: whether the other end is there, how far it is, and, padded, how much the way carries.

Pure. A `pong` has the id of its ping, and as many bytes of padding as that asked for, as far as its sender likes.
"""

from tpvpn.proto import message
from tpvpn.proto.message import Message

MAX_PADDING = 1 << 16
"""Bytes of padding that a ping or its answer has at most."""
MAX_IN_FLIGHT = 32
"""Padded ones at a time, of whoever measures: less than a link lets wait."""


def encode(identity: int, *, padding: int = 0, wanted: int = 0) -> bytes:
    """A ping with bytes of padding, for an answer with as many as are wanted."""
    members: dict[str, object] = {"wanted": wanted} if wanted else {}
    return message.encode("ping", id=identity, **members, **_padded(padding))


def answer(ping: Message, most: int) -> bytes:
    """The pong to a ping, with `most` bytes of padding; ProtocolError: it has no proper id, or wants no number."""
    wanted = message.optional(ping, "wanted", int) or 0
    return message.encode("pong", id=message.member(ping, "id", int), **_padded(min(wanted, most)))


def _padded(length: int) -> dict[str, str]:
    return {"padding": "x" * length} if length > 0 else {}
