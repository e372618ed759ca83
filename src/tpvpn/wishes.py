"""What a session is to route and name, as it is known now: from flags and files, or from the cluster too, and watched.

What the user says comes first, what the admin says next, then what is found. Whatever changes in the cluster leads to
a new look at all of it, and that to a new request: the router does the rest. Requests are made by whoever knows the
flags; here is only what they are made of.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, cast

from tpvpn.config import Config, parse
from tpvpn.dns.policy import Naming
from tpvpn.dns.system import nameservers_of
from tpvpn.errors import ClusterError, TpvpnError, UsageError
from tpvpn.kube.api import Cluster
from tpvpn.kube.discover import Discovered, Discovery
from tpvpn.kube.installed import Installed, installed
from tpvpn.kube.refusal import ForbiddenError, MissingError
from tpvpn.kube.subnets import Observed, hosts, outside, subnets
from tpvpn.route.conflict import NEVER
from tpvpn.route.prefix import Prefix
from tpvpn.route.verdict import Request, Wanted

Make = Callable[[Config, Sequence[Wanted], Sequence[tuple[Prefix, str]]], Request]
"""A request from the admin's configuration, the subnets found, and the addresses seen, each with where it is from."""
Name = Callable[[Config, str, Sequence[str]], Naming]
"""What is wanted of names, from the admin's configuration, the connected namespace, and those that are known."""

ASKED_AGAIN = 10.0
"""Seconds after which the admin's configuration is read again: `get` is all that its users may."""
GUESSED_AGAIN = 30.0
"""Seconds after which addresses are looked at again where they are all that is known."""
_SETTLE = 1.0
_RETRY = 5.0
_WATCHED: Mapping[str, str] = {"/api/v1/nodes": "podCIDRs", "/apis/networking.k8s.io/v1/servicecidrs": "cidrs"}
"""Lists whose objects have subnets, and where in their spec."""


class Fixed:
    """Wishes that nothing changes."""

    def __init__(self, request: Request, naming: Naming) -> None:
        self.request, self.naming = request, naming

    def learn(self, facts: Mapping[str, Any]) -> None:
        """Nothing that a manager sees matters."""

    async def follow(self) -> AsyncIterator[Request]:
        """Nothing new, for ever."""
        await asyncio.get_running_loop().create_future()
        yield self.request


