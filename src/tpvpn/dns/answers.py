"""Questions as they come, and what is made of answers before they go: another name, other addresses, a shorter message.

Pure: bytes in, bytes out. What need not be understood stays as it was.
"""

import contextlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from ipaddress import ip_address

from tpvpn.route.prefix import BITS, Prefix
from tpvpn.wire import dns
from tpvpn.wire.dns import AD, AXFR, CD, HEADER, IXFR, OPCODE, OPT, RA, RD, TC, MalformedError, Rcode

LARGEST_DATAGRAM = 4_096
"""Bytes of an answer over UDP to who says that as many are welcome, what RFC 6891 section 6.2.5 begins with. RFC 9715
has less so that nothing is fragmented on the way, but ours goes over `lo`, whose MTU is 65,536; a question more over
TCP would cost more."""
WELCOME = 1_232
"""Bytes of a datagram that we say are welcome: it may cross the cluster's network (RFC 9715 section 3)."""
TTL, TTL_MAPPED = 5, 10
"""Seconds that an alias without an answer holds (what CoreDNS gives for the cluster's names), and that mappings do."""
_DO = 0x8000
_FIXED = struct.Struct(">HHIH")
_NAMES_IN = {
    dns.NS: (0, 1), dns.CNAME: (0, 1), dns.PTR: (0, 1), dns.SOA: (0, 2), 3: (0, 1), 4: (0, 1), 7: (0, 1), 8: (0, 1),
    9: (0, 1), 14: (0, 2), 15: (2, 1), 17: (0, 2), 18: (2, 1), 21: (2, 1), 26: (2, 2), 33: (6, 1), 36: (2, 1),
    39: (0, 1),
}  # fmt: skip
"""Types whose data may hold compressed names: how many bytes are in front of them, and how many they are. Those of
RFC 1035 and of RFC 3597 section 4, but for SIG and NXT, which are gone, and NAPTR, whose name is not compressed."""

_LAST_COMPRESSED = 15
"""Later types' names must not be compressed again (RFC 3597 section 4)."""


class RefusedError(Exception):
    """A question that is answered by its code alone."""

    def __init__(self, rcode: Rcode) -> None:
        super().__init__(rcode.name)
        self.rcode = rcode


