"""DNS messages (RFC 1035 section 4): the header, the question, and where the records lie; all else stays bytes.

Pure: it asks nobody, and knows nothing of policies. Whatever a message holds, reading it ends: each step goes forward,
and names are followed through pointers only where their text is wanted.
"""

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from tpvpn.errors import ProtocolError

HEADER = struct.Struct(">HHHHHH")
"""Id, flags, and the number of questions, answers, authorities and additional records."""
MAX_LENGTH = 65_535
PLAIN_UDP = 512
"""Bytes of a datagram to who does not say that more are welcome (RFC 1035 section 4.2.1)."""

QR, AA, TC, RD, RA, AD, CD = 0x8000, 0x0400, 0x0200, 0x0100, 0x0080, 0x0020, 0x0010
OPCODE, RCODE = 0x7800, 0x000F
A, NS, CNAME, SOA, PTR, AAAA, OPT, DS, DNSKEY, ANY = 1, 2, 5, 6, 12, 28, 41, 43, 48, 255
IXFR, AXFR = 251, 252
IN = 1
_RECORD = struct.Struct(">HHIH")
_FIXED = struct.Struct(">HH")
_LONGEST_NAME = 255  # RFC 1035 section 2.3.4
_LONGEST_LABEL = 63
POINTERS = 32
"""Followed for one name; who compresses well needs one, and never more than a name has labels."""
_POINTER = 0xC0
_SHOWN = {byte: f"\\{byte:03d}" for byte in range(256) if not 0x21 <= byte <= 0x7E or byte in b".\\"}
_ESCAPED = re.compile(r"\\(?:([0-9]{3})|(.))|([^.\\])", re.ASCII)


class Rcode(IntEnum):
    """What became of a question (RFC 1035 section 4.1.1)."""

    NOERROR, FORMERR, SERVFAIL, NXDOMAIN, NOTIMP, REFUSED = range(6)
    BADVERS = 16
    """Its upper bits are in the OPT record (RFC 6891 section 6.1.3)."""


class MalformedError(ProtocolError):
    """A message that is none."""


@dataclass(frozen=True, slots=True)
class Question:
    """The one question of a message; `labels` as they were sent, `end` is where it ends."""

    labels: tuple[bytes, ...]
    type: int
    klass: int
    end: int

    @property
    def name(self) -> str:
        """In small letters, without the dot at the end; what is no printable ASCII as \\DDD (RFC 4343 section 2.1)."""
        return ".".join(label.decode("latin-1").translate(_SHOWN) for label in self.labels).lower()


class Record(NamedTuple):
    """Where a record of a message lies: its fields, and the offsets of its TTL and of its data."""

    section: int
    """1: answer, 2: authority, 3: additional."""
    at: int
    type: int
    klass: int
    ttl: int
    ttl_at: int
    data_at: int
    length: int


def labels(name: str) -> tuple[bytes, ...]:
    """The labels of a name as `Question.name` shows it, or with a dot at the end; MalformedError when it is none."""
    found, label, at = list[bytes](), bytearray(), 0
    if name in ("", "."):
        return ()
    while at < len(name):
        if name[at] == ".":
            found.append(bytes(label))
            label.clear()
            at += 1
            continue
        one = _ESCAPED.match(name, at)
        byte = -1 if one is None else int(one[1]) if one[1] else ord(one[2] or one[3])
        if one is None or not 0 <= byte <= (255 if one[1] else 126):
            raise MalformedError(f"{name!r} is no name")
        label.append(byte)
        at = one.end()
    if label:
        found.append(bytes(label))
    if any(not 0 < len(one) <= _LONGEST_LABEL for one in found):
        raise MalformedError(f"{name!r} is no name")
    wire_name(tuple(found))
    return tuple(found)


def question(message: bytes) -> Question:
    """The question of a query or an answer; MalformedError when there is not exactly one, or it is cut off."""
    if len(message) < HEADER.size:
        raise MalformedError("it is shorter than a header")
    if HEADER.unpack_from(message)[2] != 1:
        raise MalformedError("it has not one question")
    found, at = list[bytes](), HEADER.size
    while True:
        length = message[at] if at < len(message) else -1
        if length == 0:
            break
        if (
            not 0 < length <= _LONGEST_LABEL or at + 1 + length - HEADER.size >= _LONGEST_NAME
        ):  # no pointer: it is first
            raise MalformedError("its question has no name")
        found.append(message[at + 1 : at + 1 + length])
        at += 1 + length
    if at + 5 > len(message):
        raise MalformedError("its question is cut off")
    kind, klass = _FIXED.unpack_from(message, at + 1)
    return Question(tuple(found), kind, klass, at + 5)


