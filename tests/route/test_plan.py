"""The plan and its operations: properties over random views, and tables of what the cases do not show."""

import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from textview import DEVICE, TABLE, apply, plan_of
from views import default_rules, prefixes, views

from tpvpn.errors import UsageError
from tpvpn.route.fib import Link, Nexthop, Route, Rule, View
from tpvpn.route.operations import operations
from tpvpn.route.plan import make_plan
from tpvpn.route.prefix import BITS, Prefix, Space
from tpvpn.route.verdict import Plan, Policy, Wanted
from tpvpn.route.virtual import POOLS

PRIVATE = tuple(map(Prefix.parse, ("10.0.0.0/8", "fd00::/8")))


@st.composite
def subnets(draw: st.DrawFn, version: int) -> Prefix:
    """A subnet that may be wanted: within the private blocks."""
    prefix = draw(prefixes(version))
    return prefix if prefix.length >= 8 else PRIVATE[version == 6]


@st.composite
def questions(draw: st.DrawFn, version: int) -> tuple[list[Wanted], Policy]:
    kinds = st.sampled_from(("service", "pod", "also"))
    one = st.builds(Wanted, subnets(version), kinds, st.just("test"))
    wanted = draw(st.lists(one, min_size=1, max_size=3))
    also = {w.prefix for w in wanted if w.kind == "also"}
    never = draw(st.lists(subnets(version).filter(lambda p: p not in also), max_size=2, unique=True))
    allow = draw(st.lists(prefixes(version), max_size=2))
    mode = draw(st.sampled_from(("fail", "skip", "hosts", "virtual")))
    hosts = draw(st.lists(subnets(version).map(lambda p: Prefix.host(p.address())), max_size=2))
    virtual = draw(
        st.lists(st.sampled_from([one.prefix for one in wanted if one.prefix.length > 8] + ["pod"]), max_size=1)
    )
    policy = Policy(
        tuple(allow),
        tuple((prefix, "test") for prefix in never),
        mode,
        tuple((host, "test") for host in hosts) if mode == "hosts" else (),
        tuple(virtual) if all(one.prefix.length >= POOLS[version].length for one in wanted) else (),
    )
    # No pool has room for a /8.
    roomy = all(one.prefix.length >= POOLS[version].length for one in wanted)
    return wanted, policy if roomy or mode != "virtual" else replace(policy, on_conflict="skip")


def probes(view: View, plan: Plan, policy: Policy, version: int) -> list[Prefix]:
    """An address on each side of every bound that could matter."""
    marks = [route.prefix for route in view.routes] + [subnet.wanted.prefix for subnet in plan.subnets]
    marks += [*policy.allow, *(prefix for prefix, _ in policy.never), *PRIVATE]
    edges = {edge for p in marks if p.version == version for edge in (p.network - 1, p.network, p.last, p.last + 1)}
    bits = BITS[version]
    return [Prefix(version, edge, bits) for edge in sorted(edges) if 0 <= edge < 1 << bits]


def taken(address: Prefix, wanted: list[Wanted], policy: Policy) -> bool:
    """Whether an address is wanted at all, by the words of the rule: the more specific wins, a tie is a never."""
    never = max((n.length for n, _ in policy.never if n.contains(address)), default=-1)
    also = max((w.prefix.length for w in wanted if w.kind == "also" and w.prefix.contains(address)), default=-1)
    return also > never or (never < 0 and any(w.prefix.contains(address) for w in wanted))


def reached_privately(view: View, address: Prefix) -> bool:
    """Whether the packet now goes by a route that is no default, over a device with carrier."""
    answer = view.lookup(address)
    if answer.rule is None or answer.route is None or answer.route.kind != "unicast":
        return False
    limited = answer.rule.destination is not None and not answer.rule.inverted and answer.rule.destination.length > 0
    live = {link.name for link in view.links if link.up and link.carrier}
    return (answer.route.prefix.length > 0 or limited) and any(hop.device in live for hop in answer.route.nexthops)


@settings(max_examples=150)
@given(st.data(), st.sampled_from((4, 6)))
def test_a_plan_takes_what_is_wanted_and_nothing_else(data: st.DataObject, version: int) -> None:
    view = data.draw(views(version))
    wanted, policy = data.draw(questions(version))
    plan = make_plan(view, wanted, policy, TABLE)
    steps = operations(plan, view, TABLE, DEVICE)
    after = apply(view, steps)
    allow = Space((*policy.allow, *(host for host, _ in policy.hosts)))
    routed = Space(plan.routes)
    for address in probes(view, plan, policy, version):
        before, now = view.lookup(address), after.lookup(address)
        if reached_privately(view, address) and address not in allow:
            assert now == before, f"{address} was reached by {before} and is not allowed, but goes by {now}"
        if not taken(address, wanted, policy) or address not in routed:
            assert now == before, f"{address} is not wanted, but goes by {now}, not {before}"
        else:
            assert now.route is not None and now.route.device == DEVICE, f"{address} goes by {now}"


