"""IPv4 and IPv6 packets: views of those that came, builders of those to send, and the Internet checksum.

It knows the network layer alone: what a packet carries is for `tcp`, `udp` and `icmp`. A view copies nothing; it lives
as long as the buffer under it. Foreign bytes can cause one error, ProtocolError, whose text says what is wrong.

The checksum (RFC 1071) is a number modulo 0xFFFF, so one division of the bytes read as a single integer gives it: 0.2
µs for a header, 0.15 ms for 64 KiB, a fifth of what adding words takes.
"""

import copy
import struct

from tpvpn.errors import ProtocolError

Bytes = bytes | bytearray | memoryview

HOP_BY_HOP, ICMP4, TCP, UDP, ROUTING, FRAGMENT, ICMP6, NO_NEXT, DESTINATION_OPTIONS = 0, 1, 6, 17, 43, 44, 58, 59, 60
"""Protocol numbers, which are also IPv6's values of "next header"."""
HEADER_LENGTH4, HEADER_LENGTH6 = 20, 40
HOP_LIMIT = 64
_MAX_EXTENSIONS = 8
_DONT_FRAGMENT, _MORE_FRAGMENTS = 0x4000, 0x2000
_SOURCE_ROUTES = (131, 137)  # RFC 791 section 3.1: they choose a way around whatever judges the destination

_HEADER4 = struct.Struct(">BBHHHBBH4s4s")
_HEADER6 = struct.Struct(">IHBB16s16s")
_FRAGMENT = struct.Struct(">BBHI")


class Packet:
    """One IP packet as it came. Fields have the names of the RFCs; offsets and lengths are in bytes."""

    __slots__ = (
        "data",
        "destination",
        "dont_fragment",
        "fragment_offset",
        "header_length",
        "hop_limit",
        "identification",
        "more_fragments",
        "payload",
        "protocol",
        "source",
        "traffic_class",
    )

    def __init__(self, data: memoryview, header_length: int, protocol: int, hop_limit: int, traffic_class: int) -> None:
        self.data = data
        """The whole packet, without what the buffer had behind it."""
        self.header_length = header_length
        """With options or extension headers."""
        self.payload = data[header_length:]
        self.protocol = protocol
        """Of the payload: for IPv6 the last next header."""
        self.hop_limit = hop_limit
        """IPv4's time to live."""
        self.traffic_class = traffic_class
        self.source = b""
        self.destination = b""
        """4 or 16 bytes."""
        self.identification = 0
        self.fragment_offset = 0
        self.more_fragments = False
        self.dont_fragment = True

    @property
    def version(self) -> int:
        """4 or 6."""
        return 4 if len(self.source) == 4 else 6

    @property
    def is_fragment(self) -> bool:
        """The payload is a piece of a larger one: not to be parsed before it is whole."""
        return self.more_fragments or self.fragment_offset > 0

    def quotation(self, most: int) -> "Packet":
        """The same with its first `most` bytes alone, in memory of its own: to be kept for an error that quotes it."""
        kept = copy.copy(self)
        kept.data = memoryview(bytes(self.data[:most]))
        kept.payload = kept.data[self.header_length :]
        return kept


def ones_sum(data: Bytes) -> int:
    """The sum of the 16-bit words in ones' complement, 0 to 0xFFFE; an odd byte at the end is padded with zero."""
    total = int.from_bytes(data, "big")
    return (total << 8 if len(data) & 1 else total) % 0xFFFF


def checksum(data: Bytes, before: int = 0) -> int:
    """The checksum of `data`, to which the sum `before` (a pseudo-header's) is added."""
    # In ones' complement zero is 0xFFFF, unless nothing but zeros was added.
    return -(ones_sum(data) + before) % 0xFFFF or (0 if before or any(data) else 0xFFFF)


def is_valid(data: Bytes, before: int = 0) -> bool:
    """Whether bytes that hold their checksum are what was summed."""
    return (ones_sum(data) + before) % 0xFFFF == 0


