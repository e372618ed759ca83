"""IPsec policies as `ip xfrm policy` writes them into a real kernel."""

import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from pod import inside, namespace, run
from tpvpn import xfrm
from tpvpn.route.fib import IpsecPolicy
from tpvpn.route.prefix import Prefix

TEMPLATE = "tmpl src 192.0.2.1 dst 192.0.2.2 proto esp mode tunnel"
TEMPLATE6 = "tmpl src fd00::1 dst fd00::2 proto esp mode tunnel"


@pytest.fixture
def laptop() -> Iterator[str]:
    with namespace("xfrm") as name:
        yield name


def add(name: str, policy: str) -> None:
    run("ip", "-n", name, "xfrm", "policy", "add", *policy.split())


def policies(name: str) -> tuple[IpsecPolicy, ...]:
    with inside(name):
        return xfrm.read_policies()


def policy(source: str, destination: str, blocks: bool = False) -> IpsecPolicy:
    return IpsecPolicy(Prefix.parse(source), Prefix.parse(destination), blocks)


SEEN = {
    f"src 192.168.7.0/24 dst 10.0.0.0/8 dir out {TEMPLATE}": policy("192.168.7.0/24", "10.0.0.0/8"),
    f"src 0.0.0.0/0 dst 10.130.0.0/16 dir out {TEMPLATE}": policy("0.0.0.0/0", "10.130.0.0/16"),
    f"src 0.0.0.0/0 dst 0.0.0.0/0 dir out {TEMPLATE}": policy("0.0.0.0/0", "0.0.0.0/0"),
    f"src fd00:7::/64 dst fd00:130::/64 dir out {TEMPLATE6}": policy("fd00:7::/64", "fd00:130::/64"),
    f"src ::/0 dst fd00:130::9/128 dir out {TEMPLATE6}": policy("::/0", "fd00:130::9/128"),
    f"src 0.0.0.0/0 dst 10.1.0.0/16 proto tcp dport 443 dir out {TEMPLATE}": policy("0.0.0.0/0", "10.1.0.0/16"),
    "src 0.0.0.0/0 dst 10.2.0.0/16 dir out action block": policy("0.0.0.0/0", "10.2.0.0/16", True),
    f"src 0.0.0.0/0 dst 10.3.0.9/16 dir out {TEMPLATE}": policy("0.0.0.0/0", "10.3.0.0/16"),
    f"src 0.0.0.0/0 dst 10.4.0.0/16 dir out mark 0 mask 0xff {TEMPLATE}": policy("0.0.0.0/0", "10.4.0.0/16"),
    "src 0.0.0.0/0 dst 10.5.0.0/16 dir out tmpl proto esp mode transport level use": policy("0.0.0.0/0", "10.5.0.0/16"),
}


@pytest.mark.parametrize("text", SEEN)
def test_what_encrypts_or_rejects_is_seen(laptop: str, text: str) -> None:
    add(laptop, text)
    assert policies(laptop) == (SEEN[text],)


UNSEEN = [
    f"src 10.0.0.0/8 dst 192.168.7.0/24 dir in {TEMPLATE}",
    f"src 10.0.0.0/8 dst 192.168.7.0/24 dir fwd {TEMPLATE}",
    "src 192.168.7.0/24 dst 192.168.7.0/24 dir out",
    f"src 0.0.0.0/0 dst 0.0.0.0/0 dir out {TEMPLATE} if_id 7",
    f"src 0.0.0.0/0 dst 0.0.0.0/0 dir out mark 42 {TEMPLATE}",
]


@pytest.mark.parametrize("text", UNSEEN)
def test_what_lets_an_ordinary_packet_alone_is_not(laptop: str, text: str) -> None:
    add(laptop, text)
    assert policies(laptop) == ()


def test_those_that_differ_in_ports_alone_are_one(laptop: str) -> None:
    for port in (80, 443):
        add(laptop, f"src 0.0.0.0/0 dst 10.1.0.0/16 proto tcp dport {port} dir out {TEMPLATE}")
    assert policies(laptop) == (policy("0.0.0.0/0", "10.1.0.0/16"),)


