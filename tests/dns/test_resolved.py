"""What systemd-resolved itself does of what it is told for our link."""

import json
import os
import signal
import socket
import sys
import textwrap
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from names_server import names_server

from peers import eventually, lab  # noqa: F401
from resolved_lab import FILES, Resolved
from tpvpn.dns.resolved import Links, links
from tpvpn.lab import Lab

DEVICE, OURS, NODE = "tpvpn9", "246.0.0.5", "192.0.2.10"
SEARCH, DOMAINS = ["shop.svc.cluster.local"], ["cluster.local", "svc"]
DEVICE_UP = f"""
ip link add {DEVICE} type veth peer name {DEVICE}p
ip address add {OURS}/32 dev {DEVICE}
ip link set {DEVICE} up
ip link set {DEVICE}p up
"""
SET = """
    import json, sys, time
    from tpvpn.dns import resolved
    began = time.monotonic()
    why = resolved.set_link(*json.loads(sys.argv[1]))
    print(json.dumps([why, time.monotonic() - began]))
"""
FOLLOW = """
    import asyncio, sys
    from tpvpn.dns import resolved

    async def main():
        async for _ in resolved.changes():
            try:
                links = await resolved.look([sys.argv[1]])
                print(f"servers={links.servers}, domains={links.domains}, ours={sorted(links.ours)}", flush=True)
            except resolved.Unusable as why:
                print(why, flush=True)

    asyncio.run(main())
"""

CANCEL = """
    import asyncio, contextlib, os, uvloop
    from tpvpn.dns import resolved

    async def main():
        loop = asyncio.get_running_loop()
        descriptors = os.listdir("/proc/self/fd")
        for number in range(400):
            asking = asyncio.ensure_future(resolved.has_owner("a.name"))
            loop.call_later(number % 40 * 1e-4, asking.cancel)
            with contextlib.suppress(asyncio.CancelledError):
                await asking
        await asyncio.sleep(0.1)
        print(len(os.listdir("/proc/self/fd")) - len(descriptors))

    uvloop.run(main())
"""


@pytest.fixture(scope="module")
def resolved(lab: Lab) -> Iterator[Resolved]:  # noqa: F811
    with Resolved(lab) as resolved:
        resolved.uplink("eth0", NODE)
        resolved.link("stub")
        lab.run("laptop", ["sh", "-ec", DEVICE_UP])
        yield resolved


def python(lab: Lab, code: str, *arguments: str, **environment: str) -> list[str]:  # noqa: F811
    settings = [f"{name}={value}" for name, value in environment.items()]
    return ["env", *settings, sys.executable, "-c", textwrap.dedent(code), *arguments]


def set_link(
    lab: Lab,  # noqa: F811
    search: list[str] = SEARCH,
    domains: list[str] = DOMAINS,
    under: tuple[str, ...] = (),
    **environment: str,
) -> tuple[str | None, float]:
    """Tell resolved, as the helper does; what it said, and after how long."""
    words = json.dumps([DEVICE, [OURS], search, domains])
    said = lab.run("laptop", [*under, *python(lab, SET, words, **environment)]).stdout
    why, took = json.loads(said)
    return why, took


def asked(lab: Lab, name: str) -> str:  # noqa: F811
    """What the laptop's programs find for a name."""
    return lab.run("laptop", ["getent", "ahostsv4", name], check=False).stdout.partition(" ")[0]


def test_the_link_is_set_as_resolvectl_shows_it(lab: Lab, resolved: Resolved) -> None:  # noqa: F811
    why, took = set_link(lab)
    assert why is None
    assert took < 1
    shown = resolved.resolvectl("status", DEVICE)
    assert "-DefaultRoute -LLMNR -mDNS -DNSOverTLS DNSSEC=no/" in shown
    assert f"DNS Servers: {OURS}\n" in shown
    assert "DNS Domain: shop.svc.cluster.local ~cluster.local ~svc\n" in shown


def test_only_names_of_these_domains_reach_our_server(lab: Lab, resolved: Resolved) -> None:  # noqa: F811
    assert set_link(lab)[0] is None
    with names_server(lab.namespace("laptop"), OURS, "203.0.113.1") as ours:
        assert asked(lab, "api.shop.svc.cluster.local") == "203.0.113.1"
        assert asked(lab, "api.shop.svc") == "203.0.113.1"
        assert asked(lab, "www.example.com") == "203.0.113.80", "by the LAN's own resolver"
        assert asked(lab, "api") == "203.0.113.1", "by the search domain"
        assert set(ours.asked) == {"api.shop.svc.cluster.local", "api.shop.svc"}


