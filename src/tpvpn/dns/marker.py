"""What a session's /etc/resolv.conf says of itself: whose it is, and so where what it replaced is kept.

Sessions stand above each other: the later one's file replaced the earlier one's, which is kept, and itself says what it
replaced. Whoever reads asks the upper session, which asks the lower one, which asks whom the host asked before. So a
session has the file as long as its own is somewhere in that chain. It reads only.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tpvpn import rundir

FILE = Path("/etc/resolv.conf")
LIMIT = 1 << 16
"""Bytes that are read of a file."""
_DEEPEST = 32
_MARKER = re.compile(
    r"^# tpvpn session (?P<name>[a-z0-9][a-z0-9-]{0,10}) netns (?P<netns>[0-9]{1,20}) boot (?P<boot>[0-9a-f-]{36}) "
    r"generation (?P<generation>[0-9]{1,4})$",
    re.MULTILINE,
)
_KEPT = re.compile(
    r".*\.before-tpvpn-(?P<netns>[0-9]{1,20})-(?P<name>[a-z0-9][a-z0-9-]{0,10})\.(?P<generation>[0-9]{1,4})"
)


class Owner(NamedTuple):
    """A session, by its name and the inode of its network namespace."""

    name: str
    netns: str

    @property
    def directory(self) -> Path:
        """Where it keeps what it cannot keep beside the file."""
        if self.netns == rundir.namespace().name:
            return rundir.directory(self.name)
        return rundir.base() / self.netns / self.name


@dataclass(frozen=True, slots=True)
class Marker:
    """Whose a file is, in which run of the kernel, and which of the files that the session has put there."""

    owner: Owner
    boot: str
    generation: int

    def __str__(self) -> str:
        name, netns = self.owner
        return f"# tpvpn session {name} netns {netns} boot {self.boot} generation {self.generation}"


def marker_in(text: str) -> Marker | None:
    """Whose a text is; None when it is none of ours."""
    found = _MARKER.search(text)
    return found and Marker(Owner(found["name"], found["netns"]), found["boot"], int(found["generation"]))


def marker_of(path: Path) -> Marker | None:
    """Whose a file is; None when it is none of ours. A symlink is none of ours."""
    return None if path.is_symlink() else marker_in(text_of(path) or "")


def text_of(path: Path) -> str | None:
    """What is in a file, which may be anything; None when there is none, or it may not be read."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            return file.read(LIMIT).decode(errors="surrogateescape")
    except OSError:
        return None


def kept_name(owner: Owner, generation: int) -> str:
    """What the file is called that a generation replaced."""
    return f"{FILE.name}.before-tpvpn-{owner.netns}-{owner.name}.{generation}"


def kept_by(path: Path) -> tuple[Owner, int] | None:
    """Whose a kept file is, by its name, and what it was replaced by; None when it is none."""
    found = _KEPT.fullmatch(path.name)
    return found and (Owner(found["name"], found["netns"]), int(found["generation"]))


def kept(owner: Owner, generation: int) -> Path:
    """What a generation replaced: beside the file, unless it could not be kept there."""
    name = kept_name(owner, generation)
    spare = owner.directory / name
    return spare if os.path.lexists(spare) else FILE.with_name(name)


def chain() -> Iterator[tuple[Path, Marker]]:
    """The files of sessions, the upper one first, that lead to whom the host asked before."""
    path = FILE
    for _ in range(_DEEPEST):
        marker = marker_of(path)
        if marker is None:
            return
        yield path, marker
        path = kept(marker.owner, marker.generation)
