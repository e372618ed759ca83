"""`tpvpn manager`: the traffic manager in the foreground, as it runs in its pod."""

import argparse

from tpvpn.cli import Commands


def add_parser(commands: Commands) -> None:
    """Add the command; its options are those of the manager's zipapp."""
    from tpvpn.manager.options import add_options

    parser = commands.add_parser("manager", help="run a traffic manager (in the cluster)")
    add_options(parser)
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from tpvpn.manager.command import run

    return run(arguments)
