"""systemd-resolved over D-Bus (org.freedesktop.resolve1(5)). The door of dbus-fast.

Used only where it runs already (it is never started by activation), and only when it works in our network namespace:
the bus may be the host's, which would take the number of our device for one of its own. Only the system's bus is
spoken to, wherever the environment says that it is: the root helper has a user's environment.
"""

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from dbus_fast import BusType, Message, MessageFlag, MessageType
from dbus_fast.aio import MessageBus
from dbus_fast.errors import DBusFastError

from tpvpn.proto.session import SPACE4, SPACE6

BUS = "unix:path=/run/dbus/system_bus_socket"
PATIENCE = 1.0
"""Seconds in which all that is asked at once must be answered."""
GRACE = 0.2
"""Seconds in which a connection that is not wanted any more may still come about."""
DOMAINS_LIMIT = 256
"""LINK_SEARCH_DOMAINS_MAX (src/resolve/resolved-link.h): with one more, it takes none."""
QUIET = 0.2
"""Seconds that a burst of changes has to be over: a VPN sets servers first, and then domains."""
LOOK_AGAIN = 10.0
"""Seconds after which there may be something new without word: it tells of servers, but not of domains."""
RECONNECT = 2.0
"""Seconds until a bus that is gone is looked for again."""

_NAME, _PATH, _MANAGER = "org.freedesktop.resolve1", "/org/freedesktop/resolve1", "org.freedesktop.resolve1.Manager"
_DBUS = "org.freedesktop.DBus"
_PAUSE = 0.01
_IN, _NS, _NO_CACHE = 1, 2, 1 << 10
"""Class and type (RFC 1035), and SD_RESOLVED_NO_CACHE (src/resolve/resolved-def.h)."""
_COMMAND = "systemd-resolve"
"""Its name as /proc/PID/comm has it: 15 letters."""
_SIGNALS = (
    f"type='signal',sender='{_DBUS}',interface='{_DBUS}',member='NameOwnerChanged',arg0='{_NAME}'",
    f"type='signal',sender='{_NAME}',path='{_PATH}',interface='{_DBUS}.Properties',member='PropertiesChanged'",
)


class Unusable(Exception):  # it is a finding, and its text is shown as one
    """Why systemd-resolved cannot be used, in words."""


@dataclass(frozen=True, slots=True)
class Links:
    """What systemd-resolved knows of the links that are no session's, and of none (global); and of one session's."""

    servers: tuple[str, ...]
    """Whom it asks; a link-local address has its zone."""
    domains: tuple[str, ...]
    """What it asks them for, whoever else is there: routing and search domains."""
    ours: frozenset[str]
    """The domains of the link whose server is the session itself; empty when there is none."""


# -- in the root helper ------------------------------------------------------------------------------------------------


def set_link(device: str, servers: Sequence[str], search: Sequence[str], domains: Sequence[str]) -> str | None:
    """Have the names of these domains asked of `servers` through our device, and no other name (root).

    `domains` are only routed; those of `search` are also tried behind short names. None when it is done; else why not.
    """
    try:
        asyncio.run(_set_link(socket.if_nametoindex(device), servers, search, domains))
    except Unusable as why:
        return str(why)
    except OSError:
        return f"there is no device {device}"
    return None


async def _set_link(device: int, servers: Sequence[str], search: Sequence[str], domains: Sequence[str]) -> None:
    routed = dict.fromkeys(search, False) | dict.fromkeys((name for name in domains if name not in search), True)
    async with _words(), asyncio.timeout(PATIENCE), _bus() as bus:
        owner = await _owner(bus)

        async def ask(member: str, signature: str, *body: Any, needed: bool = False) -> None:
            try:
                await _call(bus, owner, _PATH, _MANAGER, member, signature, *body)
            except _Refused as refused:
                if needed or refused.kind != f"{_DBUS}.Error.UnknownMethod":
                    raise

        # First of all it must not take our link for one that knows every name.
        await ask("SetLinkDefaultRoute", "ib", device, False)
        await _set_domains(bus, owner, device, list(map(list, routed.items()))[:DOMAINS_LIMIT])
        for member in ("SetLinkDNSSEC", "SetLinkLLMNR", "SetLinkMulticastDNS", "SetLinkDNSOverTLS"):
            await ask(member, "is", device, "no")
        await ask("SetLinkDNS", "ia(iay)", device, [_address(server) for server in servers], needed=True)
        await ask("FlushCaches", "")