def test_what_was_found_before_is_forgotten(lab: Lab, resolved: Resolved) -> None:  # noqa: F811
    resolved.resolvectl("revert", DEVICE)
    lab.run("laptop", ["resolvectl", "query", "stale.shop.svc"], check=False)  # the LAN's resolver knows of none
    with names_server(lab.namespace("laptop"), OURS, "203.0.113.1"):
        assert set_link(lab)[0] is None
        assert asked(lab, "stale.shop.svc") == "203.0.113.1"


def test_more_domains_than_it_takes_are_cut(lab: Lab, resolved: Resolved) -> None:  # noqa: F811
    assert set_link(lab, domains=[f"ns{number}" for number in range(2000)])[0] is None
    shown = resolved.resolvectl("domain", DEVICE)
    assert "~ns0 " in shown
    assert shown.count("~") == 255


def test_a_user_s_environment_leads_to_no_other_bus(lab: Lab, resolved: Resolved) -> None:  # noqa: F811
    resolved.resolvectl("revert", DEVICE)
    assert set_link(lab, DBUS_SYSTEM_BUS_ADDRESS="unix:path=/nonexistent")[0] is None
    assert OURS in resolved.resolvectl("dns", DEVICE)


def test_that_of_another_network_namespace_is_not_used(lab: Lab, resolved: Resolved) -> None:  # noqa: F811
    resolved.resolvectl("revert", DEVICE)
    elsewhere = ("unshare", "--net", "sh", "-ec", f'{DEVICE_UP}\nexec "$@"', "elsewhere")
    assert set_link(lab, under=elsewhere)[0] == "systemd-resolved works in another network namespace"
    assert OURS not in resolved.resolvectl("dns")


def test_a_device_that_is_not_there(lab: Lab, resolved: Resolved) -> None:  # noqa: F811
    said = lab.run("laptop", python(lab, SET, json.dumps(["tpvpn8", [OURS], [], []]))).stdout
    assert json.loads(said)[0] == "there is no device tpvpn8"


def test_one_that_hangs_costs_a_second_and_is_named(lab: Lab, resolved: Resolved) -> None:  # noqa: F811
    os.kill(resolved.pid, signal.SIGSTOP)
    try:
        why, took = set_link(lab)
    finally:
        os.kill(resolved.pid, signal.SIGCONT)
    assert why == "systemd-resolved does not answer within 1 s"
    assert took < 1.5


def test_a_bus_that_hangs_costs_a_second_and_is_named(lab: Lab, resolved: Resolved) -> None:  # noqa: F811
    os.kill(resolved.bus_pid, signal.SIGSTOP)
    try:
        why, took = set_link(lab)
    finally:
        os.kill(resolved.bus_pid, signal.SIGCONT)
    assert why == "systemd-resolved does not answer within 1 s"
    assert took < 1.5


def test_one_that_does_not_run_is_not_started(lab: Lab, resolved: Resolved) -> None:  # noqa: F811
    resolved.stop()
    try:
        assert set_link(lab)[0] == "systemd-resolved does not run"
    finally:
        resolved.start()


def test_a_host_without_a_bus(lab: Lab, resolved: Resolved) -> None:  # noqa: F811
    resolved.stop()
    resolved.stop_bus()
    try:
        why, took = set_link(lab)
    finally:
        resolved.start_bus()
        resolved.start()
    assert why is not None
    assert why.startswith("the system's D-Bus cannot be reached (")
    assert took < 0.5


def test_what_it_read_in_our_file_is_forgotten(lab: Lab, resolved: Resolved) -> None:  # noqa: F811
    """Else its own file would name us when the session has ended, and be a link from /etc/resolv.conf again."""
    file = resolved.etc / "resolv.conf"
    file.unlink()
    file.write_text(f"nameserver {OURS}\n")
    lab.run("laptop", ["resolvectl", "query", "example.com"], check=False)
    resolved.uplink("eth0", "192.0.2.11")
    its_own = f"cat {FILES['uplink']}"
    eventually(lambda: OURS in lab.run("laptop", ["sh", "-c", its_own]).stdout, 2, "it took our file for its own")
    file.write_text("# nothing\n")
    lab.run("laptop", python(lab, f"from tpvpn.dns import resolved; resolved.reread('{DEVICE}')"))
    resolved.link("uplink")
    resolved.uplink("eth0", NODE)
    assert OURS not in lab.run("laptop", ["sh", "-c", its_own]).stdout
    assert OURS not in resolved.resolvectl("dns")
    resolved.link("stub")


