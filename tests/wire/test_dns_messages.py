"""DNS messages, with dnspython as oracle; and bytes that are none."""

import contextlib

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rrset
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpvpn.wire import dns as wire
from tpvpn.wire.dns import MalformedError, Rcode

LABEL = st.binary(min_size=1, max_size=63)
NAME = st.lists(LABEL, max_size=6).map(tuple).filter(lambda labels: sum(map(len, labels)) + len(labels) < 255)
HEADER = b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00"
QUESTION = b"\x03WWW\x07example\x00\x00\x01\x00\x01"


def answer() -> bytes:
    """One with all sections, compressed, and an OPT record."""
    query = dns.message.make_query("www.example.", "MX", use_edns=0)
    made = dns.message.make_response(query)
    made.answer.append(dns.rrset.from_text("www.example.", 30, "IN", "MX", "5 a.example.", "6 b.www.example."))
    made.authority.append(dns.rrset.from_text("example.", 9, "IN", "SOA", "ns.example. me.example. 1 2 3 4 5"))
    made.additional.append(dns.rrset.from_text("a.example.", 7, "IN", "A", "192.0.2.1"))
    return made.to_wire()


@given(NAME, st.integers(0, 65535), st.integers(0, 65535))
def test_a_query_is_what_dnspython_reads(labels: tuple[bytes, ...], kind: int, identity: int) -> None:
    if kind in (wire.OPT, 249, 250):
        return  # no types of questions for dnspython
    message = wire.query(labels, kind, identity)
    oracle = dns.message.from_wire(message)
    assert oracle.id == identity
    assert oracle.question[0].name == dns.name.Name((*labels, b""))
    read = wire.question(message)
    assert (read.labels, read.type, read.klass, read.end) == (labels, kind, wire.IN, len(message))
    assert wire.labels(read.name) == tuple(label.lower() for label in labels)


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("", ()),
        (".", ()),
        ("a", (b"a",)),
        ("a.b.", (b"a", b"b")),
        (r"a\.b.c", (b"a.b", b"c")),
        (r"a\\.", (b"a\\",)),
        (r"\065\255", (b"A\xff",)),
        ("_http._tcp", (b"_http", b"_tcp")),
    ],
)
def test_names_are_read(name: str, labels: tuple[bytes, ...]) -> None:
    assert wire.labels(name) == labels


@pytest.mark.parametrize("name", ["..", "a..b", ".a", "a\\", "\\256", "ä.example", "x" * 64, ".".join(["x" * 60] * 5)])
def test_what_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(MalformedError):
        wire.labels(name)


@given(st.text(max_size=40))
def test_any_text_is_a_name_or_none(text: str) -> None:
    with contextlib.suppress(MalformedError):
        labels = wire.labels(text)
        assert wire.question(wire.query(labels, 1, 0)).labels == labels


def test_records_lie_where_dnspython_reads_them() -> None:
    message = answer()
    end = wire.question(message).end
    found = [(one.section, one.type, one.klass, one.ttl) for one in wire.records(message, end)]
    assert found == [
        (1, 15, 1, 30),
        (1, 15, 1, 30),
        (2, wire.SOA, 1, 9),
        (3, wire.A, 1, 7),
        (3, wire.OPT, 8192, 0),
    ]
    address = next(one for one in wire.records(message, end) if one.type == wire.A)
    assert message[address.data_at : address.data_at + address.length] == bytes([192, 0, 2, 1])
    option = wire.edns(message, end)
    assert option and option.type == wire.OPT


def test_a_message_that_is_cut_off_is_malformed_at_every_byte() -> None:
    message = answer()
    for length in range(len(message)):
        with pytest.raises(MalformedError):
            list(wire.records(message[:length], wire.question(message[:length]).end))
    list(wire.records(message, wire.question(message).end))


@pytest.mark.parametrize(
    "bad",
    [
        HEADER,
        HEADER + b"\x03ww",
        HEADER + b"\xc0\x0c\x00\x01\x00\x01",  # a pointer to itself
        HEADER + b"\x40" + bytes(80),
        HEADER + b"\x80" + bytes(80),
        HEADER + (b"\x3f" + b"x" * 63) * 4 + b"\x00\x00\x01\x00\x01",  # 257 bytes
        HEADER[:5] + b"\x00" + HEADER[6:] + QUESTION,
        HEADER[:5] + b"\x02" + HEADER[6:] + QUESTION * 2,
    ],
)
def test_no_question_is_malformed(bad: bytes) -> None:
    with pytest.raises(MalformedError):
        wire.question(bad)


