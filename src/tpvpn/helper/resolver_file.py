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
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from tpvpn import rundir
from tpvpn.errors import PrivilegeError

FILE = Path("/etc/resolv.conf")
SAVED = (Path("/run/vpnc/resolv.conf-backup"),)
"""Where other programs save the file that they replace, beside those next to it (vpnc-script)."""
RESOLVED = Path("/run/systemd/resolve")
MOST = 16
"""Generations; whoever writes more different files than that has the oldest of them back no more."""
NONE = "# tpvpn: there was no such file\n"
"""What is kept of a file that was not there."""
_LIMIT = 1 << 16
_MARKER = re.compile(
    r"^# tpvpn session (?P<name>[a-z0-9-]{1,11}) netns (?P<netns>[0-9]{1,20}) boot (?P<boot>[0-9a-f-]{36}) "
    r"generation (?P<generation>[0-9]{1,4})$",
    re.MULTILINE,
)
_BACKUP = re.compile(r"\.before-tpvpn-(?P<netns>[0-9]{1,20})-(?P<name>[a-z0-9-]{1,11})\.(?P<generation>[0-9]{1,4})$")
_NO_RENAME = (errno.EBUSY, errno.EXDEV, errno.EROFS, errno.EACCES)
"""A mount point, another file system, a directory that cannot be written."""


class Owner(NamedTuple):
    """A session, by its name and the inode of its network namespace."""

    name: str
    netns: str


class Taken(NamedTuple):
    """Where what stood there before is to be read, and how ours came there."""

    path: Path
    how: Literal["replaced", "in place"]
    generation: int


@dataclass(frozen=True, slots=True)
class Marker:
    """Whose a file is."""

    owner: Owner
    boot: str
    generation: int

    def __str__(self) -> str:
        name, netns = self.owner
        return f"# tpvpn session {name} netns {netns} boot {self.boot} generation {self.generation}"


def marker_of(path: Path) -> Marker | None:
    """Whose a file is; None when it is none of ours. A symlink is none of ours."""
    text = None if path.is_symlink() else _text(path)
    found = _MARKER.search(text or "")
    return found and Marker(Owner(found["name"], found["netns"]), found["boot"], int(found["generation"]))


class ResolverFile:
    """The file in the hands of one session; `spare` is a directory for what cannot be kept beside it."""

    def __init__(self, name: str, spare: Path) -> None:
        self._owner = Owner(name, rundir.namespace().name)
        self._spare = spare

    def take(self, nameserver: str, search: Sequence[str]) -> Taken:
        """Have the host ask this server, with these domains behind those that it searches.

        PrivilegeError when the file cannot be changed; nothing is changed then.
        """
        marker = marker_of(FILE)
        if marker and (marker.owner, marker.boot) == (self._owner, rundir.boot_id()):
            generation = marker.generation
        else:
            generation = self._keep()
        original = self.backup(generation)
        text = composed(_text(original) or "", Marker(self._owner, rundir.boot_id(), generation), nameserver, search)
        try:
            how = "replaced" if _text(FILE) == text and not FILE.is_symlink() else _put(text)
        except OSError as error:
            self._forget()
            raise PrivilegeError(_refusal(error)) from error
        return Taken(original, how, generation)

    def backup(self, generation: int) -> Path:
        """What a generation replaced."""
        name = f"{FILE.name}.before-tpvpn-{self._owner.netns}-{self._owner.name}.{generation}"
        spare = self._spare / name
        return spare if spare.exists() else FILE.with_name(name)

    def _keep(self) -> int:
        """Keep what stands there; the generation that replaces it."""
        there = {number: self.backup(number) for number in self._generations()}
        for number, kept in there.items():
            if _same(kept, FILE):
                return number
        number = max(there, default=0) + 1
        if len(there) >= MOST:
            there[min(there)].unlink(missing_ok=True)
        name = FILE.with_name(f"{FILE.name}.before-tpvpn-{self._owner.netns}-{self._owner.name}.{number}")
        try:
            _copy(FILE, name)
        except OSError as error:
            if error.errno not in _NO_RENAME:
                raise PrivilegeError(_refusal(error)) from error
            _copy(FILE, self._spare / name.name)
        return number

    def _generations(self) -> list[int]:
        found = (_BACKUP.search(path.name) for path in backups(self._spare))
        return sorted(int(one["generation"]) for one in found if one and _owner_of(one) == self._owner)

    def release(self, reread: Callable[[], None] = lambda: None) -> bool:
        """Let the file be again what it would be without us; whether there was anything to do.

        `reread` has systemd-resolved read it, which takes the servers of a foreign file for its own, and then writes
        them to the one that /etc/resolv.conf led to: so it sees one that names nobody before that is there again.
        """
        present = marker_of(FILE)
        if present and present.owner == self._owner:
            original = self.backup(present.generation)
            if original.is_symlink() and original.resolve().is_relative_to(RESOLVED):
                with contextlib.suppress(OSError):
                    _put(f"{present}\n")
                    reread()
        return _restore(self._owner, self._spare)

    def _forget(self) -> None:
        """Keep nothing of a file that was not taken, unless it is needed elsewhere."""
        if not any((marker := marker_of(path)) and marker.owner == self._owner for path in _places()):
            self.release()


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
    signed = [lines[0]] if lines and lines[0].startswith("#") and not _MARKER.match(lines[0]) else []
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


