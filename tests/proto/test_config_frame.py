"""The `config` frame: which mappings are taken, what is answered, and what ends the link."""

import json
from ipaddress import IPv4Network, IPv6Network, ip_network
from itertools import combinations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpvpn.errors import ManagerError, ProtocolError
from tpvpn.proto import config, message
from tpvpn.proto.session import VIRTUAL4, VIRTUAL6

Texts = list[tuple[str, str]]
FOUR, SIX = ("246.130.0.0/16", "10.130.0.0/16"), ("fd74:7077:1::/48", "fd00:130::/48")


def changed(**members: object) -> tuple[int, Texts]:
    return config.change(message.decode(message.encode("config", **members)))


def test_a_change_arrives_as_it_was_sent() -> None:
    assert config.change(message.decode(config.encode_change(7, [FOUR, SIX]))) == (7, [FOUR, SIX])
    assert config.change(message.decode(config.encode_change(8, []))) == (8, [])


def test_an_answer_has_an_error_or_none() -> None:
    assert json.loads(config.encode_answer(7, None)) == {"type": "config", "id": 7}
    assert json.loads(config.encode_answer(7, "no")) == {"type": "config", "id": 7, "error": "no"}


@pytest.mark.parametrize(
    "pairs",
    [
        [],
        [FOUR],
        [FOUR, SIX],
        [("246.128.0.0/9", "10.128.0.0/9")],
        [("fd74:7077::/32", "2001:db8::/32")],
        [("246.255.255.255/32", "10.0.0.1/32"), ("246.255.255.254", "10.0.0.1")],
        [("246.128.0.0/16", "10.130.0.0/16"), ("246.129.0.0/16", "10.130.0.0/16")],
        [(f"246.{128 + number}.0.0/16", f"10.{number}.0.0/16") for number in range(config.MAX_PAIRS)],
    ],
    ids=str,
)
def test_mappings_that_are_taken(pairs: Texts) -> None:
    assert config.mapping(pairs) == [(ip_network(virtual), ip_network(real)) for virtual, real in pairs]


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        ([FOUR] * (config.MAX_PAIRS + 1), "65 virtual subnets are too many: a session has at most 64"),
        ([("246.130.0.1/16", "10.130.0.0/16")], "'246.130.0.1/16' is no subnet"),
        ([("246.130.0.0/16", "10.130.0.1/16")], "'10.130.0.1/16' is no subnet"),
        ([("246.130.0.0/33", "10.130.0.0/33")], "'246.130.0.0/33' is no subnet"),
        ([("", "")], "'' is no subnet"),
        ([("\x1b[2J" * 100, "x")], r"'?\[2J.*' is no subnet"),
        ([("fd74:7077::%eth0/64", "fd00::/64")], "'fd74:7077::%eth0/64' is no subnet"),
        ([("246.130.0.0/16", "10.130.0.0/17")], "different sizes"),
        ([("246.130.0.0/16", "fd00::/16")], "different sizes"),
        ([("10.131.0.0/16", "10.130.0.0/16")], r"10\.131\.0\.0/16 is no virtual subnet: those are in 246\.128\.0\.0/9"),
        ([("246.0.0.0/16", "10.130.0.0/16")], "is no virtual subnet"),
        ([("246.128.0.0/8", "10.0.0.0/8")], "is no subnet"),
        ([("246.0.0.0/8", "10.0.0.0/8")], "is no virtual subnet"),
        ([("240.0.0.0/4", "0.0.0.0/4")], "is no virtual subnet"),
        ([("fd74:7076::/32", "fd00::/32")], "is no virtual subnet: those are in fd74:7077::/32"),
        ([("fd74:7076::/31", "fd00::/31")], "is no virtual subnet"),
        ([FOUR, FOUR], "overlap"),
        ([("246.130.9.0/24", "10.0.0.0/24"), SIX, FOUR], r"246\.130\.0\.0/16 and 246\.130\.9\.0/24 overlap"),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, list) else "",
)
def test_mappings_that_are_refused(pairs: Texts, said: str) -> None:
    with pytest.raises(ManagerError, match=said) as caught:
        config.mapping(pairs)
    assert not isinstance(caught.value, ProtocolError)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "members",
    [
        {},
        {"virtual": []},
        {"id": 1},
        {"id": None, "virtual": []},
        {"id": True, "virtual": []},
        {"id": 1.0, "virtual": []},
        {"id": "1", "virtual": []},
        {"id": 1, "virtual": None},
        {"id": 1, "virtual": {}},
        {"id": 1, "virtual": "246.130.0.0/16"},
        {"id": 1, "virtual": {"246.130.0.0/16": "10.130.0.0/16"}},
        *({"id": 1, "virtual": [FOUR, pair]} for pair in (None, 5, "ab", [], ["a"], ["a", 5], ["a", "b", "c"], {})),
        *({"id": 1, "virtual": [pair]} for pair in (["a", None], [["a"], "b"], {"a": "b", "c": "d"})),
    ],
    ids=str,
)
def test_another_shape_is_malformed(members: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError) as caught:
        changed(**members)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("bracket", ["[]", "{}"])
