"""A packet that was not sent: as much of it as is known beforehand, bit by bit.

It knows no rules. It stands for all packets between the laptop and a subnet: of the subnet's addresses only the prefix
is known, of the ports nothing. What the kernel would not find (the device a packet of our own came in by) is None.
"""

import struct
import sys
from typing import Literal, NamedTuple

from tpvpn.firewall.model import (
    CT_MARK,
    CT_STATE,
    ESTABLISHED,
    IIFNAME,
    INVALID,
    L4PROTO,
    MARK,
    NEW,
    OIFNAME,
    UNTRACKED,
    Effect,
    Field,
    Hook,
    Operand,
    Piece,
    Swap,
)
from tpvpn.route.prefix import BITS, FAMILIES, Prefix

Direction = Literal["out", "in"]
HOOKS_PASSED: dict[Direction, tuple[Hook, Hook]] = {"out": ("output", "postrouting"), "in": ("prerouting", "input")}
_CONNECTION_TRACKING = -200
"""NF_IP_PRI_CONNTRACK: in the hooks by which a packet comes to be, chains before it know no connection."""
_TCP = 6
_PROTOCOLS = {4: 0x0800, 6: 0x86DD}
_ARPHRD_NONE = 0xFFFE
_RTN_UNICAST, _RTN_LOCAL = 1, 2
_SYN = 0x02


class Bits(NamedTuple):
    """A number of `length` bytes of which the bits in `known` are known."""

    value: int
    known: int
    length: int

    def resized(self, length: int) -> "Bits":
        """Its first bytes, or it with zeros behind."""
        shift = 8 * (length - self.length)
        if shift <= 0:
            return Bits(self.value >> -shift, self.known >> -shift, length)
        return Bits(self.value << shift, self.known << shift | (1 << shift) - 1, length)

    def swapped(self, size: int) -> "Bits":
        """With the bytes of each group reversed."""
        return Bits(_swap(self.value, self.length, size), _swap(self.known, self.length, size), self.length)


def _swap(number: int, length: int, size: int) -> int:
    data = number.to_bytes(length)
    return int.from_bytes(b"".join(data[i : i + size][::-1] for i in range(0, length, size)))


def _known(value: bytes) -> Bits:
    return Bits(int.from_bytes(value), (1 << 8 * len(value)) - 1, len(value))


def _u32(value: int) -> Bits:
    return _known(struct.pack("=I", value))  # a register has the host's order


def _u16(value: int) -> Bits:
    return _known(struct.pack("=H", value))


def _text(name: str) -> Bits:
    return _known(name.encode()[:15].ljust(16, b"\0"))


