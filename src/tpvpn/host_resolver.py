"""The story of the host's resolver during a session: systemd-resolved, /etc/resolv.conf, or both lead names to us.

It decides and watches, in the user's process; what needs root is the helper's. systemd-resolved is told whenever it
works in our network namespace. The file is taken too, unless all who read it come to systemd-resolved by it: programs
read the file themselves, and what leads past it would not find the cluster's names.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from tpvpn.dns import file, resolved, system
from tpvpn.dns.file import FileWatch, Taken
from tpvpn.errors import PrivilegeError, TpvpnError, UsageError
from tpvpn.helper.client import HelperClient

Mode = Literal["auto", "resolved", "file", "off"]

FILE = Path("/etc/resolv.conf")
KEEPERS = {
    "networkmanager": "NetworkManager",
    "resolvconf": "resolvconf",
    "systemd-resolved": "systemd-resolved",
    "dhclient": "dhclient",
    "dhcpcd": "dhcpcd",
    "openvpn": "OpenVPN",
}
"""Who writes /etc/resolv.conf, by a word that is in its comments, and how it is called."""
NETWORK_MANAGER = "org.freedesktop.NetworkManager"

LOST = "names of the cluster are not found by programs that read /etc/resolv.conf"

GRACE = 2.0
"""Seconds that systemd-resolved may be away, as for an update, before the file takes its part."""
BURST = 5
"""What we put back may be somebody's to write too: so often it is done at once, then it is a fight."""
SLOWLY = 10.0
"""Seconds between the tries in a fight, or of what does not work."""


