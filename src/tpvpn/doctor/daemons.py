"""Looks at NetworkManager, firewalld and ufw: whether each runs, and what it says of the session's device."""

import asyncio
import os
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from tpvpn import rundir
from tpvpn.doctor import host
from tpvpn.doctor.advice import daemons as advice
from tpvpn.doctor.advice.daemons import Firewalls, NetworkManager
from tpvpn.doctor.check import Check
from tpvpn.doctor.patient import Patient

_PATIENCE = 3.0
_UFW = Path("/etc/ufw/ufw.conf")


async def daemons(patient: Patient) -> Iterable[Check]:
    """What they make of the device, which need not be there."""
    status = await patient.known_status()
    device: str = status["device"] if status else rundir.device_name(patient.wishes.name)
    manager, stopped = await asyncio.gather(asyncio.to_thread(_network_manager, device), host.firewalls(patient))
    obstacles = [one.sentence for one in stopped if one.state != "ok"]
    seen = Firewalls(_runs("firewalld"), "ENABLED=yes" in _text(_UFW).splitlines())
    return [advice.of_network_manager(device, manager), *advice.of_firewall_programs(device, obstacles, seen)]


def _network_manager(device: str) -> NetworkManager | None:
    networking = _nmcli("networking")
    return (
        NetworkManager(networking == "enabled", _nmcli("-g", "GENERAL.STATE", "device", "show", device))
        if networking
        else None
    )


def _nmcli(*words: str) -> str:
    """What it says; "" when that is an error, or it is not there."""
    environment = os.environ | {"LC_ALL": "C"}
    try:
        done = subprocess.run(
            ["nmcli", *words],
            capture_output=True,
            text=True,
            timeout=_PATIENCE,
            stdin=subprocess.DEVNULL,
            env=environment,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _runs(program: str) -> bool:
    return any(_text(comm).strip() == program for comm in Path("/proc").glob("[0-9]*/comm"))


def _text(path: Path) -> str:
    with suppress(OSError):
        return path.read_text(errors="replace")
    return ""
