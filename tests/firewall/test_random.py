"""Rulesets thrown together by chance: what is said of them is what the kernel does.

All their conditions are such that the answer is known for every packet, so nothing may be left in doubt.
"""

import random
import re
from collections.abc import Iterator

import pytest
from oracle import DEVICE, OWN, SUBNETS, Laptop, agrees, laptop

from tpvpn.firewall.obstacles import obstacles

ROUNDS = 40

NFT_CONDITIONS = """
oifname "tpvpn0" | oifname != "tpvpn0" | oifname "tp*" | oifname { "lo", "tun*" } | iifname "tpvpn0"
iifname != "lo" | oif "lo" | oif != "lo" | oif "tpvpn0" | iif "tpvpn0" | iif { "lo", "tpvpn0" } | oifgroup 0
iifgroup 0 | oifgroup != 1-5 | meta oifkind "tun" | meta iifkind != "veth" | meta oiftype 65534 | meta mark 0
meta mark != 0x1 | meta mark & 0xff == 0x10 | meta mark { 0x10, 0x20-0x30 } | meta mark > 0xf
meta mark and 0x20 != 0 | ct mark 0 | ct mark != 7 | meta l4proto tcp | meta l4proto { udp, icmp }
meta l4proto != { udp, 50-60 } | ip protocol tcp | ip6 nexthdr tcp | meta nfproto ipv4 | meta nfproto ipv6
meta protocol ip6 | ip version 4 | ip frag-off & 0x1fff == 0 | meta pkttype host | ip daddr 10.128.0.0/9
ip daddr != 10.130.0.0/16 | ip daddr { 10.130.0.0/15, 192.168.0.0/16 } | ip daddr >= 10.131.0.0 | ip saddr 246.0.0.2
ip saddr != { 246.0.0.2, 10.0.0.1 } | ip6 daddr fd00:130::/64 | ip6 saddr fd00::/16 | ip saddr @lan
ip daddr . meta l4proto { 246.0.0.2 . tcp, 10.0.0.1 . udp } | meta l4proto . oifname { tcp . "tpvpn0" }
ip daddr @lan | ip6 daddr != @six | ip saddr 246.0.0.2 ip daddr 10.128.0.0/9 | ct state new
ct state established,related | ct state { new, untracked } | ct state != invalid | ct state ! established
ct direction original | ct l3proto ipv4 | fib daddr type local | fib saddr type { unicast, local }
fib daddr type != unicast | counter | counter log
"""
NFT_VERDICTS = """
accept | drop | return | continue | jump NEXT | goto NEXT | jump NEXT | meta mark set 0x10 | meta mark set 0x0
notrack | meta mark set meta mark or 0x20 | meta mark set meta mark & 0xf0 ^ 0x1 | meta mark set ct mark
counter comment "x" | ct state vmap { new : jump NEXT, established : goto NEXT, invalid : drop }
ct state vmap { 0x1-0x3 : drop, 8 : return } | oifname vmap { "tpvpn0" : jump NEXT, "tq*" : drop }
iifname vmap { "lo" : drop, "tpvpn0" : goto NEXT } | meta l4proto vmap { udp : drop, tcp : accept }
meta nfproto vmap { ipv4 : jump NEXT, ipv6 : continue }
ip daddr vmap { 10.130.0.0/16 : jump NEXT, 10.132.0.0/14 : drop, 246.0.0.0/12 : accept }
meta mark vmap { 0 : continue } | meta mark vmap { 0x10 : drop, * : jump NEXT }
"""
SETS = """
set lan { type ipv4_addr; flags interval; elements = { 10.132.0.0-10.140.0.0, 10.0.0.0/9, 246.0.0.1-246.0.0.2 }; }
set six { type ipv6_addr; flags interval; elements = { fd00:130::/48, fd74::/16 }; }
"""
CHAINS = 5

IPTABLES_CONDITIONS = """
-o tpvpn0 | ! -o wg0 | -o tp+ | ! -i lo | -i tpvpn0 | -d 10.128.0.0/9 | ! -d 10.130.0.0/16 | -s 246.0.0.2/32
! -s 10.0.0.0/8 | -p tcp | ! -p tcp | -p udp | ! -f | -m mark --mark 0x10/0xff | -m mark ! --mark 0x0
-m mark --mark 0 | -m conntrack --ctstate NEW | -m conntrack ! --ctstate NEW,INVALID
-m conntrack --ctstate RELATED,ESTABLISHED | -m state --state NEW,UNTRACKED | -m connmark --mark 0x0
-m connmark ! --mark 0x7/0xf | -m addrtype --dst-type LOCAL | -m addrtype ! --dst-type LOCAL
-m addrtype --src-type UNICAST,LOCAL | -m comment --comment word
"""
IPTABLES_TARGETS = """
-j ACCEPT | -j DROP | -j RETURN | -j NEXT | -g NEXT | -j NEXT |  | -j LOG | -j MARK --set-mark 0x10
-j MARK --or-mark 0x1 | -j MARK --set-xmark 0x20/0xf0 | -j CONNMARK --restore-mark
"""


