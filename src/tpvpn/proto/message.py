"""Control frames: JSON objects with a `type`, and typed access to what a stranger put into them.

Whatever is wrong with a payload is one ProtocolError; nothing here trusts a length, a type or a range.
"""

import json
import re
from collections.abc import Mapping
from typing import Any, TypeVar, cast

from tpvpn.errors import ProtocolError

T = TypeVar("T")
Message = Mapping[str, Any]


def encode(kind: str, **members: object) -> bytes:
    """The payload of a control frame."""
    return json.dumps({"type": kind, **members}, separators=(",", ":")).encode()


def decode(payload: bytes) -> Message:
    """The object in a control frame; ProtocolError unless it is one and has a `type`."""
    try:
        message: object = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"the other end sent a control frame that is not JSON: {payload[:60]!r}") from error
    kind = cast(Message, message).get("type") if isinstance(message, dict) else None
    if not isinstance(kind, str) or not re.fullmatch("[a-z_-]{1,32}", kind):  # errors and logs show it
        raise ProtocolError(f"the other end sent a control frame without a type: {payload[:60]!r}")
    return cast(Message, message)


def member(message: Message, name: str, kind: type[T]) -> T:
    """The member `name`, which must be there and be a `kind` (a bool is no int)."""
    value = message.get(name)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ProtocolError(f"the {message['type']} of the other end has no proper {name}: {str(value)[:60]!r}")
    return value


def optional(message: Message, name: str, kind: type[T]) -> T | None:
    """The member `name`, or None when it is missing or null."""
    return None if message.get(name) is None else member(message, name, kind)


def numbers(message: Message, name: str) -> list[int]:
    """The member `name` as a list of integers."""
    return [value for value in cast(list[object], member(message, name, list)) if type(value) is int]


def printable(text: str, length: int) -> str:
    """A stranger's text as it may stand in a log line or on a terminal: no control characters, a bounded length."""
    return "".join(character if character.isprintable() else "?" for character in text[:length])


def texts(message: Message, name: str) -> list[str]:
    """The member `name` as a list of strings."""
    return [value for value in cast(list[object], member(message, name, list)) if isinstance(value, str)]
