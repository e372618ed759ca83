"""What is found to keep names away, and what is not: texts in, what is to be written out."""

import json
import re
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpvpn.dns import advice
from tpvpn.dns.advice import Check

CLUSTER, CORP = ("cluster.local", "svc"), ("k8s.corp.example", "svc")
OURS = "246.1.2.3"


def only(checks: Iterable[Check]) -> Check:
    """The one that was found."""
    (found,) = checks
    assert found.remedy and not found.ok
    assert not found.sentence.endswith(".")
    return found


def written(check: Check) -> str:
    """The line of nsswitch.conf that a remedy says."""
    assert check.remedy
    found = re.search(r"in /etc/nsswitch\.conf write `([^`]+)` for `[^`]+`", check.remedy)
    assert found, check.remedy
    return found[1]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("files mdns4_minimal [NOTFOUND=return] dns", "files dns mdns4_minimal"),
        ("files mdns_minimal [NOTFOUND=return] dns mymachines", "files dns mdns_minimal mymachines"),
        ("files mdns6_minimal  [ NOTFOUND = return ]  dns", "files dns mdns6_minimal"),
        ("files mdns4_minimal [notfound=RETURN] dns mdns4", "files dns mdns4_minimal mdns4"),
        ("files mdns4_minimal [!UNAVAIL=return] dns", "files dns mdns4_minimal"),
        ("files mdns4_minimal [SUCCESS=return NOTFOUND=return] dns", "files dns mdns4_minimal"),
        (
            "files mdns4_minimal [NOTFOUND=return] resolve [!UNAVAIL=return] dns",
            "files resolve [!UNAVAIL=return] dns mdns4_minimal",
        ),
    ],
)
def test_mdns_before_dns(before: str, after: str) -> None:
    for mode in ("file", "resolved", "resolved and file", "off"):
        found = only(advice.of_mdns(f"passwd: files\nhosts:\t{before}  # ours\n", CLUSTER, mode))
        assert (found.id, written(found)) == ("mdns", f"hosts: {after}")
        assert f"for `hosts: {' '.join(before.split())}`" in (found.remedy or "")
        assert "cluster.local" in found.sentence
        assert not list(advice.of_mdns(written(found), CLUSTER, mode)), "what it says helps"


@pytest.mark.parametrize(
    ("hosts", "suffixes", "mode"),
    [
        ("files dns", CLUSTER, "file"),
        ("files dns mdns4_minimal [NOTFOUND=return]", CLUSTER, "file"),
        ("files mdns4_minimal dns", CLUSTER, "file"),
        ("files mdns4_minimal [!NOTFOUND=return] dns", CLUSTER, "file"),
        ("files mdns4_minimal [SUCCESS=return] dns", CLUSTER, "file"),
        ("files mdns4_minimal [NOTFOUND=return]", CLUSTER, "file"),  # that dns is missing is said, by another
        ("files mdns4 [NOTFOUND=return] dns", CLUSTER, "file"),
        ("files resolve [!UNAVAIL=return] mdns4_minimal [NOTFOUND=return] dns", CLUSTER, "resolved"),
        ("files mdns4_minimal [NOTFOUND=return] dns", CORP, "file"),
        ("files mdns4_minimal [NOTFOUND=return] dns", ("xlocal",), "file"),
    ],
)
def test_mdns_is_in_nobodys_way(hosts: str, suffixes: tuple[str, ...], mode: str) -> None:
    assert not list(advice.of_mdns(f"hosts: {hosts}\n", suffixes, mode))


def test_mdns_behind_a_resolved_that_is_not_there() -> None:
    hosts = "hosts: files resolve [!UNAVAIL=return] mdns4_minimal [NOTFOUND=return] dns"
    assert only(advice.of_mdns(hosts, CLUSTER, "file"))


def test_mdns_and_an_included_suffix() -> None:
    hosts = "hosts: files mdns4_minimal [NOTFOUND=return] dns"
    assert "corp.local" in only(advice.of_mdns(hosts, (*CORP, "corp.local"), "file")).sentence


@pytest.mark.parametrize(
    ("text", "after"),
    [
        ("hosts: files\n", "hosts: files dns"),
        ("hosts:files mymachines", "hosts: files mymachines dns"),
        ("hosts: files mdns4_minimal [NOTFOUND=return] myhostname", "hosts: files myhostname dns mdns4_minimal"),
        ("hosts:", "hosts: dns"),
    ],
)
def test_no_dns_at_all(text: str, after: str) -> None:
    found = only(advice.of_nsswitch(text))
    assert (found.id, written(found)) == ("nsswitch", after)
    assert not list(advice.of_nsswitch(written(found)))


@pytest.mark.parametrize(
    "text", ["", "passwd: files\n", "# hosts: files\n", "hosts: files dns", "hosts: resolve files"]
)
def test_dns_is_asked(text: str) -> None:
    assert not list(advice.of_nsswitch(text))


