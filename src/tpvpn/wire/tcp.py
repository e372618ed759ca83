"""TCP segments (RFC 9293 section 3.1): views of those that came, and a writer that makes packets of those to send.

It knows formats, not connections (`proto/tcp`). A segment is up to 64 KiB in one piece, both ways, where offload was
agreed: then its virtio-net header asks the other end's kernel to cut it to `mss` and to add the checksum, of which we
leave the pseudo-header's sum (VIRTIO 1.2 section 5.1.6.2). Foreign bytes can cause one error, ProtocolError.
Options: MSS (RFC 9293), window scale and timestamps (RFC 7323), SACK (RFC 2018).
"""

import struct

from tpvpn.errors import ProtocolError
from tpvpn.wire import ip, vnet

HEADER_LENGTH = 20
FIN, SYN, RST, PSH, ACK, URG, ECE, CWR = 1, 2, 4, 8, 16, 32, 64, 128
TIMESTAMP_LENGTH = 12
"""Bytes that a timestamp takes in each segment, with its padding."""
MAX_SACK_BLOCKS = 4
LARGEST_PACKET = 65_535

_HEADER = struct.Struct(">IIBBH")
_TIMESTAMP = struct.Struct(">III")
_TWO = struct.Struct(">II")
_VNET = struct.Struct("<BBHHHH")
_IP4 = struct.Struct(">IxxHHH4s4s")
_IP6 = struct.Struct(">IHH16s16s")
_TCP = struct.Struct(">IIIHHHH")
_NOP_NOP_TIMESTAMP = 0x0101080A


class Segment:
    """One segment; numbers modulo 2**32, `window` as it stands in the header (not scaled), options None when absent."""

    __slots__ = (
        "ack",
        "flags",
        "mss",
        "payload",
        "sack_blocks",
        "sack_permitted",
        "seq",
        "timestamp",
        "timestamp_echo",
        "window",
        "window_scale",
    )

    def __init__(
        self,
        seq: int,
        ack: int,
        flags: int,
        window: int,
        payload: ip.Bytes = b"",
        timestamp: int | None = None,
        timestamp_echo: int = 0,
    ) -> None:
        self.seq = seq
        self.ack = ack
        self.flags = flags
        self.window = window
        self.payload = payload
        self.timestamp = timestamp
        self.timestamp_echo = timestamp_echo
        self.mss: int | None = None
        self.window_scale: int | None = None
        self.sack_permitted = False
        self.sack_blocks: tuple[tuple[int, int], ...] = ()

    def __repr__(self) -> str:
        names = "".join(letter for bit, letter in zip((2, 16, 1, 4, 8), "SAFRP", strict=True) if self.flags & bit)
        return f"<{names or '-'} seq {self.seq} ack {self.ack} window {self.window} length {len(self.payload)}>"


def ports(payload: ip.Bytes) -> tuple[int, int]:
    """Source and destination port of a TCP or UDP payload; ProtocolError when it is shorter than these."""
    if len(payload) < 4:
        raise ProtocolError("a TCP header cut short")
    return payload[0] << 8 | payload[1], payload[2] << 8 | payload[3]


def parse(packet: ip.Packet, *, checked: bool = False) -> Segment:
    """The segment in a whole packet; `checked`: its checksum was left to us by offload, so there is none to verify."""
    data = packet.payload
    if len(data) < HEADER_LENGTH:
        raise ProtocolError("a TCP header cut short")
    seq, ack, offset, flags, window = _HEADER.unpack_from(data, 4)
    offset = (offset >> 4) * 4
    if not HEADER_LENGTH <= offset <= len(data):
        raise ProtocolError(f"a TCP segment of {len(data)} bytes whose header claims {offset}")
    if not checked:
        before = ip.pseudo_sum(packet.source, packet.destination, ip.TCP, len(data))
        if (int.from_bytes(data, "big") << 8 * (len(data) & 1)) % 0xFFFF + before not in (0, 0xFFFF):
            raise ProtocolError("a TCP segment with a wrong checksum")
    segment = Segment(seq, ack, flags, window, data[offset:])
    if offset == 32:
        first, value, echo = _TIMESTAMP.unpack_from(data, 20)
        if first == _NOP_NOP_TIMESTAMP:
            segment.timestamp, segment.timestamp_echo = value, echo
            return segment
    if offset > HEADER_LENGTH:
        _parse_options(segment, bytes(data[HEADER_LENGTH:offset]))
    return segment


def _parse_options(segment: Segment, options: bytes) -> None:
    at, end = 0, len(options)
    while at < end and options[at] != 0:
        kind = options[at]
        if kind == 1:
            at += 1
            continue
        length = options[at + 1] if at + 1 < end else 0
        if length < 2 or at + length > end:
            raise ProtocolError(f"TCP option {kind} with an impossible length")
        _take_option(segment, kind, options[at + 2 : at + length])
        at += length


