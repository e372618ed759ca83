import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpvpn.errors import ManagerError
from tpvpn.manager.addresses import AddressPool, block_of
from tpvpn.proto.session import SPACE4, SPACE6


@given(st.text())
def test_a_managers_block_is_a_part_of_the_space_and_always_the_same(identity: str) -> None:
    for space, length in ((SPACE4, 24), (SPACE6, 64)):
        block = block_of(space, identity)
        assert block.prefixlen == length
        assert block.subnet_of(space)
        assert block == block_of(space, identity)


def test_managers_have_different_blocks() -> None:
    assert len({block_of(SPACE4, f"manager-{number}") for number in range(20)}) > 15


@pytest.mark.parametrize("space", [SPACE4, SPACE6], ids=["ipv4", "ipv6"])
def test_no_two_sessions_have_the_same_address_until_the_block_is_used_up(space) -> None:
    pool = AddressPool(space, "pod-0")
    taken = [pool.take(None) for _ in range(254)]
    assert len(set(taken)) == 254
    assert all(ipaddress.ip_address(address) in block_of(space, "pod-0") for address in taken)
    with pytest.raises(ManagerError, match="full"):
        pool.take(None)
    pool.give_back(taken[7])
    assert pool.take(None) == taken[7]


def test_an_address_is_not_given_again_at_once() -> None:
    pool = AddressPool(SPACE4, "pod-0")
    first = pool.take(None)
    pool.give_back(first)
    assert first not in [pool.take(None) for _ in range(253)]
    assert pool.take(None) == first


def test_a_wanted_address_is_given_when_it_is_ours_and_free() -> None:
    pool = AddressPool(SPACE4, "pod-0")
    assert pool.take("246.3.4.5") == "246.3.4.5"
    assert pool.take("246.3.4.5") != "246.3.4.5"
    pool.give_back("246.3.4.5")
    assert pool.take("246.3.4.5") == "246.3.4.5"


@pytest.mark.parametrize(
    "wanted", ["", "no address", "10.0.0.1", "246.16.0.1", "fd74:7076:706e::1", "246.0.0.1/32", "::"]
)
def test_what_is_not_ours_is_not_given(wanted: str) -> None:
    assert ipaddress.ip_address(AddressPool(SPACE4, "pod-0").take(wanted)) in block_of(SPACE4, "pod-0")


@given(st.text())
def test_whatever_a_client_wants_it_gets_one_of_our_addresses(wanted: str) -> None:
    assert ipaddress.ip_address(AddressPool(SPACE6, "pod-0").take(wanted)) in SPACE6
