"""Which names go to the cluster, and under which name: a table, and what holds for every name."""

from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpvpn.dns.policy import (
    Naming,
    Neighbour,
    Policy,
    domain_of,
    host_of,
    is_below,
    own_suffix,
    public_domains,
    reverse_name,
    zones,
)
from tpvpn.route.prefix import Prefix
from tpvpn.wire.dns import DNSKEY, DS, NS, SOA, A

NAMESPACES = ("default", "backend", "dev", "kube-system", "app", "local", "localhost", "internal")
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
            ("pay.db.internal.example.com", "pay.backend"),
            ("wpad.corp.example", "pay.backend"),
            ("proxy.example.com", "wpad.backend.svc"),
        ),
    ),
    domain="cluster.local",
    subnets=(Prefix.parse("10.130.0.0/16"), Prefix.parse("fd10:130::/112")),
    virtual=((Prefix.parse("246.128.0.0/16"), Prefix.parse("10.132.0.0/16")),),
    claimed=("corp.svc", "corp.example", "default", "local", "9.130.10.in-addr.arpa", "10.in-addr.arpa"),
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
        ("web.default", "elsewhere", None),  # another link has that domain: a namespace gives way
        ("web.default.svc", "cluster", "web.default.svc.cluster.local"),
        ("db-0.db.backend", "cluster", "db-0.db.backend.svc.cluster.local"),
        ("web.backend.svc", "cluster", WEB),
        ("db-0.db.backend.svc", "cluster", "db-0.db.backend.svc.cluster.local"),
        ("_http._tcp.web.backend.svc", "cluster", "_http._tcp.web.backend.svc.cluster.local"),
        ("10-132-0-10.backend.pod", "cluster", "10-132-0-10.backend.pod.cluster.local"),
        ("web.none", "elsewhere", None),
        ("default", "cluster", "default.backend.svc.cluster.local"),
        ("web.kube-system", "cluster", "web.kube-system.svc.cluster.local"),
        ("web.backend.svc.cluster", "elsewhere", None),
        ("web.backend.cluster.local", "cluster", None),
        ("_http._tcp.web.backend", "cluster", "_http._tcp.web.backend.svc.cluster.local"),
        ("pod", "cluster", "pod.backend.svc.cluster.local"),
        ("10-132-0-10.backend.pod.cluster.local", "cluster", None),
        ("fd10-132--10.backend.pod", "cluster", "fd10-132--10.backend.pod.cluster.local"),
        ("backend.svc", "cluster", "backend.svc.cluster.local"),
        ("xsvc", "cluster", "xsvc.backend.svc.cluster.local"),
        ("web.xsvc", "elsewhere", None),
        ("localhost", "elsewhere", None),
        ("local", "elsewhere", None),
        ("", "elsewhere", None),
        # public top-level domains
        ("web.dev", "elsewhere", None),
        ("web.app", "elsewhere", None),
        ("web.dev.svc", "cluster", "web.dev.svc.cluster.local"),
        ("web.dev.svc.cluster.local", "cluster", None),
        ("dev", "cluster", "dev.backend.svc.cluster.local"),
        # a namespace's name that mDNS or the host itself has
        ("printer.local", "elsewhere", None),
        ("web.localhost", "elsewhere", None),
        ("web.local.svc", "cluster", "web.local.svc.cluster.local"),
        ("metadata.internal", "elsewhere", None),
        ("web.internal.svc", "cluster", "web.internal.svc.cluster.local"),
        # wpad
        ("wpad", "elsewhere", None),
        ("wpad.backend", "elsewhere", None),
        ("wpad.backend.svc", "nowhere", None),
        ("wpad.backend.svc.cluster.local", "nowhere", None),
        ("wpad.corp.example", "elsewhere", None),  # though it is mapped
        ("proxy.example.com", "nowhere", "wpad.backend.svc"),
        ("wpad.dev", "elsewhere", None),
        ("wpad.internal.example.com", "elsewhere", None),
        ("wpad.backend.pod", "nowhere", None),
        ("web.wpad.backend", "cluster", "web.wpad.backend.svc.cluster.local"),
        ("wpadx", "cluster", "wpadx.backend.svc.cluster.local"),
        # configured
        ("x.internal.example.com", "cluster", None),
        ("internal.example.com", "cluster", None),
        ("x.db.internal.example.com", "elsewhere", None),
        ("a.secret.svc", "elsewhere", None),
        ("pay.example.com", "cluster", "pay.backend.svc.cluster.local"),
        ("old.example.com", "cluster", "pay.backend.svc.cluster.local"),
        ("x.pay.example.com", "elsewhere", None),
        ("pay.db.internal.example.com", "cluster", "pay.backend.svc.cluster.local"),
        ("db.internal.example.com", "elsewhere", None),
        ("secret.svc", "elsewhere", None),
        ("xsecret.svc", "cluster", "xsecret.svc.cluster.local"),
        ("a.secret.svc.cluster.local", "cluster", None),
        ("example.com", "elsewhere", None),
        ("away.example.com", "elsewhere", "www.example.org"),
        ("fixed.example.com", "address", None),
        ("six.example.com", "address", None),
        ("round.example.com", "nowhere", None),
        # a VPN's
        ("a.corp.svc", "elsewhere", None),
        ("corp.svc", "elsewhere", None),
        ("a.other.svc", "cluster", "a.other.svc.cluster.local"),
        ("wiki.corp.example", "elsewhere", None),
        ("web.local.cluster.local", "cluster", None),  # "local", which the other link has, is wider than ours
        # addresses
        ("80.0.130.10.in-addr.arpa", "cluster", None),
        ("80.0.131.10.in-addr.arpa", "elsewhere", None),
        ("7.0.128.246.in-addr.arpa", "cluster", "7.0.132.10.in-addr.arpa"),
        ("0.130.10.in-addr.arpa", "elsewhere", None),
        ("80.9.130.10.in-addr.arpa", "elsewhere", None),  # the VPN's zone is closer than 130.10.in-addr.arpa
        ("255.255.130.10.in-addr.arpa", "cluster", None),
        ("255.255.129.10.in-addr.arpa", "elsewhere", None),
        ("1.0.132.10.in-addr.arpa", "elsewhere", None),  # the virtual subnet's real one is not routed
        ("in-addr.arpa", "elsewhere", None),
        ("01.0.130.10.in-addr.arpa", "elsewhere", None),
        ("x.80.0.130.10.in-addr.arpa", "elsewhere", None),
        ("a.%.8.0" + ".0" * 28 + ".ip6.arpa", "elsewhere", None),  # a zone index is no part of an address
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


