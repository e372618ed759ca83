"""The story of a session's names: which of them are the cluster's, who is asked, and how this host comes to ask us.

It puts the parts together (`dns/policy`, `dns/server`, `host_resolver`) and keeps them up with what changes: the
routes, the wishes, the link, and the servers that a VPN brings along. Nothing of it ends a session that is to work out
by itself (`auto`): what does not work is said, and shown by `status`.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from tpvpn.dns.exchange import Exchange
from tpvpn.dns.policy import (
    DOMAIN,
    Decision,
    Naming,
    Neighbour,
    Policy,
    as_written,
    domain_of,
    own_suffix,
    reverse_name,
)
from tpvpn.dns.server import Server
from tpvpn.dns.shown import shown
from tpvpn.dns.upstream import Upstream
from tpvpn.errors import TpvpnError
from tpvpn.helper.client import HelperClient
from tpvpn.host_resolver import Mode
from tpvpn.place import HERE, Place, Resolver
from tpvpn.route.prefix import Prefix
from tpvpn.route.verdict import Plan
from tpvpn.wire.dns import AAAA, PTR, A

SETTLE = 0.2
"""Seconds: what changes together is told to the host's resolver at once."""
OURS = "short ones are this session's too from now on, which is the first one now"
RETRY = 5.0
"""Seconds after the host's resolver could not be told until it is tried again."""


