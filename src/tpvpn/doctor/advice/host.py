"""What this host has and lacks for a session: rights, the kernel's features, clocks, what dead sessions left. Pure."""

import errno
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tpvpn.doctor.check import Check, warning
from tpvpn.route.fib import View
from tpvpn.route.owner import Owner, owner_of

_MISSING = (errno.ENOENT, errno.ENODEV, errno.ENXIO)
_MODPROBE = "modprobe tun; of a container: `docker run --device /dev/net/tun`"
_USO = (6, 2)
"""The kernel from which UDP too is handed out unsegmented."""
TUNNEL_KINDS = ("tun", "wireguard", "ovpn", "ovpn-dco", "xfrm", "vti", "vti6", "ppp", "ipip", "gre")
NOT_VPNS = ("lan", "docker", "podman", "libvirt", "lxd", "kubernetes", "frr", "bird", "unknown", "tpvpn")
IPV6_LEAST = 1280
"""Bytes that every link of IPv6's carries (RFC 8200 section 5)."""
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Sudo:
    """What `sudo -n` says to the helper: its exit code, None where there is no sudo, and its words."""

    code: int | None
    said: str = ""


def of_privileges(held: str, sudo: Sudo, helper: str) -> Check:
    """`held`: where this process has rights from, "" for nowhere; `helper`: the command that sudo is to allow."""
    if held:
        return Check("privileges", f"the helper gets its rights from {held}")
    if sudo.code is None:
        return Check(
            "privileges",
            "this is neither root nor a service with CAP_NET_ADMIN, and sudo is not installed",
            "start tpvpn as root, or as a service with `AmbientCapabilities=CAP_NET_ADMIN`",
        )
    if sudo.code == 0:
        return Check("privileges", "sudo starts the helper and asks for no password")
    allow = f"in sudoers allow yourself `{helper}`"
    if not sudo.said or "password" in sudo.said:
        return warning("privileges", "sudo wants a password before it starts the helper", f"type it, or {allow}")
    return Check("privileges", f"sudo does not start the helper: {sudo.said}", allow)


def of_tun(error: int | None, *, elsewhere: bool) -> Check:
    """Opening /dev/net/tun; `elsewhere`: another process, which is root's, is to open it for us."""
    if error is None:
        return Check("tun", "/dev/net/tun is there and opens")
    if error in _MISSING:
        return Check("tun", "/dev/net/tun is missing", _MODPROBE)
    if error == errno.EACCES and elsewhere:
        return warning("tun", "/dev/net/tun may be opened by root alone, which the helper is", "chmod 666 /dev/net/tun")
    return Check(
        "tun",
        "/dev/net/tun may not be opened, not even by root",
        "of a container: `docker run --device /dev/net/tun --cap-add NET_ADMIN`",
    )


def of_offloads(queues: bool, headers: bool, release: str) -> Check:
    """What a TUN can do: several queues, virtio-net headers; `release` is the kernel's."""
    if not queues:
        return Check("offloads", "TUN devices of this kernel have one queue only", "use Linux 5.4 or newer")
    if not headers:
        return warning(
            "offloads", "TUN devices of this kernel have no offloads, so all is slow", "use Linux 5.4 or newer"
        )
    version = tuple(int(word) for word in release.split("-")[0].split(".")[:2] if word.isdecimal())
    udp = "TCP and UDP" if version >= _USO else "TCP, not of UDP (Linux 6.2)"
    return Check("offloads", f"TUN devices take segmentation of {udp}")


def of_rules(view: View) -> Check:
    """Whether there are policy rules, of both families."""
    missing = [
        f"IPv{version}"
        for version in (4, 6)
        if version == 4 or view.ipv6
        if not any(rule.version == version for rule in view.rules)
    ]
    if missing:
        return Check(
            "rules",
            f"this kernel has no policy rules for {' and '.join(missing)}",
            "use a kernel with CONFIG_IP_MULTIPLE_TABLES and CONFIG_IPV6_MULTIPLE_TABLES",
        )
    return Check("rules", f"policy rules are there ({len(view.rules)} of them)")


def of_ipv6(on: bool) -> Check:
    """Whether a new device will carry IPv6."""
    if on:
        return Check("ipv6", "IPv6 is on")
    return warning(
        "ipv6",
        "IPv6 is off on this host: the cluster's IPv6 subnets are left out",
        "sysctl -w net.ipv6.conf.all.disable_ipv6=0 net.ipv6.conf.default.disable_ipv6=0",
    )


