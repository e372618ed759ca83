"""Token files."""

import pytest

from tpvpn.errors import UsageError
from tpvpn.proto.token import parse_tokens


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("ann: s3cret\n# comment\n\nbob:other\n", {"ann": b"s3cret", "bob": b"other"}),
        ("s3cret\n", {"default": b"s3cret"}),
    ],
)
def test_tokens_by_name(text: str, tokens: dict[str, bytes]) -> None:
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize(
    ("text", "says"), [("", "empty"), ("ann:\n", "line 1"), ("a: x\na: y\n", "a again"), (": x", "line 1")]
)
def test_a_bad_file_is_named(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        parse_tokens(text)
