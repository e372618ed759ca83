"""The operations that take the kernel's view from what it is to what a plan wants, and back.

Pure: values in, values out. They concern what is ours alone: unicast routes to our device, `throw` routes for the
never-proxy inside of them (the packet goes on by the route it had before), and one rule a family in front of all that
could answer for such a packet. Applying them twice is harmless; each knows its inverse.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal

from tpvpn.route.fib import LOCAL_TABLE, TPVPN_PROTOCOL, Nexthop, Route, Rule, View
from tpvpn.route.prefix import Prefix, Space
from tpvpn.route.verdict import Plan

MAIN_PREFERENCE = 32766
FAMILIES: tuple[Literal[4, 6], ...] = (4, 6)
SCOPE_LINK = 253


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


def tunnelled(routes: Iterable[Route]) -> Space:
    """What routes of ours lead into the tunnel, throws left out: where they overlap, the longest prefix decides."""
    space = Space()
    for _, alike in groupby(sorted(routes, key=length_of), length_of):
        some = list(alike)
        space |= Space(route.prefix for route in some if route.kind == "unicast")
        space -= Space(route.prefix for route in some if route.kind == "throw")
    return space


def length_of(route: Route) -> int:
    """The length of a route's prefix."""
    return route.prefix.length


def same(route: Route, wanted: Route | None) -> bool:
    """Whether a route of ours does what is wanted of it."""
    return wanted is not None and (route.kind, route.device) == (wanted.kind, wanted.device)


def rule_operations(view: View, version: Literal[4, 6], table: int, needed: bool) -> list[Operation]:
    """Our one rule of a family: kept while it stands in front, else added anew, and then the others removed."""
    floor, first = front(view, version, table)
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


def front(view: View, version: Literal[4, 6], table: int) -> tuple[int, Rule | None]:
    """The preference of the rule for the local table, and the first other rule behind it that ours must precede.

    Ours goes half way between them: in front of every rule that could answer for a routed subnet, whatever it selects,
    with a gap left before it, behind the local table, so that the host's own addresses stay its own. Of two sessions
    the one with the higher table goes in front, so that they do not overtake each other for ever.
    """
    floor = 0
    for rule in view.rules:
        if rule.version != version or (rule.protocol == TPVPN_PROTOCOL and rule.table >= table):
            continue
        if replace(rule, protocol=0) == Rule(version, rule.preference, table=LOCAL_TABLE):
            floor = rule.preference
        elif rule.preference > floor:
            return floor, rule
    return floor, None
