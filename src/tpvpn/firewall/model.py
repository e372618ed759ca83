"""A firewall as plain values: tables, chains, rules, and in a rule what it asks of a packet, sets and decides.

It knows neither nf_tables' nor iptables' encoding, nor any packet. A condition reads fields of the packet, in the order
of the bytes that the kernel compares, and asks whether the number they make lies in some ranges: equality, order, a
range, a set are all that. What could not be read of a rule is a condition without ranges.
"""

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple


class Field(NamedTuple):
    """Something of a packet, named as nft(8) does: "meta mark", "ct state", "fib daddr type".

    "nh" and "th" are bytes of the network and the transport header, from `offset`.
    """

    name: str
    length: int = 4
    """In bytes."""
    offset: int = 0

    def __str__(self) -> str:
        place = f"{self.name} {self.offset}" if self.name in ("nh", "th") else self.name
        return _NAMES.get(place, place)


_NAMES = {
    # A prefix's first bytes are loaded alone, so the length says nothing.
    "nh 12": "the source address",
    "nh 16": "the destination address",
    "nh 8": "the source address",
    "nh 24": "the destination address",
    "th 0": "the source port",
    "th 2": "the destination port",
    "meta skuid": "the user",
    "meta skgid": "the group",
    "match owner": "the user",
}
"""What people call a field; a header's by its offset, both versions of IP together."""


class Mask(NamedTuple):
    """A step of a computation: value & mask ^ flipped, over `length` bytes."""

    mask: int
    flipped: int
    length: int


class Swap(NamedTuple):
    """A step of a computation: the bytes of each group of `size` reversed."""

    size: int


class Piece(NamedTuple):
    """A field, and what is done to it before it is compared; it takes up `words` words of 4 bytes."""

    field: Field
    steps: tuple[Mask | Swap, ...] = ()
    words: int = 1


class Operand(NamedTuple):
    """What is compared: the first `length` bytes of the pieces, one after the other."""

    pieces: tuple[Piece, ...]
    length: int


def plain(field: Field, *steps: Mask | Swap) -> Operand:
    """A field alone as operand."""
    return Operand((Piece(field, steps, -(-field.length // 4)),), field.length)


def constant(value: bytes) -> Operand:
    """A value that is the same for every packet: nothing is left of the field."""
    return plain(Field("constant", len(value)), Mask(0, int.from_bytes(value), len(value)))


class Ranges:
    """Numbers, as disjoint ranges with both ends included, sorted; a value."""

    __slots__ = ("ends", "starts")

    def __init__(self, ranges: Iterable[tuple[int, int]]) -> None:
        # Tuples of numbers are nothing to the garbage collector, which ten thousand lists would keep busy.
        pairs = sorted(ranges)
        self.starts = tuple(first for first, _last in pairs)
        self.ends = tuple(last for _first, last in pairs)

    @classmethod
    def one(cls, first: int, last: int) -> "Ranges":
        """A single range; the kind that most rules have."""
        ranges = cls.__new__(cls)
        ranges.starts, ranges.ends = (first,), (last,)
        return ranges

    def candidates(self, value: int, known: int, all_bits: int) -> tuple[list[int], bool]:
        """Which ranges, by place, may hold a number known in some bits only; whether the first surely does."""
        low = value & known
        high = low | (all_bits ^ known)
        place = max(bisect_right(self.starts, low) - 1, 0)
        found: list[int] = []
        while place < len(self.starts) and (start := self.starts[place]) <= high:
            end = self.ends[place]
            if start <= low and high <= end:
                return [place], True
            if end >= low and not (start == end and (start ^ value) & known):
                found.append(place)
            place += 1
        return found, False

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ranges) and (self.starts, self.ends) == (other.starts, other.ends)

    def __hash__(self) -> int:
        return hash((self.starts, self.ends))

    def __repr__(self) -> str:
        return f"Ranges({list(zip(self.starts, self.ends, strict=True))})"


class Condition(NamedTuple):
    """The operand lies in the ranges, or with `negated` does not; without ranges nobody can tell."""

    operand: Operand
    ranges: Ranges | None
    negated: bool = False


def unreadable(what: str) -> Condition:
    """A condition that is not understood; `what` names it for people."""
    return Condition(plain(Field(what)), None)


def equals(operand: Operand, value: int, *, negated: bool = False) -> Condition:
    """The operand is this number."""
    return Condition(operand, Ranges.one(value, value), negated)


class Effect(NamedTuple):
    """The packet's field becomes the operand's value."""

    field: Field
    operand: Operand


MARK, CT_MARK, CT_STATE = Field("meta mark"), Field("ct mark"), Field("ct state")
L4PROTO, IIFNAME, OIFNAME = Field("meta l4proto", 1), Field("meta iifname", 16), Field("meta oifname", 16)
INVALID, ESTABLISHED, NEW, UNTRACKED = 1, 2, 8, 64
"""Bits of "ct state"."""


class Verdict(NamedTuple):
    """What becomes of a packet that a rule matches; `chain` is where a jump or goto leads."""

    kind: Literal["accept", "drop", "reject", "jump", "goto", "return", "queue"]
    chain: str = ""


class VerdictMap(NamedTuple):
    """A verdict for each range in which the operand may lie, None for none; and the one for all other values."""

    operand: Operand
    ranges: Ranges
    verdicts: tuple[Verdict | None, ...]
    default: Verdict | None


class Rule(NamedTuple):
    """A rule: conditions that must all hold, and effects, in order; then its verdict, None to go on."""

    steps: tuple[Condition | Effect, ...]
    verdict: Verdict | VerdictMap | None
    handle: int
    """In nf_tables its handle, in iptables its number in the chain."""
    comment: str = ""


Hook = Literal["prerouting", "input", "forward", "output", "postrouting"]
HOOKS: tuple[Hook, ...] = ("prerouting", "input", "forward", "output", "postrouting")
"""By their number in the kernel (enum nf_inet_hooks)."""


@dataclass(frozen=True, slots=True)
class Chain:
    """A chain; a base chain has a hook, a priority and a policy."""

    name: str
    rules: tuple[Rule, ...]
    hook: Hook | None = None
    priority: int = 0
    drops: bool = False
    """Its policy is drop."""


@dataclass(frozen=True, slots=True)
class Table:
    """A table with those of its chains that a packet of ours may come to; `program` is what shows it."""

    program: Literal["nft", "iptables-legacy", "ip6tables-legacy"]
    family: Literal["ip", "ip6", "inet"]
    name: str
    chains: Mapping[str, Chain]

    @property
    def versions(self) -> tuple[int, ...]:
        """The versions of IP whose packets it sees."""
        return {"ip": (4,), "ip6": (6,), "inet": (4, 6)}[self.family]


@dataclass(frozen=True, slots=True)
class Firewall:
    """All tables, in the order in which they were made, and the index of each network device."""

    tables: tuple[Table, ...] = ()
    devices: Mapping[str, int] | None = None
    complete: bool = True
    """False where there may be tables of iptables-legacy that only root can name."""