def _take_option(segment: Segment, kind: int, value: bytes) -> None:
    """Unknown options are skipped, and those of SYN alone elsewhere (RFC 9293 section 3.2)."""
    syn = segment.flags & SYN
    if kind == 2 and syn and len(value) == 2:
        segment.mss = int.from_bytes(value, "big")
    elif kind == 3 and syn and len(value) == 1:
        segment.window_scale = min(value[0], 14)  # RFC 7323 section 2.3
    elif kind == 4 and syn and not value:
        segment.sack_permitted = True
    elif kind == 5 and value and len(value) % 8 == 0 and not syn:
        segment.sack_blocks = tuple(_TWO.iter_unpack(value))
    elif kind == 8 and len(value) == 8:
        segment.timestamp, segment.timestamp_echo = _TWO.unpack(value)
    elif kind in (2, 3, 4, 5, 8) and not (kind < 6 and bool(syn) == (kind == 5)):
        raise ProtocolError(f"TCP option {kind} with a length of {len(value) + 2}")


def options_of(segment: Segment) -> bytes:
    """The segment's options, padded to whole words; as many SACK blocks as fit into 40 bytes."""
    if segment.timestamp is None:
        timestamp = b""
    else:
        timestamp = _TIMESTAMP.pack(_NOP_NOP_TIMESTAMP, segment.timestamp, segment.timestamp_echo)
    if segment.flags & SYN:
        options = b"" if segment.mss is None else struct.pack(">BBH", 2, 4, segment.mss)
        if segment.sack_permitted:
            options += b"\x01\x01\x04\x02"
        if segment.window_scale is not None:
            options += bytes((1, 3, 3, segment.window_scale))
        return options + timestamp
    if segment.sack_blocks:
        blocks = segment.sack_blocks[: 3 if timestamp else MAX_SACK_BLOCKS]
        return timestamp + bytes((1, 1, 5, 2 + 8 * len(blocks))) + b"".join(_TWO.pack(*block) for block in blocks)
    return timestamp


class Writer:
    """Writes the segments of one flow as whole IP packets from `source` to `destination`.

    With `offload` each packet is preceded by its virtio-net header, and its checksum is left to the other end's kernel.
    What is the same in every packet of a flow is prepared once.
    """

    __slots__ = ("_before", "_destination", "_gso_type", "_header_sum", "_ip_length", "_ports", "_pseudo", "_source")

    def __init__(
        self, source: bytes, source_port: int, destination: bytes, destination_port: int, *, offload: bool
    ) -> None:
        self._source, self._destination = source, destination
        self._ports = source_port << 16 | destination_port
        self._before = vnet.HEADER_LENGTH if offload else 0
        self._ip_length = ip.HEADER_LENGTH4 if len(source) == 4 else ip.HEADER_LENGTH6
        self._gso_type = vnet.GSO_TCP4 if len(source) == 4 else vnet.GSO_TCP6
        self._pseudo = ip.pseudo_sum(source, destination, ip.TCP, 0)
        self._header_sum = ip.ones_sum(ip.header4(source, destination, ip.TCP, 0)[:10]) if len(source) == 4 else 0
        self._header_sum += ip.ones_sum(source) + ip.ones_sum(destination) - ip.HEADER_LENGTH4

    def write(self, buffer: bytearray | memoryview, at: int, segment: Segment, mss: int) -> int:
        """Put the packet into `buffer` from `at`, which must have room; where it ends.

        `mss`: bytes of payload that one packet on the wire may carry (`Connection.send_mss`).
        """
        before, ip_length, payload = self._before, self._ip_length, segment.payload
        size = len(payload)
        if segment.flags & SYN or segment.sack_blocks:
            options = options_of(segment)
            header_length = HEADER_LENGTH + len(options)
        else:
            options = b""
            header_length = HEADER_LENGTH if segment.timestamp is None else HEADER_LENGTH + TIMESTAMP_LENGTH
        length = header_length + size
        pseudo = (self._pseudo + length) % 0xFFFF
        at_ip = at + before
        at_tcp = at_ip + ip_length
        end = at_tcp + length
        if before:
            if size > mss:
                gso, gso_size = self._gso_type, mss
            else:
                gso, gso_size = vnet.GSO_NONE, 0
            headers = ip_length + header_length
            _VNET.pack_into(buffer, at, vnet.NEEDS_CHECKSUM, gso, headers, gso_size, ip_length, 16)
        if ip_length == ip.HEADER_LENGTH4:
            total = ip_length + length
            checksum = -(self._header_sum + total) % 0xFFFF
            _IP4.pack_into(buffer, at_ip, 0x45000000 | total, 0x4000, 0x4006, checksum, self._source, self._destination)
        else:
            _IP6.pack_into(buffer, at_ip, 6 << 28, length, 0x0640, self._source, self._destination)
        flags = header_length << 10 | segment.flags
        _TCP.pack_into(buffer, at_tcp, self._ports, segment.seq, segment.ack, flags, segment.window, pseudo, 0)
        if options:
            buffer[at_tcp + HEADER_LENGTH : at_tcp + header_length] = options
        elif segment.timestamp is not None:
            _TIMESTAMP.pack_into(
                buffer, at_tcp + HEADER_LENGTH, _NOP_NOP_TIMESTAMP, segment.timestamp, segment.timestamp_echo
            )
        if size:
            buffer[end - size : end] = payload
        if not before:  # with what stands in the checksum's place, the pseudo-header is in the sum
            checksum = ip.checksum(memoryview(buffer)[at_tcp:end])
            buffer[at_tcp + 16 : at_tcp + 18] = checksum.to_bytes(2, "big")
        return end
