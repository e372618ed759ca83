"""`tpvpn why ADDRESS|NAME`: which rule, table and route take it, now and without us, and what would change that.

Of a name first who is asked for it, why, and what the answer is.
"""

import argparse
import contextlib
import json
import os
from dataclasses import asdict
from typing import Any

from tpvpn.cli import Commands
from tpvpn.cli.naming import naming
from tpvpn.cli.plan import quiet
from tpvpn.cli.routing import add_routing_flags, names_a_cluster, routing
from tpvpn.errors import UsageError


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
    import asyncio

    from tpvpn import rundir
    from tpvpn.privileged import look
    from tpvpn.route.netlink import read_view
    from tpvpn.route.prefix import Prefix
    from tpvpn.route.why import explain
    from tpvpn.router import see

    named = _named(arguments)
    addresses: list[str] = named["addresses"] if named and "rcode" in named else _addresses(arguments.target)
    plan, source = asyncio.run(_plan(arguments))
    device = rundir.device_name(arguments.name)
    view = see(asyncio.run(read_view()), look([Prefix.host(one) for one in addresses], device, ()))
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


def _named(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """What becomes of a name, as the session that runs says, with its answer; else as it would be. None: an address."""
    from tpvpn import rundir
    from tpvpn.control import ask
    from tpvpn.dns.policy import Policy
    from tpvpn.route.prefix import Prefix
    from tpvpn.wire.dns import A

    target: str = arguments.target
    with contextlib.suppress(UsageError):
        Prefix.host(target)
        return None
    if not any(character.isalpha() for character in target):
        return None
    try:
        name = target.encode("idna").decode().lower().rstrip(".")
    except UnicodeError:
        raise UsageError(f"{target!r} is no address, and not found as a name: this is no name") from None
    if not names_a_cluster(arguments) and rundir.table_of(arguments.name) is not None:
        return ask(rundir.directory(arguments.name), f"name {name}")
    return {"name": name, **asdict(Policy(naming(arguments)).decide(name, A))}


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
    if "rcode" in named:
        records = named["records"] or [named["rcode"] or "nobody answered"]
        for record in records:
            lines += wrap(record, "  answer      ")
    return "\n".join(lines)


def _addresses(target: str) -> list[str]:
    """The addresses of a name, or the one that is given; UsageError when there are none."""
    import socket

    from tpvpn.route.prefix import Prefix

    with contextlib.suppress(UsageError):  # getaddrinfo(3) takes 10.130.1 for 10.130.0.1
        return [Prefix.host(target).address()]
    if not any(character.isalpha() for character in target):
        raise UsageError(f"{target!r} is no address; write it like 10.130.0.80 or fd00:130::80")
    try:
        found = socket.getaddrinfo(target, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "this is no name"
        raise UsageError(f"{target!r} is no address, and not found as a name: {reason}") from None
    return list(dict.fromkeys(str(entry[4][0]).partition("%")[0] for entry in found))


async def _plan(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The plan to go by, and whose it is: of the flags, or of the session that runs."""
    from tpvpn import rundir
    from tpvpn.control import ask
    from tpvpn.report import as_json
    from tpvpn.router import Router

    if names_a_cluster(arguments):
        return as_json(await Router(routing(arguments), quiet).preview(arguments.name)), "the flags"
    if rundir.table_of(arguments.name) is None:
        raise UsageError(
            f"no session {arguments.name} runs here, so the cluster's subnets are not known: give --service-cidr "
            "and/or --pod-cidr"
        )
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
