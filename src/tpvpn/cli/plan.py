"""`tpvpn plan`: what connect would route, and what not and why; it changes nothing and needs no privilege."""

import argparse
import os
import sys

from tpvpn.cli import Commands
from tpvpn.cli.routing import add_routing_flags, routing
from tpvpn.errors import ConflictError


def add_parser(commands: Commands) -> None:
    """Add the command to the program's."""
    parser = commands.add_parser(
        "plan",
        help="show what connect would route, and every conflict with its way out",
        description="Show what connect would route, and every conflict with its way out. Changes nothing, needs no "
        "privilege. Exit code 3: connect would refuse.",
    )
    add_routing_flags(parser)
    parser.add_argument("--output", choices=("text", "json"), default="text", help="json: for other programs")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the plan on stdout; 0, or 3 when connect would refuse."""
    request = routing(arguments)

    import asyncio
    import json

    from tpvpn import rundir
    from tpvpn.report import as_json, as_text
    from tpvpn.router import Router

    plan = asyncio.run(Router(request, quiet).preview(rundir.DEFAULT_NAME))
    if arguments.output == "json":
        print(json.dumps(as_json(plan), indent=2))
    else:
        colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        print(as_text(plan, colour), end="")
    return 0 if plan.ok else ConflictError.exit_code


def quiet(_: str) -> None:
    """A plan that is only shown has nothing to say on the way."""
