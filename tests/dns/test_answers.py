"""What is made of questions and answers, with dnspython as oracle."""

import contextlib
from ipaddress import ip_address, ip_network

import dns.edns
import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdatatype
import dns.rrset
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpvpn.dns import answers
from tpvpn.dns.answers import Query, RefusedError
from tpvpn.route.prefix import Prefix
from tpvpn.wire import dns as wire
from tpvpn.wire.dns import MalformedError, Rcode

FULL = "db.shop.svc.cluster.local."
RECORDS = {
    "A": "192.0.2.1",
    "AAAA": "2001:db8::1",
    "CNAME": "other.svc.cluster.local.",
    "NS": "ns.cluster.local.",
    "PTR": "x.db.shop.svc.cluster.local.",
    "MX": "5 mail.db.shop.svc.cluster.local.",
    "SRV": "0 10 80 pod-0.db.shop.svc.cluster.local.",
    "SOA": "ns.cluster.local. me.cluster.local. 1 2 3 4 5",
    "TXT": '"a text" "and more"',
    "RP": "me.cluster.local. txt.cluster.local.",
    "AFSDB": "1 afs.cluster.local.",
    "RT": "1 rt.cluster.local.",
    "KX": "1 kx.cluster.local.",
    "PX": "1 a.cluster.local. b.cluster.local.",
    "DNAME": "d.cluster.local.",
    "NAPTR": '1 2 "u" "E2U" "!x!y!" r.cluster.local.',
    "HTTPS": "1 . alpn=h2 ipv4hint=192.0.2.1",
    "CAA": '0 issue "ca.example"',
    "TYPE65280": r"\# 4 c00cc00c",
}


def query(name: str = "db.shop.", kind: str = "A", **how: object) -> Query:
    return Query.read(dns.message.make_query(name, kind, **how).to_wire())  # type: ignore[arg-type]


def answer(
    name: str, kind: str, *records: str, rcode: int = 0, edns: bool = False, authority: str = "", ttl: int = 30
) -> dns.message.Message:
    made = dns.message.make_response(dns.message.make_query(name, kind, use_edns=0 if edns else None))
    made.flags |= dns.flags.AA | dns.flags.AD
    made.set_rcode(dns.rcode.Rcode(rcode))
    if records:
        made.answer.append(dns.rrset.from_text(name, ttl, "IN", kind, *records))
    if authority:
        made.authority.append(dns.rrset.from_text("cluster.local.", 9, "IN", "SOA", authority))
    return made


@pytest.mark.parametrize("edns", [True, False])
@pytest.mark.parametrize("kind", RECORDS)
def test_an_alias_comes_first(kind: str, edns: bool) -> None:
    said = answer(FULL, kind, RECORDS[kind], edns=edns, authority=RECORDS["SOA"])
    said.additional.append(dns.rrset.from_text("pod-0." + FULL, 30, "IN", "A", "192.0.2.7"))
    asker = query("dB.shop.", kind, use_edns=0 if edns else None)
    read = dns.message.from_wire(answers.alias(said.to_wire(), asker))
    assert read.question[0].to_text() == f"dB.shop. IN {kind}"
    assert [rrset.to_text() for rrset in read.answer] == [
        f"dB.shop. 30 IN CNAME {FULL}",
        *(rrset.to_text() for rrset in said.answer),
    ]
    assert (read.authority, read.additional) == (said.authority, said.additional)
    assert (read.edns, read.payload) == (said.edns, said.payload)
    assert read.flags == said.flags & ~dns.flags.AD


@pytest.mark.parametrize("kind", RECORDS)
def test_another_suffix_stands_in_the_answer(kind: str) -> None:
    """In every name that is below the first, also in data; what is asked for by its whole name needs no alias then."""
    suffixes = ((b"cluster", b"local"), (b"staging",))
    said = answer(FULL, kind, RECORDS[kind], authority=RECORDS["SOA"])
    said.additional.append(dns.rrset.from_text("Pod-0." + FULL, 30, "IN", "A", "192.0.2.7"))
    full = FULL.replace("cluster.local", "staging")
    for name in ("db.shop.", full):
        read = dns.message.from_wire(answers.alias(said.to_wire(), query(name, kind), suffixes))
        alias = [] if name == full else [f"{name} 30 IN CNAME {full}"]
        data = RECORDS[kind] if kind == "NAPTR" else RECORDS[kind].replace("cluster.local.", "staging.")
        assert [rrset.to_text() for rrset in read.answer] == [
            *alias,
            dns.rrset.from_text(full, 30, "IN", kind, data).to_text(),
        ]
        assert str(read.authority[0].name) == "staging."
        assert str(read.additional[0].name) == f"Pod-0.{full}"


