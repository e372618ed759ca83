"""The story of a session: look, plan, reach the manager, open the device, route, follow every change, restore.

It prints nothing and reads no option: it is given `Settings` and tells what happens as `events`. Everything it does to
the kernel goes through the helper, which undoes it when this process ends, however it ends.
"""

import asyncio
import contextlib
import os
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

from tpvpn.capture import Capture
from tpvpn.dns.policy import Naming
from tpvpn.errors import LinkLostError, ManagerError, SessionEndedError, TpvpnError
from tpvpn.events import Detail, Events
from tpvpn.helper.client import Claimed, HelperClient
from tpvpn.host_resolver import Mode
from tpvpn.keeper import Keeper, Patience
from tpvpn.namer import Namer
from tpvpn.place import HERE, Place
from tpvpn.proto.session import SPACE4, SPACE6, Held, Offer, Terms, address_in
from tpvpn.route.changes import Changes
from tpvpn.route.prefix import Prefix
from tpvpn.route.verdict import Request
from tpvpn.router import Router
from tpvpn.rundir import DEFAULT_NAME
from tpvpn.talkers import Talkers
from tpvpn.transport.stream import Dialler, Stream
from tpvpn.tun import Tun
from tpvpn.tunnel import GOODBYE, ClientLink, Tunnel, shake_hands
from tpvpn.wire import vnet

QUEUE_LENGTH = 1000
"""Packets that wait in each of the TUN's queues."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What a session is to be; `client` is what this laptop calls itself."""

    name: str
    client: str
    transport: "Transport"
    wishes: "Wishes"
    dns: Mode = "auto"
    links: int = 1
    patience: Patience = field(default_factory=Patience)
    capture: Capture | None = None


class Wishes(Protocol):
    """What is to be routed and named, as it is known now."""

    request: Request
    naming: Naming

    def learn(self, facts: Mapping[str, Any]) -> None:
        """Take what the manager sees in its pod; `request` may be another one then. Errors: UsageError."""
        ...

    def follow(self) -> AsyncIterator[Request]:
        """A request whenever it or the naming is another one, for ever."""
        ...


class Transport(Dialler, Protocol):
    """A way to a byte stream to the manager, and what a session wants to know of it."""

    @property
    def name(self) -> str:
        """As a user knows it."""
        ...

    @property
    def purpose(self) -> str:
        """What the addresses that it dials are, which must stay out of the tunnel."""
        ...

    def stay(self, pod: str | None) -> None:
        """That pod of the manager has the session: it is to be dialled before others; None: no pod has it."""
        ...

    def warning(self, addresses: list[str]) -> str | None:
        """What a user should know before it is used."""
        ...


