"""The story of a session: look, plan, reach the manager, open the device, route, follow every change, restore.

It prints nothing and reads no option: it is given `Settings` and says what happens through `say`. Everything it does to
the kernel goes through the helper, which undoes it when this process ends, however it ends.
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from tpvpn.dns.policy import Naming
from tpvpn.errors import LinkLostError, ManagerError, SessionEndedError, TpvpnError
from tpvpn.helper.client import Claimed, HelperClient
from tpvpn.host_resolver import Mode
from tpvpn.namer import Namer
from tpvpn.proto.session import Offer, Terms
from tpvpn.route.changes import Changes
from tpvpn.route.prefix import Prefix
from tpvpn.route.verdict import Request
from tpvpn.router import Router
from tpvpn.transport.stream import Dialler, Stream
from tpvpn.tun import Tun
from tpvpn.tunnel import Tunnel, shake_hands
from tpvpn.wire import vnet

RETRY = 1.0
"""Seconds between two attempts to connect again."""
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

    @property
    def patience(self) -> float:
        """Seconds for which a link that was lost is tried to be had again."""
        ...

    def warning(self, addresses: list[str]) -> str | None:
        """What a user should know before it is used."""
        ...


class Engine:
    """One session; `run()` lasts as long as it does, and cancelling that ends it cleanly."""

    def __init__(
        self, settings: Settings, helper: Callable[[], Awaitable[HelperClient]], say: Callable[[str], None]
    ) -> None:
        self._settings, self._start_helper, self._say = settings, helper, say
        self._since = datetime.now().astimezone()
        self._state = "connecting"
        self._lost: asyncio.Future[TpvpnError] = asyncio.get_running_loop().create_future()
        self._carried = dict[str, int]()
        self._tun: Tun | None = None
        self._router = Router(settings.wishes.request, say)
        self._namer = Namer(settings.dns, settings.wishes.naming, say)

    async def run(self, ready: asyncio.Event) -> None:
        """Connect, set `ready`, and go on until cancelled. Errors: every TpvpnError, with nothing left behind."""
        async with contextlib.AsyncExitStack() as stack:
            changes = stack.enter_context(Changes())
            transport = self._settings.transport
            addresses = await transport.resolve()
            await self._router.look(self._settings.name, _dialled(transport, addresses))
            stack.callback(self._close)
            await stack.enter_async_context(self._helped())
            await self._router.look_closer(self._helper, self._claimed)
            self._terms, stream, early = await self._reach_manager(addresses)
            stack.callback(stream.close)
            await self._open_device(stack, stream, early)
            self._router.on_plan = self._namer.follow_plan
            await self._router.attach(self._terms, self._set_virtual)
            await self._namer.start(self._helper, self._addresses)
            self._state = "ready"
            ready.set()
            await self._follow(changes)

    @contextlib.asynccontextmanager
    async def _helped(self) -> AsyncGenerator[None]:
        """The helper, with this session's name, device and table claimed; at the end it has undone everything."""
        self._helper = await self._start_helper()
        try:
            self._claimed: Claimed = await self._helper.claim(self._settings.name)
            yield
        finally:
            await self._helper.close()

    def _close(self) -> None:
        """Last of all, when the helper has undone everything: programs of this host ask us for names until then."""
        self._namer.close()
        if self._tun:
            self._tun.close()

    async def _reach_manager(self, addresses: list[str], had: Terms | None = None) -> tuple[Terms, Stream, bytes]:
        """A session with a manager, in the place of the one that we had. Errors: ManagerError, ClusterError."""
        settings = self._settings
        if warning := settings.transport.warning(addresses):
            self._say(f"warning: {warning}")
        stream, early = await settings.transport.dial(addresses)
        try:
            offer = Offer(settings.client, offloads=vnet.names(vnet.Offload.ALL))
            if had:
                offer = replace(offer, ipv4=had.ipv4, ipv6=had.ipv6, session=had.session)
            terms, early = await shake_hands(stream, early, settings.transport.token, offer)
            settings.wishes.learn(terms.facts)
        except BaseException:
            stream.close()
            raise
        self._router.change(settings.wishes.request)
        self._namer.want(settings.wishes.naming)
        self._say(f"manager {terms.pod} took us in by {settings.transport.name}")
        if silent := terms.without_ping:
            self._say(f"warning: no ping over {silent}: its pod would need the sysctl net.ipv4.ping_group_range")
        return terms, stream, early

    async def _open_device(self, stack: contextlib.AsyncExitStack, stream: Stream, early: bytes) -> None:
        """Open the TUN with the addresses that the manager gave, and let packets flow."""
        terms = self._terms
        self._tun, self._addresses = tun, _ = await self._helper.open_tun(
            mtu=terms.mtu,
            addresses=_addresses(terms),
            offload=bool(terms.offloads),
            txqueuelen=QUEUE_LENGTH,
        )
        await self._helper.guard()
        self._begin_tunnel(tun, stream, early)
        stack.callback(lambda: self._tunnel.close())
        self._say(f"device {tun.name} has {' and '.join(self._addresses)}, MTU {terms.mtu}")

    def _begin_tunnel(self, tun: Tun, stream: Stream, early: bytes) -> None:
        tun.set_offloads(tun.offloads & vnet.from_names(self._terms.offloads))
        self._tunnel = Tunnel(stream, early, tun, self._terms, self._lose, self._namer.exchange.receive)
        self._namer.attach(self._tunnel.ask, self._terms.facts)

    async def _set_virtual(self, pairs: Sequence[tuple[str, str]]) -> None:
        if self._state != "reconnecting":  # the next link is told of them
            await self._tunnel.set_virtual(pairs)

    # -- while it lasts ------------------------------------------------------------------------------------------------

    async def _follow(self, changes: Changes) -> None:
        """Plan anew whenever the kernel's routing or the wishes change, until the link or the helper is gone."""
        tasks = [
            asyncio.create_task(self._router.follow(changes)),
            asyncio.create_task(self._follow_wishes(changes)),
            asyncio.create_task(self._keep_link(changes)),
            asyncio.create_task(self._namer.follow(changes.tell)),
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

    async def _keep_link(self, changes: Changes) -> None:
        """Connect again when the link is lost; its error when that is not to be, or not within the patience."""
        while True:
            lost = await self._lost
            patience = self._settings.transport.patience
            if not patience or isinstance(lost, SessionEndedError) or not isinstance(lost, LinkLostError):
                raise lost
            self._state = "reconnecting"
            self._namer.detach()
            self._tunnel.close()
            self._lost = asyncio.get_running_loop().create_future()  # not before: the goodbye may fail too
            self._say(f"{lost}; connecting again")
            await self._connect_again(lost, asyncio.get_running_loop().time() + patience)
            self._state = "ready"
            changes.tell()

    async def _connect_again(self, lost: LinkLostError, deadline: float) -> None:
        """Try until there is a link; LinkLostError when there was none before the deadline."""
        while not self._helper.closed.done():
            try:
                await self._try_again()
                return
            except (TpvpnError, OSError) as error:
                if isinstance(error, SessionEndedError) or asyncio.get_running_loop().time() > deadline:
                    raise LinkLostError(f"{lost}, and no other is to be had: {error}") from error
                await asyncio.sleep(RETRY)

    async def _try_again(self) -> None:
        transport, had = self._settings.transport, self._terms
        addresses = await transport.resolve()
        await self._router.keep_out(_dialled(transport, addresses))
        terms, stream, early = await self._reach_manager(addresses, had)
        if _addresses(terms) != _addresses(had) or bool(terms.offloads) != bool(had.offloads):
            stream.close()
            raise ManagerError("the manager has other addresses or offloads for this laptop: connect again")
        self._terms = terms
        self._carried = self._traffic()
        assert self._tun
        self._begin_tunnel(self._tun, stream, early)
        try:
            if self._router.virtual:
                await self._tunnel.set_virtual(self._router.virtual)
        except BaseException:
            self._tunnel.close()
            raise

    @property
    def directory(self) -> Path:
        """Where the session keeps its state, once it is ready."""
        return self._claimed.directory

    def _lose(self, error: TpvpnError) -> None:
        if not self._lost.done():
            self._lost.set_result(error)

    def _traffic(self) -> dict[str, int]:
        """What all links of the session carried."""
        return {name: count + self._carried.get(name, 0) for name, count in asdict(self._tunnel.counters).items()}

    def status(self) -> dict[str, Any]:
        """The session as `tpvpn status --output json` shows it."""
        terms = self._terms
        return {
            "name": self._settings.name,
            "state": self._state,
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
            "traffic": self._traffic(),
            **self._router.status(),
            "dns": self._namer.status(),
        }

    async def explain(self, name: str) -> dict[str, Any]:
        """What becomes of a name, as `tpvpn why` shows it."""
        return await self._namer.explain(name)


def _dialled(transport: Transport, addresses: Sequence[str]) -> list[tuple[Prefix, str]]:
    """What must stay out of the tunnel, and why."""
    return [(Prefix.host(one.partition("%")[0]), transport.purpose) for one in addresses]


def _addresses(terms: Terms) -> list[str]:
    return [address for address in (terms.ipv4, terms.ipv6) if address]