@pytest.mark.parametrize(
    ("hosts", "after"),
    [
        ("files resolve [!UNAVAIL=return] dns", "files resolve dns"),
        ("resolve [!UNAVAIL=return] files dns", "resolve files dns"),
        ("files resolve [NOTFOUND=return] myhostname", "files resolve myhostname dns"),
    ],
)
def test_a_resolved_that_does_not_know_us(hosts: str, after: str) -> None:
    found = only(advice.of_nss_resolve(f"hosts: {hosts}", "file", resolved=True))
    assert (found.id, written(found)) == ("nss-resolve", f"hosts: {after}")
    assert "--dns auto" in (found.remedy or "")
    assert not list(advice.of_nss_resolve(written(found), "file", resolved=True))
    assert not list(advice.of_nss_resolve(f"hosts: {hosts}", "file", resolved=False)), "then dns is asked"
    for mode in ("resolved", "resolved and file", "off"):
        assert not list(advice.of_nss_resolve(f"hosts: {hosts}", mode, resolved=True))


@pytest.mark.parametrize("hosts", ["files dns resolve [!UNAVAIL=return]", "files resolve dns", "files dns"])
def test_a_resolved_that_is_not_the_last(hosts: str) -> None:
    assert not list(advice.of_nss_resolve(f"hosts: {hosts}", "file", resolved=True))


def pref(name: str, value: object) -> str:
    return f'user_pref("network.trr.{name}", {json.dumps(value)});\n'


@pytest.mark.parametrize(
    ("preferences", "suffixes", "missing"),
    [
        (pref("mode", 2), CLUSTER, "svc"),  # Firefox itself excepts "local"
        (pref("mode", 3), CLUSTER, "svc"),
        ("// x\n" + pref("mode", 3), CORP, "k8s.corp.example,svc"),
        (pref("mode", 2) + pref("excluded-domains", "corp.example, a.example"), CORP, "corp.example,a.example,svc"),
        (pref("mode", 5) + "\n" + pref("mode", 2), CORP, "k8s.corp.example,svc"),
        (pref("mode", 2) + pref("excluded-domains", "xcorp.example"), CORP, "xcorp.example,k8s.corp.example,svc"),
        (pref("mode", 0), CORP, None),
        (pref("mode", 5), CORP, None),
        (pref("mode", 2) + pref("mode", 5), CORP, None),  # user.js, which comes last, counts
        ("// " + pref("mode", 3), CORP, None),
        (pref("mode", 3) + pref("excluded-domains", "corp.example,svc"), CORP, None),
        (pref("mode", 3) + pref("excluded-domains", "svc"), CLUSTER, None),
        ("", CORP, None),
        ('user_pref("network.trr.mode", ', CORP, None),
    ],
)
def test_a_profile_of_firefox(preferences: str, suffixes: tuple[str, ...], missing: str | None) -> None:
    found = list(advice.of_firefox("", {"/home/a/x.default": preferences}, suffixes))
    if missing is None:
        assert not found
    else:
        remedy = only(found).remedy or ""
        assert f'`user_pref("network.trr.excluded-domains", "{missing}");`' in remedy
        assert "/home/a/x.default" in found[0].sentence and found[0].id == "firefox"
        after = preferences + "\n" + remedy.split("`")[1]
        assert not list(advice.of_firefox("", {"x": after}, suffixes)), "what it says helps"


@pytest.mark.parametrize(
    ("policy", "excluded"),
    [
        ({"Enabled": True}, ["k8s.corp.example", "svc"]),
        ({"Enabled": True, "ExcludedDomains": ["svc."]}, ["svc", "k8s.corp.example"]),
        ({"Enabled": True, "ExcludedDomains": ["example", "svc"]}, None),
        ({"Enabled": False}, None),
        ({"Enabled": "yes"}, None),
        ({"ExcludedDomains": []}, None),
    ],
)
def test_a_policy_of_firefox(policy: dict[str, object], excluded: list[str] | None) -> None:
    found = list(advice.of_firefox(json.dumps({"policies": {"DNSOverHTTPS": policy}}), {}, CORP))
    if excluded is None:
        assert not found
    else:
        assert f'`"ExcludedDomains": {json.dumps(excluded)}`' in (only(found).remedy or "")


def test_a_locked_policy_of_firefox_counts_more_than_a_profile() -> None:
    profiles = {"x": pref("mode", 3)}
    for locked in (True, False):
        policy = {"policies": {"DNSOverHTTPS": {"Enabled": False, "Locked": locked}}}
        assert bool(list(advice.of_firefox(json.dumps(policy), profiles, CORP))) is not locked
    excepted = {"policies": {"DNSOverHTTPS": {"ExcludedDomains": ["corp.example", "svc"]}}}
    assert not list(advice.of_firefox(json.dumps(excepted), profiles, CORP))


