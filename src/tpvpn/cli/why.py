"""`tpvpn why ADDRESS|NAME`: which rule, table and route take it, now and without us, and what would change that.

Of a name first who is asked for it, why, and what the answer is.
"""

import argparse
import contextlib
import json
import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from tpvpn.cli import Commands
from tpvpn.cli.naming import naming
from tpvpn.cli.routing import add_routing_flags, names_a_cluster, routing
from tpvpn.errors import UsageError

if TYPE_CHECKING:
    from tpvpn.route.verdict import Plan


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "why",
        help="say where an address or a name goes, and why",
        description="Say where packets to an address go, now and without tpvpn: by which rule, table and route, whose "
        "that is, to which subnet of the cluster the address belongs, and what would change it; of a name first who is "
        "asked for it, and what the answer is. Asks the session that runs, or makes a plan from the flags. Changes "
        "nothing, needs no privilege.",
    )
    parser.add_argument("target", metavar="ADDRESS|NAME")
    parser.add_argument("--name", default="default", help="name of the session (default: default)")
    parser.add_argument("--output", choices=("text", "json"), default="text", help="json: for other programs")
    add_routing_flags(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print what becomes of a name, and the answer for each address of the target; 0."""
    from tpvpn import rundir
    from tpvpn.cli.loop import run as run_loop
    from tpvpn.privileged import look
    from tpvpn.route.netlink import read_view
    from tpvpn.route.prefix import Prefix
    from tpvpn.route.why import explain
    from tpvpn.router import see

    preview = run_loop(_preview(arguments))
    named = run_loop(_named(arguments, preview))
    addresses: list[str] = named["addresses"] if named else [Prefix.host(arguments.target).address()]
    plan, source = _plan(arguments, preview)
    device = rundir.device_name(arguments.name)
    view = see(run_loop(read_view()), look([Prefix.host(one) for one in addresses], device, ()))
    answers = [explain(view, address, plan, device, os.getuid()).as_json() for address in addresses]
    if arguments.output == "json":
        print(
            json.dumps(
                {
                    "schema": "tpvpn.why/1",
                    "target": arguments.target,
                    "plan": source,
                    "name": named,
                    "answers": answers,
                },
                indent=2,
            )
        )
    else:
        print("\n\n".join([*([_name(named)] if named else ()), *(_text(answer) for answer in answers)]))
        print(f"\nThe cluster's subnets are those of {source}.")
    return 0


async def _named(arguments: argparse.Namespace, preview: "Plan | None") -> dict[str, Any] | None:
    """What becomes of a name, as the session that runs says; else as it would with this plan. None: an address."""
    from tpvpn import rundir
    from tpvpn.control import ask
    from tpvpn.dns.policy import Policy
    from tpvpn.route.prefix import Prefix
    from tpvpn.wire.dns import A

    target: str = arguments.target
    with contextlib.suppress(UsageError):
        Prefix.host(target)
        return None
    if not any(character.isalpha() for character in target):  # getaddrinfo(3) takes 10.130.1 for 10.130.0.1
        raise UsageError(f"{target!r} is no address; write it like 10.130.0.80 or fd00:130::80")
    try:
        name = target.encode("idna").decode().lower().rstrip(".")
    except UnicodeError:
        raise UsageError(f"{target!r} is no address, and not found as a name: this is no name") from None
    if preview is None:
        return ask(rundir.directory(arguments.name), f"name {name}")
    decision = Policy(naming(arguments)).following(preview).decide(name, A)
    addresses = (
        [decision.address] if decision.address else await _addresses(name) if decision.where != "nowhere" else []
    )
    return {"name": name, **asdict(decision), "server": None, "rcode": None, "records": [], "addresses": addresses}


def _name(named: dict[str, Any]) -> str:
    """What becomes of a name, for a terminal."""
    from tpvpn.report import wrap

    name, asked = named["name"], f" as {named['asked']}" if named["asked"] else ""
    where = {
        "cluster": f"is asked in the cluster{asked}",
        "elsewhere": f"is asked{asked} of the servers that this host has without tpvpn",
        "nowhere": "is answered with no such name, and asked of nobody",
        "address": f"is {named['address']}, and asked of nobody",
    }[named["where"]]
    lines = wrap(f"{name} {where}: {named['because']}.", "")
    for record in (*named["records"], *_no_address(named)):
        lines += wrap(record, "  answer      ")
    return "\n".join(lines)


def _no_address(named: dict[str, Any]) -> list[str]:
    """What there is instead of a session's records, or beside those that lead to no address."""
    if named["rcode"] is not None:
        nothing = {"NXDOMAIN": "there is no such name (NXDOMAIN)", "NOERROR": "the name is there, and has no address"}
        return [] if named["addresses"] else [nothing.get(named["rcode"], str(named["rcode"]))]
    if named["server"]:
        return ["nobody answered"]
    return [f"this host has {', '.join(named['addresses']) or 'none'} for it now"]


async def _addresses(name: str) -> list[str]:
    """The addresses that programs of this host have for a name now."""
    import asyncio
    import socket

    try:
        found = await asyncio.get_running_loop().getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    return list(dict.fromkeys(str(entry[4][0]).partition("%")[0] for entry in found))


async def _preview(arguments: argparse.Namespace) -> "Plan | None":
    """The plan of the flags; None when the session that runs has one."""
    from tpvpn import rundir
    from tpvpn.events import Events
    from tpvpn.router import Router

    if names_a_cluster(arguments):
        return await Router(routing(arguments), Events()).preview(arguments.name)
    if rundir.table_of(arguments.name) is None:
        raise UsageError(
            f"no session {arguments.name} runs here, so the cluster's subnets are not known: give --service-cidr "
            "and/or --pod-cidr"
        )
    return None


def _plan(arguments: argparse.Namespace, preview: "Plan | None") -> tuple[dict[str, Any], str]:
    """The plan to go by, and whose it is."""
    from tpvpn import rundir
    from tpvpn.control import ask
    from tpvpn.report import as_json

    if preview:
        return as_json(preview), "the flags"
    return ask(rundir.directory(arguments.name), "status")["plan"], f"session {arguments.name}, which runs"


def _text(answer: dict[str, Any]) -> str:
    """One answer for a terminal."""
    from tpvpn.report import wrap

    lines = wrap(f"{answer['sentence']}.", "")
    for label, way in (("now", answer["now"]), ("without us", answer["without"])):
        lines += wrap(_way(way), f"  {label:<11} ")
    for change in answer["changes"]:
        lines += wrap(f"{change['description']}: {change['command']}", "  to change   ")
    return "\n".join(lines)


def _way(way: dict[str, Any]) -> str:
    parts = [way["route"]]
    parts += [f"table {way['table']} by rule {way['rule']}"] if way["table"] is not None else []
    parts += [f"{way['owner']}'s, known by {way['known_by']}"] if way["owner"] is not None else []
    return "; ".join(parts)
