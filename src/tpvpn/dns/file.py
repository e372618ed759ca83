"""What stood in /etc/resolv.conf before a session, and what becomes of the file. The door of asyncinotify.

It reads and watches; who writes is the helper. What was there may be a symlink to a file that its own program keeps up
to date (NetworkManager, resolvconf, systemd-resolved): that is read, and watched, as it is now.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

from tpvpn.dns import marker
from tpvpn.dns.marker import FILE
from tpvpn.dns.system import is_own, servers_of

if TYPE_CHECKING:
    from asyncinotify import Inotify

UPLINKS = Path("/run/systemd/resolve/resolv.conf")
STUBS = ("127.0.0.53", "127.0.0.54")
"""Where systemd-resolved answers, when it does so on this host (DNSStubListener=)."""
LOCAL = "127.0.0.1"
"""Who is asked when a file names nobody (resolv.conf(5))."""
LOOK_AGAIN = 2.0
"""Seconds between two looks at what cannot be watched."""


class Taken(NamedTuple):
    """Where what stood in the place of our file is to be read, how ours came there, and which one it is."""

    path: Path
    how: str
    generation: int


def generation_now(taken: Taken) -> int | None:
    """Which file of the same session programs come to, perhaps by way of other sessions'; None when they do not."""
    ours = marker.kept_by(taken.path)
    return next((one.generation for _, one in marker.chain() if ours and one.owner == ours[0]), None)


def servers_of_before(taken: Taken) -> tuple[str, ...]:
    """Whom this host asked, as the file that ours replaced says now; never our own addresses.

    systemd-resolved's stub asks whom our file names, which is us: those that it asked before are in its own file. A
    session that was there before us is asked, since it knows names too, and then those that it asks, should it be dead.
    """
    return tuple(_servers_of_before(taken.path, marker.kept_by(taken.path)))


def _servers_of_before(path: Path, ours: tuple[marker.Owner, int] | None) -> dict[str, None]:
    try:
        text = path.read_text(errors="replace")
        found = [*servers_of(text)]
        if any(one in STUBS for one in found):
            found = [one for one in found if one not in STUBS]
            found += servers_of(UPLINKS.read_text(errors="replace"))
    except OSError:
        return {}
    below = None if path.is_symlink() else marker.marker_in(text)
    if below is not None and ours is not None and below.owner != ours[0]:
        further = marker.kept(below.owner, below.generation)
        return dict.fromkeys(found) | _servers_of_before(further, (below.owner, below.generation))
    return dict.fromkeys(one for one in found if not is_own(one)) or {LOCAL: None}


class FileWatch:
    """Tells of changes to the file, to what sessions keep of it, and to where what stood there before leads."""

    def __init__(self, taken: Taken | None = None) -> None:
        self._taken = taken
        self._add: Callable[[Path], object] | None = None
        self._target: Path | None = None

    @property
    def taken(self) -> Taken | None:
        """What is watched too; whoever knows of a later one sets it."""
        return self._taken

    @taken.setter
    def taken(self, taken: Taken | None) -> None:
        self._taken = taken
        self._watch_target()

    async def follow(self) -> AsyncIterator[None]:
        """Once now, and whenever any of it has changed, for ever; where nothing can be watched, now and then."""
        while True:
            with contextlib.ExitStack() as stack:
                inotify = self._open(stack)
                yield
                if inotify is None:
                    await asyncio.sleep(LOOK_AGAIN)
                    continue
                async for event in inotify:
                    if event.name is None or self._concerns(str(event.name)):
                        break

    def _open(self, stack: contextlib.ExitStack) -> "Inotify | None":
        """Watch as long as the stack lasts; None without a descriptor, or when other programs watch all one may."""
        try:
            from asyncinotify import Inotify, Mask

            mask = Mask.CLOSE_WRITE | Mask.MOVED_TO | Mask.CREATE | Mask.DELETE | Mask.MOVED_FROM | Mask.ATTRIB
            inotify = stack.enter_context(Inotify())
            add = cast(Callable[..., object], inotify.add_watch)  # pyright: ignore[reportUnknownMemberType]
            add(FILE.parent, mask)
        except OSError:
            return None
        with contextlib.suppress(OSError):  # a mount has no directory that tells of it
            add(FILE, Mask.CLOSE_WRITE)
        self._add = partial(add, mask=mask)
        stack.callback(setattr, self, "_add", None)
        self._watch_target()
        return inotify

    def _watch_target(self) -> None:
        self._target = None
        if self._taken and self._taken.path.is_symlink():
            self._target = self._taken.path.resolve()
            if self._add:
                with contextlib.suppress(OSError):
                    self._add(self._target.parent)

    def _concerns(self, name: str) -> bool:
        return name.startswith(FILE.name) or (self._target is not None and name == self._target.name)
