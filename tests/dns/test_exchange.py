"""Questions over a tunnel that the test plays."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from tpvpn.dns import exchange as module
from tpvpn.dns.exchange import LIMIT, Exchange
from tpvpn.wire import dns

QUERY = dns.query(dns.labels("Db.shop"), dns.A, 0x1234)


def answer(query: bytes) -> bytes:
    return dns.reply(query, dns.Rcode.NOERROR)


def play(scenario: Callable[[Exchange, list[tuple[int, bytes]]], Awaitable[None]]) -> None:
    async def playing() -> None:
        exchange, sent = Exchange(), list[tuple[int, bytes]]()
        exchange.attach(lambda identity, message: sent.append((identity, message)))
        async with asyncio.timeout(5):
            await scenario(exchange, sent)

    asyncio.run(playing())


def test_an_answer_has_the_askers_id() -> None:
    async def scenario(exchange: Exchange, sent: list[tuple[int, bytes]]) -> None:
        got: list[bytes | None] = []
        exchange.ask(QUERY, got.append)
        ((identity, message),) = sent
        assert message == dns.with_identity(QUERY, identity)
        exchange.receive(identity, answer(message))
        assert got == [answer(QUERY)]
        exchange.receive(identity, answer(message))
        assert len(got) == 1

    play(scenario)


def test_ids_are_random_and_each_has_its_own() -> None:
    async def scenario(exchange: Exchange, sent: list[tuple[int, bytes]]) -> None:
        got: list[bytes | None] = []
        for number in range(LIMIT):
            exchange.ask(dns.with_identity(QUERY, number), got.append)
        identities = [identity for identity, _ in sent]
        assert len(set(identities)) == LIMIT
        assert max(identities) - min(identities) > 1 << 15 and identities != sorted(identities)
        exchange.ask(QUERY, got.append)
        assert got == [None] and len(sent) == LIMIT  # one too many
        for identity, message in sent:
            exchange.receive(identity, answer(message))
        assert {one[:2] for one in got if one} == {number.to_bytes(2) for number in range(LIMIT)}

    play(scenario)


@pytest.mark.parametrize(
    "spoilt",
    [
        lambda message: b"",
        lambda message: message,  # the question itself
        lambda message: bytes([message[0] ^ 1]) + answer(message)[1:],
        lambda message: answer(message).replace(b"shop", b"shap"),
        lambda message: answer(message)[:-3] + b"\x1c\0\1",  # AAAA
        lambda message: answer(message)[:11],
    ],
)
def test_what_is_no_answer_to_the_question_is_dropped(spoilt: Callable[[bytes], bytes]) -> None:
    async def scenario(exchange: Exchange, sent: list[tuple[int, bytes]]) -> None:
        got: list[bytes | None] = []
        exchange.ask(QUERY, got.append)
        ((identity, message),) = sent
        exchange.receive(identity, spoilt(message))
        exchange.receive(identity ^ 1, answer(message))
        assert not got
        exchange.receive(identity, answer(message)[:12] + answer(message)[12:].lower())
        assert len(got) == 1 and got[0]

    play(scenario)


def test_no_answer_is_said_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.1)

    async def scenario(exchange: Exchange, sent: list[tuple[int, bytes]]) -> None:
        nothing: asyncio.Future[bytes | None] = asyncio.get_running_loop().create_future()
        exchange.ask(QUERY, nothing.set_result)
        assert await nothing is None
        exchange.receive(sent[0][0], answer(sent[0][1]))  # too late

    play(scenario)
    assert module.PATIENCE < 3


def test_what_waits_is_asked_again_over_the_next_link() -> None:
    async def scenario(exchange: Exchange, sent: list[tuple[int, bytes]]) -> None:
        got: list[bytes | None] = []
        exchange.ask(QUERY, got.append)
        exchange.detach()
        exchange.ask(dns.with_identity(QUERY, 7), got.append)
        assert len(sent) == 1
        again: list[tuple[int, bytes]] = []
        exchange.attach(lambda identity, message: again.append((identity, message)))
        assert again[0] == sent[0] and len(again) == 2
        for identity, message in again:
            exchange.receive(identity, answer(message))
        assert got == [answer(QUERY), answer(dns.with_identity(QUERY, 7))]

    play(scenario)
