"""`tpvpn connect`: a session in the foreground, or around one command."""

import argparse
import asyncio
from typing import TYPE_CHECKING

from tpvpn.cli import Commands
from tpvpn.cli.capturing import add_capture_flags
from tpvpn.cli.cluster import add_cluster_flags, add_manager_flags
from tpvpn.cli.routing import add_routing_flags
from tpvpn.cli.verbosity import add_verbosity
from tpvpn.errors import UsageError

if TYPE_CHECKING:
    from tpvpn.cli.detach import Waiting
    from tpvpn.helper.client import HelperClient


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "connect",
        help="give this laptop the cluster's subnets",
        description="Give this laptop the cluster's subnets until Ctrl-C, `tpvpn quit`, or the end of CMD.",
    )
    add_session_flags(parser)
    parser.add_argument("--name", default="default", help="name of the session (default: default)")
    parser.add_argument(
        "--output",
        choices=("text", "json"),
        default="text",
        help="text: steps and a live view in a terminal, else lines; json: a JSON object for each event, a line each",
    )
    parser.add_argument(
        "--detach", action="store_true", help="return when it is ready, and let the session go on in the background"
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- CMD", help="run this, then end the session")
    parser.set_defaults(run=_run)


def add_session_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of every session: to which manager, for which subnets and names, by which connections."""
    manager = parser.add_argument_group("manager")
    add_endpoint_flags(manager)
    add_manager_flags(manager)
    add_cluster_flags(parser)
    add_routing_flags(parser)
    parser.add_argument(
        "--dns",
        choices=("auto", "resolved", "file", "off"),
        default="auto",
        help="how programs come to the cluster's names: by systemd-resolved, by /etc/resolv.conf, as the host has it "
        "(auto, the default), or not at all",
    )
    _add_link_flags(parser)
    add_capture_flags(parser)
    parser.add_argument("--quiet", "-q", action="store_true", help="show warnings and changed routes only")
    add_verbosity(parser)
    parser.add_argument("--ready-fd", type=int, metavar="N", help="write a line to this descriptor when ready")


def _add_link_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags about the connections that carry the session."""
    group = parser.add_argument_group("connections")
    group.add_argument("--links", type=int, default=1, metavar="N", help="connections that share the traffic (1)")
    group.add_argument(
        "--max-link-age", type=float, default=50.0, metavar="MIN", help="renew a connection before it is so old (50)"
    )
    group.add_argument(
        "--give-up-after", type=float, metavar="S", help="end the session when it had no connection for so long (never)"
    )


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
    if not arguments.detach:
        return run_fast(_session(arguments, command[1:]))
    if command:
        raise UsageError("--detach is for a session without a command: leave out one of them")
    from tpvpn.cli import detach

    waiting = detach.fork(arguments.ready_fd)
    return waiting if isinstance(waiting, int) else run_fast(_session(arguments, [], waiting))


async def _session(arguments: argparse.Namespace, argv: list[str], waiting: "Waiting | None" = None) -> int:
    """The session on this host; the exit code. `waiting`: to be left when it is ready."""
    from tpvpn.cli.command import Command
    from tpvpn.cli.display import chosen
    from tpvpn.cli.session import lasting, told
    from tpvpn.events import Events
    from tpvpn.helper import rights
    from tpvpn.helper.client import start_helper
    from tpvpn.place import HERE

    # Who has rights starts the helper first: what follows, reading files included, is then done without them.
    stderr = waiting.stderr if waiting else None
    started = await start_helper(stderr=stderr) if rights.held() else None

    async def helper() -> "HelperClient":
        return started or await start_helper(stderr=stderr)

    display = chosen(arguments.output, arguments.quiet, bool(argv or waiting or arguments.verbose))
    events, command = Events(display.on_event), Command(argv, asyncio.get_running_loop().create_future())
    try:
        return await told(arguments, events, lasting(arguments, command, events, display, helper, HERE, waiting))
    finally:
        if started:
            await started.close()
