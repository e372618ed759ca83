"""A session of the command line, from start to end: what the options ask for, signals, what is said of it.

`connect` and `run` have it in common; they differ in where the session works and in who has the rights.
"""

import argparse
import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tpvpn.cli import notify
from tpvpn.cli.capturing import capture_of
from tpvpn.cli.cluster import access, manager_options, request_of, wishes_of
from tpvpn.cli.command import Command
from tpvpn.cli.naming import naming
from tpvpn.cli.routing import names_a_cluster
from tpvpn.errors import ConflictError, TpvpnError, UsageError

if TYPE_CHECKING:
    from tpvpn.cli.detach import Waiting
    from tpvpn.cli.display import Display
    from tpvpn.engine import Engine, Settings
    from tpvpn.events import Events
    from tpvpn.helper.client import HelperClient
    from tpvpn.keeper import Patience
    from tpvpn.place import Place
    from tpvpn.transport.tcp import Direct


async def told(arguments: argparse.Namespace, events: "Events", lasting: Awaitable[int]) -> int:
    """The exit code of a session, which is told of, as every error is."""
    try:
        code = await lasting
    except TpvpnError as error:
        if isinstance(error, ConflictError) and arguments.output == "text":
            with contextlib.suppress(OSError):  # nobody reads it
                print(error.report, file=sys.stderr)
        events.tell("ended", exit_code=error.exit_code, error=str(error))
        raise
    events.tell("ended", exit_code=code)
    return code


async def lasting(
    arguments: argparse.Namespace,
    command: Command,
    events: "Events",
    display: "Display",
    helper: "Callable[[], Awaitable[HelperClient]]",
    place: "Place",
    waiting: "Waiting | None" = None,
) -> int:
    """The session while it lasts, and the command in it; the exit code. `waiting`: to be left when it is ready."""
    from tpvpn import control
    from tpvpn.cli.log import SessionLog
    from tpvpn.engine import Engine
    from tpvpn.place import HERE

    log = SessionLog(arguments.name if place is HERE else "run")
    events.listen(log.on_event)
    stopped, hurried = command.stopped, asyncio.Event()
    _handle_signals(command, hurried)
    if waiting:
        waiting.watch(partial(_stop, stopped, 130))
    async with contextlib.AsyncExitStack() as stack:
        preparing = asyncio.create_task(_settings(arguments, stack, events, hurried))
        if not await _first(preparing, stopped):
            await _cancel(preparing)
            return stopped.result()
        engine, ready = Engine(preparing.result(), helper, events, place), asyncio.Event()
        running = asyncio.create_task(engine.run(ready))
        stack.push_async_callback(_cancel, running)
        status, stop = log.beside(engine.status), partial(_stop, stopped, 0)
        handles = control.Handles(status, stop, engine.explain, engine.measure)
        if await _first(asyncio.create_task(ready.wait()), running, stopped):
            async with control.serving(engine.directory, handles):
                _announce(arguments.ready_fd, engine, events)
                if waiting:
                    waiting.leave()
                async with notify.serving(), display.running(engine.status):
                    command.start()
                    await _first(running, stopped)
                await command.end()
            if stopped.done() and not command.argv:
                events.say(_summary(engine.status()))
        await _cancel(running)
        return stopped.result()


async def _cancel(task: "asyncio.Task[Any]") -> None:
    """End a task, if it has not ended; an error of its own is raised."""
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def _first(hoped: "asyncio.Future[Any]", *others: "asyncio.Future[Any]") -> bool:
    """Wait for the first of them to be done; whether it is the one hoped for."""
    await asyncio.wait((hoped, *others), return_when=asyncio.FIRST_COMPLETED)
    return not any(other.done() for other in others)


def _stop(stopped: "asyncio.Future[int]", code: int) -> None:
    if not stopped.done():
        stopped.set_result(code)


def _handle_signals(command: Command, hurried: asyncio.Event) -> None:
    """SIGINT and SIGTERM end the command when there is one, else (or the second time) the session; then at once."""

    def handle(number: int, code: int) -> None:
        if command.stopped.done():
            hurried.set()
        elif not command.signal(number):
            _stop(command.stopped, code)

    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 0), (signal.SIGHUP, 0)):
        asyncio.get_running_loop().add_signal_handler(number, handle, number, code)


async def _settings(
    arguments: argparse.Namespace, stack: contextlib.AsyncExitStack, events: "Events", hurried: asyncio.Event
) -> "Settings":
    """What the options ask for, and what they leave to the cluster.

    Errors: UsageError when they make no sense, ClusterError when the cluster is needed and not to be reached.
    """
    from tpvpn.engine import Settings
    from tpvpn.wishes import Fixed

    session = partial(
        Settings, arguments.name, socket.gethostname(), links=arguments.links, patience=_patience(arguments)
    )
    session = partial(session, capture=await capture_of(arguments, stack, events.say))
    transport = direct(arguments)
    if names_a_cluster(arguments) and transport:
        return session(transport, Fixed(request_of(arguments), naming(arguments)), arguments.dns)
    from tpvpn.cluster import find, transport_to
    from tpvpn.kube.api import opened

    options = manager_options(arguments)
    with events.step("API server") as detail:
        cluster = await stack.enter_async_context(opened(access(arguments)))
        admins = await find(cluster, options)
        detail.short = cluster.server
    with events.step("subnets") as detail:
        wishes = await wishes_of(arguments, cluster, admins, events.say)
        detail.short = ", ".join(str(wanted.prefix) for wanted in wishes.request.wanted)
    if transport is None:
        transport = await stack.enter_async_context(transport_to(cluster, admins, options, events.say, hurried))
    return session(transport, wishes, arguments.dns)


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


def _announce(ready_fd: int | None, engine: "Engine", events: "Events") -> None:
    """Tell whoever waits that the session is ready."""
    events.tell("ready", "ready", session=engine.status())
    if ready_fd is not None:
        with contextlib.suppress(OSError):
            os.write(ready_fd, b"ready\n")
            os.close(ready_fd)


def _summary(status: dict[str, Any]) -> str:
    """What became of a session that has ended."""
    from tpvpn.cli.view import lasted
    from tpvpn.report import size

    traffic, again = status["traffic"], status["reconnects"]
    carried = f"sent {size(traffic['sent_bytes'])}, received {size(traffic['received_bytes'])}"
    return f"session {status['name']} lasted {lasted(status)}, {carried}" + (
        f", connected again {again}x" if again else ""
    )
