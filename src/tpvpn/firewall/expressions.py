"""The expressions of an nf_tables rule, from netlink attributes into the model: a machine with registers, run on names.

It asks the kernel nothing; the contents of sets come from who calls. An expression loads a field into a register or
computes on one; a comparison makes a condition of what the register holds then. What is not known makes a condition
that nobody can read, so a rule never seems to match more or less than it does.

Numbers are those of linux/netfilter/nf_tables.h, integers in attributes big-endian.
"""

import struct
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple

from tpvpn.firewall import xtables
from tpvpn.firewall.model import (
    CT_STATE,
    UNTRACKED,
    Condition,
    Effect,
    Field,
    Mask,
    Operand,
    Piece,
    Ranges,
    Rule,
    Swap,
    Verdict,
    VerdictMap,
    constant,
    equals,
    unreadable,
)
from tpvpn.netlink import parse_attributes

Attributes = dict[int, bytes]


class Contents(NamedTuple):
    """The elements of a set: keys, and of a verdict map their verdicts with the one for any other key."""

    length: int
    """Of a key, in bytes."""
    ranges: Ranges
    verdicts: tuple[Verdict | None, ...] = ()
    default: Verdict | None = None


Lookup = Callable[[str], Contents | None]
"""The contents of a set by its name; None when they cannot be told."""

_META = {
    1: Field("meta protocol", 2), 3: Field("meta mark"), 4: Field("meta iif"), 5: Field("meta oif"),
    6: Field("meta iifname", 16), 7: Field("meta oifname", 16), 8: Field("meta iiftype", 2),
    9: Field("meta oiftype", 2), 10: Field("meta skuid"), 11: Field("meta skgid"),
    15: Field("meta nfproto", 1), 16: Field("meta l4proto", 1),
    17: Field("meta ibrname", 16), 18: Field("meta obrname", 16), 19: Field("meta pkttype", 1),
    21: Field("meta iifgroup"), 22: Field("meta oifgroup"), 23: Field("meta cgroup"), 25: Field("meta ipsec", 1),
    26: Field("meta iifkind", 16), 27: Field("meta oifkind", 16), 30: Field("meta time", 8), 31: Field("meta day", 1),
    34: Field("meta sdifname", 16),
}  # fmt: skip
_CT = {
    0: CT_STATE, 1: Field("ct direction", 1), 2: Field("ct status"), 3: Field("ct mark"), 6: Field("ct helper", 16),
    7: Field("ct l3proto", 1), 10: Field("ct protocol", 1), 17: Field("ct zone", 2),
}  # fmt: skip
_WRITABLE = {("meta", 3), ("ct", 3)}
_FIB_RESULTS = {1: Field("oif"), 2: Field("oifname", 16), 3: Field("type")}
_FIB_SADDR, _FIB_DADDR, _FIB_MARK, _FIB_IIF, _FIB_OIF, _FIB_PRESENT = 1, 2, 4, 8, 16, 32
_PASSING = {"counter", "log", "last", "dup", "ct_helper", "flow_offload", "masq", "nat", "redir", "tproxy"}
"""What changes nothing that is asked for here. Those of NAT end only chains that are not looked at."""
_PASSING_OBJECTS = {1, 3, 7, 8, 9}
"""Counter, helper, timeout, secmark, expectation; quotas and limits let through what they like."""

JUMP, GOTO, RETURN, CONTINUE = -3, -4, -5, -1
_VERDICTS = {0: Verdict("drop"), 1: Verdict("accept"), 3: Verdict("queue"), RETURN: Verdict("return")}


def elements(data: bytes) -> Iterator[bytes]:
    """The values of a list's elements, which all have one type."""
    offset = 0
    while offset + 4 <= len(data):
        length = int.from_bytes(data[offset : offset + 2], _HOST)
        yield data[offset + 4 : offset + length]
        offset += max(length + -length % 4, 4)


_HOST = "little" if struct.pack("=H", 1)[0] else "big"


def number(attributes: Attributes, kind: int, default: int = 0) -> int:
    """An integer attribute."""
    return int.from_bytes(attributes[kind]) if kind in attributes else default


def text(attributes: Attributes, kind: int) -> str:
    """A string attribute; "" when it is missing."""
    return attributes.get(kind, b"").rstrip(b"\0").decode(errors="replace")


