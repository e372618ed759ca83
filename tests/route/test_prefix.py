"""Prefixes and sets of them: tables for what is read and refused, netaddr as the independent oracle of the algebra."""

import random
import time

import netaddr
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpvpn.errors import UsageError
from tpvpn.route.prefix import BITS, Prefix, Space


@st.composite
def prefixes(draw: st.DrawFn) -> Prefix:
    """Prefixes that often nest, touch and equal one another: few distinct bits at the top, any length."""
    version = draw(st.sampled_from((4, 6)))
    length = draw(st.integers(0, BITS[version]))
    top = draw(st.integers(0, 255)) << (BITS[version] - 8)
    return Prefix.around(version, top | draw(st.integers(0, 3)), length)


def spaces() -> st.SearchStrategy[list[Prefix]]:
    return st.lists(prefixes(), max_size=8)


def oracle(items: list[Prefix]) -> netaddr.IPSet:
    return netaddr.IPSet([str(item) for item in items])


def same(space: Space, expected: netaddr.IPSet) -> bool:
    return {str(prefix) for prefix in space.prefixes()} == {str(network) for network in expected.iter_cidrs()}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10.130.0.0/16", Prefix(4, 0x0A820000, 16)),
        ("0.0.0.0/0", Prefix(4, 0, 0)),
        ("10.0.0.1", Prefix(4, 0x0A000001, 32)),
        ("fd00:130::/64", Prefix(6, 0xFD000130 << 96, 64)),
        ("::1", Prefix(6, 1, 128)),
        ("::/0", Prefix(6, 0, 0)),
    ],
)
def test_parse(text: str, expected: Prefix) -> None:
    assert Prefix.parse(text) == expected
    assert Prefix.parse(str(expected)) == expected


@pytest.mark.parametrize(
    "text",
    [
        "", "/", "10", "10.0.0", "10.0.0.0/", "10.0.0.0/33", "10.0.0.0/-1", "10.0.0.0/+8", "10.0.0.0/08", "10.0.0.0/ 8",
        "10.0.0.0/255.0.0.0", "10.0.0.256/32", "010.0.0.0/8", "10.0.0.0/8/8", " 10.0.0.0/8", "fd00::/129", "fd00:::/8",
        "fe80::1%eth0", "example.org", "10.0.0.0/٨", "10.0.0.0\x00/8", "10.0.0.0/1_6",
    ],
)  # fmt: skip
def test_malformed(text: str) -> None:
    with pytest.raises(UsageError, match="not an address or subnet") as caught:
        Prefix.parse(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "network"), [("10.130.1.0/16", "10.130.0.0/16"), ("fd00::1/64", "fd00::/64"), ("1.2.3.4/0", "0.0.0.0/0")]
)
def test_host_bits_are_refused_with_the_network_meant(text: str, network: str) -> None:
    with pytest.raises(UsageError) as caught:
        Prefix.parse(text)
    assert text in str(caught.value) and network in str(caught.value)


def test_parts() -> None:
    prefix = Prefix.parse("10.130.0.0/30")
    assert prefix.size == 4
    assert prefix.address() == "10.130.0.0"
    assert prefix.address(1) == "10.130.0.1"
    assert Prefix.host(prefix.address(3)).network == prefix.last
    with pytest.raises(UsageError):
        Prefix.host("10.0.0.0/8")


@given(prefixes(), prefixes())
def test_contains_and_overlaps(one: Prefix, other: Prefix) -> None:
    mine, theirs = netaddr.IPNetwork(str(one)), netaddr.IPNetwork(str(other))
    assert one.contains(other) == (theirs in mine)
    assert one.overlaps(other) == (theirs in mine or mine in theirs)


@given(st.text(max_size=30))
def test_parse_accepts_only_what_it_prints(text: str) -> None:
    try:
        prefix = Prefix.parse(text)
    except UsageError:
        return
    assert Prefix.parse(str(prefix)) == prefix


@given(spaces(), spaces())
def test_algebra_agrees_with_netaddr(left: list[Prefix], right: list[Prefix]) -> None:
    one, other = Space(left), Space(right)
    assert same(one, oracle(left))
    assert same(one | other, oracle(left) | oracle(right))
    assert same(one & other, oracle(left) & oracle(right))
    assert same(one - other, oracle(left) - oracle(right))
    assert one.size == sum(prefix.size for prefix in one.prefixes())
    assert Space(one.prefixes()) == one
    assert bool(one) == bool(left)


@given(spaces(), prefixes())
def test_membership(items: list[Prefix], probe: Prefix) -> None:
    space = Space(items)
    assert (probe in space) == (not Space([probe]) - space)
    assert space.overlaps(probe) == bool(Space([probe]) & space)


def test_a_hundred_thousand_prefixes_are_cheap() -> None:
    source = random.Random(1)
    many = [Prefix.around(4, source.getrandbits(32), source.randint(12, 28)) for _ in range(100_000)]
    begin = time.process_time()
    space = Space(many)
    assert (space - Space(many[::2])) | Space(many[::2]) == space
    assert len(space.prefixes()) > 1000
    assert time.process_time() - begin < 2
