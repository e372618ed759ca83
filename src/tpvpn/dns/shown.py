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

    try:
        message = dns.message.from_wire(answer, ignore_trailing=True, one_rr_per_rrset=True)
    except dns.exception.DNSException:
        return Shown("malformed", [], [])
    records = [str(rrset) for rrset in message.answer]
    addresses = [line.rsplit(" ", 1)[1] for line in records if line.split()[3] in ("A", "AAAA")]
    return Shown(dns.rcode.to_text(message.rcode()), records, addresses)
