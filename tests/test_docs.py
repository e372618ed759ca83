"""What the documents promise about themselves: the README's length, links that lead somewhere, the demo's commands."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_readme_is_short_and_begins_with_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 450
    commands = re.findall(r"^scripts/\w+", text, re.MULTILINE)
    assert commands[:2] == ["scripts/demo", "scripts/test"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_every_module_stands_in_the_architecture() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    source = ROOT / "src" / "tpvpn"
    for path in source.iterdir():
        name = path.name.removesuffix(".py")
        if not name.startswith("_"):
            assert re.search(rf"`{name}/?`|{name}", text), f"{name} is not in docs/architecture.md"
