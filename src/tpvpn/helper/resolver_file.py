"""/etc/resolv.conf while a session has it, and how it becomes again what it was, whoever wrote to it meanwhile.

What we write names the session and a generation in a marker line. Each time that another program has put its own file
there, and we put ours in its place, that is a new generation, which keeps what it replaced beside the file. So our file
says itself what stood there before, wherever a program may have saved it to put it back later: a VPN that ends, a
resolvconf with a backup, another session of ours that was there first. At the end each file with our marker becomes
what its generation had replaced; a file without it is somebody else's, and stays.

    resolv.conf                                 ours, atomically renamed into place; in place where that cannot be
    resolv.conf.before-tpvpn-NETNS-NAME.N       what generation N replaced: the file or symlink itself, or a copy

It is root's, and knows nothing of who asks. The files survive a reboot, the session does not: markers of another boot
are leftovers. resolv.conf(5), rename(2).
"""

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from tpvpn import rundir
from tpvpn.dns.marker import FILE, Marker, Owner, chain, kept, kept_by, kept_name, marker_in, marker_of, text_of
from tpvpn.errors import PrivilegeError

SAVED = (Path("/run/vpnc/resolv.conf-backup"),)
"""Where other programs save the file that they replace, beside those next to it (vpnc-script)."""
RESOLVED = Path("/run/systemd/resolve")
MOST = 16
"""Generations; whoever writes more different files than that has the oldest of them back no more."""
NONE = "# tpvpn: there was no such file\n"
"""What is kept of a file that was not there."""
_NO_RENAME = (errno.EBUSY, errno.EXDEV, errno.EROFS, errno.EACCES)
"""A mount point, another file system, a directory that cannot be written."""


class Taken(NamedTuple):
    """Where what stood there before is to be read, and how ours came there."""

    path: Path
    how: Literal["replaced", "in place"]
    generation: int


class ResolverFile:
    """The file in the hands of one session, living or dead; whoever uses it holds the lock of the sessions' state."""

    def __init__(self, owner: Owner) -> None:
        self._owner = owner

    def take(self, nameserver: str, search: Sequence[str]) -> Taken:
        """Have the host ask this server, with these domains behind those that it searches.

        Where a later session has put its own file above ours, ours stays below it. PrivilegeError when the file cannot
        be changed; nothing is changed then.
        """
        boot = rundir.boot_id()
        place, marker = next(
            (one for one in chain() if (one[1].owner, one[1].boot) == (self._owner, boot)), (FILE, None)
        )
        generation = marker.generation if marker else self._keep()
        original = kept(self._owner, generation)
        text = composed(text_of(original) or "", Marker(self._owner, boot, generation), nameserver, search)
        try:
            how = "replaced" if text_of(place) == text and not place.is_symlink() else _put(place, text)
        except OSError as error:
            self._forget()
            raise _refusal(error) from error
        return Taken(original, how, generation)

    def _keep(self) -> int:
        """Keep what stands there; the generation that replaces it."""
        there = self._generations()
        for number, path in there.items():
            if _same(path, FILE):
                return number
        number = max(there, default=0) + 1
        if len(there) >= MOST:
            there[min(there)].unlink(missing_ok=True)
        name = kept_name(self._owner, number)
        try:
            try:
                _copy(FILE, FILE.with_name(name))
            except OSError as error:
                if error.errno not in _NO_RENAME:
                    raise
                _copy(FILE, self._owner.directory / name)
        except OSError as error:
            raise _refusal(error) from error
        return number

    def _generations(self) -> dict[int, Path]:
        found = ((path, kept_by(path)) for path in backups(self._owner.directory))
        return {one[1]: path for path, one in found if one and one[0] == self._owner}

    def release(self, reread: Callable[[], None] = lambda: None) -> bool:
        """Let the file be again what it would be without us; whether there was anything to do.

        `reread` has systemd-resolved read it, which takes the servers of a foreign file for its own, and then writes
        them to the one that /etc/resolv.conf led to: so it sees one that names nobody before that is there again.
        """
        present = marker_of(FILE)
        if present and present.owner == self._owner:
            original = kept(self._owner, present.generation)
            if original.is_symlink() and original.resolve().is_relative_to(RESOLVED):
                with contextlib.suppress(OSError):
                    _put(FILE, f"{present}\n")
                    reread()
        return self._restore()

    def _restore(self) -> bool:
        there = self._generations()
        for place in _places():
            marker = marker_of(place)
            if marker is None or marker.owner != self._owner or not there or place in there.values():
                continue
            original = there.get(marker.generation, there[max(there)])
            with contextlib.suppress(OSError):
                _bring(original, place)
        for path in (*there.values(), _beside(FILE)):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        return bool(there)

    def _forget(self) -> None:
        """Keep nothing of a file that was not taken, unless it is needed elsewhere."""
        if not any((marker := marker_of(path)) and marker.owner == self._owner for path in _places()):
            self._restore()


