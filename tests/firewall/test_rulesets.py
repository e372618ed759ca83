"""Rulesets as text, in tests/firewall/cases: what is said of them, and whether the kernel agrees.

A case says first what it is, then lines of

    devices wg0 eth0        that the rules name and that must be there
    warning WORDS           for each obstacle, in order: words of its sentence
    answers doubtful        some answers do not come in although nothing is said of it

then sections, each handed to a program as it stands: [nft], [iptables-nft], [ip6tables-nft], [iptables-legacy],
[ip6tables-legacy]; those of iptables in the format of iptables-save(8).
"""

import re
from pathlib import Path
from typing import NamedTuple

import pytest
from oracle import DEVICE, OWN, SUBNETS, agrees, laptop

from tpvpn.firewall.obstacles import obstacles

CASES = sorted((Path(__file__).parent / "cases").glob("*.txt"))


class Case(NamedTuple):
    devices: list[str]
    warnings: list[list[str]]
    doubtful: bool
    sections: list[tuple[str, str]]


def read_case(path: Path) -> Case:
    head, *parts = re.split(r"^\[([\w-]+)\]\n", path.read_text(), flags=re.MULTILINE)
    lines = [line.split() for line in head.splitlines() if line and not line.startswith("#")]
    assert all(line[0] in ("devices", "warning", "answers") for line in lines), lines
    return Case(
        [device for line in lines if line[0] == "devices" for device in line[1:]],
        [line[1:] for line in lines if line[0] == "warning"],
        ["answers", "doubtful"] in lines,
        list(zip(parts[::2], parts[1::2], strict=True)),
    )


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_case(path: Path) -> None:
    case = read_case(path)
    with laptop(*case.devices) as host:
        for program, rules in case.sections:
            host.install(program, rules)
        said = obstacles(host.read(), DEVICE, OWN, SUBNETS)
        assert len(said) == len(case.warnings), "\n".join(said)
        for words, sentence in zip(case.warnings, said, strict=True):
            assert all(word in sentence for word in words), sentence
        agrees(host, said, case.doubtful)


def test_there_are_cases() -> None:
    assert len(CASES) >= 15
