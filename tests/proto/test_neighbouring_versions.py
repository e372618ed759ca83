"""Ends of neighbouring versions: the highest that both speak, or a sentence; what a later one may add is skipped."""

import os
from dataclasses import asdict

import pytest

from tpvpn.errors import ManagerError, ProtocolError
from tpvpn.proto import message
from tpvpn.proto.handshake import MANAGER, ClientSide, Transcript
from tpvpn.proto.session import ClientHandshake, ManagerHandshake, Offer, Terms
from tpvpn.proto.sessions import Answer, Question, SessionsHandshake

TOKEN, NO_TLS = b"token", bytes(32)
OFFER = Offer("laptop", offloads=["checksum"])
TERMS = Terms("s1", "246.0.0.1", None, 1500, [], {"ipv4": "kernel", "ipv6": None}, "pod-0")


def manager(*versions: int) -> ManagerHandshake:
    return ManagerHandshake({"ann": TOKEN}, NO_TLS, os.urandom(32), versions)


def client(*versions: int) -> ClientHandshake:
    return ClientHandshake(TOKEN, NO_TLS, os.urandom(32), OFFER, versions=versions)


def asking(*versions: int) -> SessionsHandshake:
    return SessionsHandshake(TOKEN, NO_TLS, os.urandom(32), Question("laptop"), versions)


def greeted(one: ClientSide, greeting: bytes) -> bytes:
    request = one.receive(greeting)
    assert request is not None
    return request


MEETINGS = [
    ((1,), (1, 2), 1),
    ((2,), (1, 2), 2),
    ((1, 2), (1,), 1),
    ((1, 2), (2,), 2),
    ((1, 2), (2, 3), 2),
    ((2, 3), (1, 2), 2),
    ((1, 2, 3), (1, 2, 3), 3),
    ((1, 3), (1, 2), 1),
]


@pytest.mark.parametrize(("theirs", "ours", "met"), MEETINGS)
def test_they_meet_at_the_highest_that_both_speak(theirs: tuple[int, ...], ours: tuple[int, ...], met: int) -> None:
    other, one = manager(*theirs), client(*ours)
    assert other.receive(greeted(one, other.greeting)) == OFFER
    one.receive(other.welcome(TERMS))
    assert one.held is not None
    assert (one.version, other.version, one.held.terms) == (met, met, TERMS)
    other, curious = manager(*theirs), asking(*ours)
    assert other.receive(greeted(curious, other.greeting)) == Question("laptop")
    curious.receive(other.sessions(Answer("ann", [], [])))
    assert (curious.version, other.version, curious.answered) == (met, met, Answer("ann", [], []))


@pytest.mark.parametrize(
    ("theirs", "ours", "said"),
    [
        ((2, 3), (1,), "the manager speaks protocol version 2 and 3, this tpvpn 1: upgrade tpvpn here"),
        ((1,), (2, 3), "the manager speaks protocol version 1, this tpvpn 2 and 3: upgrade the manager"),
        ((1, 2), (3, 4), "the manager speaks protocol version 1 and 2, this tpvpn 3 and 4: upgrade the manager"),
        ((), (1,), "the manager speaks protocol version none, this tpvpn 1: upgrade the manager"),
    ],
)
def test_or_the_client_says_what_to_upgrade(theirs: tuple[int, ...], ours: tuple[int, ...], said: str) -> None:
    for one in (client(*ours), asking(*ours)):
        with pytest.raises(ManagerError) as caught:
            one.receive(manager(*theirs).greeting)
        assert str(caught.value) == said


@pytest.mark.parametrize(
    ("chosen", "ours", "said"),
    [
        (3, (1, 2), "the client speaks protocol version 3, this manager 1 and 2: upgrade the manager"),
        (1, (2, 3), "the client speaks protocol version 1, this manager 2 and 3: upgrade tpvpn there"),
    ],
)
def test_a_manager_says_so_too(chosen: int, ours: tuple[int, ...], said: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        manager(*ours).receive(greeted(client(chosen), manager(chosen).greeting))
    assert str(caught.value) == said


def test_nobody_between_them_makes_them_meet_lower() -> None:
    """A greeting with the higher version struck out: the client answers it, and its proof is of another greeting."""
    other, one = manager(1, 2), client(1, 2)
    struck = other.greeting.replace(b"[1,2]", b"[1]")
    assert struck != other.greeting
    with pytest.raises(ProtocolError):
        other.receive(greeted(one, struck))


class Later(ClientHandshake):
    """A client of a later version that speaks ours, with members that we do not know."""

    def _asked(self):
        return {**super()._asked(), "colour": "blue", "end_session": {"x": [1]}, "offloads": ["checksum", "warp"]}


def test_members_of_a_later_version_are_skipped_at_the_manager() -> None:
    other = manager(1)
    assert other.receive(greeted(Later(TOKEN, NO_TLS, os.urandom(32), OFFER, versions=(1, 2)), other.greeting)) == OFFER


class LaterManager(ManagerHandshake):
    """A manager of a later version that speaks ours, with members that we do not know."""

    def __init__(self) -> None:
        super().__init__({}, NO_TLS, bytes(32))
        self.greeting = message.encode("greeting", motd={"a": [None]}, versions=[1, 2, "x"], nonce="0" * 64)
        self._transcripts = {"ann": Transcript(TOKEN, NO_TLS)}
        self._transcripts["ann"].add(self.greeting)

    def welcome(self, terms: Terms) -> bytes:
        more = {"weather": [1], "exit": {**terms.exit, "ipv9": 7}, "offloads": [*terms.offloads, "warp", 3]}
        return self._transcripts["ann"].prove(MANAGER, "welcome", {**asdict(terms), **more})


def test_members_of_a_later_version_are_skipped_at_the_client() -> None:
    other, one = LaterManager(), client(1)
    other.receive(greeted(one, other.greeting))
    one.receive(other.welcome(TERMS))
    assert one.held is not None and one.held.terms == TERMS
