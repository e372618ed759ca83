"""Blocks of a pcapng file (draft-ietf-opsawg-pcapng): one section, one interface, whose packets begin with IP.

It knows no file: values in, bytes out. Times are in nanoseconds, and each packet has its direction, so that a reader
tells what the interface sent from what it received. Every block is a multiple of four bytes, its length at both ends.
"""

import struct

LINKTYPE_RAW = 101
INBOUND, OUTBOUND = 1, 2
"""Bits 0 and 1 of epb_flags."""
_SECTION, _INTERFACE, _STATISTICS, _ENHANCED_PACKET = 0x0A0D0D0A, 1, 5, 6
_BYTE_ORDER = 0x1A2B3C4D
_NANOSECONDS = b"\x09"
_USER_APPLICATION, _INTERFACE_NAME, _TIME_RESOLUTION, _FLAGS, _RECEIVED, _DROPPED = 4, 2, 9, 2, 4, 5
_END = bytes(4)

_PACKET = struct.Struct("<7I")
_TRAILERS = {
    (direction, padding): bytes(padding) + struct.pack("<HHI", _FLAGS, 4, direction) + _END
    for direction in (INBOUND, OUTBOUND)
    for padding in range(4)
}
_AROUND = _PACKET.size + 12 + 4
"""Bytes of a packet's block that are neither packet nor padding."""


def header(application: str, interface: str, snap_length: int) -> bytes:
    """What a file begins with; `snap_length` 0: packets are whole."""
    section = struct.pack("<IHHq", _BYTE_ORDER, 1, 0, -1) + _option(_USER_APPLICATION, application.encode())
    described = struct.pack("<HHI", LINKTYPE_RAW, 0, snap_length)
    described += _option(_INTERFACE_NAME, interface.encode()) + _option(_TIME_RESOLUTION, _NANOSECONDS)
    return _block(_SECTION, section + _END) + _block(_INTERFACE, described + _END)


def append_packet(to: bytearray, packet: memoryview, length: int, nanoseconds: int, direction: int) -> None:
    """Append a packet's block: of `packet`, which was `length` bytes before it was cut."""
    kept = len(packet)
    padding = -kept & 3
    total = _AROUND + kept + padding
    high, low = nanoseconds >> 32, nanoseconds & 0xFFFFFFFF
    to += _PACKET.pack(_ENHANCED_PACKET, total, 0, high, low, kept, length)
    to += packet
    to += _TRAILERS[direction, padding]
    to += total.to_bytes(4, "little")


def statistics(nanoseconds: int, received: int, dropped: int) -> bytes:
    """The block that ends a section: packets that the interface saw, and those that are missing in the file."""
    counts = _option(_RECEIVED, received.to_bytes(8, "little")) + _option(_DROPPED, dropped.to_bytes(8, "little"))
    return _block(_STATISTICS, struct.pack("<III", 0, nanoseconds >> 32, nanoseconds & 0xFFFFFFFF) + counts + _END)


def whole_blocks(data: memoryview, most: int) -> int:
    """Bytes of the blocks at the start of `data` that fit in `most`."""
    at = 0
    while at < len(data) and (following := at + int.from_bytes(data[at + 4 : at + 8], "little")) <= most:
        at = following
    return at


def _option(code: int, value: bytes) -> bytes:
    return struct.pack("<HH", code, len(value)) + value + bytes(-len(value) & 3)


def _block(kind: int, body: bytes) -> bytes:
    total = (12 + len(body)).to_bytes(4, "little")
    return kind.to_bytes(4, "little") + total + body + total
