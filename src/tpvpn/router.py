"""The routes of a session: looked at, planned, applied by the helper, confirmed by the kernel, and followed.

It prints nothing and reads no option; what happens is told as `events`. `look()` plans without any right; from
`attach()` on, each `update()` is view → plan → difference → apply → ask the kernel → reset what the change stranded.
Doing that whenever something changed is all there is to live reaction: an update that finds nothing new does nothing.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Container, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import Any, Protocol

from tpvpn import report, rundir
from tpvpn.dns.names import Names
from tpvpn.errors import TpvpnError, UsageError
from tpvpn.events import Events
from tpvpn.helper.client import Claimed, HelperClient
from tpvpn.holders import holders
from tpvpn.place import HERE, Kernel
from tpvpn.privileged import Seen
from tpvpn.privileged import look as look_privileged
from tpvpn.route.changes import Changes
from tpvpn.route.conflict import NEVER
from tpvpn.route.fib import Route, Rule, View
from tpvpn.route.operations import operations, ours, tunnelled
from tpvpn.route.plan import make_plan
from tpvpn.route.prefix import Prefix, Space
from tpvpn.route.verdict import Plan, Request, Subnet, Wanted

_log = logging.getLogger(__name__)
SHOWN = 3
"""How many routes that are in the way one line of the log names."""
RETRY = 1.0
"""Seconds after an update that failed until it is tried again, if nothing changes before."""
HISTORY = 100
"""Changes that are remembered for `status`."""
IDLE_FOR_BUSY = 3
"""How many times as long as an update took none is begun: a VPN that flaps costs a quarter of one core at most."""

SetVirtual = Callable[[Sequence[tuple[str, str]]], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Change:
    """What became of a subnet, when and why."""

    at: str
    cidr: str
    verdict: str
    because: str


class Terms(Protocol):
    """What of the manager's terms matters to routes."""

    @property
    def exit(self) -> dict[str, str | None]: ...
    @property
    def ipv6(self) -> str | None: ...


