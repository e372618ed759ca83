"""What the helper looks at and ends on the user's behalf: IPsec policies, connections, what dead sessions left."""

import asyncio
import contextlib
import errno
import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from test_helper import (
    ADDRESSES,
    ended,
    helper_of,
    kill,
    laptop,
    network,
    opened,
    route,
    rule,
    session,
    sh,
    throw,
    user_process,
)

from tpvpn import privileged, rundir
from tpvpn.helper import protocol
from tpvpn.helper.client import Claimed, start_helper
from tpvpn.helper.kernel import TABLES
from tpvpn.helper.protocol import RequestError
from tpvpn.privileged import Seen
from tpvpn.route.fib import IpsecPolicy
from tpvpn.route.operations import Operation
from tpvpn.route.prefix import Prefix

__all__ = ["laptop"]

SUBNET, OTHER = Prefix.parse("10.130.0.0/16"), Prefix.parse("172.16.0.0/12")
TEMPLATE = "tmpl src 192.0.2.1 dst 192.0.2.2 proto esp mode tunnel"


def encrypt(*destinations: str) -> None:
    sh("".join(f"ip xfrm policy add src 0.0.0.0/0 dst {one} dir out {TEMPLATE};" for one in destinations))


def policy(destination: str) -> IpsecPolicy:
    return IpsecPolicy(Prefix(4, 0, 0), Prefix.parse(destination))


def test_looking(laptop: Path) -> None:
    encrypt("10.130.7.0/24", "10.0.0.0/8", "192.168.0.0/16")

    async def main() -> None:
        client = await start_helper()
        with pytest.raises(RequestError, match="claim"):
            await client.look([SUBNET])
        await opened(client)
        seen = await client.look([SUBNET])
        assert seen.policies == (policy("10.0.0.0/8"), policy("10.130.7.0/24"))
        assert seen.holders == {"tpvpn0": Path("/proc/self/comm").read_text().strip()}
        assert seen.warnings == ()
        assert (await client.look([OTHER])).policies == ()
        assert (await client.look([])) == Seen((), seen.holders, (), ())
        many = [Prefix(4, (172 << 24) + i, 32) for i in range(1000)]
        assert (await client.look([*many, SUBNET])) == seen
        await ended(client)

    asyncio.run(main())


def test_of_very_many_policies_the_broadest_are_told(laptop: Path) -> None:
    encrypt("10.130.0.0/17", *(f"10.130.{i >> 8}.{i & 255}" for i in range(500)))

    async def main() -> None:
        client = await start_helper()
        await client.claim("default")
        seen = await client.look([SUBNET])
        assert len(seen.policies) == 400 and seen.policies[0] == policy("10.130.0.0/17")
        assert seen.warnings == ("only 400 of 501 IPsec policies were looked at: see `ip xfrm policy`",)
        await client.close()

    asyncio.run(main())


def test_whatever_is_seen_fits_a_message() -> None:
    longest = Prefix(6, (1 << 128) - 1, 128)
    seen = Seen(
        (IpsecPolicy(longest, longest),) * 1000,
        {f"device-of-{i:05}": "ä" * 7 + "?" for i in range(1000)},
        ("ä" * 1000, "ä" * 160, "x" * 990) * 300,
        ("a warning that is as long as one is, and names the command that reads it",) * 3,
    )
    reply = protocol.pack_reply(privileged.encode(seen))
    assert len(reply) <= protocol.MESSAGE_LIMIT
    told = privileged.decode(protocol.parse_reply(reply))
    assert len(told.policies) == 400
    assert told.obstacles[:3] == ("ä" * 83 + "…", *seen.obstacles[1:3]) and told.obstacles[10:] == (
        "and 890 more like these",
    )


def test_looking_as_nobody_says_what_was_not_seen(laptop: Path) -> None:
    nobody = "setpriv --reuid=65534 --regid=65534 --clear-groups"
    script = "from tpvpn.privileged import look; print(*look([], 'tpvpn0', []).warnings, sep='\\n')"
    assert sh(f'{nobody} {sys.executable} -c "{script}"').splitlines() == [
        "IPsec policies were not looked at, which needs root: see `sudo ip xfrm policy`",
        "firewalls were not looked at, which needs root: see `sudo nft list ruleset`",
    ]


