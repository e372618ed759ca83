"""An answer in words, as dig shows it. A door of dnspython."""

from typing import NamedTuple

from tpvpn.wire.dns import Rcode


class Shown(NamedTuple):
    """What an answer says: its code ("NOERROR"), its records as lines, and the addresses among them."""

    rcode: str
    records: list[str]
    addresses: list[str]


def shown(answer: bytes) -> Shown:
    """The answer section of a message; a code of its own for what is none."""
    import dns.exception
    import dns.message
    import dns.rdatatype

    try:
        message = dns.message.from_wire(answer, ignore_trailing=True, one_rr_per_rrset=True)
    except dns.exception.DNSException:
        return Shown("malformed", [], [])
    code = int(message.rcode())
    rcode = Rcode(code).name if code in Rcode else str(code)
    addresses = [str(rrset[0]) for rrset in message.answer if rrset.rdtype in (dns.rdatatype.A, dns.rdatatype.AAAA)]
    return Shown(rcode, [str(rrset) for rrset in message.answer], addresses)
