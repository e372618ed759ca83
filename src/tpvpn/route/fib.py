"""The kernel's forwarding information base as plain values: rules, tables, links, addresses, routes.

It knows nothing of netlink; `route/netlink` fills a `View`, tests write one as text. `View.lookup()` gives the answer
the kernel would give (ip-rule(8), net/core/fib_rules.c, net/ipv4/fib_trie.c), with the rule that led to it.

How: rules in order; in the table of each that matches, the longest prefix, then the lowest metric. Tables are indexed
at the first lookup, one dictionary for each prefix length: at most 33 or 129 probes an address, whatever the size.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from tpvpn.route.prefix import BITS, Prefix

MAIN_TABLE = 254
LOCAL_TABLE = 255
TPVPN_PROTOCOL = 116
"""rtm_protocol and FRA_PROTOCOL of every route and rule that is ours (rtnetlink(7): above RTPROT_STATIC is free)."""

RouteKind = Literal[
    "unicast", "local", "broadcast", "anycast", "multicast", "blackhole", "unreachable", "prohibit", "throw", "nat"
]
RuleAction = Literal["lookup", "goto", "nop", "blackhole", "unreachable", "prohibit"]


@dataclass(frozen=True, slots=True)
class Link:
    """A network device. `kind` is IFLA_INFO_KIND ("tun", "veth", "bridge", "wireguard", …) or None for hardware."""

    index: int
    name: str
    kind: str | None = None
    up: bool = True
    carrier: bool = True
    """False: the kernel marks its routes `linkdown` (an idle docker bridge)."""
    ignored: tuple[int, ...] = ()
    """IP versions whose `linkdown` routes by this device the kernel passes over (ignore_routes_with_linkdown is 1)."""
    loopback: bool = False
    holder: str | None = None
    """The program that has the TUN or TAP open ("openvpn"), where that may be seen."""
    session: str | None = None
    """The session of ours whose device it is."""


@dataclass(frozen=True, slots=True)
class Address:
    """An address of the host, with the prefix it was given with."""

    device: str
    address: str
    prefix: Prefix
    scope: int = 0


@dataclass(frozen=True, slots=True)
class Nexthop:
    """One way out of a route; several make it multipath."""

    device: str | None = None
    gateway: str | None = None
    weight: int = 1


@dataclass(frozen=True, slots=True)
class Route:
    """A route as the kernel holds it. `metric` is its priority (lower wins), 0 when it has none."""

    prefix: Prefix
    table: int = MAIN_TABLE
    kind: RouteKind = "unicast"
    nexthops: tuple[Nexthop, ...] = ()
    metric: int = 0
    protocol: int = 0
    scope: int = 0
    source: str | None = None

    @property
    def device(self) -> str | None:
        """The (first) device of the route."""
        return self.nexthops[0].device if self.nexthops else None

    @property
    def gateway(self) -> str | None:
        """The (first) gateway of the route, None when it is on-link."""
        return self.nexthops[0].gateway if self.nexthops else None

    def __str__(self) -> str:
        """As `ip route` shows it: "default via 192.0.2.1 dev eth0"."""
        words = [] if self.kind == "unicast" else [self.kind]
        words.append("default" if self.prefix.is_default else str(self.prefix))
        for nexthop in self.nexthops:
            words += ["nexthop"] if len(self.nexthops) > 1 else []
            words += ["via", nexthop.gateway] if nexthop.gateway else []
            words += ["dev", nexthop.device] if nexthop.device else []
        return " ".join(words)


@dataclass(frozen=True, slots=True)
class Rule:
    """A policy rule (ip-rule(8)); a selector that is None matches every packet."""

    version: Literal[4, 6]
    preference: int
    action: RuleAction = "lookup"
    table: int = 0
    source: Prefix | None = None
    destination: Prefix | None = None
    iif: str | None = None
    oif: str | None = None
    mark: int | None = None
    mark_mask: int = 0xFFFFFFFF
    uids: tuple[int, int] | None = None
    protocols_ports: bool = False
    """True when ipproto, sport, dport or tos select: not every packet matches."""
    inverted: bool = False
    suppress_prefixlength: int | None = None
    goto: int | None = None
    protocol: int = 0


@dataclass(frozen=True, slots=True)
class Packet:
    """What rules select by. The default is an ordinary local packet: no mark, its socket bound to nothing."""

    destination: Prefix
    source: Prefix | None = None
    """None while the kernel has yet to choose one."""
    mark: int = 0
    iif: str = "lo"
    """What the kernel takes for the input of a packet that the host itself sends."""
    oif: str | None = None
    uid: int | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """What decides over a packet: a route, or (route None) a rule that rejects, or (both None) nothing."""

    rule: Rule | None = None
    route: Route | None = None

    @property
    def delivers(self) -> bool:
        """Whether the packet goes anywhere."""
        return self.route is not None and self.route.kind in DELIVERING

    def __str__(self) -> str:
        if self.route is not None:
            return str(self.route)
        return f"{self.rule.action} by rule {self.rule.preference}" if self.rule is not None else "no route"


DELIVERING: tuple[RouteKind, ...] = ("unicast", "local", "broadcast", "anycast", "multicast")
"""Kinds with no error in fib_props[] (net/ipv4/fib_semantics.c): only they can be suppressed by a rule."""


@dataclass(frozen=True, slots=True)
class IpsecPolicy:
    """An outbound XFRM policy: packets from `source` to `destination` are encrypted, or rejected when `blocks`."""

    source: Prefix
    destination: Prefix
    blocks: bool = False


Table = dict[int, dict[int, list[Route]]]
"""Routes of one family by prefix length, longest first, and network; each list by metric, lowest first."""


@dataclass(frozen=True, slots=True)
class View:
    """Everything the kernel would look at; rules are in the kernel's order within each family."""

    rules: tuple[Rule, ...] = ()
    routes: tuple[Route, ...] = ()
    links: tuple[Link, ...] = ()
    addresses: tuple[Address, ...] = ()
    policies: tuple[IpsecPolicy, ...] = ()
    resolvers: tuple[str, ...] = ()
    """Addresses of the host's own DNS servers."""
    ipv6: bool = True
    """False where IPv6 is switched off or not built in."""
    warnings: tuple[str, ...] = field(default=())
    """What could not be read, in words for the user."""
    _index: dict[tuple[int, int], Table] = field(
        default_factory=dict[tuple[int, int], Table], init=False, repr=False, compare=False
    )
    """Tables by (version, number); filled by the first lookup."""

    def lookup(
        self,
        destination: Prefix | str,
        *,
        source: Prefix | None = None,
        mark: int = 0,
        iif: str = "lo",
        oif: str | None = None,
        uid: int | None = None,
    ) -> Answer:
        """The kernel's answer for an address (of a prefix: for its first); UsageError when the text is no address.

        Ports, protocol and TOS are not known here, so a rule that selects by them does not match, nor does one that
        selects by uid when none is given.
        """
        if isinstance(destination, str):
            destination = Prefix.host(destination)
        destination = Prefix.around(destination.version, destination.network, BITS[destination.version])
        packet = Packet(destination, source, mark, iif, oif, uid)
        rules = [rule for rule in self.rules if rule.version == destination.version]
        targets = {rule.preference for rule in rules}
        jump = 0
        for rule in rules:
            if rule.preference < jump or not matches(rule, packet):
                continue
            if rule.action == "goto" and rule.goto is not None and rule.goto in targets:
                jump = rule.goto
            elif rule.action == "lookup":
                route = self._find(rule.table, packet)
                if route is not None and not suppressed(rule, route):
                    return Answer(rule, route)
            elif rule.action in ("blackhole", "unreachable", "prohibit"):
                return Answer(rule)
        return Answer()

    def usable(self, nexthop: Nexthop, version: int) -> bool:
        """Whether the kernel may send by it; without carrier it does, unless it was told to ignore such routes."""
        return all(
            link.up and (link.carrier or version not in link.ignored)
            for link in self.links
            if link.name == nexthop.device
        )

    def _find(self, number: int, packet: Packet) -> Route | None:
        """The route of a table that decides, None when none does or it says `throw`."""
        if not self._index:
            self._index.update(tabulate(self.routes))
        table = self._index.get((packet.destination.version, number), {})
        for route in candidates(table, packet.destination):
            if route.kind == "throw":
                return None
            usable = (
                hop
                for hop in route.nexthops
                if packet.oif in (None, hop.device) and self.usable(hop, route.prefix.version)
            )
            if route.kind not in DELIVERING or not route.nexthops or any(usable):
                return route
        return None


