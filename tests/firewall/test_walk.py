"""The walk with three answers, on chains made by hand: what is sure, what is doubtful and why, what passes."""

import pytest

from tpvpn.firewall.model import (
    MARK,
    Chain,
    Condition,
    Effect,
    Field,
    Firewall,
    Ranges,
    Rule,
    Table,
    Verdict,
    VerdictMap,
    constant,
    equals,
    plain,
    unreadable,
)
from tpvpn.firewall.packet import Packet
from tpvpn.firewall.walk import drops
from tpvpn.route.prefix import Prefix

YES = equals(plain(MARK), 0)
NO = equals(plain(MARK), 0, negated=True)
MAYBE = unreadable("a")
PERHAPS = unreadable("b")
ACCEPT, DROP, RETURN, QUEUE = (Verdict(kind) for kind in ("accept", "drop", "return", "queue"))
PORT = Field("th", 2, 2)


def jump(name: str) -> Verdict:
    return Verdict("jump", name)


def goto(name: str) -> Verdict:
    return Verdict("goto", name)


def found(chains: dict[str, list[tuple[object, ...]]], policy: bool = False) -> list[tuple[str, int, str]]:
    """Where packets end, as chain, rule (0: policy) and reasons for doubt; a rule is its steps and its verdict."""
    made = {
        name: Chain(
            name,
            tuple(Rule(tuple(steps), verdict, i) for i, (*steps, verdict) in enumerate(rules, 1)),  # type: ignore[arg-type]
            "output" if name == "out" else None,
            0,
            policy and name == "out",
        )
        for name, rules in chains.items()
    }
    firewall = Firewall((Table("nft", "inet", "t", made),))
    packet = Packet("out", "tpvpn0", 9, None, Prefix.parse("10.130.0.0/16"))
    return [
        (drop.chain.name, drop.rule.handle if drop.rule else 0, " ".join(sorted(drop.doubts)))
        for drop in drops(firewall, packet)
    ]


