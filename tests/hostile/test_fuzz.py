"""Bytes from outside, without I/O: each parser gives one kind of error, whatever comes."""

import contextlib
import json
import secrets
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpvpn.errors import ManagerError, ProtocolError
from tpvpn.manager import http
from tpvpn.proto import message, session
from tpvpn.proto.session import ClientHandshake, ManagerHandshake, Offer, Terms
from tpvpn.transport.upgrade import MAX_HEAD
from tpvpn.wire import frame, vnet

TOKEN, NO_TLS = b"token", bytes(32)
TERMS = Terms("s1", "246.0.0.1", "fd74:7076:706e::1", 1500, ["checksum"], {"ipv4": "kernel", "ipv6": None}, "pod-0")

SCALAR = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=80)
VALUE = st.recursive(
    SCALAR,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
ADDRESS = st.ip_addresses().map(str) | st.sampled_from(
    ["246.0.0.9", "246.15.255.255", "246.16.0.0", "fd74:7076:706e::7", "fd74:7076:706e::7%eth0", "fd74:7076:706f::1"]
)


def client() -> ClientHandshake:
    return ClientHandshake(TOKEN, NO_TLS, secrets.token_bytes(32), Offer("laptop", offloads=["checksum"]))


def manager() -> ManagerHandshake:
    return ManagerHandshake({"ann": TOKEN}, NO_TLS, secrets.token_bytes(32))


def welcomed(terms: Terms) -> Terms:
    """What a client makes of the terms of a manager that knows the token."""
    one, other = client(), manager()
    hello = one.receive(other.greeting)
    assert hello is not None
    other.receive(hello)
    assert one.receive(other.welcome(terms)) is None
    assert one.held is not None
    return one.held.terms


# -- HTTP --------------------------------------------------------------------------------------------------------------

LINE = st.binary(max_size=40) | st.sampled_from(
    [b"GET /v1/session HTTP/1.1", b"GET / HTTP/1.0", b"PRI * HTTP/2.0", b"Upgrade: tpvpn", b"Connection: x, Upgrade"]
)


@given(st.lists(LINE, max_size=6).map(b"\r\n".join), st.sampled_from([b"", b"\r\n", b"\r\n\r\n", b"\r\n\r\nrest"]))
def test_http(head: bytes, end: bytes) -> None:
    try:
        request = http.parse(head + end)
    except ProtocolError:
        return
    assert request is None or (head + end).endswith(request.rest)


@given(st.integers(MAX_HEAD + 1, 3 * MAX_HEAD))
def test_a_head_without_end_is_refused(length: int) -> None:
    with pytest.raises(ProtocolError):
        http.parse((b"GET / HTTP/1.1\r\nX: ").ljust(length, b"x"))


# -- frames and control messages ---------------------------------------------------------------------------------------


@given(st.binary(max_size=400), st.integers(1, 50), st.integers(0, 64))
def test_frames(data: bytes, cut: int, limit: int) -> None:
    """The same whether it comes at once or in pieces, and never more kept than a frame and a piece."""

    def decoded(pieces: list[bytes]) -> list[Any]:
        decoder, seen = frame.Decoder(limit), list[Any]()
        try:
            for piece in pieces:
                decoder.receive(piece)
                seen += decoder.frames()
            seen.append(decoder.remainder())
            assert len(seen[-1]) < limit + frame.HEADER_LENGTH
        except ProtocolError:
            seen.append(ProtocolError)
        return seen

    assert decoded([data]) == decoded([data[at : at + cut] for at in range(0, len(data), cut)])


@given(st.binary(max_size=200) | VALUE.map(lambda value: json.dumps(value).encode()))
def test_control_payloads(payload: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        assert isinstance(message.decode(payload)["type"], str)


@given(st.dictionaries(st.sampled_from(["a", "b"]), VALUE, max_size=2), st.sampled_from([str, int, bool, list, dict]))
def test_members(members: dict[str, Any], kind: type[Any]) -> None:
    try:
        value = message.optional({"type": "x", **members}, "a", kind)
        assert value is None or isinstance(value, kind)
    except ProtocolError as error:
        assert len(str(error)) < 200


@pytest.mark.parametrize("bracket", ["[]", "{}"])
@pytest.mark.parametrize(("kind", "name"), [("error", "message"), ("greeting", "nonce"), ("greeting", "versions")])
def test_deep_nesting_is_one_kind_of_error(kind: str, name: str, bracket: str) -> None:
    """json.loads goes almost as deep as the stack; to show what it gave may then need more than is left."""
    opening, closing = ('{"a":', "1}") if bracket == "{}" else ("[", "]")
    for depth in (*range(700, 1001), 100_000):
        nested = opening * depth + closing[:-1] + closing[-1] * depth
        with pytest.raises(ManagerError) as caught:
            client().receive(f'{{"type":"{kind}","{name}":{nested}}}'.encode())
        assert len(str(caught.value)) < 400


@pytest.mark.parametrize("member", ["versions", "type", "message", "nonce"])
def test_an_error_never_shows_all_that_came(member: str) -> None:
    huge: object = list(range(2, 100_000)) if member == "versions" else "\x1b[2J" * 100_000
    kind = "error" if member == "message" else "greeting"
    with pytest.raises(ManagerError) as caught:
        client().receive(message.encode(kind, **{"versions": [2], "nonce": "0" * 64, member: huge}))
    assert len(str(caught.value)) < 500
    assert str(caught.value).isprintable()


# -- handshakes --------------------------------------------------------------------------------------------------------


@given(st.dictionaries(st.sampled_from(["type", "version", "versions", "nonce", "name", "ipv4", "proof"]), VALUE))
def test_handshakes(members: dict[str, Any]) -> None:
    for kind in ("greeting", "hello", "welcome", "error"):
        payload = json.dumps({"type": kind, "versions": [1], "version": 1, "nonce": "0" * 64, **members}).encode()
        with pytest.raises(ManagerError):
            manager().receive(payload)
        one = client()
        for _ in range(2):
            with contextlib.suppress(ManagerError):
                one.receive(payload)
            assert one.held is None


@pytest.mark.parametrize(
    "proof", ["", "0", "x", "0" * 63, "0" * 65, "\ud800" * 64, "é" * 64], ids=lambda proof: ascii(proof)[:12]
)
def test_a_welcome_of_the_longest_frame_with_a_proof_of_another_length(proof: str) -> None:
    one, other = client(), manager()
    one.receive(other.greeting)
    empty = len(message.encode("welcome", filler="", proof=proof))
    payload = message.encode("welcome", filler="x" * (frame.MAX_PAYLOAD - empty), proof=proof)
    with pytest.raises(ManagerError):
        one.receive(payload)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "session": VALUE,
            "ipv4": ADDRESS | VALUE,
            "ipv6": ADDRESS | VALUE,
            "mtu": st.integers(0, 70_000) | VALUE,
            "offloads": st.lists(st.sampled_from([*vnet.names(vnet.Offload.ALL), "ipsec"])) | VALUE,
            "exit": st.dictionaries(st.sampled_from(["ipv4", "ipv6", "x"]), VALUE) | VALUE,
            "pod": VALUE,
            "facts": VALUE,
            "config": VALUE,
            "linger": VALUE,
        },
    )
)
def test_terms_of_a_manager_that_knows_the_token(members: dict[str, Any]) -> None:
    """They configure the laptop: whatever they are, what is taken is harmless."""
    try:
        terms = welcomed(replace(TERMS, **members))
    except ProtocolError:
        return
    assert terms.ipv4 or terms.ipv6
    assert terms.ipv4 is None or IPv4Address(terms.ipv4) in session.SPACE4
    assert terms.ipv6 is None or IPv6Address(terms.ipv6) in session.SPACE6
    assert (1280 if terms.ipv6 else 576) <= terms.mtu <= 65_535
    assert all(text.isprintable() for text in (terms.session, terms.pod, *filter(None, terms.exit.values())))
    json.dumps([terms.exit, terms.offloads])