def pseudo_sum(source: Bytes, destination: Bytes, protocol: int, length: int) -> int:
    """The sum of the pseudo-header, not complemented (RFC 9293 section 3.1, RFC 8200 section 8.1)."""
    return (ones_sum(source) + ones_sum(destination) + protocol + length) % 0xFFFF


def parse(data: Bytes) -> Packet:
    """The packet at the start of `data`; ProtocolError when it is malformed or carries a source route."""
    if not data:
        raise ProtocolError("an empty packet")
    version = data[0] >> 4
    if version == 4:
        return _parse4(memoryview(data))
    if version == 6:
        return _parse6(memoryview(data))
    raise ProtocolError(f"a packet of IP version {version}")


def _parse4(data: memoryview) -> Packet:
    """RFC 791 section 3.1."""
    if len(data) < HEADER_LENGTH4:
        raise ProtocolError("an IPv4 header cut short")
    first, service, total, identification, fragment, ttl, protocol, _, source, destination = _HEADER4.unpack_from(data)
    length = (first & 15) * 4
    if not HEADER_LENGTH4 <= length <= total <= len(data):
        raise ProtocolError(f"an IPv4 packet of {len(data)} bytes that claims {total}, its header {length}")
    if int.from_bytes(data[:length], "big") % 0xFFFF:
        raise ProtocolError("an IPv4 header with a wrong checksum")
    if length > HEADER_LENGTH4:
        _check_options4(data[HEADER_LENGTH4:length])
    packet = Packet(data[:total], length, protocol, ttl, service)
    packet.source, packet.destination, packet.identification = source, destination, identification
    if fragment != _DONT_FRAGMENT:
        packet.dont_fragment = fragment & _DONT_FRAGMENT != 0
        packet.more_fragments = fragment & _MORE_FRAGMENTS != 0
        packet.fragment_offset = (fragment & 0x1FFF) * 8
        _check_fragment(packet)
    return packet


def _check_options4(options: memoryview) -> None:
    at = 0
    while at < len(options) and options[at] != 0:
        kind = options[at]
        if kind == 1:
            at += 1
            continue
        length = options[at + 1] if at + 1 < len(options) else 0
        if length < 2 or at + length > len(options):
            raise ProtocolError(f"IPv4 option {kind} with an impossible length")
        if kind in _SOURCE_ROUTES:
            raise ProtocolError("an IPv4 packet with a source route")
        at += length


def _check_fragment(packet: Packet) -> None:
    """What no reassembly can use: pieces that would not fit together or reach beyond the largest packet."""
    if packet.more_fragments and (len(packet.payload) % 8 or not packet.payload):
        raise ProtocolError("a fragment in the middle whose length is no multiple of 8")
    if packet.fragment_offset + len(packet.payload) > 0xFFFF:
        raise ProtocolError("a fragment beyond the end of the largest packet")


def _parse6(data: memoryview) -> Packet:
    """RFC 8200 sections 3 and 4; stops at a fragment, whose payload is not whole."""
    if len(data) < HEADER_LENGTH6:
        raise ProtocolError("an IPv6 header cut short")
    first, length, following, hop_limit, source, destination = _HEADER6.unpack_from(data)
    total = HEADER_LENGTH6 + length
    if total > len(data):
        raise ProtocolError(f"an IPv6 packet of {len(data)} bytes that claims {total}")
    packet = Packet(data[:total], HEADER_LENGTH6, following, hop_limit, first >> 20 & 0xFF)
    packet.source, packet.destination = source, destination
    if following not in (TCP, UDP, ICMP6):
        _skip_extensions(packet)
    return packet


