"""`tpvpn status` and `tpvpn quit`: sessions of this network namespace, asked through their control sockets."""

import argparse
import json
import sys
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from tpvpn.cli import Commands, say

if TYPE_CHECKING:
    from tpvpn.rundir import Session

QUIT_TIMEOUT = 10.0
_NO_PING = "the manager's pod would need the sysctl net.ipv4.ping_group_range"


def add_parsers(commands: Commands) -> None:
    """Add both commands."""
    status = commands.add_parser("status", help="show the sessions that run")
    status.add_argument("--name", help="only the session of this name")
    status.add_argument(
        "--output", choices=["text", "json", "prometheus"], default="text", help="prometheus: for a textfile collector"
    )
    status.add_argument("--watch", "-w", action="store_true", help="show them again and again, until Ctrl-C")
    status.set_defaults(run=_status)
    quit = commands.add_parser("quit", help="end a session, leaving nothing behind")
    which = quit.add_mutually_exclusive_group()
    which.add_argument("--name", help="the session's name (default: the one that runs)")
    which.add_argument("--all", action="store_true", help="end all sessions that run here")
    quit.set_defaults(run=_quit)


def _status(arguments: argparse.Namespace) -> int:
    from tpvpn.cli.chosen import NOBODY, running
    from tpvpn.control import listed

    if arguments.watch:
        return _watch(arguments)
    found = running(arguments.name)
    answers, unanswered = _ask(found, strict=bool(arguments.name))
    for line in unanswered:
        say(line)
    if arguments.output == "json":
        print(json.dumps(listed(answers), indent=1))
    elif arguments.output == "prometheus":
        from tpvpn import client_metrics

        print(client_metrics.render(answers), end="")
    elif not found:
        print(NOBODY)
    for answer in answers if arguments.output == "text" else []:
        print(_text(answer))
    return 0


def _watch(arguments: argparse.Namespace) -> int:
    """The same again and again; sessions may come and go."""
    from tpvpn import rundir
    from tpvpn.cli.chosen import NOBODY
    from tpvpn.cli.watching import watch, watch_lines
    from tpvpn.control import listed
    from tpvpn.errors import UsageError

    def look() -> tuple[list[dict[str, Any]], list[str]]:
        return _ask(one for one in rundir.sessions() if arguments.name in (None, one.name))

    if arguments.output == "prometheus":
        raise UsageError("--watch shows text or JSON; for Prometheus, ask again and again")
    if arguments.output == "json":
        return watch_lines(look, lambda answers, _: json.dumps(listed(answers)))
    return watch(look, lambda answers, unanswered: "\n".join([*map(_text, answers), *unanswered]) or NOBODY)


def _ask(running: "Iterable[Session]", *, strict: bool = False) -> tuple[list[dict[str, Any]], list[str]]:
    """What sessions answer, and a line for each that does not; with `strict` that is an error."""
    from tpvpn.control import ask
    from tpvpn.errors import TpvpnError

    answers, unanswered = list[dict[str, Any]](), list[str]()
    for one in running:
        try:
            answers.append(ask(one.directory, "status"))
        except TpvpnError as error:  # another user's, or it is connecting still: the others are shown all the same
            if strict:
                raise
            unanswered.append(f"session {one.name} of process {one.pid} is not shown: {error}")
    return answers, unanswered


def _text(status: dict[str, Any]) -> str:
    """One session for a terminal."""
    manager, traffic = status["manager"], status["traffic"]
    lines = [
        f"{status['name']}: {status['state']} since {status['since']}, process {status['pid']}",
        f"  manager   {manager['endpoint']}, exit {manager['exit']}, MTU {manager['mtu']}",
        *(f"  ping      unsupported over {one}: {_NO_PING}" for one, carried in manager["ping"].items() if not carried),
        f"  links     {status['links']}, connected again {status['reconnects']} times",
        f"  device    {status['device']} with {', '.join(status['addresses'])}",
        *([f"  RTT       {1000 * status['rtt']:.1f} ms"] if status["rtt"] is not None else []),
        f"  traffic   sent {traffic['sent_bytes']:,} bytes, received {traffic['received_bytes']:,} bytes",
    ]
    lines += [f"  log       {log}"] if (log := status.get("log")) else []
    names = status["dns"]
    below = f"{names['domain']} and {names['suffix']}"
    if names["first"]:
        below = f"{names['suffix']} (session {names['first']} was there first)"
    lines.append(
        f"  names     below {below}, of namespace {names['namespace']}, by {names['mode']} ({names['because']})"
    )
    lines += [f"  warning   {warning}" for warning in names["warnings"]]
    for subnet in status["plan"]["subnets"]:
        since = status["verdicts"].get(subnet["cidr"])
        parts = [f"  {subnet['verdict']:9} {subnet['cidr']} ({subnet['kind']})"]
        parts += [f"at {subnet['virtual']}"] if subnet["virtual"] else []
        parts += [f"since {since['at'][11:19]}: {since['because']}"] if since else []
        lines.append(", ".join(parts))
    lines += [f"  shadowed  {prefix} is {by}" for prefix, by in status["shadowed"].items()]
    return "\n".join(lines + [f"  warning   {warning}" for warning in status["plan"]["warnings"]])


def _quit(arguments: argparse.Namespace) -> int:
    from tpvpn.cli.chosen import NOBODY, running, the_one
    from tpvpn.errors import TpvpnError, UsageError

    if not arguments.all:
        session = the_one(arguments.name)
        if session is None:
            raise UsageError(NOBODY)
        _end(session)
        return 0
    found, failed = running(None), list[tuple[str, TpvpnError]]()
    if not found:
        print(NOBODY, file=sys.stderr)
    for session in reversed(found):  # the youngest first: none has to take over what another gives up
        try:
            _end(session)
        except TpvpnError as error:  # another user's, for example: the others end all the same
            failed.append((session.name, error))
    if failed:
        raise type(failed[0][1])("; ".join(f"session {name} goes on: {error}" for name, error in failed))
    return 0


def _end(session: "Session") -> None:
    """End a session, and wait until nothing of it is there."""
    from tpvpn.control import ask
    from tpvpn.errors import TpvpnError

    ask(session.directory, "quit")
    deadline = time.monotonic() + QUIT_TIMEOUT
    while session.directory.exists() or _is_there(session.device):  # the device goes last
        if time.monotonic() > deadline:
            raise TpvpnError(f"session {session.name} (process {session.pid}) does not end: end it with `kill`")
        time.sleep(0.02)
    print(f"session {session.name} has ended", file=sys.stderr)


def _is_there(device: str) -> bool:
    import socket

    try:
        return bool(socket.if_nametoindex(device))
    except OSError:
        return False