@pytest.mark.parametrize("kind", [NS, SOA, DS, DNSKEY])
def test_a_question_for_a_top_level_domain_is_not_the_clusters(kind: int) -> None:
    assert POLICY.decide("com", kind).where == POLICY.decide("", kind).where == "elsewhere"
    assert POLICY.decide("com", A).where == POLICY.decide("web.backend", kind).where == "cluster"


def test_whoever_may_not_list_namespaces_is_told_which_are_known() -> None:
    policies = [Policy(Naming("a", tuple(known))) for known in ("", "a", "abcd", "abcdef")]
    said = [policy.decide("web.x", A).because.partition("namespaces: ")[2] for policy in policies]
    assert said == ["none", "a", "a, b, c, d", "a, b, c, d and 2 more"]


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
        ("search a.svc.k8s.corp.example svc.k8s.corp.example. k8s.corp.example x\n", "k8s.corp.example"),
        (
            "search a.svc.old.example svc.old.example old.example\nsearch b.svc.k8s svc.k8s k8s\n",
            "k8s",
        ),  # the last counts
        ("search a.svc.k8s svc.k8s k8s\nsearch corp.example\n", None),
        ("search a.svc.k8s svc.k8s k8s svc.corp.example corp.example\n", "k8s"),  # the node's own come behind
        ("search svc.corp.example\n", None),
        ("search svc.com com\n", None),
        ("search svc.-x -x svc.a_b a_b svc.\\x \\x\n", None),
        ("search\n", None),
        ("search corp.example\n", None),
        ("search svc.\n", None),
        ("", None),
    ],
)
def test_the_domain_of_a_pod(text: str, domain: str | None) -> None:
    assert domain_of(text) == domain


