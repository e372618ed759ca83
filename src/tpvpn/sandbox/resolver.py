"""How programs in a sandbox come to ask its session for names: an /etc/resolv.conf that is theirs alone.

What is not the cluster's is asked of whom this host asks, as its own /etc/resolv.conf says now, from this host's own
network: a resolver at 127.0.0.53 answers too, and what a VPN brings along is followed. The host's file is only read.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from tpvpn.dns.file import LOCAL, FileWatch, Taken
from tpvpn.dns.marker import FILE
from tpvpn.dns.resolv_conf import lines_of
from tpvpn.dns.system import servers_of
from tpvpn.errors import TpvpnError
from tpvpn.helper.client import HelperClient
from tpvpn.helper.protocol import SEARCH_LIMIT, is_domain
from tpvpn.host_resolver import Mode


class SandboxResolver:
    """Leads names to the session's own addresses, in its mount namespace; the arguments are as HostResolver's."""

    def __init__(self, helper: HelperClient, mode: Mode, own: Sequence[str], say: Callable[[str], None]) -> None:
        self._helper, self._mode, self._say = helper, mode, say
        self._search: tuple[str, ...] = ()
        self._warning: str | None = None
        self.claimed: tuple[str, ...] = ()
        """The domains that others have: none, as far as can be told from here."""
        self.servers = _servers()
        """Whom this host asks."""

    async def start(self, search: Sequence[str], domains: Sequence[str]) -> None:
        """Have the file."""
        await self.update(search, domains)

    async def update(self, search: Sequence[str], domains: Sequence[str]) -> None:
        """Search these domains from now on."""
        self._search = tuple(search)
        if self._mode == "off":
            return
        hosts = _searched()[: max(0, SEARCH_LIMIT - len(self._search))]
        try:
            await self._helper.take_file(tuple(dict.fromkeys([*hosts, *self._search])))
            self._warning = None
        except TpvpnError as error:
            if self._helper.closed.done():
                raise
            warning = f"warning: the cluster's names do not work: {error}"
            if warning != self._warning:
                self._say(warning)
            self._warning = warning

    def status(self) -> dict[str, Any]:
        """What is done, and why, for `tpvpn status`."""
        done = self._mode != "off" and not self._warning
        return {
            "mode": "file" if done else "off",
            "because": "programs of this sandbox have an /etc/resolv.conf of their own",
            "file": "mounted" if done else None,
            "servers": list(self.servers),
            "warnings": [self._warning] if self._warning else [],
        }

    async def follow(self, changed: Callable[[], None]) -> None:
        """Follow the host's file, for ever: what replaces it (rename(2)) takes the place of ours too, until now."""
        async for _ in FileWatch(Taken(FILE, "mounted", 1)).follow():
            if (servers := _servers()) != self.servers:  # first: once the file is ours again, they are asked through us
                self.servers = servers
                changed()
            await self.update(self._search, ())


def _text() -> str:
    with contextlib.suppress(OSError):
        return FILE.read_text(errors="replace")
    return ""


def _servers() -> tuple[str, ...]:
    return tuple(dict.fromkeys(servers_of(_text()))) or (LOCAL,)


def _searched() -> list[str]:
    """The domains that the host's file has searched, those that are names; the last line counts (resolv.conf(5))."""
    lines = lines_of(_text(), "search", "domain")
    found = [word.lower().rstrip(".") for word in (lines[-1] if lines else [])]
    return [name for name in found if is_domain(name)]
