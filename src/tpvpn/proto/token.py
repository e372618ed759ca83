"""The token file: one or several `name: token` lines; a line without a name is the token of "default".

The name is what logs and audits show; the token itself never leaves this process but as the key of an HMAC.
"""

from tpvpn.errors import UsageError

ANONYMOUS = {"anonymous": b""}
"""The tokens of a manager that was started with --insecure, and of a client without a token."""


def first_token(text: str) -> bytes:
    """The token that a client uses of such a file. Errors as of `parse_tokens`."""
    return next(iter(parse_tokens(text).values()))


def parse_tokens(text: str) -> dict[str, bytes]:
    """Tokens by name, in the file's order; UsageError for a line without a token, a name given twice, an empty file."""
    tokens: dict[str, bytes] = {}
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        name, colon, token = line.partition(":")
        name, token = (name.strip(), token.strip()) if colon else ("default", line)
        if not name or not token:
            raise UsageError(f"line {number} of the token file has no token: write `name: token`")
        if name in tokens:
            raise UsageError(f"line {number} of the token file names {name} again: each name stands once")
        tokens[name] = token.encode()
    if not tokens:
        raise UsageError(
            "the token file is empty: put a line `name: token` in it, for example from `openssl rand -hex 32`"
        )
    return tokens
