"""`View.lookup` against tables of cases and against an oracle that tries everything."""

import time
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from views import default_rules, prefixes, views

from tpvpn.errors import UsageError
from tpvpn.route.fib import Answer, Link, Nexthop, Route, Rule, View
from tpvpn.route.prefix import Prefix

TEN = Prefix.parse("10.0.0.0/8")


def unicast(prefix: str, device: str, table: int = 254, metric: int = 0) -> Route:
    return Route(Prefix.parse(prefix), table, nexthops=(Nexthop(device),), metric=metric)


def brute_force(view: View, destination: Prefix) -> Answer:
    """The same answer by going through all rules and routes, written as differently as possible; only local packets."""

    def decide(index: int) -> Answer:
        if index == len(view.rules):
            return Answer()
        rule = view.rules[index]
        failed = [
            rule.version != destination.version,
            rule.iif not in (None, "lo"),
            rule.mark not in (None, 0),
            rule.destination is not None and not rule.destination.contains(destination),
        ]
        if failed[0] or any(failed[1:]) != rule.inverted:
            return decide(index + 1)
        if rule.action == "goto":
            ahead = [i for i in range(index, len(view.rules)) if view.rules[i].preference >= (rule.goto or 0)]
            exists = any(r.preference == rule.goto and r.version == rule.version for r in view.rules)
            return decide(ahead[0] if exists else index + 1)
        if rule.action in ("nop",):
            return decide(index + 1)
        if rule.action != "lookup":
            return Answer(rule)
        down = {link.name for link in view.links if not link.up}
        found = [
            route
            for route in view.routes
            if route.table == rule.table
            and route.prefix.contains(destination)
            and not (route.kind == "unicast" and {hop.device for hop in route.nexthops} <= down)
        ]
        if not found:
            return decide(index + 1)
        best = max(found, key=lambda route: (route.prefix.length, -route.metric))
        limit = -1 if rule.suppress_prefixlength is None else rule.suppress_prefixlength
        if best.kind == "throw" or (best.kind == "unicast" and best.prefix.length <= limit):
            return decide(index + 1)
        return Answer(rule, best)

    return decide(0)


@given(st.data(), st.sampled_from((4, 6)))
def test_lookup_agrees_with_trying_everything(data: st.DataObject, version: int) -> None:
    view = data.draw(views(version))
    for probe in data.draw(st.lists(prefixes(version), min_size=1, max_size=5)):
        host = Prefix.around(version, probe.last, 32 if version == 4 else 128)
        assert view.lookup(host) == brute_force(view, host)


def test_longest_prefix_then_lowest_metric() -> None:
    routes = (
        unicast("0.0.0.0/0", "eth0"),
        unicast("10.0.0.0/8", "eth1", metric=100),
        unicast("10.0.0.0/8", "tun0", metric=50),
        unicast("10.1.0.0/16", "wg0", metric=900),
    )
    view = View(default_rules(), routes)
    assert view.lookup("10.2.0.1").route == routes[2]
    assert view.lookup("10.1.0.1").route == routes[3]
    assert view.lookup("192.0.2.1").route == routes[0]
    assert view.lookup("192.0.2.1").rule == Rule(4, 32766, table=254)
    assert str(view.lookup("192.0.2.1")) == "default dev eth0"
    assert str(view.lookup("2001:db8::1")) == "no route"
    with pytest.raises(UsageError):
        view.lookup("10.0.0.0/8")


def test_a_device_that_is_down_is_passed_over_one_without_carrier_is_not() -> None:
    routes = (unicast("10.0.0.0/8", "tun0"), unicast("0.0.0.0/0", "eth0"))
    view = View(default_rules(), routes, (Link(1, "eth0"), Link(2, "tun0", up=False)))
    assert view.lookup("10.0.0.1").route == routes[1]
    idle = replace(view, links=(Link(1, "eth0"), Link(2, "tun0", carrier=False)))
    assert idle.lookup("10.0.0.1").route == routes[0]
    multipath = Route(TEN, nexthops=(Nexthop("tun0", "10.8.0.1"), Nexthop("eth0")))
    assert replace(view, routes=(multipath,)).lookup("10.0.0.1").route == multipath
    assert str(multipath) == "10.0.0.0/8 nexthop via 10.8.0.1 dev tun0 nexthop dev eth0"


FULL_TUNNEL = (
    Rule(4, 0, table=255),
    Rule(4, 32764, table=254, suppress_prefixlength=0),
    Rule(4, 32765, table=51820, mark=0xCA6C, inverted=True),
    Rule(4, 32766, table=254),
)


