"""Opening a TUN device with the kernel's segmentation offload, at either end of the tunnel.

It knows nothing of addresses or routes. Each packet read from or written to the descriptor is preceded by a virtio-net
header when offload is on (IFF_VNET_HDR; linux/if_tun.h, linux/virtio_net.h): one read is then up to 64 KiB of TCP
payload in one piece. The device lives as long as a descriptor of it.

A device has two queues. The kernel sends a flow to the queue through which its last packet came in (tun.c,
tun_automq_select_queue), so whoever writes packets decides, without a privilege and without a classifier, which flows
share a queue: those that keep queues full are kept apart from those that want an answer soon.
"""

import errno
import fcntl
import io
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tpvpn.errors import PrivilegeError, TpvpnError, UsageError
from tpvpn.wire.vnet import HEADER_LENGTH, Offload

CLONE_DEVICE = Path("/dev/net/tun")

# linux/if_tun.h
_TUNGETFEATURES = 0x800454CF
_TUNSETIFF = 0x400454CA
_TUNSETOFFLOAD = 0x400454D0
_TUNSETVNETHDRSZ = 0x400454D8
_IFF_TUN = 0x0001
_IFF_NO_PI = 0x1000
IFF_MULTI_QUEUE = 0x0100
IFF_VNET_HDR = 0x4000
_IFF_TUN_EXCL = 0x8000

_MISSING = (
    f"{CLONE_DEVICE} is missing: load the driver with `modprobe tun`, or give the container the device "
    "(`docker run --device /dev/net/tun`)"
)
_CLOSED = f"{CLONE_DEVICE} may not be opened: give the container the device (`docker run --device {CLONE_DEVICE}`)"
_FORBIDDEN = "opening a TUN device needs CAP_NET_ADMIN: run as root, or give the container `--cap-add NET_ADMIN`"


class Device(Protocol):
    """What carries packets between the kernel and `pump`: a TUN, or what stands in its place."""

    @property
    def fd(self) -> int:
        """The queue of TCP, to be read."""
        ...

    @property
    def prompt_fd(self) -> int:
        """The queue of all other protocols, to be read first."""
        ...

    def reader(self, queue: int, /) -> Callable[[memoryview], int | None]:
        """What reads the next packet of a queue, and says None when it is empty."""
        ...

    @property
    def write(self) -> Callable[[int, memoryview], int]:
        """Hand the kernel a packet, whose answers come by this queue; OSError when it refuses."""
        ...


@dataclass(slots=True)
class Tun:
    """An open TUN device: the non-blocking descriptors of its two queues, its name, what it may hand us unsegmented."""

    fd: int
    """The queue of TCP."""
    prompt_fd: int
    """The queue of all other protocols, read first."""
    name: str
    offloads: Offload
    write = staticmethod(os.write)

    def reader(self, queue: int) -> Callable[[memoryview], int | None]:
        """What reads the next packet of a queue, and says None when it is empty."""
        # FileIO costs a quarter less a packet than os.readv, and raises nothing when the queue is empty.
        return io.FileIO(queue, closefd=False).readinto

    def close(self) -> None:
        """Close the descriptors; with them go the device, its addresses and its routes."""
        os.close(self.fd)
        os.close(self.prompt_fd)

    def set_offloads(self, offloads: Offload) -> None:
        """Narrow what the kernel hands out to what both ends agreed on."""
        fcntl.ioctl(self.fd, _TUNSETOFFLOAD, int(offloads))
        self.offloads = offloads


def features() -> int:
    """What devices can be, as IFF_ flags; needs no privilege. OSError when the device node may not be opened."""
    fd = os.open(CLONE_DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        return struct.unpack("I", fcntl.ioctl(fd, _TUNGETFEATURES, bytes(4)))[0]
    finally:
        os.close(fd)


def open_tun(name: str, *, offload: bool) -> Tun:
    """Create the TUN device `name`, with virtio-net headers and all offloads the kernel has when `offload`.

    Errors: PrivilegeError without the device node or the right, UsageError when the name is in use.
    """
    fd = _open_queue(name, offload, exclusive=True)
    try:
        return Tun(fd, _open_queue(name, offload, exclusive=False), name, _negotiate(fd) if offload else Offload(0))
    except BaseException:
        os.close(fd)
        raise


def _open_queue(name: str, offload: bool, *, exclusive: bool) -> int:
    try:
        fd = os.open(CLONE_DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise PrivilegeError(_MISSING) from error
    except OSError as error:
        if error.errno in (errno.ENODEV, errno.ENXIO):
            raise PrivilegeError(_MISSING) from error
        if error.errno == errno.EPERM:  # not the file's mode, which is EACCES, but the container's list of devices
            raise PrivilegeError(_CLOSED) from error
        raise PrivilegeError(f"{CLONE_DEVICE}: {error.strerror}; {_FORBIDDEN}") from error
    flags = _IFF_TUN | _IFF_NO_PI | IFF_MULTI_QUEUE
    flags |= (IFF_VNET_HDR if offload else 0) | (_IFF_TUN_EXCL if exclusive else 0)
    try:
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
        if offload:
            fcntl.ioctl(fd, _TUNSETVNETHDRSZ, struct.pack("i", HEADER_LENGTH))
    except OSError as error:
        os.close(fd)
        raise _refused(name, error) from error
    return fd


def _refused(name: str, error: OSError) -> TpvpnError:
    if error.errno == errno.EPERM:
        return PrivilegeError(_FORBIDDEN)
    if error.errno in (errno.EBUSY, errno.EEXIST, errno.EINVAL):
        return UsageError(f"device {name} is in use: end the program that has it, or choose another --name")
    return TpvpnError(f"cannot create device {name}: {error.strerror}")


def _negotiate(fd: int) -> Offload:
    """Switch on as much as the kernel takes: USO came with Linux 6.2, the rest is older than we support."""
    for offloads in (Offload.ALL, Offload.ALL & ~(Offload.USO4 | Offload.USO6), Offload.CHECKSUM):
        try:
            fcntl.ioctl(fd, _TUNSETOFFLOAD, int(offloads))
        except OSError:
            continue
        return offloads
    return Offload(0)
