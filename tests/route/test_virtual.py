"""Where virtual subnets go: always to the same place, into free room of the pool that managers take."""

import pytest
from views import default_rules

from tpvpn.proto.config import MAX_PAIRS
from tpvpn.proto.session import VIRTUAL4, VIRTUAL6
from tpvpn.route.conflict import classify
from tpvpn.route.fib import Link, Nexthop, Route, View
from tpvpn.route.prefix import Prefix, Space
from tpvpn.route.verdict import Wanted
from tpvpn.route.virtual import MOST, POOLS, Mapper

LINKS = (Link(2, "eth0"), Link(3, "tun0", "tun"))


def mapper(*cluster: str, occupied: tuple[str, ...] = ()) -> Mapper:
    routes = tuple(Route(Prefix.parse(one), nexthops=(Nexthop("tun0"),)) for one in occupied)
    view = View(default_rules(), routes, LINKS)
    wanted = [Wanted(Prefix.parse(one), "service", "test") for one in cluster]
    return Mapper(wanted, classify(view, Space(POOLS.values())))


def place(one: Mapper, text: str) -> Prefix:
    found = one.place(Prefix.parse(text))
    assert found is not None and POOLS[found.version].contains(found) and found.length == Prefix.parse(text).length
    return found


def test_pools_and_numbers_are_the_managers() -> None:
    assert {4: str(POOLS[4]), 6: str(POOLS[6])} == {4: str(VIRTUAL4), 6: str(VIRTUAL6)}
    assert MOST == MAX_PAIRS


@pytest.mark.parametrize("subnet", ["10.130.0.0/16", "10.0.0.0/9", "10.130.0.1/32", "fd10::/48", "fd10:130::/112"])
def test_a_subnet_is_always_at_the_same_place(subnet: str) -> None:
    first = place(mapper(subnet), subnet)
    assert place(mapper(subnet), subnet) == first
    if first.length > POOLS[first.version].length:
        others = {place(mapper(subnet, f"10.{number}.0.0/24"), subnet) for number in range(16)}
        assert len(others) > 1, "another cluster's is elsewhere"


def test_an_occupied_place_is_left_for_the_next() -> None:
    first = place(mapper("10.130.0.0/16"), "10.130.0.0/16")
    moved = place(mapper("10.130.0.0/16", occupied=(f"{first.address(5)}/32",)), "10.130.0.0/16")
    assert moved != first and not moved.overlaps(first)


def test_places_do_not_overlap() -> None:
    one = mapper("10.130.0.0/16")
    places = [place(one, f"10.{number}.0.0/16") for number in range(MOST)]
    assert len(places) == MOST and Space(places).size == MOST << 16
    assert one.place(Prefix.parse("10.130.0.0/16")) is None and one.exhausted == [Prefix.parse("10.130.0.0/16")]


def test_no_room() -> None:
    one = mapper("10.130.0.0/16", occupied=("246.128.0.0/9",))
    assert one.place(Prefix.parse("10.130.0.0/16")) is None
    assert "246.128.0.0/9" in one.warnings()[0]