@pytest.mark.parametrize(("rcode", "authority"), [(0, RECORDS["SOA"]), (3, RECORDS["SOA"]), (2, ""), (5, "")])
def test_an_alias_of_nothing_keeps_what_was_said(rcode: int, authority: str) -> None:
    said = answer(FULL, "A", rcode=rcode, authority=authority)
    read = dns.message.from_wire(answers.alias(said.to_wire(), query()))
    assert [rrset.to_text() for rrset in read.answer] == [f"db.shop. {answers.TTL} IN CNAME {FULL}"]
    assert read.rcode() == rcode
    assert read.authority == said.authority


def test_an_alias_of_a_thousand_stays_short() -> None:
    said = answer(FULL, "A", *(f"10.132.{n // 250}.{n % 250}" for n in range(1000))).to_wire()
    made = answers.alias(said, query())
    assert len(made) < len(said) + 50
    assert len(dns.message.from_wire(made).answer[1]) == 1000


@given(st.lists(st.sampled_from(sorted(RECORDS)), max_size=8, unique=True), st.data())
def test_an_alias_of_what_is_cut_or_changed_is_one_or_malformed(kinds: list[str], data: st.DataObject) -> None:
    said = answer(FULL, "ANY")
    for kind in kinds:
        said.answer.append(dns.rrset.from_text(FULL, 30, "IN", kind, RECORDS[kind]))
    whole = said.to_wire()
    end = wire.question(whole).end
    assert dns.message.from_wire(answers.alias(whole, query())).answer[1:] == said.answer
    cut = whole[: data.draw(st.integers(end, len(whole)))]
    spoilt = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        spoilt[data.draw(st.integers(6, len(whole) - 1))] = data.draw(st.integers(0, 255))
    for message in (cut, bytes(spoilt)):
        with contextlib.suppress(MalformedError):
            made = answers.alias(answers.sound(message), query())
            assert answers.sound(made) == made


PAIRS = [
    (Prefix.parse("246.130.0.0/16"), Prefix.parse("10.130.0.0/16")),
    (Prefix.parse("fd74:7077:1::/64"), Prefix.parse("fd00:130::/64")),
]


@given(st.ip_addresses(v=4) | st.ip_addresses(network="10.130.0.0/16") | st.ip_addresses(network="fd00:130::/64"))
def test_addresses_are_translated(address: object) -> None:
    real = ip_address(str(address))
    kind = "A" if real.version == 4 else "AAAA"
    said = answer("www.example.", kind, str(real))
    read = dns.message.from_wire(answers.translated(said.to_wire(), PAIRS))
    expected = real
    for virtual, there in PAIRS:
        if real in ip_network(str(there)):
            expected = type(real)(int(real) - there.network + virtual.network)  # type: ignore[operator]
    assert [str(one) for one in read.answer[0]] == [str(expected)]
    assert bool(read.flags & dns.flags.AD) == (expected == real)


def test_only_addresses_are_translated() -> None:
    said = answer("www.example.", "TYPE65280", r"\# 4 0a820001").to_wire()
    assert answers.translated(said, PAIRS) == said
    assert answers.translated(said, ()) == said


@pytest.mark.parametrize(
    ("how", "limit"),
    [({}, 512), ({"use_edns": 0, "payload": 100}, 512), ({"payload": 1232}, 1232), ({"payload": 65535}, 4096)],
)
def test_a_datagram_is_as_long_as_its_client_takes(how: dict[str, int], limit: int) -> None:
    assert query(**how).limit == limit


