"""Answers that are known already, for as long as their records say.

Pure: `now` is an argument. A key stands for a question and all that its answer depends on (`answers.Query.key`); the
message is kept as it came, together with where its TTLs are. Denials are kept as RFC 2308 has it.
"""

import struct
from collections.abc import Hashable
from dataclasses import dataclass

from tpvpn.wire import dns

MOST, MOST_DENIED = 60, 30
"""Seconds that an answer is kept, and one that denies."""
SIZE = 4_096
"""Answers; the one that was not asked for longest goes."""
_TTL = struct.Struct(">I")
_SHORTEST_SOA = 22  # two names of a byte each, and five numbers


@dataclass(frozen=True, slots=True)
class _Entry:
    message: bytes
    ttls: tuple[tuple[int, int], ...]
    """Where each TTL is, and what it was."""
    since: float
    until: float


class Cache:
    """Answers by key."""

    def __init__(self) -> None:
        self._entries: dict[Hashable, _Entry] = {}  # the one that was used last comes last

    def __len__(self) -> int:
        return len(self._entries)

    def clear(self) -> None:
        """Forget all."""
        self._entries.clear()

    def put(self, key: Hashable, message: bytes, now: float) -> None:
        """Keep an answer, which is whole and sound, if it says for how long."""
        question = dns.question(message)
        records = list(dns.records(message, question.end))
        ttl = _lifetime(message, question.type, records)
        if ttl <= 0:
            return
        ttls = tuple((one.ttl_at, one.ttl) for one in records if one.type != dns.OPT)
        self._entries.pop(key, None)
        self._entries[key] = _Entry(message, ttls, now, now + ttl)
        if len(self._entries) > SIZE:
            del self._entries[next(iter(self._entries))]

    def get(self, key: Hashable, now: float) -> bytes | None:
        """The answer, with TTLs lowered by its age."""
        entry = self._entries.pop(key, None)
        if entry is None or now >= entry.until:
            return None
        self._entries[key] = entry
        if not (age := int(now - entry.since)):
            return entry.message
        aged = bytearray(entry.message)
        for at, ttl in entry.ttls:
            _TTL.pack_into(aged, at, max(0, ttl - age))
        return bytes(aged)


def _lifetime(message: bytes, kind: int, records: list[dns.Record]) -> int:
    """For how many seconds an answer may be kept; 0 when it says nothing of that, or may not be."""
    denied = message[3] & dns.RCODE == dns.Rcode.NXDOMAIN
    if dns.is_truncated(message) or (message[3] & dns.RCODE and not denied):
        return 0
    if any(one.type == dns.OPT and one.ttl >> 24 for one in records):  # an extended RCODE (RFC 6891 section 6.1.3)
        return 0
    # RFC 2181 section 8: a TTL with its top bit set is 0.
    least = min((one.ttl if one.ttl < 1 << 31 else 0 for one in records if one.type != dns.OPT), default=0)
    # A CNAME alone denies too: the name at its end has no such record (RFC 2308 section 2.2).
    if not denied and any(one.section == 1 and kind in (one.type, dns.ANY) for one in records):
        return min(least, MOST)
    for one in records:
        if one.section == 2 and one.type == dns.SOA and one.length >= _SHORTEST_SOA:
            minimum = _TTL.unpack_from(message, one.data_at + one.length - _TTL.size)[0]
            return min(least, minimum, MOST_DENIED)
    return 0
