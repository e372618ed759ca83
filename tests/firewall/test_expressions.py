"""What stands in no ruleset that nft(8) makes: bytes of a kernel that says more, or less, than is known here."""

import struct

from hypothesis import given
from hypothesis import strategies as st

from tpvpn.firewall.expressions import _HANDLERS, rule
from tpvpn.firewall.model import Verdict
from tpvpn.netlink import attribute, attribute_text, nest

NAMES = st.sampled_from((*_HANDLERS, "counter", "novelty"))
FIELDS = st.lists(st.builds(attribute, st.integers(0, 12), st.binary(max_size=24)))


def expression(name: str, *fields: bytes) -> bytes:
    return nest(1, attribute_text(1, name), nest(2, *fields))


EXPRESSIONS = st.lists(st.builds(lambda name, fields: expression(name, *fields), NAMES, FIELDS))


@given(EXPRESSIONS, st.binary(max_size=40))
def test_any_attributes_make_a_rule(expressions: list[bytes], comment: bytes) -> None:
    made = rule({3: bytes(7) + b"\7", 4: b"".join(expressions), 7: comment}, lambda _name: None)
    assert made.handle == 7


@given(st.binary(max_size=200))
def test_any_bytes_make_a_rule(data: bytes) -> None:
    rule({4: data}, lambda _name: None)


def test_an_expression_that_is_not_known_makes_a_doubt_of_what_follows() -> None:
    new = expression("novelty", attribute(1, b"\0\0\0\1"))
    data = nest(3, attribute(1, b"\0\0\0\1"))
    compared = expression("cmp", attribute(1, b"\0\0\0\1"), attribute(2, bytes(4)), data)
    drop = nest(2, nest(2, attribute(1, struct.pack("!i", 0))))
    dropped = expression("immediate", attribute(1, bytes(4)), drop)
    made = rule({4: new + compared + dropped}, lambda _name: None)
    assert [str(step.operand.pieces[0].field) for step in made.steps] == ["novelty", "novelty"]
    assert made.verdict == Verdict("drop")
