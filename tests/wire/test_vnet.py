"""The virtio-net header and the names of offloads on the wire."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpvpn.errors import ProtocolError
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


@pytest.mark.parametrize(
    ("header", "packet", "left"),
    [
        (Header(), (4, 17, 28), False),
        (Header(vnet.NEEDS_CHECKSUM, 0, 0, 0, 20, 6), (4, 17, 28), True),
        (Header(vnet.NEEDS_CHECKSUM, vnet.GSO_TCP4 | vnet.GSO_ECN, 52, 1448, 20, 16), (4, 6, 9000), True),
        (Header(vnet.NEEDS_CHECKSUM, vnet.GSO_TCP6, 60, 1428, 40, 16), (6, 6, 9000), True),
        (Header(vnet.NEEDS_CHECKSUM, vnet.GSO_TCP6, 60, 1428, 40, 16), (4, 6, 9000), None),
        (Header(vnet.NEEDS_CHECKSUM, vnet.GSO_TCP4, 52, 1448, 20, 16), (4, 17, 9000), None),
        (Header(vnet.NEEDS_CHECKSUM, vnet.GSO_TCP4, 52, 0, 20, 16), (4, 6, 9000), None),
        (Header(vnet.NEEDS_CHECKSUM, vnet.GSO_UDP, 28, 1000, 20, 6), (4, 17, 9000), None),
        (Header(0, 3, 28, 1000), (4, 17, 9000), None),
        (Header(vnet.NEEDS_CHECKSUM, 0, 0, 0, 40, 16), (4, 6, 57), None),
        (Header(vnet.NEEDS_CHECKSUM, 0, 0, 0, 0xFFFF, 0xFFFF), (4, 6, 65_535), None),
    ],
)
def test_what_a_kernel_refuses_is_refused(header: Header, packet: tuple[int, int, int], left: bool | None) -> None:
    if left is None:
        with pytest.raises(ProtocolError):
            header.leaves_checksum(*packet)
    else:
        assert header.leaves_checksum(*packet) is left
