"""The question about sessions, two machines joined in memory: asked and answered, or refused."""

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpvpn.errors import ManagerError, ProtocolError, TpvpnError
from tpvpn.proto import message
from tpvpn.proto.handshake import MANAGER
from tpvpn.proto.session import ClientHandshake, ManagerHandshake, Offer, RefusedError, Terms
from tpvpn.proto.sessions import Answer, Listed, Question, SessionsHandshake

TOKEN, NO_TLS = b"token", bytes(32)
LISTED = Listed(
    "0f", "ann", "laptop", "[::1]:9", "246.0.0.1", None, "2026-01-01T00:00:00+00:00", "tls", 1,
    {"ipv4": "kernel", "ipv6": None}, 12, 10**15,
)  # fmt: skip
ANSWER = Answer("ann", [LISTED], ["1e"])
QUESTION = Question("laptop", end_session="1e")


def asking(token: bytes = TOKEN, question: Question = QUESTION) -> SessionsHandshake:
    return SessionsHandshake(token, NO_TLS, os.urandom(32), question)


def asked(one: SessionsHandshake | ClientHandshake, other: ManagerHandshake) -> bytes:
    request = one.receive(other.greeting)
    assert request is not None
    return request


def manager(**tokens: bytes) -> ManagerHandshake:
    return ManagerHandshake(tokens or {"ann": TOKEN}, NO_TLS, os.urandom(32))


def test_what_is_asked_and_answered() -> None:
    one, other = asking(), manager(bob=b"x", ann=TOKEN)
    assert other.receive(asked(one, other)) == QUESTION
    assert other.user == "ann"
    one.receive(other.sessions(ANSWER))
    assert one.done
    assert one.answered == ANSWER


def test_a_foreign_token_a_replay_and_an_altered_question_are_refused() -> None:
    other = manager()
    with pytest.raises(RefusedError, match="laptop"):
        other.receive(asked(asking(b"wrong"), other))
    request = asked(asking(), other)
    with pytest.raises(RefusedError):
        manager().receive(request)
    with pytest.raises(RefusedError):
        other.receive(request.replace(b'"1e"', b'"1f"'))
    with pytest.raises(RefusedError):
        other.receive(request.replace(b'"end_session"', b'"end_xession"'))


def test_one_request_does_not_pass_for_the_other() -> None:
    """Nor one answer: the type is proved with the rest."""
    other = manager()
    hello = asked(ClientHandshake(TOKEN, NO_TLS, os.urandom(32), Offer("laptop")), other)
    with pytest.raises(RefusedError):
        other.receive(hello.replace(b'"hello"', b'"sessions"'))
    one, other = asking(), manager()
    other.receive(asked(one, other))
    terms = Terms("s1", "246.0.0.1", None, 1500, [], {"ipv4": "kernel", "ipv6": None}, "pod-0")
    with pytest.raises(ProtocolError, match="'welcome' in the middle"):
        one.receive(other.welcome(terms))


def test_an_answer_without_the_token_is_refused() -> None:
    one, impostor = asking(), manager(x=b"guess")
    asked(one, impostor)
    impostor.user = "x"
    with pytest.raises(ManagerError, match="right manager"):
        one.receive(impostor.sessions(ANSWER))
    assert one.answered is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["session", "user", "exit", "ipv4", "from_client"]), inner, max_size=4)
    ),
    max_leaves=8,
)


@given(st.sampled_from(["name", "end_session", "end_user"]), JSON)
def test_any_question_is_one_or_a_protocol_error(name: str, value: object) -> None:
    other = manager()
    request = json.loads(asked(asking(), other)) | {name: value}
    with pytest.raises(ProtocolError):
        other.receive(json.dumps(request).encode())


@given(st.sampled_from(["user", "sessions", "ended"]), JSON, st.sampled_from(list(Listed.__dataclass_fields__)))
def test_any_proven_answer_is_one_or_one_kind_of_error(name: str, value: object, member: str) -> None:
    one, other = asking(), manager()
    other.receive(asked(one, other))
    answer = json.loads(message.encode("sessions", user="ann", sessions=[], ended=[]))
    del answer["type"]
    row = {field: getattr(LISTED, field) for field in Listed.__dataclass_fields__} | {member: value}
    answer["sessions"] = [row]
    answer[name] = value if name != "sessions" else [row, value]
    payload = other._transcripts["ann"].prove(MANAGER, "sessions", answer)
    try:
        one.receive(payload)
    except TpvpnError:
        return
    assert one.answered
    assert all(isinstance(text, str) for text in one.answered.ended)


def test_a_strange_name_is_shown_without_control_characters() -> None:
    one, other = asking(), manager()
    other.receive(asked(one, other))
    row = {field: getattr(LISTED, field) for field in Listed.__dataclass_fields__} | {"client": "\x1b[2J"}
    one.receive(other._transcripts["ann"].prove(MANAGER, "sessions", {"user": "ann", "sessions": [row], "ended": []}))
    assert one.answered
    assert one.answered.sessions[0].client == "?[2J"