BUILT_IN = {
    "raw": ("PREROUTING", "OUTPUT"),
    "mangle": ("PREROUTING", "INPUT", "OUTPUT", "POSTROUTING"),
    "filter": ("INPUT", "OUTPUT"),
}
EMPTY = "".join(
    f"*{table}\n{''.join(f':{hook} ACCEPT [0:0]{chr(10)}' for hook in hooks)}COMMIT\n"
    for table, hooks in BUILT_IN.items()
)


def words(text: str) -> list[str]:
    return [word.strip() for line in text.strip().splitlines() for word in line.split("|")]


@pytest.fixture(scope="module")
def host() -> Iterator[Laptop]:
    with laptop() as made:
        yield made


def rule(chance: random.Random, number: int, conditions: list[str], verdicts: list[str]) -> str:
    """A rule of a chain; those after it are called c1, c2 and so on."""
    asked = chance.sample(conditions, chance.choice((0, 1, 1, 1, 2, 2, 3)))
    following = [verdict for verdict in verdicts if "NEXT" not in verdict or number < CHAINS]
    verdict = chance.choice(following).replace(
        "NEXT", f"c{chance.randint(number + 1, CHAINS)}" if number < CHAINS else ""
    )
    made = " ".join((*asked, verdict)).strip()
    four, six = (re.search(rf"\b(ip{six}|ipv{version}) (?!:)|@{name}", f"{made} ") for six, version, name in FAMILIES)
    # nft takes no rule that asks for both versions of IP.
    return rule(chance, number, conditions, verdicts) if four and six else made


FAMILIES = (("", 4, "lan"), ("6", 6, "six"))


def nft_ruleset(chance: random.Random) -> str:
    conditions, verdicts = words(NFT_CONDITIONS), words(NFT_VERDICTS)
    lines = ["table inet chance", "delete table inet chance", "table inet chance {", SETS]
    for number in range(CHAINS, 0, -1):
        lines += [f"chain c{number} {{", *_rules(chance, number, conditions, verdicts), "}"]
    for place, hook in enumerate(("prerouting", "input", "output", "output", "postrouting")):
        priority = chance.choice((-300, -150, 0, 0, 10))
        policy = chance.choice(("accept", "accept", "accept", "drop"))
        lines.append(f"chain base{place} {{ type filter hook {hook} priority {priority + place}; policy {policy};")
        lines += [*_rules(chance, 0, conditions, verdicts), "}"]
    return "\n".join((*lines, "}\n"))


def _rules(chance: random.Random, number: int, conditions: list[str], verdicts: list[str]) -> list[str]:
    return [rule(chance, number, conditions, verdicts) for _ in range(chance.randint(0, 4))]


def iptables_ruleset(chance: random.Random) -> str:
    conditions = words(IPTABLES_CONDITIONS)
    lines: list[str] = []
    for table, hooks in BUILT_IN.items():
        targets = [target for target in words(IPTABLES_TARGETS) if table == "mangle" or "MARK" not in target]
        targets += {"filter": ["-j REJECT"], "raw": ["-j CT --notrack"]}.get(table, [])
        lines.append(f"*{table}")
        lines += [f":{hook} {chance.choice(('ACCEPT', 'ACCEPT', 'DROP'))} [0:0]" for hook in hooks]
        lines += [f":c{number} - [0:0]" for number in range(1, CHAINS + 1)]
        for chain, number in [*((hook, 0) for hook in hooks), *((f"c{n}", n) for n in range(1, CHAINS + 1))]:
            made = _rules(chance, number, conditions, targets)
            lines += [f"-A {chain} {text}" for text in made if takes(chain, text)]
        lines.append("COMMIT")
    return "\n".join((*lines, ""))


def takes(chain: str, text: str) -> bool:
    """Whether iptables does: no option twice, no device of the other direction in a chain of its own."""
    once = all(
        f" {text}".count(option) <= 1 for option in (" -o ", " -i ", " -d ", " -s ", " -p ", "--mark ", "dst-", "cts")
    )
    refused = {"PREROUTING": " -o ", "INPUT": " -o ", "OUTPUT": " -i ", "POSTROUTING": " -i "}
    return once and not (chain in refused and refused[chain] in f" {text}")


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_nftables(host: Laptop, seed: int) -> None:
    rules = nft_ruleset(random.Random(seed))
    try:
        host.install("nft", rules)
        check(host, rules)
    finally:
        host.install("nft", "table inet chance\ndelete table inet chance\n")


@pytest.mark.parametrize("program", ["iptables-nft", "iptables-legacy"])
@pytest.mark.parametrize("seed", range(ROUNDS))
def test_iptables(host: Laptop, program: str, seed: int) -> None:
    rules = iptables_ruleset(random.Random(seed))
    try:
        host.install(program, rules)
        check(host, rules)
    finally:
        host.install(program, EMPTY)


def check(host: Laptop, rules: str) -> None:
    said = obstacles(host.read(), DEVICE, OWN, SUBNETS)
    print(rules, *said, sep="\n")
    assert not any(" may be " in sentence for sentence in said), said
    agrees(host, said)
