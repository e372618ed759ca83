"""When a link is asked for a sign of life, when it is silent and when dead; by a table of times, and for any times."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpvpn.proto.liveness import DEAD, IDLE, PATIENCE, TICK, UNANSWERED, URGED, Liveness
from tpvpn.proto.retry import LEAST, MOST, pause

SECONDS = 40.0


@dataclass
class Told:
    """What came of it, and when."""

    asked: list[float]
    silent: float | None = None
    dead: float | None = None


def watched(heard, spoke, until: float = SECONDS, urged: float | None = None) -> Told:
    """Look every TICK; `heard(t)` and `spoke(t)` say whether anything came or was sent since the look before."""
    liveness, told, now = Liveness(0.0), Told([]), 0.0
    while now < until:
        now += TICK
        if urged is not None and now - TICK < urged <= now and liveness.urge(urged):
            told.asked.append(urged)
        if liveness.look(now, heard=heard(now), spoke=spoke(now)):
            told.asked.append(now)
        if liveness.is_silent(now) and told.silent is None:
            told.silent = now
        if liveness.is_dead(now):
            told.dead = now
            break
    return told


def never(_now: float) -> bool:
    return False


def always(_now: float) -> bool:
    return True


def test_traffic_both_ways_is_never_asked() -> None:
    assert watched(always, always) == Told([])


def test_what_only_comes_needs_no_question() -> None:
    assert watched(always, never) == Told([])


def test_an_idle_link_is_asked_every_five_seconds() -> None:
    answered_at = {round(IDLE * k + TICK * k, 2) for k in range(1, 20)}
    told = watched(lambda now: round(now, 2) in answered_at, never)
    assert len(told.asked) == 7
    assert told.silent is told.dead is None


def test_with_traffic_silence_is_found_within_five_seconds() -> None:
    told = watched(never, always)
    assert told.asked == [TICK + UNANSWERED]
    assert told.silent == TICK + UNANSWERED + PATIENCE <= 5
    assert told.dead == DEAD


def test_without_traffic_it_takes_as_long_as_the_next_question() -> None:
    told = watched(never, never)
    assert (told.asked, told.silent, told.dead) == ([IDLE], IDLE + PATIENCE, DEAD)


def test_an_urgent_question_is_asked_at_once_and_waited_for_a_second() -> None:
    told = watched(lambda now: now <= 2, never, urged=2.1)
    assert told.asked == [2.1]
    assert told.silent is not None
    assert 2.1 + URGED <= told.silent <= 2.1 + URGED + TICK


def test_one_that_is_asked_already_is_only_given_less_time() -> None:
    told = watched(never, always, urged=2.0)
    assert told.asked == [TICK + UNANSWERED]
    assert told.silent == TICK + UNANSWERED + URGED


def test_one_that_was_silent_is_well_again_when_anything_comes() -> None:
    liveness = Liveness(0.0)
    assert liveness.look(1.0, heard=False, spoke=True) is False
    assert liveness.look(2.0, heard=False, spoke=False) is True
    assert liveness.look(3.5, heard=False, spoke=False) is False
    assert liveness.look(5.0, heard=False, spoke=False) is False
    assert liveness.is_silent(5.0)
    liveness.look(5.25, heard=True, spoke=False)
    assert not liveness.is_silent(5.25)
    assert not liveness.is_dead(19.0)


def test_after_two_hours_of_sleep_it_is_asked_and_not_dead() -> None:
    liveness, now = Liveness(0.0), 7200.0
    liveness.look(TICK, heard=False, spoke=True)
    assert liveness.look(now, heard=False, spoke=False) is True
    assert not liveness.is_silent(now)
    assert not liveness.is_dead(now)
    assert liveness.is_silent(now + URGED)
    # What had come before it slept proves nothing.
    assert liveness.look(2 * now, heard=True, spoke=False) is True
    assert not liveness.is_silent(2 * now)
    assert liveness.is_silent(2 * now + URGED)


def test_two_ends_of_an_idle_link_live_for_two_hours() -> None:
    """In virtual time, a question and its answer at a time, half a second away: the client alone asks."""
    client, manager, now = Liveness(0.0), Liveness(0.0, idle=20.0, dead=45.0), 0.0
    way_there, way_back, asked = list[float](), list[float](), 0
    while now < 7200:
        now += TICK
        arrived, answered = (bool(way) and way[0] <= now for way in (way_there, way_back))
        assert not manager.look(now, heard=arrived, spoke=False)
        if arrived:
            way_back.append(way_there.pop(0) + 0.5)
        if client.look(now, heard=answered, spoke=False):
            asked += 1
            way_there.append(now + 0.5)
        if answered:
            way_back.pop(0)
        assert not client.is_silent(now)
        assert not manager.is_silent(now)
    assert 7200 / 7 < asked <= 7200 / 5


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=200))
def test_whatever_happens_it_is_dead_only_after_silence(seen: list[tuple[bool, bool]]) -> None:
    liveness, now, heard_at, asked = Liveness(0.0), 0.0, 0.0, False
    for heard, spoke in seen:
        now += TICK
        asks = liveness.look(now, heard=heard, spoke=spoke)
        heard_at = now if heard else heard_at
        assert not (asks and asked), "one question at a time"
        asked = (asked and not heard) or asks
        assert liveness.is_dead(now) <= (asked and now - heard_at >= DEAD)
        assert liveness.is_silent(now) <= (asked and now - heard_at >= PATIENCE)


@pytest.mark.parametrize(
    ("lost_for", "tried_for", "least", "most"),
    [
        (0.0, 0.0, 0.18, 0.32),
        (2.0, 0.0, 0.18, 0.32),
        (16.0, 0.0, 1.5, 2.5),
        (120.0, 0.0, 11.25, 18.75),
        (1e9, 0.0, 11.25, 18.75),
        (16.0, 10.0, 0.0, 0.0),
    ],
)
def test_pauses_grow_with_the_time_it_was_lost(lost_for: float, tried_for: float, least: float, most: float) -> None:
    found = [pause(lost_for, tried_for, chance) for chance in (0.0, 0.5, 0.999)]
    assert found == sorted(found)
    assert least <= found[0] <= found[-1] <= most


@given(st.floats(0, 1e9), st.floats(0, 100), st.floats(0, 1, exclude_max=True))
def test_a_pause_has_its_bounds(lost_for: float, tried_for: float, chance: float) -> None:
    assert 0 <= pause(lost_for, tried_for, chance) <= 1.25 * MOST
    assert pause(lost_for, 0, chance) >= 0.75 * LEAST
