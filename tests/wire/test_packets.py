"""IP, TCP, UDP and ICMP as they stand in packets: scapy is the oracle of every builder and parser."""

import contextlib
import os
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption_LSRR, IPOption_NOP, IPOption_RR, IPOption_Timestamp
from scapy.layers.inet6 import (
    ICMPv6EchoRequest,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
    Jumbo,
    PadN,
    RouterAlert,
)
from scapy.packet import Packet, Raw

from tpvpn.errors import ProtocolError
from tpvpn.wire import icmp, ip, tcp, udp, vnet

SOURCE4, DESTINATION4 = bytes([10, 132, 0, 5]), bytes([246, 0, 0, 1])
SOURCE6, DESTINATION6 = b"\xfd\0\x01\x32" + bytes(11) + b"\x05", b"\xfd\x74\x70\x76" + bytes(11) + b"\x01"
FAMILIES = [(SOURCE4, DESTINATION4), (SOURCE6, DESTINATION6)]
ADDRESSES = st.sampled_from([4, 16]).flatmap(lambda n: st.tuples(*[st.binary(min_size=n, max_size=n)] * 2))
U8, U16, U32 = (st.integers(0, (1 << bits) - 1) for bits in (8, 16, 32))


def dissected(data: bytes) -> Packet:
    return (IP if data[0] >> 4 == 4 else IPv6)(data)


def recomputed(packet: Packet) -> bytes:
    """The packet as scapy builds it, lengths and checksums its own."""
    for layer in (IP, TCP, UDP, ICMP):
        if layer in packet:
            for name in ("len", "chksum", "dataofs"):
                if name in packet[layer].fields:
                    delattr(packet[layer], name)
    if IPv6 in packet:
        del packet[IPv6].plen
        for name in ("cksum",):
            if name in packet[IPv6].payload.fields:
                delattr(packet[IPv6].payload, name)
    return bytes(packet)


# -- the checksum ------------------------------------------------------------------------------------------------------


def test_the_checksum_of_rfc_1071() -> None:
    """Section 3's example: the sum of 0001 f203 f4f5 f6f7 is ddf2."""
    data = bytes.fromhex("0001f203f4f5f6f7")
    assert ip.ones_sum(data) == 0xDDF2
    assert ip.checksum(data) == 0xDDF2 ^ 0xFFFF
    assert ip.is_valid(data + ip.checksum(data).to_bytes(2, "big"))


@given(st.binary(max_size=200), U16)
def test_the_checksum_is_a_sum_of_words(data: bytes, before: int) -> None:
    words = sum(struct.unpack(f">{(len(data) + 1) // 2}H", data + bytes(len(data) % 2))) + before
    while words >> 16:
        words = (words >> 16) + (words & 0xFFFF)
    assert ip.checksum(data, before) == 0xFFFF - words


# -- IP ----------------------------------------------------------------------------------------------------------------


@given(ADDRESSES, U8, U8, U16, st.binary(max_size=60), st.booleans(), st.integers(0, 8000), st.booleans())
def test_packets_are_scapys(
    addresses: tuple[bytes, bytes],
    hop_limit: int,
    traffic_class: int,
    identification: int,
    payload: bytes,
    dont_fragment: bool,
    units: int,
    more: bool,
) -> None:
    if more:
        payload = payload[: len(payload) & ~7] or bytes(8)
    data = ip.build(
        *addresses,
        253,
        payload,
        hop_limit=hop_limit,
        traffic_class=traffic_class,
        identification=identification,
        dont_fragment=dont_fragment,
        fragment_offset=units * 8,
        more_fragments=more,
    )
    if len(addresses[0]) == 4:
        seen = IP(data)
        assert recomputed(IP(data)) == data
        assert (seen.proto, seen.ttl, seen.tos, seen.id) == (253, hop_limit, traffic_class, identification)
        assert (int(seen.flags), seen.frag) == (dont_fragment * 2 + more, units)
    else:
        seen = IPv6(data)
        assert recomputed(IPv6(data)) == data
        assert (seen.hlim, seen.tc) == (hop_limit, traffic_class)
        if fragmented := more or units > 0:
            part = seen[IPv6ExtHdrFragment]
            assert (part.offset, part.m, part.id, part.nh) == (units, more, identification, 253)
        assert (IPv6ExtHdrFragment in seen) == fragmented
    parsed = ip.parse(data + b"behind")
    assert (parsed.source, parsed.destination) == addresses
    assert (parsed.protocol, parsed.hop_limit, parsed.traffic_class) == (253, hop_limit, traffic_class)
    assert (parsed.fragment_offset, parsed.more_fragments) == (units * 8, more)
    assert bytes(parsed.payload) == payload
    assert bytes(parsed.data) == data
    assert parsed.is_fragment == (more or units > 0)