class Router:
    """The routes of one session."""

    def __init__(self, request: Request, events: Events, kernel: Kernel = HERE.kernel) -> None:
        self._request, self._events, self._say, self._kernel = request, events, events.say, kernel
        self._names = Names(name for name, _ in request.names)
        self._dialled: tuple[tuple[Prefix, str], ...] = ()
        self._terms: Terms | None = None
        self.virtual: list[tuple[str, str]] = []
        """The pairs that the manager maps."""
        self.plan = Plan(True, ())
        self.shadowed: dict[str, str] = {}
        self.changes: deque[Change] = deque(maxlen=HISTORY)
        self._since: dict[Wanted, Change] = {}
        self.on_plan: Callable[[Plan], None] = _nobody

    def change(self, request: Request) -> None:
        """What is wanted from now on; the next look makes it so."""
        self._request = request
        self._names.set(name for name, _ in request.names)

    async def keep_out(self, dialled: Sequence[tuple[Prefix, str]]) -> None:
        """Never route these addresses, which are about to be dialled, from now on."""
        before = self._dialled
        if tuple(dialled) != before:
            self._dialled = tuple(dialled)
            try:
                await self.update()
            except BaseException:
                self._dialled = before
                raise

    # -- before anything is changed ------------------------------------------------------------------------------------

    async def preview(self, name: str) -> Plan:
        """What `connect` would do for the session of this name, as far as the rights of whoever asks go."""
        await self._look_up()
        view, wanted = await self._kernel.read_view(), self._wanted()[0]
        seen = look_privileged(spanned(wanted), rundir.device_name(name), ())
        plan = self._make_plan(see(view, seen), rundir.table_of(name))
        return replace(plan, warnings=(*plan.warnings, *seen.obstacles))

    async def look(self, name: str, dialled: Sequence[tuple[Prefix, str]]) -> None:
        """Read the kernel's view and plan; ConflictError when the plan is to be refused.

        `dialled`: addresses that our own sockets use, each with what for: they are never taken.
        """
        self._dialled = tuple(dialled)
        await self._look_up()
        view = see(await self._kernel.read_view(), Seen((), holders(), (), ()))
        # Of a session of this name that runs nothing counts: it is refused for its name, not for its routes.
        self._accept(self._make_plan(view, rundir.table_of(name)))

    async def _look_up(self) -> None:
        """Look the names up; UsageError when one that was typed is not found (one of a file may be a VPN's)."""
        await self._names.look_up()
        found = self._names.addresses()
        for name, source in self._request.names:
            if source.startswith("--") and not found[name]:
                raise UsageError(f"{source}: {name!r} is no address or subnet, and no host of that name is found")

    @property
    def summary(self) -> str:
        """How many subnets have which verdict."""
        return report.counts(self.plan)

    def _accept(self, plan: Plan) -> None:
        if plan != self.plan:
            self._events.tell("plan", plan=report.as_json(plan))
        if not plan.ok:
            raise report.refusal(plan)
        self.plan = plan

    def _make_plan(self, view: View, table: int | None) -> Plan:
        wanted, doubts = self._wanted()
        warnings = (*view.warnings, *doubts)
        if self._terms is not None and not self._terms.ipv6:
            view, warnings = replace(view, ipv6=False), (*warnings, "the manager carries no IPv6")
        elif self._terms is not None and not has_ipv6_address(view, self._claimed.device):
            view = replace(view, ipv6=False)
        policy = self._request.policy
        policy = replace(policy, never=policy.never + self._dialled)
        return make_plan(replace(view, warnings=warnings), wanted, policy, table)

    def _wanted(self) -> tuple[list[Wanted], list[str]]:
        """All that is wanted now, and a word on each name that gives nothing."""
        never = (*self._request.policy.never, *self._dialled)
        named, doubts = by_name(self._request.names, self._names.addresses(), {prefix for prefix, _ in never})
        return [*self._request.wanted, *named], doubts

    # -- with the helper -----------------------------------------------------------------------------------------------

    async def look_closer(self, helper: HelperClient, claimed: Claimed) -> None:
        """Plan once more with what only root may see; ConflictError when that makes it one to be refused."""
        self._helper, self._claimed = helper, claimed
        _, plan = await self._plan_now()
        self._accept(plan)

    async def attach(self, terms: Terms, set_virtual: SetVirtual) -> None:
        """Route as planned, now that the device is there; `set_virtual` tells the manager of virtual subnets.

        Errors: ConflictError when something came in the way meanwhile, ManagerError when it maps no subnets.
        """
        self._terms, self._set_virtual = terms, set_virtual
        view, plan = await self._plan_now()
        self._accept(plan)
        self.plan = Plan(True, ())  # nothing of it is routed yet
        await self._apply(view, plan)

    async def update(self) -> None:
        """Bring the kernel to what its own view, looked at again, leads to."""
        await self._apply(*await self._plan_now())

    async def _plan_now(self) -> tuple[View, Plan]:
        seen = await self._helper.look(spanned(self._wanted()[0]))
        view = see(await self._kernel.read_view(), seen)
        plan = self._make_plan(view, self._claimed.table)
        return view, replace(plan, warnings=(*plan.warnings, *seen.obstacles))

    async def _apply(self, view: View, plan: Plan) -> None:
        await self._map(plan)
        steps = operations(plan, view, self._claimed.table, self._claimed.device)
        for step in steps:
            _log.debug("%s %s", step.verb, step.target)
        await self._helper.apply(steps)
        before, self.plan = self.plan, plan
        self.on_plan(plan)
        self._tell(before)
        await self._confirm()
        await self._reset_stranded(before, [step.target for step in steps if step.verb == "add"])

    async def _map(self, plan: Plan) -> None:
        """Let the manager map the virtual subnets before anything is routed to them."""
        pairs = [(str(subnet.virtual), str(subnet.wanted.prefix)) for subnet in plan.subnets if subnet.virtual]
        if pairs != self.virtual:
            await self._set_virtual(pairs)
            self.virtual = pairs

    def _tell(self, before: Plan) -> None:
        """Say and remember what changed of each subnet."""
        old = {subnet.wanted: subnet for subnet in before.subnets}
        at = datetime.now().astimezone().isoformat(timespec="milliseconds")
        changes = list[Change]()
        for new in self.plan.subnets:
            was = old.pop(new.wanted, None)
            if was is None or (was.verdict, was.routes, against(was)) != (new.verdict, new.routes, against(new)):
                self._since[new.wanted] = Change(at, str(new.wanted.prefix), new.verdict, reason(new, was))
                changes.append(self._since[new.wanted])
        for gone in old:
            del self._since[gone]
            changes.append(Change(at, str(gone.prefix), "gone", f"{gone.source} has it no more"))
        self.changes += changes
        for change in changes:
            text = f"{change.cidr} is now {change.verdict}: {change.because}"
            if before.subnets:
                self._events.tell("verdict", text, **asdict(change))
            else:
                _log.info("%s", text)

    async def _confirm(self) -> None:
        """Ask the kernel where an address of everything routed, and of every exception, goes."""
        inside = self._tunnelled(self.plan)
        expected = [(prefix, (Space([prefix]) & inside).prefixes(), True) for prefix in self.plan.routes]
        expected += [(prefix, (Space([prefix]) - inside).prefixes(), False) for prefix in self.plan.throws]
        asked = [(prefix, Prefix.host(parts[0].address()), ours) for prefix, parts, ours in expected if parts]
        answers = await self._kernel.ask([host for _, host, _ in asked])
        shadowed = {
            str(prefix): f"shadowed by {answer or 'nothing: the kernel has no route'}"
            for (prefix, _, ours), answer in zip(asked, answers, strict=True)
            if (answer is not None and answer.device == self._claimed.device) != ours
        }
        for prefix in shadowed.keys() - self.shadowed.keys():
            self._say(f"warning: {prefix} is {shadowed[prefix]}")
        self.shadowed = shadowed

    def _tunnelled(self, plan: Plan) -> Space:
        return tunnelled(ours(plan, self._claimed.table, self._claimed.device))

    async def _reset_stranded(self, before: Plan, added: Sequence[Route | Rule]) -> None:
        """Reset connections that were open when their route changed: their source address is another path's.

        So is that of those that began while a rule or route of ours was gone, or another rule was in front of ours.
        """
        old, new = self._tunnelled(before), self._tunnelled(self.plan)
        again = any(isinstance(one, Rule) for one in added)
        taken = new if again else new & Space(one.prefix for one in added if isinstance(one, Route))
        withdrawn, routed = (old - new).prefixes(), (taken | (new - old)).prefixes()
        if withdrawn or routed:
            count = await self._helper.reset(withdrawn, routed)
            if count:
                self._say(f"reset {count} connection{'s' if count > 1 else ''} that the change of routes had cut off")

    async def follow(self, changes: Changes) -> None:
        """Update whenever the kernel's routing, an IPsec policy or the address of a name changed, for ever."""
        policies = await self._helper.watch()
        if policies is not None:
            changes.add(policies)
        loop = asyncio.get_running_loop()
        names = asyncio.create_task(self._names.follow(changes.tell))
        failed = ""
        try:
            async for _ in changes:
                begun = loop.time()
                try:
                    await self.update()
                    failed = ""
                except (TpvpnError, OSError) as error:
                    # What was looked at is different by now, a device that is going for example: look again.
                    if str(error) != failed:
                        self._say(f"warning: the routes are not as planned, which is tried again: {error}")
                    failed = str(error)
                    loop.call_later(RETRY, changes.tell)
                await asyncio.sleep(IDLE_FOR_BUSY * (loop.time() - begun))
        finally:
            names.cancel()

    def status(self) -> dict[str, Any]:
        """The routes' part of a session's status."""
        return {
            "shadowed": self.shadowed,
            "verdicts": {change.cidr: asdict(change) for change in self._since.values()},
            "changes": [asdict(change) for change in self.changes],
            "plan": report.as_json(self.plan),
        }