def value(data: bytes) -> bytes:
    """The bytes in an attribute that holds one, of the kind NFTA_DATA_VALUE. ValueError when it is a verdict."""
    length, kind = _ATTRIBUTE.unpack_from(data)
    if kind & 0x3FFF != 1:
        raise ValueError("a verdict where a value should be")
    return data[_ATTRIBUTE.size : length]


_ATTRIBUTE = struct.Struct("=HH")


@lru_cache(maxsize=1024)
def verdict(data: bytes) -> Verdict | None:
    """The verdict in an attribute that has one; None for `continue`. KeyError when it is a value."""
    fields = parse_attributes(parse_attributes(data)[2])
    code = struct.unpack("!i", fields[1])[0]
    if code in (JUMP, GOTO):
        return Verdict("jump" if code == JUMP else "goto", text(fields, 2))
    return _VERDICTS.get(code if code < 0 else code & 0xFF)


_INTERVAL, _MAP, _OBJECT, _CONCATENATION = 0x4, 0x8, 0x40, 0x80
_END, _CATCHALL = 1, 2


def contents(fields: Attributes, messages: Iterable[Attributes]) -> Contents | None:
    """The elements of a set from its own attributes and the messages that list them; None for what is not understood.

    An interval set is a list of boundaries: from each on, until the next, keys are in the set, or out of it again.
    """
    flags, length = number(fields, 3), number(fields, 5)
    if flags & _CONCATENATION and flags & _INTERVAL:  # a range for each part of the key
        return None
    verdicts = flags & _MAP and number(fields, 6) == _DATA_VERDICT
    default, everything = None, False
    found: dict[int, tuple[bool, Verdict | None]] = {}
    for message in messages:
        for element in elements(message.get(3, b"")):
            parts = parse_attributes(element)
            kind = number(parts, 3)
            decision = verdict(parts[2]) if verdicts and 2 in parts else None
            if kind & _CATCHALL:
                everything, default = True, decision
                continue
            key = int.from_bytes(value(parts[1]))
            if not kind & _END or key not in found:
                found[key] = (not kind & _END, decision)
    most = (1 << 8 * length) - 1
    if everything and not verdicts:
        return Contents(length, Ranges([(0, most)]))
    keys = sorted(found)
    ends = (key - 1 for key in [*keys[1:], most + 1]) if flags & _INTERVAL else keys
    inside = [(key, end, found[key][1]) for key, end in zip(keys, ends, strict=True) if found[key][0]]
    return Contents(length, Ranges((key, end) for key, end, _ in inside), tuple(v for *_, v in inside), default)


_DATA_VERDICT = 0xFFFFFF00
"""NFT_DATA_VERDICT: the data of a map's elements are verdicts."""


def rule(attributes: Attributes, lookup: Lookup) -> Rule:
    """A rule from the attributes of its message."""
    machine = _Machine(lookup)
    for element in elements(attributes.get(4, b"")):
        # A counter's figures differ in each rule: no use in keeping them parsed.
        if not element.startswith(_COUNTER) and machine.step(element):
            break
    handle = number(attributes, 3)
    comment = _user_comment(attributes.get(7, b"")) or machine.comment
    return Rule(tuple(machine.steps), machine.verdict, handle, comment)


_COUNTER = struct.pack("=HH", 12, 1) + b"counter\0"


def _user_comment(data: bytes) -> str:
    """The comment that nft(8) keeps beside a rule (NFTNL_UDATA_RULE_COMMENT 0): type, length, value."""
    while len(data) >= 2:
        kind, length = data[0], data[1]
        if kind == 0:
            return data[2 : 2 + length].rstrip(b"\0").decode(errors="replace")
        data = data[2 + length :]
    return ""


@lru_cache(maxsize=4096)
def _parsed(element: bytes) -> tuple[str, Attributes]:
    """Name and attributes of an expression; the name comes first (nf_tables_fill_expr_info)."""
    length, _kind = _ATTRIBUTE.unpack_from(element)
    name = element[_ATTRIBUTE.size : length - 1].decode()
    return name, parse_attributes(element[length + -length % 4 + _ATTRIBUTE.size :])


_operand = lru_cache(maxsize=4096)(Operand)
_piece = lru_cache(maxsize=4096)(Piece)
"""Rules ask for the same fields again and again: one value for all of them."""


