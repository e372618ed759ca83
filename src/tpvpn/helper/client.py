"""The user's side of the root helper: starting it, asking it, hearing of its end.

It knows how to come by the rights for it, and nothing of what is asked. There are four beginnings. An ordinary user:
sudo starts the helper, and may ask for a password. Root: the helper is a plain child. Root by sudo: the helper is a
child, and this process then becomes the user who called sudo. A service of an ordinary user's that was given
CAP_NET_ADMIN: the helper is a child that keeps it, and this process then drops it. So whoever had rights starts the
helper before anything else (`rights.held`), and has none left afterwards. In each case the helper goes into the
background, and all that joins the two processes is a socketpair.
"""

import asyncio
import logging
import os
import shlex
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tpvpn import privileged
from tpvpn.dns.file import Taken
from tpvpn.errors import PrivilegeError, TpvpnError
from tpvpn.helper import protocol, rights
from tpvpn.helper.protocol import (
    Announce,
    Apply,
    Claim,
    Cleanup,
    Guard,
    Look,
    OpenDns,
    OpenTun,
    Request,
    Reset,
    ResetAll,
    SetResolved,
    TakeFile,
    Watch,
)
from tpvpn.privileged import Seen
from tpvpn.route.operations import Operation
from tpvpn.route.prefix import Prefix
from tpvpn.tun import Tun
from tpvpn.wire.vnet import Offload

COMMAND = (sys.executable, "-I", "-m", "tpvpn.helper.root")
"""Isolated (-I), so that root imports nothing from the user's directories or environment."""
_Item = TypeVar("_Item")

_log = logging.getLogger(__name__)

PATIENCE = 10.0
"""Seconds the helper has to undo everything when asked to end."""


class Claimed(NamedTuple):
    """What the session may call its own."""

    device: str
    table: int
    directory: Path


class HelperClient:
    """A running helper. Each request waits for its answer; the error that it reports is raised.

    `closed` is done when the helper is gone, whatever the cause: then this process must end too.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._loop = asyncio.get_running_loop()
        self._connection = connection
        self._waiting: deque[asyncio.Future[tuple[bytes, list[int]]]] = deque()
        self.closed: asyncio.Future[None] = self._loop.create_future()
        connection.setblocking(False)
        self._loop.add_reader(connection, self._on_readable)

    async def claim(self, name: str) -> Claimed:
        """Become the session `name`. UsageError when it runs already, or the name is none."""
        reply, _ = await self._ask(Claim(name))
        return Claimed(reply["device"], reply["table"], Path(reply["directory"]))

    async def open_tun(
        self, *, mtu: int, addresses: Sequence[str], offload: bool, txqueuelen: int
    ) -> tuple[Tun, tuple[str, ...]]:
        """Open the session's TUN, up; gives the addresses that it now has (no IPv6 one where IPv6 is off).

        PrivilegeError without the device node or the right, UsageError when the device is in use.
        """
        reply, descriptors = await self._ask(OpenTun(mtu, tuple(addresses), offload, txqueuelen))
        fd, prompt_fd = descriptors
        return Tun(fd, prompt_fd, reply["device"], Offload(reply["offloads"])), tuple(reply["addresses"])

    async def guard(self) -> None:
        """Let nothing in from the TUN but answers to its addresses, as `nfnetlink.install_laptop_guard`."""
        await self._ask(Guard())

    async def apply(self, operations: Sequence[Operation]) -> None:
        """Do the operations in order; up to the first that fails, which is the error."""
        for some in _chunks(operations, protocol.OPERATIONS_LIMIT):
            await self._ask(Apply(some))

    async def look(self, prefixes: Sequence[Prefix]) -> Seen:
        """What only root sees of what these prefixes meet, as `privileged.look`, from the claim on."""
        answers = [await self._ask(Look(some)) for some in _chunks(prefixes, protocol.PREFIXES_LIMIT) or [()]]
        return privileged.merge(privileged.decode(reply) for reply, _ in answers)

    async def watch(self) -> socket.socket | None:
        """A socket that is readable when IPsec policies have changed (ENOBUFS is one more sign); None without IPsec."""
        _, descriptors = await self._ask(Watch())
        return socket.socket(fileno=descriptors[0]) if descriptors else None

    async def reset(self, withdrawn: Sequence[Prefix], routed: Sequence[Prefix]) -> int:
        """End the connections that lost their way, as `sockdiag.reset`, after `apply` has moved these prefixes.

        What of `withdrawn` is still routed into the tunnel, and what of `routed` is not (a never-proxy inside of it),
        is left alone. Gives how many there were.
        """
        limit = protocol.PREFIXES_LIMIT
        pairs = zip_longest(_chunks(withdrawn, limit), _chunks(routed, limit), fillvalue=())
        return sum([(await self._ask(Reset(*pair)))[0]["destroyed"] for pair in pairs])

    async def reset_all(self) -> int:
        """End all connections through the tunnel, whose other ends know them no more; how many there were."""
        return (await self._ask(ResetAll()))[0]["destroyed"]

    async def open_dns(self) -> list[socket.socket]:
        """Sockets of port 53 of the TUN's addresses: of each a UDP socket, and a TCP one that listens.

        TpvpnError when another program has the port, PrivilegeError without the right to it.
        """
        _, descriptors = await self._ask(OpenDns())
        return [socket.socket(fileno=one) for one in descriptors]

    async def announce(self, suffixes: Sequence[str]) -> None:
        """Let other sessions of this host know below which suffixes we have names."""
        await self._ask(Announce(tuple(suffixes)[: protocol.DOMAINS_LIMIT]))

    async def set_resolved(self, search: Sequence[str], domains: Sequence[str]) -> str | None:
        """Have systemd-resolved ask us for names below these, of as many as it takes; why not, or None when it does."""
        some, more = tuple(search)[: protocol.SEARCH_LIMIT], tuple(domains)[: protocol.DOMAINS_LIMIT]
        return (await self._ask(SetResolved(some, more)))[0]["because"]

    async def take_file(self, search: Sequence[str]) -> Taken:
        """Have /etc/resolv.conf name us; PrivilegeError when it cannot be changed."""
        reply, _ = await self._ask(TakeFile(tuple(search)[: protocol.SEARCH_LIMIT]))
        return Taken(Path(reply["path"]), reply["how"], reply["generation"])

    async def cleanup(self) -> list[str]:
        """Undo what dead sessions of this network namespace left; gives what was removed, in words. Needs no claim."""
        reply, _ = await self._ask(Cleanup())
        return reply["removed"]

    async def close(self) -> None:
        """Let the helper undo everything and end; returns when it has."""
        if not self.closed.done():
            self._connection.shutdown(socket.SHUT_WR)
            try:
                async with asyncio.timeout(PATIENCE):
                    await asyncio.shield(self.closed)
            except TimeoutError:
                raise TpvpnError(f"the root helper did not end within {PATIENCE:.0f} s: see `ip rule`") from None

    async def _ask(self, request: Request) -> tuple[dict[str, Any], list[int]]:
        if self.closed.done():
            raise _gone()
        _log.debug("%.400s", request)
        answer: asyncio.Future[tuple[bytes, list[int]]] = self._loop.create_future()
        self._waiting.append(answer)
        try:
            self._connection.send(protocol.pack_request(request))
        except OSError:
            self._end()
        data, descriptors = await answer
        return protocol.parse_reply(data), descriptors

    def _on_readable(self) -> None:
        try:
            data, descriptors = receive(self._connection, 4)
        except BlockingIOError:
            return
        except OSError:
            data, descriptors = b"", list[int]()
        if not data or not self._waiting:
            self._end()
            return
        answer = self._waiting.popleft()
        if answer.done():  # whoever asked was cancelled
            for descriptor in descriptors:
                os.close(descriptor)
        else:
            answer.set_result((data, descriptors))

    def _end(self) -> None:
        if self.closed.done():
            return
        self._loop.remove_reader(self._connection)
        self._connection.close()
        for answer in self._waiting:
            if not answer.done():
                answer.set_exception(_gone())
        self._waiting.clear()
        self.closed.set_result(None)


def receive(connection: socket.socket, most: int) -> tuple[bytes, list[int]]:
    """A message of a helper's, with its descriptors, which no command inherits: one must not hold the TUN open."""
    data, descriptors, _, _ = socket.recv_fds(connection, protocol.MESSAGE_LIMIT, most)
    for descriptor in descriptors:  # recv_fds ignores MSG_CMSG_CLOEXEC
        os.set_inheritable(descriptor, False)
    return data, descriptors