@dataclass(frozen=True)
class Query:
    """A question that may be asked: one, of class IN, well-formed to its end."""

    message: bytes
    question: dns.Question
    option: dns.Record | None
    """Its OPT record (EDNS)."""

    @classmethod
    def read(cls, message: bytes) -> "Query":
        """RefusedError, or MalformedError."""
        if message[2] & OPCODE >> 8:
            raise RefusedError(Rcode.NOTIMP)
        question = dns.question(message)
        options = [one for one in dns.records(message, question.end) if one.type == OPT]
        if len(options) > 1:  # RFC 6891 section 6.1.1
            raise RefusedError(Rcode.FORMERR)
        if options and options[0].ttl >> 16 & 0xFF:  # a later version of EDNS (RFC 6891 section 6.1.3)
            raise RefusedError(Rcode.BADVERS)
        if question.klass != dns.IN or question.type in (AXFR, IXFR):
            raise RefusedError(Rcode.REFUSED)
        return cls(message, question, options[0] if options else None)

    @cached_property
    def key(self) -> tuple[bytes, int, int, int]:
        """What the answer depends on: name without case, type, EDNS with its DO, and of the flags AD and CD."""
        name = self.message[HEADER.size : self.question.end - 4].lower()
        edns = -1 if self.option is None else self.option.ttl & _DO
        return name, self.question.type, edns, self.message[3] & (AD | CD)

    @property
    def limit(self) -> int:
        """How long an answer over UDP may be."""
        said = dns.PLAIN_UDP if self.option is None else self.option.klass
        return max(dns.PLAIN_UDP, min(said, LARGEST_DATAGRAM))

    def asking(self, labels: tuple[bytes, ...]) -> bytes:
        """The same question of another name or its own, with EDNS of ours: that goes from hop to hop (RFC 6891)."""
        flags = HEADER.unpack_from(self.message)[1] & (RD | AD | CD)
        option = b"" if self.option is None else b"\0" + _FIXED.pack(OPT, WELCOME, self.option.ttl & _DO, 0)
        kind = self.message[self.question.end - 4 : self.question.end]
        return HEADER.pack(0, flags, 1, 0, 0, bool(option)) + dns.wire_name(labels) + kind + option

    def answered(self, answer: bytes) -> bytes:
        """An answer to this question with its id, its flag for recursion and its own letters (draft-vixie-dns-0x20)."""
        flags = (answer[2] & ~(RD >> 8)) | (self.message[2] & RD >> 8)
        head = self.message[:2] + bytes([flags]) + answer[3 : HEADER.size]
        return head + self.message[HEADER.size : self.question.end] + answer[self.question.end :]

    def denied(self, rcode: Rcode) -> bytes:
        """There is no such name (NXDOMAIN), or nothing of this type (NOERROR), to be kept for TTL_MAPPED seconds.

        The SOA that says so is the parent's: of the name itself it would say that there is one.
        """
        answer = dns.reply(self.message, rcode)
        parent = dns.wire_name(self.question.labels[1:])
        numbers = struct.pack(">5I", 1, TTL_MAPPED, TTL_MAPPED, TTL_MAPPED, TTL_MAPPED)
        soa = parent + _FIXED.pack(dns.SOA, dns.IN, TTL_MAPPED, 2 + len(numbers)) + b"\0\0" + numbers
        return self._with(answer, 8, soa)

    def known(self, address: str) -> bytes:
        """The answer when the name stands for this address."""
        there = ip_address(address)
        if self.question.type not in (dns.A if there.version == 4 else dns.AAAA, dns.ANY):
            return self.denied(Rcode.NOERROR)
        kind = dns.A if there.version == 4 else dns.AAAA
        record = b"\xc0\x0c" + _FIXED.pack(kind, dns.IN, TTL_MAPPED, len(there.packed)) + there.packed
        return self._with(dns.reply(self.message, Rcode.NOERROR), 6, record)

    def _with(self, answer: bytes, count_at: int, record: bytes) -> bytes:
        """An answer without records gets one, counted there in the header."""
        end = self.question.end
        return answer[:count_at] + b"\0\1" + answer[count_at + 2 : end] + record + answer[end:]


def sound(answer: bytes) -> bytes:
    """An answer that can be read to its end, without what is behind that; MalformedError when it cannot."""
    end = dns.question(answer).end
    for one in dns.records(answer, end):
        end = one.data_at + one.length
    return answer[:end]


def recursive(answer: bytes) -> bytes:
    """An answer that says that we ask others."""
    return answer[:3] + bytes([answer[3] | RA]) + answer[4:]


def translated(answer: bytes, pairs: Sequence[tuple[Prefix, Prefix]]) -> bytes:
    """An answer whose addresses in the second of each pair of subnets are those of the first; then no longer AD."""
    changed = bytearray(answer)
    for one in dns.records(answer, dns.question(answer).end) if pairs else ():
        version = {(dns.A, 4): 4, (dns.AAAA, 16): 6}.get((one.type, one.length))
        if version is None or one.klass != dns.IN:
            continue
        place = slice(one.data_at, one.data_at + one.length)
        address = Prefix(version, int.from_bytes(answer[place]), BITS[version])
        for virtual, real in pairs:
            if real.contains(address):
                changed[place] = (virtual.network + address.network - real.network).to_bytes(one.length)
                changed[3] &= ~AD & 0xFF
                break
    return bytes(changed)


Suffixes = tuple[tuple[bytes, ...], tuple[bytes, ...]]
"""The labels of a suffix, and of the one that is to stand in its place."""


