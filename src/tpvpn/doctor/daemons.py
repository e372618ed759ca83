"""Looks at NetworkManager, firewalld and ufw: whether each runs, and what it says of the session's device."""

import asyncio
from collections.abc import Iterable
from pathlib import Path

from tpvpn import rundir
from tpvpn.doctor import host
from tpvpn.doctor.advice import daemons as advice
from tpvpn.doctor.advice.daemons import Firewalls, NetworkManager
from tpvpn.doctor.check import Check
from tpvpn.doctor.patient import Patient

_UFW, _MOST = Path("/etc/ufw/ufw.conf"), 1 << 16


async def daemons(patient: Patient) -> Iterable[Check]:
    """What they make of the device, which need not be there."""
    status = await patient.known_status()
    device: str = status["device"] if status else rundir.device_name(patient.wishes.name)
    manager, stopped = await asyncio.gather(asyncio.to_thread(_network_manager, device), host.firewalls(patient))
    obstacles = [one.sentence for one in stopped if one.state != "ok"]
    seen = Firewalls(_runs("firewalld"), "ENABLED=yes" in host.read_text(_UFW, _MOST).splitlines())
    return [advice.of_network_manager(device, manager), *advice.of_firewall_programs(device, obstacles, seen)]


def _network_manager(device: str) -> NetworkManager | None:
    if not (networking := host.output("nmcli", "networking").strip()):
        return None
    state = host.output("nmcli", "-g", "GENERAL.STATE", "device", "show", device).strip()
    return NetworkManager(networking == "enabled", state)


def _runs(program: str) -> bool:
    return any(host.read_text(comm, _MOST).strip() == program for comm in Path("/proc").glob("[0-9]*/comm"))
