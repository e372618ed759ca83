"""Which question goes to the cluster, and under which name it is asked there.

Pure: names in, decisions out. It knows neither sockets nor the host's resolver; whether a name exists is the cluster's
to say. In order: `wpad`, which nobody may claim; what user and admin said (mappings, exclusions); addresses' reverse
names; the cluster's suffixes, each unless a VPN claims the name by a longer one. A suffix that stands for another
(`svc`, a namespace, none at all for a single label) leads to the name below the cluster's domain that is meant.

Of several sessions each has a suffix of its own, which nobody else has; short names, and suffixes that two have, are
those of the one that came first.
"""

import functools
import ipaddress
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from importlib import resources
from itertools import pairwise
from typing import Literal

from tpvpn.dns.resolv_conf import lines_of
from tpvpn.route.prefix import Prefix
from tpvpn.route.verdict import Plan
from tpvpn.wire import dns

DOMAIN = "cluster.local"
"""The cluster's domain where nobody says another (kubelet's default)."""
ZONES = 64
"""Reverse zones of one subnet that a host's resolver is told of at most; if that is too few, it is one wider zone."""
_REVERSE = {"in-addr.arpa": 4, "ip6.arpa": 6}
_STEP = {4: 8, 6: 4}
"""Bits of an address that a label of its reverse name has."""
_HEX = "0123456789abcdef"
_UNCLAIMED = ("wpad", "localhost", "local", "internal", "onion", "invalid")
"""Labels that are never a service's, and namespaces that are not captured: a browser runs what `wpad` gives it (Web
Proxy Auto-Discovery); RFC 6761 sections 6.3 and 6.4; RFC 6762 section 3; RFC 7686; `internal` is for the names of
private networks (ICANN resolution 2024.07.29.06)."""
_OF_ZONES = frozenset((dns.NS, dns.SOA, dns.DS, dns.DNSKEY))
"""Types of what no service has: with one label, that is a question for a top-level domain."""
_LABEL = re.compile(r"(?!-)[a-z0-9-]{1,63}(?<!-)")
_CHAIN = 8
_SHOWN = 4


@dataclass(frozen=True, slots=True)
class Naming:
    """What is wanted of names, of user, admin and cluster; names in small letters, without a dot at the end."""

    namespace: str = "default"
    """The connected one, whose services have names of one label."""
    namespaces: tuple[str, ...] = ()
    """Those that are known to exist."""
    include: tuple[str, ...] = ()
    """Suffixes that are the cluster's too."""
    exclude: tuple[str, ...] = ()
    """Suffixes that are never the cluster's."""
    mappings: tuple[tuple[str, str], ...] = ()
    """Names, and the name or address that each stands for."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What becomes of a question."""

    where: Literal["cluster", "elsewhere", "nowhere", "address"]
    """Asked in the cluster; of the servers that this host had before; of nobody (there is no such name); known."""
    because: str
    """Why, as the end of a sentence."""
    asked: str | None = None
    """The name that is asked, when it is another one than was given."""
    address: str | None = None
    below: str | None = None
    """What stands in the answer where the cluster has its domain, when that is another session's, or was not said."""


@dataclass(frozen=True, slots=True)
class Neighbour:
    """Another session of this host that has names."""

    name: str
    suffixes: tuple[str, ...]
    """Those which it announced: it has them when it was there first."""
    was_first: bool

    @property
    def own(self) -> str:
        """The suffix that is its alone."""
        return own_suffix(self.name)


@functools.cache
def public_domains() -> frozenset[str]:
    """The top-level domains of the public DNS."""
    text = resources.files("tpvpn.dns").joinpath("tlds.txt").read_text()
    return frozenset(line for line in text.split("\n") if line and not line.startswith("#"))


def domain_of(resolv_conf: str) -> str | None:
    """The cluster's domain by the search line of a pod, where kubelet wrote `svc.DOMAIN DOMAIN`; None without that.

    Of several lines the last counts (resolv.conf(5)).
    """
    lines = lines_of(resolv_conf.lower(), "search")
    names = [word.rstrip(".") for word in lines[-1]] if lines else []
    found = (domain for before, domain in pairwise(names) if before == f"svc.{domain}")
    return next(
        (one for one in found if all(map(_LABEL.fullmatch, one.split("."))) and one not in public_domains()), None
    )