@pytest.mark.parametrize(
    ("address", "mark", "device"),
    [("192.0.2.1", 0, "wg0"), ("192.0.2.1", 0xCA6C, "eth0"), ("192.168.1.9", 0, "eth0"), ("192.168.1.9", 1, "eth0")],
)
def test_wg_quick_full_tunnel(address: str, mark: int, device: str) -> None:
    routes = (
        unicast("0.0.0.0/0", "eth0"),
        unicast("192.168.1.0/24", "eth0"),
        unicast("0.0.0.0/0", "wg0", 51820),
    )
    route = View(FULL_TUNNEL, routes).lookup(address, mark=mark).route
    assert route is not None and route.device == device


def test_rejecting_rules_and_routes_answer_throw_does_not() -> None:
    main = unicast("0.0.0.0/0", "eth0")
    for kind in ("blackhole", "unreachable", "prohibit"):
        reject = Route(TEN, 52, kind)
        view = View((Rule(4, 10, table=52, suppress_prefixlength=8), *default_rules()), (main, reject))
        assert view.lookup("10.0.0.1").route == reject, "an error is never suppressed"
        assert not view.lookup("10.0.0.1").delivers
        refusing = Rule(4, 10, kind, destination=TEN)
        answer = View((refusing, *default_rules()), (main,)).lookup("10.0.0.1")
        assert answer == Answer(refusing) and not answer.delivers
        assert str(answer) == f"{kind} by rule 10"
    tunnel = unicast("0.0.0.0/0", "wg0", 52)
    throwing = View((Rule(4, 10, table=52), *default_rules()), (main, Route(TEN, 52, "throw"), tunnel))
    assert throwing.lookup("10.0.0.1").route == main
    assert throwing.lookup("11.0.0.1").route == tunnel


@pytest.mark.parametrize(
    ("rule", "question", "matched"),
    [
        (Rule(4, 10, table=52, iif="eth0"), {}, False),
        (Rule(4, 10, table=52, iif="eth0"), {"iif": "eth0"}, True),
        (Rule(4, 10, table=52, iif="lo"), {}, True),
        (Rule(4, 10, table=52, oif="tun0"), {}, False),
        (Rule(4, 10, table=52, oif="tun0"), {"oif": "tun0"}, True),
        (Rule(4, 10, table=52, mark=0x80000, mark_mask=0xFF0000), {}, False),
        (Rule(4, 10, table=52, mark=0x80000, mark_mask=0xFF0000), {"mark": 0x80001}, True),
        (Rule(4, 10, table=52, mark=0, mark_mask=0xFF), {}, True),
        (Rule(4, 10, table=52, uids=(1000, 1000)), {}, False),
        (Rule(4, 10, table=52, uids=(1000, 1000)), {"uid": 1000}, True),
        (Rule(4, 10, table=52, uids=(1000, 1000), inverted=True), {"uid": 0}, True),
        (Rule(4, 10, table=52, protocols_ports=True), {}, False),
        (Rule(4, 10, table=52, source=TEN), {}, False),
        (Rule(4, 10, table=52, source=TEN), {"source": Prefix.parse("10.0.0.5")}, True),
        (Rule(4, 10, table=52, source=Prefix.parse("0.0.0.0")), {}, True),
        (Rule(4, 10, table=52, destination=TEN), {}, True),
        (Rule(4, 10, table=52, destination=TEN, inverted=True), {}, False),
        (Rule(4, 10, table=52, inverted=True), {}, False),
        (Rule(6, 10, table=52), {}, False),
    ],
)
def test_selectors(rule: Rule, question: dict[str, object], matched: bool) -> None:
    routes = (unicast("0.0.0.0/0", "eth0"), unicast("0.0.0.0/0", "tun0", 52))
    answer = View((rule, *default_rules()), routes).lookup("10.0.0.1", **question)  # type: ignore[arg-type]
    assert (answer.rule == rule) == matched


def test_goto_jumps_ahead_when_its_target_exists() -> None:
    routes = (unicast("0.0.0.0/0", "eth0"), unicast("0.0.0.0/0", "tun0", 52))
    rules = (Rule(4, 10, "goto", goto=30), Rule(6, 15), Rule(4, 20, table=52), Rule(4, 30, "nop"), *default_rules()[1:])
    assert View(rules, routes).lookup("10.0.0.1").route == routes[0]
    unresolved = (rules[0], *rules[2:3], *default_rules()[1:])
    assert View(unresolved, routes).lookup("10.0.0.1").route == routes[1]


def test_a_hundred_thousand_routes_are_cheap() -> None:
    many = tuple(
        Route(Prefix.around(4, (number * 2654435761) & 0xFFFFFFFF, 20 + number % 5), nexthops=(Nexthop("eth0"),))
        for number in range(100_000)
    )
    view = View(default_rules(), many)
    begin = time.process_time()
    for number in range(0, 100_000, 1000):
        assert view.lookup(many[number].prefix).delivers
    assert time.process_time() - begin < 2
