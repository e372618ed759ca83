"""`tpvpn connect`: a session in the foreground, or around one command."""

import argparse
import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tpvpn.cli import Commands, notify, say
from tpvpn.cli.capturing import add_capture_flags, capture_of
from tpvpn.cli.cluster import access, add_cluster_flags, add_manager_flags, manager_options, request_of
from tpvpn.cli.naming import naming
from tpvpn.cli.routing import add_routing_flags, names_a_cluster
from tpvpn.errors import ConflictError, UsageError

if TYPE_CHECKING:
    from tpvpn.engine import Settings
    from tpvpn.keeper import Patience
    from tpvpn.transport.tcp import Direct


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "connect",
        help="give this laptop the cluster's subnets",
        description="Give this laptop the cluster's subnets until Ctrl-C, `tpvpn quit`, or the end of CMD.",
    )
    manager = parser.add_argument_group("manager")
    add_endpoint_flags(manager)
    add_manager_flags(manager)
    add_cluster_flags(parser)
    add_routing_flags(parser)
    parser.add_argument("--name", default="default", help="name of the session (default: default)")
    add_dns_flag(parser)
    add_link_flags(parser)
    add_capture_flags(parser)
    parser.add_argument("--ready-fd", type=int, metavar="N", help="write a line to this descriptor when ready")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- CMD", help="run this, then end the session")
    parser.set_defaults(run=_run)


def add_dns_flag(parser: argparse.ArgumentParser) -> None:
    """Add the flag that says how names are had."""
    parser.add_argument(
        "--dns",
        choices=("auto", "resolved", "file", "off"),
        default="auto",
        help="how programs come to the cluster's names: by systemd-resolved, by /etc/resolv.conf, as the host has it "
        "(auto, the default), or not at all",
    )


def add_link_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags about the connections that carry the session."""
    group = parser.add_argument_group("connections")
    group.add_argument("--links", type=int, default=1, metavar="N", help="connections that share the traffic (1)")
    group.add_argument(
        "--max-link-age", type=float, default=50.0, metavar="MIN", help="renew a connection before it is so old (50)"
    )
    group.add_argument(
        "--give-up-after", type=float, metavar="S", help="end the session when it had no connection for so long (never)"
    )


def _patience(arguments: argparse.Namespace) -> "Patience":
    """How connections are kept; UsageError when that makes no sense."""
    from tpvpn.keeper import Patience
    from tpvpn.proto.session import MOST_LINKS

    if not 1 <= arguments.links <= MOST_LINKS:
        raise UsageError(f"--links {arguments.links}: a session has 1 to {MOST_LINKS} connections")
    if not 0 < arguments.max_link_age < float("inf"):
        raise UsageError("--max-link-age wants minutes, more than 0")
    if arguments.give_up_after is not None and not arguments.give_up_after >= 0:
        raise UsageError("--give-up-after wants seconds, 0 or more")
    return Patience(arguments.give_up_after, 60 * arguments.max_link_age)


def add_endpoint_flags(group: "argparse._ArgumentGroup") -> None:  # pyright: ignore[reportPrivateUsage]
    """Add the flags of a manager that is named."""
    group.add_argument(
        "--manager", metavar="URL", help="tcp://HOST:PORT or tls://HOST:PORT (default: one in the cluster)"
    )
    group.add_argument("--token-file", metavar="F", help="file with a line `name: token` that the manager knows")
    group.add_argument("--tls-pin", metavar="sha256:…", help="SHA-256 of the manager's certificate")


def _run(arguments: argparse.Namespace) -> int:
    from tpvpn.cli.loop import run_fast

    command: list[str] = arguments.command
    if command and command[0] != "--":
        raise UsageError(f"unknown argument {command[0]!r}; a command to run stands behind `--`")
    return run_fast(_session(arguments, command[1:]))


async def _session(arguments: argparse.Namespace, argv: list[str]) -> int:
    """The session from start to end; the exit code."""
    from tpvpn import control
    from tpvpn.engine import Engine
    from tpvpn.helper import rights
    from tpvpn.helper.client import HelperClient, start_helper

    # Who has rights starts the helper first: what follows, reading files included, is then done without them.
    started = await start_helper() if rights.held() else None

    async def helper() -> HelperClient:
        return started or await start_helper()

    try:
        async with contextlib.AsyncExitStack() as stack:
            stopped: asyncio.Future[int] = asyncio.get_running_loop().create_future()
            command = Command(argv, stopped)
            handle_signals(command, stopped)
            preparing = asyncio.create_task(settings(arguments, stack))
            if not await first(preparing, stopped):
                await cancel(preparing)
                return stopped.result()
            engine, ready = Engine(preparing.result(), helper, say), asyncio.Event()
            running = asyncio.create_task(engine.run(ready))
            stack.push_async_callback(cancel, running)
            handles = control.Handles(engine.status, partial(stop, stopped, 0), engine.explain)
            if await first(asyncio.create_task(ready.wait()), running, stopped):
                async with control.serving(engine.directory, handles):
                    announce(arguments.ready_fd)
                    async with notify.serving():
                        command.start()
                        await first(running, stopped)
                    await command.end()
            await cancel(running)
            return stopped.result()
    except ConflictError as error:
        with contextlib.suppress(OSError):  # nobody reads it
            print(error.report, file=sys.stderr)
        raise
    finally:
        if started:
            await started.close()


async def cancel(task: "asyncio.Task[Any]") -> None:
    """End a task, if it has not ended; an error of its own is raised."""
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def first(hoped: "asyncio.Future[Any]", *others: "asyncio.Future[Any]") -> bool:
    """Wait for the first of them to be done; whether it is the one hoped for."""
    await asyncio.wait((hoped, *others), return_when=asyncio.FIRST_COMPLETED)
    return not any(other.done() for other in others)


def stop(stopped: "asyncio.Future[int]", code: int) -> None:
    if not stopped.done():
        stopped.set_result(code)


def handle_signals(command: "Command", stopped: "asyncio.Future[int]") -> None:
    """SIGINT and SIGTERM end the command when there is one, else (or the second time) the session."""

    def handle(number: int, code: int) -> None:
        if not command.signal(number):
            stop(stopped, code)

    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 0), (signal.SIGHUP, 0)):
        asyncio.get_running_loop().add_signal_handler(number, handle, number, code)


class Command:
    """The command behind `--`: its end is the session's, its exit code too. `options` say how it is started."""

    GRACE = 2.0
    """Seconds between SIGTERM and SIGKILL when the session ends first."""

    def __init__(
        self, argv: list[str], stopped: "asyncio.Future[int]", options: Mapping[str, Any] | None = None
    ) -> None:
        self._argv, self._stopped, self._options = argv, stopped, options or {}
        self._process: asyncio.subprocess.Process | None = None
        self._running: asyncio.Task[None] | None = None
        self._told: int | None = None

    def start(self) -> None:
        """Start it, if there is one."""
        if self._argv:
            self._running = asyncio.create_task(self._run())

    async def _run(self) -> None:
        try:
            self._process = await asyncio.create_subprocess_exec(*self._argv, **self._options)
            if self._told:  # it was running before this loop knew
                self._pass_on(self._told)
            code = await self._process.wait()
        except OSError as error:  # as a shell does: 127 not found, 126 not to be run
            say(f"cannot run {self._argv[0]}: {error.strerror}")
            code = 127 if isinstance(error, FileNotFoundError) else 126
        stop(self._stopped, code if code >= 0 else 128 - code)

    def signal(self, number: int) -> bool:
        """Pass a signal on, as soon as the command runs; False when there is none, or it was told before."""
        if not self._running or self._running.done() or self._told:
            return False
        self._told = number
        self._pass_on(number)
        return True

    def _pass_on(self, number: int) -> None:
        # Ctrl-C in a terminal reaches the command by itself.
        if self._process and (number != signal.SIGINT or not sys.stdin.isatty()):
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    async def end(self) -> None:
        """End it when the session has ended before it."""
        if self._running and not self._running.done():
            self._told = signal.SIGTERM
            self._pass_on(self._told)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.GRACE):
                    await asyncio.shield(self._running)
            if self._process and self._process.returncode is None:
                self._process.kill()
            await self._running


