"""The sockets at which programs of this host ask for names: port 53 of the session's own addresses, which is root's."""

import errno
import socket
from collections.abc import Sequence

from tpvpn.errors import PrivilegeError, TpvpnError

PORT = 53
BACKLOG = 128


def open_dns(addresses: Sequence[str]) -> list[int]:
    """Descriptors, the caller's to close: of each address a UDP socket, and a TCP one that listens.

    TpvpnError when another program has the port, PrivilegeError without the right to it.
    """
    opened = list[socket.socket]()
    try:
        for address in addresses:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
                one = socket.socket(family, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
                opened.append(one)
                if kind == socket.SOCK_STREAM:
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                one.bind((address, PORT))
                if kind == socket.SOCK_STREAM:
                    one.listen(BACKLOG)
        return [one.detach() for one in opened]
    except OSError as error:
        raise _refusal(error) from error
    finally:
        for one in opened:
            one.close()


def _refusal(error: OSError) -> TpvpnError:
    if error.errno == errno.EADDRINUSE:
        return TpvpnError(
            "another DNS server of this host has port 53 of every address: have it listen on its own alone (dnsmasq: "
            "bind-dynamic; named, unbound: their interface options), `ss -lun sport = :53` names it"
        )
    if error.errno == errno.EACCES:
        return PrivilegeError("port 53 needs CAP_NET_BIND_SERVICE: start tpvpn by sudo, or give its service that too")
    return TpvpnError(f"port 53 of the tunnel's addresses cannot be had: {error.strerror}")