WALKS = {
    "a rule that matches": ([(YES, DROP)], {}, False, [("out", 1, "")]),
    "a rule that does not": ([(NO, DROP)], {}, False, []),
    "no condition": ([(DROP,)], {}, False, [("out", 1, "")]),
    "all conditions must hold": ([(YES, NO, MAYBE, DROP)], {}, False, []),
    "one is unknown": ([(YES, MAYBE, DROP)], {}, False, [("out", 1, "a")]),
    "the policy": ([(NO, ACCEPT)], {}, True, [("out", 0, "")]),
    "accepted before the policy": ([(YES, ACCEPT)], {}, True, []),
    "perhaps accepted before the policy": ([(MAYBE, ACCEPT)], {}, True, [("out", 0, "a")]),
    "perhaps accepted, then dropped": ([(MAYBE, ACCEPT), (YES, DROP)], {}, False, [("out", 2, "a")]),
    "perhaps dropped, then surely": ([(MAYBE, DROP), (DROP,)], {}, False, [("out", 2, "")]),
    "perhaps dropped, then accepted": ([(MAYBE, DROP), (ACCEPT,)], {}, True, [("out", 1, "a")]),
    "queued": ([(QUEUE,)], {}, True, []),
    "perhaps queued": ([(MAYBE, QUEUE)], {}, True, [("out", 0, "a")]),
    "a jump comes back": ([(jump("x"),), (DROP,)], {"x": [(NO, ACCEPT)]}, False, [("out", 2, "")]),
    "a goto does not": ([(goto("x"),), (DROP,)], {"x": [(NO, ACCEPT)]}, False, []),
    "a goto comes to the policy": ([(goto("x"),), (ACCEPT,)], {"x": []}, True, [("out", 0, "")]),
    "return in a base chain": ([(RETURN,), (DROP,)], {}, True, [("out", 0, "")]),
    "perhaps a goto": ([(MAYBE, goto("x")), (DROP,)], {"x": []}, False, [("out", 2, "a")]),
    "perhaps a goto, the policy is sure": ([(MAYBE, goto("x"))], {"x": []}, True, [("out", 0, "")]),
    "perhaps a goto that drops": ([(MAYBE, goto("x")), (DROP,)], {"x": [(DROP,)]}, False, [("out", 2, "")]),
    "perhaps a return, the policy is sure": ([(MAYBE, RETURN)], {}, True, [("out", 0, "")]),
    "perhaps a return": ([(MAYBE, RETURN), (DROP,)], {}, False, [("out", 2, "a")]),
    "return from a chain": ([(jump("x"),), (DROP,)], {"x": [(RETURN,), (ACCEPT,)]}, False, [("out", 2, "")]),
    "a chain that accepts": ([(jump("x"),), (DROP,)], {"x": [(ACCEPT,)]}, True, []),
    "perhaps a chain that accepts": ([(MAYBE, jump("x")), (DROP,)], {"x": [(ACCEPT,)]}, True, [("out", 2, "a")]),
    "perhaps a chain that drops": ([(MAYBE, jump("x")), (ACCEPT,)], {"x": [(DROP,)]}, False, [("x", 1, "a")]),
    "two doubts": ([(MAYBE, ACCEPT), (PERHAPS, DROP)], {}, False, [("out", 2, "a b")]),
    "a doubt within": ([(jump("x"),), (DROP,)], {"x": [(PERHAPS, ACCEPT)]}, False, [("out", 2, "b")]),
    "a doubtful return before an accept": (
        [(jump("x"),), (DROP,)],
        {"x": [(MAYBE, RETURN), (ACCEPT,)]},
        False,
        [("out", 2, "a")],
    ),
    "a goto in a chain comes back to the jump": (
        [(jump("x"),), (DROP,)],
        {"x": [(goto("y"),), (ACCEPT,)], "y": []},
        False,
        [("out", 2, "")],
    ),
    "a chain that went": ([(jump("x"),), (DROP,)], {}, False, [("out", 2, "a chain that was not read")]),
    "a mark that is set": (
        [(Effect(MARK, constant(b"\1\0\0\0")), None), (YES, DROP)],
        {},
        False,
        [],
    ),
    "a mark that is perhaps set": (
        [(MAYBE, Effect(MARK, constant(b"\1\0\0\0")), None), (YES, DROP)],
        {},
        False,
        [("out", 2, "meta mark")],
    ),
    "a mark set after a condition that does not hold": (
        [(NO, Effect(MARK, constant(b"\1\0\0\0")), None), (YES, DROP)],
        {},
        False,
        [("out", 2, "")],
    ),
    "a map with every port dropped but one": (
        [(VerdictMap(plain(PORT), Ranges([(0, 79), (81, 65535)]), (DROP, DROP), None),)],
        {},
        False,
        [("out", 1, "the destination port"), ("out", 1, "the destination port")],
    ),
    "a map's default": ([(VerdictMap(plain(MARK), Ranges([(7, 7)]), (ACCEPT,), DROP),)], {}, False, [("out", 1, "")]),
    "a map's match": ([(VerdictMap(plain(MARK), Ranges([(0, 7)]), (ACCEPT,), DROP),)], {}, True, []),
}


@pytest.mark.parametrize("name", WALKS)
def test_walk(name: str) -> None:
    rules, chains, policy, expected = WALKS[name]
    assert found({"out": rules, **chains}, policy) == expected  # type: ignore[dict-item]


def test_chains_that_call_each_other_end() -> None:
    assert found({"out": [(jump("x"),), (DROP,)], "x": [(jump("y"),), (jump("y"),)], "y": [(jump("x"),)]})


def test_chains_that_fan_out_end_soon() -> None:
    chains = {f"c{i}": [(jump(f"c{i + 1}"),)] * 20 for i in range(15)}
    assert found({"out": [(jump("c0"),), (DROP,)], **chains})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("prefix", "negated", "expected"),
    [
        ("10.130.0.0/16", False, "sure"),
        ("10.0.0.0/8", False, "sure"),
        ("10.0.0.0/8", True, "passes"),
        ("10.130.5.0/24", False, "the destination address"),
        ("10.130.5.0/24", True, "the destination address"),
        ("10.131.0.0/16", False, "passes"),
        ("10.131.0.0/16", True, "sure"),
    ],
)
def test_a_subnet_is_all_its_addresses(prefix: str, negated: bool, expected: str) -> None:
    network = Prefix.parse(prefix)
    ranges = Ranges([(network.network, network.last)])
    hit = found({"out": [(Condition(plain(Field("nh", 4, 16)), ranges, negated), DROP)]})
    assert [doubts or "sure" for _chain, _rule, doubts in hit] == ([] if expected == "passes" else [expected])
