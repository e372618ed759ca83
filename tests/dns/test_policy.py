"""Which names go to the cluster, and under which name: a table, and what holds for every name."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpvpn.dns.policy import Decision, Naming, Policy, domain_of, host_of, public_domains, zones
from tpvpn.route.prefix import Prefix
from tpvpn.wire.dns import A

NAMESPACES = ("default", "backend", "dev", "kube-system", "app")
POLICY = Policy(
    Naming(
        "backend",
        NAMESPACES,
        include=("internal.example.com",),
        exclude=("db.internal.example.com", "secret.svc"),
        mappings=(
            ("pay.example.com", "pay.backend"),
            ("old.example.com", "pay.example.com"),
            ("fixed.example.com", "192.0.2.7"),
            ("six.example.com", "2001:db8::7"),
            ("away.example.com", "www.example.org"),
            ("round.example.com", "about.example.com"),
            ("about.example.com", "round.example.com"),
        ),
    ),
    domain="cluster.local",
    subnets=(Prefix.parse("10.130.0.0/16"), Prefix.parse("fd10:130::/112")),
    virtual=((Prefix.parse("246.128.0.0/16"), Prefix.parse("10.132.0.0/16")),),
    claimed=("corp.svc", "corp.example", "default"),
)
WEB = "web.backend.svc.cluster.local"


@pytest.mark.parametrize(
    ("name", "where", "asked"),
    [
        # below the domain, verbatim
        (WEB, "cluster", None),
        ("cluster.local", "cluster", None),
        ("a.b.c.cluster.local", "cluster", None),
        ("xcluster.local", "elsewhere", None),
        ("cluster.local.example.com", "elsewhere", None),
        # short names
        ("web", "cluster", WEB),
        ("web.backend", "cluster", WEB),
        ("web.default", "cluster", "web.default.svc.cluster.local"),  # as long as the other link's own: ours
        ("db-0.db.backend", "cluster", "db-0.db.backend.svc.cluster.local"),
        ("web.backend.svc", "cluster", WEB),
        ("db-0.db.backend.svc", "cluster", "db-0.db.backend.svc.cluster.local"),
        ("_http._tcp.web.backend.svc", "cluster", "_http._tcp.web.backend.svc.cluster.local"),
        ("10-132-0-10.backend.pod", "cluster", "10-132-0-10.backend.pod.cluster.local"),
        ("web.none", "elsewhere", None),
        ("localhost", "elsewhere", None),
        ("local", "elsewhere", None),
        ("", "elsewhere", None),
        # public top-level domains
        ("web.dev", "elsewhere", None),
        ("web.app", "elsewhere", None),
        ("web.dev.svc", "cluster", "web.dev.svc.cluster.local"),
        # wpad
        ("wpad", "elsewhere", None),
        ("wpad.backend", "elsewhere", None),
        ("wpad.backend.svc", "nowhere", None),
        ("wpad.backend.svc.cluster.local", "nowhere", None),
        ("wpad.corp.example", "elsewhere", None),
        # configured
        ("x.internal.example.com", "cluster", None),
        ("internal.example.com", "cluster", None),
        ("x.db.internal.example.com", "elsewhere", None),
        ("a.secret.svc", "elsewhere", None),
        ("pay.example.com", "cluster", "pay.backend.svc.cluster.local"),
        ("old.example.com", "cluster", "pay.backend.svc.cluster.local"),
        ("x.pay.example.com", "elsewhere", None),
        ("away.example.com", "elsewhere", "www.example.org"),
        ("fixed.example.com", "address", None),
        ("six.example.com", "address", None),
        ("round.example.com", "nowhere", None),
        # a VPN's
        ("a.corp.svc", "elsewhere", None),
        ("corp.svc", "elsewhere", None),
        ("a.other.svc", "cluster", "a.other.svc.cluster.local"),
        ("wiki.corp.example", "elsewhere", None),
        # addresses
        ("80.0.130.10.in-addr.arpa", "cluster", None),
        ("80.0.131.10.in-addr.arpa", "elsewhere", None),
        ("7.0.128.246.in-addr.arpa", "cluster", "7.0.132.10.in-addr.arpa"),
        ("0.130.10.in-addr.arpa", "elsewhere", None),
        ("999.0.130.10.in-addr.arpa", "elsewhere", None),
        # the rest
        ("www.example.com", "elsewhere", None),
        ("svc", "cluster", "svc.backend.svc.cluster.local"),
        ("x\\032y.backend", "cluster", "x\\032y.backend.svc.cluster.local"),
    ],
)
def test_every_kind_of_name(name: str, where: str, asked: str | None) -> None:
    decision = POLICY.decide(name, A)
    assert (decision.where, decision.asked) == (where, asked), decision.because
    assert decision.because


def test_addresses_of_mappings() -> None:
    assert POLICY.decide("fixed.example.com", A).address == "192.0.2.7"
    assert POLICY.decide("six.example.com", A).address == "2001:db8::7"


def test_an_ipv6_address() -> None:
    name = "0.8.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.3.1.0.0.1.d.f.ip6.arpa"
    assert host_of(name) == Prefix.host("fd10:130::80")
    assert POLICY.decide(name, A).where == "cluster"


@pytest.mark.parametrize(
    ("text", "domain"),
    [
        ("search default.svc.cluster.local svc.cluster.local cluster.local\n", "cluster.local"),
        ("nameserver 10.96.0.10\nsearch a.svc.k8s.corp.example svc.k8s.corp.example. x\n", "k8s.corp.example"),
        ("search corp.example\n", None),
        ("search svc.\n", None),
        ("", None),
    ],
)
def test_the_domain_of_a_pod(text: str, domain: str | None) -> None:
    assert domain_of(text) == domain


def test_public_domains() -> None:
    assert {"com", "dev", "app", "de", "arpa", "xn--p1ai"} <= public_domains()
    assert not {"svc", "pod", "default", "local", "cluster", "internal"} & public_domains()
    assert len(public_domains()) > 1400


def test_routing_domains_are_in_order_and_bounded() -> None:
    found = POLICY.routing_domains()
    assert found[:4] == ("cluster.local", "svc", "pod", "internal.example.com")
    assert "dev" not in found and "backend" in found and "130.10.in-addr.arpa" in found
    assert len(found) == len(set(found))
    assert len(list(zones(Prefix.parse("10.0.0.0/9")))) == 64
    assert list(zones(Prefix.parse("10.96.0.0/12")))[::15] == ["96.10.in-addr.arpa", "111.10.in-addr.arpa"]
    assert list(zones(Prefix.parse("fd10:130::/112"))) == [
        "0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.3.1.0.0.1.d.f.ip6.arpa"
    ]


LABELS = st.text("abcdefghijklmnopqrstuvwxyz0123456789-_\\", min_size=1, max_size=8)
ENDS = st.sampled_from(["svc", "pod", *NAMESPACES, "cluster.local", "com", "internal.example.com", "corp.svc", "arpa"])
NAMES = st.builds(lambda labels, end: ".".join([*labels, end]), st.lists(LABELS, max_size=4), ENDS)


@given(NAMES | st.text(max_size=60))
def test_what_holds_for_every_name(name: str) -> None:
    decision: Decision = POLICY.decide(name, A)
    if decision.where == "cluster" and "." in name:
        assert any(name == one or name.endswith(f".{one}") for one in POLICY.routing_domains()), name
    if decision.asked and decision.where == "cluster":
        assert POLICY.decide(decision.asked, A).where in ("cluster", "nowhere", "elsewhere")
    if name.split(".")[0] == "wpad":
        assert decision.where != "cluster"
    if "." in name and name.rpartition(".")[2] in public_domains() and name not in dict(POLICY.naming.mappings):
        assert decision.where != "cluster" or name.endswith(("internal.example.com", ".arpa"))