async def _set_domains(bus: MessageBus, owner: str, device: int, domains: list[list[Any]]) -> None:
    try:
        await _call(bus, owner, _PATH, _MANAGER, "SetLinkDomains", "ia(sb)", device, domains)
    except (
        _Refused
    ):  # those that are to go count too (dns_search_domain_new in src/resolve/resolved-dns-search-domain.c)
        await _call(bus, owner, _PATH, _MANAGER, "SetLinkDomains", "ia(sb)", device, [])
        await _call(bus, owner, _PATH, _MANAGER, "SetLinkDomains", "ia(sb)", device, domains)


def reread(device: str) -> None:
    """Have it read /etc/resolv.conf, if it runs: a link to its own file is to be put back, and nothing stands there.

    It asks whom a foreign file names, and goes on to do so when its own is in that place again
    (manager_read_resolv_conf in src/resolve/resolved-resolv-conf.c): its own file would name a session that has ended.
    A file without servers makes it forget. It looks before it asks, and any question does: that for the root's servers.
    It writes its own file when a link's servers are set: `device` has none any more.
    """
    with contextlib.suppress(Unusable, OSError):
        asyncio.run(_reread(socket.if_nametoindex(device)))


async def _reread(device: int) -> None:
    async with _words(), asyncio.timeout(PATIENCE), _bus() as bus:
        owner = await _owner(bus)
        question = _message(owner, _PATH, _MANAGER, "ResolveRecord", "isqqt", 0, ".", _IN, _NS, _NO_CACHE)
        await bus.send(question)  # pyright: ignore[reportUnknownMemberType]
        # It takes messages in turn: with this answer it has looked. Whether the root answers is all the same.
        await _call(bus, owner, _PATH, f"{_DBUS}.Properties", "Get", "ss", _MANAGER, "DNS")
        while True:
            with contextlib.suppress(_Refused):  # it has not heard of a new device yet
                await _call(bus, owner, _PATH, _MANAGER, "SetLinkDNS", "ia(iay)", device, [])
                return
            await asyncio.sleep(_PAUSE)


def _address(server: str) -> list[Any]:
    address = ip_address(server)
    return [socket.AF_INET if address.version == 4 else socket.AF_INET6, address.packed]


# -- in the user's process ---------------------------------------------------------------------------------------------


async def look(own: Iterable[str]) -> Links:
    """What it knows now; `own` are the addresses of the session. Unusable when it is not there, or not ours."""
    async with _words(), asyncio.timeout(PATIENCE), _bus() as bus:
        owner = await _owner(bus)

        async def get(name: str) -> Any:
            return (await _call(bus, owner, _PATH, f"{_DBUS}.Properties", "Get", "ss", _MANAGER, name)).value

        return links(await get("DNS"), await get("Domains"), own)


def links(servers: Iterable[Sequence[Any]], domains: Iterable[Sequence[Any]], own: Iterable[str]) -> Links:
    """The properties DNS, a(iiay), and Domains, a(isb), taken apart."""
    asked = [(index, ip_address(bytes(address))) for index, _, address in servers]
    ours = {index for index, address in asked if str(address) in own}
    # It also takes an /etc/resolv.conf that is a session's for what it is to ask of itself (link 0).
    sessions = ours | {index for index, address in asked if address in SPACE4 or address in SPACE6}
    others = [
        f"{address}%{_device(index)}" if address.version == 6 and address.is_link_local else str(address)
        for index, address in asked
        if index not in sessions
    ]
    names = [(index, _plain(name)) for index, name, _ in domains]
    return Links(
        tuple(dict.fromkeys(others)),
        tuple(dict.fromkeys(name for index, name in names if name and index not in sessions)),
        frozenset(name for index, name in names if index and index in ours),
    )


def _plain(name: str) -> str:
    """As names are written here; "" is the root, which says nothing of a name."""
    return name.rstrip(".").lower()


def _device(index: int) -> str:
    try:
        return socket.if_indextoname(index)
    except OSError:
        return str(index)


async def changes() -> AsyncIterator[None]:
    """Word, for ever, that systemd-resolved came, went, or knows other servers or domains; once a burst.

    Also when the bus was found or lost, at first, and now and then: not everything is told.
    """
    changed = asyncio.Event()
    while True:
        with contextlib.suppress(Unusable):
            async with _words(), _bus() as bus:
                gone = asyncio.ensure_future(bus.wait_for_disconnect())
                gone.add_done_callback(lambda _: changed.set())
                bus.add_message_handler(partial(_hear, changed))
                async with asyncio.timeout(PATIENCE):
                    for rule in _SIGNALS:
                        await _ask_bus(bus, "AddMatch", "s", rule)
                yield
                while not gone.done():
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(LOOK_AGAIN):
                            await changed.wait()
                        await asyncio.sleep(QUIET)
                    changed.clear()
                    yield
        await asyncio.sleep(RECONNECT)