def records(message: bytes, begin: int) -> Iterator[Record]:
    """All records behind the question, which ends at `begin`; MalformedError where they are cut off."""
    at = begin
    for section, count in enumerate(HEADER.unpack_from(message)[3:], 1):
        for _ in range(count):
            start, at = at, _behind_name(message, at)
            if at + _RECORD.size > len(message):
                raise MalformedError("a record is cut off")
            kind, klass, ttl, length = _RECORD.unpack_from(message, at)
            data = at + _RECORD.size
            if data + length > len(message):
                raise MalformedError("a record is cut off")
            yield Record(section, start, kind, klass, ttl, at + 4, data, length)
            at = data + length


def _behind_name(message: bytes, at: int) -> int:
    """Where a name ends that begins here: behind its root label, or behind its pointer (RFC 1035 section 4.1.4)."""
    while at < len(message):
        length = message[at]
        if length >= _POINTER:
            return at + 2
        if length > _LONGEST_LABEL:
            break
        at += 1 + length
        if length == 0:
            return at
    raise MalformedError("a name is cut off")


def read_name(message: bytes, at: int) -> tuple[bytes, int]:
    """A name without compression, and where it ends in the message. A pointer must point backwards (RFC 1035 section
    4.1.4: to a prior occurrence), in front of the run of labels that it ends, so that following them ends, and soon.
    """
    name, begin, end, followed = bytearray(), at, 0, 0
    while at < len(message):
        length = message[at]
        if length >= _POINTER:
            if at + 2 > len(message):
                break
            end = end or at + 2
            at = int.from_bytes(message[at : at + 2]) & 0x3FFF
            followed += 1
            if at >= begin or followed > POINTERS:
                raise MalformedError("a name points forward, or too often")
            begin = at
            continue
        if length > _LONGEST_LABEL or at + 1 + length > len(message):
            break
        name += message[at : at + 1 + length]
        at += 1 + length
        if len(name) > _LONGEST_NAME:
            raise MalformedError("a name is longer than 255 bytes")
        if length == 0:
            return bytes(name), end or at
    raise MalformedError("a name is cut off")


def wire_name(labels: tuple[bytes, ...]) -> bytes:
    """A name without compression; MalformedError when it is too long to be one."""
    name = b"".join(bytes([len(label)]) + label for label in labels) + b"\0"
    if len(name) > _LONGEST_NAME:
        raise MalformedError("a name is longer than 255 bytes")
    return name


def query(labels: tuple[bytes, ...], kind: int, identity: int, klass: int = IN) -> bytes:
    """A question with recursion desired and no EDNS."""
    return HEADER.pack(identity, RD, 1, 0, 0, 0) + wire_name(labels) + _FIXED.pack(kind, klass)


def reply(message: bytes, rcode: Rcode, flags: int = RA) -> bytes:
    """An answer without records to a query, whose question and EDNS it repeats as far as they can be read."""
    identity, given = struct.unpack_from(">HH", message) if len(message) >= 4 else (0, 0)
    flags |= QR | (given & (OPCODE | RD | CD)) | (rcode & RCODE)
    try:
        end = question(message).end
        option = edns(message, end)
    except MalformedError:
        return HEADER.pack(identity, flags, 0, 0, 0, 0)
    added = b"" if option is None else b"\0" + _RECORD.pack(OPT, PLAIN_UDP, (rcode >> 4) << 24 | option.ttl & 0x8000, 0)
    return HEADER.pack(identity, flags, 1, 0, 0, bool(added)) + message[HEADER.size : end] + added


def is_answer(query: bytes, message: bytes) -> bool:
    """Whether a message answers this query: its id, and its question but for letters' case (RFC 5452 section 9.1).

    Who cannot read a question need not repeat it.
    """
    if len(message) < HEADER.size or message[:2] != query[:2] or not message[2] & 0x80:
        return False
    if message[4:6] == b"\0\0":
        return message[3] & RCODE in (Rcode.FORMERR, Rcode.NOTIMP) and len(message) == HEADER.size
    end = question(query).end
    return (
        message[4:6] == query[4:6]
        and message[end - 4 : end] == query[end - 4 : end]
        and message[HEADER.size : end - 4].lower() == query[HEADER.size : end - 4].lower()
    )


def edns(message: bytes, begin: int) -> Record | None:
    """The OPT record of a message (RFC 6891 section 6.1), whose `klass` is the length of datagrams that are welcome."""
    return next((one for one in records(message, begin) if one.type == OPT and one.section == 3), None)


def is_truncated(message: bytes) -> bool:
    """Whether the rest is to be had over TCP."""
    return len(message) >= 4 and bool(message[2] & TC >> 8)


def with_identity(message: bytes, identity: int) -> bytes:
    """The message with another id."""
    return identity.to_bytes(2, "big") + message[2:]
