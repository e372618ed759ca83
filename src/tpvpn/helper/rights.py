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
    """Whether a helper that is a plain child of this process has the rights that it needs.

    PrivilegeError when they are from a sudo that names no user.
    """
    if os.geteuid() != 0:
        return bool(_ambient() >> _CAP_NET_ADMIN & 1)
    _caller_of_sudo()
    return True


def give_up() -> None:
    """Be an ordinary user from now on, whoever started us; root who is nobody else stays root. Errors as of `held`.

    It is for the start of a program: capabilities are a thread's own, and threads that are there keep them.
    """
    if os.geteuid() != 0:
        if _ambient():
            _drop_capabilities()
    elif caller := _caller_of_sudo():
        _become(*caller)


def _caller_of_sudo() -> tuple[pwd.struct_passwd, int] | None:
    """The user who called sudo, and the group; None when root is nobody else."""
    if os.environ.get("SUDO_UID", "0") == "0":
        return None
    try:
        return pwd.getpwuid(int(os.environ["SUDO_UID"])), int(os.environ["SUDO_GID"])
    except (KeyError, ValueError):
        raise PrivilegeError("SUDO_UID and SUDO_GID name no user of this host: unset them, or use sudo") from None


def _become(account: pwd.struct_passwd, gid: int) -> None:
    """Groups, then the group, then the user: the kernel drops every capability with the last."""
    uid = account.pw_uid
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
