"""Pings and their answers, whoever sent them."""

import pytest

from tpvpn.errors import ProtocolError
from tpvpn.proto import message, ping


@pytest.mark.parametrize(
    ("asked", "answered"),
    [
        (ping.encode(1), {"type": "pong", "id": 1}),
        (ping.encode(-7, padding=3), {"type": "pong", "id": -7}),
        (ping.encode(2, wanted=4), {"type": "pong", "id": 2, "padding": "xxxx"}),
        (ping.encode(3, wanted=-4), {"type": "pong", "id": 3}),
        (message.encode("ping", id=4, wanted=None), {"type": "pong", "id": 4}),
        (ping.encode(5, wanted=1 << 40), {"type": "pong", "id": 5, "padding": "x" * ping.MAX_PADDING}),
    ],
)
def test_answers(asked: bytes, answered: dict[str, object]) -> None:
    assert message.decode(ping.answer(message.decode(asked), ping.MAX_PADDING)) == answered


@pytest.mark.parametrize("members", [{}, {"id": "1"}, {"id": 1, "wanted": "all"}, {"id": 1, "wanted": True}])
def test_what_is_no_ping(members: dict[str, object]) -> None:
    with pytest.raises(ProtocolError, match="has no proper"):
        ping.answer(message.decode(message.encode("ping", **members)), 0)


def test_padding_is_as_long_as_it_is_said() -> None:
    assert len(ping.encode(1, padding=1000)) - len(ping.encode(1)) == 1000 + len(',"padding":""')


def test_an_answer_has_no_more_padding_than_its_sender_likes() -> None:
    asked = message.decode(ping.encode(1, wanted=4))
    assert [len(ping.answer(asked, most)) - len(ping.answer(asked, 0)) for most in (0, 1, 100)] == [0, 14, 17]
