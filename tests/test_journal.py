"""The journal: what was written comes back, however much of the file's end a crash cut off."""

import contextlib
import os
import tempfile
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpvpn.errors import UsageError
from tpvpn.helper import protocol
from tpvpn.helper.protocol import RequestError, decode_operation, encode_operation
from tpvpn.journal import Journal
from tpvpn.route.fib import Nexthop, Route, Rule
from tpvpn.route.operations import Operation
from tpvpn.route.prefix import BITS, Prefix
from tpvpn.rundir import Session

SESSION = Session("default", 4711, 1000, "tpvpn0", 29808, "boot")


@st.composite
def prefixes(draw) -> Prefix:
    version = draw(st.sampled_from([4, 6]))
    return Prefix.around(version, draw(st.integers(0, 2 ** BITS[version] - 1)), draw(st.integers(0, BITS[version])))


u32 = st.integers(0, 2**32 - 1)
devices = st.text(alphabet="abz019-_.é", min_size=1, max_size=15)
routes = st.builds(
    Route,
    prefix=prefixes(),
    table=u32,
    kind=st.sampled_from(["unicast", "throw"]),
    nexthops=st.lists(st.builds(Nexthop, device=st.none() | devices), max_size=2).map(tuple),
    metric=u32,
    protocol=st.integers(0, 255),
    scope=st.integers(0, 255),
    source=st.none() | st.sampled_from(["10.0.0.1", "fd00::1"]),
)
rules = st.builds(
    Rule,
    version=st.sampled_from([4, 6]),
    preference=u32,
    table=u32,
    source=st.none() | prefixes(),
    destination=st.none() | prefixes(),
    iif=st.none() | devices,
    oif=st.none() | devices,
    mark=st.none() | u32,
    mark_mask=u32,
    uids=st.none() | st.tuples(u32, u32),
    inverted=st.booleans(),
    suppress_prefixlength=st.none() | st.integers(0, 128),
    goto=st.none() | u32,
    protocol=st.integers(0, 255),
)
operations = st.builds(Operation, verb=st.sampled_from(["add", "remove"]), target=routes | rules)


@settings(deadline=None)
@given(operations)
def test_an_operation_survives_json(operation: Operation) -> None:
    assert decode_operation(encode_operation(operation)) == operation


def test_every_field_has_its_decoder() -> None:
    assert {field.name for field in fields(Route)} == protocol.ROUTE_FIELDS.keys()
    assert {field.name for field in fields(Rule)} == protocol.RULE_FIELDS.keys()
    assert {field.name for field in fields(Nexthop)} == protocol.NEXTHOP_FIELDS.keys()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)


@settings(deadline=None)
@given(operations, st.data())
def test_a_spoilt_operation_is_one_kind_of_error(operation: Operation, data: st.DataObject) -> None:
    encoded = encode_operation(operation)
    (kind,) = encoded.keys() - {"verb"}
    where = encoded if data.draw(st.booleans()) else encoded[kind]
    where[data.draw(st.sampled_from(sorted(where)) | st.text(max_size=8))] = data.draw(json_values)
    with contextlib.suppress(RequestError):
        assert isinstance(decode_operation(encoded), Operation)


def written(path: Path, done: list[Operation]) -> bytes:
    journal = Journal(path)
    journal.begin(SESSION)
    for operation in done:
        journal.record(operation)
    journal.close()
    return path.read_bytes()


def opened(path: Path, content: bytes) -> tuple[Session | None, list[Operation]]:
    path.write_bytes(content)
    journal = Journal(path)
    try:
        return journal.session, journal.undo_list()
    finally:
        journal.close()


@settings(max_examples=20, deadline=None)
@given(st.lists(operations, max_size=4))
def test_a_journal_cut_at_any_byte_holds_all_whole_lines(done: list[Operation]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "journal"
        whole = written(path, done)
        expected = {}
        for count in range(len(done) + 1):
            lines = b"".join(line + b"\n" for line in whole.split(b"\n")[: count + 1])
            expected[len(lines)] = (SESSION, undo(done[:count]))
        current: tuple[Session | None, list[Operation]] = (None, [])
        for length in range(len(whole) + 1):
            current = expected.get(length, current)
            assert opened(path, whole[:length]) == current


def undo(done: list[Operation]) -> list[Operation]:
    """What removes the rest of it, said in another way than the journal's."""
    last = {operation.target: number for number, operation in enumerate(done)}
    present = [number for number in last.values() if done[number].verb == "add"]
    present.sort(key=lambda number: (isinstance(done[number].target, Route), -number))
    return [done[number].inverse() for number in present]


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_garbage_is_an_empty_journal(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as directory:
        assert opened(Path(directory) / "journal", content) == (None, [])


def test_rules_are_undone_first_and_the_latest_first(tmp_path: Path) -> None:
    first, second = (Operation("add", Rule(4, preference, table=29808)) for preference in (100, 200))
    here, there = (Operation("add", Route(Prefix.parse(text), 29808)) for text in ("10.0.0.0/8", "10.1.0.0/16"))
    whole = written(tmp_path / "journal", [first, here, second, there, here.inverse()])
    _, undone = opened(tmp_path / "journal", whole)
    assert undone == [second.inverse(), first.inverse(), there.inverse()]


def test_a_living_journal_says_whose_it_is(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    journal.begin(SESSION)
    try:
        with pytest.raises(UsageError, match=r"'default' \(process 4711\).*tpvpn quit"):
            Journal(tmp_path / "journal")
    finally:
        journal.close()
    assert opened(tmp_path / "journal", b"") == (None, [])


def test_a_new_session_forgets_the_old_journal(tmp_path: Path) -> None:
    written(tmp_path / "journal", [Operation("add", Rule(4, 100, table=29808))])
    assert opened(tmp_path / "journal", written(tmp_path / "journal", [])) == (SESSION, [])


def test_only_root_reads_it(tmp_path: Path) -> None:
    written(tmp_path / "journal", [])
    assert os.stat(tmp_path / "journal").st_mode & 0o777 == 0o600


TAILS = (bytes(1), bytes(4096), b"\xff\xfe{", b"\xff}\n[]\n", b'{"verb": "add"}\n', b"[" * 10_000 + b"\n")
"""What a power cut may leave behind what was written: a hole, or what was on the disk before."""


@pytest.mark.parametrize("tail", TAILS, ids=range(len(TAILS)))
@settings(max_examples=3, deadline=None)
@given(done=st.lists(operations, max_size=3))
def test_what_a_power_cut_left_behind_the_whole_lines_is_nothing(done: list[Operation], tail: bytes) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "journal"
        whole = written(path, done)
        for length in range(len(whole) + 1):
            count = whole[:length].count(b"\n") - 1
            expected = (SESSION, undo(done[:count])) if count >= 0 else (None, [])
            assert opened(path, whole[:length] + tail) == expected
