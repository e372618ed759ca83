"""`tpvpn plan`: what connect would route, and what not and why; it changes nothing and needs no privilege."""

import argparse
import sys
from typing import TYPE_CHECKING

from tpvpn.cli import Commands, say
from tpvpn.cli.cluster import access, add_cluster_flags, add_manager_namespace, wishes_of
from tpvpn.cli.routing import add_routing_flags, names_a_cluster, routing
from tpvpn.cli.verbosity import add_verbosity
from tpvpn.errors import ConflictError

if TYPE_CHECKING:
    from tpvpn.route.verdict import Request


def add_parser(commands: Commands) -> None:
    """Add the command to the program's."""
    parser = commands.add_parser(
        "plan",
        help="show what connect would route, and every conflict with its way out",
        description="Show what connect would route, and every conflict with its way out. Changes nothing, needs no "
        "privilege. Exit code 3: connect would refuse.",
    )
    add_manager_namespace(add_cluster_flags(parser))
    add_routing_flags(parser)
    add_verbosity(parser)
    parser.add_argument("--output", choices=("text", "json"), default="text", help="json: for other programs")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the plan on stdout; 0, or 3 when connect would refuse."""
    import json

    from tpvpn import rundir
    from tpvpn.cli.loop import run as run_loop
    from tpvpn.cli.screen import has_colours
    from tpvpn.events import Events
    from tpvpn.report import as_json, as_text
    from tpvpn.router import Router

    plan = run_loop(Router(run_loop(_request(arguments)), Events()).preview(rundir.DEFAULT_NAME))
    if arguments.output == "json":
        print(json.dumps(as_json(plan), indent=2))
    else:
        print(as_text(plan, has_colours(sys.stdout)), end="")
    return 0 if plan.ok else ConflictError.exit_code


async def _request(arguments: argparse.Namespace) -> "Request":
    """Of the subnets that are given, else of the cluster's, with the user's own rights; warnings go to stderr."""
    if names_a_cluster(arguments):
        return routing(arguments)
    from tpvpn.kube.api import opened
    from tpvpn.kube.installed import NAME, installed

    async with opened(access(arguments)) as cluster:
        admins = await installed(cluster, arguments.manager_namespace or NAME)
        return (await wishes_of(arguments, cluster, admins, say)).request