def tabulate(routes: tuple[Route, ...]) -> dict[tuple[int, int], Table]:
    """The index of all routes."""
    tables = defaultdict[tuple[int, int], Table](dict)
    for route in sorted(routes, key=lambda route: (-route.prefix.length, route.metric)):
        networks = tables[route.prefix.version, route.table].setdefault(route.prefix.length, {})
        networks.setdefault(route.prefix.network, []).append(route)
    return tables


def candidates(table: Table, destination: Prefix) -> Iterator[Route]:
    """The routes of a table that hold the address, best first."""
    for length, networks in table.items():
        yield from networks.get(Prefix.around(destination.version, destination.network, length).network, ())


def suppressed(rule: Rule, route: Route) -> bool:
    """Whether the rule discards this answer of its table, so that the next rule is asked (fib_rule_suppress)."""
    limit = rule.suppress_prefixlength
    return limit is not None and route.kind in DELIVERING and route.prefix.length <= limit


def matches(rule: Rule, packet: Packet) -> bool:
    """Whether every selector of the rule holds, or, of an inverted one, whether any does not (fib_rule_match)."""
    version = packet.destination.version
    unspecified = Prefix(version, 0, BITS[version])
    selected = (
        (rule.iif is None or rule.iif == packet.iif)
        and (rule.oif is None or rule.oif == packet.oif)
        and (rule.mark is None or (rule.mark ^ packet.mark) & rule.mark_mask == 0)
        and (rule.uids is None or (packet.uid is not None and rule.uids[0] <= packet.uid <= rule.uids[1]))
        and (rule.source is None or rule.source.contains(packet.source or unspecified))
        and (rule.destination is None or rule.destination.contains(packet.destination))
        and not rule.protocols_ports
    )
    return selected != rule.inverted
