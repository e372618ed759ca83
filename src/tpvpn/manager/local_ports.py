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
    pieces = -(-(high - low) // _PIECE)
    number = 0
    for piece in random.sample(range(pieces), min(pieces, _PIECES)):
        first = low + piece * _PIECE
        last = min(first + _PIECE, high) - 1
        try:
            opened.setsockopt(socket.IPPROTO_IP, _IP_LOCAL_PORT_RANGE, _BOUNDS.pack(last << 16 | first))
        except OSError:
            return opened.connect_ex((address, port))
        number = opened.connect_ex((address, port))
        if number != errno.EADDRNOTAVAIL:
            break
    return number


@functools.cache
def _range() -> tuple[int, int]:
    """The first port and the one behind the last, as they were with the first connection.

    When the sysctl changes, the kernel takes no port from outside of what it is then.
    """
    low, high = _RANGE.read_text().split()
    return int(low), int(high) + 1
