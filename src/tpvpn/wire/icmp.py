"""ICMP of both families (RFC 792, RFC 4443): echo, and the errors that speak of another packet.

It knows formats, and which packets no error may be sent about; when to send one is decided elsewhere. Foreign bytes
can cause one error, ProtocolError.
"""

import enum
import struct
from typing import NamedTuple

from tpvpn.errors import ProtocolError
from tpvpn.wire import ip

HEADER_LENGTH = 8
_HEADER = struct.Struct(">BBHI")
ECHO_REPLY4, ECHO_REQUEST4 = 0, 8
ECHO_REQUEST6, ECHO_REPLY6 = 128, 129
_ERRORS4 = (3, 4, 5, 11, 12)
_LARGEST_ERROR4, _LARGEST_ERROR6 = 576, 1280  # RFC 1812 section 4.3.2.3, RFC 4443 section 2.4 (c)
MOST_QUOTED = _LARGEST_ERROR6 - ip.HEADER_LENGTH6 - HEADER_LENGTH
"""Bytes of a packet that an error has room for."""


class Error(enum.Enum):
    """What can be said of a packet: type and code in ICMPv4, then in ICMPv6."""

    NO_ROUTE = ((3, 0), (1, 0))
    HOST_UNREACHABLE = ((3, 1), (1, 3))
    PROTOCOL_UNREACHABLE = ((3, 2), (4, 1))
    PORT_UNREACHABLE = ((3, 3), (1, 4))
    PROHIBITED = ((3, 13), (1, 1))
    TOO_BIG = ((3, 4), (2, 0))
    TIME_EXCEEDED = ((11, 0), (3, 0))
    REASSEMBLY_TIME_EXCEEDED = ((11, 1), (3, 1))


class Message(NamedTuple):
    """One message; `word`: the second half of its header (echo: identifier and sequence; too big: the MTU)."""

    type: int
    code: int
    word: int
    body: ip.Bytes

    @property
    def identifier(self) -> int:
        """Of an echo."""
        return self.word >> 16

    @property
    def sequence(self) -> int:
        """Of an echo."""
        return self.word & 0xFFFF


def parse(packet: ip.Packet, *, checked: bool = False) -> Message:
    """The message in a whole packet of either family."""
    data = packet.payload
    if packet.protocol != (ip.ICMP4 if packet.version == 4 else ip.ICMP6):
        raise ProtocolError("ICMP of the other family")
    if len(data) < HEADER_LENGTH:
        raise ProtocolError("an ICMP message cut short")
    if not checked and not ip.is_valid(data, _before(packet.source, packet.destination, len(data))):
        raise ProtocolError("an ICMP message with a wrong checksum")
    kind, code, _, word = _HEADER.unpack_from(data)
    return Message(kind, code, word, data[HEADER_LENGTH:])


def build(source: bytes, destination: bytes, message: Message) -> bytes:
    """The payload of an IP packet between these addresses."""
    data = _HEADER.pack(message.type, message.code, 0, message.word) + bytes(message.body)
    checksum = ip.checksum(data, _before(source, destination, len(data)))
    return data[:2] + checksum.to_bytes(2, "big") + data[4:]


def is_echo_request(packet: ip.Packet, message: Message) -> bool:
    """Whether it asks for an echo."""
    return message.type == (ECHO_REQUEST4 if packet.version == 4 else ECHO_REQUEST6) and message.code == 0


def echo_reply(request: Message, version: int) -> Message:
    """The answer to an echo request."""
    return request._replace(type=ECHO_REPLY4 if version == 4 else ECHO_REPLY6)


def build_error(error: Error, offending: ip.Packet, speaker: bytes, *, mtu: int = 0) -> bytes | None:
    """A packet from `speaker` to the offending one's source that quotes it; None when no error may be sent about it."""
    if not _may_be_reported(error, offending):
        return None
    kind, code = error.value[0 if offending.version == 4 else 1]
    if offending.version == 4:
        room = _LARGEST_ERROR4 - ip.HEADER_LENGTH4 - HEADER_LENGTH
    else:
        room = _LARGEST_ERROR6 - ip.HEADER_LENGTH6 - HEADER_LENGTH
    # What follows protocol-unreachable of ICMPv6 points to the next header that was not known: the fixed header's.
    word = mtu if error is Error.TOO_BIG else 6 if (kind, code) == (4, 1) else 0
    message = Message(kind, code, word, offending.data[:room])
    protocol = ip.ICMP4 if offending.version == 4 else ip.ICMP6
    payload = build(speaker, offending.source, message)
    return ip.build(speaker, offending.source, protocol, payload, dont_fragment=False)


def _may_be_reported(error: Error, packet: ip.Packet) -> bool:
    """RFC 1122 section 3.2.2 and RFC 4443 section 2.4 (e): never about an error, a later fragment, or many hosts."""
    if packet.fragment_offset or not any(packet.source):
        return False
    if packet.version == 4:
        # 240/4 is where sessions have their addresses.
        many = packet.source[0] & 0xF0 == 224 or packet.destination[0] & 0xF0 == 224
        if many or b"\xff\xff\xff\xff" in (packet.source, packet.destination):
            return False
        return packet.protocol != ip.ICMP4 or (bool(packet.payload) and packet.payload[0] not in _ERRORS4)
    if packet.source[0] == 0xFF or (packet.destination[0] == 0xFF and error is not Error.TOO_BIG):
        return False
    return packet.protocol != ip.ICMP6 or (bool(packet.payload) and packet.payload[0] >= 128)


def _before(source: bytes, destination: bytes, length: int) -> int:
    """ICMPv6 sums a pseudo-header too (RFC 4443 section 2.3)."""
    return ip.pseudo_sum(source, destination, ip.ICMP6, length) if len(source) == 16 else 0
