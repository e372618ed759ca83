"""The plan: what is routed, what is withheld and why.

Pure: a `View`, what is wanted and the policy in, verdicts out (`verdict`); `operations` takes the kernel there.

`make_plan()` judges every wanted subnet. What overlaps a private route and is not allowed remains; a never-proxy takes
its part out of a discovered subnet, and out of an also-proxy that is less specific than itself. What remains is
withheld, but for single hosts (`hosts`), or the subnet is mapped to a virtual one (`virtual`).
"""

from collections.abc import Iterable, Sequence

from tpvpn.errors import UsageError
from tpvpn.route.advice import doubts, fixes
from tpvpn.route.conflict import NEVER_WANTED, Found, classify, foreign, overlapping, relation
from tpvpn.route.fib import View
from tpvpn.route.prefix import Prefix, Space
from tpvpn.route.verdict import Conflict, NeverProxy, Plan, Policy, Subnet, Verdict, Wanted
from tpvpn.route.virtual import POOLS, Mapper


def make_plan(view: View, wanted: Sequence[Wanted], policy: Policy, table: int | None = None) -> Plan:
    """Judge every wanted subnet, for the session that has this routing table, or has none yet.

    UsageError when the wanted and the policy contradict each other or make no sense.
    """
    check(wanted, policy)
    wanted = tuple(dict.fromkeys(wanted))
    before = foreign(view, table)
    found = classify(before, Space([*(one.prefix for one in wanted), *POOLS.values()]))
    own = of_the_host(before, wanted, policy)
    never = (*policy.never, *own)
    mapper = Mapper(wanted, found)
    subnets = tuple(judge(one, found, policy, never, mapper, view.ipv6) for one in wanted)
    thrown = throws(subnets, never)
    shown = (*policy.never, *(one for one in own if one[0] in thrown))
    return Plan(
        ok=policy.on_conflict in ("skip", "hosts") or all(subnet.verdict != "conflict" for subnet in subnets),
        subnets=subnets,
        throws=thrown,
        never_proxy=tuple(NeverProxy(prefix, reason, str(before.lookup(prefix))) for prefix, reason in shown),
        warnings=(
            *view.warnings,
            *nesting(wanted),
            *mapper.warnings(),
            *dict.fromkeys(doubts(subnets, found, policy, view.ipv6)),
        ),
        fixes=tuple(fixes(subnets, policy)),
        given=policy.given,
    )


def check(wanted: Iterable[Wanted], policy: Policy) -> None:
    """Refuse what is never wanted, the same prefix as also-proxy and never-proxy, and what no pool has room for."""
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
        pool = POOLS[one.prefix.version]
        if one.prefix.length < pool.length and is_virtual(one, policy):
            raise UsageError(
                f"{one.prefix} ({one.source}) is larger than {pool}, where virtual subnets are: "
                "leave out --virtual for it"
            )


def is_virtual(wanted: Wanted, policy: Policy) -> bool:
    """Whether the subnet is to be mapped whether it conflicts or not."""
    return wanted.prefix in policy.virtual or wanted.kind in policy.virtual


Never = Sequence[tuple[Prefix, str]]
"""Prefixes to be left alone, each with the reason."""


def of_the_host(view: View, wanted: Iterable[Wanted], policy: Policy) -> list[tuple[Prefix, str]]:
    """The host's own resolvers and gateways inside of what is wanted: they keep the way they have.

    What the user names as also-proxy to the bit is the user's word against ours.
    """
    gateways = {(hop.gateway, hop.device): None for route in view.routes for hop in route.nexthops if hop.gateway}
    needed = {Prefix.host(address.partition("%")[0]): "resolver of this host" for address in view.resolvers}
    needed |= {Prefix.host(gateway): f"gateway of {device}" for gateway, device in gateways if gateway}
    known = {prefix for prefix, _ in policy.never} | {one.prefix for one in wanted if one.kind == "also"}
    return [
        (prefix, reason)
        for prefix, reason in sorted(needed.items())
        if prefix not in known and any(one.prefix.contains(prefix) for one in wanted)
    ]