def test_ipv4_options_are_skipped() -> None:
    data = bytes(IP(options=[IPOption_NOP(), IPOption_RR(), IPOption_Timestamp()]) / UDP() / b"payload")
    parsed = ip.parse(data)
    assert bytes(udp.parse(parsed).payload) == b"payload"
    assert parsed.header_length > 20


def test_ipv6_extension_headers_are_skipped() -> None:
    extensions = IPv6ExtHdrHopByHop(options=[RouterAlert(), PadN()]) / IPv6ExtHdrDestOpt(options=[PadN()])
    data = bytes(IPv6() / extensions / IPv6ExtHdrRouting(segleft=0) / IPv6ExtHdrFragment() / UDP() / b"payload")
    parsed = ip.parse(data)
    assert parsed.protocol == ip.UDP
    assert not parsed.is_fragment
    assert bytes(udp.parse(parsed, checked=True).payload) == b"payload"


def test_ipv6_stops_at_a_fragment() -> None:
    data = bytes(IPv6() / IPv6ExtHdrDestOpt() / IPv6ExtHdrFragment(m=1, id=77, nh=60) / Raw(bytes(16)))
    parsed = ip.parse(data)
    assert (parsed.protocol, parsed.identification, len(parsed.payload)) == (60, 77, 16)


def wrong(packet: Packet, at: int, value: int) -> bytes:
    data = bytearray(bytes(packet))
    data[at] = value
    if packet.version == 4:  # but for the field, all is right
        data[10:12] = bytes(2)
        data[10:12] = ip.checksum(data[: (data[0] & 15) * 4]).to_bytes(2, "big")
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "empty"),
        (b"\x55" + bytes(60), "version 5"),
        (bytes(IP())[:19], "cut short"),
        (bytes(IP() / b"four")[:23], "claims 24"),
        (wrong(IP() / b"four", 0, 0x44), "its header 16"),
        (wrong(IP() / b"four", 0, 0x4F), "its header 60"),
        (wrong(IP() / b"four", 3, 19), "claims 19"),
        (bytes(IP(chksum=1)), "checksum"),
        (bytes(IP(options=IPOption_LSRR(routers=["1.2.3.4"]))), "source route"),
        (wrong(IP(options=IPOption_RR()), 21, 0), "impossible length"),
        (wrong(IP(options=IPOption_RR()), 21, 60), "impossible length"),
        (bytes(IP(flags="MF") / b"seven77"), "multiple of 8"),
        (bytes(IP(flags="MF")), "multiple of 8"),
        (bytes(IP(frag=8191) / bytes(100)), "beyond"),
        (bytes(IPv6())[:39], "cut short"),
        (bytes(IPv6() / b"four")[:43], "claims 44"),
        (bytes(IPv6(nh=60, plen=4) / bytes(4)), "cut short"),
        (bytes(IPv6(nh=60) / bytes([59, 9]) / bytes(14)), "cut short"),
        (bytes(IPv6() / IPv6ExtHdrRouting(addresses=["::1"])), "source route"),
        (bytes(IPv6() / IPv6ExtHdrDestOpt() / IPv6ExtHdrHopByHop()), "not the first"),
        (bytes(IPv6() / IPv6ExtHdrHopByHop(options=Jumbo(jumboplen=70_000))), "option 194"),
        (bytes(IPv6(nh=60) / bytes([59, 0, 5, 200, 0, 0, 0, 0])), "impossible length"),
        (bytes(IPv6(nh=60) / (bytes([60, 0, 1, 4, 0, 0, 0, 0]) * 9)), "more than 8"),
        (bytes(IPv6() / IPv6ExtHdrFragment(m=1) / b"seven77"), "multiple of 8"),
    ],
)
def test_what_is_malformed_is_named(data: bytes, says: str) -> None:
    with pytest.raises(ProtocolError, match=says):
        ip.parse(data)


# -- UDP ---------------------------------------------------------------------------------------------------------------


