"""The rights that this process was started with, and giving them up for good.

It knows nothing of what they are for. Root has them all; so has a service of an ordinary user's one, CAP_NET_ADMIN, by
its ambient set: that alone passes execve(2) without a mark on the program's file (capabilities(7)).
"""

import os
import pwd
from pathlib import Path

from tpvpn.errors import PrivilegeError, TpvpnError

_CAP_NET_ADMIN = 12  # linux/capability.h
_CAPABILITY_VERSION_3 = 0x20080522
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 47, 4  # linux/prctl.h


def held() -> bool:
    """Whether a helper that is a plain child of this process has the rights that it needs."""
    return os.geteuid() == 0 or bool(_ambient() >> _CAP_NET_ADMIN & 1)


def give_up() -> None:
    """Be an ordinary user from now on, whoever started us; root who is nobody else stays root.

    It is for the start of a program: capabilities are a thread's own, and threads that are there keep them.
    """
    if os.geteuid() == 0:
        if (uid := os.environ.get("SUDO_UID", "0")) != "0":
            _become(int(uid), int(os.environ["SUDO_GID"]))
    elif _ambient():
        _drop_capabilities()


def _become(uid: int, gid: int) -> None:
    """Groups, then the group, then the user: the kernel drops every capability with the last."""
    try:
        account = pwd.getpwuid(uid)
    except KeyError:
        raise PrivilegeError(f"there is no user {uid}, whom SUDO_UID names: start tpvpn by sudo as a user") from None
    os.initgroups(account.pw_name, gid)
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    os.environ.update(HOME=account.pw_dir, USER=account.pw_name, LOGNAME=account.pw_name)


def _ambient() -> int:
    """The ambient set of the calling thread."""
    for line in Path("/proc/thread-self/status").read_text().splitlines():
        if line.startswith("CapAmb:"):
            return int(line.split()[1], 16)
    return 0


def _drop_capabilities() -> None:
    import ctypes  # few need it

    libc = ctypes.CDLL(None)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    none = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable, twice: for 64 of them
    libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    if libc.capset(header, none) or _ambient():
        raise TpvpnError("the capabilities that tpvpn was started with could not be dropped")