def managed(mode: object, templates: object = None) -> dict[str, object]:
    return {"DnsOverHttpsMode": mode} | ({} if templates is None else {"DnsOverHttpsTemplates": templates})


def state(mode: object, templates: object = "") -> dict[str, object]:
    return {"browser": {}, "dns_over_https": {"mode": mode, "templates": templates}}


@pytest.mark.parametrize(
    ("policies", "states", "files"),
    [
        ([managed("secure")], [], ["p0"]),
        ([managed("secure", "https://dns.example/q")], [state("off")], ["p0"]),
        ([managed("automatic", "https://dns.example/q")], [], ["p0"]),
        ([managed("automatic")], [], []),  # only where the system's own server does it
        ([managed("off")], [state("secure")], []),
        ([{"HomepageLocation": "x"}, managed("secure")], [], ["p1"]),
        ([{}], [state("secure")], ["s0"]),
        ([], [state("secure", "https://dns.example/q")], ["s0"]),
        ([], [state("automatic", "https://dns.example/q")], ["s0"]),
        ([], [state("automatic")], []),
        ([], [state("off"), state("secure")], ["s1"]),
        ([], [{"browser": {}}], []),
        ([managed(3)], [state({})], []),
    ],
)
def test_browsers_of_chromium(
    policies: list[dict[str, object]], states: list[dict[str, object]], files: list[str]
) -> None:
    by_file = [{f"p{at}": json.dumps(one) for at, one in enumerate(policies)}]
    by_file += [{f"s{at}": json.dumps(one) for at, one in enumerate(states)}]
    found = list(advice.of_chromium("Edge", *by_file))
    assert [one.sentence for one in found] == [
        f"Edge asks a server over HTTPS for names ({file}), which knows none of the cluster's" for file in files
    ]
    for one, file in zip(found, files, strict=True):
        assert one.id == "chromium" and ("that file" in (one.remedy or "")) == file.startswith("p")


BROKEN = ["", "{", "[]", "null", '"x"', "[" * 100_000, '{"policies": []}', '{"dns_over_https": 3}', "\0", "é"]


@pytest.mark.parametrize("text", BROKEN, ids=range(len(BROKEN)))
def test_broken_files_of_browsers(text: str) -> None:
    assert not list(advice.of_firefox(text, {"x": text}, CORP))
    assert not list(advice.of_chromium("Chrome", {"p": text}, {"s": text}))


LINKS = "Global: no\nLink 2 (eth0): no\nLink 5 (tun0): {}\nLink 6 (tpvpn0): no\n"


@pytest.mark.parametrize(
    ("settings", "links", "device"),
    [
        ("[Resolve]\nDNSSEC=yes\n", "", ""),
        ("[Resolve]\nDNSSEC = true\n", "", ""),
        ("[Resolve]\nDNSSEC=no\n[Resolve]\nDNSSEC=yes\n", "", ""),
        ("[Resolve]\nDNSSEC=yes\n", LINKS.format("yes"), ""),  # once
        ("", LINKS.format("yes"), "tun0"),
        ("[Resolve]\nDNSSEC=yes\n[Resolve]\nDNSSEC=no\n", "", None),
        ("[Resolve]\n#DNSSEC=yes\nDNSSEC=allow-downgrade\n", LINKS.format("allow-downgrade"), None),
        (
            "[Resolve]\nDNSSEC\n",
            "Failed to get global data: Unit dbus-org.freedesktop.resolve1.service not found.",
            None,
        ),
        ("", "", None),
    ],
)
def test_dnssec(settings: str, links: str, device: str | None) -> None:
    found = list(advice.of_dnssec(settings, links))
    if device is None:
        assert not found
    elif device:
        assert only(found).remedy == f"resolvectl dnssec {device} allow-downgrade" and device in found[0].sentence
    else:
        assert "`DNSSEC=allow-downgrade`" in (only(found).remedy or "")


def test_the_first_server() -> None:
    assert advice.first_server("# x\nsearch a\nnameserver\nnameserver 192.0.2.1\nnameserver 192.0.2.2") == "192.0.2.1"
    assert advice.first_server("") == "127.0.0.1"


@pytest.mark.parametrize(
    ("first", "mode", "below", "is_found"),
    [
        ("192.0.2.10", "file", False, True),
        ("127.0.0.53", "resolved and file", False, True),
        (OURS, "file", False, False),
        ("246.9.9.9", "file", True, False),  # another session's, which asks ours
        ("127.0.0.53", "resolved", False, False),
        ("192.0.2.10", "off", False, False),
    ],
)
def test_whom_resolv_conf_names_first(first: str, mode: str, below: bool, is_found: bool) -> None:
    now = f"nameserver {first}\nnameserver {OURS}\n"
    found = list(advice.of_resolv_conf(now, [OURS, "fd24::1"], mode, below=below))
    assert bool(found) is is_found
    if is_found:
        assert first in only(found).sentence and f"`nameserver {OURS}`" in (found[0].remedy or "")