class Namer:
    """The names of one session."""

    def __init__(
        self, session: str, mode: Mode, naming: Naming, say: Callable[[str], None], place: Place = HERE
    ) -> None:
        self._session, self._place = session, place
        self._mode: Mode = mode
        self._say = say
        self.exchange = Exchange()
        self._upstream = Upstream()
        self._policy = Policy(naming, own=own_suffix(session))
        self._neighbours: Callable[[], tuple[Neighbour, ...]] = tuple
        self._announce: Callable[[Sequence[str]], Awaitable[None]] | None = None
        self._announced: Sequence[str] = ()
        self._server: Server | None = None
        self._host: Resolver | None = None
        self._told: tuple[Sequence[str], Sequence[str]] = ((), ())
        self._stale, self._attached = asyncio.Event(), asyncio.Event()
        self._own: tuple[str, ...] = ()

    async def announce(self, helper: HelperClient, table: int, facts: Mapping[str, Any]) -> None:
        """Heed other sessions' suffixes from now on, and tell them of ours, by what the manager sees in its pod.

        To be done before there is a device: when one comes or goes, they look. Who is not asked for names has none.
        """
        if self._mode == "off":
            return
        self._neighbours, self._announce = partial(self._place.neighbours, self._session, table), helper.announce
        self._learn(facts)
        await self._keep_announced()

    async def _keep_announced(self) -> None:
        if self._announce and self._announced != (ours := self._policy.announced()):
            await self._announce(ours)
            self._announced = ours

    async def start(self, helper: HelperClient, own: Sequence[str]) -> None:
        """Answer at the device's own addresses, and have the host ask there. Errors: PrivilegeError, UsageError."""
        self._own = tuple(own)
        try:
            sockets = await helper.open_dns()
        except TpvpnError as error:
            if self._mode not in ("auto", "off"):
                raise
            self._say(f"warning: the cluster's names do not work: {error}")
            if self._announce:
                await self._announce(())
                self._announce = None
            return
        self._server = Server(sockets, self.exchange, self._upstream, self._decide)
        self._host = self._place.resolver(helper, self._mode, own, self._say)
        self._told = self._policy.search(), self._policy.routing_domains()
        await self._host.start(*self._told)
        self._refresh()

    def close(self) -> None:
        """Answer nobody any more."""
        if self._server:
            self._server.close()
        self._upstream.close()

    def _decide(self, name: str, kind: int) -> Decision:
        return self._policy.decide(name, kind)

    # -- what changes --------------------------------------------------------------------------------------------------

    def attach(self, ask: Callable[[int, bytes], None], facts: Mapping[str, Any]) -> None:
        """Questions go by this link from now on; the manager's facts say what the cluster's domain is."""
        self._learn(facts)
        self.exchange.attach(ask)
        self._attached.set()

    def _learn(self, facts: Mapping[str, Any]) -> None:
        text = facts.get("resolv_conf")
        domain = domain_of(text) if isinstance(text, str) else None
        self._change(replace(self._policy, domain=domain or DOMAIN))

    def detach(self) -> None:
        """The link is lost: questions wait for the next one as long as their clients do."""
        self.exchange.detach()

    def want(self, naming: Naming) -> None:
        """What is wanted of names from now on."""
        self._change(replace(self._policy, naming=naming))

    def follow_plan(self, plan: Plan) -> None:
        """Addresses that are routed have their names in the cluster."""
        self._change(self._policy.following(plan))

    def _change(self, changed: Policy) -> None:
        if self._set(changed):
            self._refresh()
            self._stale.set()

    def _set(self, changed: Policy) -> bool:
        """Decide by this from now on, beside the sessions that there are now; whether it is another policy."""
        before, self._policy = self._policy, replace(changed, neighbours=self._neighbours())
        if (theirs := self._policy.yielded) != before.yielded:
            self._say(f"names: {theirs or OURS}")
        return self._policy != before

    def _refresh(self) -> None:
        """Let the stub know what holds now."""
        if self._server and self._host:
            self._set(replace(self._policy, claimed=self._host.claimed))
            self._upstream.set(self._host.servers)
            self._server.domain = self._policy.domain
            self._server.virtual = self._policy.virtual
            self._server.changed()

    async def follow(self, changed: Callable[[], None]) -> None:
        """Keep the host's resolver to it, for ever; `changed()` when the host has other servers."""
        if not self._host:
            await asyncio.get_running_loop().create_future()
            return
        host = self._host

        def on_host() -> None:
            self._refresh()
            self._stale.set()
            changed()

        following = asyncio.create_task(host.follow(on_host))
        telling = asyncio.create_task(self._keep_told(host))
        probing = asyncio.create_task(self._probe())
        tasks = (following, telling, probing)
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _keep_told(self, host: Resolver) -> None:
        while True:
            await self._stale.wait()
            await asyncio.sleep(SETTLE)
            self._stale.clear()
            wanted = self._policy.search(), self._policy.routing_domains()
            try:
                await self._keep_announced()
                if wanted == self._told:
                    continue
                await host.update(*wanted)
                self._told = wanted
            except (TpvpnError, OSError) as error:
                self._say(f"warning: the host's resolver does not know the names as wanted, tried again: {error}")
                asyncio.get_running_loop().call_later(RETRY, self._stale.set)

    async def _probe(self) -> None:
        """Find out whether the cluster's resolver asks this host, as a cluster on this laptop does."""
        while self._server:
            await self._attached.wait()
            self._attached.clear()
            before = self._server.looping
            if await self._server.probe() and not before:
                self._say("the cluster's resolver asks this host for what it does not know: such questions end here")

    # -- what is said --------------------------------------------------------------------------------------------------

    @property
    def summary(self) -> str:
        """How programs come to the names, in words."""
        return f"below {self._policy.below} by {self._host.status()['mode']}" if self._host else "off"

    def status(self) -> dict[str, Any]:
        """The names' part of a session's status."""
        policy = self._policy
        shown: dict[str, Any] = {
            "domain": policy.domain,
            "namespace": policy.naming.namespace,
            "suffix": policy.own,
            "below": policy.below,
            "first": policy.first.name if policy.first else None,
            "search": list(policy.search()),
            "domains": list(policy.routing_domains()),
            "listening": list(self._own) if self._server else [],
        }
        if self._host and self._server:
            shown |= self._host.status() | {"questions": asdict(self._server.counters)}
        else:
            shown |= {"mode": "off", "because": "port 53 of the device could not be had", "servers": [], "warnings": []}
        return shown

    async def name_of(self, address: str) -> str | None:
        """What the cluster calls an address of its own, as people write it; None when it does not say."""
        with contextlib.suppress(TpvpnError):
            if self._server:
                _, answer = await self._server.resolve(reverse_name(Prefix.host(address)), PTR)
                if records := shown(answer or b"").records:
                    return as_written(records[0].rsplit(" ", 1)[1], self._policy.below)
        return None

    async def explain(self, name: str) -> dict[str, Any]:
        """What becomes of a name: the decision, and what the one that is asked answers."""
        name = name.lower().rstrip(".")
        decision = self._decide(name, A)
        told: dict[str, Any] = {"name": name, "session": self._session, **asdict(decision)}
        told |= {"server": None, "rcode": None}
        records, addresses = dict[str, None](), list[str]()
        if self._server and self._host:
            asked = {"cluster": "the cluster's resolver", "elsewhere": ", ".join(self._host.servers)}
            told["server"] = asked.get(decision.where)
            with contextlib.suppress(TpvpnError):  # it is no name
                for _, answer in await asyncio.gather(*(self._server.resolve(name, kind) for kind in (A, AAAA))):
                    rcode, lines, found = shown(answer or b"")
                    told["rcode"] = rcode if told["rcode"] in (None, "NOERROR") else told["rcode"]
                    records |= dict.fromkeys(lines)
                    addresses += found
        return told | {"records": list(records), "addresses": addresses}