async def settings(arguments: argparse.Namespace, stack: contextlib.AsyncExitStack) -> "Settings":
    """What the options ask for, and what they leave to the cluster.

    Errors: UsageError when they make no sense, ClusterError when the cluster is needed and not to be reached.
    """
    from tpvpn.engine import Settings
    from tpvpn.wishes import Fixed, FromCluster

    make, patience = partial(request_of, arguments), _patience(arguments)
    session = partial(Settings, arguments.name, socket.gethostname(), links=arguments.links, patience=patience)
    session = partial(session, capture=await capture_of(arguments, stack, say))
    transport = direct(arguments)
    if names_a_cluster(arguments) and transport:
        fixed = Fixed(make(), naming(arguments))
        return session(transport, fixed, arguments.dns)
    from tpvpn.cluster import find, transport_to
    from tpvpn.kube.api import opened

    options = manager_options(arguments)
    cluster = await stack.enter_async_context(opened(access(arguments)))
    admins = await find(cluster, options)
    wishes = FromCluster(cluster, admins, make, partial(naming, arguments), say)
    await wishes.look()
    if transport is None:
        transport = await stack.enter_async_context(transport_to(cluster, admins, options, say))
    return session(transport, wishes, arguments.dns)


def direct(arguments: argparse.Namespace) -> "Direct | None":
    """The transport to a manager that is named."""
    from tpvpn.transport.tcp import Direct, parse_endpoint

    if arguments.manager:
        return Direct(parse_endpoint(arguments.manager, arguments.tls_pin), _token(arguments.token_file))
    if arguments.token_file or arguments.tls_pin:
        raise UsageError("--token-file and --tls-pin are for a manager that is named: give --manager URL")
    return None


def _token(file: str | None) -> bytes:
    from tpvpn.proto.token import ANONYMOUS, first_token

    if file is None:
        return next(iter(ANONYMOUS.values()))
    try:
        return first_token(Path(file).read_text())
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise UsageError(f"cannot read the token file {file}: {reason}") from error


def announce(ready_fd: int | None) -> None:
    """Tell whoever waits that the session is ready."""
    say("ready")
    if ready_fd is not None:
        with contextlib.suppress(OSError):
            os.write(ready_fd, b"ready\n")
            os.close(ready_fd)
