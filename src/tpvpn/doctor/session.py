"""Looks at the session that runs, or at the plan of one: its connection, each subnet, what answers in the cluster."""

import asyncio
import secrets
import socket
from collections.abc import Iterable
from typing import Any

from tpvpn import rundir
from tpvpn.control import ask
from tpvpn.dns.ask import ask as ask_dns
from tpvpn.doctor.advice import session as advice
from tpvpn.doctor.check import Check, warning
from tpvpn.doctor.patient import Patient
from tpvpn.errors import TpvpnError
from tpvpn.route.prefix import Prefix

_TRIES = 3
_PROBE = 3.0
_API = 443
"""The port of the service that every cluster has, `kubernetes`."""


async def connection(patient: Patient) -> Iterable[Check]:
    """Whether the session is connected, how long an answer takes, and how much the connection carries."""
    try:
        status = await patient.status()
    except TpvpnError as error:
        return [
            warning(
                "session",
                f"session {patient.wishes.name} is not to be asked: {str(error).partition(':')[0]}",
                f"sudo tpvpn doctor{patient.option}",
            )
        ]
    if status is None:
        return [Check("manager", "no session runs, so that none is examined")]
    found = [advice.of_link(status, patient.option)]
    if found[0].ok and (servers := status["dns"]["listening"]):
        seconds = await asyncio.to_thread(_round_trip, servers[0], status["dns"]["below"])
        found.append(advice.of_round_trip(seconds, patient.option))
    if found[0].ok and (session := patient.session):
        found.append(advice.of_speed(await _speed(session)))
    return found


async def _speed(session: rundir.Session) -> dict[str, Any]:
    """How much the session's connection carries, as it says itself."""
    try:
        return await asyncio.to_thread(ask, session.directory, "speed")
    except TpvpnError as error:
        return {"error": str(error)}


def _round_trip(server: str, domain: str) -> float | None:
    """The shortest time of some questions that no cache knows an answer to; None when one is not answered."""
    import time

    times: list[float] = []
    for _ in range(_TRIES):
        began = time.monotonic()
        if ask_dns(f"tpvpn-doctor-{secrets.token_hex(6)}.default.svc.{domain}", server) in (None, "SERVFAIL"):
            return None
        times.append(time.monotonic() - began)
    return min(times)


async def subnets(patient: Patient) -> Iterable[Check]:
    """Each subnet's verdict, and the kernel's own answer for an address of each route."""
    try:
        status, plan = await patient.known_status(), await patient.plan()
    except TpvpnError as error:
        said, _, remedy = str(error).partition(": ")
        return [warning("subnets", said, remedy or "see what is said of the cluster above")]
    shadowed = {} if status is None else await _shadowed(status)
    found = list(advice.of_subnets(plan, shadowed, runs=status is not None))
    return [*found, *([] if status is None else await _probed(status))]


async def _shadowed(status: dict[str, Any]) -> dict[str, str]:
    """What is routed and goes another way, asked of the kernel now."""
    from tpvpn.route.netlink import ask as ask_kernel

    routes = [one for subnet in status["plan"]["subnets"] for one in subnet["routes"]]
    routes += [one["virtual"] for one in status["plan"]["subnets"] if one["virtual"]]
    answers = await ask_kernel([Prefix.host(Prefix.parse(one).address()) for one in routes])
    kept = {str(Prefix.host(one["cidr"].partition("/")[0])) for one in status["plan"]["never_proxy"]}
    return {
        route: f"shadowed by {answer or 'nothing: the kernel has no route'}"
        for route, answer in zip(routes, answers, strict=True)
        if (answer is None or answer.device != status["device"])
        and str(Prefix.host(Prefix.parse(route).address())) not in kept
    }


async def _probed(status: dict[str, Any]) -> list[Check]:
    """A connection to the service that every cluster has, by its name as the session finds it, where that is routed."""
    session = rundir.read(status["name"])
    if session is None or status["state"] != "ready":
        return []
    try:
        name = f"name kubernetes.default.svc.{status['dns']['below']}"
        addresses: list[str] = (await asyncio.to_thread(ask, session.directory, name))["addresses"]
    except (TpvpnError, KeyError):
        return []
    routed = [Prefix.parse(one) for subnet in status["plan"]["subnets"] for one in subnet["routes"]]
    hosts = [one for one in addresses if any(route.contains(Prefix.host(one)) for route in routed)]
    return list(await asyncio.gather(*map(_probe, hosts)))


async def _probe(address: str) -> Check:
    loop = asyncio.get_running_loop()
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            async with asyncio.timeout(_PROBE):
                await loop.sock_connect(probe, (address, _API))
        except ConnectionRefusedError:
            pass  # which is an answer
        except (OSError, TimeoutError):
            return advice.of_probe(address, False)
    return advice.of_probe(address, True)