@given(ADDRESSES, U16, U16, st.binary(max_size=60))
def test_datagrams_are_scapys(addresses: tuple[bytes, bytes], source: int, destination: int, payload: bytes) -> None:
    datagram = udp.Datagram(source, destination, payload)
    data = ip.build(*addresses, ip.UDP, udp.build(*addresses, datagram))
    seen = dissected(data)
    assert (seen[UDP].sport, seen[UDP].dport, bytes(seen[UDP].payload)) == (source, destination, payload)
    assert recomputed(seen) == data
    parsed = udp.parse(ip.parse(data))
    assert (*parsed[:2], bytes(parsed.payload)) == (source, destination, payload)


@pytest.mark.parametrize(
    ("packet", "says"),
    [
        (IP(proto=17) / bytes(7), "cut short"),
        (IP() / UDP(len=7), "claims 7"),
        (IP() / UDP(len=9), "claims 9"),
        (IP() / UDP(chksum=1) / b"x", "checksum"),
        (IPv6() / UDP(chksum=0) / b"x", "checksum"),
    ],
)
def test_a_malformed_datagram(packet: Packet, says: str) -> None:
    with pytest.raises(ProtocolError, match=says):
        udp.parse(ip.parse(bytes(packet)))


def test_ipv4_may_leave_the_checksum_out() -> None:
    assert bytes(udp.parse(ip.parse(bytes(IP() / UDP(chksum=0) / b"x"))).payload) == b"x"


def test_a_sum_of_zero_is_sent_as_ffff() -> None:
    for high in range(256):
        for low in range(256):
            data = udp.build(SOURCE4, DESTINATION4, udp.Datagram(1, 2, bytes([high, low])))
            if data[6:8] == b"\xff\xff":
                return
            assert data[6:8] != bytes(2)
    raise AssertionError("one of them sums to zero")


# -- ICMP --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "request_packet", [IP() / ICMP(id=7, seq=9) / b"abc", IPv6() / ICMPv6EchoRequest(id=7, seq=9, data=b"abc")]
)
def test_an_echo_is_answered(request_packet: Packet) -> None:
    packet = ip.parse(bytes(request_packet))
    message = icmp.parse(packet)
    assert icmp.is_echo_request(packet, message)
    assert (message.identifier, message.sequence, bytes(message.body)) == (7, 9, b"abc")
    reply = icmp.build(packet.destination, packet.source, icmp.echo_reply(message, packet.version))
    data = ip.build(packet.destination, packet.source, packet.protocol, reply)
    seen = dissected(data)
    assert recomputed(dissected(data)) == data
    assert seen.payload.type == (0 if packet.version == 4 else 129)
    assert (seen.payload.id, seen.payload.seq) == (7, 9)


@pytest.mark.parametrize("error", list(icmp.Error))
@pytest.mark.parametrize(("source", "destination"), FAMILIES)
def test_an_error_quotes_the_packet(error: icmp.Error, source: bytes, destination: bytes) -> None:
    offending = ip.parse(
        ip.build(source, destination, ip.UDP, udp.build(source, destination, udp.Datagram(5, 6, bytes(1400))))
    )
    data = icmp.build_error(error, offending, destination, mtu=1400)
    assert data is not None
    assert len(data) == (576 if len(source) == 4 else 1280)
    seen = dissected(data)
    assert recomputed(dissected(data)) == data
    assert (seen.payload.type, seen.payload.code) == error.value[len(source) == 16]
    parsed = icmp.parse(ip.parse(data))
    assert offending.data.tobytes().startswith(parsed.body)
    assert parsed.word == (1400 if error is icmp.Error.TOO_BIG else 6 if (parsed.type, parsed.code) == (4, 1) else 0)


@pytest.mark.parametrize(
    "packet",
    [
        IP() / ICMP(type=3, code=3) / bytes(IP() / UDP()),
        IP(frag=5) / bytes(8),
        IP(dst="224.0.0.1") / UDP(),
        IP(dst="255.255.255.255") / UDP(),
        IP(src="224.0.0.1") / UDP(),
        IP(src="0.0.0.0") / UDP(),
        IPv6(nh=58) / bytes([1, 0]) / bytes(6),
        IPv6(dst="ff02::1") / UDP(),
        IPv6(src="ff02::1") / UDP(),
        IPv6(src="::") / UDP(),
    ],
)
def test_what_no_error_may_be_sent_about(packet: Packet) -> None:
    parsed = ip.parse(bytes(packet))
    assert icmp.build_error(icmp.Error.PORT_UNREACHABLE, parsed, parsed.destination) is None


