"""The virtio-net header and the names of offloads on the wire."""

from hypothesis import given
from hypothesis import strategies as st

from tpvpn.wire import vnet
from tpvpn.wire.vnet import Header, Offload


def test_layout_is_the_kernels() -> None:
    """struct virtio_net_hdr of linux/virtio_net.h, TSO4 with 1448-byte segments behind 52 bytes of headers."""
    header = Header(vnet.NEEDS_CHECKSUM, vnet.GSO_TCP4, 52, 1448, 20, 16)
    assert header.pack() == bytes([1, 1, 52, 0, 0xA8, 5, 20, 0, 16, 0])
    assert Header.unpack(header.pack()) == header
    assert Header().pack() == vnet.EMPTY


@given(st.sets(st.sampled_from(list(Offload.ALL))))
def test_offload_names_come_back(flags: set[Offload]) -> None:
    offloads = Offload(sum(flags))
    assert vnet.from_names(vnet.names(offloads)) == offloads


def test_names_of_a_later_version_are_left_out() -> None:
    assert vnet.from_names(["tso4", "warp-drive"]) == Offload.TSO4
    assert vnet.names(Offload.TSO4 | Offload.CHECKSUM) == ["checksum", "tso4"]
