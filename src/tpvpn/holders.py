"""Which program has which TUN or TAP device open.

It knows nothing of VPNs: it gives names, `route/owner` makes sense of them. A device of the kind says nothing of who
made it, but /proc does: a descriptor of /dev/net/tun, and the device's name beside it (tun_chr_show_fdinfo in
drivers/net/tun.c). Of processes that are not the caller's, only root may see that.
"""

import contextlib
import os
from collections.abc import Iterator

_CLONE_DEVICE = "/net/tun"
"""The end of the link: a container may have /dev elsewhere."""
_IFACE = "iff:"


def holders() -> dict[str, str]:
    """The program's name by device, for processes of this network namespace but this one.

    What may not be read is left out. Of several programs that share a device, the oldest is named.
    """
    found: dict[str, str] = {}
    for pid in _neighbours():
        with contextlib.suppress(OSError):  # it has ended, or is nobody's to look into
            for device in _open_devices(pid):
                found.setdefault(device, _program(pid))
    return found


def _neighbours() -> Iterator[str]:
    """The other processes of this network namespace, by pid."""
    ours, self = os.readlink("/proc/self/ns/net"), str(os.getpid())
    for pid in sorted(filter(str.isdecimal, os.listdir("/proc")), key=int):
        with contextlib.suppress(OSError):
            if pid != self and os.readlink(f"/proc/{pid}/ns/net") == ours:
                yield pid


def _open_devices(pid: str) -> Iterator[str]:
    """The names of the devices that a process has open."""
    directory = os.open(f"/proc/{pid}/fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name in os.listdir(directory):
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                if os.readlink(name, dir_fd=directory).endswith(_CLONE_DEVICE):
                    yield from _device(pid, name)
    finally:
        os.close(directory)


def _device(pid: str, descriptor: str) -> Iterator[str]:
    with open(f"/proc/{pid}/fdinfo/{descriptor}", errors="replace") as lines:
        for line in lines:
            if line.startswith(_IFACE) and (name := line.removeprefix(_IFACE).strip()):
                yield name


def _program(pid: str) -> str:
    """Its name; a program chooses that itself, so what does not print is replaced."""
    with open(f"/proc/{pid}/comm", errors="replace") as comm:
        return "".join(letter if letter.isprintable() else "?" for letter in comm.read().removesuffix("\n"))
