"""Every command of README and guides is run: here what needs the lab or a checkout, in tests/kube what a cluster."""

import os
import re
import sys
from pathlib import Path

import pytest

import blocks
from tpvpn.lab.lab import Lab


def environment(home: Path) -> dict[str, str]:
    """Of somebody who has just come."""
    home.mkdir(exist_ok=True)
    return {**os.environ, "HOME": str(home), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def test_the_first_block_is_what_ci_runs() -> None:
    commands = re.findall(r"^\S+", blocks.script(blocks.PAGES[0], "everything"), re.MULTILINE)
    everything = (blocks.ROOT / "scripts" / "test").read_text()
    assert [command for command in commands if command != "scripts/test" and command not in everything] == []


def test_the_installation_of_the_guides(tmp_path: Path) -> None:
    installations = {blocks.script(page, "checkout") for page in blocks.PAGES} - {""}
    assert len(installations) == 1, "README and guides say the same"
    quicker = {"PIP_NO_COMPILE": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    newcomers = environment(tmp_path / "home") | quicker
    told = blocks.run(*installations, environment=newcomers, directory=blocks.ROOT)
    assert re.search(r"^tpvpn \d+\.\d+\.\d+$", told, re.MULTILINE)
    there = {path.name for path in (tmp_path / "home/.local/bin").iterdir()}
    assert there == {"tpvpn", "kubectl-tpvpn", "kubectl_complete-tpvpn"}


@pytest.mark.parametrize(
    "page", [page for page in blocks.PAGES if blocks.script(page, "lab")], ids=lambda page: page.name
)
def test_in_the_lab(page: Path, tmp_path: Path) -> None:
    prefix = f"gd{os.getpid()}"
    commands = blocks.script(page, "lab").replace("/run/tpvpn-lab/tpvpn/", f"/run/tpvpn-lab/{prefix}/")
    commands = re.sub(r"tpvpn lab ([a-z]+)", rf"\g<0> --prefix {prefix}", commands)
    try:
        told = blocks.run(commands, environment=environment(tmp_path / "home"), directory=tmp_path)
    finally:
        Lab(prefix).down()
    assert re.search(r"^cluster 10\.13", told, re.MULTILINE)
