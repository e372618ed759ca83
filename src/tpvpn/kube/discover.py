"""Asks the API server for what `subnets` needs, as far as the user may: all sources at once, each by itself.

It creates nothing: the range of ClusterIPs is learned from a dry run that must fail. What is forbidden is noted, with
the admin's command, and does without.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

from tpvpn.errors import ClusterError
from tpvpn.kube.api import Cluster
from tpvpn.kube.refusal import ForbiddenError, MissingError
from tpvpn.kube.subnets import Observed

T = TypeVar("T")
Addresses = Callable[[dict[str, Any]], list[str]]
"""The addresses that an object of the API has."""

_IMPOSSIBLE = "198.51.100.1"
"""No cluster's ClusterIP (RFC 5737)."""
MOST = 5000
"""Pods or services that are looked at: enough to see where they are."""


@dataclass(frozen=True, slots=True)
class Discovered:
    """What was observed, and what this user may not see, in words."""

    observed: Observed
    forbidden: tuple[str, ...]
    namespaces: tuple[str, ...] = ()
    """All there are, where the user may list them."""


class Discovery:
    """One look at a cluster."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._forbidden: list[str] = []

    async def run(self) -> Discovered:
        """Ask for everything. ClusterError when the API server cannot be reached or does not know us."""
        cidrs, nodes, kubeadm, services, pods, namespaces = await asyncio.gather(
            self._allowed(self._service_cidrs(), ()),
            self._allowed(self._node_cidrs(), ()),
            self._allowed(self._kubeadm(), ("", "")),
            self._addresses("services", _cluster_ips),
            self._addresses("pods", _pod_ips),
            self._namespaces(),
        )
        observed = Observed(
            service_cidrs=cidrs,
            node_cidrs=nodes,
            kubeadm_service=kubeadm[0],
            kubeadm_pod=kubeadm[1],
            cluster_ips=services,
            pod_ips=pods,
        )
        if not cidrs:
            observed = replace(observed, refusal=await self._refusal())
        return Discovered(observed, tuple(self._forbidden), namespaces)

    async def _allowed(self, asking: Awaitable[T], instead: T) -> T:
        try:
            return await asking
        except ForbiddenError as error:
            self._forbidden.append(str(error))
        except MissingError:
            pass  # an older cluster, or one that kubeadm did not make
        return instead

    async def _service_cidrs(self) -> tuple[str, ...]:
        path = "/apis/networking.k8s.io/v1/servicecidrs"
        return tuple(
            [cidr async for one in self._cluster.items(path) for cidr in one.get("spec", {}).get("cidrs") or ()]
        )

    async def _node_cidrs(self) -> tuple[str, ...]:
        nodes = self._cluster.items("/api/v1/nodes")
        return tuple([cidr async for one in nodes for cidr in one.get("spec", {}).get("podCIDRs") or ()])

    async def _namespaces(self) -> tuple[str, ...]:
        try:
            return tuple([str(one["metadata"]["name"]) async for one in self._cluster.items("/api/v1/namespaces")])
        except ForbiddenError:
            return ()  # names of the form service.namespace are for the user's own alone then

    async def _kubeadm(self) -> tuple[str, str]:
        import yaml

        found = await self._cluster.get("/api/v1/namespaces/kube-system/configmaps/kubeadm-config")
        try:
            networking: Any = yaml.safe_load(found["data"]["ClusterConfiguration"])["networking"]
            return str(networking.get("serviceSubnet") or ""), str(networking.get("podSubnet") or "")
        except (yaml.YAMLError, KeyError, TypeError, AttributeError):
            return "", ""

    async def _addresses(self, resource: str, addresses: Addresses) -> tuple[str, ...]:
        """Of all namespaces, or where that is forbidden of the user's own."""
        try:
            return await self._listed(f"/api/v1/{resource}", addresses)
        except ForbiddenError as error:
            self._forbidden.append(str(error))
        own = f"/api/v1/namespaces/{self._cluster.namespace}/{resource}"
        return await self._allowed(self._listed(own, addresses), ())

    async def _listed(self, path: str, addresses: Addresses) -> tuple[str, ...]:
        found: list[str] = []
        async for item in self._cluster.items(path):
            found += addresses(item)
            if len(found) >= MOST:
                break
        return tuple(found)

    async def _refusal(self) -> str:
        """What the API server says to a service that cannot be; "" when the user may not ask."""
        path = f"/api/v1/namespaces/{self._cluster.namespace}/services"
        ports = [{"port": 443}]
        service = {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"generateName": "tpvpn-dry-run-"},
            "spec": {"clusterIP": _IMPOSSIBLE, "ports": ports},
        }
        try:
            await self._cluster.request("POST", path, service, query={"dryRun": "All"})
        except ForbiddenError as error:
            self._forbidden.append(str(error))
        except ClusterError as error:
            _, behind, words = str(error).partition(_IMPOSSIBLE)
            return words if behind else ""
        return ""


def _cluster_ips(service: dict[str, Any]) -> list[str]:
    spec = service.get("spec", {})
    return cast(list[str], spec.get("clusterIPs") or ([spec["clusterIP"]] if spec.get("clusterIP") else []))


def _pod_ips(pod: dict[str, Any]) -> list[str]:
    if pod.get("spec", {}).get("hostNetwork"):
        return []
    return [one["ip"] for one in pod.get("status", {}).get("podIPs") or ()]
