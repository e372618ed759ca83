"""What stood in /etc/resolv.conf before a session, and what becomes of the file. The door of asyncinotify.

It reads and watches; who writes is the helper. What was there may be a symlink to a file that its own program keeps up
to date (NetworkManager, resolvconf, systemd-resolved): that is read, and watched, as it is now.
"""

import contextlib
import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import NamedTuple, cast

from tpvpn.dns.system import is_own, servers_of

FILE = Path("/etc/resolv.conf")
UPLINKS = Path("/run/systemd/resolve/resolv.conf")
STUBS = ("127.0.0.53", "127.0.0.54")
"""Where systemd-resolved answers, when it does so on this host (DNSStubListener=)."""
LOCAL = "127.0.0.1"
"""Who is asked when a file names nobody (resolv.conf(5))."""
_GENERATION = re.compile(r"^# tpvpn session .* generation ([0-9]+)$", re.MULTILINE)


class Taken(NamedTuple):
    """Where what stood in the place of our file is to be read, how ours came there, and which one it is."""

    path: Path
    how: str
    generation: int


def generation_of(text: str) -> int | None:
    """Which of our files a text is; None when it is another program's."""
    found = _GENERATION.search(text)
    return int(found[1]) if found else None


def servers_of_before(taken: Taken) -> tuple[str, ...]:
    """Whom this host asked, as the file that ours replaced says now; never our own addresses.

    systemd-resolved's stub asks whom our file names, which is us: those that it asked before are in its own file.
    """
    try:
        found = [*servers_of(taken.path.read_text(errors="replace"))]
        if any(one in STUBS for one in found):
            found = [one for one in found if one not in STUBS]
            found += servers_of(UPLINKS.read_text(errors="replace"))
    except OSError:
        return ()
    return tuple(dict.fromkeys(one for one in found if not is_own(one))) or (LOCAL,)


class FileWatch:
    """Tells of changes to the file, and to where what stood there before leads."""

    def __init__(self, taken: Taken | None = None) -> None:
        self.taken = taken
        """What is watched too; whoever knows of a later one sets it."""

    async def follow(self) -> AsyncIterator[None]:
        """Once now, and whenever any of it has changed, for ever."""
        from asyncinotify import Inotify, Mask

        mask = Mask.CLOSE_WRITE | Mask.MOVED_TO | Mask.CREATE | Mask.DELETE | Mask.MOVED_FROM | Mask.ATTRIB
        names = {FILE.name}
        while True:
            with Inotify() as inotify:
                add = cast(Callable[[Path, Mask], object], inotify.add_watch)  # pyright: ignore[reportUnknownMemberType]
                add(FILE.parent, mask)
                with contextlib.suppress(OSError):  # a mount has no directory that tells of it
                    add(FILE, Mask.CLOSE_WRITE)
                if self.taken and self.taken.path.is_symlink():
                    target = self.taken.path.resolve()
                    names.add(target.name)
                    with contextlib.suppress(OSError):
                        add(target.parent, mask)
                yield
                async for event in inotify:
                    if event.name is None or str(event.name) in names:
                        break
