"""Keeps a link of a session: another is dialled when it is lost, when its other end is silent, and before it is old.

It decides when, not how: `dial` comes by a link that has joined the session in the place of the one before. A link that
is silent or old is used on until there is another (make before break).
"""

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from tpvpn.errors import LinkLostError, SessionEndedError, TpvpnError
from tpvpn.proto.retry import pause
from tpvpn.tunnel import ClientLink, Tunnel


@dataclass(frozen=True, slots=True)
class Patience:
    """How a session's links are kept; times in seconds."""

    give_up_after: float | None = None
    """Without any link for so long the session ends; None: never."""
    max_link_age: float = 3000.0


class Keeper:
    """Keeps one link of a tunnel; `dial()` errors as an engine's attempt to connect does."""

    def __init__(
        self,
        tunnel: Tunnel,
        dial: Callable[[], Awaitable[ClientLink]],
        patience: Patience,
        say: Callable[[str], None],
        link: ClientLink | None = None,
    ) -> None:
        self._tunnel, self._dial, self._patience, self._say, self._link = tunnel, dial, patience, say, link
        self._loop = asyncio.get_running_loop()
        self._hurry = asyncio.Event()
        self.reconnects = 0

    def hurry(self) -> None:
        """The network is another one: do not wait any longer."""
        self._hurry.set()

    async def run(self) -> None:
        """Keep it for ever. Errors: what ends the session."""
        while True:
            is_old = bool(self._link) and await self._is_old(self._link)
            await self._replace(is_old)
            self.reconnects += 1

    async def _is_old(self, link: ClientLink) -> bool:
        """Return when another link is wanted: since this one is old, or in trouble. Errors: what ends the session."""
        try:
            async with asyncio.timeout(self._patience.max_link_age):
                await link.trouble()
        except TimeoutError:
            return True
        if not link.lost.done():
            self._say("the manager does not answer; connecting again")
            return False
        error = link.lost.result()
        is_final = isinstance(error, SessionEndedError) or not isinstance(error, LinkLostError)
        if is_final or (self._patience.give_up_after == 0 and not self._tunnel.is_linked):
            raise error
        self._say(f"{error}; connecting again")
        return False

    async def _replace(self, is_old: bool) -> None:
        """Have another link, or find that a silent one is well again. Errors: what ends the session."""
        before, began, said = self._link, self._loop.time(), ""
        while True:
            tried = self._loop.time()
            try:
                self._link = await self._dial()
                break
            except (TpvpnError, OSError) as error:
                self._check(error, began)
                if str(error) != said:
                    said = str(error)
                    self._say(f"no connection yet: {said}")
            now = self._loop.time()
            await self._wait(pause(now - began, now - tried, random.random()))
            if before and before.is_well and not is_old:
                break
        if said or not is_old:
            self._say(f"connected again after {self._loop.time() - began:.1f} s")

    def _check(self, error: Exception, began: float) -> None:
        """Raise what ends the session."""
        if isinstance(error, SessionEndedError):
            raise error
        limit = self._patience.give_up_after
        if limit is not None and not self._tunnel.is_linked and self._loop.time() - began > limit:
            raise LinkLostError(f"the connection is lost, and no other is to be had: {error}") from error

    async def _wait(self, seconds: float) -> None:
        self._hurry.clear()
        try:
            async with asyncio.timeout(seconds):
                await self._hurry.wait()
        except TimeoutError:
            return
