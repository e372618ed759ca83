"""The handshake, two machines joined in memory: what it grants, and what it refuses."""

import json
import secrets
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpvpn.errors import ManagerError, ProtocolError, TpvpnError
from tpvpn.proto import message
from tpvpn.proto.session import ClientHandshake, Held, ManagerHandshake, Offer, RefusedError, Terms

TOKEN = b"0123456789abcdef"
NO_TLS = bytes(32)
OFFER = Offer("laptop", None, None, ["checksum", "tso4"])
TERMS = Terms("s1", "246.0.0.1", "fd74:7076:706e::1", 1500, ["checksum"], {"ipv4": "kernel", "ipv6": None}, "pod-0")


def client(token: bytes = TOKEN, certificate: bytes = NO_TLS) -> ClientHandshake:
    return ClientHandshake(token, certificate, secrets.token_bytes(32), OFFER)


def manager(certificate: bytes = NO_TLS, **tokens: bytes) -> ManagerHandshake:
    return ManagerHandshake(tokens or {"ann": TOKEN}, certificate, secrets.token_bytes(32))


def hello_of(one: ClientHandshake, other: ManagerHandshake) -> bytes:
    hello = one.receive(other.greeting)
    assert hello is not None
    return hello


def test_both_sides_agree_and_know_each_other() -> None:
    one, other = client(), manager(bob=b"another token", ann=TOKEN)
    assert other.receive(hello_of(one, other)) == OFFER
    assert other.user == "ann"
    assert one.receive(other.welcome(TERMS)) is None
    assert one.held is not None and one.held.terms == TERMS


def test_no_token_crosses_the_wire() -> None:
    one, other = client(), manager()
    hello = hello_of(one, other)
    other.receive(hello)
    spoken = other.greeting + hello + other.welcome(TERMS)
    assert TOKEN not in spoken
    assert TOKEN.hex().encode() not in spoken


def test_a_wrong_token_is_refused_and_the_client_named() -> None:
    other = manager()
    with pytest.raises(RefusedError, match="laptop"):
        other.receive(hello_of(client(b"wrong"), other))


def test_a_manager_without_the_token_is_refused() -> None:
    one, impostor = client(), ManagerHandshake({"x": b"guess"}, NO_TLS, secrets.token_bytes(32))
    hello_of(one, impostor)
    impostor.user = "x"
    with pytest.raises(ManagerError, match="right manager"):
        one.receive(impostor.welcome(TERMS))
    assert one.held is None


def test_a_replayed_hello_is_refused() -> None:
    first = manager()
    hello = hello_of(client(), first)
    first.receive(hello)
    with pytest.raises(RefusedError):
        manager().receive(hello)


def test_a_replayed_welcome_is_refused() -> None:
    one, other = client(), manager()
    other.receive(hello_of(one, other))
    welcome = other.welcome(TERMS)
    again = client()
    again.receive(other.greeting)
    with pytest.raises(ManagerError):
        again.receive(welcome)


def test_a_reflected_proof_is_refused() -> None:
    """The manager's role played with the client's own proof, and the other way round."""
    one, other = client(), manager()
    hello = hello_of(one, other)
    proof = json.loads(hello)["proof"]
    blank = other_welcome(proof)
    with pytest.raises(ManagerError):
        one.receive(blank)


def other_welcome(proof: str) -> bytes:
    from dataclasses import asdict

    return message.encode("welcome", **asdict(TERMS), proof=proof)


def test_someone_between_the_ends_of_tls_is_refused() -> None:
    """He shows the client his own certificate and passes all frames on."""
    one, other = client(certificate=b"m" * 32), manager(certificate=b"t" * 32)
    with pytest.raises(RefusedError):
        other.receive(hello_of(one, other))