def test_a_sockets_own_policy_is_not_seen(laptop: str) -> None:
    """IKE daemons exempt their sockets so (IP_XFRM_POLICY), or demand encryption on them."""
    add(laptop, f"src 0.0.0.0/0 dst 10.1.0.0/16 dir out {TEMPLATE}")
    selector = bytes(40) + socket.AF_INET.to_bytes(2, sys.byteorder) + bytes(14)
    block = selector + bytes(96) + bytes(8) + bytes([1, 1, 0, 0]) + bytes(4)
    with inside(laptop), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.setsockopt(socket.IPPROTO_IP, 17, block)
        assert "socket out action block" in run("ip", "-n", laptop, "xfrm", "policy")
        assert xfrm.read_policies() == (policy("0.0.0.0/0", "10.1.0.0/16"),)


@pytest.mark.alone
def test_three_thousand_are_read_in_a_moment(laptop: str) -> None:
    commands = "".join(
        f"xfrm policy add src 0.0.0.0/0 dst 10.{i >> 8}.{i & 255}.0/24 dir out {TEMPLATE}\n" for i in range(3000)
    )
    subprocess.run(["ip", "-n", laptop, "-batch", "-"], input=commands, text=True, check=True)
    start = time.monotonic()
    found = policies(laptop)
    seconds = time.monotonic() - start
    print(f"3,000 policies in {seconds * 1000:.0f} ms")
    assert len(found) == 3000
    assert seconds < 1


def test_a_kernel_without_xfrm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xfrm, "_NETLINK_XFRM", 31)  # a protocol that no kernel has
    assert xfrm.read_policies() == ()
    assert xfrm.watch() is None


AS_NOBODY = """
import errno, os, socket, sys
from tpvpn import xfrm
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
def refused(action):
    try:
        action()
    except OSError as error:
        assert error.errno == errno.EPERM, error
    else:
        raise SystemExit("it was allowed")
refused(xfrm.read_policies)
refused(xfrm.watch)
# What root handed over tells, and takes no order: XFRM_MSG_FLUSHPOLICY with NLM_F_REQUEST | NLM_F_ACK.
changes = socket.socket(fileno=int(sys.argv[1]))
changes.setblocking(True)
changes.send((16).to_bytes(4, sys.byteorder) + bytes([0x1d, 0, 5, 0]) + bytes(8))
answer = changes.recv(4096)
assert int.from_bytes(answer[4:6], sys.byteorder) == 2, answer
assert -int.from_bytes(answer[16:20], sys.byteorder, signed=True) == errno.EPERM, answer
print("refused", flush=True)
assert int.from_bytes(changes.recv(4096)[4:6], sys.byteorder) == 0x13
print("heard", flush=True)
"""


def test_nobody_hears_on_roots_socket_and_may_do_no_more(laptop: str) -> None:
    with inside(laptop):
        changes = xfrm.watch()
        assert changes is not None
        with changes:
            argv = [sys.executable, "-c", AS_NOBODY, str(changes.fileno())]
            process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, pass_fds=[changes.fileno()])
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "refused\n"
        add(laptop, f"src 0.0.0.0/0 dst 10.1.0.0/16 dir out {TEMPLATE}")
        assert process.stdout.readline() == "heard\n"
    assert process.returncode == 0


def test_watching(laptop: str) -> None:
    with inside(laptop):
        changes = xfrm.watch()
    assert changes is not None
    with changes:
        assert not os.get_inheritable(changes.fileno())
        with pytest.raises(BlockingIOError):
            changes.recv(4096)
        add(laptop, f"src 0.0.0.0/0 dst 10.1.0.0/16 dir out {TEMPLATE}")
        assert select.select([changes], [], [], 1)[0] and changes.recv(4096)
        run("ip", "-n", laptop, "xfrm", "policy", "flush")
        assert select.select([changes], [], [], 1)[0] and changes.recv(4096)
