"""The virtio-net header that precedes each packet when both ends agreed on offload (struct virtio_net_hdr, 10 bytes).

Layout (linux/virtio_net.h; little-endian, as VIRTIO 1.2 section 5.1.6 fixes it and as each machine we meet has it):
flags u8, gso_type u8, hdr_len u16, gso_size u16, csum_start u16, csum_offset u16.
"""

import enum
import struct
from typing import NamedTuple

from tpvpn.errors import ProtocolError

HEADER_LENGTH = 10
_FORMAT = struct.Struct("<BBHHHH")

NEEDS_CHECKSUM = 1
GSO_NONE, GSO_TCP4, GSO_TCP6, GSO_UDP = 0, 1, 4, 5
GSO_ECN = 0x80
_TCP = 6
_CUT = {GSO_TCP4: (4, _TCP), GSO_TCP6: (6, _TCP)}
"""IP version and protocol of what a receiver without UDP's offloads takes uncut."""


class Offload(enum.IntFlag):
    """What an end takes unsegmented: the TUN_F_* bits of linux/if_tun.h, which are also the wire's names."""

    CHECKSUM = 0x01
    TSO4 = 0x02
    TSO6 = 0x04
    ECN = 0x08
    USO4 = 0x20
    USO6 = 0x40
    ALL = CHECKSUM | TSO4 | TSO6 | ECN | USO4 | USO6


def names(offloads: Offload) -> list[str]:
    """The wire's names of a set of offloads: ["checksum", "tso4", …]."""
    return [str(flag.name).lower() for flag in Offload.ALL if flag in offloads]


def from_names(given: list[str]) -> Offload:
    """The set that these names mean; unknown names are a newer peer's and are left out."""
    known = {str(flag.name).lower(): flag for flag in Offload.ALL}
    offloads = Offload(0)
    for name in given:
        offloads |= known.get(name, Offload(0))
    return offloads


class Header(NamedTuple):
    """One virtio-net header; sizes and offsets in bytes from the start of the IP packet."""

    flags: int = 0
    gso_type: int = GSO_NONE
    header_length: int = 0
    gso_size: int = 0
    checksum_start: int = 0
    checksum_offset: int = 0

    def pack(self) -> bytes:
        """The header's 10 bytes."""
        return _FORMAT.pack(*self)

    @classmethod
    def unpack(cls, data: bytes | bytearray | memoryview, offset: int = 0) -> "Header":
        """The header at `offset`; struct.error when fewer than 10 bytes are there."""
        return cls(*_FORMAT.unpack_from(data, offset))

    def leaves_checksum(self, version: int, protocol: int, length: int) -> bool:
        """Whether a packet's checksum was left to the receiver, who agreed on no offloads but TCP's.

        ProtocolError for what a kernel refuses too (virtio_net_hdr_to_skb in linux/virtio_net.h).
        """
        kind = self.gso_type & ~GSO_ECN
        if kind != GSO_NONE and (not self.gso_size or _CUT.get(kind) != (version, protocol)):
            raise ProtocolError(f"a virtio-net header that cuts protocol {protocol} as {kind} by {self.gso_size}")
        if not self.flags & NEEDS_CHECKSUM:
            return False
        if self.checksum_start + self.checksum_offset + 2 > length:
            raise ProtocolError(f"a virtio-net header whose checksum is beyond a packet of {length} bytes")
        return True


EMPTY = bytes(HEADER_LENGTH)
"""The header of a packet that is whole and has its checksum."""
