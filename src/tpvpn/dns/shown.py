"""An answer in words, as dig shows it. A door of dnspython."""

from typing import NamedTuple


class Shown(NamedTuple):
    """What an answer says: its code ("NOERROR"), its records as lines, and the addresses among them."""

    rcode: str
    records: list[str]
    addresses: list[str]


def shown(answer: bytes) -> Shown:
    """The answer section of a message; a code of its own for what is none."""
    import dns.exception
    import dns.message
    import dns.rcode
    import dns.rdatatype

    try:
        message = dns.message.from_wire(answer, ignore_trailing=True, one_rr_per_rrset=True)
    except dns.exception.DNSException:
        return Shown("malformed", [], [])
    addresses = [str(rrset[0]) for rrset in message.answer if rrset.rdtype in (dns.rdatatype.A, dns.rdatatype.AAAA)]
    return Shown(dns.rcode.to_text(message.rcode()), [str(rrset) for rrset in message.answer], addresses)
