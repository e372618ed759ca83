"""Packets that no honest laptop sends, from a seed: valid ones of every kind, then bent, for a session at an exit.

What the exit answers is answered in turn, so that connections are open when the bent packets come. It knows nothing of
the exit: bytes out, bytes in.
"""

import random
import struct
from collections import deque
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address

from tpvpn.wire import vnet

TCP, UDP, ICMP4, ICMP6 = 6, 17, 1, 58
SYN, RST, ACK, FIN = 2, 4, 16, 1
PORTS = (8080, 9000, 53, 81, 0, 65535)
"""An echo of TCP, one of UDP, and where nobody listens."""


def checksum(*parts: bytes) -> int:
    """RFC 1071."""
    data = b"".join(parts)
    data += bytes(len(data) % 2)
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def padding(length: int) -> bytes:
    """Options of IPv6 that say nothing: PadN, up to 257 bytes each (RFC 8200 section 4.2)."""
    options = b""
    while (left := length - len(options)) > 1:
        size = min(left, 257)
        options += bytes((1, size - 2)) + bytes(size - 2)
    return options + bytes(length - len(options))


class Packets:
    """Payloads of packet frames from the client that has the addresses `own`, mostly to `targets`."""

    def __init__(self, seed: int, own: tuple[str, str], targets: tuple[str, ...], *, offload: bool) -> None:
        self._chance = random.Random(seed)
        self._own = {4: IPv4Address(own[0]).packed, 6: IPv6Address(own[1]).packed}
        self._targets: dict[int, list[bytes]] = {4: [], 6: []}
        strange = ("0.0.0.0", "127.0.0.1", "224.0.0.1", "255.255.255.255", "169.254.169.254", "203.0.113.9", own[0],
                   "::", "::1", "ff02::1", "fe80::1", "::ffff:127.0.0.1", "fd00:dead::1", own[1])  # fmt: skip
        for text in (*targets * 8, *strange):
            version = 6 if ":" in text else 4
            self._targets[version].append((IPv6Address if version == 6 else IPv4Address)(text).packed)
        self._offload = offload
        self._heard: deque[bytes] = deque(maxlen=64)
        self._pieces: deque[bytes] = deque()
        self._kinds: tuple[Callable[[int], tuple[int, bytes, bytes]], ...] = (
            *(self._syn,) * 3, self._segment, self._answer, self._answer, self._answer, self._datagram, self._datagram,
            self._echo, self._error, self._other,
        )  # fmt: skip

    def hear(self, payload: bytes) -> None:
        """The exit sent this packet frame."""
        self._heard.append(payload[vnet.HEADER_LENGTH :] if self._offload else payload)

    def next(self) -> bytes:
        """One payload more."""
        chance = self._chance
        if self._pieces:
            packet = self._pieces.popleft()
        else:
            version = chance.choice((4, 6))
            protocol, destination, body = chance.choice(self._kinds)(version)
            if chance.random() < 0.05:
                self._cut(version, protocol, destination, body)
                return self.next()
            packet = self._wrap(version, protocol, destination, body)
        if chance.random() < 0.4:
            packet = self._bend(packet)
        packet = packet[:65_535]
        return (self._header(packet) + packet) if self._offload else packet

    # -- what is in a packet -------------------------------------------------------------------------------------------

    def _target(self, version: int) -> bytes:
        return self._chance.choice(self._targets[version])

    def _port(self) -> int:
        return self._chance.choice(PORTS)

    def _payload(self) -> bytes:
        most = self._chance.choice((0, 0, 1, 20, 1400, 30_000 if self._offload else 1400))
        return self._chance.randbytes(self._chance.randint(0, most))

    def _syn(self, version: int) -> tuple[int, bytes, bytes]:
        target, chance = self._target(version), self._chance
        options = chance.choice((b"", b"\x02\x04\x05\xb4", b"\x02\x04\x00\x01", b"\x03\x03\x0e\x00", self._options()))
        flags = chance.choice((SYN,) * 6 + (SYN | FIN, SYN | RST, SYN | ACK))
        body = self._tcp(chance.randint(1000, 1200), self._port(), chance.getrandbits(32), 0, flags, options)
        return TCP, target, self._sum(version, TCP, target, body + self._payload() * chance.choice((0, 0, 0, 1)), 16)

    def _segment(self, version: int) -> tuple[int, bytes, bytes]:
        target, chance = self._target(version), self._chance
        seq, ack = chance.getrandbits(32), chance.getrandbits(32)
        body = self._tcp(chance.randint(1000, 1200), self._port(), seq, ack, chance.getrandbits(6), self._options())
        return TCP, target, self._sum(version, TCP, target, body + self._payload(), 16)

    def _answer(self, version: int) -> tuple[int, bytes, bytes]:
        """To a segment that was heard: what an honest client would say, or nearly."""
        heard = self._chance.choice(self._heard) if self._heard else b""
        at = 20 if version == 4 else 40
        protocol = heard[9 if version == 4 else 6] if len(heard) >= at + 20 else 0
        if protocol != TCP or heard[0] >> 4 != version:
            return self._syn(version)
        source, destination, seq, ack, offset, flags, _ = struct.unpack_from(">HHIIBBH", heard, at)
        target = heard[12:16] if version == 4 else heard[8:24]
        length = len(heard) - at - (offset >> 4) * 4 + bool(flags & SYN) + bool(flags & FIN)
        chance = self._chance
        seq_off, ack_off = (chance.choice((0, 0, 0, 0, -1, 1, 1000, 1 << 31, chance.getrandbits(32))) for _ in range(2))
        said = chance.choice((ACK,) * 6 + (ACK | FIN, RST, RST | ACK, 0, SYN, 0x3F))
        body = self._tcp(
            destination, source, (ack + seq_off) & 0xFFFFFFFF, (seq + length + ack_off) & 0xFFFFFFFF, said,
            self._options() if chance.random() < 0.2 else b"",
        )  # fmt: skip
        return TCP, target, self._sum(version, TCP, target, body + self._payload(), 16)

    def _tcp(self, source: int, port: int, seq: int, ack: int, flags: int, options: bytes) -> bytes:
        options += bytes(-len(options) % 4)
        window = self._chance.choice((0, 1, 65535, self._chance.getrandbits(16)))
        return (
            struct.pack(">HHIIBBHHH", source, port, seq, ack, (5 + len(options) // 4) << 4, flags, window, 0, 0)
            + options
        )

    def _options(self) -> bytes:
        """Of TCP: known kinds with any length, and anything."""
        chance, options = self._chance, b""
        for _ in range(chance.randint(0, 5)):
            kind, length = chance.choice((0, 1, 2, 3, 4, 5, 8, 254)), chance.choice((0, 1, 2, 3, 4, 10, 18, 255))
            options += bytes((kind, length)) + chance.randbytes(min(length, 10))
        return options[: chance.choice((0, 4, 8, 12, 40))]

    def _datagram(self, version: int) -> tuple[int, bytes, bytes]:
        target, payload = self._target(version), self._payload()
        length = self._chance.choice((8 + len(payload),) * 6 + (0, 7, 65535))
        body = struct.pack(">HHHH", self._chance.randint(2000, 2050), self._port(), length, 0) + payload
        return UDP, target, self._sum(version, UDP, target, body, 6)

    def _echo(self, version: int) -> tuple[int, bytes, bytes]:
        target, kind = (
            self._target(version),
            self._chance.choice((8, 0, 13, 17) if version == 4 else (128, 129, 135, 3)),
        )
        protocol = ICMP4 if version == 4 else ICMP6
        body = struct.pack(">BBHHH", kind, 0, 0, self._chance.randint(0, 20), 1) + self._payload()
        return protocol, target, self._sum(version, protocol, target, body, 2)

    def _error(self, version: int) -> tuple[int, bytes, bytes]:
        """An ICMP error that quotes what was heard, or nonsense."""
        target, protocol = self._target(version), ICMP4 if version == 4 else ICMP6
        quoted = self._chance.choice(self._heard) if self._heard else self._chance.randbytes(40)
        if quoted and self._chance.random() < 0.2:
            quoted = self._chance.choice((b"\x40", b"\x41", b"\x4f", b"\x60")) + quoted[1:]
        kind, code = self._chance.choice(
            ((3, 3), (3, 3), (1, 4), (3, 4), (11, 0), (12, 0), (5, 1), (1, 4), (2, 0), (4, 1))
        )
        body = struct.pack(">BBHI", kind, code, 0, self._chance.getrandbits(32))
        body += quoted[: self._chance.choice((self._chance.randint(0, 50), 576))]
        return protocol, target, self._sum(version, protocol, target, body, 2)

    def _other(self, version: int) -> tuple[int, bytes, bytes]:
        return self._chance.choice((0, 2, 43, 44, 47, 50, 51, 59, 60, 132, 255)), self._target(version), self._payload()

    def _sum(self, version: int, protocol: int, target: bytes, body: bytes, at: int) -> bytes:
        """The body with its checksum, which is at `at`."""
        pseudo = b"" if protocol == ICMP4 else self._own[version] + target + struct.pack(">II", len(body), protocol)
        return body[:at] + struct.pack(">H", checksum(pseudo, body)) + body[at + 2 :]

    # -- around it -----------------------------------------------------------------------------------------------------

    def _wrap(self, version: int, protocol: int, target: bytes, body: bytes) -> bytes:
        chance = self._chance
        hops = chance.choice((64,) * 8 + (0, 1, 2))
        fragment = chance.random() < 0.1
        offset = chance.choice((0, 0, 1, 2, 185, 8191)) if fragment else 0
        more = chance.getrandbits(1) if fragment else 0
        identification = chance.randint(0, 8)
        if version == 4:
            options = chance.randbytes(chance.choice((4, 8, 40))) if chance.random() < 0.05 else b""
            words = (0x45 + len(options) // 4, 0, (20 + len(options) + len(body)) & 0xFFFF, identification)
            header = struct.pack(">BBHHHBBH", *words, more << 13 | offset, hops, protocol, 0)
            header += self._own[4] + target + options
            return header[:10] + struct.pack(">H", checksum(header)) + header[12:] + body
        extensions = b""
        if fragment:
            extensions = struct.pack(">BBHI", protocol, 0, offset << 3 | more, identification)
            protocol = 44
        for _ in range(chance.choice((0,) * 8 + (1, 2, 9))):
            extensions = bytes((protocol, chance.choice((0, 0, 0, 1, 255)))) + chance.randbytes(6) + extensions
            protocol = chance.choice((0, 43, 60, 51))
        for _ in range(chance.choice((0,) * 12 + (1, 2, 7))):  # nothing is wrong with these but their length
            units = chance.choice((0, 1, 160, 255))
            extensions = bytes((protocol, units)) + padding(6 + 8 * units) + extensions
            protocol = 60
        length = (len(extensions) + len(body)) & 0xFFFF
        return struct.pack(">IHBB", 6 << 28, length, protocol, hops) + self._own[6] + target + extensions + body

    def _cut(self, version: int, protocol: int, target: bytes, body: bytes) -> None:
        """Into fragments: all of them in any order, and perhaps one twice, one missing, or one that overlaps."""
        chance = self._chance
        body += chance.randbytes(chance.choice((8, 100, 2000)))
        size = chance.choice((8, 64, 1400)) if len(body) < 4000 else 1400
        spans = [(at, min(at + size, len(body))) for at in range(0, len(body), size)]
        end = len(body)
        spans += chance.choices(spans, k=chance.choice((0, 0, 1)))
        if chance.random() < 0.2:
            start = chance.randrange(0, end, 8)
            spans.append((start, min(start + size, end)))
        if chance.random() < 0.2:
            del spans[chance.randrange(len(spans))]
        if chance.random() < 0.5:
            chance.shuffle(spans)
        identification = chance.getrandbits(16)
        for start, until in spans:
            more, piece = until < end or chance.random() < 0.02, body[start:until]
            if version == 4:
                header = struct.pack(
                    ">BBHHHBBH", 0x45, 0, 20 + len(piece), identification, more << 13 | start >> 3, 64, protocol, 0
                )
                header += self._own[4] + target
                header = header[:10] + struct.pack(">H", checksum(header)) + header[12:]
            else:
                header = struct.pack(">IHBB", 6 << 28, 8 + len(piece), 44, 64) + self._own[6] + target
                header += struct.pack(">BBHI", protocol, 0, start | more, identification)
            self._pieces.append(header + piece)

    def _bend(self, packet: bytes) -> bytes:
        chance, bent = self._chance, bytearray(packet)
        way = chance.randrange(5)
        if way == 0:
            del bent[chance.randint(0, len(bent)) :]
        elif way == 1:
            bent += chance.randbytes(chance.choice((1, 7, 100)))
        else:
            reach = min(len(bent), chance.choice((4, 20, 60, 65_535)))
            for _ in range(chance.choice((1, 2, 8))):
                bent[chance.randrange(reach)] ^= 1 << chance.randrange(8)
        return bytes(bent)

    def _header(self, packet: bytes) -> bytes:
        """The virtio-net header: mostly one that fits."""
        chance = self._chance
        if chance.random() < 0.3 and packet[:1] in (b"\x45", b"\x60"):
            start, kind = (20, 1) if packet[0] == 0x45 else (40, 4)  # as a laptop's kernel says it of TCP
            kind, size = (kind, 1448) if len(packet) > 1500 else (0, 0)
            return struct.pack("<BBHHHH", 1, kind, start + 20, size, start, 16)
        if chance.random() < 0.9:
            return vnet.EMPTY
        known = [0, 1, 3, 4, 5, 0x80, 0x81, 0x84, 255]
        sizes = [0, 1, 20, 40, 54, 1448, 65535, len(packet) & 0xFFFF]
        return struct.pack("<BBHHHH", chance.choice((0, 1, 2, 255)), chance.choice(known), *chance.choices(sizes, k=4))
