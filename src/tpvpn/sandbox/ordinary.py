"""The way out of a sandbox for all that is not the cluster's: the socket exit, in the process that stayed outside.

What a command inside sends becomes a socket of this host, by whatever way this host has, a VPN's included. The packets
come from the sandbox's device and go back to it: `pump` and `socket_carrier` are joined by a link that is a call.
"""

import asyncio
import resource
import time
from collections.abc import Callable, Sequence
from ipaddress import ip_address

from tpvpn.link import Receive, nobody
from tpvpn.manager.reach import Reach, SessionReach
from tpvpn.manager.socket_carrier import SocketCarrier
from tpvpn.manager.socket_exit import MAX_FLOWS, MAX_MEMORY, OFFLOADS
from tpvpn.manager.socket_icmp import ping_permitted
from tpvpn.proto.flow import Pool
from tpvpn.pump import OwnAddress, Pump
from tpvpn.tun import Tun

MTU = 1500
ROUTERS = ("192.0.0.1", "fdb9:7a2c:31e4::1")
"""Who says what cannot be reached, where this host has no address on the way (RFC 7335; unique local)."""
_BROADCAST = bytes([255] * 4)


class Ordinary:
    """Runs from `start()` to `stop()`, between a device with these addresses and this host's sockets."""

    def __init__(self, tun: Tun, addresses: Sequence[str]) -> None:
        four = next((one for one in addresses if ":" not in one), None)
        six = next((one for one in addresses if ":" in one), None)
        tun.set_offloads(tun.offloads & OFFLOADS)
        inner, outer = _Side(), _Side()
        inner.other, outer.other = outer, inner
        self._pump = Pump(tun, inner, OwnAddress("destination", four, six), _nothing, offload=True)
        self._carrier = SocketCarrier(
            outer,
            _nothing,
            (_packed(four), _packed(six)),
            SessionReach(HostReach()),
            Pool(_flows(), MAX_MEMORY),
            offload=True,
            mtu=MTU,
            clock=time.monotonic,
        )

    def start(self) -> None:
        """Let packets flow."""
        self._carrier.start()
        self._pump.start()

    def stop(self) -> None:
        """End all flows; the device is its owner's."""
        self._pump.stop()
        self._carrier.stop()


class HostReach(Reach):
    """Everything that this host reaches, its own addresses too: who asks is its user. But not what many would hear."""

    def __init__(self) -> None:
        ping = {4: ping_permitted(4), 6: ping_permitted(16)}
        super().__init__((), lambda _: False, ping, [ip_address(one).packed for one in ROUTERS])

    def _judge(self, address: bytes) -> str | None:
        ip = ip_address(address)
        refused = ip.is_loopback or ip.is_multicast or ip.is_unspecified or address == _BROADCAST
        return "destination" if refused or getattr(ip, "ipv4_mapped", None) else None


class _Side:
    """One end of the link: what it is given to send, the other end receives at once, or in the loop's next turn."""

    other: "_Side"

    def __init__(self) -> None:
        self.receive: Receive = nobody
        self.on_drained: Callable[[], None] = lambda: None
        self._left: memoryview | None = None

    @property
    def congested(self) -> bool:
        """The other end has left something."""
        return self._left is not None

    def send_batch(self, batch: memoryview) -> None:
        """Send whole packet frames."""
        taken = self.other.receive(batch, 0, len(batch))
        if taken < len(batch):
            self._left = batch[taken:]
            asyncio.get_running_loop().call_soon(self._go_on)

    def _go_on(self) -> None:
        rest, self._left = self._left, None
        if rest:
            self.send_batch(rest)
        if not self._left:
            self.on_drained()

    def leave(self) -> None:
        """Nothing: it is seen by what was taken."""


def _flows() -> int:
    """As many as this process may have descriptors for, and half of them."""
    return min(MAX_FLOWS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)


def _packed(address: str | None) -> bytes | None:
    return None if address is None else ip_address(address).packed


def _nothing(kind: int, payload: bytes) -> None:
    """There are packets only."""
