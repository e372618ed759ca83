"""One question to one DNS server, as a program asks it. A door of dnspython."""

PATIENCE = 4.0
"""Seconds: a session says that nobody answers it after three."""


def ask(name: str, server: str) -> str | None:
    """What becomes of a name's addresses at a server: "NOERROR", another code, "no address"; None: it says nothing."""
    import dns.exception
    import dns.message
    import dns.query
    import dns.rcode
    import dns.rdatatype

    for kind in (dns.rdatatype.A, dns.rdatatype.AAAA):
        try:
            answer, _ = dns.query.udp_with_fallback(dns.message.make_query(name, kind), server, PATIENCE)
        except (dns.exception.DNSException, OSError, ValueError):
            return None
        if answer.rcode() != dns.rcode.NOERROR:
            return dns.rcode.to_text(answer.rcode())
        if any(rrset.rdtype == kind for rrset in answer.answer):
            return "NOERROR"
    return "no address"
