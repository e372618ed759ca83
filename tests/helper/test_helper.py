"""The root helper as a real process in a real network namespace: what it does, what it refuses, what it leaves."""

import asyncio
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tpvpn import rundir
from tpvpn.errors import PrivilegeError, TpvpnError, UsageError
from tpvpn.helper import protocol
from tpvpn.helper.client import COMMAND, Claimed, HelperClient, start_helper
from tpvpn.helper.kernel import TABLES
from tpvpn.helper.protocol import RequestError
from tpvpn.route.fib import Nexthop, Route, Rule
from tpvpn.route.netlink import ask, read_view
from tpvpn.route.operations import Operation
from tpvpn.route.prefix import Prefix

CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), "namespace")


def sh(script: str) -> str:
    return subprocess.run(["sh", "-ec", script], check=True, stdout=subprocess.PIPE, text=True).stdout


def network() -> str:
    """Everything of the network that a session could leave something in."""
    return sh("ip rule; ip -6 rule; ip route show table all; ip -6 route show table all; ip link; nft list ruleset")


def alive(pid: int) -> bool:
    """Whether a process runs; a dead one whose parent never asks counts as dead."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def eventually(condition: Callable[[], bool], seconds: float) -> None:
    """Wait for a condition, which must hold before the deadline."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.01)


@pytest.fixture
def laptop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """In a new network namespace with a rule and routes of a VPN; gives TPVPN_RUN_DIR."""
    monkeypatch.setenv("TPVPN_RUN_DIR", str(tmp_path / "run"))
    monkeypatch.delenv("SUDO_UID", raising=False)
    home = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    _checked(_libc.unshare(CLONE_NEWNET))
    try:
        sh(
            "ip link set lo up; ip addr add 192.0.2.1/24 dev lo; ip route add 10.0.0.0/8 dev lo;"
            "ip rule add pref 5000 not fwmark 0xca6c lookup 51820; ip route add default dev lo table 51820"
        )
        yield tmp_path / "run"
    finally:
        _checked(_libc.setns(home, CLONE_NEWNET))
        os.close(home)


ADDRESSES = ("246.0.0.9", "fd00:246::9")


def route(text: str, claimed: Claimed, **other) -> Route:
    fields = {"prefix": Prefix.parse(text), "table": claimed.table, "protocol": 116}
    return Route(**fields | {"nexthops": (Nexthop(claimed.device),)} | other)


def throw(text: str, claimed: Claimed) -> Route:
    return route(text, claimed, kind="throw", nexthops=())


def rule(claimed: Claimed, version: int = 4, preference: int = 4000, **other) -> Rule:
    return Rule(**{"version": version, "preference": preference, "table": claimed.table, "protocol": 116} | other)


def session(claimed: Claimed) -> list[Operation]:
    targets = [
        route("10.130.0.0/16", claimed),
        throw("10.130.9.9/32", claimed),
        route("fd00:130::/64", claimed, metric=1024),
        rule(claimed),
        rule(claimed, 6),
        rule(claimed, preference=4001, source=Prefix.parse("10.0.0.0/8"), uids=(0, 5), mark=1, mark_mask=3, iif="lo"),
    ]
    return [Operation("add", target) for target in targets]


async def opened(client: HelperClient, name: str = "default") -> Claimed:
    claimed = await client.claim(name)
    tun, addresses = await client.open_tun(mtu=1400, addresses=ADDRESSES, offload=True, txqueuelen=500)
    assert addresses == ADDRESSES
    client.tun = tun  # type: ignore[attr-defined]
    return claimed


async def way(address: str) -> str | None:
    """The device by which the kernel would send a packet to the address."""
    (route,) = await ask([Prefix.host(address)])
    return route.device if route is not None else None


async def ended(client: HelperClient) -> None:
    await client.close()
    if hasattr(client, "tun"):
        client.tun.close()


def helper_of(client: HelperClient) -> int:
    """The helper's pid: whoever has the other end of our socketpair."""
    inode = os.fstat(client._connection.fileno()).st_ino
    for line in sh("ss -xpHn").splitlines():
        if f" {inode} " in line.split("users:")[0] and "pid=" in line:
            pids = {int(part.partition(",")[0]) for part in line.split("pid=")[1:]}
            if pids - {os.getpid()}:
                return min(pids - {os.getpid()})
    raise AssertionError("no helper")


