"""Until when a certificate is valid: the one field of X.509 that is wanted (RFC 5280 section 4.1). Pure."""

import ssl
from datetime import UTC, datetime

_SEQUENCE, _VERSION, _UTC_TIME, _GENERALIZED = 0x30, 0xA0, 0x17, 0x18


def validity(pem: str) -> tuple[datetime, datetime]:
    """From when until when the first certificate of a PEM is valid; ValueError when it is none."""
    begin = pem.find("-----BEGIN CERTIFICATE-----")
    end = pem.find(_END := "-----END CERTIFICATE-----", max(begin, 0))
    if begin < 0 or end < 0:
        raise ValueError("no certificate")
    certificate, _ = _element(ssl.PEM_cert_to_DER_cert(pem[begin : end + len(_END)]), _SEQUENCE)
    rest, _ = _element(certificate, _SEQUENCE)
    if rest[:1] == bytes([_VERSION]):
        rest = _behind(rest)
    for _ in range(3):  # serial number, algorithm, issuer
        rest = _behind(rest)
    dates, _ = _element(rest, _SEQUENCE)
    return _time(dates), _time(_behind(dates))


def _element(data: bytes, kind: int | None = None) -> tuple[bytes, bytes]:
    """The content of the first element, and what comes behind it (X.690 section 8.1)."""
    if len(data) < 2 or (kind is not None and data[0] != kind):
        raise ValueError("no certificate")
    length, start = data[1], 2
    if length & 0x80:
        start += length & 0x7F
        length = int.from_bytes(data[2:start], "big")
    if start + length > len(data):
        raise ValueError("a certificate that is cut off")
    return data[start : start + length], data[start + length :]


def _behind(data: bytes) -> bytes:
    return _element(data)[1]


def _time(data: bytes) -> datetime:
    """UTCTime has two digits for the year, of 1950 to 2049."""
    if data[:1] == bytes([_UTC_TIME]):
        text = _element(data)[0].decode("ascii")
        century = "19" if text >= "50" else "20"
        text = century + text
    else:
        text = _element(data, _GENERALIZED)[0].decode("ascii")
    return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC)
