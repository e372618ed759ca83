"""The flow table, its limits and its timers: by table, and against a plain model."""

import sys
import weakref

from hypothesis import given
from hypothesis import strategies as st

from tpvpn.proto.flow import Bucket, FlowTable, Pool, Refusal, Shares, Timed, Timers


def table(pool: Pool, *, rate: float = 1e6, burst: float = 1e6, half_open: int = 1000) -> FlowTable[int, object]:
    return FlowTable(pool, 0, rate=rate, burst=burst, half_open=half_open)


def fill(flows: FlowTable[int, object], most: int = 1000) -> int:
    """How many it took."""
    for key in range(most):
        if flows.refusal(0, half_open=False):
            return key
        flows.add(key, object())
    return most


def test_a_session_alone_has_most_of_all_and_a_newcomer_finds_room() -> None:
    pool = Pool(120, 1000)
    one, other, third = table(pool), table(pool), table(pool)
    assert fill(one) == 96
    assert one.refusal(0, half_open=False) is Refusal.TOO_MANY
    assert fill(other) == 20
    assert fill(third) == 4


def test_a_flow_that_ends_makes_room() -> None:
    flows = table(Pool(2, 1000))
    assert fill(flows) == 2
    flow = flows.get(0)
    assert flow is not None
    flows.remove(0, flow)
    assert flows.get(0) is None
    assert fill(flows) == 1


def test_a_flow_that_ended_late_does_not_take_its_successor_along() -> None:
    flows = table(Pool(100, 1000))
    old, new = object(), object()
    flows.add(1, old)
    flows.add(1, new)
    flows.remove(1, old)
    assert flows.get(1) is new


def test_new_flows_come_at_a_rate() -> None:
    flows = table(Pool(10_000, 1000), rate=10, burst=5)
    assert [flows.refusal(now, half_open=False) for now in (0, 0, 0, 0, 0)] == [None] * 5
    assert flows.refusal(0, half_open=False) is Refusal.TOO_FAST
    assert flows.refusal(0.1, half_open=False) is None
    assert flows.refusal(0.1, half_open=False) is Refusal.TOO_FAST


def test_flows_that_are_half_open_have_a_limit_of_their_own() -> None:
    flows = table(Pool(100, 1000), half_open=2)
    flows.half_open = 2
    assert flows.refusal(0, half_open=True) is Refusal.HALF_OPEN
    assert flows.refusal(0, half_open=False) is None


def test_memory_is_full_when_its_owners_have_counted_so_much() -> None:
    pool = Pool(1, 10)
    pool.used = 9
    assert not pool.is_full
    pool.used = 10
    assert pool.is_full


@given(st.floats(0.1, 100), st.integers(1, 50), st.lists(st.floats(0, 5), max_size=60))
def test_a_bucket_never_gives_more_than_burst_and_rate(rate: float, burst: int, pauses: list[float]) -> None:
    bucket, now, given_ = Bucket(rate, burst, 0), 0.0, 0
    for pause in pauses:
        now += pause
        given_ += bucket.take(now)
        assert given_ <= burst + rate * now + 1e-6


class Item(Timed):
    pass


@given(
    st.lists(
        st.tuples(st.integers(0, 4), st.one_of(st.none(), st.integers(0, 30)), st.booleans(), st.integers(0, 3)),
        max_size=60,
    )
)
def test_timers_are_a_dictionary_of_times(steps: list[tuple[int, int | None, bool, int]]) -> None:
    """`schedule`, or `due` moved on by hand, then some time goes by."""
    items = [Item() for _ in range(5)]
    model: dict[Item, float] = {}
    timers: Timers[Item] = Timers()
    now = 0
    for index, wait, by_hand, passes in steps:
        item = items[index]
        due = None if wait is None else float(now + wait)
        if by_hand and due is not None and model.get(item, due + 1) <= due:
            item.due = model[item] = due
        else:
            timers.schedule(item, due)
            model.pop(item, None)
            if due is not None:
                model[item] = due
        now += passes
        expected = {item for item, due in model.items() if due <= now}
        first = timers.next()
        assert not model or (first is not None and first <= min(model.values()))
        assert set(timers.due(now)) == expected
        for item in expected:
            del model[item]


def test_an_item_moved_on_a_thousand_times_is_one_entry() -> None:
    item, timers = Item(), Timers[Item]()
    timers.schedule(item, 1)
    for due in range(2, 1000):
        timers.schedule(item, due)
    assert list(timers.due(1)) == []
    assert timers.next() == 999


def test_what_was_forgotten_is_not_kept_and_never_due() -> None:
    timers: Timers[Timed] = Timers()
    kept = Timed()
    timers.schedule(kept, 100)
    ended = [Timed() for _ in range(1000)]
    for item in ended:
        timers.schedule(item, 50)
    gone = [weakref.ref(item) for item in ended]
    for item in ended:
        timers.forget(item)
    del ended, item
    assert not any(item() for item in gone)
    assert list(timers.due(60)) == []
    assert list(timers.due(100)) == [kept]


def test_times_that_were_replaced_do_not_pile_up() -> None:
    timers: Timers[Timed] = Timers()
    items = [Timed() for _ in range(10)]
    before = 0
    for number in range(10_000):
        timers.schedule(items[number % 10], 1e6 - number)
        if number == 1000:
            before = sys.getsizeof(timers._heap)  # pyright: ignore[reportPrivateUsage]
    assert sys.getsizeof(timers._heap) <= 2 * before  # pyright: ignore[reportPrivateUsage]
    assert len(list(timers.due(1e6))) == 10


# -- buffers -----------------------------------------------------------------------------------------------------------


def test_who_moves_much_alone_has_the_most_and_several_share_it() -> None:
    shares: Shares[str] = Shares(1000, 4000)
    assert shares.of("bulk", 1000, 0.0) == 4000
    assert shares.of("other", 1000, 0.1) == 2000
    assert shares.of("bulk", 1000, 0.1) == 2000
    assert [shares.of(name, 1000, 0.2) for name in "abcdefgh"][-1] == 1000  # never less
    assert shares.of("ssh", 10, 0.2) == 1000


def test_who_stops_gives_the_others_its_share_back() -> None:
    shares: Shares[str] = Shares(1000, 4000)
    shares.of("bulk", 1000, 0.0)
    shares.of("other", 1000, 0.0)
    assert shares.of("bulk", 1000, 0.4) == 2000
    assert shares.of("bulk", 1000, 0.6) == 4000  # the other is quiet
    shares.of("other", 1000, 0.7)
    shares.forget("other")
    assert shares.of("bulk", 1000, 0.8) == 4000
    shares.of("other", 1000, 0.8)
    assert shares.of("other", 10, 0.9) == 1000  # it says so itself
    assert shares.of("bulk", 1000, 0.9) == 4000