def test_a_session_from_claim_to_close_leaves_the_network_as_it_was(laptop: Path) -> None:
    before = network()

    async def main() -> None:
        client = await start_helper()
        claimed = await opened(client)
        assert claimed == Claimed("tpvpn0", TABLES[0], rundir.directory("default"))
        await client.guard()
        operations = session(claimed)
        await client.apply(operations)
        await client.apply(operations)  # harmless
        view = await read_view()
        present = {*view.rules, *view.routes}
        assert {operation.target for operation in operations} <= present
        link = json.loads(sh("ip -j link show tpvpn0"))[0]
        assert link["mtu"] == 1400 and link["txqlen"] == 500 and "UP" in link["flags"]
        assert "fe80" not in sh("ip -6 addr show dev tpvpn0")
        assert "tpvpn-tpvpn0" in sh("nft list tables")
        assert [await way(address) for address in ("10.130.0.1", "10.130.9.9", "fd00:130::1")] == [
            "tpvpn0",
            "lo",
            "tpvpn0",
        ]
        assert rundir.sessions() == [rundir.Session("default", os.getpid(), 0, "tpvpn0", TABLES[0], rundir.boot_id())]
        assert os.stat(claimed.directory / "control").st_mode & 0o777 == 0o700

        await client.apply(undone(operations[:2]))
        assert not {operation.target for operation in operations[:2]} & set((await read_view()).routes)
        await client.apply(undone(operations))  # what is gone already is no error
        await client.apply(operations)
        await ended(client)
        assert client.closed.done()

    asyncio.run(main())
    assert network() == before
    assert rundir.names() == [] and not rundir.namespace().exists()


def undone(operations: list[Operation]) -> list[Operation]:
    return [operation.inverse() for operation in reversed(operations)]


def test_many_operations_in_one_call(laptop: Path) -> None:
    before = network()

    async def main() -> None:
        client = await start_helper()
        claimed = await opened(client)
        operations = [Operation("add", throw(f"10.{i >> 8}.{i & 255}.0/24", claimed)) for i in range(1024)]
        await client.apply(operations)
        assert sum(found.table == claimed.table for found in (await read_view()).routes) == 1024
        await client.apply(undone(operations))
        assert sum(found.table == claimed.table for found in (await read_view()).routes) == 0
        await client.apply(operations)
        await ended(client)

    asyncio.run(main())
    assert network() == before


USER = """
import asyncio, sys
sys.path[:0] = sys.argv[1:]
from test_helper import opened, session
from tpvpn.helper.client import start_helper
async def main():
    client = await start_helper()
    claimed = await opened(client)
    await client.guard()
    await client.apply(session(claimed))
    from test_helper import helper_of
    print(helper_of(client), flush=True)
    await client.closed
asyncio.run(main())
"""


def user_process() -> tuple[subprocess.Popen, int]:
    """A user's process with a whole session, and its helper's pid."""
    argv = [sys.executable, "-c", USER, os.path.dirname(__file__)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    return process, int(process.stdout.readline())


def kill(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()
    process.stdout.close()


def test_sigkill_of_the_users_process_undoes_everything_within_a_second(laptop: Path) -> None:
    before = network()
    process, helper = user_process()
    assert network() != before
    kill(process)
    start = time.monotonic()
    eventually(lambda: network() == before and rundir.names() == [], 1)
    eventually(lambda: not alive(helper), 1)
    assert time.monotonic() - start < 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGABRT])
def test_the_helper_outlives_signals_that_end_a_session(laptop: Path, number: int) -> None:
    before = network()
    process, helper = user_process()
    try:
        assert os.getsid(helper) != os.getsid(process.pid)
        os.kill(helper, number)
        assert process.poll() is None and alive(helper)
    finally:
        kill(process)
    eventually(lambda: network() == before, 1)


