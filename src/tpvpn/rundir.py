"""Where a session keeps its state, and which sessions there are in this network namespace.

It knows paths, names and owners; what a session does is not its concern. Everything is made and removed by the root
helper, and everyone may look:

    /run/tpvpn/                  TPVPN_RUN_DIR puts it elsewhere
      USER/                      all of this once more, of the helpers that run as this user (a service's)
      lock                       held while sessions are claimed and removed
      NETNS/                     the inode of the network namespace: each sees its own sessions only
        NAME/          0755
          session      0644      who runs it, as JSON
          names        0644      the suffixes below which it has names, for other sessions, as JSON
          journal      0600      locked while its helper lives (see journal)
          control/     0700      the user's, for the control socket
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tpvpn.errors import UsageError

DEFAULT_NAME = "default"
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,10}")
_NAMES = "names"
_DEVICE_LENGTH = 15
"""IFNAMSIZ less its NUL."""


@dataclass(frozen=True, slots=True)
class Session:
    """A session as its directory tells of it; `pid` and `uid` are the user's process."""

    name: str
    pid: int
    uid: int
    device: str
    table: int
    boot_id: str

    @property
    def directory(self) -> Path:
        """Its directory."""
        return directory(self.name)

    @property
    def control(self) -> Path:
        """The directory of its control socket, which only its user may enter."""
        return self.directory / "control"

    @property
    def running(self) -> bool:
        """Whether the user's process is there; whoever must be certain takes the journal's lock."""
        return self.boot_id == boot_id() and Path(f"/proc/{self.pid}").exists()


def boot_id() -> str:
    """What tells this run of the kernel from every other."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def base() -> Path:
    """The root of all state that a helper of this process's user keeps."""
    return _bases()[0]


def _bases() -> tuple[Path, ...]:
    """Where sessions of interest to us may be: our user's own, then those with a helper that is root's."""
    if elsewhere := os.environ.get("TPVPN_RUN_DIR"):
        return (Path(elsewhere),)
    import pwd  # here, since this module is imported on every system

    roots = Path("/run/tpvpn")
    if os.geteuid() == 0:
        return (roots,)
    with contextlib.suppress(KeyError):  # a user without a name has no service
        return roots / pwd.getpwuid(os.geteuid()).pw_name, roots
    return (roots,)


def namespace() -> Path:
    """The directory of this network namespace's sessions, of those that a helper of this process's user keeps."""
    return base() / _inode()


def _inode() -> str:
    return str(os.stat("/proc/self/ns/net").st_ino)


def directory(name: str) -> Path:
    """The directory that a session has or would have. UsageError when the name is not one."""
    if not _NAME.fullmatch(name):
        raise UsageError(f"{name!r} is no session name: write 1 to 11 small letters, digits and hyphens")
    places = [place / _inode() / name for place in _bases()]
    return next((place for place in places if os.path.isdir(place)), places[0])


def device_name(name: str) -> str:
    """The TUN device of a session; names that differ only behind their 9th character share one, so only one runs."""
    return "tpvpn0" if name == DEFAULT_NAME else f"tpvpn-{name}"[:_DEVICE_LENGTH]


def name_option(name: str) -> str:
    """How a command that is shown to a user names a session, with a space before; nothing for the default one."""
    return "" if name == DEFAULT_NAME else f" --name {name}"


def names() -> list[str]:
    """The sessions that have a directory which a helper of this process's user keeps, living or dead."""
    return _names(base())


def _names(place: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in (place / _inode()).iterdir() if _NAME.fullmatch(entry.name))
    except (FileNotFoundError, PermissionError):
        return []


def sessions() -> list[Session]:
    """The sessions of this network namespace that run, the oldest first: the next one's table is a higher one."""
    found = (read(name) for name in dict.fromkeys(name for place in _bases() for name in _names(place)))
    return sorted((one for one in found if one is not None and one.running), key=lambda one: one.table)


def read(name: str) -> Session | None:
    """What the session's directory tells of it; None when there is none that may be read."""
    try:
        return decode((directory(name) / "session").read_text(errors="replace"))
    except (FileNotFoundError, PermissionError):
        return None


def table_of(name: str) -> int | None:
    """The routing table of the session of this name, if it runs."""
    session = read(name)
    return session.table if session is not None and session.running else None


def encode(session: Session) -> str:
    """The session as one line of JSON."""
    return json.dumps(asdict(session))


def decode(line: str) -> Session | None:
    """The inverse of `encode`; None when the line is none, as one half written."""
    try:
        given: Any = json.loads(line)
        return Session(**given)
    except (ValueError, TypeError, RecursionError):
        return None


@contextlib.contextmanager
def locked() -> Generator[None]:
    """Hold the lock under which sessions come and go (root). OSError when the base cannot be written."""
    import fcntl

    base().mkdir(mode=0o755, parents=True, exist_ok=True)
    with open(base() / "lock", "a", opener=_private) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def create(name: str) -> Path:
    """Make the session's directory, if it is not there (root, under the lock). UsageError as of `directory`."""
    made = namespace() / directory(name).name
    made.mkdir(mode=0o755, parents=True, exist_ok=True)
    return made


def write(session: Session, gid: int) -> None:
    """Tell everyone about the session, and give its user a part of the directory (root, under lock and journal)."""
    (session.directory / _NAMES).unlink(missing_ok=True)
    _publish(session.directory / "session", encode(session))
    shutil.rmtree(session.control, ignore_errors=True)
    session.control.mkdir(mode=0o700)
    os.chown(session.control, session.uid, gid)


def _publish(file: Path, line: str) -> None:
    """Put a file there that everyone may read, whole."""
    new = file.with_suffix(".new")
    new.write_text(line + "\n")
    new.chmod(0o644)
    new.rename(file)


def announce(name: str, suffixes: Sequence[str]) -> None:
    """Tell everyone below which suffixes the session has names (root)."""
    _publish(directory(name) / _NAMES, json.dumps(suffixes))


def announced(name: str) -> tuple[str, ...] | None:
    """The suffixes below which the session has names; None when it has said nothing of names."""
    try:
        return tuple(map(str, json.loads((directory(name) / _NAMES).read_text(errors="replace"))))
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def remove(name: str) -> None:
    """Remove the session's directory, and the namespace's with the last one (root, under the lock)."""
    shutil.rmtree(directory(name), ignore_errors=True)
    remove_empty()


def remove_empty(name: str | None = None) -> None:
    """Remove the session's directory when nothing is in it, and the namespace's (root, under the lock)."""
    for place in ([namespace() / name] if name else []) + [namespace()]:
        with contextlib.suppress(OSError):
            place.rmdir()