def alias(answer: bytes, query: Query, suffixes: Suffixes = ((), ())) -> bytes:
    """The answer to `query` by that of another name: a CNAME to it comes first, if it still is another one when the
    suffix of all names in the answer is replaced. MalformedError when it cannot be read, or grows too long.
    """
    asked = dns.question(answer)
    records = list(dns.records(answer, asked.end))
    ttl = min((one.ttl for one in records if one.section == 1), default=TTL)
    identity, flags, _, count, *rest = HEADER.unpack_from(answer)
    if count == 0xFFFF:
        raise MalformedError("it has too many answers")
    target = _replaced(asked.labels, suffixes)
    is_other = _lower(target) != _lower(query.question.labels)
    writer = _Writer(HEADER.pack(identity, flags & ~AD, 1, count + is_other, *rest), query, suffixes)
    if is_other:
        writer.record(query.question.labels, dns.CNAME, ttl, target)
    for one in records:
        writer.copy(answer, one)
    if len(writer.message) > dns.MAX_LENGTH:
        raise MalformedError("it is too long with another name")
    return bytes(writer.message)


def _lower(labels: tuple[bytes, ...]) -> tuple[bytes, ...]:
    return tuple(one.lower() for one in labels)


def _replaced(labels: tuple[bytes, ...], suffixes: Suffixes) -> tuple[bytes, ...]:
    """A name with the second suffix, if it has the first."""
    old, new = suffixes
    return labels[: -len(old)] + new if old and _lower(labels[-len(old) :]) == old else labels


class _Writer:
    """Writes a message, each name with the other suffix; one that was written whole before becomes a pointer."""

    def __init__(self, header: bytes, query: Query, suffixes: Suffixes) -> None:
        self._suffixes = suffixes
        self.message = bytearray(header + query.message[HEADER.size : query.question.end])
        self._places = {dns.wire_name(query.question.labels).lower(): HEADER.size}

    def record(self, owner: tuple[bytes, ...], kind: int, ttl: int, name: tuple[bytes, ...]) -> None:
        """A record whose data is a name."""
        self._name(dns.wire_name(owner))
        self.message += _FIXED.pack(kind, dns.IN, ttl, 0)
        begin = len(self.message)
        self._name(dns.wire_name(name))
        self._measure(begin)

    def copy(self, message: bytes, record: dns.Record) -> None:
        """A record of another message."""
        self._name(self._read(message, record.at)[0])
        self.message += message[record.ttl_at - 4 : record.data_at]
        begin, end = len(self.message), record.data_at + record.length
        before, names = _NAMES_IN.get(record.type, (0, 0))
        at = record.data_at + before
        self.message += message[record.data_at : at]
        for _ in range(names if record.length else 0):
            name, at = self._read(message, at)
            if record.type <= _LAST_COMPRESSED:
                self._name(name)
            else:
                self.message += name
        if at > end:
            raise MalformedError("a name is longer than its record")
        self.message += message[at:end]
        self._measure(begin)

    def _read(self, message: bytes, at: int) -> tuple[bytes, int]:
        """A name of another message, as it is to be written, and where it ends there."""
        name, end = dns.read_name(message, at)
        if self._suffixes[0]:
            name = dns.wire_name(_replaced(_labels(name), self._suffixes))
        return name, end

    def _name(self, name: bytes) -> None:
        place = self._places.setdefault(name.lower(), len(self.message))
        if place == len(self.message) or place >= 0x4000 or name == b"\0":
            self.message += name
        else:
            self.message += (0xC000 | place).to_bytes(2)

    def _measure(self, begin: int) -> None:
        """Write how long the data is that begins there."""
        self.message[begin - 2 : begin] = (len(self.message) - begin).to_bytes(2)


def _labels(name: bytes) -> tuple[bytes, ...]:
    """The labels of a name without compression."""
    found, at = list[bytes](), 0
    while length := name[at]:
        found.append(name[at + 1 : at + 1 + length])
        at += 1 + length
    return tuple(found)


def fitted(answer: bytes, limit: int) -> bytes:
    """An answer in at most `limit` bytes: the whole, or question and OPT record with TC (RFC 2181 section 9)."""
    if len(answer) <= limit:
        return answer
    end, option = dns.question(answer).end, None
    with contextlib.suppress(MalformedError):  # of one from elsewhere, which goes as it came
        option = dns.edns(answer, end)
    kept = b"" if option is None else answer[option.at : option.data_at - 2] + b"\0\0"
    flags = HEADER.unpack_from(answer)[1] | TC
    return (
        answer[:2] + flags.to_bytes(2) + HEADER.pack(0, 0, 1, 0, 0, bool(kept))[4:] + answer[HEADER.size : end] + kept
    )
