"""What the documents promise about themselves: the README's length, links that lead somewhere, no value left out."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import blocks
from tpvpn import errors
from tpvpn.cli import EXIT_CODES, reference
from tpvpn.kube.helm import CHART

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    *sorted(DOCS.rglob("*.md")),
    *sorted((ROOT / "bench").rglob("*.md")),
]
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)")


def test_the_readme_is_short_and_begins_with_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 450
    commands = re.findall(r"^scripts/\w+", text, re.MULTILINE)
    assert commands[:2] == ["scripts/demo", "scripts/test"]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in LINK.findall(page.read_text()):
        if not target.startswith("https://"):
            led = page.parent / target if target else page
            assert led.exists(), target
            assert not anchor or anchor in anchors(led), f"{target}#{anchor}"


@pytest.mark.parametrize("page", blocks.PAGES, ids=lambda page: page.name)
def test_every_block_says_what_it_needs(page: Path) -> None:
    for needs, block in blocks.blocks(page):
        assert needs in blocks.NEEDS, f"{block}\nwants one of <!-- needs: {', '.join(blocks.NEEDS)} --> before it"


def test_every_page_stands_in_the_index() -> None:
    listed = {(DOCS / target).resolve() for target, _ in LINK.findall((DOCS / "index.md").read_text())}
    assert set(DOCS.rglob("*.md")) - {DOCS / "index.md"} <= listed


def test_paths_of_pages_in_code_and_prose_are_there() -> None:
    for path in (path for top in ("src", "tests", "scripts", "packaging", "bench") for path in (ROOT / top).rglob("*")):
        if path.is_file() and path.suffix != ".pyc":
            for named in re.findall(r"docs/[\w/-]+\.md", path.read_text(errors="ignore")):
                assert (ROOT / named).exists(), f"{path}: {named}"


def test_every_module_stands_in_the_architecture() -> None:
    text = (DOCS / "architecture.md").read_text()
    source = ROOT / "src" / "tpvpn"
    for path in source.iterdir():
        name = path.name.removesuffix(".py")
        if not name.startswith("_"):
            assert re.search(rf"`{name}/?`|{name}", text), f"{name} is not in docs/architecture.md"


def test_the_commands_page_is_what_the_program_gives() -> None:
    page = (DOCS / "reference" / "cli.md").read_text()
    assert page == reference.markdown(), "docs/reference/cli.md is not what the program gives: run scripts/docs"


def test_the_man_page_has_every_command_and_no_fault(tmp_path: Path) -> None:
    page = tmp_path / "tpvpn.1"
    page.write_text(reference.man("2026-01-01"))
    checked = subprocess.run(["mandoc", "-T", "lint", "-W", "warning", page], capture_output=True, text=True)
    assert (checked.returncode, checked.stdout) == (0, "")
    shown = subprocess.run(["mandoc", "-T", "utf8", page], capture_output=True, text=True, check=True).stdout
    shown = re.sub(".\b", "", shown)
    for heading in re.findall("^## (.+)$", (DOCS / "reference" / "cli.md").read_text(), re.MULTILINE):
        assert re.search(rf"^ +{heading}( |$)", shown, re.MULTILINE), heading


def test_the_exit_codes_page_has_every_code_and_error() -> None:
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \|", (DOCS / "reference" / "exit-codes.md").read_text(), re.MULTILINE)
    assert {int(code): name for code, name in rows} == EXIT_CODES
    raised = {kind.exit_code for kind in vars(errors).values() if isinstance(kind, type)}
    assert raised | {0, 130} == set(EXIT_CODES)


MAPPINGS = (
    *("client", "client.routing", "client.dns", "networkPolicy"),
    *("metrics", "metrics.podMonitor", "metrics.alerts", "metrics.dashboard"),
)
"""Of the chart's values those that hold values of their own."""


def test_the_chart_page_has_every_value() -> None:
    def leaves(values: dict[str, Any], path: str = "") -> Iterator[str]:
        for key, value in values.items():
            if path + key in MAPPINGS:
                yield from leaves(value, f"{path}{key}.")
            else:
                yield path + key

    rows = re.findall(r"^\| (`.+?) \|", (DOCS / "reference" / "chart.md").read_text(), re.MULTILINE)
    named = {name for row in rows for name in re.findall("`([^`]+)`", row)}
    assert named == set(leaves(yaml.safe_load((CHART / "values.yaml").read_text())))
