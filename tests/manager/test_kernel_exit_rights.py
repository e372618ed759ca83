"""The kernel exit in a process of its own: other rights, other mounts, or an end by SIGKILL."""

import contextlib
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

from exits import place

from peers import eventually
from pod import NO_TUN, inside, run

__all__ = ["place"]

SCRIPT = textwrap.dedent("""
    import ipaddress, sys
    from tpvpn.errors import TpvpnError
    from tpvpn.manager.kernel_exit import KernelExit
    way_out = KernelExit()
    try:
        way_out.open()
        session = way_out.add_session(None, None, offload=True)
        session.set_virtual([tuple(map(ipaddress.ip_network, ("246.130.0.0/16", "10.130.0.0/16")))])
    except TpvpnError as error:
        print(type(error).__name__, error.exit_code, error)
        sys.exit()
    print(way_out.families, way_out.reasons, way_out.without_tun, flush=True)
    sys.stdin.read()
    session.close()
    way_out.close()
""")


def python_in(pod: str, shell: str) -> list[str]:
    """A command line that runs SCRIPT in the pod, after the shell's lines in a mount namespace of its own."""
    return ["unshare", "-m", "nsenter", f"--net=/run/netns/{pod}", "sh", "-ec", shell, sys.executable, SCRIPT]


def said(pod: str, shell: str) -> str:
    return subprocess.run(
        python_in(pod, shell), input="", capture_output=True, text=True, timeout=30, check=True
    ).stdout


def test_a_read_only_proc_sys_leaves_ipv4_and_says_why_ipv6_is_not_carried(place) -> None:
    pod, _ = place
    shell = 'mount --bind /proc/sys /proc/sys; mount -o remount,ro,bind /proc/sys; exec "$0" -c "$1"'
    words = said(pod, shell)
    assert words.startswith("{4: True, 6: False}")
    assert "set net.ipv6.conf.all.forwarding=1" in words


def test_a_missing_device_node_is_made(place) -> None:
    pod, _ = place
    words = said(pod, 'mount -t tmpfs tmpfs /dev/net; test ! -e /dev/net/tun; exec "$0" -c "$1"')
    assert words.startswith("{4: True, 6: True}")


def test_a_device_node_that_cannot_be_had_is_named_and_a_pair_stands_in(place) -> None:
    pod, _ = place
    words = said(pod, f'{NO_TUN}; exec "$0" -c "$1"')
    assert words.startswith("{4: True, 6: True} {} /dev/net/tun is missing")


def test_a_pod_in_a_user_namespace_of_its_own_has_pairs() -> None:
    """With `hostUsers: false` no device can be made, and a capability counts in the pod's own network alone."""
    eth0 = "ip link add eth0 type veth peer eth1; ip link set eth1 up; ip link set eth0 up"
    route = "ip address add 10.1.1.1/24 dev eth0; ip route add default via 10.1.1.2"
    shell = f'{eth0}; {route}; mount -t tmpfs tmpfs /dev/net; exec "$0" -c "$1"'
    command = ["unshare", "--user", "--map-root-user", "--net", "--mount", "sh", "-ec", shell, sys.executable, SCRIPT]
    assert run(*command).startswith("{4: True, 6: False}")


def test_where_neither_device_nor_pair_can_be_had_both_are_named(place) -> None:
    pod, _ = place
    words = said(pod, f'{NO_TUN}; exec setpriv --bounding-set -net_raw --inh-caps -net_raw "$0" -c "$1"')
    assert words.startswith("PrivilegeError 5")
    assert "/dev/net/tun is missing" in words
    assert "a veth pair in its place needs CAP_NET_RAW" in words
    assert "capabilities.add: [NET_ADMIN, NET_RAW, MKNOD]" in words
    assert words.count("\n") == 1


def test_without_the_capability_it_is_named_with_how_to_give_it(place) -> None:
    pod, _ = place
    words = said(pod, 'exec setpriv --bounding-set -net_admin --inh-caps -net_admin "$0" -c "$1"')
    assert words.startswith("PrivilegeError 5")
    assert "CAP_NET_ADMIN" in words
    assert "--cap-add NET_ADMIN" in words


@contextlib.contextmanager
def killed(pod: str, shell: str) -> Iterator[None]:
    """A manager that runs within the context, and is killed at its end."""
    with subprocess.Popen(python_in(pod, shell), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline().startswith("{4: True")
        yield
        process.send_signal(signal.SIGKILL)
        process.wait(5)
    eventually(lambda: run("ip", "netns", "exec", pod, "nft", "list", "tables") == "", 1)


def left(pod: str) -> str:
    """Links and routes of a pod."""
    return run("ip", "-n", pod, "link") + run("ip", "-n", pod, "route", "show", "table", "all")


def test_nothing_is_left_after_sigkill(place) -> None:
    pod, _ = place
    with killed(pod, 'exec "$0" -c "$1"'):
        tables = run("ip", "netns", "exec", pod, "nft", "list", "tables")
        assert tables == "table inet tpvpn\ntable inet tpvpn-s1\n"
    assert "tpvpn-s" not in left(pod)
    # The flags of forwarding are the one thing that a killed manager leaves.
    with inside(pod):
        for path in ("ipv4/conf/eth0", "ipv6/conf/all"):
            (Path("/proc/sys/net") / path / "forwarding").write_text("0")


def test_pairs_that_a_killed_manager_left_are_removed_by_the_next(place) -> None:
    pod, _ = place
    with killed(pod, f'{NO_TUN}; exec "$0" -c "$1"'):
        pass
    assert "tpvpn-s1" in left(pod)
    said(pod, 'exec "$0" -c "$1"')
    assert "tpvpn-s" not in left(pod)
