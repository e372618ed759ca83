"""The embedded chart, and Helm's words for it; it starts nothing.

The chart lies in `chart/` beside this module, without the one file that it needs: the manager's zipapp, which is made
of the package that is installed, so that manager and client are of one version.
"""

from collections.abc import Sequence
from pathlib import Path

NAME = "tpvpn"
"""The release, and the namespace unless the user names another."""
CHART = Path(__file__).parent / "chart"

VERBS = {
    "install": (NAME, "CHART", "--create-namespace"),
    # Without one of its words for it `helm upgrade --set` forgets all values that were set before. This one keeps them,
    # and takes the defaults of the new chart for the others.
    "upgrade": (NAME, "CHART", "--reset-then-reuse-values"),
    "template": (NAME, "CHART"),
    "lint": ("CHART",),
    "package": ("CHART",),
    "show": ("CHART",),
    **dict.fromkeys(("uninstall", "status", "get", "history", "rollback", "test"), (NAME,)),
}
"""What each verb of Helm's is given. No `--install` for upgrade: in a namespace that is misspelt it is to fail."""
_TWO_WORDS = ("show", "get")
_VALUES = ("--reset-values", "--reuse-values", "--reset-then-reuse-values")


def words(verb: str, arguments: Sequence[str], chart: Path) -> list[str]:
    """What comes behind `helm` for a verb of VERBS and a user's arguments, which stay as they are."""
    behind = 1 if verb in _TWO_WORDS and arguments and not arguments[0].startswith("-") else 0
    given = {argument.partition("=")[0] for argument in arguments}
    added = [str(chart) if word == "CHART" else word for word in VERBS[verb]]
    if given.intersection(_VALUES):
        added = [word for word in added if word not in _VALUES]
    if "--namespace" not in given and not any(one.startswith("-n") for one in given):
        added += ["--namespace", NAME]
    return [verb, *arguments[:behind], *added, *arguments[behind:]]


def write_chart(directory: Path) -> None:
    """Write the whole chart into a directory. OSError."""
    from tpvpn.kube import zipapp  # only whoever writes needs zipfile

    for source in CHART.rglob("*"):
        if source.is_file():
            target = directory / source.relative_to(CHART)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    files = directory / "files"
    files.mkdir()
    (files / "manager.pyz").write_bytes(zipapp.build())