_REGISTERS = 20
"""Words of 4 bytes, those of the verdict among them."""


def _span(register: int, length: int) -> tuple[int, int]:
    """First word and number of words of a value. ValueError when the registers have no such place.

    NFT_REG_1 to NFT_REG_4 have four words each, NFT_REG32_00 (8) and those after it one.
    """
    word, words = register * 4 if register <= 4 else register - 4, -(-length // 4)
    if not 0 < words <= _REGISTERS - word:
        raise ValueError(f"{length} bytes in register {register}")
    return word, words


class _Machine:
    """The registers, and the rule as far as it has been read."""

    def __init__(self, lookup: Lookup) -> None:
        self._lookup = lookup
        self._registers: dict[int, Piece] = {}
        self._lost = Field("a register")
        """What a register that was not loaded holds."""
        self.steps: list[Condition | Effect] = []
        self.verdict: Verdict | VerdictMap | None = None
        self.comment = ""

    def step(self, element: bytes) -> bool:
        """Run one expression; whether it ended the rule."""
        name, fields = "expression", dict[int, bytes]()
        try:
            name, fields = _parsed(element)
            if name not in _PASSING:
                _HANDLERS[name](self, fields)
        except (KeyError, ValueError, IndexError, struct.error):
            # A kernel that says more than is known here: whatever a register holds now, nobody can tell.
            self._forget(name)
        return self.verdict is not None

    def _forget(self, what: str) -> None:
        self._registers.clear()
        self._lost = Field(what)
        self.steps.append(unreadable(what))

    # -- registers -----------------------------------------------------------------------------------------------------

    def _store(self, register: int, field: Field, *steps: Mask | Swap) -> None:
        word, words = _span(register, field.length)
        for place in range(word + 1, word + words):
            self._registers.pop(place, None)
        self._registers[word] = _piece(field, steps, words)

    def _load(self, register: int, length: int) -> Operand:
        """What the registers hold from this one on."""
        word, words = _span(register, length)
        end = word + words
        whole = self._registers.get(word)
        if whole and whole.words == words and (words == 1 or len(self._registers) == 1):
            return _operand((whole,), length)
        pieces: list[Piece] = []
        while word < end:
            piece = self._registers.get(word) or Piece(self._lost)
            words = 1
            while words < min(piece.words, end - word) and word + words not in self._registers:
                words += 1
            pieces.append(piece if words == piece.words else piece._replace(words=words))
            word += words
        return _operand(tuple(pieces), length)

    def _compute(self, fields: Attributes, step: Mask | Swap, length: int) -> None:
        pieces = self._load(number(fields, 1), length).pieces
        computed = pieces[0] if len(pieces) == 1 else Piece(Field("a computation", length))
        word, words = _span(number(fields, 2), length)
        self._registers[word] = _piece(computed.field, (*computed.steps, step), words)

    # -- expressions that load or compute ------------------------------------------------------------------------------

    def meta(self, fields: Attributes) -> None:
        key = number(fields, 2)
        self._load_or_set("meta", key, _META.get(key) or Field(f"meta key {key}"), fields, 3)

    def ct(self, fields: Attributes) -> None:
        key = number(fields, 2)
        self._load_or_set("ct", key, _CT.get(key) or Field(f"ct key {key}", 16), fields, 4)

    def _load_or_set(self, table: str, key: int, field: Field, fields: Attributes, source: int) -> None:
        if source not in fields:
            self._store(number(fields, 1), field)
        elif (table, key) in _WRITABLE:
            self.steps.append(Effect(field, self._load(number(fields, source), 4)))

    def payload(self, fields: Attributes) -> None:
        if 5 in fields:  # the packet is written to
            return
        base, offset, length = (number(fields, kind) for kind in (2, 3, 4))
        header = {1: "nh", 2: "th"}.get(base)
        self._store(number(fields, 1), Field(header, length, offset) if header else Field("a header", length))

    def fib(self, fields: Attributes) -> None:
        result, flags = number(fields, 2), number(fields, 3)
        which = "saddr" if flags & _FIB_SADDR else "daddr"
        field = _FIB_RESULTS[result]
        if flags & _FIB_PRESENT and result != 3:
            field = Field("present", 1)
        # The type of an address may depend on a device; whether there is a way back does not, it is ours.
        limited = result == 3 and flags & (_FIB_IIF | _FIB_OIF)
        name = f"fib {which} . device {field.name}" if limited else f"fib {which} {field.name}"
        self._store(number(fields, 1), field._replace(name=name))

    def bitwise(self, fields: Attributes) -> None:
        length = number(fields, 3)
        if number(fields, 6):  # shifts, and operations on two registers
            self._store(number(fields, 2), Field("a computation", length))
            return
        mask, flipped = (int.from_bytes(value(fields[kind])) for kind in (4, 5))
        self._compute(fields, Mask(mask, flipped, length), length)

    def byteorder(self, fields: Attributes) -> None:
        size, length = number(fields, 5), number(fields, 4)
        if size not in (2, 4, 8):
            raise ValueError(f"bytes swapped in groups of {size}")
        self._compute(fields, Swap(size), length)

    def immediate(self, fields: Attributes) -> None:
        register = number(fields, 1)
        if register == 0:
            self.verdict = verdict(fields[2])
            return
        (piece,) = constant(value(fields[2])).pieces
        self._store(register, piece.field, *piece.steps)

    # -- expressions that decide ---------------------------------------------------------------------------------------

    def cmp(self, fields: Attributes) -> None:
        data = value(fields[3])
        operator, at = number(fields, 2), int.from_bytes(data)
        operand = self._load(number(fields, 1), len(data))
        if operator <= 1:
            self.steps.append(equals(operand, at, negated=operator == 1))
            return
        most = (1 << 8 * len(data)) - 1
        first, last = ((0, at - 1), (0, at), (at + 1, most), (at, most))[operator - 2]  # lt, lte, gt, gte
        self.steps.append(Condition(operand, Ranges.one(first, last)))

    def range(self, fields: Attributes) -> None:
        first, last = value(fields[3]), value(fields[4])
        ranges = Ranges.one(int.from_bytes(first), int.from_bytes(last))
        self.steps.append(Condition(self._load(number(fields, 1), len(first)), ranges, number(fields, 2) == 1))

    def lookup(self, fields: Attributes) -> None:
        name = text(fields, 1)
        contents = self._lookup(name)
        if contents is None:
            self._forget(f"set {name}")
            return
        operand = self._load(number(fields, 2), contents.length)
        if 3 not in fields:
            self.steps.append(Condition(operand, contents.ranges, bool(number(fields, 5) & 1)))
        elif (register := number(fields, 3)) == 0:
            self.verdict = VerdictMap(operand, contents.ranges, contents.verdicts, contents.default)
        else:  # a value is looked up; without one the rule does not match
            self.steps.append(Condition(operand, contents.ranges))
            self._store(register, Field(f"map {name}", 16))

    def match(self, fields: Attributes) -> None:
        name, info = text(fields, 1), fields[3]
        if name == "comment":
            self.comment = xtables.comment(info)
        self.steps += xtables.match(name, number(fields, 2), info)

    def target(self, fields: Attributes) -> None:
        done = xtables.target(text(fields, 1), number(fields, 2), fields[3])
        if isinstance(done, Effect):
            self.steps.append(done)
        else:
            self.verdict = done

    def reject(self, _fields: Attributes) -> None:
        self.verdict = Verdict("reject")

    def queue(self, _fields: Attributes) -> None:
        self.verdict = Verdict("queue")

    def notrack(self, _fields: Attributes) -> None:
        self.steps.append(Effect(CT_STATE, constant(struct.pack("=I", UNTRACKED))))

    def objref(self, fields: Attributes) -> None:
        if number(fields, 1) not in _PASSING_OBJECTS:
            self.steps.append(unreadable("a limit"))

    def exthdr(self, fields: Attributes) -> None:
        if 7 not in fields:  # else a header is written
            self._store(number(fields, 1), Field("an extension header", number(fields, 4)))


_HANDLERS: dict[str, Callable[[_Machine, Attributes], None]] = {
    name: getattr(_Machine, name)
    for name in (
        "meta", "ct", "payload", "fib", "bitwise", "byteorder", "immediate", "cmp", "range", "lookup", "match",
        "target", "reject", "queue", "notrack", "objref", "exthdr",
    )
}  # fmt: skip
