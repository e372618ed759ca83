"""A systemd that is pid 1 of namespaces of its own, on a lab's laptop that an ordinary user has.

It knows the units in one directory and no other; cgroups are its own below ones that are removed at the end.
"""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from laptop import Laptop

from peers import eventually
from user import User

PROGRAM = Path("/usr/lib/systemd/systemd")
_JOIN = 'name="$1"; shift; for one in $(cat "$1"); do echo $$ >"$one/$name/cgroup.procs"; done; shift; exec "$@"'
_BOOT = """
mount --make-rprivate /
mount -t proc proc /proc
mount -t tmpfs -o mode=755 none /run
if [ -n "$2" ]; then
    mount -t tmpfs -o mode=755 none /sys/fs/cgroup
    for one in $2; do
        mkdir "/sys/fs/cgroup/$one"
        case "$one" in
            unified) mount -t cgroup2 none /sys/fs/cgroup/unified ;;
            systemd) mount -t cgroup -o none,name=systemd none /sys/fs/cgroup/systemd ;;
            *) mount -t cgroup -o "$one" none "/sys/fs/cgroup/$one" ;;
        esac
    done
else
    mount -t cgroup2 none /sys/fs/cgroup
fi
export container=test SYSTEMD_UNIT_PATH="$1"
exec /usr/lib/systemd/systemd --system --unit=test.target --log-target=console --show-status=no
"""
_ROOT = Path("/sys/fs/cgroup")


class Systemd:
    """The running one; `pid` is its process as everyone else sees it."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def run(self, *argv: str) -> subprocess.CompletedProcess[str]:
        """Run a command beside it, to its end."""
        return subprocess.run(
            ["nsenter", "--target", str(self.pid), "--all", *argv], capture_output=True, text=True, timeout=60
        )

    def property(self, unit: str, name: str) -> str:
        """A property of a unit."""
        return self.run("systemctl", "show", "--property", name, "--value", unit).stdout.strip()


def _hierarchies() -> list[Path]:
    """Each place where cgroups are made: one, or several where the old kind is mounted too."""
    mounted = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    return [Path(words[1]) for words in mounted if words[2] in ("cgroup", "cgroup2")]


@contextlib.contextmanager
def _cgroups(name: str) -> Iterator[list[Path]]:
    places = _hierarchies()
    try:
        for place in places:
            (place / name).mkdir()
            for setting in ("cpuset.cpus", "cpuset.mems"):
                if (place / name / setting).exists() and place != _ROOT:
                    (place / name / setting).write_text((place / setting).read_text())
    except OSError as error:
        pytest.skip(f"no cgroups can be made here: {error}")
    try:
        yield places
    finally:
        for place in places:
            for directory, _, _ in os.walk(place / name, topdown=False):
                eventually(lambda directory=directory: _removed(directory), 5, f"{directory} is empty")


def _removed(directory: str) -> bool:
    with contextlib.suppress(OSError):
        os.rmdir(directory)
    return not os.path.exists(directory)


@contextlib.contextmanager
def booted(laptop: Laptop, user: User, units: Path) -> Iterator[Systemd]:
    """A systemd with these units, on a laptop that is this user's."""
    for name in ("test", "sysinit", "basic", "shutdown", "network-online"):
        (units / f"{name}.target").write_text("[Unit]\n")
    with _cgroups(f"tpvpn-test-{os.getpid()}") as places, (units / "log").open("wb") as log:
        listing = units / "cgroups"
        listing.write_text("\n".join(map(str, places)))
        names = " ".join(one.name for one in places if one != _ROOT)
        namespaces = ["--mount", "--pid", "--fork", "--kill-child", "--uts", "--ipc", "--cgroup"]
        boot = ["unshare", *namespaces, "sh", "-ec", _BOOT, "sh", str(units), names]
        join = ["sh", "-ec", _JOIN, "sh", f"tpvpn-test-{os.getpid()}", str(listing)]
        outer = subprocess.Popen([*join, *laptop.command(user.host(boot))], stdout=log, stderr=log)
        try:
            yield Systemd(_started(outer, units / "log"))
        finally:
            outer.kill()
            outer.wait()


def _started(outer: subprocess.Popen[bytes], log: Path) -> int:
    """Its pid, when it answers."""
    found = list[int]()

    def answers() -> bool:
        assert outer.poll() is None, log.read_text()
        for one in Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split():
            with contextlib.suppress(OSError):  # what prepares all this has children too, which end
                found[:] = [int(one)] if Path(f"/proc/{one}/comm").read_text() == "systemd\n" else []
        return bool(found) and Systemd(found[0]).property("test.target", "ActiveState") == "active"

    eventually(answers, 20, "systemd is up")
    return found[0]
