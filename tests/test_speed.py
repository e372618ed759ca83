"""How much a way carries, measured over ways of known rates, in virtual time."""

import asyncio
import itertools
import json
import selectors
from collections.abc import Callable, Coroutine
from types import SimpleNamespace

import pytest

from tpvpn import speed as module
from tpvpn.errors import LinkLostError, ManagerError
from tpvpn.proto import message, ping
from tpvpn.speed import PERIOD, Speed

Run = Callable[[Coroutine[None, None, None]], None]


class Skipping(selectors.SelectSelector):
    """Waits for nothing: so much time has passed then."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert timeout is not None, "it would wait for ever"
        self.now += timeout
        return super().select(0)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a coroutine on a loop whose clock, which is the measurement's too, stands still while anything is done."""
    skipping = Skipping()
    loop = asyncio.SelectorEventLoop(skipping)
    monkeypatch.setattr(loop, "time", lambda: skipping.now)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=loop.time))

    def run(coroutine: Coroutine[None, None, None]) -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(coroutine)

    return run


class Way:
    """Carries pings at one rate and answers at another, in bytes a second, with a delay; `most` padding an answer."""

    def __init__(self, up: float, down: float, delay: float = 0.0, most: int = ping.MAX_PADDING) -> None:
        self.padding = most
        self.rates, self.delay = (up, down), delay
        self.free = [0.0, 0.0]
        self.in_flight = self.most = 0
        self.loop = asyncio.get_running_loop()
        self.speed = Speed(self.take, itertools.count())

    def take(self, payload: bytes) -> None:
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        answer = ping.answer(message.decode(payload), self.padding)
        self._carry(0, payload, lambda: self._carry(1, answer, self.answer(answer)))

    def _carry(self, direction: int, payload: bytes, then: Callable[[], None]) -> None:
        start = max(self.free[direction], self.loop.time())
        self.free[direction] = start + len(payload) / self.rates[direction]
        self.loop.call_at(self.free[direction] + self.delay / 2, then)

    def answer(self, payload: bytes) -> Callable[[], None]:
        def come() -> None:
            self.in_flight -= 1
            pong = json.loads(payload)
            self.speed.answered(pong["id"], len(pong.get("padding", "")))

        return come


@pytest.mark.parametrize(
    ("up", "down", "delay"),
    [(5e6, 20e6, 0.0), (20e6, 5e6, 0.01), (2.5e6, 2.5e6, 0.05), (10e6, 1.2e6, 0.02)],
)
def test_a_way_of_a_known_rate(run: Run, up: float, down: float, delay: float) -> None:
    async def measure() -> None:
        way = Way(up, down, delay)
        async with asyncio.timeout(5):
            assert await way.speed.up() == pytest.approx(up, rel=0.2)
            assert await way.speed.down() == pytest.approx(down, rel=0.2)

    run(measure())


def test_a_slow_way_is_not_filled(run: Run) -> None:
    async def measure() -> None:
        way = Way(100e3, 100e3)
        began = way.loop.time()
        assert await way.speed.up() == pytest.approx(100e3, rel=0.2)
        assert way.loop.time() - began < PERIOD + 1.4, "one that is on its way is waited for"
        assert way.most == 1

    run(measure())


def test_answers_that_nobody_waits_for_change_nothing(run: Run) -> None:
    async def measure() -> None:
        way = Way(10e6, 10e6)
        for identity in (0, 1, -1, -100):
            way.speed.answered(identity, 0)
        measured = asyncio.ensure_future(way.speed.up())
        await asyncio.sleep(0)
        way.speed.answered(-5, 1 << 30)
        assert await measured == pytest.approx(10e6, rel=0.2)
        way.speed.answered(-1, 1)

    run(measure())


def test_a_way_that_carries_nothing_is_given_up_by_whoever_waits(run: Run) -> None:
    async def measure() -> None:
        sent: list[bytes] = []
        speed = Speed(sent.append, itertools.count())
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await speed.up()
        await asyncio.sleep(0)
        assert len(sent) == 1

    run(measure())


def test_a_manager_that_gives_no_padding(run: Run) -> None:
    async def measure() -> None:
        way = Way(10e6, 10e6, delay=0.01, most=0)
        assert await way.speed.up() == pytest.approx(10e6, rel=0.2)
        with pytest.raises(ManagerError, match="upgrade it"):
            await way.speed.down()

    run(measure())


def test_answers_that_are_shorter_than_wanted_count_as_what_they_are(run: Run) -> None:
    async def measure() -> None:
        assert await Way(10e6, 1e6, most=1 << 13).speed.down() == pytest.approx(1e6, rel=0.2)

    run(measure())


def test_a_failure_ends_what_waits_and_all_that_follows(run: Run) -> None:
    async def measure() -> None:
        sent: list[bytes] = []
        speed = Speed(sent.append, itertools.count())
        measured = asyncio.ensure_future(speed.up())
        await asyncio.sleep(0)
        speed.fail(LinkLostError("it broke"))
        speed.answered(0, 0)
        for waiting in (measured, speed.down()):
            with pytest.raises(LinkLostError, match="it broke"):
                await waiting
        assert len(sent) == 1

    run(measure())


@pytest.mark.parametrize("rate", [3e6, 4e6, 5e6, 6e6])
def test_answers_that_come_together_are_not_counted_twice(run: Run, rate: float) -> None:
    """As through a proxy that lets eight gather: what came behind the middle took the time since those before."""

    async def measure() -> None:
        way = Way(rate, rate)
        gathered: list[tuple[int, int]] = []
        answered = way.speed.answered

        def gather(identity: int, padding: int) -> None:
            gathered.append((identity, padding))
            if len(gathered) >= min(8, way.in_flight + len(gathered)):
                for one in gathered:
                    answered(*one)
                gathered.clear()

        way.speed.answered = gather
        assert await way.speed.up() < 1.1 * rate

    run(measure())