@pytest.mark.parametrize("edns", [True, False])
@pytest.mark.parametrize("limit", [512, 1232])
def test_what_does_not_fit_is_truncated(limit: int, edns: bool) -> None:
    said = answer(FULL, "A", *(f"10.132.{n // 250}.{n % 250}" for n in range(1000)), edns=edns)
    whole = said.to_wire(max_size=1 << 16)
    made = answers.fitted(whole, limit)
    assert len(made) <= limit
    read = dns.message.from_wire(made)
    assert read.flags == said.flags | dns.flags.TC
    assert (read.id, read.question, read.edns, read.sections[1:]) == (said.id, said.question, said.edns, [[], [], []])
    assert answers.fitted(whole, len(whole)) == whole


@pytest.mark.parametrize("how", [{}, {"use_edns": 0}, {"want_dnssec": True}])
def test_answers_of_our_own(how: dict[str, int]) -> None:
    asked = dns.message.make_query("db.shop.", "A", **how)  # type: ignore[arg-type]
    asker = Query.read(asked.to_wire())
    for made, rcode in ((asker.denied(Rcode.NXDOMAIN), 3), (asker.denied(Rcode.NOERROR), 0), (asker.known("::1"), 0)):
        read = dns.message.from_wire(made)
        assert asked.is_response(read) and read.rcode() == rcode and not read.answer
        assert read.authority[0].to_text() == "shop. 10 IN SOA . . 1 10 10 10 10"
    read = dns.message.from_wire(asker.known("192.0.2.9"))
    assert asked.is_response(read)
    assert [rrset.to_text() for rrset in read.answer] == ["db.shop. 10 IN A 192.0.2.9"]
    root = Query.read(dns.message.make_query(".", "AAAA").to_wire())
    assert dns.message.from_wire(root.known("2001:db8::1")).answer[0].to_text() == ". 10 IN AAAA 2001:db8::1"
    assert dns.message.from_wire(root.denied(Rcode.NXDOMAIN)).authority[0].name == dns.name.root


def test_a_question_for_another_name_has_edns_of_ours() -> None:
    cookie = dns.edns.GenericOption(dns.edns.OptionType.COOKIE, b"12345678")
    asker = query("dB.shop.", "SRV", want_dnssec=True, options=[cookie], payload=4096, flags=0x0130)
    read = dns.message.from_wire(asker.asking(wire.labels("x.y")))
    assert read.question[0].to_text() == "x.y. IN SRV"
    assert (read.options, read.payload, read.ednsflags) == ((), answers.WELCOME, 0x8000)
    assert read.flags == 0x0130
    assert dns.message.from_wire(query().asking(())).edns == -1


def test_each_asker_has_letters_and_flags_of_its_own() -> None:
    said = answers.recursive(answer("db.shop.", "A", "192.0.2.1").to_wire())
    asker = query("dB.ShOp.", flags=0, id=77)
    read = dns.message.from_wire(asker.answered(said))
    assert (read.id, read.question[0].name.to_text()) == (77, "dB.ShOp.")
    assert not read.flags & dns.flags.RD and read.flags & dns.flags.RA and read.flags & dns.flags.AA
    assert read.answer[0].name.to_text() == "dB.ShOp."


def refused(message: bytes) -> str:
    try:
        Query.read(message)
    except RefusedError as error:
        return error.rcode.name
    except MalformedError:
        return "FORMERR"
    return "none"


def test_what_cannot_be_asked() -> None:
    good = dns.message.make_query("www.example.", "A", use_edns=0).to_wire()
    option = good[-11:]
    assert refused(good) == "none"
    for opcode in range(1, 16):
        assert refused(good[:2] + bytes([opcode << 3 | 1]) + good[3:]) == "NOTIMP"
    for kind in ("AXFR", "IXFR"):
        assert refused(dns.message.make_query("www.example.", kind).to_wire()) == "REFUSED"
    for klass in ("CH", "HS", "ANY", "NONE", "CLASS0"):
        assert refused(dns.message.make_query("www.example.", "A", klass).to_wire()) == "REFUSED"
    assert refused(good[:11] + b"\2" + good[12:] + option) == "FORMERR"
    assert refused(good[:-5] + b"\1" + good[-4:]) == "BADVERS"
    for length in range(12, len(good)):
        assert refused(good[:length]) == "FORMERR"
    assert answers.sound(good + b"more") == good
