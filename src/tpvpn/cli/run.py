"""`tpvpn run -- CMD`: one command with the cluster's subnets and names, without any right of the host."""

import argparse
import asyncio
from typing import TYPE_CHECKING

from tpvpn.cli import Commands
from tpvpn.cli.connect import add_session_flags
from tpvpn.errors import UsageError
from tpvpn.rundir import DEFAULT_NAME

if TYPE_CHECKING:
    from tpvpn.helper.client import HelperClient


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "run",
        help="give one command the cluster's subnets, without root",
        description="Run CMD in a user and network namespace of its own: the cluster through the tunnel, everything "
        "else as this laptop has it. It needs no root, and changes nothing of the laptop.",
    )
    add_session_flags(parser)
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- CMD", help="what is run")
    parser.set_defaults(run=_run, name=DEFAULT_NAME, output="text")


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
    from tpvpn.cli.command import Command
    from tpvpn.cli.display import chosen
    from tpvpn.cli.session import lasting, told
    from tpvpn.events import Events
    from tpvpn.sandbox.sandbox import opened

    display = chosen("text", arguments.quiet, around_command=True)
    events = Events(display.on_event)
    async with opened() as sandbox:

        async def helper() -> "HelperClient":
            return sandbox.helper

        command = Command(argv, asyncio.get_running_loop().create_future(), sandbox.command)
        return await told(arguments, events, lasting(arguments, command, events, display, helper, sandbox.place))
