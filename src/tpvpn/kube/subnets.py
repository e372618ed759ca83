"""Which subnets a cluster's services and pods have, from what its API server told, and how sure that is.

Pure: words of API objects in, prefixes with their provenance out. It knows nothing of requests or rights: what could
not be read is simply not there. Services, the first that is known: the ServiceCIDR API; the range that the API server
names when it refuses an impossible ClusterIP; kubeadm's configuration; what covers the ClusterIPs seen. Pods: the
nodes' podCIDRs, if pods are seen there; kubeadm's configuration, likewise; what covers the pods seen.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from tpvpn.errors import UsageError
from tpvpn.route.prefix import BITS, Prefix, Space

_WIDEST = {4: 12, 6: 48}
"""Addresses that only a larger block covers are of several: each is covered apart."""
_BLOCK = {4: 24, 6: 64}
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Observed:
    """What the API server told; texts are as in its objects, and anything malformed in them is passed over."""

    service_cidrs: tuple[str, ...] = ()
    """Of all ServiceCIDR objects (networking.k8s.io/v1)."""
    refusal: str = ""
    """The error for a service with an impossible ClusterIP (server-side dry run)."""
    kubeadm_service: str = ""
    kubeadm_pod: str = ""
    """networking.serviceSubnet and networking.podSubnet of kubeadm-config: with commas where there are two."""
    cluster_ips: tuple[str, ...] = ()
    node_cidrs: tuple[str, ...] = ()
    """spec.podCIDRs of all nodes."""
    pod_ips: tuple[str, ...] = ()
    """Of pods that are not on their host's network."""


@dataclass(frozen=True, slots=True)
class Found:
    """A subnet of the cluster. `sure`: stated by the API server or its configuration, not guessed from addresses."""

    prefix: Prefix
    kind: Literal["service", "pod"]
    source: str
    sure: bool


@dataclass(frozen=True, slots=True)
class Subnets:
    """All that were found, and what a user should know of how."""

    found: tuple[Found, ...]
    warnings: tuple[str, ...]


def subnets(observed: Observed) -> Subnets:
    """The subnets of services and pods."""
    services, pods = _services(observed), _pods(observed)
    warnings: list[str] = []
    for kind, found in (("service", services), ("pod", pods)):
        guessed = [str(one.prefix) for one in found if not one.sure]
        if guessed:
            warnings.append(
                f"the {kind} subnets are not stated anywhere that you may read: {', '.join(guessed)} covers the "
                f"{kind} addresses seen; others are not reached unless you give --{kind}-cidr"
            )
        elif not found:
            warnings.append(f"no {kind} subnet was found: give --{kind}-cidr to reach the cluster's {kind}s")
    return Subnets((*services, *pods), tuple(warnings))


def outside(observed: Observed, given: Iterable[Prefix], kind: Literal["service", "pod"]) -> str | None:
    """A warning when addresses of that kind are seen outside the subnets that a user gave; None when there are none."""
    there = Space(given)
    seen = hosts(observed.cluster_ips if kind == "service" else observed.pod_ips)
    lost = [host for host in seen if host not in there]
    if not lost:
        return None
    shown = ", ".join(host.address() for host in lost[:_SHOWN]) + (", …" if len(lost) > _SHOWN else "")
    return f"{len(lost)} {kind} addresses are outside the --{kind}-cidr given and will not be reached: {shown}"


def _services(observed: Observed) -> list[Found]:
    stated = (
        (_prefixes(observed.service_cidrs), "ServiceCIDR API"),
        (_prefixes(re.findall(r"[0-9a-fA-F:.]+/\d+", observed.refusal)), "API server's ClusterIP range"),
        (_prefixes(observed.kubeadm_service.split(",")), "kubeadm-config"),
    )
    for prefixes, source in stated:
        if prefixes:
            return [Found(prefix, "service", source, True) for prefix in Space(prefixes).prefixes()]
    return [Found(prefix, "service", "ClusterIPs seen", False) for prefix in cover(hosts(observed.cluster_ips))]


def _pods(observed: Observed) -> list[Found]:
    seen = hosts(observed.pod_ips)
    stated = (
        (_prefixes(observed.node_cidrs), "nodes' podCIDRs"),
        (_prefixes(observed.kubeadm_pod.split(",")), "kubeadm-config"),
    )
    for prefixes, source in stated:
        # Some networks have addresses of their own and leave podCIDRs unused.
        there = Space(prefixes)
        if prefixes and (not seen or any(host in there for host in seen)):
            found = [Found(prefix, "pod", source, True) for prefix in there.prefixes()]
            rest = cover([host for host in seen if host not in there])
            return found + [Found(prefix, "pod", "pods seen", False) for prefix in rest]
    return [Found(prefix, "pod", "pods seen", False) for prefix in cover(seen)]


def cover(hosts: Sequence[Prefix]) -> list[Prefix]:
    """The smallest prefix of each family that holds all of these addresses; when that is too wide, several."""
    found: list[Prefix] = []
    for version in (4, 6):
        own = [host.network for host in hosts if host.version == version]
        if own:
            length = BITS[version] - (min(own) ^ max(own)).bit_length()
            if length >= _WIDEST[version]:
                found.append(Prefix.around(version, own[0], min(length, _BLOCK[version])))
            else:
                found += Space(Prefix.around(version, one, _BLOCK[version]) for one in own).prefixes()
    return found


def hosts(texts: Iterable[str]) -> list[Prefix]:
    """The addresses among these texts; what is none is passed over."""
    return [prefix for prefix in _prefixes(texts) if prefix.size == 1]


def _prefixes(texts: Iterable[str]) -> list[Prefix]:
    found: list[Prefix] = []
    for text in texts:
        try:
            found.append(Prefix.parse(text.strip()))
        except UsageError:
            continue  # "None" of a headless service, "" of one that has none
    return found
