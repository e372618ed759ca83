"""The process inside: it makes the namespaces, gives them a device for all ordinary traffic, and is then their helper.

It is started as an ordinary user and has every right over its own namespaces, none over the host. The first message on
its standard input, a socketpair, says what was made, and passes descriptors; what follows is the root helper's own
protocol, for which nothing is different but the names: /etc/resolv.conf is another file in this mount namespace alone.
What it keeps is in a directory that goes with it. A thread answers, on a connection of its own, where this namespace's
kernel sends packets.
"""

import asyncio
import contextlib
import os
import socket
from contextlib import closing
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread
from typing import Any

from tpvpn.errors import PrivilegeError, TpvpnError
from tpvpn.helper import background, kernel, protocol, root
from tpvpn.netlink import RouteSocket
from tpvpn.route.fib import Nexthop, Route
from tpvpn.route.netlink import ask, read_view
from tpvpn.route.operations import SCOPE_LINK, Operation
from tpvpn.route.prefix import DEFAULT
from tpvpn.sandbox import namespaces
from tpvpn.tun import CLONE_DEVICE, Tun, open_tun

DEVICE = "laptop0"
ADDRESSES = ("192.0.0.2", "fdb9:7a2c:31e4::2")
"""Of what is local to a host alone (RFC 7335), and a unique local one: with that, IPv4 is preferred (RFC 6724 section
6), as on a host whose network has no IPv6."""
MTU = 1500
QUEUE_LENGTH = 1000
FILE = "/etc/resolv.conf"
_ASKED_BEFORE = ("/run/systemd/resolve/io.systemd.Resolve", "/run/nscd/socket")
"""Sockets that the resolver library asks before it reads FILE (nss-resolve(8), nscd(8)): they know the host's names."""


class SandboxHelper(root.Helper):
    """The helper of one sandbox, whose files are in the directory of a descriptor."""

    def __init__(self, user: background.User, directory: int) -> None:
        super().__init__(user)
        self._resolver = Path(f"/proc/self/fd/{directory}/resolv.conf")

    def _set_resolved(self, request: protocol.SetResolved) -> str | None:
        return "systemd-resolved answers the host, not this network namespace"

    def _take_file(self, search: tuple[str, ...]) -> dict[str, object]:
        """Have FILE name us, also when the host has put another in its place, which uncovers that one (rename(2))."""
        others = [line for line in _text().splitlines() if line.split()[:1] in (["options"], ["sortlist"])]
        lines = [f"nameserver {self._own_address()}", *([f"search {' '.join(search)}"] if search else []), *others]
        _have_file_read()
        try:
            self._resolver.write_text("\n".join([*lines, ""]))
            if not _stands_for(self._resolver, FILE):
                namespaces.bind(str(self._resolver), FILE)
        except OSError as error:
            raise TpvpnError(f"{FILE} cannot be another one inside: {error.strerror}") from error
        return {"path": FILE, "how": "mounted", "generation": 1}


def _text() -> str:
    with contextlib.suppress(OSError):
        return Path(FILE).read_text(errors="replace")
    return ""


def _stands_for(source: Path | str, target: str) -> bool:
    """Whether a file is in the place of another. OSError when that is not there."""
    return os.path.samestat(os.stat(source), os.stat(target))


def _open_device() -> tuple[Tun, tuple[str, ...]]:
    """The device of all that is not the cluster's, up and with the default routes; and the addresses that it has."""
    with closing(RouteSocket()) as netlink:
        netlink.set_up(socket.if_nametoindex("lo"))
    if CLONE_DEVICE.exists() and not os.access(CLONE_DEVICE, os.R_OK | os.W_OK):
        raise PrivilegeError(
            f"{CLONE_DEVICE} may not be opened by you: `tpvpn run` needs it as udev has it, open to everyone "
            f"(`chmod 666 {CLONE_DEVICE}`), or use `sudo tpvpn connect`"
        )
    tun = open_tun(DEVICE, offload=True)
    addresses = kernel.configure_tun(DEVICE, MTU, ADDRESSES, QUEUE_LENGTH)
    for address in addresses:
        version = 6 if ":" in address else 4
        scope = SCOPE_LINK if version == 4 else 0
        kernel.apply(Operation("add", Route(DEFAULT[version], nexthops=(Nexthop(DEVICE),), scope=scope)))
    return tun, addresses


def _let_ping() -> None:
    """Ping sockets for the one group that there is; where /proc/sys may not be written there are none (icmp(7))."""
    with contextlib.suppress(OSError):
        Path("/proc/sys/net/ipv4/ping_group_range").write_text(f"{os.getegid()} {os.getegid()}")


def _have_file_read() -> None:
    """Let nobody be asked for names before FILE is read: what is no socket cannot be connected to."""
    for path in _ASKED_BEFORE:
        with contextlib.suppress(OSError):
            if not _stands_for(os.devnull, path):
                namespaces.bind(os.devnull, path)


def _serve_kernel(connection: "Connection[Any, Any]") -> None:
    """Answer, for as long as there is anybody, where this namespace's kernel sends packets."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            hosts = connection.recv()
            try:
                connection.send(asyncio.run(read_view() if hosts is None else ask(hosts)))
            except (TpvpnError, OSError) as error:
                connection.send(error)


@dataclass(frozen=True, slots=True)
class Made:
    """What was made inside; the descriptors are passed on."""

    helper: SandboxHelper
    directory: int
    device: Tun
    addresses: tuple[str, ...]


def _make() -> Made:
    """Make everything. TpvpnError when something is forbidden or missing."""
    user = background.User(os.getppid(), os.geteuid(), os.getegid())
    namespaces.make()
    directory = namespaces.hidden_directory()
    os.environ["TPVPN_RUN_DIR"] = f"/proc/self/fd/{directory}"
    _have_file_read()
    _let_ping()
    return Made(SandboxHelper(user, directory), directory, *_open_device())


def _pass_on(connection: socket.socket, made: Made) -> "Connection[Any, Any]":
    """Tell of it, and hand over what the other end is to have; our end of the kernel's connection."""
    ours, theirs = socket.socketpair()
    changes = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
    entered = namespaces.descriptors()
    tun = made.device
    reply = {"pid": os.getpid(), "addresses": list(made.addresses), "offloads": int(tun.offloads)}
    passed = [*entered, made.directory, tun.fd, tun.prompt_fd, theirs.fileno(), changes.fileno()]
    socket.send_fds(connection, [protocol.pack_reply(reply)], passed)
    for descriptor in entered:
        os.close(descriptor)
    tun.close()  # it goes with the process outside
    theirs.close()
    changes.close()
    return Connection(ours.detach())


def main() -> None:
    """Be the inside of the sandbox of the process at the other end of standard input."""
    connection = background.take_connection()
    try:
        made = _make()
    except (TpvpnError, OSError) as error:
        said = error if isinstance(error, TpvpnError) else TpvpnError(f"the sandbox cannot be made: {error}")
        connection.send(protocol.pack_error(said))
        return
    background.detach()
    try:
        Thread(target=_serve_kernel, args=(_pass_on(connection, made),), daemon=True).start()
        root.serve(connection, made.helper)
    except ConnectionError:
        pass  # the other end closed before it read its answer
    finally:
        made.helper.close()


if __name__ == "__main__":
    main()
