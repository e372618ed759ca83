"""The command line: one module a command group, and the one place that prints and turns errors into exit codes.

Each command's module gives `add_parser(commands)`, which sets `run` to a function of the parsed arguments that returns
the exit code. Heavy libraries are imported by the command that needs them: `tpvpn --help` must not wait for any. A
command that sets `anywhere` runs on every system, the others on Linux.
"""

import argparse
import contextlib
import errno
import os
import sys
from collections.abc import Sequence
from typing import TypeAlias

from tpvpn import __version__
from tpvpn.cli import system, verbosity
from tpvpn.cli.parser import Parser
from tpvpn.errors import TpvpnError

# argparse has no public name for what add_subparsers() gives.
Commands: TypeAlias = "argparse._SubParsersAction[Parser]"  # pyright: ignore[reportPrivateUsage]

PROGRAM = "tpvpn"
DESCRIPTION = "A laptop's way into a Kubernetes cluster that is at home beside any VPN."
EXIT_CODES = {
    0: "done",
    1: "internal",
    2: "usage",
    3: "conflict",
    4: "cluster",
    5: "privilege",
    6: "manager",
    7: "link lost for good",
    130: "interrupted",
}

_LACKING = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.ENOSPC}
"""Of a machine, not of the program: no traceback says more."""


def main(words: Sequence[str] | None = None) -> int:
    """Run a command; the exit code (DESIGN: 0 done, 1 internal, 2 usage, 3 conflict, …)."""
    try:
        words = sys.argv[1:] if words is None else words
        if os.path.basename(sys.argv[0]).startswith("kubectl_complete-"):
            words = ["__complete", *words]
        if words[:1] == ["__complete"]:  # it is not shown, and what stands behind it is no option of it
            from tpvpn.cli.completion import answer

            return answer(words[1:])
        arguments = command_line(_called()).parse_args(words)
        if not getattr(arguments, "anywhere", False):
            system.require()
        if getattr(arguments, "verbose", 0):
            verbosity.show(arguments.verbose)
        return arguments.run(arguments)
    except TpvpnError as error:
        say(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `tpvpn plan | head`: what was to be read was read
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in _LACKING:
            raise
        say(f"this machine has not enough of what tpvpn needs: {error}")
        return 1


def say(text: str) -> None:
    """A line for the user, beside what the command prints; nobody hears it where that takes nothing (a full disk)."""
    with contextlib.suppress(OSError):
        print(f"tpvpn: {text}", file=sys.stderr, flush=True)


def _called() -> str:
    """As whoever types it sees it: kubectl runs its plugin kubectl-tpvpn."""
    return f"kubectl {PROGRAM}" if os.path.basename(sys.argv[0]).startswith("kubectl-") else PROGRAM


def command_line(program: str) -> Parser:
    """The whole command line, of a program that is called so."""
    from tpvpn.cli import cleanup, completion, config, connect, doctor, helm, lab, manager, plan, run, sessions, why

    parser = Parser(
        prog=program,
        description=DESCRIPTION,
        epilog="exit codes: " + ", ".join(f"{code} {meaning}" for code, meaning in EXIT_CODES.items()),
    )
    parser.add_argument("--version", action="version", version=f"tpvpn {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    connect.add_parser(commands)
    run.add_parser(commands)
    plan.add_parser(commands)
    why.add_parser(commands)
    config.add_parser(commands)
    sessions.add_parsers(commands)
    doctor.add_parser(commands)
    cleanup.add_parser(commands)
    helm.add_parser(commands)
    manager.add_parser(commands)
    lab.add_parser(commands)
    completion.add_parser(commands)
    version = commands.add_parser("version", help="print the version")
    version.set_defaults(run=_version, anywhere=True)
    return parser


def _version(_: argparse.Namespace) -> int:
    print(f"tpvpn {__version__}")
    return 0
