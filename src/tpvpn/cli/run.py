"""`tpvpn run -- CMD`: one command with the cluster's subnets and names, without any right of the host."""

import argparse
import asyncio
import contextlib
from functools import partial

from tpvpn.cli import Commands, say
from tpvpn.cli.capturing import add_capture_flags
from tpvpn.cli.cluster import add_cluster_flags, add_manager_flags
from tpvpn.cli.connect import (
    Command,
    add_dns_flag,
    add_endpoint_flags,
    add_link_flags,
    announce,
    cancel,
    first,
    handle_signals,
    settings,
    stop,
)
from tpvpn.cli.routing import add_routing_flags
from tpvpn.errors import UsageError
from tpvpn.rundir import DEFAULT_NAME


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "run",
        help="give one command the cluster's subnets, without root",
        description="Run CMD in a user and network namespace of its own: the cluster through the tunnel, everything "
        "else as this laptop has it. It needs no root, and changes nothing of the laptop.",
    )
    manager = parser.add_argument_group("manager")
    add_endpoint_flags(manager)
    add_manager_flags(manager)
    add_cluster_flags(parser)
    add_routing_flags(parser)
    add_dns_flag(parser)
    add_link_flags(parser)
    add_capture_flags(parser)
    parser.add_argument("--ready-fd", type=int, metavar="N", help="write a line to this descriptor when ready")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- CMD", help="what is run")
    parser.set_defaults(run=_run, name=DEFAULT_NAME)


def _run(arguments: argparse.Namespace) -> int:
    from tpvpn.cli.loop import run_fast
    from tpvpn.helper import rights

    command: list[str] = arguments.command
    if command[:1] != ["--"] or not command[1:]:
        raise UsageError("say what to run behind `--`, for example `tpvpn run -- curl http://web.default`")
    if arguments.dns == "resolved":
        raise UsageError("systemd-resolved answers this host, not what `tpvpn run` runs: leave out --dns resolved")
    rights.give_up()  # by sudo or not, the command is its caller's
    return run_fast(_session(arguments, command[1:]))


async def _session(arguments: argparse.Namespace, argv: list[str]) -> int:
    """The sandbox, the session, and the command in it from start to end; the exit code."""
    from tpvpn import control
    from tpvpn.engine import Engine
    from tpvpn.helper.client import HelperClient
    from tpvpn.sandbox.sandbox import opened

    async with contextlib.AsyncExitStack() as stack:
        sandbox = await stack.enter_async_context(opened())

        async def helper() -> HelperClient:
            return sandbox.helper

        stopped: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        command = Command(argv, stopped, sandbox.command)
        handle_signals(command, stopped)
        preparing = asyncio.create_task(settings(arguments, stack))
        if not await first(preparing, stopped):
            await cancel(preparing)
            return stopped.result()
        engine, ready = Engine(preparing.result(), helper, say, sandbox.place), asyncio.Event()
        running = asyncio.create_task(engine.run(ready))
        stack.push_async_callback(cancel, running)
        handles = control.Handles(engine.status, partial(stop, stopped, 0), engine.explain)
        if await first(asyncio.create_task(ready.wait()), running, stopped):
            async with control.serving(engine.directory, handles):
                announce(arguments.ready_fd)
                command.start()
                await first(running, stopped)
                await command.end()
        await cancel(running)
        return stopped.result()