def _nobody(plan: Plan) -> None:
    """Who does not care for plans."""


def has_ipv6_address(view: View, device: str) -> bool:
    """Whether the device has an IPv6 address of the manager's: switching IPv6 off takes it away for good."""
    return any(one.device == device and one.prefix.version == 6 and one.scope == 0 for one in view.addresses)


def see(view: View, seen: Seen) -> View:
    """The view with what only root may see, and with the sessions whose devices are there."""
    session = {one.device: one.name for one in rundir.sessions()}
    links = tuple(
        replace(link, holder=seen.holders.get(link.name), session=session.get(link.name)) for link in view.links
    )
    return replace(view, links=links, policies=seen.policies, warnings=(*view.warnings, *seen.warnings))


def reason(new: Subnet, was: Subnet | None) -> str:
    """Why a subnet has its verdict, in words."""
    if new.verdict == "excluded":
        return (
            "a never-proxy covers it" if new.wanted.prefix.version == 4 else "a never-proxy covers it, or IPv6 is off"
        )
    if in_the_way := against(new):
        return in_the_way
    if was is None or new.verdict == "virtual":
        return "as wanted"
    if against(was):
        return "what is in the way may be taken now" if new.conflicts else "nothing private is in the way any more"
    return "as wanted again"


def against(subnet: Subnet) -> str:
    """What of others is in the way of a subnet, in words: "10.0.0.0/8 on tun0 (openvpn)"."""
    found = [one for one in subnet.conflicts if not one.allowed]
    shown = [f"{one.route} on {one.device or 'an IPsec policy'} ({one.whose})" for one in found[:SHOWN]]
    return ", ".join([*shown, f"and {len(found) - SHOWN} more"] if len(found) > SHOWN else shown)


def by_name(
    names: Sequence[tuple[str, str]], addresses: Mapping[str, tuple[Prefix, ...]], never: Container[Prefix]
) -> tuple[list[Wanted], list[str]]:
    """The addresses of names as wanted subnets, and a word on those that cannot be."""
    wanted, doubts = list[Wanted](), list[str]()
    for name, source in names:
        found = addresses.get(name, ())
        if not found:
            doubts.append(f"{name} ({source}) is not found: it is looked up again and again")
        for prefix in found:
            if prefix in never or prefix in NEVER:
                doubts.append(f"{name} ({source}) is at {prefix.address()}, which is never routed")
            else:
                wanted.append(Wanted(prefix, "also", f"{source} {name}"))
    return wanted, doubts


def spanned(wanted: Iterable[Wanted]) -> tuple[Prefix, ...]:
    """The addresses that are wanted, in the fewest prefixes."""
    return Space(one.prefix for one in wanted).prefixes()