def judge(wanted: Wanted, found: Sequence[Found], policy: Policy, never: Never, mapper: Mapper, ipv6: bool) -> Subnet:
    """The verdict on one subnet."""
    whole, left_out = Space([wanted.prefix]), Space(exceptions(wanted, never))
    if wanted.prefix in left_out or (wanted.prefix.version == 6 and not ipv6):
        return Subnet(wanted, "excluded")
    private = [one for one in overlapping(found, wanted.prefix) if one.standing == "private"]
    conflicts = tuple(compare(private, wanted, left_out, Space(policy.allow)))
    remaining = (Space(one.prefix for one in private) & whole) - Space(policy.allow)
    # A piece that is partly left out stays whole: cut along the never-proxy it would be in crumbs, and no more routed.
    pieces = tuple(piece for piece in remaining.prefixes() if piece not in left_out)
    mapped = is_virtual(wanted, policy) or (pieces and policy.on_conflict == "virtual")
    virtual = mapper.place(wanted.prefix) if mapped else None
    if virtual is not None:
        return Subnet(wanted, "virtual", (virtual,), (wanted.prefix,), (), conflicts, virtual)
    withheld = Space([wanted.prefix] if mapped or (pieces and policy.on_conflict == "fail") else pieces)
    if policy.on_conflict == "hosts":
        withheld -= Space(host for host, _ in policy.hosts)
    routes = tuple(piece for piece in (whole - withheld).prefixes() if piece not in left_out)
    verdict: Verdict = "routed" if not withheld else "partial" if routes else "conflict"
    return Subnet(wanted, verdict, routes, withheld.prefixes(), pieces, conflicts)


def compare(private: Iterable[Found], wanted: Wanted, left_out: Space, allow: Space) -> Iterable[Conflict]:
    """Every private way that shares addresses with the subnet, but for those that a never-proxy leaves to it."""
    for one in private:
        overlap = (Space([one.prefix]) & Space([wanted.prefix])) - left_out
        if overlap:
            owner = one.owner
            yield Conflict(
                route=one.prefix,
                device=one.hop.device,
                owner=owner.name,
                gateway=one.hop.gateway,
                table=one.route.table,
                relation=relation(one.prefix, wanted.prefix),
                allowed=not overlap - allow,
                evidence=owner.evidence,
                session=one.session,
            )


def exceptions(wanted: Wanted, never: Never) -> list[Prefix]:
    """The never-proxy that hold for a subnet: all that overlap a discovered one, the more specific of an also-proxy."""
    return [
        prefix
        for prefix, _ in never
        if wanted.prefix.contains(prefix) or (wanted.kind != "also" and prefix.contains(wanted.prefix))
    ]


def throws(subnets: Sequence[Subnet], never: Never) -> tuple[Prefix, ...]:
    """The never-proxy inside of what is routed, and the subnets there that are reached by virtual addresses."""
    found = {
        prefix
        for subnet in subnets
        for prefix in exceptions(subnet.wanted, never)
        if any(route.contains(prefix) for route in subnet.routes)
    }
    routes = [route for subnet in subnets for route in subnet.routes]
    found |= {
        subnet.wanted.prefix
        for subnet in subnets
        if subnet.virtual and any(route.contains(subnet.wanted.prefix) for route in routes)
    }
    return tuple(sorted(found))


def nesting(wanted: Sequence[Wanted]) -> list[str]:
    """A word on service and pod subnets that share addresses."""
    unique = [one for one in wanted if one.kind != "also"]
    return [
        f"the {inner.kind} subnet {inner.prefix} ({inner.source}) "
        + ("equals" if inner.prefix == outer.prefix else "lies inside")
        + f" the {outer.kind} subnet {outer.prefix} ({outer.source}): what both hold is routed once"
        for index, one in enumerate(unique)
        for other in unique[index + 1 :]
        if one.prefix.overlaps(other.prefix)
        for outer, inner in [(one, other) if one.prefix.contains(other.prefix) else (other, one)]
    ]