def composed(original: str, marker: Marker, nameserver: str, search: Sequence[str]) -> str:
    """Our file: another program's signature, whose file it goes on to be, our marker, our server, their other words."""
    lines = original.splitlines()
    searched, others = list[str](), list[str]()
    for line in lines:
        words = line.split()
        if words[:1] in (["search"], ["domain"]):
            searched = words[1:]  # the last one counts (resolv.conf(5))
        elif words[:1] in (["options"], ["sortlist"]):
            others.append(line)
    signed = (
        lines[:1] if original != NONE and lines[:1] and lines[0].startswith("#") and not marker_in(lines[0]) else []
    )
    domains = dict.fromkeys([*searched, *search])
    return "\n".join(
        [
            *signed,
            str(marker),
            "# Until its session ends. The cluster's names are asked there, all others of whom this file named before.",
            f"nameserver {nameserver}",
            *([f"search {' '.join(domains)}"] if domains else []),
            *others,
            "",
        ]
    )


def leftovers() -> list[Owner]:
    """The sessions that have left something and live no more, of whatever network namespace or boot."""
    owners = dict.fromkeys(marker.owner for path in _places() if (marker := marker_of(path)))
    owners |= dict.fromkeys(found[0] for path in backups() if (found := kept_by(path)))
    return [owner for owner in owners if not _lives(owner)]


def _lives(owner: Owner) -> bool:
    """Whether its helper does, which holds the lock of its journal, wherever that helper's user keeps its state."""
    places = {rundir.base(), Path("/run/tpvpn"), *Path("/run/tpvpn").glob("[!0-9]*/")}
    for place in places:
        try:
            with open(place / owner.netns / owner.name / "journal", "rb") as journal:
                fcntl.flock(journal, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # of one that may not be read nothing may be undone either
            return True
        except OSError:
            continue
    return False


def backups(spare: Path | None = None) -> list[Path]:
    """All that is kept beside the file, and in a session's directory."""
    places = [FILE.parent, *([spare] if spare else [])]
    return [path for place in places for path in sorted(place.glob(f"{FILE.name}.*")) if kept_by(path)]


def _places() -> Iterator[Path]:
    """Where our file may stand: in other programs' backups, in what another session of ours keeps, in its place."""
    yield from sorted(FILE.parent.glob(f"{FILE.name}.*"))
    yield from SAVED
    yield FILE


def _bring(original: Path, place: Path) -> None:
    """Let a file be what was kept: the very file in its own place, and where it can be; else what was in it."""
    there_was_one = original.is_symlink() or text_of(original) != NONE
    if not there_was_one and not kept_by(place):
        place.unlink(missing_ok=True)
        return
    new = _beside(place)
    try:
        new.unlink(missing_ok=True)
        _copy(original, new, same=place == FILE)
        new.rename(place)
    except OSError as error:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
        if error.errno not in _NO_RENAME:
            raise
        _write_in_place(place, original.read_bytes() if there_was_one else b"")


def _put(place: Path, text: str) -> Literal["replaced", "in place"]:
    """Write our file: another in its place at once, or where that cannot be the same one anew."""
    new, content = _beside(place), text.encode(errors="surrogateescape")
    try:
        new.unlink(missing_ok=True)
        with open(new, "xb", opener=_opener) as file:
            file.write(content)
            file.flush()
            os.fchmod(file.fileno(), 0o644)
            os.fsync(file.fileno())  # after a power cut it must not stand there without its marker
        new.rename(place)
        return "replaced"
    except OSError as error:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
        if error.errno not in _NO_RENAME or place.is_symlink() or not place.exists():
            raise
    _write_in_place(place, content)
    return "in place"


def _beside(place: Path) -> Path:
    return place.with_name(f".{place.name}.tpvpn")


def _write_in_place(path: Path, content: bytes) -> None:
    """Write the very file, no other that a symlink leads to."""
    with open(os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC), "wb") as file:
        file.write(content)


def _opener(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)


def _copy(source: Path, target: Path, *, same: bool = True) -> None:
    """The same file or symlink under another name; a copy where it cannot be that; a word where there is none."""
    if not os.path.lexists(source):
        with open(target, "x", opener=_opener) as file:
            file.write(NONE)
        return
    try:
        if same:
            os.link(source, target, follow_symlinks=False)
            return
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP):
            raise
        # Of an immutable file no other name may be made either (EPERM), and no change: the copy does no harm.
    shutil.copy2(source, target, follow_symlinks=False)
    owner = source.lstat()
    os.chown(target, owner.st_uid, owner.st_gid, follow_symlinks=False)


def _same(one: Path, other: Path) -> bool:
    """Whether two files, or symlinks, are alike."""
    if one.is_symlink() or other.is_symlink():
        return one.is_symlink() and other.is_symlink() and os.readlink(one) == os.readlink(other)
    text = text_of(other)
    return text_of(one) == (NONE if text is None else text)


def _refusal(error: OSError) -> PrivilegeError:
    if error.errno == errno.EPERM:
        return PrivilegeError(f"{FILE} is immutable: run `chattr -ia {FILE}`, or connect with `--dns off`")
    return PrivilegeError(
        f"{FILE} cannot be changed ({error.strerror or error}): make it a file that root may write, or connect with "
        "`--dns off`"
    )