def of_nftables(there: bool | None) -> Check:
    """Whether the kernel has nf_tables; None: only root may see."""
    if there is False:
        return Check(
            "nftables", "this kernel has no nf_tables, which keeps strangers out of the tunnel", "modprobe nf_tables"
        )
    return Check("nftables", "nf_tables is there" if there else "nf_tables is loaded when root asks for it")


def of_vpns(view: View) -> Iterator[Check]:
    """Each device of a VPN's, and whose it is."""
    for link in view.links:
        owner, routes = _owner(view, link.name), [one for one in view.routes if one.device == link.name]
        if owner.name == "tpvpn" or (owner.name in NOT_VPNS and link.kind not in TUNNEL_KINDS):
            continue
        shown = [str(one.prefix) for one in routes if one.kind == "unicast"]
        rest = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
        has = f"routes {', '.join(shown[:_SHOWN])}{rest}" if shown else "routes nothing"
        yield Check("vpn", f"{link.name} is {owner.name}'s, known by {owner.evidence}: it {has}")


def _owner(view: View, device: str) -> Owner:
    """Whose a device is, by the most telling of its routes."""
    link = next(one for one in view.links if one.name == device)
    found = Owner("unknown", "no route of its own")
    if link.kind == "tun" and link.holder is None and device.startswith("tpvpn"):
        return Owner("tpvpn", f"device name {device}")
    for route in view.routes:
        for hop in route.nexthops:
            if hop.device == device:
                rule = next((one for one in view.rules if one.action == "lookup" and one.table == route.table), None)
                owner = owner_of(route, hop, rule, link)
                if owner.name not in NOT_VPNS:
                    return owner
                found = owner
    return found


def of_mtu(where: str, device: str, mtu: int, path: int) -> Check:
    """The device by which `where` goes, its MTU, and that of the path as far as the kernel knows."""
    if min(mtu, path) < IPV6_LEAST:
        less = f"{device} has an MTU of {mtu}" if mtu < IPV6_LEAST else f"the path by {device} carries {path} bytes"
        return warning(
            "mtu",
            f"{less}, by which {where} goes: that is slow, and IPv6 wants {IPV6_LEAST}",
            f"ip link set {device} mtu 1400" if mtu < IPV6_LEAST else "have whoever runs that path let ICMP pass",
        )
    narrow = f", the path {path}" if path < mtu else ""
    return Check("mtu", f"{where} goes by {device}, whose MTU is {mtu}{narrow}")


# -- clocks ------------------------------------------------------------------------------------------------------------

_ODD, _WRONG = 30.0, 300.0
"""Seconds: of a clock that is odd; of one with which tokens and certificates are not valid."""


def of_clock(ahead: float) -> Check:
    """This host's clock, seconds before the API server's."""
    how = f"this host's clock is {_span(abs(ahead))} {'ahead of' if ahead > 0 else 'behind'} the API server's"
    if abs(ahead) < _ODD:
        return Check("clock", "this host's clock and the API server's agree")
    return Check(
        "clock",
        f"{how}: tokens and certificates may not be valid yet, or no more",
        "timedatectl set-ntp true",
        warns=abs(ahead) < _WRONG,
    )


def _span(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


# -- what dead sessions left -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Left:
    """What is there of sessions that run no more."""

    sessions: Sequence[str] = ()
    routes: int = 0
    rules: int = 0
    resolver_file: str = ""
    """The session whose /etc/resolv.conf it is."""


def of_leftovers(left: Left) -> Iterator[Check]:
    """What `tpvpn cleanup` would remove."""
    remedy = "sudo tpvpn cleanup"
    if left.resolver_file:
        yield Check(
            "leftovers",
            f"/etc/resolv.conf is that of session {left.resolver_file}, which runs no more: names are asked of nobody",
            remedy,
        )
    if left.routes or left.rules:
        yield warning(
            "leftovers", f"{left.rules} rules and {left.routes} routes are of sessions that run no more", remedy
        )
    if left.sessions:
        yield warning("leftovers", f"a killed session left its directory: {', '.join(left.sessions)}", remedy)
    if left == Left():
        yield Check("leftovers", "no killed session left anything")


# -- firewalls ---------------------------------------------------------------------------------------------------------


def of_firewalls(obstacles: Sequence[str] | None) -> Iterator[Check]:
    """Sentences on what stops the tunnel's packets, each with its command; None: only root may see."""
    if obstacles is None:
        yield warning("firewalls", "firewalls were not looked at, which needs root", "sudo tpvpn doctor")
        return
    for text in obstacles:
        said, _, remedy = text.partition(": ")
        yield Check("firewalls", said, remedy or "nft list ruleset", warns=" may be " in said)
    if not obstacles:
        yield Check("firewalls", "no rule stops the tunnel's packets")