def test_a_kill_switch_is_told_of(laptop: Path) -> None:
    sh("nft add table inet vpn; nft 'add chain inet vpn out { type filter hook output priority 0; policy drop; }'")

    async def main() -> None:
        client = await start_helper()
        await opened(client)
        await client.guard()
        (obstacle,) = (await client.look([SUBNET])).obstacles
        assert obstacle.startswith("packets to 10.130.0.0/16 are dropped by chain out of nft table inet vpn")
        sh("nft insert rule inet vpn out oifname tpvpn0 accept")
        assert (await client.look([SUBNET])).obstacles == ()
        await ended(client)

    asyncio.run(main())


def test_watching(laptop: Path) -> None:
    async def main() -> None:
        client = await start_helper()
        with pytest.raises(RequestError, match="claim"):
            await client.watch()
        await client.claim("default")
        changes = await client.watch()
        assert changes is not None
        with changes:
            assert (changes.family, changes.proto) == (socket.AF_NETLINK, 6)
            assert not os.get_inheritable(changes.fileno())
            encrypt("10.130.0.0/16")
            assert select.select([changes], [], [], 1)[0]
        await client.close()

    asyncio.run(main())


def connect(source: str, target: str) -> socket.socket:
    connection = socket.socket(type=socket.SOCK_DGRAM)
    connection.bind((source, 0))
    connection.connect((target, 53))
    connection.setblocking(False)
    return connection


def error_of(connection: socket.socket) -> int:
    return connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)


def routes(claimed: Claimed) -> list[Operation]:
    return [Operation("add", target) for target in (route(str(SUBNET), claimed), rule(claimed))]


def test_resetting(laptop: Path) -> None:
    async def main() -> None:
        client = await start_helper()
        with pytest.raises(RequestError, match="claim"):
            await client.reset([SUBNET], [])
        claimed = await opened(client)
        with connect("192.0.2.1", "10.130.0.1") as before, connect("192.0.2.1", "10.9.0.1") as other:
            await client.apply(routes(claimed))
            assert await client.reset([], [SUBNET]) == 1
            assert (error_of(before), error_of(other)) == (errno.ECONNABORTED, 0)
        with connect(ADDRESSES[0], "10.130.0.1") as through, connect("192.0.2.1", "10.9.0.1") as other:
            await client.apply([operation.inverse() for operation in routes(claimed)])
            many = [Prefix(4, (172 << 24) + i, 32) for i in range(1000)]
            assert await client.reset([*many, SUBNET], []) == 1
            assert (error_of(through), error_of(other)) == (errno.ECONNABORTED, 0)
        assert await client.reset([], []) == 0
        await ended(client)

    asyncio.run(main())


REFUSED = ["0.0.0.0/0", "127.0.0.0/8", "127.0.0.1/32", "::/0", "::1/128", "224.0.0.0/4", "0.0.0.0/1"]


def test_connections_that_are_none_of_the_sessions_are_not_reset(laptop: Path) -> None:
    async def main() -> None:
        client = await start_helper()
        claimed = await opened(client)
        await client.apply(routes(claimed))
        with connect("192.0.2.1", "10.9.0.1") as other:
            for text in REFUSED:
                for change in (([Prefix.parse(text)], []), ([], [Prefix.parse(text)])):
                    with pytest.raises(RequestError, match="default route, loopback"):
                        await client.reset(*change)
            assert await client.reset([], [Prefix.parse("10.0.0.0/8")]) == 0
            assert error_of(other) == 0
        await ended(client)

    asyncio.run(main())


