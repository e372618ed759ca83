"""`tpvpn doctor`: what keeps a session from working on this host, each with its remedy."""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from tpvpn.cli import Commands, say
from tpvpn.cli.cluster import access, add_cluster_flags, add_manager_namespace, wishes_of
from tpvpn.cli.config import home, state_directory
from tpvpn.cli.naming import naming
from tpvpn.cli.routing import add_routing_flags
from tpvpn.errors import UsageError

if TYPE_CHECKING:
    from tpvpn.doctor.examine import Found
    from tpvpn.doctor.patient import Wishes
    from tpvpn.kube.api import Cluster
    from tpvpn.route.verdict import Plan

COLOURS = {"ok": 32, "warning": 33, "failure": 31}
"""SGR codes (ECMA-48): green, yellow, red."""


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "doctor",
        help="find what keeps a session from working",
        description="Look for what keeps a session from working: rights, the kernel, the kubeconfig, the API server "
        "and the way to it, what you may do there, the manager, subnets, names, VPNs, firewalls, what killed sessions "
        "left. Changes nothing, needs no privilege; as root it sees firewalls too. Exit code 1: something failed.",
    )
    parser.add_argument("--name", help="the session's name (default: the one that runs)")
    parser.add_argument("--output", choices=("text", "json"), default="text", help="json: for other programs")
    parser.add_argument(
        "--bundle",
        metavar="FILE",
        help="write what was found, and what it was found in, to a new FILE.tar.gz, no secrets",
    )
    parser.add_argument(
        "--redact-names", action="store_true", help="with --bundle: no names and public addresses either"
    )
    add_manager_namespace(add_cluster_flags(parser))
    add_routing_flags(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print what was found; 0 when nothing failed, else 1."""
    from tpvpn import rundir
    from tpvpn.cli.chosen import the_one
    from tpvpn.cli.loop import run as run_loop
    from tpvpn.cli.screen import has_colours
    from tpvpn.doctor.examine import examine
    from tpvpn.doctor.patient import rooted

    if arguments.name is None:
        session = the_one(None)
        arguments.name = session.name if session else rundir.DEFAULT_NAME
    rundir.directory(arguments.name)  # UsageError of a name that is none
    if arguments.redact_names and not arguments.bundle:
        raise UsageError("--redact-names is for a bundle: give --bundle FILE too")
    seen = rooted(os.geteuid() == 0)
    if arguments.bundle and os.path.lexists(arguments.bundle):
        raise UsageError(f"--bundle {arguments.bundle} is there already: name a file that is not")
    wishes = _wishes(arguments)
    found = run_loop(examine(wishes, seen))
    if arguments.bundle:
        from tpvpn.doctor.bundle import write

        write(arguments.bundle, found, wishes.access, state_directory(), redact_names=arguments.redact_names)
        say(f"{arguments.bundle} is for whoever helps you: look into it before you send it")
    if arguments.output == "json":
        print(json.dumps(found.as_json(), indent=2))
    else:
        print("\n".join(_text(found, has_colours(sys.stdout))))
    return 0 if found.ok else 1


def _wishes(arguments: argparse.Namespace) -> "Wishes":
    """What the flags ask for; from here on this process is an ordinary user's."""
    from tpvpn.dns.policy import DOMAIN, Policy
    from tpvpn.doctor.patient import Wishes

    reached_by = access(arguments)

    async def plan(cluster: "Cluster | None") -> "Plan":
        from tpvpn.cli.routing import routing
        from tpvpn.events import Events
        from tpvpn.router import Router

        if cluster is None:
            return await Router(routing(arguments), Events()).preview(arguments.name)
        return await _plan_of(arguments, cluster)

    domains = (DOMAIN, *Policy(naming(arguments)).routing_domains())
    return Wishes(arguments.name, reached_by, arguments.manager_namespace, home(), domains, plan)


async def _plan_of(arguments: argparse.Namespace, cluster: "Cluster") -> "Plan":
    """What connect would route of this cluster."""
    from tpvpn.events import Events
    from tpvpn.kube.installed import NAME, installed
    from tpvpn.router import Router

    admins = await installed(cluster, arguments.manager_namespace or NAME)
    wishes = await wishes_of(arguments, cluster, admins, Events().say)
    return await Router(wishes.request, Events()).preview(arguments.name)


def _text(found: "Found", colour: bool) -> Iterator[str]:
    """A line a check below its group's name, and a remedy below what is not well."""
    from tpvpn.report import painted

    shown = ""
    for group, check in found.checks:
        if group != shown:
            yield group[0].upper() + group[1:]
            shown = group
        state = f"{check.state:8}"
        if colour:
            state = painted(state, COLOURS[check.state])
        yield f"  {state} {check.sentence}"
        if check.remedy:
            yield f"             {check.remedy}"
    states = [check.state for _, check in found.checks]
    failures, warnings = states.count("failure"), states.count("warning")
    yield ""
    yield (
        f"{_count(failures, 'failure')}, {_count(warnings, 'warning')}"
        if failures
        else (f"nothing is in the way ({_count(warnings, 'warning')})")
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
