"""The lab's names: who answers for which, as tables, and the configuration of the dnsmasq that does.

The cluster's resolver answers for cluster.local as CoreDNS would and asks the LAN's for all else, the VPN's knows the
company's names, and the LAN's stands in for the public DNS. A name that none of them has does not exist. Each address
has a PTR record, which gives the first name of the table that it has.
"""

from collections.abc import Iterator
from pathlib import Path

from tpvpn.lab.topology import NODE, Where

RESOLVERS: dict[Where, tuple[str, ...]] = {
    "cluster": ("10.130.0.10", "fd10:130::10"),
    "vpn": ("10.0.0.1",),
    "node": (NODE,),
}
"""The addresses where one answers, with the namespace that it is in."""
LAPTOP = f"# the lab's laptop\nnameserver {NODE}\n"
POD = f"""\
search default.svc.cluster.local svc.cluster.local cluster.local
nameserver {RESOLVERS["cluster"][0]}
options ndots:5
"""
"""What kubelet writes."""

WHO = "who.default.svc.cluster.local"
"""Its TXT record says what the cluster is called."""
CROWD = 1000
"""Pods of a large headless service."""

_LONG = "\n".join(f"long.default.svc.cluster.local  TXT  {number:02}-{'x' * 200}" for number in range(20))
_CROWD = "\n".join(
    f"crowd.default.svc.cluster.local  A  10.132.{100 + one // 250}.{one % 250 + 1}" for one in range(CROWD)
)
TABLES: dict[Where, str] = {
    "cluster": f"""
kubernetes.default.svc.cluster.local             A      10.130.0.1
kube-dns.kube-system.svc.cluster.local           A      10.130.0.10
kube-dns.kube-system.svc.cluster.local           AAAA   fd10:130::10
_dns._udp.kube-dns.kube-system.svc.cluster.local SRV    0 100 53 kube-dns.kube-system.svc.cluster.local
web.default.svc.cluster.local                    A      10.130.0.80
web.default.svc.cluster.local                    AAAA   fd10:130::80
_http._tcp.web.default.svc.cluster.local         SRV    0 100 80 web.default.svc.cluster.local
api.default.svc.cluster.local                    A      10.130.200.7
api.shop.svc.cluster.local                       A      10.130.200.7
db-0.db.default.svc.cluster.local                A      10.132.0.10
db-0.db.default.svc.cluster.local                AAAA   fd10:132::10
db-1.db.default.svc.cluster.local                A      10.132.0.11
db-1.db.default.svc.cluster.local                AAAA   fd10:132::11
db-2.db.default.svc.cluster.local                A      10.132.200.20
db.default.svc.cluster.local                     A      10.132.0.10
db.default.svc.cluster.local                     A      10.132.0.11
db.default.svc.cluster.local                     A      10.132.200.20
db.default.svc.cluster.local                     AAAA   fd10:132::10
db.default.svc.cluster.local                     AAAA   fd10:132::11
_sql._tcp.db.default.svc.cluster.local           SRV    0 50 80 db-0.db.default.svc.cluster.local
_sql._tcp.db.default.svc.cluster.local           SRV    0 50 80 db-1.db.default.svc.cluster.local
10-132-0-10.default.pod.cluster.local            A      10.132.0.10
dns-version.cluster.local                        TXT    1.1.0
first.default.svc.cluster.local                  CNAME  second.default.svc.cluster.local
second.default.svc.cluster.local                 CNAME  web.default.svc.cluster.local
mail.default.svc.cluster.local                   MX     10 web.default.svc.cluster.local
{_LONG}
{_CROWD}
""",
    "vpn": """
gateway.corp.example                             A      10.0.0.1
wiki.corp.example                                A      10.1.2.3
wiki.corp.example                                AAAA   fd10:1::3
git.corp.example                                 A      10.20.0.5
near.corp.example                                A      10.129.0.7
docs.corp.example                                CNAME  wiki.corp.example
corp.example                                     MX     10 git.corp.example
""",
    "node": """
www.example.com                                  A      203.0.113.80
www.example.com                                  AAAA   2001:db8:133::10
www.example.org                                  A      203.0.113.11
cdn.example.org                                  CNAME  www.example.org
example.com                                      MX     10 www.example.com
example.com                                      TXT    v=spf1 -all
""",
}
"""The records of each, as NAME TYPE DATA; the order of data is that of a zone file (RFC 1035 section 5)."""

ZONES: dict[Where, tuple[str, ...]] = {
    "cluster": ("cluster.local", "130.10.in-addr.arpa", "132.10.in-addr.arpa", "0.1.d.f.ip6.arpa"),
    "vpn": ("#",),
    "node": ("#",),
}
"""What each answers for alone ("#": everything): a name there that is not in its table does not exist."""

# One process in the foreground; each question over TCP has a child, which ends with it.
_COMMON = """\
keep-in-foreground
log-facility=-
no-hosts
no-resolv
bind-interfaces
user=nobody
group=nogroup
local-ttl=5
no-round-robin
dns-forward-max=10000
"""


def configuration(where: Where, directory: Path, ipv6: bool, cluster: str) -> str:
    """The text of dnsmasq's configuration for the resolver of a namespace; its state is kept in `directory`.

    `cluster`: what the cluster's resolver says that it is called, to who asks for TXT at WHO.
    """
    listen = [f"listen-address={address}" for address in RESOLVERS[where] if ipv6 or ":" not in address]
    local = [f"local=/{zone}/" for zone in ZONES[where]]
    asked = [f"server={NODE}", f'txt-record={WHO},"{cluster}"'] if where == "cluster" else []
    state = f"pid-file={directory / f'names-{where}.pid'}"
    return "\n".join([_COMMON + state, *listen, *local, *asked, *_records(TABLES[where], ipv6), ""])


def _records(table: str, ipv6: bool) -> Iterator[str]:
    for name, kind, data in (line.split(maxsplit=2) for line in table.split("\n") if line):
        match kind:
            case "A":
                yield f"host-record={name},{data}"
            case "AAAA":
                if ipv6:
                    yield f"host-record={name},{data}"
            case "CNAME":
                yield f"cname={name},{data}"
            case "TXT":
                yield f'txt-record={name},"{data}"'
            case "MX":
                preference, host = data.split()
                yield f"mx-host={name},{host},{preference}"
            case "SRV":
                priority, weight, port, target = data.split()
                yield f"srv-host={name},{target},{port},{priority},{weight}"
            case _:
                raise ValueError(f"no record of type {kind}")
