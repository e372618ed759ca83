"""The plan: what is routed, what is withheld and why, and the operations that take the kernel from here to there.

Pure: a `View`, what is wanted and the policy in, values out. Applying a plan twice is harmless; each operation knows
its inverse.

`make_plan()` judges every wanted subnet. What overlaps a private route and is not allowed remains; a never-proxy takes
its part out of a discovered subnet, and out of an also-proxy that is less specific than itself. `operations()` compares
with what is ours in the kernel: unicast routes, `throw` routes for the never-proxy inside of them (the packet goes on
by the route it had before), and one rule a family in front of all that could answer for such a packet.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from tpvpn.errors import UsageError
from tpvpn.route.conflict import NEVER_WANTED, Found, classify, foreign, overlapping, relation
from tpvpn.route.fib import LOCAL_TABLE, TPVPN_PROTOCOL, Nexthop, Route, Rule, View
from tpvpn.route.prefix import Prefix, Space

Kind = Literal["service", "pod", "also"]
OnConflict = Literal["fail", "skip", "hosts", "virtual"]
Verdict = Literal["routed", "partial", "conflict", "virtual", "excluded"]

MAIN_PREFERENCE = 32766
FAMILIES: tuple[Literal[4, 6], ...] = (4, 6)
SCOPE_LINK = 253


@dataclass(frozen=True, slots=True)
class Wanted:
    """A subnet to route, what it is for, and where that is known from, in words for the user."""

    prefix: Prefix
    kind: Kind
    source: str


@dataclass(frozen=True, slots=True)
class Policy:
    """What may be taken from private routes, what must never be (with the reason), and what a conflict leads to."""

    allow: tuple[Prefix, ...] = ()
    never: tuple[tuple[Prefix, str], ...] = ()
    on_conflict: OnConflict = "fail"
    hosts: tuple[tuple[Prefix, str], ...] = ()
    """Single addresses (/32, /128) for `hosts`, each with where it is from ("--host", "hosts.txt line 3")."""
    virtual: tuple[Prefix | Literal["service", "pod"], ...] = ()
    """What is mapped to a virtual subnet whether it conflicts or not: wanted subnets, or all of a kind."""
    given: tuple[str, ...] = ()
    """The user's other words, which the commands of the fixes repeat: ("--service-cidr", "10.130.0.0/16", …)."""


@dataclass(frozen=True, slots=True)
class Conflict:
    """A private route that shares addresses with a wanted subnet; `allowed` when all of those may be taken."""

    route: Prefix
    device: str | None
    owner: str
    gateway: str | None
    table: int
    relation: Literal["covers", "inside", "equal"]
    allowed: bool


@dataclass(frozen=True, slots=True)
class Subnet:
    """The verdict on a wanted subnet. `remaining`: what overlaps private routes and is not allowed."""

    wanted: Wanted
    verdict: Verdict
    routes: tuple[Prefix, ...] = ()
    withheld: tuple[Prefix, ...] = ()
    remaining: tuple[Prefix, ...] = ()
    conflicts: tuple[Conflict, ...] = ()
    virtual: Prefix | None = None


@dataclass(frozen=True, slots=True)
class NeverProxy:
    """Addresses that are left alone, why, and the route that they take, as `ip route` shows it."""

    prefix: Prefix
    reason: str
    route: str


