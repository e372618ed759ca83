"""The kernel's forwarding information base as plain values: rules, tables, links, addresses, routes.

It knows nothing of netlink; `route/netlink` fills a `View`, tests write one as text. `View.lookup()` gives the answer the kernel
would give (ip-rule(8), fib_rules.c, fib_trie.c), with the rule that led to it.
"""

from dataclasses import dataclass, field
from typing import Literal

from tpvpn.route.prefix import Prefix

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
    loopback: bool = False


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
class View:
    """Everything the kernel would look at; rules are in the kernel's order within each family."""

    rules: tuple[Rule, ...] = ()
    routes: tuple[Route, ...] = ()
    links: tuple[Link, ...] = ()
    addresses: tuple[Address, ...] = ()
    ipv6: bool = True
    """False where IPv6 is switched off or not built in."""
    warnings: tuple[str, ...] = field(default=())
    """What could not be read, in words for the user."""