def test_sigkill_of_the_helper_is_noticed_at_once_and_the_next_claim_repairs(laptop: Path) -> None:
    before = network()

    async def main() -> None:
        client = await start_helper()
        claimed = await opened(client)
        await client.apply(session(claimed))
        os.kill(helper_of(client), signal.SIGKILL)
        await asyncio.wait_for(client.closed, 1)
        with pytest.raises(TpvpnError, match="helper ended"):
            await client.guard()
        client.tun.close()
        assert str(claimed.table) in sh("ip rule")

        client = await start_helper()
        await client.claim("other")
        left = network()
        await client.close()
        assert left == before

    asyncio.run(main())
    assert network() == before and rundir.names() == []


def test_sigkill_of_both_leaves_nothing_that_routes_and_the_next_claim_repairs(laptop: Path) -> None:
    before = network()
    process, helper = user_process()
    os.kill(helper, signal.SIGKILL)
    kill(process)
    eventually(lambda: "tpvpn0" not in sh("ip link"), 1)
    assert asyncio.run(way("10.130.0.1")) == "lo"
    # Even where the journal is lost, what carries our protocol in our tables is ours.
    sh(f"rm -r {rundir.base()}")

    async def main() -> None:
        client = await start_helper()
        claimed = await client.claim("default")
        assert network() == before
        assert claimed.table == TABLES[0]
        await client.close()

    asyncio.run(main())


def test_sessions_side_by_side(laptop: Path) -> None:
    before = network()

    async def main() -> None:
        first, second = await start_helper(), await start_helper()
        one, two = await opened(first), await second.claim("two")
        assert (two.device, two.table) == ("tpvpn-two", TABLES[1])
        with pytest.raises(UsageError, match=rf"'default' \(process {os.getpid()}\).*tpvpn quit"):
            await (third := await start_helper()).claim("default")
        await third.close()
        assert [found.name for found in rundir.sessions()] == ["default", "two"]
        await first.apply(session(one))
        await second.close()
        assert str(one.table) in sh("ip rule")
        assert [found.name for found in rundir.sessions()] == ["default"]
        await ended(first)

    asyncio.run(main())
    assert network() == before


