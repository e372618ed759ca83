"""How a session that runs fares, and what a plan makes of the subnets. Pure."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tpvpn.doctor.check import Check, warning
from tpvpn.report import bits, route_of
from tpvpn.route.verdict import Conflict


def of_link(status: Mapping[str, Any], option: str) -> Check:
    """Whether it has a connection to its manager."""
    manager = status["manager"]
    if status["state"] != "ready":
        return Check(
            "manager",
            f"session {status['name']} is {status['state']}: its manager at {manager['endpoint']} is not reached",
            f"see that it runs (`kubectl get pods -A | grep tpvpn`), or `tpvpn quit{option}` and connect again",
        )
    exit = ", ".join(f"{family} by {how}" for family, how in manager["exit"].items() if how) or "no exit"
    return Check("manager", f"session {status['name']} is connected by {manager['endpoint']}, {exit}")


def of_round_trip(seconds: float | None, option: str) -> Check:
    """A question through the tunnel and its answer."""
    if seconds is None:
        return warning(
            "transport",
            "the cluster's resolver does not answer through the tunnel, so that nothing was measured",
            f"`tpvpn status{option}` shows the links, `kubectl get pods -n kube-system` the resolver",
        )
    return Check("transport", f"a question through the tunnel is answered in {1000 * seconds:.1f} ms")


def of_speed(answer: Mapping[str, Any]) -> Check:
    """What the session measured of its connection; `up` and `down` in bytes a second, or why it could not."""
    if error := answer.get("error"):
        remedy = "ask again; a session of an older version has to be begun anew"
        return warning("speed", f"how much the connection carries was not measured: {error}", remedy)
    return Check("speed", f"the connection carries at least {bits(answer['up'])} up and {bits(answer['down'])} down")


def of_subnets(plan: Mapping[str, Any], shadowed: Mapping[str, str], *, runs: bool) -> Iterator[Check]:
    """The verdict on each subnet; `plan` is `tpvpn.plan/1`, `shadowed` says what the kernel does with a route of it."""
    for subnet in plan["subnets"]:
        yield _of_subnet(subnet, [text for route in subnet["routes"] if (text := shadowed.get(route))], plan, runs)
    for cidr, by in shadowed.items():
        if not any(cidr in subnet["routes"] for subnet in plan["subnets"]):
            yield _shadowed(cidr, by)
    for text in plan["warnings"]:
        if " are dropped by " not in text and " are rejected by " not in text:
            yield warning("subnets", text.rstrip("."), "`tpvpn plan` shows it beside the subnets")


def _of_subnet(subnet: Mapping[str, Any], shadowed: Sequence[str], plan: Mapping[str, Any], runs: bool) -> Check:
    cidr, verdict = f"{subnet['kind']} subnet {subnet['cidr']}", subnet["verdict"]
    if shadowed:
        return _shadowed(cidr, shadowed[0])
    if verdict in ("conflict", "partial"):
        against = next((one for one in subnet["conflicts"] if not one["allowed"]), None)
        because = "" if against is None else f": {route_of(Conflict(**against))} is in conflict with it"
        fix = (
            plan["fixes"][0]["command"]
            if plan["fixes"]
            else f"tpvpn connect --allow-conflicting-subnets {subnet['cidr']}"
        )
        return Check(
            "subnet",
            f"{cidr} is {'withheld' if verdict == 'conflict' else 'routed in part'}{because}",
            fix,
            warns=verdict == "partial",
        )
    if verdict == "excluded":
        return warning("subnet", f"{cidr} is excluded", f"tpvpn why {subnet['cidr'].partition('/')[0]}")
    said = f"reached at {subnet['virtual']}" if verdict == "virtual" else "routed" if runs else "free to be routed"
    return Check("subnet", f"{cidr} is {said}")


def _shadowed(what: str, by: str) -> Check:
    return Check(
        "subnet",
        f"{what} is {by}",
        "`ip rule` and `ip route get ADDRESS` show who takes it: have that program leave it out",
    )


def of_probe(address: str, answered: bool) -> Check:
    """A connection to an address in the cluster."""
    if answered:
        return Check("probe", f"{address} answers through the tunnel")
    return warning(
        "probe",
        f"{address} does not answer through the tunnel",
        f"`tpvpn why {address.partition(':')[0]}` shows the way that it takes",
    )