@given(st.data(), st.sampled_from((4, 6)))
def test_parts_of_a_subnet(data: st.DataObject, version: int) -> None:
    view = data.draw(views(version))
    wanted, policy = data.draw(questions(version))
    plan = make_plan(view, wanted, policy, TABLE)
    assert plan.ok == (policy.on_conflict in ("skip", "hosts") or all(s.verdict != "conflict" for s in plan.subnets))
    assert bool(plan.fixes) == any(s.remaining for s in plan.subnets)
    for subnet in plan.subnets:
        whole = Space([subnet.wanted.prefix])
        if subnet.verdict == "virtual":
            assert subnet.virtual and subnet.virtual.length == subnet.wanted.prefix.length
            assert POOLS[version].contains(subnet.virtual) and subnet.routes == (subnet.virtual,)
            assert policy.virtual or (policy.on_conflict == "virtual" and subnet.conflicts)
            continue
        routed, withheld = Space(subnet.routes), Space(subnet.withheld)
        left_out = whole & Space(prefix for prefix, _ in policy.never)
        assert not routed & withheld and not (routed | withheld) - whole
        assert not whole - routed - withheld - left_out
        hosts = Space(host for host, _ in policy.hosts)
        assert not Space(subnet.remaining) - (withheld | left_out | hosts)
        assert not Space(subnet.remaining) & Space(policy.allow)
        assert bool(subnet.remaining) == any(not conflict.allowed for conflict in subnet.conflicts)
        expected = {
            "routed": not withheld and not Space(subnet.remaining) - hosts,
            "partial": bool(routed and withheld),
            "conflict": bool(withheld and not routed),
            "excluded": not routed and not withheld and not subnet.conflicts,
        }
        assert expected[subnet.verdict]


@settings(max_examples=150)
@given(st.data(), st.sampled_from((4, 6)))
def test_operations_are_idempotent_and_undone_by_their_inverses(data: st.DataObject, version: int) -> None:
    view = data.draw(views(version))
    first = make_plan(view, *data.draw(questions(version)), TABLE)
    once = apply(view, operations(first, view, TABLE, DEVICE))
    assert operations(first, once, TABLE, DEVICE) == []
    second = make_plan(once, *data.draw(questions(version)), TABLE)
    steps = operations(second, once, TABLE, DEVICE)
    twice = apply(once, steps)
    assert operations(second, twice, TABLE, DEVICE) == []
    undone = apply(twice, [step.inverse() for step in reversed(steps)])
    assert undone.rules == once.rules and set(undone.routes) == set(once.routes)
    nothing = apply(twice, operations(Plan(True, ()), twice, TABLE, DEVICE))
    assert nothing.rules == view.rules and set(nothing.routes) == set(view.routes)


@given(views(), st.lists(prefixes().filter(lambda p: p.length > 8), min_size=1, max_size=3, unique=True))
def test_no_packet_that_is_left_out_strays_on_the_way(view: View, never: list[Prefix]) -> None:
    wanted = [Wanted(PRIVATE[0], "service", "test")]
    policy = Policy((PRIVATE[0],), tuple((prefix, "test") for prefix in never))
    plan = make_plan(view, wanted, policy, TABLE)
    there = operations(plan, view, TABLE, DEVICE)
    steps = there + operations(Plan(True, ()), apply(view, there), TABLE, DEVICE)
    for count in range(len(steps) + 1):
        during = apply(view, steps[:count])
        for address in probes(view, plan, policy, 4):
            if not taken(address, wanted, policy):
                assert during.lookup(address) == view.lookup(address)


def test_a_throw_comes_first_and_goes_last() -> None:
    view = View(default_rules())
    plan = plan_of(view, "--service-cidr 10.130.0.0/16 --never-proxy 10.130.9.9")
    added = operations(plan, view, TABLE, DEVICE)
    assert [type(step.target).__name__ for step in added] == ["Route", "Route", "Rule"]
    assert added[0].target == Route(Prefix.parse("10.130.9.9"), TABLE, "throw", protocol=116)
    assert added[1].target == Route(
        Prefix.parse("10.130.0.0/16"), TABLE, nexthops=(Nexthop(DEVICE),), protocol=116, scope=253
    )
    assert added[2].target == Rule(4, 16383, table=TABLE, protocol=116)
    removed = operations(Plan(True, ()), apply(view, added), TABLE, DEVICE)
    assert removed == [step.inverse() for step in reversed(added)]


