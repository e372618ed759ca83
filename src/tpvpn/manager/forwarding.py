"""Which ways lead out of the manager's network namespace, and forwarding along them, where it is not on already.

It knows nothing of sessions or firewalls. IPv4 forwarding is a flag of the device on which a packet came in, settable
by netlink; IPv6's is one flag for the whole namespace (ip6_forward in net/ipv6/ip6_output.c) that /proc/sys alone can
set. What was changed is put back by `restore()`.
"""

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from tpvpn.netlink import RTPROT_RA, Device, DeviceRoute, RouteSocket

_IPV6 = Path("/proc/sys/net/ipv6/conf")
_MAX_MTU = 1500
_IPV6_MIN_MTU = 1280  # RFC 8200 section 5


@dataclass(frozen=True, slots=True)
class WaysOut:
    """The devices through which each family leaves, and the MTU that fits all of them."""

    devices: dict[int, tuple[Device, ...]]
    mtu: int
    learned6: bool
    """The IPv6 default route came from a router advertisement."""


def ways_out(devices: Iterable[Device], routes: Iterable[DeviceRoute]) -> WaysOut:
    """What devices and routes say: pure."""
    usable = {device.index: device for device in devices if device.up and not device.loopback}
    found: dict[int, dict[int, Device]] = {4: {}, 6: {}}
    mtu, learned6 = _MAX_MTU, False
    for route in routes:
        for index in route.devices:
            if index not in usable:
                continue
            found[route.version][index] = usable[index]
            mtu = min(mtu, usable[index].mtu, route.mtu or _MAX_MTU)
            learned6 = learned6 or (route.version == 6 and route.default and route.protocol == RTPROT_RA)
    return WaysOut({version: tuple(ways.values()) for version, ways in found.items()}, mtu, learned6)


@dataclass(slots=True)
class Forwarding:
    """Forwarding as the sessions need it; `switched4` and `switched6` say what was off before."""

    netlink: RouteSocket
    ways: WaysOut
    switched4: list[Device] = field(default_factory=list[Device])
    switched6: dict[Path, str] = field(default_factory=dict[Path, str])

    def switch_on4(self) -> str | None:
        """Let IPv4 in by every way; why it cannot be carried, or None when it can. NetlinkError without the right."""
        if not self.ways.devices[4]:
            return "no IPv4 route leads out"
        for device in self.ways.devices[4]:
            if not device.forwarding:
                self.netlink.set_forwarding(device.index, True)
                self.switched4.append(device)
        return None

    def switch_on6(self) -> str | None:
        """Let IPv6 through the namespace; why it cannot be carried, or None when it can."""
        if not self.ways.devices[6]:
            return "no IPv6 route leads out"
        if self.ways.mtu < _IPV6_MIN_MTU:
            return f"the MTU is {self.ways.mtu}, IPv6 needs {_IPV6_MIN_MTU}"
        if _read(_IPV6 / "default" / "disable_ipv6") != "0":
            return "new devices have no IPv6: set net.ipv6.conf.default.disable_ipv6=0"
        if _read(_IPV6 / "all" / "forwarding") == "1":
            return None
        if self.ways.learned6:
            # The kernel forgets such a route when it becomes a router (addrconf_forward_change in net/ipv6/addrconf.c).
            return "the default route was learned by router advertisement and would be lost: give it a static one"
        before = {path: _read(path) for path in _IPV6.glob("*/forwarding")}
        try:
            (_IPV6 / "all" / "forwarding").write_text("1")
        except OSError:
            return "forwarding is off and /proc/sys read-only: set net.ipv6.conf.all.forwarding=1"
        self.switched6 = before
        return None

    def restore(self) -> None:
        """Put back what was changed; a device that is gone needs nothing."""
        for device in self.switched4:
            with contextlib.suppress(OSError):
                self.netlink.set_forwarding(device.index, False)
        self.switched4.clear()
        # "all" first: it writes every device's flag.
        for path in sorted(self.switched6, key=lambda path: path.parent.name != "all"):
            with contextlib.suppress(OSError):
                path.write_text(self.switched6[path])
        self.switched6.clear()


def ipv6_present() -> bool:
    """The kernel gives devices IPv6 at all."""
    return (_IPV6 / "all").exists()


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