def test_deep_nesting_is_malformed(bracket: str) -> None:
    opening, closing = ('{"a":', "1}") if bracket == "{}" else ("[", "]")
    for depth in (*range(700, 1001), 100_000):
        nested = opening * depth + closing[:-1] + closing[-1] * depth
        with pytest.raises(ProtocolError):
            config.change(message.decode(f'{{"type":"config","id":1,"virtual":[{nested}]}}'.encode()))


SUBNET = st.one_of(
    st.builds(lambda bits, length: IPv4Network((bits >> (32 - length) << (32 - length), length)),
              st.integers(int(VIRTUAL4[0]), int(VIRTUAL4[-1])), st.integers(7, 32)),
    st.builds(lambda bits, length: IPv6Network((bits >> (128 - length) << (128 - length), length)),
              st.integers(int(VIRTUAL6[0]), int(VIRTUAL6[-1])), st.integers(30, 128)),
    st.ip_addresses().map(ip_network),
)  # fmt: skip
NOISE = st.text(max_size=20) | st.ip_addresses().map(str) | SUBNET.map(str)


@given(st.lists(st.tuples(SUBNET, SUBNET), max_size=8))
def test_what_is_taken_is_of_the_pool_and_disjoint(pairs: list[tuple[Any, Any]]) -> None:
    """And whatever is so is taken: each virtual subnet, with a real one of its size."""
    same = [(virtual, real.supernet(new_prefix=min(virtual.prefixlen, real.prefixlen))) for virtual, real in pairs]
    for candidates in (pairs, same):
        good = (
            all(type(one) is type(other) and one.prefixlen == other.prefixlen for one, other in candidates)
            and all(one.subnet_of(VIRTUAL4 if one.version == 4 else VIRTUAL6) for one, _ in candidates)
            and not any(one.overlaps(other) for (one, _), (other, _) in combinations(candidates, 2))
        )
        try:
            assert config.mapping([(str(one), str(other)) for one, other in candidates]) == candidates
            assert good
        except ManagerError:
            assert not good


@given(st.lists(st.tuples(NOISE, NOISE), max_size=4))
def test_any_texts_give_one_kind_of_error(pairs: Texts) -> None:
    try:
        config.mapping(pairs)
    except ManagerError as error:
        assert str(error).isprintable()
        assert len(str(error)) < 200


VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(["id", "virtual", "error"]), VALUE))
def test_any_members_give_one_kind_of_error(members: dict[str, Any]) -> None:
    try:
        number, pairs = changed(**members)
    except ProtocolError:
        return
    assert type(number) is int
    assert all(isinstance(text, str) for pair in pairs for text in pair)