@pytest.mark.parametrize(
    ("policy", "name", "where", "asked"),
    [
        (Policy(Naming()), "web", "cluster", "web.default.svc.cluster.local"),
        (Policy(Naming()), "web.default", "elsewhere", None),  # no namespace is known
        (Policy(Naming("a", ("a",)), "k8s.corp.example"), "web.a", "cluster", "web.a.svc.k8s.corp.example"),
        (Policy(Naming("a"), "k8s.corp.example"), "web.a.svc.cluster.local", "elsewhere", None),
        (Policy(Naming("a"), "k8s.corp.example", claimed=("corp.example",)), "x.k8s.corp.example", "cluster", None),
        (Policy(Naming("a"), "corp.example", claimed=("k8s.corp.example",)), "x.k8s.corp.example", "elsewhere", None),
        (Policy(Naming("a"), "corp.example", claimed=("corp.example",)), "x.corp.example", "cluster", None),
        (Policy(Naming("svc", ("svc", "pod"))), "web.svc", "cluster", "web.svc.cluster.local"),
        (Policy(Naming(include=("dev",))), "web.dev", "cluster", None),  # who writes it down means it
        (Policy(Naming(exclude=("local",))), "web.default.svc.cluster.local", "elsewhere", None),
        (Policy(Naming(exclude=("local",))), "web.default.svc", "cluster", "web.default.svc.cluster.local"),
        (Policy(Naming(exclude=("web",))), "web", "elsewhere", None),
        (Policy(Naming(mappings=(("db", "192.0.2.7"),))), "db", "address", None),
        (Policy(Naming(mappings=(("db", "db.shop.svc"),))), "db", "cluster", "db.shop.svc.cluster.local"),
        (Policy(Naming(mappings=(("db", "db"),))), "db", "nowhere", None),
        (
            Policy(Naming(mappings=(("www.example.com", "web"),))),
            "www.example.com",
            "cluster",
            "web.default.svc.cluster.local",
        ),
    ],
)
def test_other_settings(policy: Policy, name: str, where: str, asked: str | None) -> None:
    decision = policy.decide(name, A)
    assert (decision.where, decision.asked) == (where, asked), decision.because


FIRST = Policy(
    Naming(
        "backend",
        ("backend", "staging"),
        include=("corp.example",),
        mappings=(("db", "db.backend"), ("pay", "192.0.2.7")),
    ),
    own="default.tpvpn",
    neighbours=(Neighbour("staging", ("cluster.local", "corp.example", "db"), False),),
)
SECOND = replace(
    FIRST, own="staging", neighbours=(Neighbour("default", ("cluster.local", "corp.example", "db"), True),)
)
THERE = "web.backend.svc.cluster.local"


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        # asked in the cluster of the first session, or of the second, or of neither: as what
        ("web", THERE, None),
        ("web.backend", THERE, None),
        ("web.backend.svc", THERE, None),
        (THERE, "itself", None),
        ("x.corp.example", "itself", None),
        ("db", "db.backend.svc.cluster.local", None),
        ("web.staging", None, THERE),  # a namespace gives way to another session's suffix
        ("web.staging.svc", "web.staging.svc.cluster.local", None),
        ("web.backend.staging", None, THERE),
        ("web.backend.svc.staging", None, THERE),
        (f"{THERE}.staging", None, THERE),
        ("_sql._tcp.db.backend.svc.staging", None, "_sql._tcp.db.backend.svc.cluster.local"),
        ("10-132-0-10.backend.pod.staging", None, "10-132-0-10.backend.pod.cluster.local"),
        ("web.dev.staging", None, "web.dev.svc.cluster.local"),  # no name elsewhere ends so
        ("svc.staging", None, "svc.backend.svc.cluster.local"),
        ("web.backend.default.tpvpn", THERE, None),
        ("wpad.staging", None, None),
        ("web.tpvpn", None, None),
        ("www.example.com", None, None),
    ],
)
def test_of_two_sessions_one_has_a_name(name: str, first: str | None, second: str | None) -> None:
    for policy, asked in ((FIRST, first), (SECOND, second)):
        decision = policy.decide(name, A)
        found = (decision.asked or "itself") if decision.where == "cluster" else None
        assert found == asked, decision
        is_own = decision.where == "cluster" and name.endswith(f".{policy.own}")
        assert decision.below == (policy.own if is_own else None)