def _gone() -> TpvpnError:
    return TpvpnError("the root helper ended, and with it the tunnel: connect again")


def _chunks(items: Sequence[_Item], limit: int) -> list[tuple[_Item, ...]]:
    return [tuple(items[start : start + limit]) for start in range(0, len(items), limit)]


async def clean_up(*, ask: bool = True) -> list[str]:
    """Undo what dead sessions left, in words. PrivilegeError when the rights for it cannot be had."""
    helper = await start_helper(ask=ask)
    try:
        return await helper.cleanup()
    finally:
        await helper.close()


async def start_helper(*, ask: bool = True, stderr: int | None = None) -> HelperClient:
    """Start the root helper; this process is an ordinary user's when it returns, unless that is root.

    `ask`: sudo may want a password of whoever sits at the terminal. `stderr`: what it has in the place of our own,
    which it would hold open for as long as it lives. PrivilegeError when the rights cannot be had.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        with theirs:
            await _launch(theirs, ask, stderr)
        rights.give_up()
        return HelperClient(ours)
    except BaseException:
        ours.close()
        raise


async def _launch(connection: socket.socket, ask: bool, stderr: int | None) -> None:
    """Run the command that puts the helper into the background, and wait for it to end."""
    sudo = () if rights.held() else ("sudo", "--") if ask and _has_terminal() else ("sudo", "-n", "--")
    try:
        # What starts it may wait for a password: the loop goes on meanwhile.
        command = await asyncio.create_subprocess_exec(
            *sudo, *COMMAND, stdin=connection.fileno(), stdout=subprocess.DEVNULL, stderr=stderr
        )
    except FileNotFoundError:
        raise PrivilegeError(
            "tpvpn needs root's rights for its helper, and sudo is not installed: start tpvpn as root"
        ) from None
    if code := await command.wait():
        if not sudo:
            raise PrivilegeError(
                f"the root helper could not start (exit code {code}): `{shlex.join(COMMAND)}` says why"
            )
        raise PrivilegeError(
            f"sudo did not start the root helper (exit code {code}): run `{_by_sudo()}` in a terminal, or have "
            f"`{shlex.join(COMMAND)}` allowed to you in sudoers"
        )


def _by_sudo() -> str:
    """This very command with sudo in front, whose PATH is another one, and which forgets KUBECONFIG."""
    keep = ("--preserve-env=KUBECONFIG",) if "KUBECONFIG" in os.environ else ()
    return shlex.join(("sudo", *keep, sys.executable, "-m", "tpvpn", *sys.argv[1:]))


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True