def test_its_changes_are_told(lab: Lab, resolved: Resolved, tmp_path: Path) -> None:  # noqa: F811
    """What others have, without what is ours; its end, its coming back, and a bus that came back."""
    resolved.restart()
    ours = sorted([*SEARCH, *DOMAINS])
    logged = tmp_path / "changes"
    with logged.open("wb") as log:
        process = lab.popen("laptop", python(lab, FOLLOW, OURS), stdout=log, stderr=log)

    def says(text: str, within: float = 2.0) -> None:
        """The last that it said has this in it."""
        eventually(lambda: text in logged.read_text().removesuffix("\n").rpartition("\n")[2], within, text)

    try:
        says(f"servers=('{NODE}',), domains=(), ours=[]")
        assert set_link(lab)[0] is None
        says(f"servers=('{NODE}',), domains=(), ours={ours}")
        resolved.uplink("eth0", NODE, "192.0.2.11")
        resolved.resolvectl("domain", "eth0", "~corp.example", "~.", "lan")
        says(f"servers=('{NODE}', '192.0.2.11'), domains=('corp.example', 'lan'), ours={ours}")
        resolved.stop()
        says("systemd-resolved does not run")
        resolved.start()
        says("servers=")
        resolved.stop()
        resolved.stop_bus()
        says("D-Bus cannot be reached")
        resolved.start_bus()
        resolved.start()
        says("servers=", 5)
    finally:
        process.kill()
        process.wait()


# -- pure --------------------------------------------------------------------------------------------------------------


def _server(index: int, address: str) -> list[Any]:
    parsed = ip_address(address)
    return [index, socket.AF_INET if parsed.version == 4 else socket.AF_INET6, parsed.packed]


@pytest.mark.parametrize(
    ("servers", "domains", "expected"),
    [
        ([], [], Links((), (), frozenset())),
        (
            [_server(2, "192.0.2.1"), _server(9, OURS), _server(3, "10.0.0.1")],
            [[3, "Corp.Example.", True], [9, "cluster.local", True], [2, "lan", False], [2, ".", True]],
            Links(("192.0.2.1", "10.0.0.1"), ("corp.example", "lan"), frozenset({"cluster.local"})),
        ),
        # Another session's link is nobody's to ask: each would ask the other.
        (
            [_server(8, "246.0.0.6"), _server(8, "fd74:7076:706e::6"), _server(2, "192.0.2.1")],
            [[8, "cluster.local", True]],
            Links(("192.0.2.1",), (), frozenset()),
        ),
        # It took /etc/resolv.conf, which is ours, for its own.
        (
            [_server(0, OURS), _server(2, "192.0.2.1")],
            [[0, "shop.svc.cluster.local", False]],
            Links(("192.0.2.1",), (), frozenset()),
        ),
        ([_server(1, "fe80::1")], [], Links(("fe80::1%lo",), (), frozenset())),
    ],
)
def test_what_it_knows_is_taken_apart(servers: list[Any], domains: list[Any], expected: Links) -> None:
    assert links(servers, domains, [OURS]) == expected


def test_a_question_is_cancelled_at_any_moment(lab: Lab, resolved: Resolved) -> None:  # noqa: F811
    """As a session that ends at once does it: the loop must not be left with a socket that is closed."""
    done = lab.run("laptop", python(lab, CANCEL), check=False)
    assert (done.returncode, done.stdout) == (0, "0\n"), done


def test_a_question_to_a_bus_that_hangs_is_cancelled_too(lab: Lab, resolved: Resolved) -> None:  # noqa: F811
    os.kill(resolved.bus_pid, signal.SIGSTOP)
    try:
        code = CANCEL.replace("range(400)", "range(2)").replace(
            "number % 40 * 1e-4", "0.9"
        )  # and then its time is over
        done = lab.run("laptop", python(lab, code), check=False)
    finally:
        os.kill(resolved.bus_pid, signal.SIGCONT)
    assert (done.returncode, done.stdout) == (0, "0\n"), done