@pytest.mark.parametrize(
    ("preferences", "chosen"),
    [
        ([(0, 255), (32766, 254)], 16383),
        ([(0, 255), (105, 254), (110, 7120)], 52),
        ([(0, 255), (1, 52)], 0),
        ([(0, 255), (0, 52), (220, 220)], 110),
        ([(0, 255)], 16383),
        ([], 16383),
        ([(100, 255), (32766, 254)], 16433),
        ([(50, 52), (100, 255)], 25),
    ],
)
def test_where_our_rule_goes(preferences: list[tuple[int, int]], chosen: int) -> None:
    rules = tuple(Rule(4, preference, table=table) for preference, table in preferences)
    view = View(rules)
    plan = plan_of(view, "--service-cidr 10.130.0.0/16")
    steps = operations(plan, view, TABLE, DEVICE)
    assert steps[-1].target == Rule(4, chosen, table=TABLE, protocol=116)
    assert operations(plan, apply(view, steps), TABLE, DEVICE) == []


def test_two_sessions_leave_each_other_alone() -> None:
    view = View(default_rules())
    one = plan_of(view, "--service-cidr 10.130.0.0/16")
    both = apply(view, operations(one, view, TABLE, DEVICE))
    other = plan_of(both, "--service-cidr 10.140.0.0/16")
    both = apply(both, operations(other, both, TABLE + 1, "tpvpn1"))
    assert both.lookup("10.130.0.1").route == Route(
        Prefix.parse("10.130.0.0/16"), TABLE, nexthops=(Nexthop(DEVICE),), protocol=116, scope=253
    )
    assert str(both.lookup("10.140.0.1")) == "10.140.0.0/16 dev tpvpn1"
    assert operations(one, both, TABLE, DEVICE) == [] == operations(other, both, TABLE + 1, "tpvpn1")


@pytest.mark.parametrize(
    "command",
    [
        "--also-proxy 127.0.0.1", "--also-proxy 169.254.169.254", "--pod-cidr 224.0.0.0/24", "--pod-cidr 0.0.0.0/8",
        "--pod-cidr 0.0.0.0/0", "--pod-cidr ::/0", "--also-proxy ::1", "--also-proxy fe80::/64", "--also-proxy ff02::1",
        "--also-proxy 198.51.100.0/24 --never-proxy 198.51.100.0/24", "--pod-cidr 10.132.0.1/16", "--never-proxy x",
        "--allow-conflicting-subnets 10.1.0.0/8", "--also-proxy 10.1.0.0/16,,10.2.0.0/16",
        "--pod-cidr fd00::/8 --virtual pod", "--host 10.130.0.1",
        "--on-conflict hosts", "--on-conflict hosts --host 10.130.0.0/24", "--virtual 10.131.0.0/16", "--virtual pod",
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(command: str) -> None:
    with pytest.raises(UsageError):
        plan_of(View(default_rules()), f"--service-cidr 10.130.0.0/16 {command}")


def test_cluster_subnets_must_be_known() -> None:
    with pytest.raises(UsageError, match="--service-cidr"):
        plan_of(View(), "--also-proxy 10.1.0.0/16")


def test_fixes_allow_what_remains_besides_what_is_allowed() -> None:
    view = View(default_rules(), (Route(PRIVATE[0], nexthops=(Nexthop("tun0"),)),), (Link(2, "tun0", "tun"),))
    command = "--service-cidr 10.130.0.0/16 --pod-cidr 10.132.0.0/16"
    plan = plan_of(view, f"{command} --allow-conflicting-subnets 10.130.0.0/17")
    allow, helm, skip, hosts, virtual = (fix.command for fix in plan.fixes)
    assert "--allow-conflicting-subnets 10.130.128.0/17" in allow and "'client.routing" in helm and "{" in helm
    assert plan_of(view, f"{command} {allow.removeprefix('tpvpn connect')}").ok
    for fix in (skip, hosts, virtual):
        assert plan_of(view, f"{command} {fix.removeprefix('tpvpn connect')}").ok


def test_a_hundred_thousand_routes_are_planned_in_time() -> None:
    many = tuple(
        Route(Prefix.around(4, (number * 2654435761) & 0xFFFFFFFF, 20 + number % 5), nexthops=(Nexthop("eth0"),))
        for number in range(100_000)
    )
    tunnel = tuple(replace(route, table=52, nexthops=(Nexthop("wg0"),)) for route in many[:1000])
    rules = (*default_rules()[:1], Rule(4, 100, table=52), *default_rules()[1:])
    view = View(rules, many + tunnel, (Link(2, "eth0"), Link(3, "wg0")))
    begin = time.process_time()
    plan = make_plan(view, [Wanted(PRIVATE[0], "service", "test")], Policy(on_conflict="skip"))
    operations(plan, view, TABLE, DEVICE)
    assert time.process_time() - begin < 2
    assert plan.subnets[0].verdict == "partial"