def test_what_the_hosts_resolver_is_told_of_two_sessions() -> None:
    assert FIRST.routing_domains()[:4] == ("cluster.local", "default.tpvpn", "svc", "pod")
    assert "backend" in FIRST.routing_domains() and "staging" not in FIRST.routing_domains()
    assert SECOND.routing_domains() == ("staging", "pay"), "and what the first one has not"
    assert FIRST.search() and not SECOND.search()
    routed = replace(SECOND, subnets=(Prefix.parse("10.140.0.0/16"),))
    assert "140.10.in-addr.arpa" in routed.routing_domains()
    assert routed.decide("80.0.140.10.in-addr.arpa", A).below == "staging", "the answer names it by the second's suffix"
    other = replace(SECOND, domain="k8s.example")
    assert other.routing_domains()[0] == "k8s.example"
    assert other.decide("web.backend.svc.k8s.example", A).where == "cluster"
    vpn = replace(SECOND, claimed=("staging",))
    assert vpn.decide("web.staging", A).where == "elsewhere" and "staging" not in vpn.routing_domains()


@pytest.mark.parametrize(
    ("session", "suffix"),
    [("staging", "staging"), ("eu-1", "eu-1")]
    + [(one, f"{one}.tpvpn") for one in ("default", "dev", "prod", "svc", "pod", "local", "tpvpn", "7")],
)
def test_a_sessions_own_suffix(session: str, suffix: str) -> None:
    assert own_suffix(session) == suffix


def test_routing_domains_are_in_order_and_bounded() -> None:
    found = POLICY.routing_domains()
    assert found[:4] == ("cluster.local", "svc", "pod", "internal.example.com")
    assert "dev" not in found and "backend" in found and "130.10.in-addr.arpa" in found
    assert len(found) == len(set(found))
    assert "pay.db.internal.example.com" in found, "what is mapped, though it is below what is excluded"
    assert not {"wpad.corp.example", "local", "localhost", "db.internal.example.com"} & set(found)
    assert list(zones(Prefix.parse("10.128.0.0/9"))) == ["10.in-addr.arpa"], "one wider zone instead of 128"
    assert len(list(zones(Prefix.parse("10.64.0.0/10")))) == 64
    assert found.index("backend") < found.index("130.10.in-addr.arpa") and "default" not in found
    assert list(zones(Prefix.parse("10.96.0.0/12")))[::15] == ["96.10.in-addr.arpa", "111.10.in-addr.arpa"]
    assert list(zones(Prefix.parse("fd10:130::/112"))) == [
        "0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.3.1.0.0.1.d.f.ip6.arpa"
    ]


LABEL = st.text("abcdefghijklmnopqrstuvwxyz0123456789-_\\", min_size=1, max_size=8)
PUBLIC = st.sampled_from(sorted(public_domains()))
NAMESPACE = st.sampled_from([*NAMESPACES, "wpad", "svc", "pod"]) | PUBLIC | LABEL
ENDS = st.sampled_from(["svc", "pod", *NAMESPACES, "cluster.local", "com", "internal.example.com", "corp.svc", "arpa"])


def names(end: st.SearchStrategy[str] = ENDS) -> st.SearchStrategy[str]:
    """Some labels, often `wpad` first, and an end."""
    labels = st.lists(LABEL, max_size=3) | st.lists(LABEL, max_size=2).map(lambda found: ["wpad", *found])
    return st.builds(lambda labels, end: ".".join([*labels, end]), labels, end)


