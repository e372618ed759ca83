"""The addresses of host names that are to be routed, looked up again as their TTL ends. The door of dnspython.

The addresses are those that any program of this host gets (nsswitch: /etc/hosts, mDNS, DNS, a VPN's resolver), together
with what DNS itself says, which alone tells for how long. An address that went out of the answers is kept for KEPT
seconds: a name whose answers rotate would otherwise lose its open flows each time.
"""

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from tpvpn.route.prefix import Prefix

LEAST, UNKNOWN, MOST = 5.0, 30.0, 3600.0
"""Seconds until a name is looked up again: at least, where DNS says nothing, at most."""
KEPT = 600.0
LIMIT = 64
"""Addresses of one name at a time."""
PATIENCE = 4.0
"""Seconds that a look-up may take."""


@dataclass(slots=True)
class Name:
    """A host name with its addresses, each with the time it was last in an answer."""

    name: str
    seen: dict[str, float] = field(default_factory=dict[str, float])
    due: float = 0.0
    """When it is to be looked up again."""

    @property
    def addresses(self) -> tuple[Prefix, ...]:
        """Its addresses as /32 and /128, sorted."""
        return tuple(sorted(map(Prefix.host, self.seen)))

    def take(self, answer: Iterable[str], ttl: float, now: float) -> None:
        """Take an answer that holds for `ttl` seconds."""
        self.seen.update(dict.fromkeys(answer, now))
        latest = sorted(self.seen.items(), key=lambda item: -item[1])
        self.seen = {address: last for address, last in latest[:LIMIT] if now - last <= KEPT}
        self.due = now + min(max(ttl, LEAST), MOST)


class Names:
    """Some host names; `look_up()` once, then `follow()` for as long as they matter."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = [Name(name) for name in dict.fromkeys(names)]
        self._new = asyncio.Event()

    def set(self, names: Iterable[str]) -> None:
        """Look after these from now on, and no others."""
        there = {one.name: one for one in self._names}
        self._names = [there.get(name) or Name(name) for name in dict.fromkeys(names)]
        self._new.set()

    def addresses(self) -> dict[str, tuple[Prefix, ...]]:
        """What each name has now; nothing when it was not found."""
        return {one.name: one.addresses for one in self._names}

    async def look_up(self) -> None:
        """Look up every name whose time has come, all at once."""
        now = asyncio.get_running_loop().time()
        due = [one for one in self._names if one.due <= now]
        for one, (answer, ttl) in zip(due, await asyncio.gather(*(resolve(one.name) for one in due)), strict=True):
            one.take(answer, ttl, asyncio.get_running_loop().time())

    async def follow(self, changed: Callable[[], None]) -> None:
        """Look each up again when its time comes, for ever; `changed()` when one has other addresses."""
        while True:
            now = asyncio.get_running_loop().time()
            wait = min((one.due - now for one in self._names), default=None)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait if wait is None else max(0.0, wait)):
                    await self._new.wait()
            self._new.clear()
            before = self.addresses()
            await self.look_up()
            if self.addresses() != before:
                changed()


async def resolve(name: str) -> tuple[set[str], float]:
    """The addresses of a name, and for how many seconds they hold; none when it is not found."""
    told, *asked = await asyncio.gather(_from_system(name), _from_dns(name, "A"), _from_dns(name, "AAAA"))
    found = told.union(*(addresses for addresses, _ in asked))
    return found, min((ttl for addresses, ttl in asked if addresses), default=UNKNOWN)


async def _from_system(name: str) -> set[str]:
    loop = asyncio.get_running_loop()
    with contextlib.suppress(OSError, UnicodeError, TimeoutError):
        async with asyncio.timeout(PATIENCE):
            found = await loop.getaddrinfo(name, None, type=socket.SOCK_STREAM)
            return {str(entry[4][0]).partition("%")[0] for entry in found}
    return set()


async def _from_dns(name: str, kind: str) -> tuple[set[str], float]:
    import dns.asyncresolver  # only who has names waits for it
    import dns.exception

    try:
        # A new resolver each time: a VPN may have changed resolv.conf since.
        answer = await dns.asyncresolver.Resolver().resolve(name, kind, search=True, lifetime=PATIENCE)
    except (dns.exception.DNSException, OSError):
        return set(), UNKNOWN
    return {str(record) for record in answer}, float(answer.rrset.ttl if answer.rrset is not None else UNKNOWN)
