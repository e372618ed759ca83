"""What a plan says beside its verdicts: what to know of the routes that overlap, and the commands that help.

Pure: verdicts in, sentences out.
"""

import shlex
from collections.abc import Iterable, Sequence

from tpvpn.route.conflict import Found, overlapping
from tpvpn.route.prefix import Prefix, Space
from tpvpn.route.verdict import Conflict, Fix, Policy, Subnet


def doubts(subnets: Sequence[Subnet], found: Sequence[Found], policy: Policy, ipv6: bool) -> Iterable[str]:
    """What the user should know of the routes that overlap, and of hosts that are none of the cluster's."""
    wanted = Space(subnet.wanted.prefix for subnet in subnets)
    routed = Space(route for subnet in subnets for route in subnet.routes)
    for host, source in policy.hosts:
        if host not in routed:
            why = "never proxied" if host in wanted else "in none of the wanted subnets"
            yield f"{host.address()} ({source}) is {why}: it is not routed"
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
                    f"{one.owned} overlaps {prefix}, but {one.hop.device} has no carrier: "
                    "it is no conflict now, and becomes one when the device is used"
                )
            elif one.standing == "piece":
                if one.hop.device not in holed:
                    yield (
                        f"{one.owned} overlaps {prefix}, and is taken for a piece of the default route, since "
                        f"{one.hop.device} leaves out only some holes of this private block: keep the VPN's own hosts "
                        "in it with --never-proxy"
                    )
                holed.add(one.hop.device)
            elif not one.certain:
                yield (
                    f"{one.owned} overlaps {prefix}, but is only for packets that rule {one.rule.preference} "
                    "selects by source, user or port"
                )


def fixes(subnets: Sequence[Subnet], policy: Policy) -> Iterable[Fix]:
    """The commands that help when something remains; none when nothing does."""
    blocked = [subnet for subnet in subnets if subnet.remaining]
    if not blocked:
        return
    missing = dict.fromkeys(piece for subnet in blocked for piece in subnet.remaining)
    cidrs = list(map(str, dict.fromkeys((*policy.allow, *missing))))
    otherwise = () if policy.on_conflict == "fail" else ("--on-conflict", policy.on_conflict)
    places = " or ".join(map(str, missing))
    yield Fix(
        f"if no host that you reach by {' or '.join(owners(blocked))} is in {places}, allow it (for good: "
        f"allowConflictingSubnets: [{', '.join(cidrs)}] under client.routing in ~/.config/tpvpn/config.yaml)",
        connect(*otherwise, *(word for cidr in cidrs for word in ("--allow-conflicting-subnets", cidr))),
    )
    yield Fix(
        "the same for everyone, by the cluster's admin",
        f"tpvpn helm upgrade --set 'client.routing.allowConflictingSubnets={{{','.join(cidrs)}}}'",
    )
    if policy.on_conflict == "fail":
        yield Fix("connect without what conflicts, which stays as it is", connect("--on-conflict", "skip"))
        host = next(iter(missing)).address(1 if next(iter(missing)).size > 1 else 0)
        yield Fix(
            f"route nothing of it but single hosts, {host} for example",
            connect("--on-conflict", "hosts", "--host", host),
        )
        yield Fix(
            "keep both: reach what conflicts by other addresses, as `tpvpn plan` shows them",
            connect("--on-conflict", "virtual"),
        )
    for name in sorted({one.session for subnet in blocked for one in subnet.conflicts if one.session}):
        yield Fix(f"end session {name}, which has these addresses now", f"tpvpn quit --name {name}")


def owners(blocked: Iterable[Subnet]) -> list[str]:
    """The devices in conflict: "tun0 (openvpn, known by device name tun0)"."""
    return sorted(
        {
            f"{one.device or 'IPsec'} ({one.whose}, known by {one.evidence})"
            for subnet in blocked
            for one in subnet.conflicts
            if not one.allowed
        }
    )


def connect(*words: str) -> str:
    """`tpvpn connect` with these words."""
    return shlex.join(("tpvpn", "connect", *words))


def hides(conflict: Conflict, subnet: Subnet) -> str:
    """What part of the private route is meant, and what becomes of the hosts there."""
    what = share(conflict, subnet.wanted.prefix)
    if subnet.virtual is not None:
        return f"{what}; nothing of it is hidden"
    whose = conflict.device if conflict.owner == "unknown" else conflict.whose
    return f"{what}; hosts of {whose} in it " + ("are hidden" if conflict.allowed else "would become unreachable")


def share(conflict: Conflict, prefix: Prefix) -> str:
    """What part of the private route the subnet is, or the route of the subnet."""
    whose = f"{conflict.device or 'the IPsec policy'}'s {conflict.route}"
    if conflict.relation == "covers":
        return f"{prefix} is {percent(prefix.size / conflict.route.size)} of {whose}"
    if conflict.relation == "equal":
        return f"{prefix} is all of {whose}"
    return f"{whose} is {percent(conflict.route.size / prefix.size)} of {prefix}"


def percent(ratio: float) -> str:
    """A share that never looks like nothing: "50 %", "0.4 %", "less than 0.1 %"."""
    return "less than 0.1 %" if ratio < 0.001 else f"{100 * ratio:.1f} %".replace(".0 ", " ")