def _hear(changed: asyncio.Event, message: Message) -> None:
    if message.message_type is MessageType.SIGNAL and message.member in ("NameOwnerChanged", "PropertiesChanged"):
        changed.set()


async def has_owner(name: str) -> bool:
    """Whether a program has this name on the system's bus."""
    try:
        async with _words(), asyncio.timeout(PATIENCE), _bus() as bus:
            return bool(await _ask_bus(bus, "NameHasOwner", "s", name))
    except Unusable:
        return False


# -- the bus -----------------------------------------------------------------------------------------------------------


class _Refused(Exception):
    """An answer that is an error."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


@contextlib.asynccontextmanager
async def _words() -> AsyncGenerator[None]:
    """Whatever goes wrong on the bus is said as Unusable."""
    try:
        yield
    except TimeoutError:
        raise Unusable(f"systemd-resolved does not answer within {PATIENCE:.0f} s") from None
    except _Refused as refused:
        raise Unusable(f"systemd-resolved refuses: {refused}") from None
    except (OSError, EOFError, DBusFastError) as error:
        raise Unusable(f"the system's D-Bus cannot be reached ({error or type(error).__name__})") from None


@contextlib.asynccontextmanager
async def _bus() -> AsyncGenerator[MessageBus]:
    """A connection to the bus, for as long as this is open.

    Connecting is not to be cancelled: dbus-fast would close a socket whose writer the loop still has, if that comes
    with the bus's first answer, and uvloop's libuv then aborts the process (uv__epoll_ctl_flush in src/unix/linux.c).
    """
    bus = MessageBus(bus_address=BUS, bus_type=BusType.SYSTEM)
    connecting = asyncio.ensure_future(bus.connect())
    try:
        await asyncio.shield(connecting)
        yield bus
    finally:
        try:
            if not connecting.done():
                await asyncio.wait([connecting], timeout=GRACE)
        finally:
            if not connecting.done():
                connecting.cancel()
            elif connecting.exception() is None:
                bus.disconnect()


async def _owner(bus: MessageBus) -> str:
    """The unique name of the systemd-resolved that runs, and works in our network namespace."""
    if not await _ask_bus(bus, "NameHasOwner", "s", _NAME):
        raise Unusable("systemd-resolved does not run")
    owner: str = await _ask_bus(bus, "GetNameOwner", "s", _NAME)
    pid: int = await _ask_bus(bus, "GetConnectionUnixProcessID", "s", owner)
    if not is_neighbour(pid):
        raise Unusable("systemd-resolved works in another network namespace")
    return owner


def is_neighbour(pid: int) -> bool:
    """Whether this process is systemd-resolved in our network namespace; False when it cannot be seen from here.

    /proc/PID/net tells it to everyone (each namespace's has inodes of its own: fs/proc/proc_net.c), while
    /proc/PID/ns/net may be read by nobody but root. The bus may count processes otherwise than we do (another PID
    namespace), hence the name.
    """
    process = Path(f"/proc/{pid}")
    try:
        return (process / "comm").read_text().strip() == _COMMAND and shares_network(process)
    except OSError:
        return False


def shares_network(process: Path) -> bool:
    """Whether a process, as /proc/PID, is in our network namespace."""
    return (process / "net/dev").stat().st_ino == os.stat("/proc/self/net/dev").st_ino


async def _ask_bus(bus: MessageBus, member: str, signature: str, *body: Any) -> Any:
    return await _call(bus, _DBUS, "/org/freedesktop/DBus", _DBUS, member, signature, *body)


async def _call(bus: MessageBus, to: str, path: str, interface: str, member: str, signature: str, *body: Any) -> Any:
    """The first value of the answer."""
    answer = await bus.call(_message(to, path, interface, member, signature, *body))
    if answer.message_type is MessageType.ERROR:
        raise _Refused(answer.error_name or "", str(answer.body[0]) if answer.body else answer.error_name or "")
    return answer.body[0] if answer.body else None


def _message(to: str, path: str, interface: str, member: str, signature: str, *body: Any) -> Message:
    return Message(
        destination=to,
        path=path,
        interface=interface,
        member=member,
        flags=MessageFlag.NO_AUTOSTART,
        signature=signature,
        body=list(body),
    )