def repair() -> list[str]:
    """Restore what sessions left that live no more, of whatever network namespace or boot; what was done, in words."""
    owners = {marker.owner: marker.boot for path in _places() if (marker := marker_of(path))}
    for path in backups():
        found = _BACKUP.search(path.name)
        assert found
        owners.setdefault(_owner_of(found), rundir.boot_id())
    done = list[str]()
    for owner, boot in owners.items():
        if boot == rundir.boot_id() and _lives(owner):
            continue
        if _restore(owner, rundir.base() / owner.netns / owner.name):
            done.append(f"{FILE} of session {owner.name}")
    return done


def _lives(owner: Owner) -> bool:
    """Whether its helper does, which holds the lock of its journal, wherever that helper's user keeps its state."""
    places = {rundir.base(), Path("/run/tpvpn"), *Path("/run/tpvpn").glob("[!0-9]*/")}
    for place in places:
        with (
            contextlib.suppress(FileNotFoundError),
            open(place / owner.netns / owner.name / "journal", "rb") as journal,
        ):
            try:
                fcntl.flock(journal, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
    return False


def backups(spare: Path | None = None) -> list[Path]:
    """All that is kept beside the file, and in a session's directory."""
    places = [FILE.parent, *([spare] if spare else [])]
    return [path for place in places for path in sorted(place.glob(f"{FILE.name}.before-tpvpn-*")) if _is_backup(path)]


def _is_backup(path: Path) -> bool:
    return _BACKUP.search(path.name) is not None


def _owner_of(found: re.Match[str]) -> Owner:
    return Owner(found["name"], found["netns"])


def _places() -> Iterator[Path]:
    """Where our file may stand: in its place, in another program's backup, in what another session of ours keeps."""
    yield FILE
    yield from sorted(FILE.parent.glob(f"{FILE.name}.*"))
    yield from SAVED


def _restore(owner: Owner, spare: Path) -> bool:
    kept = dict[int, Path]()
    for path in backups(spare):
        found = _BACKUP.search(path.name)
        if found and _owner_of(found) == owner:
            kept[int(found["generation"])] = path
    done = bool(kept)
    for place in _places():
        marker = marker_of(place)
        if marker is None or marker.owner != owner or place in kept.values():
            continue
        original = kept.get(marker.generation) or (kept[max(kept)] if kept else None)
        if original is not None:
            with contextlib.suppress(OSError):
                _bring(original, place)
    for path in kept.values():
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
    return done


def _bring(original: Path, place: Path) -> None:
    """Let a file be what was kept: the very file where it can be, else what was in it."""
    if not original.is_symlink() and _text(original) == NONE:
        place.unlink(missing_ok=True)
        return
    new = place.with_name(f".{place.name}.tpvpn")
    try:
        new.unlink(missing_ok=True)
        _copy(original, new)
        new.rename(place)
    except OSError as error:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
        if error.errno not in _NO_RENAME:
            raise
        _write_in_place(place, _text(original) or "")


def _put(text: str) -> Literal["replaced", "in place"]:
    """Write the file: another in its place at once, or where that cannot be the same one anew."""
    new = FILE.with_name(f".{FILE.name}.tpvpn")
    try:
        new.unlink(missing_ok=True)
        with open(new, "x", opener=_opener) as file:
            file.write(text)
            os.fchmod(file.fileno(), 0o644)
        new.rename(FILE)
        return "replaced"
    except OSError as error:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
        if error.errno not in _NO_RENAME:
            raise
    _write_in_place(FILE, text)
    return "in place"


def _write_in_place(path: Path, text: str) -> None:
    """Write the very file, no other that a symlink leads to."""
    with open(os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC), "w") as file:
        file.write(text)


def _opener(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)


def _copy(source: Path, target: Path) -> None:
    """The same file or symlink under another name; a copy where it cannot be that; a word where there is none."""
    try:
        os.link(source, target, follow_symlinks=False)
    except FileNotFoundError:
        with open(target, "x", opener=_opener) as file:
            file.write(NONE)
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
    text = _text(other)
    return _text(one) == (NONE if text is None else text)


def _text(path: Path) -> str | None:
    """What is in a file, which may be anything; None when there is none."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            return file.read(_LIMIT).decode(errors="surrogateescape")
    except OSError:
        return None


def _refusal(error: OSError) -> str:
    if error.errno == errno.EPERM:
        return f"{FILE} is immutable: run `chattr -i {FILE}`, or connect with `--dns off`"
    return (
        f"{FILE} cannot be changed ({error.strerror}): make it a file that root may write, or connect with `--dns off`"
    )
