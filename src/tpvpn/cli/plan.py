"""`tpvpn plan`: what connect would route, and what not and why; it changes nothing and needs no privilege."""

import argparse
import os
import sys
from typing import TYPE_CHECKING

from tpvpn.cli import Commands
from tpvpn.cli.cluster import access, add_cluster_flags
from tpvpn.cli.routing import add_routing_flags, given, routing
from tpvpn.errors import ConflictError

if TYPE_CHECKING:
    from tpvpn.route.verdict import Wanted


def add_parser(commands: Commands) -> None:
    """Add the command to the program's."""
    parser = commands.add_parser(
        "plan",
        help="show what connect would route, and every conflict with its way out",
        description="Show what connect would route, and every conflict with its way out. Changes nothing, needs no "
        "privilege. Exit code 3: connect would refuse.",
    )
    add_cluster_flags(parser)
    add_routing_flags(parser)
    parser.add_argument("--output", choices=("text", "json"), default="text", help="json: for other programs")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the plan on stdout; 0, or 3 when connect would refuse."""
    import asyncio
    import json

    from tpvpn import rundir
    from tpvpn.report import as_json, as_text
    from tpvpn.router import Router

    request = routing(arguments, found=asyncio.run(_subnets(arguments)))
    plan = asyncio.run(Router(request, quiet).preview(rundir.DEFAULT_NAME))
    if arguments.output == "json":
        print(json.dumps(as_json(plan), indent=2))
    else:
        colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        print(as_text(plan, colour), end="")
    return 0 if plan.ok else ConflictError.exit_code


async def _subnets(arguments: argparse.Namespace) -> "list[Wanted]":
    """Those that are given, else the cluster's, with the user's own rights; warnings go to stderr."""
    subnets = given(arguments)
    if subnets:
        return subnets
    from tpvpn.cluster import discover
    from tpvpn.kube.api import opened

    async with opened(access(arguments)) as cluster:
        subnets, warnings = await discover(cluster, subnets)
    for warning in warnings:
        print(f"tpvpn: warning: {warning}", file=sys.stderr)
    return subnets


def quiet(_: str) -> None:
    """A plan that is only shown has nothing to say on the way."""
