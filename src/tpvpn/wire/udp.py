"""UDP datagrams (RFC 768; over IPv6 RFC 8200 section 8.1): parsed out of an IP packet, built into one's payload.

It knows ports, lengths and checksums. Foreign bytes can cause one error, ProtocolError.
"""

import struct
from typing import NamedTuple

from tpvpn.errors import ProtocolError
from tpvpn.wire import ip

HEADER_LENGTH = 8
_HEADER = struct.Struct(">HHHH")


class Datagram(NamedTuple):
    """One datagram; `payload` is a view when it was parsed."""

    source_port: int
    destination_port: int
    payload: ip.Bytes


def parse(packet: ip.Packet, *, checked: bool = False) -> Datagram:
    """The datagram in a whole packet; `checked`: its checksum was left to us by offload, so there is none to verify."""
    data = packet.payload
    if len(data) < HEADER_LENGTH:
        raise ProtocolError("a UDP header cut short")
    source, destination, length, checksum = _HEADER.unpack_from(data)
    if not HEADER_LENGTH <= length <= len(data):
        raise ProtocolError(f"a UDP datagram of {len(data)} bytes that claims {length}")
    if not checked and (checksum or packet.version == 6):  # zero: IPv4's sender computed none
        before = ip.pseudo_sum(packet.source, packet.destination, ip.UDP, length)
        if not checksum or not ip.is_valid(data[:length], before):
            raise ProtocolError("a UDP datagram with a wrong checksum")
    return Datagram(source, destination, data[HEADER_LENGTH:length])


def build(source: bytes, destination: bytes, datagram: Datagram) -> bytes:
    """The payload of an IP packet between these addresses."""
    length = HEADER_LENGTH + len(datagram.payload)
    header = _HEADER.pack(datagram.source_port, datagram.destination_port, length, 0)
    before = ip.pseudo_sum(source, destination, ip.UDP, length) + ip.ones_sum(header)
    checksum = ip.checksum(datagram.payload, before) or 0xFFFF  # zero would say that there is none
    return _HEADER.pack(datagram.source_port, datagram.destination_port, length, checksum) + bytes(datagram.payload)
