"""Namespaces of an ordinary user's own: making them, entering them, mounts inside, and who forbids them.

It knows nothing of sessions. The user is itself in them: its uid and gid are mapped to themselves, which needs no right
and no newuidmap. What makes a namespace has every capability in it for as long as it executes nothing, and so has what
enters it; with the next execve(2) they are gone (capabilities(7)), so a command there is an ordinary user's.
"""

import contextlib
import ctypes
import errno
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

from tpvpn.errors import PrivilegeError

_CLONE_NEWNS, _CLONE_NEWUSER, _CLONE_NEWNET = 0x00020000, 0x10000000, 0x40000000  # linux/sched.h
KINDS = {"user": _CLONE_NEWUSER, "net": _CLONE_NEWNET, "mnt": _CLONE_NEWNS}
"""In the order in which they are made and entered: the first gives the right to the others."""
_MS_NOSUID, _MS_NODEV, _MS_BIND = 0x2, 0x4, 0x1000  # linux/mount.h
_OPEN_TREE, _MOVE_MOUNT = 428, 429  # asm-generic/unistd.h: the same on all architectures
_AT_FDCWD, _AT_RECURSIVE, _CLONE_TREE, _FROM_EMPTY_PATH = -100, 0x8000, 0x1, 0x4  # linux/fcntl.h, linux/mount.h
_PR_SET_PDEATHSIG = 1  # linux/prctl.h

_SWITCHES = {
    "kernel.unprivileged_userns_clone": "0",
    "kernel.apparmor_restrict_unprivileged_userns": "1",
}
"""What takes them from ordinary users, when it has this value: Debian's, and Ubuntu's."""
_LIMITS = {"user": "user.max_user_namespaces", "net": "user.max_net_namespaces", "mnt": "user.max_mnt_namespaces"}

_libc = ctypes.CDLL(None, use_errno=True)


def make() -> None:
    """Have this process, which must have one thread only, in new ones. PrivilegeError names what forbids it."""
    uid, gid = os.geteuid(), os.getegid()
    for name, kind in KINDS.items():
        try:
            _check(_libc.unshare(kind))
            if name == "user":
                Path("/proc/self/setgroups").write_text("deny")  # without a right in the parent (user_namespaces(7))
                Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
                Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
        except OSError as error:
            raise PrivilegeError(why(name, error, _sysctl)) from error


def why(name: str, error: OSError, read: Callable[[str], str | None]) -> str:
    """Who forbids a namespace, and what helps, in one sentence; `read` gives a sysctl, None where there is none."""
    needs = "`tpvpn run` needs a user namespace of its own"
    instead = "or use `sudo tpvpn connect`, which needs none"
    if error.errno in (errno.ENOSPC, errno.EUSERS):
        return (
            f"{needs}, and {_LIMITS[name]} allows no more: raise it with `sysctl -w {_LIMITS[name]}=10000`, {instead}"
        )
    if error.errno in (errno.EINVAL, errno.ENOSYS):
        return f"{needs}, which this kernel is built without: {instead.removeprefix('or ')}"
    for switch, forbidding in _SWITCHES.items():
        if read(switch) == forbidding:
            allow = f"`sysctl -w {switch}={1 - int(forbidding)}`"
            return f"{needs}, which {switch}={forbidding} forbids: an admin allows it with {allow}, {instead}"
    return (
        f"{needs}, which is forbidden here ({error.strerror}): a container needs `--security-opt seccomp=unconfined` "
        f"and `--security-opt apparmor=unconfined`, {instead}"
    )


def _sysctl(name: str) -> str | None:
    with contextlib.suppress(OSError):
        return Path("/proc/sys", *name.split(".")).read_text().strip()
    return None


def descriptors() -> list[int]:
    """This process's namespaces, to be entered by another one, in the order of KINDS; the caller's to close."""
    return [os.open(f"/proc/self/ns/{name}", os.O_RDONLY | os.O_CLOEXEC) for name in KINDS]


def entering(namespaces: Sequence[int], directory: str) -> Callable[[], None]:
    """What a child that is about to execute a command does to enter them, and to end when this process does.

    It may use nothing but what is there already: it runs between fork(2) and execve(2).
    """
    kinds, parent = tuple(KINDS.values()), os.getpid()

    def enter() -> None:
        for descriptor, kind in zip(namespaces, kinds, strict=True):
            _check(_libc.setns(descriptor, kind))
        os.chdir(directory)
        _check(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)

    return enter


def hidden_directory() -> int:
    """A directory of this mount namespace that no path leads to: its files can be mounted elsewhere.

    Only what is mounted can be bound to another place, so it is mounted beneath a directory that is put back on top: a
    copy of that from before, which a bind of it with all mounts below would be hidden in (open_tree(2), move_mount(2)).
    """
    place = b"/tmp"
    before = _check(_libc.syscall(_OPEN_TREE, _AT_FDCWD, place, _CLONE_TREE | _AT_RECURSIVE | os.O_CLOEXEC))
    try:
        _mount("tmpfs", "/tmp", "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=755")
        hidden = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        _check(_libc.syscall(_MOVE_MOUNT, before, b"", _AT_FDCWD, place, _FROM_EMPTY_PATH))
    finally:
        os.close(before)
    return hidden


def bind(source: str, target: str) -> None:
    """Have a file stand in the place of another in this mount namespace. OSError when that is not there."""
    _mount(source, target, None, _MS_BIND, None)


def _mount(source: str, target: str, kind: str | None, flags: int, data: str | None) -> None:
    words = (word if word is None else os.fsencode(word) for word in (source, target, kind))
    _check(_libc.mount(*words, ctypes.c_ulong(flags), data if data is None else data.encode()), target)


def _check(result: int, file: str | None = None) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), file)
    return result
