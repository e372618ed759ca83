"""DNS messages (RFC 1035 section 4): the header, the question, and where the records lie; all else stays bytes.

Pure: it asks nobody, and knows nothing of policies. Whatever a message holds, reading it ends: each step goes forward,
and names are followed through pointers only where their text is wanted.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from tpvpn.errors import ProtocolError

HEADER = struct.Struct(">HHHHHH")
"""Id, flags, and the number of questions, answers, authorities and additional records."""
MAX_LENGTH = 65_535
PLAIN_UDP = 512
"""Bytes of a datagram to who does not say that more are welcome (RFC 1035 section 4.2.1)."""

QR, AA, TC, RD, RA, AD, CD = 0x8000, 0x0400, 0x0200, 0x0100, 0x0080, 0x0020, 0x0010
OPCODE, RCODE = 0x7800, 0x000F
A, NS, CNAME, SOA, PTR, AAAA, OPT, ANY = 1, 2, 5, 6, 12, 28, 41, 255
IN = 1
_RECORD = struct.Struct(">HHIH")
_FIXED = struct.Struct(">HH")
_LONGEST_NAME = 255  # RFC 1035 section 2.3.4
_POINTER = 0xC0


class Rcode(IntEnum):
    """What became of a question (RFC 1035 section 4.1.1)."""

    NOERROR, FORMERR, SERVFAIL, NXDOMAIN, NOTIMP, REFUSED = range(6)


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
        return ".".join("".join(map(_shown, label)) for label in self.labels).lower()


@dataclass(frozen=True, slots=True)
class Record:
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


def _shown(byte: int) -> str:
    return chr(byte) if 0x21 <= byte <= 0x7E and byte not in b".\\" else f"\\{byte:03d}"


def question(message: bytes) -> Question:
    """The question of a query or an answer; MalformedError when there is not exactly one, or it is cut off."""
    if len(message) < HEADER.size:
        raise MalformedError("it is shorter than a header")
    if HEADER.unpack_from(message)[2] != 1:
        raise MalformedError("it has not one question")
    labels, at = list[bytes](), HEADER.size
    while True:
        length = message[at] if at < len(message) else -1
        if length == 0:
            break
        if length < 0 or length >= 0x40 or at + 1 + length - HEADER.size >= _LONGEST_NAME:  # no pointer: it is first
            raise MalformedError("its question has no name")
        labels.append(message[at + 1 : at + 1 + length])
        at += 1 + length
    if at + 5 > len(message):
        raise MalformedError("its question is cut off")
    kind, klass = _FIXED.unpack_from(message, at + 1)
    return Question(tuple(labels), kind, klass, at + 5)


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
        if length >= 0x40:
            break
        at += 1 + length
        if length == 0:
            return at
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
    flags |= QR | (given & (OPCODE | RD | CD)) | rcode
    try:
        end = question(message).end
        option = edns(message, end)
    except MalformedError:
        return HEADER.pack(identity, flags, 0, 0, 0, 0)
    added = b"" if option is None else b"\0" + _RECORD.pack(OPT, PLAIN_UDP, option.ttl & 0x8000, 0)
    return HEADER.pack(identity, flags, 1, 0, 0, bool(added)) + message[HEADER.size : end] + added


def edns(message: bytes, begin: int) -> Record | None:
    """The OPT record of a message (RFC 6891 section 6.1), whose `klass` is the length of datagrams that are welcome."""
    return next((one for one in records(message, begin) if one.type == OPT and one.section == 3), None)


def is_truncated(message: bytes) -> bool:
    """Whether the rest is to be had over TCP."""
    return len(message) >= 4 and bool(message[2] & TC >> 8)


def with_identity(message: bytes, identity: int) -> bytes:
    """The message with another id."""
    return identity.to_bytes(2, "big") + message[2:]
