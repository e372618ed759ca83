"""`tpvpn cleanup`: remove what sessions left that were killed together with their helper."""

import argparse
import json

from tpvpn.cli import Commands


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "cleanup",
        help="remove what a killed session left behind",
        description="Remove the rules, routes and files that killed sessions left behind (the next connect would, "
        "too). Sessions that run are not touched.",
    )
    parser.add_argument("--output", choices=("text", "json"), default="text", help="json: for other programs")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    import asyncio

    from tpvpn.helper.client import clean_up

    removed = asyncio.run(clean_up())
    if arguments.output == "json":
        print(json.dumps({"schema": "tpvpn.cleanup/1", "removed": removed}, indent=1))
        return 0
    for words in removed:
        print(f"removed {words}")
    if not removed:
        print("nothing was left behind")
    return 0