@pytest.mark.parametrize("packet", [IP() / ICMP(chksum=1), IP(proto=1) / bytes(7), IP(proto=58) / bytes(8)])
def test_a_malformed_message(packet: Packet) -> None:
    with pytest.raises(ProtocolError):
        icmp.parse(ip.parse(bytes(packet)))


# -- TCP ---------------------------------------------------------------------------------------------------------------


@st.composite
def segments(draw: st.DrawFn) -> tcp.Segment:
    flags = draw(st.sampled_from([tcp.SYN, tcp.SYN | tcp.ACK, tcp.ACK, tcp.ACK | tcp.PSH, tcp.FIN | tcp.ACK, tcp.RST]))
    stamp = draw(st.none() | U32)
    segment = tcp.Segment(draw(U32), draw(U32), flags, draw(U16), draw(st.binary(max_size=80)), stamp)
    segment.timestamp_echo = 0 if stamp is None else draw(U32)
    if flags & tcp.SYN:
        segment.mss = draw(st.none() | U16)
        segment.window_scale = draw(st.none() | st.integers(0, 14))
        segment.sack_permitted = draw(st.booleans())
    else:
        segment.sack_blocks = tuple(draw(st.lists(st.tuples(U32, U32), max_size=3)))
    return segment


def fields(segment: tcp.Segment) -> tuple[object, ...]:
    return tuple(
        bytes(value) if name == "payload" else value
        for name in tcp.Segment.__slots__
        for value in [getattr(segment, name)]
    )


@given(ADDRESSES, U16, U16, segments())
@settings(max_examples=200)
def test_segments_are_scapys(
    addresses: tuple[bytes, bytes], source: int, destination: int, segment: tcp.Segment
) -> None:
    buffer = bytearray(300)
    writer = tcp.Writer(addresses[0], source, addresses[1], destination, offload=False)
    data = bytes(buffer[3 : writer.write(buffer, 3, segment, 1460)])
    seen = dissected(data)[TCP]
    assert (seen.sport, seen.dport, seen.seq, seen.ack) == (source, destination, segment.seq, segment.ack)
    assert (int(seen.flags), seen.window, bytes(seen.payload)) == (segment.flags, segment.window, segment.payload)
    options = {name: value for name, value in seen.options if name not in ("NOP", "EOL")}
    assert options.get("MSS") == segment.mss
    assert options.get("WScale") == segment.window_scale
    assert ("SAckOK" in options) == segment.sack_permitted
    assert options.get("Timestamp") == (
        None if segment.timestamp is None else (segment.timestamp, segment.timestamp_echo)
    )
    assert options.get("SAck", ()) == tuple(number for block in segment.sack_blocks for number in block)
    checked = dissected(data)
    checked[TCP].chksum = None
    if IP in checked:
        checked[IP].chksum = None
    assert bytes(checked) == data
    packet = ip.parse(data)
    assert tcp.ports(packet.payload) == (source, destination)
    assert fields(tcp.parse(packet)) == fields(segment)


@pytest.mark.parametrize(("source", "destination"), FAMILIES)
@pytest.mark.parametrize("size", [0, 1, 1448, 1449, 65_483])
def test_offload_leaves_cutting_and_checksum_to_the_kernel(source: bytes, destination: bytes, size: int) -> None:
    buffer = bytearray(66_000)
    segment = tcp.Segment(1, 2, tcp.ACK, 3, os.urandom(size), 4, 5)
    end = tcp.Writer(source, 80, destination, 99, offload=True).write(buffer, 0, segment, 1448)
    ip_length, gso = (20, vnet.GSO_TCP4) if len(source) == 4 else (40, vnet.GSO_TCP6)
    header = vnet.Header.unpack(buffer)
    kind = (gso, 1448) if size > 1448 else (vnet.GSO_NONE, 0)
    assert header == vnet.Header(vnet.NEEDS_CHECKSUM, kind[0], ip_length + 32, kind[1], ip_length, 16)
    packet = ip.parse(memoryview(buffer)[vnet.HEADER_LENGTH : end])
    assert int.from_bytes(packet.payload[16:18], "big") == ip.pseudo_sum(source, destination, ip.TCP, 32 + size)
    assert fields(tcp.parse(packet, checked=True)) == fields(segment)