@pytest.mark.parametrize(
    "members",
    [
        {"mtu": 1},
        {"mtu": 70_000},
        {"mtu": 1279},
        {"mtu": True},
        {"ipv4": None, "ipv6": None},
        *({"ipv4": text} for text in ["127.0.0.1", "0.0.0.0", "224.0.0.1", "192.0.2.2", "10.8.0.9", "10.130.0.80"]),
        *({"ipv4": text} for text in ["246.16.0.0", "245.255.255.255", "255.255.255.255", "246.0.0.1/8", "::1", "", 5]),
        *(
            {"ipv6": text}
            for text in ["::1", "::", "ff02::1", "fe80::1", "2001:db8::1", "fd10:8::9", "::ffff:10.0.0.1"]
        ),
        *({"ipv6": text} for text in ["fd74:7076:706e::1%eth0", "fd74:7076:706f::", "246.0.0.1"]),
    ],
    ids=str,
)
def test_terms_that_would_harm_the_laptop_are_refused(members: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        welcomed(replace(TERMS, **members))


@pytest.mark.parametrize(
    ("named", "taken"),
    [
        (["tso4", "tso6", "ecn", "uso4", "uso6"], []),
        (["checksum", "ecn"], ["checksum"]),
        (["checksum", "uso4"], ["checksum"]),
        (["checksum", "tso6", "ecn", "rdma"], ["checksum", "tso6", "ecn"]),
        (["checksum", "uso4", "uso6"], ["checksum", "uso4", "uso6"]),
    ],
)
def test_only_offloads_that_a_kernel_takes_together_are_agreed_on(named: list[str], taken: list[str]) -> None:
    assert welcomed(replace(TERMS, offloads=named)).offloads == taken
    one = ClientHandshake(TOKEN, NO_TLS, secrets.token_bytes(32), Offer("laptop", offloads=named))
    other = manager()
    hello = one.receive(other.greeting)
    assert hello is not None
    assert other.receive(hello).offloads == taken


def test_a_wanted_address_with_a_zone_is_refused() -> None:
    """It would be another text for an address that somebody else has."""
    one = ClientHandshake(TOKEN, NO_TLS, secrets.token_bytes(32), Offer("laptop", ipv6="fd74:7076:706e::1%x"))
    other = manager()
    hello = one.receive(other.greeting)
    assert hello is not None
    with pytest.raises(ProtocolError, match="ipv6"):
        other.receive(hello)