@dataclass(frozen=True, slots=True)
class Fix:
    """A way out for the user, with the command to paste."""

    description: str
    command: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be routed; `ok` is false when `connect` would refuse."""

    ok: bool
    subnets: tuple[Subnet, ...]
    throws: tuple[Prefix, ...] = ()
    never_proxy: tuple[NeverProxy, ...] = ()
    warnings: tuple[str, ...] = ()
    fixes: tuple[Fix, ...] = ()

    @property
    def routes(self) -> tuple[Prefix, ...]:
        """All that is to be routed, each prefix once, sorted."""
        return tuple(sorted({prefix for subnet in self.subnets for prefix in subnet.routes}))


def make_plan(view: View, wanted: Sequence[Wanted], policy: Policy) -> Plan:
    """Judge every wanted subnet; UsageError when the wanted and the policy contradict each other or make no sense."""
    check(wanted, policy)
    before = foreign(view)
    found = classify(before)
    subnets = tuple(judge(one, found, policy, view.ipv6) for one in dict.fromkeys(wanted))
    return Plan(
        ok=policy.on_conflict == "skip" or all(subnet.verdict != "conflict" for subnet in subnets),
        subnets=subnets,
        throws=throws(subnets, policy),
        never_proxy=tuple(NeverProxy(prefix, reason, str(before.lookup(prefix))) for prefix, reason in policy.never),
        warnings=(*view.warnings, *nesting(wanted), *dict.fromkeys(doubts(subnets, found, view.ipv6))),
        fixes=tuple(fixes(subnets, policy)),
    )


def check(wanted: Iterable[Wanted], policy: Policy) -> None:
    """Refuse what is never wanted, and the same prefix as also-proxy and never-proxy."""
    reasons = dict(policy.never)
    for one in wanted:
        for never in NEVER_WANTED:
            if never.overlaps(one.prefix):
                raise UsageError(
                    f"{one.prefix} ({one.source}) overlaps {never}, which is loopback, link-local, multicast or "
                    "unspecified and stays with the host: give a subnet without it"
                )
        if one.kind == "also" and one.prefix in reasons:
            raise UsageError(
                f"{one.prefix} is both also-proxy ({one.source}) and never-proxy ({reasons[one.prefix]}): drop one of "
                "them, or make one more specific, it then wins"
            )


def judge(wanted: Wanted, found: Sequence[Found], policy: Policy, ipv6: bool) -> Subnet:
    """The verdict on one subnet."""
    whole, left_out = Space([wanted.prefix]), Space(exceptions(wanted, policy))
    if wanted.prefix in left_out or (wanted.prefix.version == 6 and not ipv6):
        return Subnet(wanted, "excluded")
    allow = Space(policy.allow)
    private = [one for one in overlapping(found, wanted.prefix) if one.standing == "private"]
    conflicts = list[Conflict]()
    for one in private:
        overlap = (Space([one.prefix]) & whole) - left_out
        if overlap:
            conflicts.append(
                Conflict(
                    route=one.prefix,
                    device=one.hop.device,
                    owner=one.owner,
                    gateway=one.hop.gateway,
                    table=one.route.table,
                    relation=relation(one.prefix, wanted.prefix),
                    allowed=not overlap - allow,
                )
            )
    remaining = (Space(one.prefix for one in private) & whole) - allow
    # A piece that is partly left out stays whole: cut along the never-proxy it would be in crumbs, and no more routed.
    pieces = tuple(piece for piece in remaining.prefixes() if piece not in left_out)
    withheld = (wanted.prefix,) if pieces and policy.on_conflict == "fail" else pieces
    routes = tuple(piece for piece in (whole - Space(withheld)).prefixes() if piece not in left_out)
    verdict: Verdict = "routed" if not withheld else "partial" if routes else "conflict"
    return Subnet(wanted, verdict, routes, withheld, pieces, tuple(conflicts))


def exceptions(wanted: Wanted, policy: Policy) -> list[Prefix]:
    """The never-proxy that hold for a subnet: all that overlap a discovered one, the more specific of an also-proxy."""
    return [
        never
        for never, _ in policy.never
        if wanted.prefix.contains(never) or (wanted.kind != "also" and never.contains(wanted.prefix))
    ]


def throws(subnets: Iterable[Subnet], policy: Policy) -> tuple[Prefix, ...]:
    """The never-proxy inside of what is routed."""
    return tuple(
        sorted(
            {
                never
                for subnet in subnets
                for never in exceptions(subnet.wanted, policy)
                if any(route.contains(never) for route in subnet.routes)
            }
        )
    )


def nesting(wanted: Sequence[Wanted]) -> list[str]:
    """A word on service and pod subnets that share addresses."""
    unique = [one for one in dict.fromkeys(wanted) if one.kind != "also"]
    return [
        f"the {inner.kind} subnet {inner.prefix} ({inner.source}) "
        + ("equals" if inner.prefix == outer.prefix else "lies inside")
        + f" the {outer.kind} subnet {outer.prefix} ({outer.source}): what both hold is routed once"
        for index, one in enumerate(unique)
        for other in unique[index + 1 :]
        if one.prefix.overlaps(other.prefix)
        for outer, inner in [(one, other) if one.prefix.contains(other.prefix) else (other, one)]
    ]


def doubts(subnets: Iterable[Subnet], found: Sequence[Found], ipv6: bool) -> Iterable[str]:
    """What the user should know of the routes that overlap."""
    for subnet in subnets:
        prefix = subnet.wanted.prefix
        if prefix.version == 6 and not ipv6:
            why = "IPv6 is switched off here (net.ipv6.conf.default.disable_ipv6) or not in the tunnel"
            yield f"{prefix} is left out: {why}"
            continue
        holed = set[str | None]()
        for one in overlapping(found, prefix):
            if one.standing == "idle":
                yield (
                    f"{one} ({one.owner}) overlaps {prefix}, but {one.hop.device} has no carrier: "
                    "it is no conflict now, and becomes one when the device is used"
                )
            elif one.standing == "piece":
                if one.hop.device not in holed:
                    yield (
                        f"{one} ({one.owner}) overlaps {prefix}, and is taken for a piece of the default route, since "
                        f"{one.hop.device} leaves out only some holes of this private block: keep the VPN's own hosts "
                        "in it with --never-proxy"
                    )
                holed.add(one.hop.device)
            elif not one.certain:
                yield (
                    f"{one} ({one.owner}) overlaps {prefix}, but is only for packets that rule {one.rule.preference} "
                    "selects by source, user or port"
                )


def fixes(subnets: Iterable[Subnet], policy: Policy) -> Iterable[Fix]:
    """The commands that help when something remains; none when nothing does."""
    blocked = [subnet for subnet in subnets if subnet.remaining]
    if not blocked:
        return
    missing = dict.fromkeys(piece for subnet in blocked for piece in subnet.remaining)
    cidrs = list(map(str, dict.fromkeys((*policy.allow, *missing))))
    devices = sorted({one.device or "?" for subnet in blocked for one in subnet.conflicts if not one.allowed})
    flags = " ".join(f"--allow-conflicting-subnets {cidr}" for cidr in cidrs)
    skip = "--on-conflict skip " if policy.on_conflict == "skip" else ""
    yield Fix(
        f"if no host that you reach by {' or '.join(devices)} is in {' or '.join(map(str, missing))}, allow it",
        f"tpvpn connect {skip}{flags}",
    )
    yield Fix(
        "the same for everyone, by the cluster's admin",
        f"tpvpn helm upgrade --set 'client.routing.allowConflictingSubnets={{{','.join(cidrs)}}}'",
    )
    if policy.on_conflict == "fail":
        yield Fix("connect without what conflicts, which stays as it is", "tpvpn connect --on-conflict skip")


@dataclass(frozen=True, slots=True)
class Operation:
    """Add or remove one route or rule of ours."""

    verb: Literal["add", "remove"]
    target: Route | Rule

    def inverse(self) -> "Operation":
        """The operation that undoes this one."""
        return Operation("remove" if self.verb == "add" else "add", self.target)


def operations(plan: Plan, view: View, table: int, device: str) -> list[Operation]:
    """What takes our table and rules in the view to the plan, in an order that never shows a packet a half-made table.

    Throws come before the unicast routes that they make exceptions of, those before the rule that leads to them; what
    goes, goes in the opposite order. A prefix that changes its kind or device is removed just before it is added again.
    """
    wanted = {route.prefix: route for route in ours(plan, table, device)}
    existing = [route for route in view.routes if route.table == table and route.protocol == TPVPN_PROTOCOL]
    kept = {route.prefix: route for route in existing if same(route, wanted.get(route.prefix))}
    removed = [route for route in existing if kept.get(route.prefix) is not route]
    added = [route for prefix, route in wanted.items() if prefix not in kept]
    replaced = {route.prefix: route for route in removed if route.prefix in wanted and route.prefix not in kept}
    steps = list[Operation]()
    for route in added:
        steps += [Operation("remove", old) for old in removed if old.prefix == route.prefix]
        steps.append(Operation("add", route))
    for version in FAMILIES:
        steps += rule_operations(view, version, table, any(prefix.version == version for prefix in plan.routes))
    gone = [route for route in removed if route.prefix not in replaced]
    return steps + [Operation("remove", route) for route in sorted(gone, key=lambda route: route.kind == "throw")]


def ours(plan: Plan, table: int, device: str) -> list[Route]:
    """The routes that the plan wants in our table, throws first; as the kernel will show them."""

    def route(prefix: Prefix, kind: Literal["unicast", "throw"]) -> Route:
        unicast = kind == "unicast"
        return Route(
            prefix,
            table,
            kind,
            (Nexthop(device),) if unicast else (),
            metric=1024 if prefix.version == 6 else 0,  # IP6_RT_PRIO_USER, the kernel's default
            protocol=TPVPN_PROTOCOL,
            scope=SCOPE_LINK if unicast and prefix.version == 4 else 0,
        )

    return [route(prefix, "throw") for prefix in plan.throws] + [route(prefix, "unicast") for prefix in plan.routes]


def same(route: Route, wanted: Route | None) -> bool:
    """Whether a route of ours does what is wanted of it."""
    return wanted is not None and (route.kind, route.device) == (wanted.kind, wanted.device)


def rule_operations(view: View, version: Literal[4, 6], table: int, needed: bool) -> list[Operation]:
    """Our one rule of a family: kept while it stands in front, else added anew, and then the others removed."""
    floor, first = front(view, version)
    place = view.rules.index(first) if first is not None else len(view.rules)
    old = [rule for rule in view.rules if (rule.version, rule.table, rule.protocol) == (version, table, TPVPN_PROTOCOL)]
    preference = (floor + (first.preference if first is not None else MAIN_PREFERENCE)) // 2
    new = Rule(version, preference, table=table, protocol=TPVPN_PROTOCOL)
    fit = (
        rule
        for rule in old
        if replace(rule, preference=preference) == new and rule.preference >= floor and view.rules.index(rule) < place
    )
    keep = next(fit, None) if needed else None
    steps = [Operation("add", new)] if needed and keep is None else []
    return steps + [Operation("remove", rule) for rule in old if rule is not keep]


def front(view: View, version: Literal[4, 6]) -> tuple[int, Rule | None]:
    """The preference of the rule for the local table, and the first other rule behind it that is not ours.

    Ours goes half way between them: in front of every rule that could answer for a routed subnet, whatever it selects,
    with a gap left before it, behind the local table, so that the host's own addresses stay its own.
    """
    floor = 0
    for rule in view.rules:
        if rule.version != version or rule.protocol == TPVPN_PROTOCOL:
            continue
        if replace(rule, protocol=0) == Rule(version, rule.preference, table=LOCAL_TABLE):
            floor = rule.preference
        elif rule.preference > floor:
            return floor, rule
    return floor, None
