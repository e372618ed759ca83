"""`tpvpn helm`: the user's own helm, with the embedded chart."""

import argparse
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from types import FrameType

from tpvpn.cli import Commands
from tpvpn.errors import UsageError


def add_parser(commands: Commands) -> None:
    """Add the command."""
    from tpvpn.kube.helm import VERBS

    parser = commands.add_parser(
        "helm",
        help="install the manager for everyone, by your helm",
        description="Runs your helm with tpvpn's chart. Release and chart are put in where the verb wants them, and "
        "--namespace tpvpn unless you name another; all else is passed on as it is. Values: tpvpn helm show values.",
    )
    parser.add_argument("verb", choices=VERBS, metavar="VERB", help=", ".join(VERBS))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGUMENT", help="helm's own")
    parser.set_defaults(run=_run, anywhere=True)


def _run(arguments: argparse.Namespace) -> int:
    from tpvpn.kube.helm import words, write_chart

    helm = shutil.which("helm")
    if helm is None:
        raise UsageError(
            "there is no helm on PATH, and `tpvpn helm` runs your own: install Helm 3.14 or newer (https://helm.sh), "
            "or do without, as `tpvpn connect` starts a manager of its own"
        )
    with tempfile.TemporaryDirectory(prefix="tpvpn-") as directory:
        chart = Path(directory) / "tpvpn"
        write_chart(chart)
        return _to_its_end([helm, *words(arguments.verb, arguments.arguments, chart)])


def _to_its_end(command: list[str]) -> int:
    """Run helm, whatever signal comes: it is the one to answer, and its chart is removed after it."""
    helm = subprocess.Popen(command)

    def pass_on(number: int, _: FrameType | None) -> None:
        helm.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, pass_on)
    code = helm.wait()
    return code if code >= 0 else 128 - code
