"""`tpvpn manager`: the traffic manager in the foreground, as it runs in its pod; and the sessions of one that runs."""

import argparse
import json
import socket
from dataclasses import asdict
from typing import TYPE_CHECKING

from tpvpn.cli import Commands, say
from tpvpn.cli.cluster import access, add_cluster_flags, add_manager_namespace
from tpvpn.cli.connect import add_endpoint_flags
from tpvpn.cli.session import direct
from tpvpn.cli.verbosity import add_verbosity

if TYPE_CHECKING:
    from tpvpn.proto.sessions import Answer, Listed, Question


def add_parser(commands: Commands) -> None:
    """Add the command; its options are those of the manager's zipapp."""
    from tpvpn.manager.options import add_options

    parser = commands.add_parser("manager", help="run a traffic manager (in the cluster), or ask one for its sessions")
    add_options(parser)
    parser.set_defaults(run=_run)
    sessions = parser.add_subparsers(title="commands", metavar="[sessions]").add_parser(
        "sessions",
        help="list the sessions of a manager that runs, or end some",
        description="List the sessions of a manager that runs: your token's own, or all with the token named admin.",
    )
    manager = sessions.add_argument_group("manager")
    add_endpoint_flags(manager)
    add_manager_namespace(manager)
    add_cluster_flags(sessions)
    add_verbosity(sessions)
    sessions.add_argument("--output", choices=["text", "json"], default="text")
    ending = sessions.add_mutually_exclusive_group()
    ending.add_argument("--end", metavar="ID", help="end this session")
    ending.add_argument("--end-user", metavar="NAME", help="end all sessions of this token's name")
    sessions.set_defaults(run=_sessions)


def _run(arguments: argparse.Namespace) -> int:
    from tpvpn.manager.command import run

    return run(arguments)


def _sessions(arguments: argparse.Namespace) -> int:
    from tpvpn.cli.loop import run
    from tpvpn.proto.sessions import Question

    question = Question(socket.gethostname(), arguments.end, arguments.end_user)
    answer = run(_ask(arguments, question))
    if arguments.output == "json":
        print(json.dumps({"schema": "tpvpn.manager-sessions/1", **asdict(answer)}, indent=1))
    else:
        print("\n".join(_text(answer)))
    return 0


async def _ask(arguments: argparse.Namespace, question: "Question") -> "Answer":
    from tpvpn.sessions import ask, ask_each

    transport = direct(arguments)
    if transport:
        return await ask(transport, question)
    from tpvpn.cluster import Options, find, to_each
    from tpvpn.kube.api import opened

    async with opened(access(arguments)) as cluster:
        options = Options(arguments.manager_namespace)
        return await ask_each(to_each(cluster, await find(cluster, options), options, say), question)


def _text(answer: "Answer") -> list[str]:
    """The answer for a terminal: a line for each session, in columns."""
    ended = [f"session {one} has ended" for one in answer.ended]
    if not answer.sessions:
        return [*ended, f"no session that {answer.user} may see"]
    heads = ("SESSION", "USER", "CLIENT", "PEER", "ADDRESSES", "SINCE", "SENT", "RECEIVED", "SECURITY", "EXIT")
    rows = [heads, *(_row(one) for one in answer.sessions)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    return ended + ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _row(one: "Listed") -> tuple[str, ...]:
    """Sent and received as the client sees them."""
    kinds = {kind: [family for family in one.exit if one.exit[family] == kind] for kind in one.exit.values() if kind}
    return (
        one.session,
        one.user,
        one.client,
        one.peer,
        ",".join(filter(None, (one.ipv4, one.ipv6))),
        one.since,
        f"{one.from_client:,}",
        f"{one.to_client:,}",
        one.security,
        ",".join(kind if len(kinds) == 1 else f"{kind} ({' '.join(families)})" for kind, families in kinds.items()),
    )
