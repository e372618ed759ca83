"""Why an address goes where it goes: the rule, table and route that take it, now and without us, and what changes it.

Pure: a view and a plan in its JSON contract (`tpvpn.plan/1`, of a session that runs or of `tpvpn plan`) in, values out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tpvpn.route.advice import connect
from tpvpn.route.conflict import NEVER, foreign
from tpvpn.route.fib import Answer, Nexthop, View
from tpvpn.route.owner import owner_of, whose
from tpvpn.route.prefix import Prefix
from tpvpn.route.verdict import Fix

ALL_OURS = 0
"""A table below those of all sessions: to the view that such a session has, every one of them is its own."""


@dataclass(frozen=True, slots=True)
class Way:
    """What takes a packet: the rule and the route that decide, whose they are, and how that is known."""

    route: str
    device: str | None = None
    gateway: str | None = None
    rule: int | None = None
    table: int | None = None
    owner: str | None = None
    known_by: str | None = None
    session: str | None = None
    """Of tpvpn itself: which of its sessions."""


@dataclass(frozen=True, slots=True)
class Why:
    """The answer for one address. `subnet`: the wanted subnet that it belongs to, as the plan has it."""

    address: str
    now: Way
    without: Way
    subnet: Mapping[str, Any] | None
    sentence: str
    virtual: str | None
    """Where the subnet is mapped to: the address at which this one answers."""
    changes: tuple[Fix, ...]

    def as_json(self) -> dict[str, Any]:
        """The answer as plain values, under the schema `tpvpn.why/1`."""
        return {"schema": "tpvpn.why/1", **asdict(self)}


def explain(view: View, address: str, plan: Mapping[str, Any], device: str, uid: int | None = None) -> Why:
    """All that is to be said of an address, `device` being the session's; UsageError when it is none."""
    host = Prefix.host(address)
    subnet = holding(plan["subnets"], host)
    now, without = (way(one, one.lookup(host, uid=uid)) for one in (view, foreign(view, ALL_OURS)))
    never = best(plan["never_proxy"], host, "cidr")
    other = counterpart(subnet, host)
    sentence, changes = verdict(host, subnet, never, now.device == device, other)
    if policy := next((one for one in view.policies if one.destination.contains(host)), None):
        sentence += f"; the IPsec policy for {policy.destination} may take it first, see `ip xfrm policy`"
    return Why(host.address(), now, without, subnet, sentence, other, tuple(changes))


def taking(view: View, host: Prefix, plans: Mapping[str, Mapping[str, Any]]) -> str:
    """Whose plan is to be gone by for an address, of several sessions', each by its device.

    That of the session that takes the address; else of the first that would.
    """
    route = view.lookup(host).route
    takes = [one for one in plans if route is not None and route.device == one]
    would = [one for one in plans if holding(plans[one]["subnets"], host)]
    return [*takes, *would, *plans][0]


def way(view: View, answer: Answer) -> Way:
    """What decides over a packet, in words and numbers."""
    rule, route = answer.rule, answer.route
    if route is None:
        return Way(str(answer), rule=None if rule is None else rule.preference)
    hop = route.nexthops[0] if route.nexthops else Nexthop()
    link = next((one for one in view.links if one.name == hop.device), None)
    owner = owner_of(route, hop, rule, link)
    preference = None if rule is None else rule.preference
    return Way(str(route), hop.device, hop.gateway, preference, route.table, *owner, link.session if link else None)


def best(entries: Sequence[Mapping[str, Any]], host: Prefix, key: str) -> Mapping[str, Any] | None:
    """The most specific of the entries that hold the address."""
    holding = [one for one in entries if one[key] and Prefix.parse(one[key]).contains(host)]
    return max(holding, key=lambda one: Prefix.parse(one[key]).length, default=None)


def holding(subnets: Sequence[Mapping[str, Any]], host: Prefix) -> Mapping[str, Any] | None:
    """The wanted subnet of an address, by its own addresses or its virtual ones."""
    return best(subnets, host, "cidr") or best(subnets, host, "virtual")


def counterpart(subnet: Mapping[str, Any] | None, host: Prefix) -> str | None:
    """The same host at the other side of a mapping: its virtual address, or what a virtual address stands for."""
    if subnet is None or subnet["virtual"] is None:
        return None
    real, virtual = Prefix.parse(subnet["cidr"]), Prefix.parse(subnet["virtual"])
    here, there = (real, virtual) if real.contains(host) else (virtual, real)
    return there.address(host.network - here.network)


def verdict(
    host: Prefix, subnet: Mapping[str, Any] | None, never: Mapping[str, Any] | None, tunnelled: bool, other: str | None
) -> tuple[str, list[Fix]]:
    """One sentence on the address, and what would change it."""
    address = host.address()
    if host in NEVER:
        return f"{address} is loopback, link-local, multicast or unspecified, which stays with the host", []
    if subnet is None:
        text = f"{address} belongs to no subnet of the cluster: it goes the way it has without tpvpn"
        return text, [Fix("route it too", connect("--also-proxy", address))]
    of = f"the {subnet['kind']} subnet {subnet['cidr']} (from {subnet['source']})"
    route = longest([one for one in subnet["routes"] if Prefix.parse(one).contains(host)])
    if never is not None and longest([never["cidr"]]) >= route:
        why = f"{never['cidr']}, {never['reason']}"
        return f"{address} is of {of}, and never proxied ({why}): it keeps the way it has without tpvpn", []
    if other is not None:
        if Prefix.parse(subnet["cidr"]).contains(host):
            text = f"{address} is of {of}, which is reached by virtual addresses: this one at {other}"
            return text, [
                Fix("let the tunnel have the address itself", connect("--allow-conflicting-subnets", subnet["cidr"]))
            ]
        return f"{address} is virtual and stands for {other} of {of}", []
    if route >= 0 and tunnelled:
        return f"{address} is of {of}, and goes into the tunnel", [
            Fix("keep it out", connect("--never-proxy", address))
        ]
    if route >= 0:
        return f"{address} is of {of}, which is to be routed, and goes another way now", []
    against = best(subnet["conflicts"], host, "route")
    if against is None:
        why = "other addresses of the subnet are in conflict"
        return f"{address} is of {of}, which is {subnet['verdict']}" + (f": {why}" if subnet["withheld"] else ""), []
    owner = whose(against["owner"], against.get("session"))
    where = f"{against['route']} on {against['device'] or 'an IPsec policy'} ({owner})"
    overlap = max(subnet["cidr"], against["route"], key=lambda one: Prefix.parse(one).length)
    return f"{address} is of {of}, which is withheld: {where} is in conflict with it", [
        Fix("allow it", connect("--allow-conflicting-subnets", overlap)),
        Fix("route this one address", connect("--on-conflict", "hosts", "--host", address)),
        Fix("reach it by a virtual address", connect("--on-conflict", "virtual")),
    ]


def longest(prefixes: Sequence[str]) -> int:
    """The length of the most specific prefix, -1 where there is none."""
    return max((Prefix.parse(one).length for one in prefixes), default=-1)