LONG = " ".join(f"{letter * 50}.example" for letter in "abcde")


@pytest.mark.parametrize(
    ("now", "before", "word"),
    [
        ("search default.svc.cluster.local", "search corp.example a.example", "corp.example and a.example"),
        ("search corp.example x", "search a\nsearch corp.example a.example", "`search corp.example x a.example`"),
        ("search x", "domain corp.example", "`search x corp.example`"),
        ("", "search corp.example", "`search corp.example`"),
        ("search a b c d e f g h", "", "take 6 and leave out g and h"),
        (f"search {LONG} f", "", "take 4 and leave out eee"),
        ("search a b c d e f", "search f", None),
        ("search corp.example default.svc.cluster.local", "search corp.example", None),
        ("search old\nsearch corp.example x", "search corp.example", None),
        ("", "", None),
        ("search", "search", None),
    ],
)
def test_search_domains(now: str, before: str, word: str | None) -> None:
    found = list(advice.of_search(now, before))
    if word is None:
        assert not found
    else:
        assert word in f"{only(found).sentence} {found[0].remedy}" and found[0].id == "search"


NAME = "kubernetes.default.svc.cluster.local"


@pytest.mark.parametrize(
    ("answer", "where"),
    [
        (None, "nobody answers at 246.1.2.3"),
        ("NXDOMAIN", "lost in the cluster, whose resolver knows no such name"),
        ("no address", "lost in the cluster, whose resolver knows no such name"),
        ("SERVFAIL", "between the session and the cluster's resolver: SERVFAIL"),
        ("REFUSED", "between the session and the cluster's resolver: REFUSED"),
    ],
)
def test_a_name_is_lost_at_the_session(answer: str | None, where: str) -> None:
    found = only(advice.of_stub(NAME, OURS, answer, ""))
    assert found.id == "stub" and where in found.sentence and NAME in found.sentence


def test_a_name_is_lost_on_its_way_to_the_session() -> None:
    assert not list(advice.of_stub(NAME, OURS, "NOERROR", ""))
    assert not list(advice.of_server(NAME, OURS, "NOERROR", "file", ""))
    for answer, mode in (("NXDOMAIN", "resolved"), (None, "resolved and file"), ("REFUSED", "file")):
        found = only(advice.of_server(NAME, "127.0.0.53", answer, mode, ""))
        assert found.id == "server" and "127.0.0.53" in found.sentence and (answer or "not answer") in found.sentence
        assert ("resolvectl" in (found.remedy or "")) == ("resolved" in mode)
    assert not list(advice.of_programs(NAME, ["10.130.0.1"], "off", "x", ""))
    assert "getent -s dns" in (only(advice.of_programs(NAME, [], "file", "x", "")).remedy or "")
    off = only(advice.of_programs(NAME, [], "off", "it was asked for", " --name two"))
    assert off.sentence.endswith(": it was asked for") and "--dns auto`; `tpvpn status --name two`" in (
        off.remedy or ""
    )


def test_what_the_session_knows() -> None:
    found = list(advice.of_session(["a fight.", "no rights"], [OURS], "", ""))
    assert [one.sentence for one in found] == ["a fight", "no rights"]
    assert "port 53 is taken" in only(advice.of_session([], [], "port 53 is taken", "")).sentence
    assert not list(advice.of_session([], [OURS], "it works", ""))


def test_what_is_well_is_said_of_every_check() -> None:
    assert all(Check(one, sentence).ok for one, sentence in advice.WELL.items())
    assert Check("stub", "x").as_json() == {"id": "stub", "state": "ok", "ok": True, "sentence": "x", "remedy": None}


WORDS = st.sampled_from(
    ["hosts:", "files", "dns", "resolve", "mdns4_minimal", "[NOTFOUND=return]", "[!UNAVAIL=return]", "[", "]", "#",
     "\n", "search", "nameserver", "local", "DNSSEC=yes", "Link 2 (x): yes"]
)  # fmt: skip


@given(st.lists(WORDS | st.text(max_size=4), max_size=14).map(" ".join))
def test_any_text_is_read(text: str) -> None:
    list(advice.of_nsswitch(text))
    for found in [*advice.of_mdns(text, CLUSTER, "file"), *advice.of_nss_resolve(text, "file", resolved=True)]:
        assert written(found)
    list(advice.of_dnssec(text, text))
    list(advice.of_search(text, text))
    list(advice.of_resolv_conf(text, [OURS], "file", below=False))
    list(advice.of_firefox(text, {"x": text}, CLUSTER))
