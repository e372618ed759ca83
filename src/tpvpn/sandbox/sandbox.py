"""The process outside of a sandbox: it starts the one inside, and is its way to this host's network.

The session itself stays outside: it reads kubeconfigs, dials, and asks for names as any program of this host does, so
nothing of that is slower or another than with `connect`. What it takes from inside are descriptors: the devices, and
sockets, which belong to the network namespace in which they were made. Nothing is left behind: namespaces and devices
go with the processes.
"""

import asyncio
import contextlib
import os
import resource
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tpvpn.dns.policy import Neighbour
from tpvpn.errors import PrivilegeError, TpvpnError
from tpvpn.helper import protocol
from tpvpn.helper.client import Claimed, HelperClient, receive
from tpvpn.place import Place
from tpvpn.route.changes import Changes
from tpvpn.route.fib import Route, View
from tpvpn.route.prefix import Prefix
from tpvpn.sandbox.namespaces import KINDS, entering
from tpvpn.sandbox.ordinary import Ordinary
from tpvpn.sandbox.resolver import SandboxResolver
from tpvpn.tun import Tun
from tpvpn.wire.vnet import Offload

COMMAND = (sys.executable, "-I", "-m", "tpvpn.sandbox.inside")
PATIENCE = 10.0
"""Seconds for the making of everything inside."""


@dataclass(frozen=True, slots=True)
class Sandbox:
    """A sandbox that is there: `command` is how a process is started in it, for asyncio.create_subprocess_exec."""

    helper: HelperClient
    place: Place
    command: Mapping[str, Any]


class SandboxClient(HelperClient):
    """The helper inside, whose files are found by its process alone."""

    def __init__(self, connection: socket.socket, pid: int) -> None:
        super().__init__(connection)
        self._pid = pid

    async def claim(self, name: str) -> Claimed:
        """As HelperClient's; the directory as it is seen from outside."""
        claimed = await super().claim(name)
        return claimed._replace(directory=Path(f"/proc/{self._pid}") / claimed.directory.relative_to("/proc/self"))


class SandboxKernel:
    """What the kernel of the sandbox's network namespace says; asked in a thread, one question after the other."""

    def __init__(self, connection: "Connection[Any, Any]") -> None:
        self._connection, self._lock = connection, threading.Lock()

    async def read_view(self) -> View:
        """All that the kernel would look at."""
        return await asyncio.to_thread(self._exchange, None)

    async def ask(self, hosts: Sequence[Prefix]) -> list[Route | None]:
        """Where a packet to each of these hosts would go; None where there is no route."""
        return await asyncio.to_thread(self._exchange, list(hosts))

    def _exchange(self, question: list[Prefix] | None) -> Any:
        with self._lock:
            try:
                self._connection.send(question)
                answer = self._connection.recv()
            except (EOFError, OSError) as error:
                raise TpvpnError("the sandbox has ended") from error
        if isinstance(answer, BaseException):
            raise answer
        return answer


@contextlib.asynccontextmanager
async def opened() -> AsyncGenerator[Sandbox]:
    """A sandbox for as long as the context lasts; PrivilegeError names what forbids it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(ours.close)
        with theirs:
            inside = await asyncio.create_subprocess_exec(*COMMAND, stdin=theirs.fileno(), stdout=subprocess.DEVNULL)
        await inside.wait()
        told, descriptors = await _hear(ours)
        namespaces, (state, fd, prompt_fd, kernel, events) = descriptors[: len(KINDS)], descriptors[len(KINDS) :]
        for one in (*namespaces, state):
            stack.callback(os.close, one)
        stack.callback((connection := Connection(kernel)).close)
        tun = Tun(fd, prompt_fd, "", Offload(told["offloads"]))
        stack.callback(tun.close)
        command = {
            "preexec_fn": _with_limits(entering(namespaces, os.getcwd())),
            "pass_fds": (state,),  # for `tpvpn status` and `why` in the command
            "env": os.environ | {"TPVPN_RUN_DIR": f"/proc/self/fd/{state}"},
        }
        ordinary = Ordinary(tun, told["addresses"])
        stack.callback(ordinary.stop)
        ordinary.start()
        helper = SandboxClient(ours, told["pid"])
        stack.push_async_callback(helper.close)
        changes = socket.socket(fileno=events)
        stack.callback(changes.close)
        place = Place(SandboxKernel(connection), lambda: Changes(changes), SandboxResolver, _nothing, _alone)
        yield Sandbox(helper, place, command)


async def _hear(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """What the process inside tells first, and its descriptors; its error is raised."""
    connection.setblocking(False)
    loop, readable = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(connection, readable.set)
    try:
        async with asyncio.timeout(PATIENCE):
            await readable.wait()
        data, descriptors = receive(connection, len(KINDS) + 5)
    except (TimeoutError, ConnectionError):
        data, descriptors = b"", []
    finally:
        loop.remove_reader(connection)
    if not data:
        raise PrivilegeError("the sandbox could not be made: what is above says why")
    return protocol.parse_reply(data), descriptors


def _with_limits(enter: Callable[[], None]) -> Callable[[], None]:
    """Have as many descriptors as this process may, one for each connection; a command has what it would have had."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))

    def enter_with_limits() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        enter()

    return enter_with_limits


def _alone(name: str, table: int) -> tuple[Neighbour, ...]:
    """No other session has names inside."""
    return ()


async def _nothing() -> None:
    """What a helper that was ended has left is gone with its namespace."""