def is_below(name: str, suffix: str) -> bool:
    """Whether a name is the suffix or ends in its labels."""
    return name == suffix or name.endswith(f".{suffix}")


@dataclass(frozen=True, slots=True)
class Policy:
    """Decides by what is known now."""

    naming: Naming
    domain: str = DOMAIN
    subnets: tuple[Prefix, ...] = ()
    """Those that are routed, as they are in the cluster, which knows the names of their addresses."""
    virtual: tuple[tuple[Prefix, Prefix], ...] = ()
    """Virtual subnets, each with the cluster's own that it stands for."""
    claimed: tuple[str, ...] = ()
    """Routing domains of others: a VPN's."""
    own: str = ""
    """The session's own suffix, below which all names are the cluster's; "": it has none."""
    neighbours: tuple[Neighbour, ...] = ()
    """The other sessions, the oldest first."""
    _mappings: dict[str, str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_mappings", dict(self.naming.mappings))

    def following(self, plan: Plan) -> "Policy":
        """The same with the addresses that a plan routes: they have their names in the cluster."""
        own = [one for one in plan.subnets if one.wanted.kind != "also"]
        return replace(
            self,
            subnets=tuple(prefix for one in own if not one.virtual for prefix in one.routes),
            virtual=tuple((one.virtual, one.wanted.prefix) for one in own if one.virtual),
        )

    def decide(self, name: str, kind: int) -> Decision:
        """What becomes of a question for a name, in small letters and without a dot at the end; `kind` is its type."""
        if name in self._mappings and not _is_wpad(name):
            if theirs := self._has(name):
                return Decision("elsewhere", f"{name} is mapped by session {theirs.name}, which was there first")
            return self._mapped(name)
        if kind in _OF_ZONES and "." not in name:
            return Decision("elsewhere", "with a question of that type it is a top-level domain")
        return self._decide(name)

    def _mapped(self, name: str) -> Decision:
        target, because = name, f"{name} is mapped"
        for _ in range(_CHAIN):
            if target not in self._mappings:
                break
            target = self._mappings[target]
        else:
            return Decision("nowhere", f"the mappings of {name} lead in a circle")
        if _is_address(target):
            return Decision("address", f"{because} to {target}", address=target)
        found = replace(self, neighbours=())._decide(target)  # what it stands for is meant of this cluster
        found = replace(found, because=f"{because} to {target}: {found.because}", asked=found.asked or target)
        return self._shown(found)

    def _decide(self, name: str) -> Decision:
        labels = name.split(".")
        if _is_wpad(name):
            if any(is_below(name, one) for one in (self.domain, "svc", "pod", *self._owns)):
                return Decision("nowhere", "a browser would take its proxy from a service of the name wpad")
            return Decision("elsewhere", "wpad is never the cluster's")
        if excluded := longest(name, self.naming.exclude):
            return Decision("elsewhere", f"names below {excluded} are excluded")
        for one in self.neighbours:
            if name.endswith(f".{one.own}"):
                return Decision("elsewhere", f"names below {one.own} are session {one.name}'s")
        suffix, decision = self._reverse(name) or self._below_own(name) or self._captured(name, labels)
        theirs = longest(name, self.claimed) if decision.where == "cluster" else None
        if theirs and theirs == suffix and suffix in (self.own, *self.naming.namespaces):
            what = "this session's name" if suffix == self.own else "a namespace"
            return Decision("elsewhere", f"{theirs} is {what}, and another link's routing domain")
        if theirs and theirs != suffix and is_below(theirs, suffix):
            return Decision("elsewhere", f"another link's routing domain {theirs} is closer than ours, {suffix}")
        return self._shown(decision)

    def _shown(self, decision: Decision) -> Decision:
        """With the cluster's domain, if that is another session's, replaced in the answer."""
        is_anothers = decision.where == "cluster" and self.below != self.domain
        return replace(decision, below=self.below) if is_anothers else decision

    @property
    def below(self) -> str:
        """Where this host has all of the cluster's names: below its domain, or our own suffix if that is another's."""
        return self.own if self._has(self.domain) else self.domain

    @property
    def _owns(self) -> tuple[str, ...]:
        return (self.own,) if self.own else ()

    @property
    def first(self) -> Neighbour | None:
        """The session that was there first, if that is another one: short names are its."""
        return next((one for one in self.neighbours if one.was_first), None)

    @property
    def yielded(self) -> str | None:
        """What another session has before us, in words; None when we are the first."""
        if not self.first:
            return None
        both = f" and those below {self.domain}" if self._has(self.domain) else ""
        return f"short ones{both} are session {self.first.name}'s, those of this session are below {self.own}"

    def _has(self, suffix: str) -> Neighbour | None:
        """The session that has a suffix of ours too, and came before us."""
        return next((one for one in self.neighbours if one.was_first and suffix in one.suffixes), None)

    def announced(self) -> tuple[str, ...]:
        """The suffixes that may be other sessions' too, and names that are mapped."""
        mapped = (name for name in self._mappings if not _is_wpad(name))
        return tuple(dict.fromkeys((self.domain, *self.naming.include, *mapped)))

    def _below_own(self, name: str) -> tuple[str, Decision] | None:
        """For a name below our own suffix, that, and what it means without it: all of it is the cluster's."""
        if not self.own or not name.endswith(f".{self.own}"):
            return None
        name = name.removesuffix(f".{self.own}")
        before, _, last = name.rpartition(".")
        if not before:
            asked = f"{name}.{self.naming.namespace}.svc.{self.domain}"
        elif is_below(name, self.domain):
            asked = name
        else:
            asked = f"{name}.{self.domain}" if last in ("svc", "pod") else f"{name}.svc.{self.domain}"
        return self.own, Decision("cluster", f"names below {self.own} are this session's", asked, below=self.own)

    def _captured(self, name: str, labels: list[str]) -> tuple[str, Decision]:
        """The suffix of ours that a name has, and what that means; the longest first."""
        last, namespace = labels[-1], self.naming.namespace
        of_domain = f"it is below the cluster's domain {self.domain}"
        included = longest(name, self.naming.include)
        for suffix, because in ((self.domain, of_domain), (included, f"names below {included} are included")):
            if suffix and is_below(name, suffix):
                if theirs := self._has(suffix):
                    return "", Decision("elsewhere", f"{suffix} is session {theirs.name}'s, which was there first")
                return suffix, Decision("cluster", because)
        if self.first:
            because = f"short names are session {self.first.name}'s, which was there first; ours are below {self.own}"
            return "", Decision("elsewhere", because)
        if len(labels) == 1:
            if last in _UNCLAIMED or not last:
                return "", Decision("elsewhere", "it is no service's name")
            asked = f"{name}.{namespace}.svc.{self.domain}"
            return "", Decision("cluster", f"a single label is a service of namespace {namespace}", asked)
        if last in ("svc", "pod"):
            return last, Decision("cluster", f"it ends in {last}", f"{name}.{self.domain}")
        if last in self.naming.namespaces:
            if not is_capturable(last):
                return "", Decision("elsewhere", f"{last} has names elsewhere, so that namespace is not captured")
            return last, Decision("cluster", f"{last} is a namespace", f"{name}.svc.{self.domain}")
        return "", Decision("elsewhere", f"it has no suffix of the cluster's; known namespaces: {self._known()}")

    def _known(self) -> str:
        """The namespaces, for a user who may see one of them alone; the first of many."""
        known = self.naming.namespaces
        more = f" and {len(known) - _SHOWN} more" if len(known) > _SHOWN else ""
        return f"{', '.join(known[:_SHOWN]) or 'none'}{more}"

    def _reverse(self, name: str) -> tuple[str, Decision] | None:
        """For the reverse name of an address, with the zone of ours that it is in; None for any other name."""
        host = host_of(name)
        if host is None:
            return None
        for virtual, real in self.virtual:
            if virtual.contains(host):
                asked = reverse_name(Prefix.host(real.address(host.network - virtual.network)))
                because = f"{host.address()} is of the virtual subnet {virtual}"
                return zone_of(name, virtual), Decision("cluster", because, asked)
        for subnet in self.subnets:
            if subnet.contains(host):
                because = f"{host.address()} is of {subnet}, which is routed"
                return zone_of(name, subnet), Decision("cluster", because)
        return "", Decision("elsewhere", f"{host.address()} is of no subnet that is routed")

    def routing_domains(self) -> tuple[str, ...]:
        """Suffixes whose questions the host's resolver is to ask us, the most important first, each once."""
        naming = self.naming
        subnets = [*self.subnets, *(virtual for virtual, _ in self.virtual)]
        taken = (*self.claimed, *(one.own for one in self.neighbours))
        namespaces = [one for one in naming.namespaces if is_capturable(one) and one not in taken]
        connected = [one for one in namespaces if one == naming.namespace]
        domain, *more = self.announced()
        ends, namespaces = ((), []) if self.first else (("svc", "pod"), [*connected, *namespaces])
        reverse = [zone for subnet in subnets for zone in zones(subnet)]
        owns = [one for one in self._owns if one not in self.claimed]
        found = dict.fromkeys((domain, *owns, *ends, *more, *namespaces, *reverse))
        wanted = (one for one in found if one in self._mappings or not longest(one, naming.exclude))
        return tuple(one for one in wanted if not self._has(one))

    def search(self) -> tuple[str, ...]:
        """What is to stand behind a name of one label; nothing where such names are another session's."""
        return () if self.first else (f"{self.naming.namespace}.svc.{self.domain}",)


def is_capturable(namespace: str) -> bool:
    """Whether names below a namespace may be the cluster's: no others have them."""
    return namespace not in public_domains() and namespace not in _UNCLAIMED


def own_suffix(session: str) -> str:
    """The suffix that a session alone has: its name, or that below `tpvpn` where others may have names below it."""
    free = is_capturable(session) and not session.isdecimal()  # what ends in a number is an address, to some
    return session if free and session not in ("default", "svc", "pod", "tpvpn") else f"{session}.tpvpn"


def _is_wpad(name: str) -> bool:
    return name.partition(".")[0] == "wpad"


def longest(name: str, suffixes: Iterable[str]) -> str | None:
    """The longest of the suffixes that a name has."""
    return max((one for one in suffixes if is_below(name, one)), key=len, default=None)


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def host_of(name: str) -> Prefix | None:
    """The address of a reverse name (RFC 1035 section 3.5, RFC 3596 section 2.5); None when it is not a whole one."""
    for suffix, version in _REVERSE.items():
        if not name.endswith(f".{suffix}"):
            continue
        parts = name.removesuffix(f".{suffix}").split(".")[::-1]
        if version == 6 and len(parts) == 32 and all(len(one) == 1 and one in _HEX for one in parts):
            text = ":".join("".join(parts[at : at + 4]) for at in range(0, 32, 4))
        elif version == 4 and len(parts) == 4:
            text = ".".join(parts)
        else:
            return None
        return Prefix.host(text) if _is_address(text) else None
    return None


def reverse_name(host: Prefix) -> str:
    """The reverse name of an address."""
    return ipaddress.ip_address(host.address()).reverse_pointer


def as_written(name: str, domain: str) -> str:
    """A name of the cluster as people write it: `web.default.svc.cluster.local.` is web.default."""
    name = name.rstrip(".")
    return name.removesuffix(f".{domain}").removesuffix(".svc") if name.endswith(f".{domain}") else name


def zone_of(name: str, subnet: Prefix) -> str:
    """The one of a subnet's reverse zones that a reverse name is in."""
    labels = _zone_length(subnet) // _STEP[subnet.version] + 2
    return ".".join(name.split(".")[-labels:])


def zones(subnet: Prefix) -> Iterator[str]:
    """The reverse zones that cover a subnet, at the boundaries of octets or nibbles."""
    length = _zone_length(subnet)
    bits = 32 if subnet.version == 4 else 128
    for number in range(1 << max(length - subnet.length, 0)):
        address = ipaddress.ip_address(subnet.address(number << (bits - length)))
        labels = address.reverse_pointer.split(".")
        yield ".".join(labels[(bits - length) // _STEP[subnet.version] :])


def _zone_length(subnet: Prefix) -> int:
    """The length of the prefix that is one reverse zone."""
    step = _STEP[subnet.version]
    length = -(-subnet.length // step) * step
    return length if 1 << (length - subnet.length) <= ZONES else length - step