class Packet:
    """A TCP packet of a program without marks, out of the tunnel's device or in by it.

    `own` is the tunnel's own address, None when it is not known yet.
    """

    def __init__(self, direction: Direction, device: str, index: int, own: Prefix | None, subnet: Prefix) -> None:
        self.direction: Direction = direction
        self.version = subnet.version
        self.subnet = subnet
        out = direction == "out"
        self._values: dict[str, Bits | None] = {
            "meta protocol": _known(_PROTOCOLS[self.version].to_bytes(2)),
            "meta nfproto": _known(bytes([FAMILIES[self.version]])),
            L4PROTO.name: _known(bytes([_TCP])),
            "meta pkttype": _known(b"\0"),  # PACKET_HOST
            "meta ipsec": _known(b"\0"),
            MARK.name: _u32(0),
            CT_MARK.name: _u32(0),
            CT_STATE.name: _u32(NEW if out else ESTABLISHED),
            "ct direction": _known(bytes([not out])),
            "ct l3proto": _known(bytes([FAMILIES[self.version]])),
            "ct protocol": _known(bytes([_TCP])),
            "ct zone": _u16(0),
            "fib daddr type": _u32(_RTN_UNICAST if out else _RTN_LOCAL),
            "fib saddr type": _u32(_RTN_LOCAL if out else _RTN_UNICAST),
            # There is a route to the subnet, by our device, also for the reverse path filter.
            f"fib {'daddr' if out else 'saddr'} oif": _u32(index),
            f"fib {'daddr' if out else 'saddr'} oifname": _text(device),
            f"fib {'daddr' if out else 'saddr'} present": _known(b"\1"),
        }
        if out:
            self._values["meta cgroup"] = _u32(0)
        self._devices(out, device, index)
        there = Bits(subnet.network, -1 << BITS[self.version] - subnet.length & _ones(self.version), 0)
        here = Bits(own.network, _ones(self.version), 0) if own else Bits(0, 0, 0)
        self._network = _header(self.version, here if out else there, there if out else here)
        # Of the TCP header only that the first packet is a SYN; 20 bytes.
        self._transport = Bits(_SYN << 48, 0xFF << 48, 20) if out else Bits(0, 0, 20)
        self._tracked = True
        self._cache: dict[Operand, Bits | None] = {}

    def _devices(self, out: bool, device: str, index: int) -> None:
        way, other = ("o", "i") if out else ("i", "o")
        self._values |= {
            (OIFNAME if out else IIFNAME).name: _text(device),
            (IIFNAME if out else OIFNAME).name: _text(""),
            f"meta {way}if": _u32(index),
            f"meta {other}if": _u32(0),
            f"meta {way}iftype": _u16(_ARPHRD_NONE),
            f"meta {other}iftype": None,
            f"meta {way}ifgroup": _u32(0),
            f"meta {other}ifgroup": None,
            f"meta {way}ifkind": _text("tun"),
            f"meta {other}ifkind": None,
        }

    def enter(self, hook: Hook, priority: int) -> None:
        """It has come to a chain at this place."""
        tracked = hook in ("input", "postrouting") or priority >= _CONNECTION_TRACKING
        if tracked != self._tracked:
            self._tracked = tracked
            self._cache.clear()

    def value(self, operand: Operand) -> Bits | None:
        """What is known of the operand; None when the kernel finds nothing, so that no comparison holds."""
        try:
            return self._cache[operand]
        except KeyError:
            found = self._cache[operand] = self._value(operand)
            return found

    def apply(self, effect: Effect, sure: bool) -> None:
        """A rule sets a field, to a value that there is, or may do so."""
        if effect.field == CT_STATE and self._tracked:  # too late for notrack
            return
        new = self.value(effect.operand)
        if not sure and new != self._values.get(effect.field.name):
            new = Bits(0, 0, effect.field.length)
        self._values[effect.field.name] = new
        self._cache.clear()

    def _value(self, operand: Operand) -> Bits | None:
        value = known = length = 0
        for piece in operand.pieces:
            part = self._piece(piece)
            if part is None:
                return None
            value = value << 8 * part.length | part.value
            known = known << 8 * part.length | part.known
            length += part.length
        return Bits(value, known, length).resized(operand.length)

    def _piece(self, piece: Piece) -> Bits | None:
        bits = self._field(piece.field)
        if bits is None:
            return None
        for step in piece.steps:
            if isinstance(step, Swap):
                bits = bits.swapped(step.size) if sys.byteorder == "little" else bits
            else:
                value, known, length = bits.resized(step.length)
                all_bits = (1 << 8 * length) - 1
                bits = Bits(value & step.mask ^ step.flipped, known | all_bits ^ step.mask, length)
        return bits.resized(4 * piece.words)

    def _field(self, field: Field) -> Bits | None:
        unknown = Bits(0, 0, field.length)
        if field.name in ("nh", "th"):
            header = self._network if field.name == "nh" else self._transport
            left = header.length - field.offset
            if left < field.length:
                return unknown
            kept = (1 << 8 * left) - 1
            return Bits(header.value & kept, header.known & kept, left).resized(field.length)
        if field.name.startswith("ct "):
            return self._connection(field, unknown)
        return self._values.get(field.name, unknown)

    def _connection(self, field: Field, unknown: Bits) -> Bits | None:
        state = self._values[CT_STATE.name]
        if state == _u32(UNTRACKED):
            return state if field == CT_STATE else None
        if state is None or not state.known:  # perhaps untracked
            return unknown
        if not self._tracked:
            return _u32(INVALID) if field == CT_STATE else None
        return self._values.get(field.name, unknown)


def _ones(version: int) -> int:
    return (1 << BITS[version]) - 1


def _header(version: int, source: Bits, destination: Bits) -> Bits:
    """The network header: version, protocol and addresses, and that it is no fragment."""
    bits = BITS[version]
    value = source.value << bits | destination.value
    known = source.known << bits | destination.known
    if version == 4:
        # Version and length, 5 bytes unknown, flags and offset of fragments but for DF, TTL, protocol, checksum.
        value |= int.from_bytes(b"\x45\0\0\0\0\0\0\0\0" + bytes([_TCP]) + b"\0\0") << 64
        known |= int.from_bytes(b"\xff\0\0\0\0\0\x3f\xff\0\xff\0\0") << 64
        return Bits(value, known, 20)
    value |= int.from_bytes(b"\x60\0\0\0\0\0" + bytes([_TCP]) + b"\0") << 256
    known |= int.from_bytes(b"\xf0\0\0\0\0\0\xff\0") << 256
    return Bits(value, known, 40)
