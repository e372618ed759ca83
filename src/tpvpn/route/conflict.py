"""Which routes are private: every route that a local packet could choose, but for the default and what stands for it.

Pure: a `View` in, values out; of what is wanted it knows the addresses alone. An IPsec policy counts like a route. Two
steps.

`reachable()` walks the rules as a local packet without a mark would and keeps the unicast routes of the tables it comes
to, unless an earlier default, reject or local entry answers for all of the route (an earlier private route does not: it
may go, and both are shown). Selectors that depend on the packet (source, uid, ports) let a rule match for some packets
only: its routes count, but it answers for nothing.

`classify()` drops the public ones: the default, and what a VPN puts together in its place. A device whose routes cover
at least half of the unicast space has such a default in pieces: all that is broader than a /8 (IPv6 /7) is a piece, and
inside a private block so is a list that makes up the block but for the holes left out. All else is private.
"""

from collections import defaultdict
from collections.abc import Container, Iterable, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Literal, NamedTuple

from tpvpn.route.fib import DELIVERING, TPVPN_PROTOCOL, Link, Nexthop, Route, Rule, View
from tpvpn.route.owner import Owner, owner_of, whose
from tpvpn.route.prefix import BITS, DEFAULT, Prefix, Space

NEVER_WANTED = tuple(
    map(
        Prefix.parse,
        ("0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/4", "::/128", "::1/128", "fe80::/10", "ff00::/8"),
    )
)
"""This network, loopback, link-local and multicast (RFC 6890)."""
NEVER = Space(NEVER_WANTED)
UNICAST = {
    4: Space(map(Prefix.parse, ("0.0.0.0/1", "128.0.0.0/2", "192.0.0.0/3"))) - NEVER,
    6: Space(map(Prefix.parse, ("2000::/3", "fc00::/7"))),
}
PRIVATE_BLOCKS = tuple(
    map(Prefix.parse, ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7"))
)
BROAD = {4: 8, 6: 7}
"""Shorter prefixes than this are pieces of a default."""


class Candidate(NamedTuple):
    """A unicast route that a local packet could choose."""

    prefix: Prefix
    """What of the route the rule lets through: all of it, or the rule's own destination where that is smaller."""
    route: Route
    rule: Rule
    certain: bool
    """False when only some packets come to it, by source, uid or port."""


class Found(NamedTuple):
    """One way out of a route that is not public, and what it is."""

    prefix: Prefix
    route: Route
    hop: Nexthop
    link: Link | None
    standing: Literal["private", "idle", "piece"]
    """idle: the device has no carrier; piece: of a private block that a VPN's default includes but for some holes."""
    rule: Rule
    certain: bool

    ipsec: bool = False
    """An XFRM policy: the kernel asks it whatever route was chosen; its route has no table and no way out."""

    @property
    def owner(self) -> Owner:
        """Whose it is: "openvpn", "lan", …"""
        if self.ipsec:
            return Owner("strongswan", "an IPsec (XFRM) policy")
        return owner_of(self.route, self.hop, self.rule, self.link)

    @property
    def session(self) -> str | None:
        """Of tpvpn itself: which of its sessions."""
        return self.link.session if self.link is not None else None

    @property
    def owned(self) -> str:
        """As `ip route` shows it, and whose it is."""
        return f"{self} ({whose(self.owner.name, self.session)})"

    def __str__(self) -> str:
        if self.ipsec:
            return f"the IPsec policy for {self.prefix}"
        return str(replace(self.route, prefix=self.prefix, nexthops=(self.hop,)))


def foreign(view: View, table: int | None = None) -> View:
    """The view without what is ours: no route or rule of ours, nor what is on our device.

    `table` is that of the session that asks, None when it has none yet. Of other sessions it sees those with a lower
    one, so that of two that want the same subnet one yields and the other does not; without a table it sees all.
    """

    def is_ours(one: Route | Rule) -> bool:
        return table is not None and one.protocol == TPVPN_PROTOCOL and one.table >= table

    own = {hop.device for route in view.routes if is_ours(route) for hop in route.nexthops}
    own.discard(None)
    return replace(
        view,
        rules=tuple(rule for rule in view.rules if not is_ours(rule)),
        routes=tuple(route for route in view.routes if not is_ours(route) and route.device not in own),
    )


class Reach(NamedTuple):
    """Which packets of the host a rule matches: all to `inside` and not to `outside`; only some when not `certain`."""

    certain: bool
    inside: Prefix | None = None
    outside: Prefix | None = None

    def clip(self, prefix: Prefix) -> Prefix | None:
        """What of a prefix the rule lets through, None when nothing."""
        if self.inside is not None:
            return max(prefix, self.inside, key=lambda p: p.length) if prefix.overlaps(self.inside) else None
        return None if self.outside is not None and self.outside.contains(prefix) else prefix

    def limit(self, space: Space) -> Space:
        """What of a set of addresses the rule lets through."""
        if self.inside is not None:
            return space & Space([self.inside])
        return space - Space([self.outside]) if self.outside is not None else space


def reach(rule: Rule, view: View) -> Reach | None:
    """How an unmarked packet of the host itself, bound to no device, fares with the rule; None if it never matches."""
    unspecified = Prefix(rule.version, 0, BITS[rule.version])
    source = None if rule.source is None or rule.source.is_default else rule.source
    possible = rule.iif in (None, "lo") and rule.oif is None and (rule.mark is None or rule.mark & rule.mark_mask == 0)
    if possible and source is not None:
        own = (Prefix.host(address.address) for address in view.addresses)
        possible = source.contains(unspecified) or any(map(source.contains, own))
    some = source is not None or rule.uids is not None or rule.protocols_ports
    if not rule.inverted:
        return Reach(not some, inside=rule.destination) if possible else None
    if not possible:
        return Reach(True)
    if some:
        return Reach(False)
    return Reach(True, outside=rule.destination) if rule.destination is not None else None


def reachable(view: View) -> list[Candidate]:
    """All unicast routes that a packet of the host could choose, of both families."""
    down = {link.name for link in view.links if not link.up}
    tables = defaultdict[tuple[int, int], list[Route]](list)
    for route in view.routes:
        if route.kind != "unicast" or not route.nexthops or any(hop.device not in down for hop in route.nexthops):
            tables[route.prefix.version, route.table].append(route)
    found = dict[tuple[Prefix, int], Candidate]()
    for version in DEFAULT:
        walk(view, version, tables, found)
    return list(found.values())


def walk(
    view: View, version: int, tables: dict[tuple[int, int], list[Route]], found: dict[tuple[Prefix, int], Candidate]
) -> None:
    """Go through the rules of one family; a route that several lead to is kept once, by (prefix, identity)."""
    rules = [rule for rule in view.rules if rule.version == version]
    answered, waiting = Space(), list[tuple[Rule, Reach]]()
    jump = doubt = -1
    for rule in rules:
        scope = reach(rule, view)
        if scope is None or rule.preference < jump:
            continue
        if rule.action == "goto" and any(rule.goto == other.preference for other in rules):
            always = scope == Reach(True) and rule.preference >= doubt
            jump, doubt = (rule.goto or 0, doubt) if always else (jump, max(doubt, rule.goto or 0))
        table = tables.get((version, rule.table), []) if rule.action == "lookup" else []
        if any(route.kind == "unicast" for route in table):
            # Sets are made only when a later table needs them: of the main table's 100,000 routes, most often never.
            for earlier, its_scope in waiting:
                answered |= its_scope.limit(answers(earlier, tables.get((version, earlier.table), [])))
            waiting.clear()
        everything = scope.inside is None and scope.outside is None
        for route in table:
            if not chosen(rule, route):
                continue
            prefix = route.prefix if everything else scope.clip(route.prefix)
            if prefix is not None and not (answered and prefix in answered):
                certain = scope.certain and rule.preference >= doubt
                earlier_way = found.get((prefix, id(route)))
                if earlier_way is None or not earlier_way.certain:
                    found[prefix, id(route)] = Candidate(prefix, route, rule, certain)
        if scope.certain and rule.preference >= doubt and rule.action not in ("goto", "nop"):
            waiting.append((rule, scope))


def chosen(rule: Rule, route: Route) -> bool:
    """Whether the rule's table may give this route to a packet."""
    suppressed = rule.suppress_prefixlength is not None and route.prefix.length <= rule.suppress_prefixlength
    return route.kind == "unicast" and not suppressed


def answers(rule: Rule, routes: Iterable[Route]) -> Space:
    """All addresses for which the rule decides, so that no later rule is asked, but for those that are private."""
    if rule.action != "lookup":
        return Space([DEFAULT[rule.version]])
    best = dict[Prefix, Route]()
    for route in sorted(routes, key=lambda route: -route.metric):
        best[route.prefix] = route
    limit = -1 if rule.suppress_prefixlength is None else rule.suppress_prefixlength

    def passes(route: Route) -> bool:
        private = route.kind == "unicast" and route.prefix.length >= BROAD[rule.version]
        return route.kind == "throw" or private or (route.kind in DELIVERING and route.prefix.length <= limit)

    space = Space()
    # From broad to narrow, so that a narrower prefix has the last word.
    for on, group in groupby(sorted(best.values(), key=lambda route: (route.prefix.length, passes(route))), key=passes):
        part = Space(route.prefix for route in group)
        space = space - part if on else space | part
    return space


def classify(view: View, concerned: Space) -> list[Found]:
    """Every way out of a route that is private, idle, or a piece of a holed private block, as far as it is concerned.

    The view is to be without ours; all of it counts for what is a default in pieces.
    """
    links = {link.name: link for link in view.links}
    ways = list[tuple[Candidate, Nexthop]]()
    for candidate in reachable(view):
        if candidate.prefix.is_default:
            continue
        for hop in candidate.route.nexthops or (Nexthop(),):
            link = links.get(hop.device or "")
            if link is None or (link.up and not link.loopback):
                ways.append((candidate, hop))
    devices = defaultdict[tuple[str | None, int], set[Prefix]](set)
    for candidate, hop in ways:
        devices[hop.device, candidate.prefix.version].add(candidate.prefix)
    public = {key: pieces(prefixes) for key, prefixes in devices.items() if is_default_in_pieces(key[1], prefixes)}
    found = list[Found]()
    for candidate, hop in ways:
        prefix, route, rule, certain = candidate
        if not concerned.overlaps(prefix):
            continue
        parts = public.get((hop.device, prefix.version))
        if parts is not None and prefix.length < BROAD[prefix.version]:
            continue
        link = links.get(hop.device or "")
        idle = link is not None and not link.carrier
        standing = "piece" if parts is not None and prefix in parts else "idle" if idle else "private"
        found.append(Found(prefix, route, hop, link, standing, rule, certain))
    return found + policies(view, {one.prefix for one in found if one.standing == "private" and one.certain})


def policies(view: View, routed: Container[Prefix]) -> list[Found]:
    """The IPsec policies that could take a packet of the host, but for those that have a route beside them."""
    own = [Prefix.host(address.address) for address in view.addresses]
    found = list[Found]()
    for policy in view.policies:
        prefix = policy.destination
        local = policy.source.is_default or any(map(policy.source.contains, own))
        if local and prefix.length >= BROAD[prefix.version] and prefix not in routed:
            rule = Rule(4 if prefix.version == 4 else 6, 0)
            found.append(Found(prefix, Route(prefix, table=0), Nexthop(), None, "private", rule, True, ipsec=True))
    return found


def is_default_in_pieces(version: int, prefixes: set[Prefix]) -> bool:
    """Whether these routes of one device cover at least half of the unicast space."""
    half = UNICAST[version].size / 2
    return sum(prefix.size for prefix in prefixes) >= half and (Space(prefixes) & UNICAST[version]).size >= half


def pieces(prefixes: set[Prefix]) -> set[Prefix]:
    """The routes that make up a private block but for its holes: exactly the shortest list for most of the block."""
    found = set[Prefix]()
    for block in PRIVATE_BLOCKS:
        inside = sorted(prefix for prefix in prefixes if block.contains(prefix) and not nested(prefix, prefixes))
        space = Space(inside)
        if block.size / 2 < space.size < block.size and space.prefixes() == tuple(inside):
            found.update(inside)
    return found


def nested(prefix: Prefix, prefixes: set[Prefix]) -> bool:
    """Whether a broader one of these holds the prefix."""
    version, network, length = prefix
    return any(Prefix.around(version, network, shorter) in prefixes for shorter in range(length))


def relation(route: Prefix, wanted: Prefix) -> Literal["covers", "inside", "equal"]:
    """How a route lies to a wanted subnet that it overlaps."""
    return "equal" if route == wanted else "covers" if route.contains(wanted) else "inside"


def overlapping(found: Sequence[Found], prefix: Prefix) -> list[Found]:
    """Those that share addresses with a subnet, broadest first."""
    return sorted(
        (one for one in found if one.prefix.overlaps(prefix)), key=lambda one: (one.prefix.length, one.prefix)
    )
