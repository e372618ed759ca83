"""The list of top-level domains: whole, in the form in which names are compared, and without what is no public one."""

import re
from importlib import resources

from tpvpn.dns.policy import public_domains

LINES = resources.files("tpvpn.dns").joinpath("tlds.txt").read_text().splitlines()


def test_every_line_is_a_label_in_small_letters_and_in_order() -> None:
    assert LINES[0].startswith("#") and "scripts/update-tlds" in LINES[0]
    assert [line for line in LINES[1:] if not re.fullmatch(r"[a-z]{2,63}|xn--[a-z0-9-]{1,59}", line)] == []
    assert LINES[1:] == sorted(set(LINES[1:]))
    assert public_domains() == set(LINES[1:])


def test_it_is_the_whole_list() -> None:
    assert 1400 < len(public_domains()) < 2500
    assert {"com", "org", "net", "arpa", "de", "uk", "xn--p1ai", "xn--fiqs8s"} <= public_domains()
    assert {"dev", "app", "prod", "shop", "cloud", "zone", "services", "systems", "tools"} <= public_domains()


def test_what_is_nobodys_in_public_is_not_there() -> None:
    ours = {"svc", "pod", "default", "cluster", "kube-system", "staging", "backend"}
    special = {"local", "localhost", "test", "example", "invalid", "onion", "internal", "lan", "home", "corp"}
    assert not (ours | special) & public_domains()