def test_the_longest_prefix_decides_what_is_stranded(laptop: Path) -> None:
    """A never-proxy inside a subnet, and inside that an address that is proxied all the same."""

    async def main() -> None:
        client = await start_helper()
        claimed = await opened(client)
        targets = (throw("10.130.9.0/24", claimed), route("10.130.9.9/32", claimed))
        await client.apply([Operation("add", target) for target in targets] + routes(claimed))
        with contextlib.ExitStack() as stack:
            lan, own = (
                [stack.enter_context(connect(source, f"10.130.{host}")) for host in ("0.1", "9.1", "9.9")]
                for source in ("192.0.2.1", ADDRESSES[0])
            )
            assert await client.reset([SUBNET], [SUBNET]) == 3
            assert [error_of(one) for one in lan] == [errno.ECONNABORTED, 0, errno.ECONNABORTED]
            assert [error_of(one) for one in own] == [0, errno.ECONNABORTED, 0]
        await ended(client)

    asyncio.run(main())


@pytest.mark.parametrize("ending", ["close", "kill"])
def test_nobody_waits_for_an_answer_when_the_session_has_ended(laptop: Path, ending: str) -> None:
    async def close() -> None:
        client = await start_helper()
        await client.apply(routes(await opened(client)))
        with connect(ADDRESSES[0], "10.130.0.1") as through, connect("192.0.2.1", "10.9.0.1") as other:
            await ended(client)
            assert (error_of(through), error_of(other)) == (errno.ECONNABORTED, 0)

    if ending == "close":
        asyncio.run(close())
        return
    process, _ = user_process()
    with connect(ADDRESSES[0], "10.130.0.1") as through, connect("192.0.2.1", "10.9.0.1") as other:
        kill(process)
        assert select.select([through], [], [], 1)[0]
        assert (error_of(through), error_of(other)) == (errno.ECONNABORTED, 0)


async def cleaned_up() -> list[str]:
    client = await start_helper()
    try:
        return await client.cleanup()
    finally:
        await client.close()


async def killed(name: str) -> Claimed:
    """A session whose helper and device ended at once."""
    client = await start_helper()
    claimed = await opened(client, name)
    await client.apply(session(claimed))
    os.kill(helper_of(client), signal.SIGKILL)
    await client.closed
    client.tun.close()  # type: ignore[attr-defined]
    return claimed


@pytest.mark.parametrize("journal", ["kept", "lost"])
def test_cleanup_removes_what_the_dead_left_and_nothing_of_the_living(laptop: Path, journal: str) -> None:
    before = network()

    async def main() -> None:
        living = await start_helper()
        await living.apply(session(await opened(living, "living")))
        during = network()
        dead = await killed("dead")
        assert network() != during
        if journal == "lost":
            sh(f"rm -r {dead.directory}")
        removed = await cleaned_up()
        table = dead.table
        objects = [f"IPv4 rule {preference} lookup {table}" for preference in (4000, 4001)]
        objects += [f"IPv6 rule 4000 lookup {table}", f"route throw 10.130.9.9/32 table {table}"]
        assert sorted(removed) == objects + (["session dead"] if journal == "kept" else [])
        assert network() == during and rundir.names() == ["living"]
        assert await cleaned_up() == []
        await ended(living)

    asyncio.run(main())
    assert network() == before


def test_the_answer_to_a_cleanup_fits_a_message(laptop: Path) -> None:
    table = TABLES[3]
    throws = "".join(f"route add throw 10.{i >> 8}.{i & 255}.0/24 table {table} proto 116\n" for i in range(500))
    sh(f"ip -batch - <<END\n{throws}END")

    async def main() -> None:
        removed = await cleaned_up()
        assert len(removed) == 401
        assert removed[0] == f"route throw 10.0.0.0/24 table {table}" and removed[-1] == "100 more"

    asyncio.run(main())
    assert str(table) not in network()


def test_cleaning_up_without_the_right_says_so(laptop: Path) -> None:
    """A container's root: no CAP_NET_ADMIN."""
    sh(f"ip rule add pref 4000 lookup {TABLES[0]} proto 116")
    argv = ["setpriv", "--bounding-set=-net_admin", sys.executable, "-m", "tpvpn", "cleanup"]
    done = subprocess.run(argv, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 5
    assert done.stderr.startswith("tpvpn: changing routes needs CAP_NET_ADMIN")
