"""Where the kernel looks for a connection's local port: in a small piece of the range, another one for each connection.

Left alone it tries one port after the other (__inet_hash_connect in net/ipv4/inet_hashtables.c). Once most have a
connection to the same target, in TIME-WAIT too, that takes milliseconds, in which no other session is served.
"""

import errno
import functools
import random
import socket
import struct
from pathlib import Path

_IP_LOCAL_PORT_RANGE = 51  # linux/in.h, from 6.3 on; also for IPv6
_BOUNDS = struct.Struct("=I")
_PIECE, _PIECES = 256, 4
_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def connect(opened: socket.socket, address: str, port: int) -> int:
    """Begin to connect: 0 or the errno; EADDRNOTAVAIL when no port was found for this target."""
    low, high = _range()
    number = 0
    for _ in range(_PIECES):
        if high - low > _PIECE:
            start = random.randrange(low, high - _PIECE)
            bounds = _BOUNDS.pack(start + _PIECE - 1 << 16 | start)
            try:
                opened.setsockopt(socket.IPPROTO_IP, _IP_LOCAL_PORT_RANGE, bounds)
            except OSError:
                return opened.connect_ex((address, port))
        number = opened.connect_ex((address, port))
        if number != errno.EADDRNOTAVAIL:
            break
    return number


@functools.cache
def _range() -> tuple[int, int]:
    """As it was with the first connection: when it changes, the kernel takes no piece from outside."""
    low, high = _RANGE.read_text().split()
    return int(low), int(high) + 1
