"""`tpvpn why ADDRESS|NAME`: which rule, table and route take it, now and without us, and what would change that.

Of a name first who is asked for it, why, and what the answer is.
"""

import argparse
import contextlib
import json
import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

from tpvpn.cli import Commands
from tpvpn.cli.naming import naming
from tpvpn.cli.routing import add_routing_flags, names_a_cluster, routing
from tpvpn.errors import TpvpnError, UsageError

if TYPE_CHECKING:
    from tpvpn.route.verdict import Plan
    from tpvpn.rundir import Session


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "why",
        help="say where an address or a name goes, and why",
        description="Say where packets to an address go, now and without tpvpn: by which rule, table and route, whose "
        "that is, to which subnet of the cluster the address belongs, and what would change it; of a name first who is "
        "asked for it, and what the answer is. Asks the sessions that run, or makes a plan from the flags. Changes "
        "nothing, needs no privilege.",
    )
    parser.add_argument("target", metavar="ADDRESS|NAME")
    parser.add_argument("--name", help="the session's name (default: the one that takes the address, or has the name)")
    parser.add_argument("--output", choices=("text", "json"), default="text", help="json: for other programs")
    add_routing_flags(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print what becomes of a name, and the answer for each address of the target; 0."""
    from tpvpn.cli.loop import run as run_loop
    from tpvpn.privileged import look
    from tpvpn.route.netlink import read_view
    from tpvpn.route.prefix import Prefix
    from tpvpn.route.why import explain, taking
    from tpvpn.router import see

    known = run_loop(_known(arguments))
    named = run_loop(_named(arguments, known))
    addresses: list[str] = named["addresses"] if named else [Prefix.host(arguments.target).address()]
    seen, plans = run_loop(read_view()), {device: one.plan for device, one in known.items()}
    answers, sources = list[dict[str, Any]](), dict[str, None]()
    for host in map(Prefix.host, addresses):
        device = taking(seen, host, plans)
        view = see(seen, look([host], device, ()))
        answers.append(explain(view, host.address(), plans[device], device, os.getuid()).as_json())
        sources[known[device].source] = None
    source = " and ".join(sources or dict.fromkeys(one.source for one in known.values()))
    if "the flags" not in source:
        source += ", which runs" if " and " not in source else ", which run"
    if arguments.output == "json":
        shown = {"schema": "tpvpn.why/1", "target": arguments.target, "plan": source, "name": named, "answers": answers}
        print(json.dumps(shown, indent=2))
    else:
        print("\n\n".join([*([_name(named)] if named else ()), *(_text(answer) for answer in answers)]))
        print(f"\nThe cluster's subnets are those of {source}.")
    return 0


class Known(NamedTuple):
    """A plan to go by, as its JSON, and whose it is: a session's that runs, or the flags'."""

    source: str
    plan: dict[str, Any]
    session: "Session | None" = None
    flags: "Plan | None" = None


async def _known(arguments: argparse.Namespace) -> dict[str, Known]:
    """The plans to go by, each by the device of its session, the oldest session first."""
    from tpvpn import rundir
    from tpvpn.cli.chosen import running
    from tpvpn.control import ask
    from tpvpn.events import Events
    from tpvpn.report import as_json
    from tpvpn.router import Router

    name: str = arguments.name or rundir.DEFAULT_NAME
    if names_a_cluster(arguments):
        plan = await Router(routing(arguments), Events()).preview(name)
        return {rundir.device_name(name): Known("the flags", as_json(plan), flags=plan)}
    sessions, known = running(arguments.name), dict[str, Known]()
    for one in sessions:
        try:
            known[one.device] = Known(f"session {one.name}", ask(one.directory, "status")["plan"], one)
        except TpvpnError:
            if len(sessions) == 1:
                raise
    if not known:
        raise UsageError(
            f"no session {'that you may ask ' if sessions else ''}runs here, so the cluster's subnets are not known: "
            "give --service-cidr and/or --pod-cidr"
        )
    return known


async def _named(arguments: argparse.Namespace, known: dict[str, Known]) -> dict[str, Any] | None:
    """What becomes of a name, as the session says that has it; else as it would with the flags. None: an address."""
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
    (first, *_) = known.values()
    if first.flags is None:
        told = [ask(one.session.directory, f"name {name}") for one in known.values() if one.session]
        return next((one for one in told if one["where"] != "elsewhere"), told[0])
    decision = Policy(naming(arguments)).following(first.flags).decide(name, A)
    addresses = (
        [decision.address] if decision.address else await _addresses(name) if decision.where != "nowhere" else []
    )
    return {"name": name, **asdict(decision), "server": None, "rcode": None, "records": [], "addresses": addresses}


def _name(named: dict[str, Any]) -> str:
    """What becomes of a name, for a terminal."""
    from tpvpn.report import wrap

    name, asked = named["name"], f" as {named['asked']}" if named["asked"] else ""
    of = f" of session {named['session']}" if "session" in named else ""
    where = {
        "cluster": f"is asked in the cluster{of}{asked}",
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