@given(st.data())
def test_any_altered_byte_of_the_hello_is_refused(data: st.DataObject) -> None:
    other = manager()
    hello = bytearray(hello_of(client(), other))
    at = data.draw(st.integers(0, len(hello) - 1))
    hello[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(ProtocolError):
        other.receive(bytes(hello))


@given(st.data())
def test_any_altered_byte_of_greeting_or_welcome_is_refused(data: st.DataObject) -> None:
    one, other = client(), manager()
    greeting = bytearray(other.greeting)
    touched = data.draw(st.sampled_from(["greeting", "welcome"]))
    if touched == "greeting":
        greeting[data.draw(st.integers(0, len(greeting) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(TpvpnError):
        hello = one.receive(bytes(greeting))
        assert hello is not None
        other.receive(hello)
        welcome = bytearray(other.welcome(TERMS))
        if touched == "welcome":
            welcome[data.draw(st.integers(0, len(welcome) - 1))] ^= data.draw(st.integers(1, 255))
        one.receive(bytes(welcome))
        assert one.held is None, "an altered handshake was accepted"


@pytest.mark.parametrize(("theirs", "older"), [([2, 3], "tpvpn here"), ([0], "the manager")])
def test_no_common_version_names_both_and_what_to_upgrade(theirs: list[int], older: str) -> None:
    with pytest.raises(ManagerError, match=f"upgrade {older}") as caught:
        client().receive(message.encode("greeting", versions=theirs, nonce="0" * 64))
    assert "version 1" in str(caught.value) or "tpvpn 1" in str(caught.value)


def test_an_error_of_the_manager_is_shown_without_control_characters() -> None:
    with pytest.raises(ManagerError, match=r"full\?\[2J"):
        client().receive(message.encode("error", message="full\x1b[2J"))


MEMBERS = ["type", "version", "versions", "nonce", "name", "ipv4", "ipv6", "offloads", "proof", "mtu"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(MEMBERS), inner, max_size=9),
    max_leaves=12,
)


@given(st.binary(max_size=300) | JSON.map(lambda value: json.dumps(value).encode()))
def test_garbage_is_one_kind_of_error(payload: bytes) -> None:
    for receive in (client().receive, manager().receive):
        with pytest.raises(TpvpnError):
            receive(payload)


@given(
    st.sampled_from(["version", "nonce", "name", "ipv4", "ipv6", "offloads", "proof"]),
    st.none() | st.booleans() | st.integers() | st.text(max_size=70) | st.lists(st.text(max_size=3), max_size=3),
)
def test_a_hello_with_one_strange_member_never_crashes(name: str, value: object) -> None:
    other = manager()
    hello = json.loads(hello_of(client(), other)) | {name: value}
    with pytest.raises(ProtocolError):
        other.receive(json.dumps(hello).encode())


@pytest.mark.parametrize(
    ("facts", "ping", "without"),
    [
        ({}, {"ipv4": True, "ipv6": True}, ""),
        ({"ping": {"ipv4": True}}, {"ipv4": True, "ipv6": True}, ""),
        ({"ping": {"ipv4": True, "ipv6": False}}, {"ipv4": True, "ipv6": False}, "IPv6"),
        ({"ping": {"ipv4": False, "ipv6": False, "ipv9": False}}, {"ipv4": False, "ipv6": False}, "IPv4 and IPv6"),
        ({"ping": [False]}, {"ipv4": True, "ipv6": True}, ""),
        ({"ping": {"ipv4": {"a": 1}}}, {"ipv4": True, "ipv6": True}, ""),
    ],
)
def test_which_families_have_ping(facts: dict[str, object], ping: dict[str, bool], without: str) -> None:
    terms = replace(TERMS, exit={"ipv4": "socket", "ipv6": "socket"}, facts=facts)
    assert (terms.ping, terms.without_ping) == (ping, without)
    assert list(replace(terms, exit={"ipv4": None, "ipv6": "kernel"}).ping) == ["ipv6"]


# -- a session that outlives its links ---------------------------------------------------------------------------------


def opened() -> tuple[Held, bytes]:
    """A session as its client has it, and its secret at the manager."""
    one, other = client(), manager()
    other.receive(hello_of(one, other))
    one.receive(other.welcome(TERMS))
    assert one.held is not None
    return one.held, other.secret


def joining(held: Held, secret: bytes, token: bytes = TOKEN, link: int = 1) -> ClientHandshake:
    return ClientHandshake(token, NO_TLS, secrets.token_bytes(32), held.wanted(OFFER, link), secret)


def test_both_ends_have_the_same_secret_and_each_session_another() -> None:
    held, secret = opened()
    assert held.secret == secret
    assert len(secret) == 32
    assert opened()[1] != secret


def test_a_link_joins_by_the_secret() -> None:
    held, secret = opened()
    one, other = joining(held, held.secret, link=3), manager()
    asked = other.receive(hello_of(one, other))
    assert isinstance(asked, Offer)
    assert (asked.session, asked.link, asked.ipv4, asked.ipv6) == ("s1", 3, TERMS.ipv4, TERMS.ipv6)
    assert other.resumes(asked, secret)
    one.receive(other.welcome(TERMS))
    assert one.held == held, "the secret stays that of the session"


def test_a_manager_that_has_forgotten_it_begins_another_with_another_secret() -> None:
    held, _ = opened()
    one, other = joining(held, held.secret), manager()
    other.receive(hello_of(one, other))
    one.receive(other.welcome(replace(TERMS, session="s2")))
    assert one.held == Held(replace(TERMS, session="s2"), other.secret)
    assert one.held.secret != held.secret


def test_nobody_joins_who_has_the_token_alone() -> None:
    held, secret = opened()
    for guess in (b"", bytes(32), TOKEN, secrets.token_bytes(32)):
        other = manager()
        asked = other.receive(hello_of(joining(held, guess), other))
        assert isinstance(asked, Offer)
        assert not other.resumes(asked, secret)
    other = manager()
    asked = other.receive(hello_of(client(), other))
    assert isinstance(asked, Offer)
    assert not other.resumes(asked, secret)


def test_a_proof_of_the_secret_is_good_for_one_greeting() -> None:
    """One who has the token, and saw the proof of another link, has nothing of it."""
    held, secret = opened()
    other = manager()
    seen = json.loads(hello_of(joining(held, held.secret), other))["resume"]

    class Replaying(ClientHandshake):
        def _asked(self):
            return {**super()._asked(), "resume": seen}

    later = manager()
    thief = Replaying(TOKEN, NO_TLS, secrets.token_bytes(32), held.wanted(OFFER, 0))
    asked = later.receive(hello_of(thief, later))
    assert isinstance(asked, Offer)
    assert asked.resume == seen
    assert not later.resumes(asked, secret)


def test_neither_secret_nor_token_crosses_the_wire_of_a_link() -> None:
    held, secret = opened()
    one, other = joining(held, held.secret), manager()
    hello = hello_of(one, other)
    other.receive(hello)
    spoken = other.greeting + hello + other.welcome(TERMS)
    for hidden in (TOKEN, TOKEN.hex().encode(), secret, secret.hex().encode()):
        assert hidden not in spoken


@pytest.mark.parametrize("member", [{"link": 8}, {"link": -1}, {"link": "0"}, {"link": True}, {"link": None},
                                    {"resume": 5}, {"resume": ["x"]}, {"session": 7}])  # fmt: skip
def test_a_hello_that_makes_no_sense_is_refused(member: dict[str, object]) -> None:
    class Odd(ClientHandshake):
        def _asked(self):
            return {**super()._asked(), **member}

    other = manager()
    with pytest.raises(ProtocolError):
        other.receive(hello_of(Odd(TOKEN, NO_TLS, secrets.token_bytes(32), OFFER), other))


@given(st.text(max_size=80))
def test_whatever_stands_for_the_proof_is_none(text: str) -> None:
    class Odd(ClientHandshake):
        def _asked(self):
            return {**super()._asked(), "session": "s1", "resume": text}

    other = manager()
    asked = other.receive(hello_of(Odd(TOKEN, NO_TLS, secrets.token_bytes(32), OFFER), other))
    assert isinstance(asked, Offer)
    assert not other.resumes(asked, secrets.token_bytes(32))


@pytest.mark.parametrize("nonce", ["", "0" * 63, "0" * 65, "g" * 64, "A" * 64, "0" * 62 + "\\u", 64])
def test_a_nonce_is_64_hexadecimal_digits(nonce: object) -> None:
    greeting = message.encode("greeting", versions=[1], nonce=nonce)
    with pytest.raises(ProtocolError):
        client().receive(greeting)
