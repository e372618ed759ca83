"""The host's own resolvers, and how long the addresses of a name are kept."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpvpn.dns.names import KEPT, LEAST, LIMIT, MOST, UNKNOWN, Name
from tpvpn.dns.system import nameservers
from tpvpn.route.prefix import Prefix


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("nameserver 192.0.2.1\nnameserver fd00::53\n", ("192.0.2.1", "fd00::53")),
        ("nameserver 127.0.0.53\nnameserver ::1\n", ()),
        ("# nameserver 192.0.2.1\nsearch corp.example\noptions ndots:2\n", ()),
        ("nameserver fe80::1%eth0\n", ("fe80::1",)),
        ("nameserver\nnameserver nonsense\nnameserver 192.0.2.9 extra\n", ("192.0.2.9",)),
        ("nameserver 192.0.2.1\nnameserver 192.0.2.1\n", ("192.0.2.1",)),
        ("", ()),
    ],
)
def test_nameservers(tmp_path: Path, text: str, found: tuple[str, ...]) -> None:
    (tmp_path / "resolv.conf").write_text(text)
    assert nameservers((tmp_path / "resolv.conf", tmp_path / "none")) == found


def test_behind_a_stub_are_the_servers_that_it_asks(tmp_path: Path) -> None:
    (tmp_path / "stub").write_text("nameserver 127.0.0.53\n")
    (tmp_path / "real").write_text("nameserver 10.130.0.53\n")
    assert nameservers((tmp_path / "stub", tmp_path / "real")) == ("10.130.0.53",)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_file(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "any"
    file.write_bytes(data)
    assert all(Prefix.host(one) for one in nameservers((file,)))


def test_an_address_is_kept_for_a_while() -> None:
    name = Name("api.corp.example")
    name.take(["192.0.2.1"], 30, now=100)
    assert name.due == 130
    name.take(["192.0.2.2"], 0, now=130)
    assert name.addresses == (Prefix.host("192.0.2.1"), Prefix.host("192.0.2.2"))
    assert name.due == 130 + LEAST
    name.take(["192.0.2.2"], 1e9, now=101 + KEPT)
    assert name.addresses == (Prefix.host("192.0.2.2"),)
    assert name.due == 101 + KEPT + MOST


def test_a_name_that_is_not_found_keeps_what_it_had_for_a_while() -> None:
    name = Name("api.corp.example")
    name.take(["192.0.2.1"], 30, now=0)
    name.take([], UNKNOWN, now=KEPT)
    assert name.addresses == (Prefix.host("192.0.2.1"),)
    name.take([], UNKNOWN, now=KEPT + 1)
    assert name.addresses == ()


def test_a_name_has_so_many_addresses_and_no_more() -> None:
    name = Name("everywhere.example")
    for number in range(10):
        name.take([f"192.0.2.{number * 20 + one}" for one in range(20)], 30, now=number)
    assert len(name.addresses) == LIMIT
    assert Prefix.host("192.0.2.199") in name.addresses and Prefix.host("192.0.2.0") not in name.addresses