class HostResolver:
    """Leads the host's names to the session's own addresses, `own`; `say` is for the user. The helper undoes it all."""

    def __init__(self, helper: HelperClient, mode: Mode, own: Sequence[str], say: Callable[[str], None]) -> None:
        self._helper, self._own, self._say = helper, tuple(own), say
        self._mode: Mode = mode
        self._search: tuple[str, ...] = ()
        self._domains: tuple[str, ...] = ()
        self._why_not: str | None = "it was not asked"
        """Why systemd-resolved does not know of us; None when it does."""
        self._links: resolved.Links | None = None
        self._taken: Taken | None = None
        self._watch = FileWatch()
        self._servers: tuple[str, ...] = system.nameservers()
        self._because = f"`--dns {mode}` was asked for"
        self._warnings: dict[str, str] = {}
        """What does not work now, with its remedy, by what it is about."""
        self._told, self._took = Limit(), Limit()
        self._gone = -GRACE
        """When systemd-resolved went away."""
        self._busy = asyncio.Lock()

    async def start(self, search: Sequence[str], domains: Sequence[str]) -> None:
        """Set everything up.

        `auto` never fails, it warns; `resolved` and `file` raise PrivilegeError when that cannot be.
        """
        self._search, self._domains = tuple(search), tuple(domains)
        if self._mode == "off":
            return
        async with self._busy:
            if self._mode != "file":
                await self._tell_resolved()
                if self._mode == "resolved" and self._why_not:
                    raise PrivilegeError(f"names cannot be had by systemd-resolved: {self._why_not}; try `--dns auto`")
                if not self._why_not:
                    self._why_not = await self._look()
            await self._settle_file(starting=True)
            self._refresh()

    async def update(self, search: Sequence[str], domains: Sequence[str]) -> None:
        """Other domains are ours from now on."""
        async with self._busy:
            before = self._search
            self._search, self._domains = tuple(search), tuple(domains)
            if self._mode in ("auto", "resolved"):
                await self._tell_resolved()
            if self._taken and self._search != before:
                await self._take_file()

    @property
    def servers(self) -> tuple[str, ...]:
        """The DNS servers of before, which answer all that is not the cluster's."""
        return self._servers

    @property
    def claimed(self) -> tuple[str, ...]:
        """The domains that other links have, as far as systemd-resolved says."""
        return self._links.domains if self._links else ()

    def status(self) -> dict[str, Any]:
        """What is done, and why, for `tpvpn status`."""
        done = [name for name, is_done in (("resolved", not self._why_not), ("file", self._taken)) if is_done]
        return {
            "mode": " and ".join(done) or "off",
            "because": self._because,
            "file": self._taken.how if self._taken else None,
            "servers": list(self.servers),
            "warnings": list(self._warnings.values()),
        }

    # -- what is done --------------------------------------------------------------------------------------------------

    async def _tell_resolved(self) -> None:
        self._why_not = await self._helper.set_resolved(self._search, self._domains)
        if not self._why_not:
            self._warnings.pop("resolved", None)

    async def _settle_file(self, *, starting: bool = False) -> None:
        """Take the file if it is to be ours and is not yet."""
        text = _text()
        stub = leads_to_stub(text)
        if self._mode == "auto":
            self._because = await self._reason(text, stub)
        if not wants_file(self._mode, resolved=not self._why_not, stub=stub):
            return
        if self._mode == "auto" and is_the_machines():
            self._warn(
                "file",
                f"{LOST}: it is the machine's, and this network namespace is not; `--dns file` takes it all the same",
            )
            return
        await self._take_file(must=starting and self._mode == "file")
        if self._taken and stub:
            self._warn("resolved", f"{self._why_not}: /etc/resolv.conf, which led to it, leads to tpvpn meanwhile")

    async def _take_file(self, *, must: bool = False) -> None:
        try:
            self._taken = self._watch.taken = await self._helper.take_file(self._search)
        except (PrivilegeError, UsageError) as error:
            if must:
                raise
            self._warn("file", f"{LOST}: {error}")
        else:
            self._warnings.pop("file", None)

    async def _reason(self, text: str, stub: bool) -> str:
        """Why `auto` does what it does."""
        if self._why_not:
            keeper = keeper_of(text)
            if keeper is None and await resolved.has_owner(NETWORK_MANAGER):
                keeper = "NetworkManager"
            return f"{self._why_not}, and {keeper or 'nobody that is known'} writes /etc/resolv.conf"
        if stub:
            return "systemd-resolved answers for this host"
        return (
            f"systemd-resolved runs, but /etc/resolv.conf, which {keeper_of(text) or 'somebody'} writes, leads past it"
        )

    async def _look(self) -> str | None:
        """See what systemd-resolved knows; gives why it is of no use, if it is not."""
        self._links = None
        try:
            self._links = await resolved.look(self._own)
        except resolved.Unusable as why:
            return str(why)
        return None

    def _refresh(self) -> None:
        """See whom this host asked before, as of now."""
        before = file.servers_of_before(self._taken) if self._taken else ()
        before = before or (self._links.servers if self._links else system.nameservers())
        self._servers = tuple(server for server in before if server not in self._own)

    def _warn(self, about: str, text: str) -> None:
        """Say it once for as long as it holds."""
        if self._warnings.get(about) != text:
            self._warnings[about] = text
            self._say(text)

    # -- what others do ------------------------------------------------------------------------------------------------

    async def follow(self, changed: Callable[[], None]) -> None:
        """Put right what others undo, for ever; `changed()` when there are other servers or claimed domains."""
        if self._mode == "off":
            await asyncio.Future[None]()
        wake, known = asyncio.Event(), (self.servers, self.claimed)
        sources = [self._watch.follow()] if self._mode != "resolved" else []
        if self._mode != "file":
            sources.append(resolved.changes())
        async with asyncio.TaskGroup() as tasks:
            for source in sources:
                tasks.create_task(_ring(source, wake))
            wait: float | None = 0.0
            while True:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait):
                        await wake.wait()
                wake.clear()
                wait = await self._look_after()
                if known != (known := (self.servers, self.claimed)):
                    changed()

    async def _look_after(self) -> float | None:
        """Put right what is not as it should be, if that can be; gives the seconds until it is to be tried again."""
        try:
            async with self._busy:
                wait = await self._mend()
                self._refresh()
        except (TpvpnError, OSError) as error:  # a lack of descriptors, a full disk
            if not self._helper.closed.done():
                self._warn("lack", f"warning: this host's resolver is not looked after, which is tried again: {error}")
            return SLOWLY
        self._warnings.pop("lack", None)
        return wait

    async def _mend(self) -> float | None:
        """Put right what is not as it should be; gives the seconds until that is to be tried again."""
        now = asyncio.get_running_loop().time()
        for about, limit in ("fight for resolved", self._told), ("fight for file", self._took):
            if limit.is_quiet(now):
                self._warnings.pop(about, None)
        waits = [
            await self._mend_resolved() if self._mode != "file" else None,
            await self._mend_file() if self._mode != "resolved" else None,
        ]
        return min((wait for wait in waits if wait is not None), default=None)

    async def _mend_resolved(self) -> float | None:
        now = asyncio.get_running_loop().time()
        if why := await self._look():
            if self._why_not is None:
                self._gone = now
            self._why_not = why
            if self._mode == "resolved":
                self._warn("resolved", f"names of the cluster are not found until that ends: {why}")
            return None
        if self._why_not is None and self._links and (self._links.ours or not (self._search or self._domains)):
            return None
        if wait := self._told.wait(now):
            self._warn(
                "fight for resolved",
                "another program takes the cluster's domains from systemd-resolved again and again",
            )
            return wait
        await self._tell_resolved()
        self._why_not = self._why_not or await self._look()
        return SLOWLY if self._why_not else None

    async def _mend_file(self) -> float | None:
        now = asyncio.get_running_loop().time()
        if self._taken is None:
            if (wait := self._gone + GRACE - now) > 0 and self._why_not:
                return wait
            await self._settle_file()
            return None
        if (now_there := file.generation_now(self._taken)) == self._taken.generation:
            return None
        if now_there is not None:  # another program has put an earlier one of ours back
            await self._take_file()
            return None
        if wait := self._took.wait(now):
            keeper = keeper_of(_text()) or "another program"
            self._warn(
                "fight for file", f"{keeper} writes /etc/resolv.conf again and again: have it leave the file alone"
            )
            return wait
        await self._take_file()
        return None


