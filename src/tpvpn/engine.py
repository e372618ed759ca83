"""The story of a session: look, plan, reach the manager, open the device, route, follow every change, restore.

It prints nothing and reads no option: it is given `Settings` and says what happens through `say`. Everything it does to
the kernel goes through the helper, which undoes it when this process ends, however it ends.
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from tpvpn.errors import LinkLostError, TpvpnError
from tpvpn.helper.client import Claimed, HelperClient
from tpvpn.proto.session import Offer
from tpvpn.route.changes import Changes
from tpvpn.route.prefix import Prefix
from tpvpn.route.verdict import Request
from tpvpn.router import Router
from tpvpn.transport.stream import Stream
from tpvpn.tunnel import Tunnel, shake_hands
from tpvpn.wire import vnet

QUEUE_LENGTH = 1000
"""Packets that wait in each of the TUN's queues."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What a session is to be; `client` is what this laptop calls itself."""

    name: str
    client: str
    transport: "Transport"
    request: Request


class Transport(Protocol):
    """A way to a byte stream to the manager."""

    @property
    def name(self) -> str:
        """As a user knows it."""
        ...

    @property
    def purpose(self) -> str:
        """What the addresses that it dials are, which must stay out of the tunnel."""
        ...

    async def resolve(self) -> list[str]:
        """The addresses to dial. Errors: ManagerError, ClusterError."""
        ...

    @property
    def token(self) -> bytes:
        """What proves to the manager who we are; known once it has dialled."""
        ...

    def warning(self, addresses: list[str]) -> str | None:
        """What a user should know before it is used."""
        ...

    async def dial(self, addresses: list[str]) -> tuple[Stream, bytes]:
        """A stream on which frames may begin, and the bytes that came early. Errors: ManagerError, ClusterError."""
        ...


class Engine:
    """One session; `run()` lasts as long as it does, and cancelling that ends it cleanly."""

    def __init__(
        self, settings: Settings, helper: Callable[[], Awaitable[HelperClient]], say: Callable[[str], None]
    ) -> None:
        self._settings, self._start_helper, self._say = settings, helper, say
        self._since = datetime.now().astimezone()
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._router = Router(settings.request, say)

    async def run(self, ready: asyncio.Event) -> None:
        """Connect, set `ready`, and go on until cancelled. Errors: every TpvpnError, with nothing left behind."""
        async with contextlib.AsyncExitStack() as stack:
            changes = stack.enter_context(Changes())
            transport = self._settings.transport
            addresses = await transport.resolve()
            dialled = [(Prefix.host(one.partition("%")[0]), transport.purpose) for one in addresses]
            await self._router.look(self._settings.name, dialled)
            await stack.enter_async_context(self._helped())
            await self._router.look_closer(self._helper, self._claimed)
            stream, early = await self._reach_manager(stack, addresses)
            await self._open_device(stack, stream, early)
            await self._router.attach(self._terms, self._tunnel.set_virtual)
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

    async def _reach_manager(self, stack: contextlib.AsyncExitStack, addresses: list[str]) -> tuple[Stream, bytes]:
        settings = self._settings
        if warning := settings.transport.warning(addresses):
            self._say(f"warning: {warning}")
        stream, early = await settings.transport.dial(addresses)
        stack.callback(stream.close)
        offer = Offer(settings.client, offloads=vnet.names(vnet.Offload.ALL))
        self._terms, early = await shake_hands(stream, early, settings.transport.token, offer)
        self._say(f"manager {self._terms.pod} took us in by {settings.transport.name}")
        if silent := self._terms.without_ping:
            self._say(f"warning: no ping over {silent}: its pod would need the sysctl net.ipv4.ping_group_range")
        return stream, early

    async def _open_device(self, stack: contextlib.AsyncExitStack, stream: Stream, early: bytes) -> None:
        """Open the TUN with the addresses that the manager gave, and let packets flow."""
        terms = self._terms
        tun, self._addresses = await self._helper.open_tun(
            mtu=terms.mtu,
            addresses=[address for address in (terms.ipv4, terms.ipv6) if address],
            offload=bool(terms.offloads),
            txqueuelen=QUEUE_LENGTH,
        )
        stack.callback(tun.close)
        tun.set_offloads(tun.offloads & vnet.from_names(terms.offloads))
        await self._helper.guard()
        self._tunnel = Tunnel(stream, early, tun, terms, self._fail)
        stack.callback(self._tunnel.close)
        self._say(f"device {tun.name} has {' and '.join(self._addresses)}, MTU {terms.mtu}")

    async def _follow(self, changes: Changes) -> None:
        """Plan anew whenever the kernel's routing changed, until the link or the helper is gone."""
        watching = asyncio.create_task(self._router.follow(changes))
        try:
            await asyncio.wait((watching, self._failed, self._helper.closed), return_when=asyncio.FIRST_COMPLETED)
            if self._helper.closed.done():
                raise LinkLostError("the root helper was ended, and with it the tunnel: connect again")
            await (self._failed if self._failed.done() else watching)
        finally:
            watching.cancel()

    @property
    def directory(self) -> Path:
        """Where the session keeps its state, once it is ready."""
        return self._claimed.directory

    def _fail(self, error: TpvpnError) -> None:
        if not self._failed.done():
            self._failed.set_exception(error)

    def status(self) -> dict[str, Any]:
        """The session as `tpvpn status --output json` shows it."""
        terms = self._terms
        return {
            "name": self._settings.name,
            "state": "ready",
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
            "traffic": asdict(self._tunnel.counters),
            **self._router.status(),
        }
