"""Answers are kept for as long as they say, and no longer."""

import dns.message
import dns.rcode
import dns.rrset
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpvpn.dns.answers import Query
from tpvpn.dns.cache import MOST, MOST_DENIED, SIZE, Cache

SOA = "example. {ttl} IN SOA ns.example. me.example. 1 2 3 4 {minimum}"


def answer(
    *records: str, rcode: str = "NOERROR", authority: str = "", flags: str = "QR RD RA", kind: str = "A"
) -> bytes:
    head = f"id 1\nopcode QUERY\nrcode {rcode}\nflags {flags}\n;QUESTION\nwww.example. IN {kind}"
    lines = (head, ";ANSWER", *records, ";AUTHORITY", authority)
    return dns.message.from_text("\n".join(lines), one_rr_per_rrset=True).to_wire()


def kept(message: bytes) -> int:
    """For how many seconds."""
    cache = Cache()
    cache.put("key", message, 100.0)
    return next(second for second in range(4000) if cache.get("key", 100.0 + second) is None)


@pytest.mark.parametrize(
    ("message", "seconds"),
    [
        (answer("www.example. 5 IN A 192.0.2.1"), 5),
        (answer("www.example. 50 IN A 192.0.2.1", "www.example. 7 IN A 192.0.2.2"), 7),
        (answer("www.example. 3600 IN A 192.0.2.1"), MOST),
        (answer("www.example. 0 IN A 192.0.2.1"), 0),
        (answer("www.example. 2147483648 IN A 192.0.2.1"), 0),
        (answer("www.example. 50 IN CNAME b.example.", "b.example. 9 IN A 192.0.2.1"), 9),
        (answer("www.example. 50 IN A 192.0.2.1", authority="example. 6 IN NS ns.example."), 6),
        (answer("www.example. 50 IN TXT hello", kind="ANY"), 50),
        (answer(rcode="NXDOMAIN", authority=SOA.format(ttl=20, minimum=10)), 10),
        (answer(rcode="NXDOMAIN", authority=SOA.format(ttl=10, minimum=20)), 10),
        (answer(rcode="NXDOMAIN", authority=SOA.format(ttl=900, minimum=900)), MOST_DENIED),
        (answer(authority=SOA.format(ttl=20, minimum=4)), 4),
        (answer("www.example. 3 IN CNAME b.example.", authority=SOA.format(ttl=20, minimum=10)), 3),
        (answer("www.example. 50 IN CNAME b.example."), 0),  # to where? A referral is no denial
        (answer(rcode="NXDOMAIN"), 0),
        (answer(), 0),
        (answer(rcode="SERVFAIL", authority=SOA.format(ttl=20, minimum=10)), 0),
        (answer("www.example. 5 IN A 192.0.2.1", rcode="REFUSED"), 0),
        (answer("www.example. 5 IN A 192.0.2.1", flags="QR TC"), 0),
    ],
)
def test_how_long_an_answer_is_kept(message: bytes, seconds: int) -> None:
    assert kept(message) == seconds


def test_the_code_in_edns_counts() -> None:
    made = dns.message.from_wire(answer("www.example. 5 IN A 192.0.2.1"))
    made.use_edns(0)
    assert kept(made.to_wire()) == 5
    made.set_rcode(dns.rcode.BADVERS)
    assert kept(made.to_wire()) == 0


@given(st.lists(st.integers(1, 100_000), min_size=1, max_size=5), st.floats(0, 59.9), st.booleans())
def test_ttls_are_lowered_by_age(ttls: list[int], age: float, edns: bool) -> None:
    cache = Cache()
    records = (f"www.example. {ttl} IN A 192.0.2.{number}" for number, ttl in enumerate(ttls))
    made = dns.message.from_wire(answer(*records), one_rr_per_rrset=True)
    if edns:
        made.use_edns(0, ednsflags=0x8000)
    cache.put("key", made.to_wire(), 0.0)
    found = cache.get("key", age)
    if age >= min(ttls):
        assert found is None
        return
    assert found is not None
    read = dns.message.from_wire(found, one_rr_per_rrset=True)
    assert [rrset.ttl for rrset in read.answer] == [ttl - int(age) for ttl in ttls]
    assert read.ednsflags == made.ednsflags


def test_the_one_that_was_not_asked_for_longest_goes() -> None:
    cache, message = Cache(), answer("www.example. 50 IN A 192.0.2.1")
    for number in range(SIZE):
        cache.put(number, message, 0.0)
    assert cache.get(0, 1.0)
    cache.put("one more", message, 1.0)
    assert len(cache) == SIZE
    assert cache.get(1, 1.0) is None
    assert cache.get(0, 1.0) and cache.get(2, 1.0) and cache.get("one more", 1.0)
    cache.clear()
    assert len(cache) == 0


def key(name: str, kind: str = "A", **how: object) -> object:
    return Query.read(dns.message.make_query(name, kind, **how).to_wire()).key  # type: ignore[arg-type]


def test_questions_with_one_answer_have_one_key() -> None:
    plain = key("www.Example.")
    assert key("WWW.example.") == plain
    others = [
        key("www.example.", "AAAA"),
        key("www.example.", "TYPE97"),  # 0x61, an a
        key("www.example.", "TYPE65"),  # 0x41, an A
        key("www.example.com."),
        key("www.example.", use_edns=0),
        key("www.example.", want_dnssec=True),
        key("www.example.", flags=0x0110),
        key("www.example.", flags=0x0120),
    ]
    assert len({plain, *others}) == 1 + len(others)