SUFFIXES = st.lists(names(ENDS | NAMESPACE), max_size=3).map(tuple)
SUBNETS = st.lists(
    st.builds(
        lambda host, length: Prefix.around(4, 10 << 24 | host, length),
        st.integers(0, 2**24 - 1),
        st.integers(8, 26),
    ),
    max_size=2,
).map(tuple)
POLICIES = st.builds(
    Policy,
    st.builds(
        Naming,
        NAMESPACE,
        st.lists(NAMESPACE, max_size=4).map(tuple),
        include=SUFFIXES,
        exclude=SUFFIXES,
        mappings=st.lists(st.tuples(names(), names() | st.just("192.0.2.7")), max_size=3).map(tuple),
    ),
    domain=st.sampled_from(["cluster.local", "k8s.corp.example", "local"]),
    subnets=SUBNETS,
    claimed=SUFFIXES,
)


REVERSE = st.lists(st.text("0123456789abcdef%.x", max_size=2), min_size=30, max_size=34)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Policy, str]:
    """A policy, and often a name that it has a word on."""
    policy = draw(st.just(POLICY) | POLICIES)
    naming = policy.naming
    mapped = [name for name, _ in naming.mappings]
    known = [*policy.routing_domains(), *mapped, *naming.namespaces, *naming.include, *naming.exclude, *policy.claimed]
    reverse = REVERSE.map(lambda labels: ".".join([*labels, "ip6.arpa"]))
    return policy, draw(st.sampled_from(known) | names(st.sampled_from(known)) | st.text(max_size=60) | reverse)


@settings(max_examples=500)
@given(cases())
def test_what_holds_for_every_policy_and_name(case: tuple[Policy, str]) -> None:
    policy, name = case
    decision = policy.decide(name, A)
    assert decision.because and (decision.address is not None) == (decision.where == "address")
    if decision.where in ("cluster", "address") and "." in name:  # who asks systemd-resolved must come to us
        assert any(is_below(name, one) for one in policy.routing_domains())
    if name.split(".")[0] == "wpad":
        assert decision.where in ("elsewhere", "nowhere")
    if decision.where == "cluster":
        asked = decision.asked or name
        assert any(is_below(asked, one) for one in (policy.domain, *policy.naming.include)) or host_of(asked)


@given(PUBLIC, st.lists(LABEL, min_size=1, max_size=3))
def test_a_namespace_is_never_a_public_domain(namespace: str, labels: list[str]) -> None:
    policy = Policy(Naming(namespace, (namespace,)))
    assert policy.decide(".".join([*labels, namespace]), A).where == "elsewhere"
    assert namespace not in policy.routing_domains()
    if labels[0] != "wpad":  # the longer names are the cluster's all the same
        assert policy.decide(f"{'.'.join(labels)}.{namespace}.svc", A).where == "cluster"


INSIDE = [st.ip_addresses(network=net) for net in ("10.130.0.0/16", "10.130.9.0/24", "246.128.0.0/16", "fd10:130::/96")]


@given(st.ip_addresses() | st.one_of(INSIDE))
def test_the_reverse_name_of_every_address(address: IPv4Address | IPv6Address) -> None:
    host = Prefix.host(str(address))
    assert host_of(address.reverse_pointer) == host
    assert reverse_name(host) == address.reverse_pointer
    routed = any(subnet.contains(host) for subnet in (*POLICY.subnets, POLICY.virtual[0][0]))
    theirs = str(address).startswith("10.130.9.")
    assert POLICY.decide(address.reverse_pointer, A).where == ("cluster" if routed and not theirs else "elsewhere")


@given(st.integers(0, 0xFFFF), st.integers(0, 0xFFFF_FFFF))
def test_a_virtual_address_is_asked_as_the_real_one(at: int, at6: int) -> None:
    pairs = ("246.128.0.0/16", "10.132.0.0/16"), ("fd24:6::/96", "fd10:132::/96")
    policy = Policy(Naming(), virtual=tuple((Prefix.parse(virtual), Prefix.parse(real)) for virtual, real in pairs))
    for offset, (virtual, real) in zip((at, at6), policy.virtual, strict=True):
        name, asked = (reverse_name(Prefix.host(one.address(offset))) for one in (virtual, real))
        decision = policy.decide(name, A)
        assert (decision.where, decision.asked) == ("cluster", asked)
        assert any(is_below(name, one) for one in policy.routing_domains())
        assert policy.decide(asked, A).where == "elsewhere"