def _skip_extensions(packet: Packet) -> None:
    """Walk the extension headers up to the payload."""
    data, at, following = packet.data, HEADER_LENGTH6, packet.protocol
    for _ in range(_MAX_EXTENSIONS):
        if following not in (HOP_BY_HOP, ROUTING, FRAGMENT, DESTINATION_OPTIONS) or packet.is_fragment:
            packet.protocol, packet.header_length, packet.payload = following, at, data[at:]
            if packet.is_fragment:
                _check_fragment(packet)
            return
        if at + 8 > len(data):
            raise ProtocolError(f"IPv6 extension header {following} cut short")
        if following == FRAGMENT:
            following, _, fragment, packet.identification = _FRAGMENT.unpack_from(data, at)
            packet.fragment_offset, packet.more_fragments = fragment & 0xFFF8, fragment & 1 != 0
            packet.dont_fragment = False
            at += 8
            continue
        end = at + 8 + data[at + 1] * 8
        if end > len(data):
            raise ProtocolError(f"IPv6 extension header {following} cut short")
        if following == ROUTING:
            if data[at + 3]:  # RFC 5095: segments left would send it on
                raise ProtocolError("an IPv6 packet with a source route")
        elif following == HOP_BY_HOP and at != HEADER_LENGTH6:
            raise ProtocolError("an IPv6 hop-by-hop header that is not the first")
        else:
            _check_options6(data[at + 2 : end])
        following, at = data[at], end
    raise ProtocolError(f"an IPv6 packet with more than {_MAX_EXTENSIONS} extension headers")


def _check_options6(options: memoryview) -> None:
    """RFC 8200 section 4.2: the two highest bits of an unknown option say whether the packet may be used without it."""
    at = 0
    while at < len(options):
        kind = options[at]
        if kind == 0:
            at += 1
            continue
        if at + 2 > len(options) or at + 2 + options[at + 1] > len(options):
            raise ProtocolError(f"IPv6 option {kind} with an impossible length")
        if kind & 0xC0:
            raise ProtocolError(f"IPv6 option {kind}, which forbids to use the packet without it")
        at += 2 + options[at + 1]


def build(
    source: bytes,
    destination: bytes,
    protocol: int,
    payload: Bytes,
    *,
    hop_limit: int = HOP_LIMIT,
    traffic_class: int = 0,
    identification: int = 0,
    dont_fragment: bool = True,
    fragment_offset: int = 0,
    more_fragments: bool = False,
) -> bytes:
    """One packet, of the addresses' family; for IPv6 a fragment gets its extension header."""
    if len(source) == 4:
        fragment = dont_fragment * _DONT_FRAGMENT | more_fragments * _MORE_FRAGMENTS | fragment_offset // 8
        return (
            header4(source, destination, protocol, len(payload), hop_limit, traffic_class, identification, fragment)
            + payload
        )
    extension = b""
    if fragment_offset or more_fragments:
        extension = _FRAGMENT.pack(protocol, 0, fragment_offset | more_fragments, identification)
        protocol = FRAGMENT
    length = len(extension) + len(payload)
    return header6(source, destination, protocol, length, hop_limit, traffic_class) + extension + payload


def header4(
    source: bytes,
    destination: bytes,
    protocol: int,
    length: int,
    hop_limit: int = HOP_LIMIT,
    traffic_class: int = 0,
    identification: int = 0,
    fragment: int = _DONT_FRAGMENT,
) -> bytes:
    """An IPv4 header without options, before `length` bytes; `fragment`: its flags and offset as they stand there."""
    total = HEADER_LENGTH4 + length
    fields = (0x45, traffic_class, total, identification, fragment, hop_limit, protocol)
    total_sum = checksum(_HEADER4.pack(*fields, 0, source, destination))
    return _HEADER4.pack(*fields, total_sum, source, destination)


def header6(
    source: bytes, destination: bytes, protocol: int, length: int, hop_limit: int = HOP_LIMIT, traffic_class: int = 0
) -> bytes:
    """An IPv6 header before `length` bytes."""
    return _HEADER6.pack(6 << 28 | traffic_class << 20, length, protocol, hop_limit, source, destination)