class Engine:
    """One session; `run()` lasts as long as it does, and cancelling that ends it cleanly."""

    def __init__(
        self,
        settings: Settings,
        helper: Callable[[], Awaitable[HelperClient]],
        events: Events,
        place: Place = HERE,
    ) -> None:
        self._settings, self._start_helper, self._place = settings, helper, place
        self._events, self._say = events, events.say
        self._since = datetime.now().astimezone()
        self._is_ready = False
        self._linking = asyncio.Lock()
        self._keepers: list[Keeper] = []
        self._is_new = False
        """The manager had forgotten the session before: what was open through that is not reset yet."""
        self._mapped: list[tuple[str, str]] = []
        """The virtual subnets that the manager was told of."""
        self._held: Held | None = None
        self._tun: Tun | None = None
        self._router = Router(settings.wishes.request, events, place.kernel)
        self._namer = Namer(settings.name, settings.dns, settings.wishes.naming, events.say, place)

    async def run(self, ready: asyncio.Event) -> None:
        """Connect, set `ready`, and go on until cancelled. Errors: every TpvpnError, with nothing left behind."""
        async with contextlib.AsyncExitStack() as stack:
            changes, step = stack.enter_context(self._place.changes()), self._events.step
            transport = self._settings.transport
            with step("plan") as detail:
                addresses = await transport.resolve()
                await self._router.look(self._settings.name, _dialled(transport, addresses))
                detail.short = self._router.summary
            stack.callback(self._close)
            with step("helper") as detail:
                await stack.enter_async_context(self._helped())
                detail.short = f"table {self._claimed.table}"
            await self._router.look_closer(self._helper, self._claimed)
            if warning := transport.warning(addresses):
                self._say(f"warning: {warning}")
            with step("manager") as detail:
                held, stream, early = await self._reach_manager(addresses, 0)
                stack.callback(stream.close)
                terms, detail.sentence = held.terms, self._hold(held)
                detail.short = f"{terms.pod} by {transport.name}"
            with step("TUN") as detail:
                link = await self._open_device(stack, terms, stream, early, detail)
            with step("routes") as detail:
                self._router.on_plan = self._namer.follow_plan
                await self._router.attach(terms, self._set_virtual)
                detail.short = self._router.summary
            with step("DNS") as detail:
                await self._namer.start(self._helper, self._addresses)
                detail.short = self._namer.summary
            self._is_ready = True
            ready.set()
            await self._follow(changes, link)

    @contextlib.asynccontextmanager
    async def _helped(self) -> AsyncGenerator[None]:
        """The helper, with this session's name, device and table claimed; at the end it has undone everything.

        When it was ended, another one does, if that can be had without asking anybody.
        """
        self._helper = await self._start_helper()
        try:
            self._claimed: Claimed = await self._helper.claim(self._settings.name)
            yield
        finally:
            if self._helper.closed.done():
                with contextlib.suppress(TpvpnError, OSError):
                    await self._place.clean_up()
            await self._helper.close()

    def _close(self) -> None:
        """Last of all, when the helper has undone everything: programs of this host ask us for names until then."""
        self._namer.close()
        if self._tun:
            self._tun.close()

    async def _reach_manager(self, addresses: list[str], number: int) -> tuple[Held, Stream, bytes]:
        """A link to a manager: of the session that we have, or of a new one. Errors: ManagerError, ClusterError."""
        settings = self._settings
        stream, early = await settings.transport.dial(addresses)
        try:
            offer, secret = Offer(settings.client, offloads=vnet.names(vnet.Offload.ALL)), None
            if had := self._held:
                offer, secret = had.wanted(offer, number), had.secret
            elif settings.name != DEFAULT_NAME:  # managers of one name, in two clusters, draw from the same block
                ipv4, ipv6 = (address_in(space, secrets.randbits(128)) for space in (SPACE4, SPACE6))
                offer = replace(offer, ipv4=ipv4, ipv6=ipv6)
            held, early = await shake_hands(stream, early, settings.transport.token, offer, secret)
            settings.wishes.learn(held.terms.facts)
        except BaseException:
            stream.close()
            raise
        self._router.change(settings.wishes.request)
        self._namer.want(settings.wishes.naming)
        return held, stream, early

    def _hold(self, held: Held) -> str:
        """The session is ours from now on; a sentence when it is another one than before."""
        had, self._held = self._held, held
        transport, terms = self._settings.transport, held.terms
        transport.stay(terms.pod)
        if had and had.terms.session == terms.session:
            return ""
        return f"manager {terms.pod} took us in by {transport.name}"

    async def _open_device(
        self, stack: contextlib.AsyncExitStack, terms: Terms, stream: Stream, early: bytes, detail: Detail
    ) -> ClientLink:
        """Open the TUN with the addresses that the manager gave, and let packets flow."""
        if silent := terms.without_ping:
            self._say(f"warning: no ping over {silent}: its pod would need the sysctl net.ipv4.ping_group_range")
        await self._namer.announce(self._helper, self._claimed.table, terms.facts)
        self._tun, self._addresses = tun, _ = await self._helper.open_tun(
            mtu=terms.mtu,
            addresses=_addresses(terms),
            offload=bool(terms.offloads),
            txqueuelen=QUEUE_LENGTH,
        )
        await self._helper.guard()
        tun.set_offloads(tun.offloads & vnet.from_names(terms.offloads))
        capture = self._settings.capture
        device = capture.tap(tun, offload=bool(terms.offloads)) if capture else tun
        self._tunnel = Tunnel(device, terms, self._namer.exchange.receive, self._on_linked)
        stack.push_async_callback(self._tunnel.leave)
        self._talkers = Talkers(self._addresses, self._namer.name_of)
        stack.callback(self._talkers.close)
        link = self._tunnel.join(0, stream, early)
        has = f"{' and '.join(self._addresses)}, MTU {terms.mtu}"
        detail.short, detail.sentence = f"{tun.name} with {has}", f"device {tun.name} has {has}"
        return link

    def _on_linked(self) -> None:
        """There is a link, or there is none any more: names can be asked for, or wait."""
        if self._tunnel.is_linked:
            assert self._held
            self._namer.attach(self._tunnel.ask, self._held.terms.facts)
        else:
            self._namer.detach()
        if self._is_ready:
            self._events.tell("state", state=self.state)

    async def _set_virtual(self, pairs: Sequence[tuple[str, str]]) -> None:
        if self._tunnel.is_linked:  # else the next link tells of them
            await self._tunnel.set_virtual(pairs)
            self._mapped = list(pairs)

    # -- while it lasts ------------------------------------------------------------------------------------------------

    async def _follow(self, changes: Changes, link: ClientLink) -> None:
        """Plan anew whenever the kernel's routing or the wishes change, until the session or the helper is gone."""
        settings = self._settings
        for number in range(settings.links):
            dial, first = partial(self._connect_again, number), link if number == 0 else None
            self._keepers.append(Keeper(self._tunnel, dial, settings.patience, self._say, first))
        tasks = [
            asyncio.create_task(self._router.follow(changes)),
            asyncio.create_task(self._follow_wishes(changes)),
            asyncio.create_task(self._follow_network()),
            asyncio.create_task(self._namer.follow(changes.tell)),
            *(asyncio.create_task(keeper.run()) for keeper in self._keepers),
        ]
        try:
            await asyncio.wait((*tasks, self._helper.closed), return_when=asyncio.FIRST_COMPLETED)
            if self._helper.closed.done():
                raise LinkLostError("the root helper was ended, and with it the tunnel: connect again")
            for task in tasks:
                if task.done():
                    await task
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _follow_wishes(self, changes: Changes) -> None:
        async for request in self._settings.wishes.follow():
            self._router.change(request)
            self._namer.want(self._settings.wishes.naming)
            changes.tell()

    async def _follow_network(self) -> None:
        """Find out soon what another route, address or device of the laptop means for the links."""
        with Changes() as changes:
            async for _ in changes:
                self._tunnel.urge()
                for keeper in self._keepers:
                    keeper.hurry()

    async def _connect_again(self, number: int) -> ClientLink:
        """Another link of that number. Errors: as of `_reach_manager`; SessionEndedError when none will ever do."""
        transport = self._settings.transport
        async with self._linking:
            if self._tunnel.is_dismissed:
                transport.stay(None)
            addresses = await transport.resolve()
            await self._router.keep_out(_dialled(transport, addresses))
            held, stream, early = await self._reach_manager(addresses, number)
            try:
                self._check(held.terms)
            except BaseException:
                with contextlib.suppress(OSError):
                    await stream.send_all(GOODBYE)
                stream.close()
                raise
            if news := self._hold(held):
                self._say(news)
            link = self._tunnel.join(number, stream, early)
            try:
                await self._begin(link)
            except BaseException:
                link.close()
                raise
            return link

    def _check(self, terms: Terms) -> None:
        """Whether a link can be ours. ManagerError when not now, SessionEndedError when not any more."""
        assert self._held
        had = self._held.terms
        if terms.session == had.session:
            return
        if self._tunnel.is_linked:
            raise ManagerError(f"pod {terms.pod} does not know the session, which other links have still")
        if (_addresses(terms), terms.mtu, bool(terms.offloads)) != (_addresses(had), had.mtu, bool(had.offloads)):
            raise SessionEndedError("the manager has other addresses for this laptop by now: connect again")
        self._is_new, self._mapped = True, []

    async def _begin(self, link: ClientLink) -> None:
        """Bring the session at the manager, which may be a new one, and what is open through it to one state."""
        if self._is_new:
            self._tunnel.leave_others(link)
            count = await self._helper.reset_all()
            reset = "1 connection was" if count == 1 else f"{count} connections were"
            self._say(f"the manager had forgotten the session: a new one has begun, and {reset} reset")
            self._is_new = False
        if self._router.virtual != self._mapped:
            await self._set_virtual(self._router.virtual)

    @property
    def state(self) -> Literal["connecting", "ready", "reconnecting"]:
        """What the session is at."""
        if not self._is_ready:
            return "connecting"
        return "ready" if self._tunnel.is_linked else "reconnecting"

    @property
    def directory(self) -> Path:
        """Where the session keeps its state, once it is ready."""
        return self._claimed.directory

    def status(self) -> dict[str, Any]:
        """The session as `tpvpn status --output json` shows it."""
        assert self._held
        terms = self._held.terms
        return {
            "name": self._settings.name,
            "state": self.state,
            "since": self._since.isoformat(timespec="seconds"),
            "pid": os.getpid(),
            "manager": {
                "endpoint": self._settings.transport.name,
                "pod": terms.pod,
                "session": terms.session,
                "exit": terms.exit,
                "ping": terms.ping,
                "mtu": terms.mtu,
                "offloads": terms.offloads,
            },
            "device": self._claimed.device,
            "table": self._claimed.table,
            "addresses": list(self._addresses),
            "links": self._tunnel.links,
            "reconnects": sum(keeper.reconnects for keeper in self._keepers),
            "rtt": self._tunnel.measure(),
            "traffic": asdict(self._tunnel.counters),
            "talkers": [asdict(talker) for talker in self._talkers.look()],
            **self._router.status(),
            "dns": self._namer.status(),
        }

    async def measure(self) -> dict[str, Any]:
        """How much the way to the manager carries, in bytes a second, at least."""
        try:
            up, down = await self._tunnel.measure_speed()
        except TpvpnError as error:
            return {"error": str(error)}
        return {"up": up, "down": down}

    async def explain(self, name: str) -> dict[str, Any]:
        """What becomes of a name, as `tpvpn why` shows it."""
        return await self._namer.explain(name)


def _dialled(transport: Transport, addresses: Sequence[str]) -> list[tuple[Prefix, str]]:
    """What must stay out of the tunnel, and why."""
    return [(Prefix.host(one.partition("%")[0]), transport.purpose) for one in addresses]


def _addresses(terms: Terms) -> list[str]:
    return [address for address in (terms.ipv4, terms.ipv6) if address]