def test_a_session_with_its_state_elsewhere_is_left_alone(laptop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = network()

    async def main() -> None:
        first = await start_helper()
        await first.apply(session(await opened(first)))
        during = network()
        monkeypatch.setenv("TPVPN_RUN_DIR", f"{laptop}-elsewhere")
        second = await start_helper()
        claimed = await second.claim("two")
        assert claimed.table == TABLES[1]
        await second.close()
        assert network() == during
        await ended(first)

    asyncio.run(main())
    assert network() == before


def test_a_foreign_table_is_never_chosen(laptop: Path) -> None:
    sh(f"ip route add 10.9.0.0/16 dev lo table {TABLES[0]}; ip rule add pref 9 lookup {TABLES[1]}")
    before = network()

    async def main() -> None:
        client = await start_helper()
        claimed = await client.claim("default")
        assert claimed.table == TABLES[2]
        await client.close()

    asyncio.run(main())
    assert network() == before


REFUSED = {
    "the main table": lambda mine: route("10.130.0.0/16", mine, table=254),
    "another session's table": lambda mine: route("10.130.0.0/16", mine, table=mine.table + 1),
    "another protocol": lambda mine: route("10.130.0.0/16", mine, protocol=4),
    "another device": lambda mine: route("10.130.0.0/16", mine, nexthops=(Nexthop("lo"),)),
    "a gateway": lambda mine: route("10.130.0.0/16", mine, nexthops=(Nexthop(mine.device, "192.0.2.9"),)),
    "multipath": lambda mine: route("10.130.0.0/16", mine, nexthops=(Nexthop(mine.device), Nexthop(mine.device))),
    "no device": lambda mine: route("10.130.0.0/16", mine, nexthops=()),
    "a throw route with a device": lambda mine: route("10.130.0.0/16", mine, kind="throw"),
    "blackhole": lambda mine: route("10.130.0.0/16", mine, kind="blackhole", nexthops=()),
    "local": lambda mine: route("10.130.0.0/16", mine, kind="local"),
    "the default route": lambda mine: route("0.0.0.0/0", mine),
    "half of everything": lambda mine: route("0.0.0.0/1", mine),
    "IPv6's default route": lambda mine: route("::/0", mine),
    "loopback": lambda mine: route("127.0.0.0/8", mine),
    "a piece of loopback": lambda mine: route("127.0.0.53/32", mine),
    "IPv6 loopback": lambda mine: route("::1/128", mine),
    "multicast": lambda mine: route("224.0.0.0/4", mine),
    "IPv6 multicast": lambda mine: route("ff00::/8", mine),
    "a rule to main": lambda mine: rule(mine, table=254),
    "a rule of another protocol": lambda mine: rule(mine, protocol=0),
    "a rule that drops": lambda mine: rule(mine, action="blackhole"),
    "a rule that jumps": lambda mine: rule(mine, action="goto", goto=32766),
}


@pytest.mark.parametrize("verb", ["add", "remove"])
def test_what_is_not_ours_is_refused_and_nothing_done(laptop: Path, verb: str) -> None:
    async def main() -> None:
        client = await start_helper()
        claimed = await opened(client)
        before = network()
        harmless = Operation("add", rule(claimed))
        for what, target in REFUSED.items():
            with pytest.raises(RequestError):
                await client.apply([harmless, Operation(verb, target(claimed))])  # type: ignore[arg-type]
            assert network() == before, what
        await ended(client)

    asyncio.run(main())


def test_a_failing_operation_is_named(laptop: Path) -> None:
    before = network()

    async def main() -> None:
        client = await start_helper()
        claimed = await client.claim("default")
        with pytest.raises(
            TpvpnError, match=r"cannot add route 10.130.0.0/16 dev tpvpn0 table \d+: there is no device"
        ):
            await client.apply([Operation("add", rule(claimed)), Operation("add", route("10.130.0.0/16", claimed))])
        await client.close()

    asyncio.run(main())
    assert network() == before


GARBAGE = [
    b"{",
    b"null",
    b"[]",
    b"{}",
    b"\xff\xfe",
    b"[" * 60_000,
    b'{"request": "reboot"}',
    b'{"request": ["claim"]}',
    b'{"request": "claim"}',
    b'{"request": "claim", "name": 7}',
    b'{"request": "claim", "name": "../../etc"}',
    b'{"request": "claim", "name": ""}',
    b'{"request": "claim", "name": "x", "uid": 0}',
    b'{"request": "guard"}',
    b'{"request": "apply", "operations": []}',
    b'{"request": "apply", "operations": [{}]}',
    b'{"request": "apply", "operations": {"a": 1}}',
    b'{"request": "apply", "operations": [{"verb": "add", "rule": {"version": 4, "preference": 1e9}}]}',
    b'{"request": "apply", "operations": [{"verb": "add", "route": {"prefix": "10.0.0.1/8"}}]}',
    b'{"request": "look", "prefixes": []}',
    b'{"request": "look", "prefixes": "10.0.0.0/8"}',
    b'{"request": "look", "prefixes": [' + b'"10.0.0.0/8",' * 256 + b'"10.0.0.0/8"]}',
    b'{"request": "watch"}',
    b'{"request": "watch", "group": 3}',
    b'{"request": "reset", "withdrawn": [], "routed": []}',
    b'{"request": "reset", "withdrawn": []}',
    b'{"request": "reset", "withdrawn": [7], "routed": []}',
    b'{"request": "cleanup", "name": "default"}',
    b'{"request": "open_dns"}',
    b'{"request": "open_dns", "port": 80}',
    b'{"request": "set_resolved", "search": [], "domains": []}',
    b'{"request": "announce", "suffixes": ["a b"]}',
    b'{"request": "set_resolved", "search": [], "domains": [], "device": "lo"}',
    b'{"request": "set_resolved", "domains": []}',
    b'{"request": "set_resolved", "search": [], "domains": [' + b'"a.example",' * 500 + b'"a.example"]}',
    b'{"request": "take_file", "search": []}',
    b'{"request": "take_file", "search": [], "path": "/etc/passwd"}',
    b'{"request": "take_file", "search": ["a\\nnameserver 6.6.6.6"]}',
    b'{"request": "take_file", "search": {"a": "b"}}',
    b'{"request": "take_file"}',
    b'{"request": "open_tun", "mtu": 99999999, "addresses": [], "offload": true, "txqueuelen": 1}',
    b'{"request": "open_tun", "mtu": 1400, "addresses": ["127.0.0.1"], "offload": true, "txqueuelen": 1}',
    b"x" * 70_000,
]


def test_garbage_gets_an_error_and_the_helper_lives_on(laptop: Path) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with theirs:
            subprocess.run(COMMAND, stdin=theirs, check=True)
        ours.settimeout(5)
        for request in GARBAGE:
            ours.send(request)
            with pytest.raises(TpvpnError):
                protocol.parse_reply(ours.recv(protocol.MESSAGE_LIMIT))
        ours.send(b'{"request": "claim", "name": "x"}')
        assert protocol.parse_reply(ours.recv(protocol.MESSAGE_LIMIT))["device"] == "tpvpn-x"
        ours.send(b'{"request": "claim", "name": "y"}')
        with pytest.raises(RequestError, match="already"):
            protocol.parse_reply(ours.recv(protocol.MESSAGE_LIMIT))
    eventually(lambda: rundir.names() == [], 1)


def test_a_device_in_use(laptop: Path) -> None:
    sh("ip tuntap add tpvpn0 mode tun multi_queue")

    async def main() -> None:
        client = await start_helper()
        with pytest.raises(UsageError, match="tpvpn0 is in use"):
            await opened(client)
        await client.close()

    asyncio.run(main())
    assert "tpvpn0" in sh("ip link")


def test_ipv6_switched_off(laptop: Path) -> None:
    sh("sysctl -qw net.ipv6.conf.all.disable_ipv6=1 net.ipv6.conf.default.disable_ipv6=1")
    before = network()

    async def main() -> None:
        client = await start_helper()
        claimed = await client.claim("default")
        tun, addresses = await client.open_tun(mtu=1400, addresses=ADDRESSES, offload=False, txqueuelen=500)
        assert addresses == ADDRESSES[:1]
        await client.guard()
        await client.apply([Operation("add", route("10.130.0.0/16", claimed)), Operation("add", rule(claimed))])
        assert await way("10.130.0.1") == "tpvpn0"
        tun.close()
        await client.close()

    asyncio.run(main())
    assert network() == before


def test_root_without_the_right(laptop: Path) -> None:
    """A container's root: no CAP_NET_ADMIN."""
    script = USER.replace("await client.closed", "")
    argv = ["setpriv", "--bounding-set=-net_admin", sys.executable, "-c", script, os.path.dirname(__file__)]
    done = subprocess.run(argv, stderr=subprocess.PIPE, text=True)
    assert done.stderr.splitlines()[-1].startswith("tpvpn.errors.PrivilegeError: opening a TUN device needs")
    eventually(lambda: rundir.names() == [], 1)


def test_a_state_directory_that_cannot_be_written(laptop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TPVPN_RUN_DIR", "/proc/tpvpn")

    async def main() -> None:
        client = await start_helper()
        with pytest.raises(PrivilegeError, match="TPVPN_RUN_DIR"):
            await client.claim("default")
        await client.close()

    asyncio.run(main())


@pytest.mark.parametrize("name", ["", "..", "a/b", "A", "-a", "twelveletter", "a b", "ä"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(UsageError):
        rundir.directory(name)


def test_device_names() -> None:
    assert rundir.device_name("default") == "tpvpn0"
    assert rundir.device_name("staging-eu1") == "tpvpn-staging-e"


def test_the_helper_is_small_and_starts_fast(laptop: Path) -> None:
    async def main() -> None:
        start = time.monotonic()
        client = await start_helper()
        await client.claim("default")
        seconds = time.monotonic() - start
        status = Path(f"/proc/{helper_of(client)}/status").read_text()
        kibibytes = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
        await client.close()
        print(f"claimed after {seconds:.3f} s, {kibibytes} KiB")
        assert kibibytes < 32 * 1024
        assert seconds < 1.5

    asyncio.run(main())
