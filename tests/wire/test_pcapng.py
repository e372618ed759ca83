"""pcapng blocks: scapy reads what is written."""

import io

from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP
from scapy.layers.inet6 import IPv6
from scapy.utils import PcapNgReader, RawPcapNgReader

from tpvpn.wire import pcapng

PACKETS = st.tuples(
    st.binary(max_size=70), st.integers(0, 9), st.integers(0, (1 << 64) - 1), st.sampled_from([1, 2])
)  # fmt: skip


def written(packets: list[tuple[bytes, int, int, int]], snap_length: int = 0) -> bytearray:
    data = bytearray(pcapng.header("tpvpn 7", "tpvpn0", snap_length))
    for packet, cut, when, direction in packets:
        pcapng.append_packet(data, memoryview(packet), len(packet) + cut, when, direction)
    return data


@given(st.lists(PACKETS, max_size=5), st.integers(0, 1 << 16))
def test_scapy_reads_what_was_written(packets: list[tuple[bytes, int, int, int]], snap_length: int) -> None:
    data = written(packets, snap_length) + pcapng.statistics(9, len(packets), 0)
    found = list(RawPcapNgReader(io.BytesIO(bytes(data))))
    assert [one for one, _ in found] == [packet for packet, *_ in packets]
    for (packet, cut, when, direction), (_, about) in zip(packets, found, strict=True):
        assert (about.tshigh << 32 | about.tslow, about.tsresol) == (when, 10**9)
        assert (about.wirelen, about.linktype, about.direction) == (len(packet) + cut, 101, direction)
        assert about.ifname == b"tpvpn0"


def test_packets_of_both_families_are_told_apart() -> None:
    data = written([(bytes(IP() / b"four"), 0, 10**18, 1), (bytes(IPv6() / b"six"), 0, 10**18 + 5, 2)])
    four, six = PcapNgReader(io.BytesIO(bytes(data)))
    assert (type(four), four.direction, float(four.time)) == (IP, 1, 1e9)
    assert (type(six), six.direction) == (IPv6, 2)
    assert b"tpvpn 7" in data


@given(st.lists(PACKETS, max_size=5), st.integers(0, 400))
def test_what_fits_ends_between_blocks(packets: list[tuple[bytes, int, int, int]], most: int) -> None:
    data = written(packets)
    ends = [len(written(packets[:count])) for count in range(len(packets) + 1)]
    blocks = [0, int.from_bytes(data[4:8], "little"), *ends]
    assert pcapng.whole_blocks(memoryview(data), most) == max(end for end in blocks if end <= most)