@pytest.mark.parametrize(
    ("packet", "says"),
    [
        (IP(proto=6) / bytes(19), "cut short"),
        (IP() / TCP(dataofs=4), "claims 16"),
        (IP() / TCP(dataofs=6), "claims 24"),
        (IP() / TCP(chksum=1), "checksum"),
        (IP() / TCP(dataofs=6) / bytes([8, 0, 0, 0]), "option 8 with an impossible"),
        (IP() / TCP(dataofs=6) / bytes([8, 10, 0, 0]), "option 8 with an impossible"),
        (IP() / TCP(dataofs=6) / bytes([1, 1, 1, 8]), "option 8 with an impossible"),
        (IP() / TCP(dataofs=6) / bytes([2, 3, 0, 0]), "option 2 with a length of 3"),
        (IP() / TCP(dataofs=6, flags="A") / bytes([5, 4, 0, 0]), "option 5 with a length of 4"),
    ],
)
def test_a_malformed_segment(packet: Packet, says: str) -> None:
    with pytest.raises(ProtocolError, match=says):
        tcp.parse(ip.parse(bytes(packet)))


def test_options_unknown_or_out_of_place_are_skipped() -> None:
    data = bytes([254, 4, 1, 2, 2, 4, 5, 180, 3, 3, 7, 0])
    segment = tcp.parse(ip.parse(bytes(IP() / TCP(dataofs=8, flags="A") / data)))
    assert (segment.mss, segment.window_scale) == (None, None)
    segment = tcp.parse(ip.parse(bytes(IP() / TCP(dataofs=8, flags="S") / data)))
    assert (segment.mss, segment.window_scale) == (1460, 7)


# -- foreign bytes -----------------------------------------------------------------------------------------------------

WHOLE = [
    bytes(IP(options=[IPOption_RR()]) / TCP(options=[("MSS", 1460), ("SAckOK", b""), ("WScale", 7)]) / b"data"),
    bytes(IP() / TCP(flags="A", options=[("NOP", None), ("NOP", None), ("SAck", (1, 2, 3, 4))])),
    bytes(IP() / UDP() / b"data"),
    bytes(IP() / ICMP() / b"data"),
    bytes(IPv6() / IPv6ExtHdrHopByHop(options=[RouterAlert()]) / IPv6ExtHdrFragment() / TCP() / b"data"),
    bytes(IPv6() / IPv6ExtHdrDestOpt() / UDP() / b"data"),
    bytes(IPv6() / ICMPv6EchoRequest(data=b"data")),
]


def parse_everything(data: bytes) -> None:
    """Each parser on what it may be given; only one kind of error comes out."""
    try:
        packet = ip.parse(data)
    except ProtocolError:
        return
    for checked in (False, True):
        for parser in (tcp.parse, udp.parse, icmp.parse):
            with contextlib.suppress(ProtocolError):
                parser(packet, checked=checked)
    for error in icmp.Error:
        icmp.build_error(error, packet, packet.destination)


@given(st.binary(max_size=120))
def test_any_bytes(data: bytes) -> None:
    parse_everything(data)


@given(st.sampled_from(WHOLE), st.lists(st.tuples(st.integers(0, 200), U8), max_size=6), st.integers(0, 200))
@settings(max_examples=600)
def test_packets_with_wrong_bytes(data: bytes, changes: list[tuple[int, int]], cut: int) -> None:
    changed = bytearray(data)
    for at, value in changes:
        changed[at % len(changed)] = value
    if changed[0] >> 4 == 4 and (length := (changed[0] & 15) * 4) <= len(changed):
        changed[10:12] = bytes(2)
        changed[10:12] = ip.checksum(changed[:length]).to_bytes(2, "big")
    parse_everything(bytes(changed[:cut] if cut < len(changed) and cut % 3 == 0 else changed))


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("size", [20, 552, 1200, 60_000])
def test_a_quotation_is_all_that_an_error_needs(version: int, size: int) -> None:
    source, destination = (bytes([10, 0, 0, 1]), bytes([10, 0, 0, 2])) if version == 4 else (bytes(16), bytes([1] * 16))
    data = bytearray(ip.build(source[:-1] + b"\x07", destination, ip.TCP, bytes(range(20)) * (size // 20)))
    packet = ip.parse(data)
    expected = icmp.build_error(icmp.Error.NO_ROUTE, packet, destination)
    kept = packet.quotation(icmp.MOST_QUOTED)
    data[:] = bytes(len(data))
    assert icmp.build_error(icmp.Error.NO_ROUTE, kept, destination) == expected
    assert len(kept.data) <= 1280
