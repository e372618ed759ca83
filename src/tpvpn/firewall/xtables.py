"""The matches and targets of iptables, as its kernel modules know them, turned into conditions, effects and verdicts.

Both kinds of iptables have them: the legacy tables, and nf_tables in its `match` and `target` expressions. It knows
neither encoding around them. Structures are those of linux/netfilter/xt_*.h, in host byte order.
"""

import struct
from collections.abc import Callable

from tpvpn.firewall.model import (
    CT_MARK,
    CT_STATE,
    MARK,
    UNTRACKED,
    Condition,
    Effect,
    Field,
    Mask,
    Operand,
    Ranges,
    Verdict,
    constant,
    equals,
    plain,
    unreadable,
)

_U16, _U32 = struct.Struct("=H"), struct.Struct("=I")
_ALL = 0xFFFFFFFF


def match(name: str, revision: int, info: bytes) -> tuple[Condition, ...]:
    """What a match asks of the packet."""
    reader = _MATCHES.get((name, revision))
    if reader is not None and (conditions := reader(info)) is not None:
        return conditions
    return (unreadable(f"match {name}"),)


def comment(info: bytes) -> str:
    """The text of the match `comment`."""
    return info.partition(b"\0")[0].decode(errors="replace")


def _bytes_of(number: int) -> int:
    """A host's u32 as the number that its bytes make."""
    return int.from_bytes(_U32.pack(number))


def _masked(field: Field, mask: int) -> Operand:
    return plain(field, Mask(_bytes_of(mask), 0, 4))


def _state(mask: int, negated: bool) -> tuple[Condition, ...] | None:
    """Connection states: bits as nf_tables has them, but for UNTRACKED; those of NAT are none of the packet's state."""
    if mask & (1 << 6 | 1 << 7):
        return None
    bits = mask & 0x1F | (UNTRACKED if mask & 1 << 8 else 0)
    return (equals(_masked(CT_STATE, bits), 0, negated=not negated),)


def _conntrack(info: bytes) -> tuple[Condition, ...] | None:
    flags, inverted, mask = struct.unpack_from("=HHH", info, 146)
    if flags & ~(1 << 13) != 1:  # XT_CONNTRACK_STATE, perhaps with _STATE_ALIAS, and nothing else
        return None
    return _state(mask, bool(inverted & 1))


def _old_conntrack(info: bytes) -> tuple[Condition, ...] | None:
    """Revision 1, whose masks have one byte."""
    return _conntrack(info[:151] + b"\0" + info[151:])


def _mark(field: Field) -> Callable[[bytes], tuple[Condition, ...]]:
    def read(info: bytes) -> tuple[Condition, ...]:
        mark, mask, inverted = struct.unpack_from("=IIB", info)
        return (equals(_masked(field, mask), _bytes_of(mark), negated=bool(inverted)),)

    return read


def _types(which: str, mask: int, negated: bool) -> list[Condition]:
    numbers = (_bytes_of(number) for number in range(16) if mask >> number & 1)
    ranges = Ranges((number, number) for number in numbers)
    return [Condition(plain(Field(f"fib {which} type")), ranges, negated)] if mask else []


def _addrtype(info: bytes) -> tuple[Condition, ...] | None:
    source, destination, flags = struct.unpack_from("=HHI", info)
    if flags & 0xC:  # limited to a device
        return None
    return (*_types("saddr", source, bool(flags & 1)), *_types("daddr", destination, bool(flags & 2)))


def _old_addrtype(info: bytes) -> tuple[Condition, ...]:
    source, destination, not_source, not_destination = struct.unpack_from("=HHII", info)
    return (*_types("saddr", source, bool(not_source)), *_types("daddr", destination, bool(not_destination)))


def _ports(offset: int, first: int, last: int, negated: bool) -> list[Condition]:
    if (first, last) == (0, 0xFFFF) and not negated:
        return []
    return [Condition(plain(Field("th", 2, offset)), Ranges.one(first, last), negated)]


def _tcp(info: bytes) -> tuple[Condition, ...] | None:
    source, last_source, port, last_port, option, mask, flags, inverted = struct.unpack_from("=HHHHBBBB", info)
    if option:
        return None
    conditions = _ports(0, source, last_source, bool(inverted & 1)) + _ports(2, port, last_port, bool(inverted & 2))
    if mask:
        operand = plain(Field("th", 1, 13), Mask(mask, 0, 1))
        conditions.append(equals(operand, flags, negated=bool(inverted & 4)))
    return tuple(conditions)


def _udp(info: bytes) -> tuple[Condition, ...]:
    source, last_source, port, last_port, inverted = struct.unpack_from("=HHHHB", info)
    return (*_ports(0, source, last_source, bool(inverted & 1)), *_ports(2, port, last_port, bool(inverted & 2)))


_MATCHES: dict[tuple[str, int], Callable[[bytes], tuple[Condition, ...] | None]] = {
    ("comment", 0): lambda _info: (),
    ("state", 0): lambda info: _state(_U32.unpack_from(info)[0], False),
    ("conntrack", 1): _old_conntrack,
    ("conntrack", 2): _conntrack,
    ("conntrack", 3): _conntrack,
    ("mark", 1): _mark(MARK),
    ("connmark", 1): _mark(CT_MARK),
    ("addrtype", 0): _old_addrtype,
    ("addrtype", 1): _addrtype,
    ("tcp", 0): _tcp,
    ("udp", 0): _udp,
}


def target(name: str, revision: int, info: bytes) -> Effect | Verdict | None:
    """What a target does; None when the packet goes on as it is."""
    if name == "MARK" and revision == 2:
        mark, mask = struct.unpack_from("=II", info)
        return Effect(MARK, plain(MARK, Mask(_bytes_of(~mask & _ALL), _bytes_of(mark), 4)))
    if name == "CONNMARK" and revision in (1, 2):
        return _connmark(revision, info)
    if name == "NOTRACK" or (name == "CT" and _U16.unpack_from(info)[0] & 1):  # XT_CT_NOTRACK
        return Effect(CT_STATE, constant(_U32.pack(UNTRACKED)))
    return _ENDS.get(name)


_ENDS = {"REJECT": Verdict("reject"), "DROP": Verdict("drop"), "NFQUEUE": Verdict("queue")}


def _connmark(revision: int, info: bytes) -> Effect:
    mark, mask, packets_mask = struct.unpack_from("=III", info)
    shifted, mode = (0, info[12]) if revision == 1 else (info[13], info[14])
    unknown = plain(Field("target CONNMARK"))
    if mode == 0:
        set_to = plain(CT_MARK, Mask(_bytes_of(~mask & _ALL), _bytes_of(mark), 4))
        return Effect(CT_MARK, unknown if shifted else set_to)
    # Saved or restored whole, as it nearly always is; a mixture of both marks is one nobody knows.
    whole = mask == packets_mask == _ALL and not shifted
    written, read = (CT_MARK, MARK) if mode == 1 else (MARK, CT_MARK)
    return Effect(written, plain(read) if whole else unknown)