class Limit:
    """May be done BURST times, and then every SLOWLY seconds until it was not done for twice as long."""

    def __init__(self) -> None:
        self._times, self._last = 0, 0.0

    def wait(self, now: float) -> float:
        """Seconds until it may be done; 0 when it may be, and is."""
        if self.is_quiet(now):
            self._times = 0
        if self._times >= BURST and now < (due := self._last + SLOWLY):
            return due - now
        self._times, self._last = self._times + 1, now
        return 0.0

    def is_quiet(self, now: float) -> bool:
        """Whether it was not done for so long that there is no fight."""
        return now - self._last > 2 * SLOWLY


async def _ring(source: AsyncIterator[None], wake: asyncio.Event) -> None:
    async for _ in source:
        wake.set()


def _text() -> str:
    with contextlib.suppress(OSError):
        return FILE.read_text(errors="replace")
    return ""


# -- what is decided ---------------------------------------------------------------------------------------------------


def wants_file(mode: Mode, *, resolved: bool, stub: bool) -> bool:
    """Whether the file is to be ours: `resolved` knows of us, and the file leads to its stub."""
    return mode == "file" or (mode == "auto" and not (resolved and stub))


def leads_to_stub(text: str) -> bool:
    """Whether who reads this resolv.conf asks systemd-resolved: its stub comes first."""
    servers = (words[1] for words in map(str.split, text.splitlines()) if words[:1] == ["nameserver"] and words[1:])
    return next(servers, None) in file.STUBS


def keeper_of(text: str) -> str | None:
    """Who writes this resolv.conf, as far as its comments say."""
    comments = "\n".join(line for line in text.splitlines() if line.startswith(("#", ";"))).lower()
    return next((name for word, name in KEEPERS.items() if word in comments), None)


def is_the_machines(process: Path = Path("/proc/1")) -> bool:
    """Whether /etc is that of the machine while our network namespace is not: then names are not ours to change.

    Without privilege /proc/1/ns says nothing; but each mount has a number that no other namespace has, and so has each
    network namespace's /proc/net.
    """
    try:
        machines = _mounts(process)
        return bool(machines & _mounts(Path("/proc/self"))) and not resolved.shares_network(process)
    except OSError:
        return False


def _mounts(process: Path) -> set[str]:
    return {line.partition(" ")[0] for line in (process / "mountinfo").read_text().splitlines()}
