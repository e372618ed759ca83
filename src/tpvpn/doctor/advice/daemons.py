"""What NetworkManager, firewalld and ufw make of a session's device. Pure.

What a firewall does to the tunnel's packets is read from its rules, whoever wrote them (`firewall/`): here it is whose
command lets them pass. Of NetworkManager the device is another program's, which it shows and leaves alone; but
`nmcli networking off`, and whoever gives the device to it, takes the addresses away, and with them the routes.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tpvpn.doctor.check import Check, warning

DROP_IN = "/etc/NetworkManager/conf.d/90-tpvpn.conf"
_KEEP_OUT = (
    rf"printf '[device-tpvpn]\nmatch-device=interface-name:tpvpn*\nmanaged=0\n' | sudo tee {DROP_IN}, "
    "then `sudo nmcli general reload`"
)


_UFW = re.compile(r"\btable (ip6? )?filter\b")
"""The tables of iptables, as nft shows them and as iptables-legacy does."""


@dataclass(frozen=True, slots=True)
class NetworkManager:
    """What it says, where it runs."""

    networking: bool
    """Whether it has networking switched on."""
    state: str
    """Of the session's device, as "10 (unmanaged)"; "" when there is none."""


@dataclass(frozen=True, slots=True)
class Firewalls:
    """Which programs write firewall rules here."""

    firewalld: bool
    ufw: bool


def of_network_manager(device: str, seen: NetworkManager | None) -> Check:
    """Whether it leaves the device alone; None where it does not run."""
    name = "network-manager"
    if seen is None:
        return Check(name, "NetworkManager does not run")
    if not seen.networking:
        return Check(name, "NetworkManager has networking switched off", "`nmcli networking on`")
    if not seen.state or seen.state.startswith("10 "):
        return Check(name, f"NetworkManager leaves {device} alone")
    if "externally" in seen.state:
        sentence = f"NetworkManager leaves {device} alone, until `nmcli networking off` takes its addresses away"
        return warning(name, sentence, _KEEP_OUT)
    state = seen.state.partition("(")[2].removesuffix(")") or seen.state
    return Check(name, f"NetworkManager has taken {device}, which is {state} there", f"{_KEEP_OUT}, and connect again")


def of_firewall_programs(device: str, obstacles: Sequence[str], seen: Firewalls) -> Iterator[Check]:
    """Whether those that run let the tunnel's packets pass; `obstacles` as `firewall.obstacles` tells of them."""
    if seen.firewalld:
        stopped = any(" firewalld" in one for one in obstacles)
        zone = f"`sudo firewall-cmd --zone=trusted --add-interface={device}`, and again with --permanent"
        yield _judged("firewalld", zone if stopped else None)
    if seen.ufw:
        stopped = any(_UFW.search(one) for one in obstacles)
        yield _judged(
            "ufw", f"`sudo ufw allow out on {device}` and `sudo ufw allow in on {device}`" if stopped else None
        )


def _judged(program: str, remedy: str | None) -> Check:
    return Check(
        program, f"{program} {'stops' if remedy else 'lets'} the tunnel's packets{'' if remedy else ' pass'}", remedy
    )
