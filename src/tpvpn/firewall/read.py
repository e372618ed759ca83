"""Reading the firewall of the calling thread's network namespace, as far as packets of ours may come to it.

It decides nothing and changes nothing. nf_tables is read by netlink; the tables of iptables-legacy by getsockopt, and
only those that are there already (/proc/net/ip_tables_names), since asking for another would load its module.
Both need CAP_NET_ADMIN, the names of the latter root besides, or CAP_DAC_READ_SEARCH. The standard library only: the
root helper reads.
"""

import os
import socket
import struct
from pathlib import Path
from typing import Literal

from tpvpn.firewall import legacy
from tpvpn.firewall.model import Firewall, Table
from tpvpn.firewall.nftables import read_nftables

_GET_INFO, _GET_ENTRIES = 64, 65  # IPT_SO_GET_INFO, IPT_SO_GET_ENTRIES; IPv6's have the same numbers
_INFO = struct.Struct("=32sI5I5III")
"""struct ipt_getinfo: name, hooks, first entries, policies, number of entries, size."""
_ENTRIES = struct.Struct("=32sI4x")
"""struct ipt_get_entries: name, size; the entries are aligned to 8 bytes."""
_FAMILIES: tuple[tuple[Literal["ip", "ip6"], str, int, int], ...] = (
    ("ip", "ip_tables_names", socket.AF_INET, socket.IPPROTO_IP),
    ("ip6", "ip6_tables_names", socket.AF_INET6, socket.IPPROTO_IPV6),
)


def read() -> Firewall:
    """The firewall as it is now; without tables where the kernel has neither kind.

    OSError EPERM without CAP_NET_ADMIN.
    """
    devices = {name: index for index, name in socket.if_nameindex()}
    nftables = read_nftables()
    try:
        return Firewall((*_legacy_tables(), *nftables), devices)
    except PermissionError:
        return Firewall(tuple(nftables), devices, complete=False)


def _legacy_tables() -> list[Table]:
    found: list[Table] = []
    for family, listing, domain, level in _FAMILIES:
        try:
            present = Path("/proc/thread-self/net", listing).read_text().split()
        except FileNotFoundError:
            continue
        for name in legacy.PRIORITIES:
            if name in present and (blob := _blob(name, domain, level)):
                found.append(legacy.table(family, blob))
    return found


def _blob(name: str, domain: int, level: int) -> legacy.Blob:
    """The table's entries; read again when it changed meanwhile."""
    # Any socket of the family will do (nf_getsockopt); a raw one would need CAP_NET_RAW besides.
    with socket.socket(domain, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as kernel:
        while True:
            asked = name.encode().ljust(_INFO.size, b"\0")
            _name, valid, *places, _count, size = _INFO.unpack(_ask(kernel, level, _GET_INFO, asked))
            asked = _ENTRIES.pack(name.encode(), size) + bytes(size)
            try:
                entries = _ask(kernel, level, _GET_ENTRIES, asked)[_ENTRIES.size :]
            except BlockingIOError:  # EAGAIN: the size is another one now
                continue
            begins = tuple(place if valid >> hook & 1 else legacy.NO_HOOK for hook, place in enumerate(places[:5]))
            return legacy.Blob(name, entries, begins, tuple(places[5:]))


def _ask(kernel: socket.socket, level: int, option: int, asked: bytes) -> bytes:
    """getsockopt(2) whose buffer holds a question too, which Python's own has no way to hand over."""
    import ctypes  # 2 MiB that a helper on a host without such tables does without

    buffer = ctypes.create_string_buffer(asked, len(asked))
    length = ctypes.c_uint32(len(asked))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.getsockopt(kernel.fileno(), level, option, buffer, ctypes.byref(length)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return buffer.raw[: length.value]
