"""Looks at this host: what the helper needs, the kernel, tunnel devices, firewalls, what dead sessions left."""

import asyncio
import os
import shlex
import socket
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from tpvpn import rundir
from tpvpn.dns import marker
from tpvpn.doctor.advice import host as advice
from tpvpn.doctor.advice.cluster import unseen
from tpvpn.doctor.advice.host import Left, Sudo
from tpvpn.doctor.check import Check
from tpvpn.doctor.patient import Patient
from tpvpn.errors import TpvpnError
from tpvpn.firewall.obstacles import obstacles
from tpvpn.route.fib import TPVPN_PROTOCOL, View
from tpvpn.route.prefix import Prefix
from tpvpn.tun import IFF_MULTI_QUEUE, IFF_VNET_HDR, features

_SUDO = 5.0
_PATIENCE = 3.0
"""Seconds for a program that has only to say something."""
_MTU, _MTU6 = 14, 24
"""IP_MTU and IPV6_MTU: what the kernel knows of the path of a connected socket (linux/in.h, linux/in6.h)."""


async def privileges(patient: Patient) -> Iterable[Check]:
    """Where the helper's rights are from."""
    from tpvpn.helper.client import COMMAND

    held = patient.rooted.held
    sudo = Sudo(0) if held else await asyncio.to_thread(_sudo, COMMAND)
    return [advice.of_privileges(held, sudo, shlex.join(COMMAND))]


def _sudo(command: Iterable[str]) -> Sudo:
    """Whether sudo would run this, without a question and without running it."""
    try:
        done = subprocess.run(
            ["sudo", "-n", "-l", "--", *command],
            capture_output=True,
            text=True,
            timeout=_SUDO,
            stdin=subprocess.DEVNULL,
            env=os.environ | {"LC_ALL": "C"},
        )
    except subprocess.TimeoutExpired:
        return Sudo(1, f"it said nothing for {_SUDO:.0f} s")
    except OSError:
        return Sudo(None)
    return Sudo(done.returncode, " ".join(done.stderr.split()))


async def kernel(patient: Patient) -> Iterable[Check]:
    """The features that a session uses."""
    error, flags = None, 0
    try:
        flags = features()
    except OSError as refused:
        error = refused.errno
    found = [advice.of_tun(error, elsewhere=not patient.rooted.held)]
    if error is None:
        found += [advice.of_offloads(bool(flags & IFF_MULTI_QUEUE), bool(flags & IFF_VNET_HDR), os.uname().release)]
    view = await patient.view()
    found += [advice.of_rules(view), advice.of_ipv6(view.ipv6), advice.of_nftables(patient.rooted.nftables)]
    return found


async def vpns(patient: Patient) -> Iterable[Check]:
    """Whose each tunnel device is."""
    return list(advice.of_vpns(await patient.view())) or [Check("vpn", "no VPN is up")]


async def firewalls(patient: Patient) -> Iterable[Check]:
    """The rules that stop the tunnel's packets; of a session that runs also as its helper saw them."""
    status, firewall = await patient.known_status(), patient.rooted.firewall
    if firewall is None and status is None:
        return advice.of_firewalls(None)
    try:
        plan = await patient.plan()
    except TpvpnError:
        return [unseen("firewalls", "the cluster's subnets are not known")]
    if firewall is None:
        stops = (" are dropped by ", " are rejected by ", " may be dropped by ", " may be rejected by ")
        return advice.of_firewalls([text for text in plan["warnings"] if any(one in text for one in stops)])
    device = status["device"] if status else rundir.device_name(patient.wishes.name)
    addresses: list[str] = status["addresses"] if status else []
    wanted = [Prefix.parse(subnet["cidr"]) for subnet in plan["subnets"]]
    return advice.of_firewalls(obstacles(firewall, device, addresses, wanted))


async def leftovers(patient: Patient) -> Iterable[Check]:
    """What sessions left that run no more, as far as everyone may see."""
    view, living = await patient.view(), rundir.sessions()
    tables, devices = {one.table for one in living}, {one.device for one in living}
    gone = (name for name in rundir.names() if (found := rundir.read(name)) is not None and not found.running)
    routes = (one for one in view.routes if one.protocol == TPVPN_PROTOCOL and one.device not in devices)
    rules = (one for one in view.rules if one.protocol == TPVPN_PROTOCOL)
    left = Left(
        tuple(gone),
        sum(one.table not in tables for one in routes),
        sum(one.table not in tables for one in rules),
        next((found.owner.name for _, found in marker.chain() if not _lives(found)), ""),
    )
    return advice.of_leftovers(left)


def _lives(found: marker.Marker) -> bool:
    """Whether the session of a file runs, in whatever network namespace."""
    if found.boot != rundir.boot_id():
        return False
    with suppress(OSError):
        session = rundir.decode((found.owner.directory / "session").read_text(errors="replace"))
        return session is not None and session.running
    return False


def path_to(address: str, view: View) -> tuple[str, int, int] | None:
    """The device that packets to an address leave by, its MTU, and that of the path; None when they go nowhere."""
    route = view.lookup(Prefix.host(address), uid=os.getuid()).route
    if route is None or route.device is None:
        return None
    family, level, option = (
        (socket.AF_INET6, socket.IPPROTO_IPV6, _MTU6) if ":" in address else (socket.AF_INET, socket.IPPROTO_IP, _MTU)
    )
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # nothing is sent
            path = probe.getsockopt(level, option)
        return route.device, _mtu_of(route.device), path
    except OSError:
        return None


def _mtu_of(device: str) -> int:
    """SIOCGIFMTU (netdevice(7)): of this network namespace, whatever /sys shows."""
    import fcntl
    import struct

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        answer = fcntl.ioctl(asking, 0x8921, struct.pack("16sI12x", device.encode(), 0))
    return struct.unpack_from("16xI", answer)[0]


def output(*command: str) -> str:
    """What a program says, in English; "" when that is an error, it takes seconds, or it is not there."""
    environment = os.environ | {"LC_ALL": "C"}
    try:
        done = subprocess.run(
            command, capture_output=True, timeout=_PATIENCE, stdin=subprocess.DEVNULL, env=environment
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return "" if done.returncode else done.stdout.decode(errors="replace")


def read_text(path: Path, limit: int) -> str:
    """What is in a file, as far as it may be read; a FIFO in its place does not hold us."""
    try:
        with open(path, errors="replace", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            return file.read(limit)
    except OSError:
        return ""
