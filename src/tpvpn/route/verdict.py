"""What is asked of a plan and what it answers, as plain values: wanted subnets and the policy in, verdicts out."""

from dataclasses import dataclass
from typing import Literal

from tpvpn.route.owner import whose
from tpvpn.route.prefix import Prefix

Kind = Literal["service", "pod", "also"]
OnConflict = Literal["fail", "skip", "hosts", "virtual"]
Verdict = Literal["routed", "partial", "conflict", "virtual", "excluded"]


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
class Request:
    """What is to be routed. `names`: host names among the also-proxy, each with where it is from."""

    wanted: tuple[Wanted, ...]
    policy: Policy
    names: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Conflict:
    """A private route that shares addresses with a wanted subnet; `allowed` when all of those may be taken.

    An IPsec policy is one without device, in table 0.
    """

    route: Prefix
    device: str | None
    owner: str
    gateway: str | None
    table: int
    relation: Literal["covers", "inside", "equal"]
    allowed: bool
    evidence: str = ""
    """How the owner is known: "process openvpn, which has tun0 open"."""
    session: str | None = None
    """Of tpvpn itself: which of its sessions."""

    @property
    def whose(self) -> str:
        """The owner, and of tpvpn the session."""
        return whose(self.owner, self.session)


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
    given: tuple[str, ...] = ()
    """The user's other words, which a command to paste must repeat."""

    @property
    def routes(self) -> tuple[Prefix, ...]:
        """All that is to be routed, each prefix once, sorted."""
        return tuple(sorted({prefix for subnet in self.subnets for prefix in subnet.routes}))