@given(st.binary(max_size=300), st.integers(0, 310))
def test_names_are_followed_as_dnspython_does(message: bytes, at: int) -> None:
    check_name(message, at)


@given(
    st.lists(st.one_of(st.just(b"\0"), LABEL.map(lambda x: bytes([len(x)]) + x), st.binary(min_size=2, max_size=2))),
    st.data(),
)
def test_names_full_of_pointers_end(parts: list[bytes], data: st.DataObject) -> None:
    message = b"".join(bytes([part[0] | 0xC0, part[1]]) if len(part) == 2 else part for part in parts)
    check_name(message, data.draw(st.integers(0, len(message))))


def check_name(message: bytes, at: int) -> None:
    """Both read the same name, or neither one."""
    try:
        name, used = dns.name.from_wire(message, at)
    except (dns.exception.DNSException, IndexError, ValueError):
        with pytest.raises(MalformedError):
            wire.read_name(message, at)
        return
    assert wire.read_name(message, at) == (name.to_wire(), at + used)


def test_only_so_many_pointers_are_followed() -> None:
    """A message may hold thousands of names, each of which could begin thousands of pointers."""
    message = b"\0" + b"".join((0xC000 | max(0, at - 2)).to_bytes(2) for at in range(1, 16_000, 2))
    assert wire.read_name(message, 1) == (b"\0", 3)
    assert wire.read_name(message, 2 * wire.POINTERS - 1) == (b"\0", 2 * wire.POINTERS + 1)
    for at in (2 * wire.POINTERS + 1, 15_999):
        with pytest.raises(MalformedError):
            wire.read_name(message, at)


@given(st.binary(max_size=200))
def test_bytes_of_any_kind_are_read_or_malformed(data: bytes) -> None:
    for message in (data, HEADER + data, HEADER + QUESTION + data, HEADER[:6] + b"\0\5\0\5\0\5" + QUESTION + data):
        with contextlib.suppress(MalformedError):
            end = wire.question(message).end
            wire.edns(message, end)
            assert all(one.data_at + one.length <= len(message) for one in wire.records(message, end))
        assert len(wire.reply(message, Rcode.FORMERR)) >= 12
        wire.is_answer(HEADER + QUESTION, message)
        wire.is_truncated(message)


@pytest.mark.parametrize("edns", [None, 0])
@pytest.mark.parametrize("rcode", list(Rcode))
def test_a_reply_is_one_for_dnspython(rcode: Rcode, edns: int | None) -> None:
    if rcode == Rcode.BADVERS and edns is None:
        return  # who has no EDNS has no version of it
    query = dns.message.make_query("Www.example.", "A", use_edns=edns, want_dnssec=edns == 0)
    oracle = dns.message.from_wire(wire.reply(query.to_wire(), rcode))
    assert query.is_response(oracle)
    assert oracle.rcode() == rcode
    assert oracle.flags & dns.flags.RA
    assert (oracle.edns, oracle.ednsflags) == (query.edns, query.ednsflags | rcode >> 4 << 24)


def test_an_answer_is_known_by_id_and_question() -> None:
    query = HEADER + QUESTION
    good = b"\x12\x34\x81\x80" + query[4:]
    assert wire.is_answer(query, good)
    assert wire.is_answer(query, good.replace(b"WWW", b"www"))
    assert not wire.is_answer(query, query)
    assert not wire.is_answer(query, b"\x12\x35" + good[2:])
    assert not wire.is_answer(query, good.replace(b"WWW", b"WWX"))
    assert not wire.is_answer(query, good[:-1] + b"\x03")
    assert not wire.is_answer(query, good[:-3] + b"\x02" + good[-2:])
    assert not wire.is_answer(query, good[:-1])
    assert wire.is_answer(query, b"\x12\x34\x81\x81" + bytes(8))  # FORMERR of one that read no question
    assert not wire.is_answer(query, b"\x12\x34\x81\x80" + bytes(8))