class FromCluster:
    """Wishes that are the cluster's; `look()` first."""

    def __init__(
        self, cluster: Cluster, admins: Installed | None, make: Make, name: Name, say: Callable[[str], None]
    ) -> None:
        self._cluster, self._admins, self._make, self._name, self._say = cluster, admins, make, name, say
        self._config = Config()
        self._seen = Discovered(Observed(), ())
        self._facts: Mapping[str, Any] = {}
        self._namespaces = dict[str, None]()
        self._changed = asyncio.Event()
        self._look_due = False
        self._told = set[str]()
        self._guessed = False
        self.request: Request
        self.naming: Naming

    async def look(self) -> None:
        """Look at the cluster. Errors: ClusterError, UsageError; nothing has changed then."""
        self._seen = await Discovery(self._cluster).run()
        self._namespaces = dict.fromkeys(self._seen.namespaces)
        self._read_config()
        self._decide()

    def learn(self, facts: Mapping[str, Any]) -> None:
        """Take what a manager sees in its pod."""
        self._facts = facts
        self._decide()

    def _read_config(self) -> None:
        if self._admins:
            try:
                self._config = parse(self._admins.client, self._admins.source, strict=False)
            except UsageError as error:
                self._warn([f"what the admin set for clients is ignored: {error}"])

    def _decide(self) -> None:
        observed = with_facts(self._seen.observed, self._facts)
        found = subnets(observed)
        wanted = [Wanted(one.prefix, one.kind, one.source) for one in found.found]
        self.request = self._make(self._config, wanted, list(_seen(observed)))
        known = self._namespaces or (self._cluster.namespace,)
        self.naming = self._name(self._config, self._cluster.namespace, tuple(known))
        self._guessed = not all(one.sure for one in found.found)
        warnings = list(self._warnings(observed, found.warnings, wanted))
        self._warn([*warnings, *(self._seen.forbidden if warnings else ())])

    def _warnings(self, observed: Observed, doubts: Sequence[str], found: Sequence[Wanted]) -> Iterator[str]:
        """A doubt about subnets that were given after all is none; but what is seen outside of those is one."""
        kinds: tuple[Literal["service", "pod"], ...] = ("service", "pod")
        for kind in kinds:
            given = [one.prefix for one in self.request.wanted if one.kind == kind and one not in found]
            if given:
                lost = outside(observed, given, kind)
                yield from [lost] if lost else []
            else:
                yield from (doubt for doubt in doubts if f"--{kind}-cidr" in doubt)

    def _warn(self, warnings: Sequence[str]) -> None:
        """Say each once."""
        for warning in dict.fromkeys(warnings):
            if warning not in self._told:
                self._told.add(warning)
                self._say(f"warning: {warning}")

    # -- what changes --------------------------------------------------------------------------------------------------

    async def follow(self) -> AsyncIterator[Request]:
        """A request whenever it or the naming is another one, for ever."""
        tasks = [
            asyncio.create_task(self._watch(path, partial(self._take, member, dict[str, list[str]]())))
            for path, member in _WATCHED.items()
        ]
        tasks.append(asyncio.create_task(self._watch("/api/v1/namespaces", self._take_namespace)))
        tasks.append(asyncio.create_task(self._ask_again()))
        try:
            while True:
                await self._changed.wait()
                await asyncio.sleep(_SETTLE)  # nodes come in groups
                self._changed.clear()
                before, due, self._look_due = (self.request, self.naming), self._look_due, False
                with contextlib.suppress(TpvpnError):  # an API server that restarts: the next look tells
                    if due:
                        await self.look()
                    else:
                        self._decide()
                if (self.request, self.naming) != before:
                    yield self.request
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _change(self) -> None:
        """All is to be looked at anew."""
        self._look_due = True
        self._changed.set()

    async def _watch(self, path: str, take: Callable[[Mapping[str, Any] | None], None]) -> None:
        """Have each event taken, and None when the watch broke off; until it is forbidden."""
        while True:
            with contextlib.suppress(ClusterError, TimeoutError):
                try:
                    async for event in self._cluster.watch(path):
                        take(event)
                except (ForbiddenError, MissingError):
                    return
            take(None)
            self._change()  # what went meanwhile is seen by the next look, which is due now
            await asyncio.sleep(_RETRY)

    def _take_namespace(self, event: Mapping[str, Any] | None) -> None:
        if event is None or event.get("type") not in ("ADDED", "DELETED"):
            return
        name, before = str(event["object"]["metadata"].get("name")), len(self._namespaces)
        if event["type"] == "ADDED":
            self._namespaces[name] = None
        else:
            self._namespaces.pop(name, None)
        if len(self._namespaces) != before:
            self._changed.set()

    def _take(self, member: str, known: dict[str, list[str]], event: Mapping[str, Any] | None) -> None:
        """Look again at an object with another subnet than is known."""
        if event is None:
            known.clear()
            return
        if event.get("type") not in ("ADDED", "MODIFIED", "DELETED"):
            return
        name = str(event["object"]["metadata"].get("name"))
        cidrs: list[str] = [] if event["type"] == "DELETED" else event["object"].get("spec", {}).get(member) or []
        observed = self._seen.observed
        there = observed.node_cidrs if member == "podCIDRs" else observed.service_cidrs
        if known.get(name, cidrs) != cidrs or not set(cidrs) <= set(there):
            self._change()
        known[name] = cidrs

    async def _ask_again(self) -> None:
        """What cannot be watched is asked for now and then."""
        looked = asyncio.get_running_loop().time()
        while True:
            await asyncio.sleep(ASKED_AGAIN)
            if self._admins:
                with contextlib.suppress(TpvpnError):
                    now = await installed(self._cluster, self._admins.namespace)
                    if now and now != self._admins:
                        self._admins = now
                        self._change()
            by_address = self.request.policy.on_conflict == "hosts" or self._guessed
            if by_address and asyncio.get_running_loop().time() - looked >= GUESSED_AGAIN:
                looked = asyncio.get_running_loop().time()
                self._change()


def with_facts(observed: Observed, facts: Mapping[str, Any]) -> Observed:
    """What was observed, and beside it what a manager sees in its pod: its own view of the cluster."""
    service, resolv_conf, pods = facts.get("api_service"), facts.get("resolv_conf"), facts.get("addresses")
    named = nameservers_of(resolv_conf) if isinstance(resolv_conf, str) else ()
    own = cast(list[object], pods) if isinstance(pods, list) else []
    return replace(
        observed,
        cluster_ips=(*observed.cluster_ips, *(host.address() for host in _reachable([service, *named]))),
        pod_ips=(*observed.pod_ips, *(host.address() for host in _reachable(own))),
    )


def _reachable(addresses: Iterable[object]) -> list[Prefix]:
    """Those that may be a service's or a pod's; a resolver of the node's own is at a link-local address."""
    return [host for host in hosts(one for one in addresses if isinstance(one, str)) if host not in NEVER]


def _seen(observed: Observed) -> Iterator[tuple[Prefix, str]]:
    for addresses, source in ((observed.cluster_ips, "ClusterIPs seen"), (observed.pod_ips, "pods seen")):
        yield from ((host, source) for host in _reachable(addresses))
