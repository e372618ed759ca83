"""The mixed exit: the kernel forwards one IP version, and sockets carry the other.

IPv6 forwarding is off in a new network namespace, and a pod's /proc/sys is read-only: with NET_ADMIN alone the kernel
exit carries IPv4 only. What it cannot carry leaves by sockets. It knows nothing of packets but their version, by which
a run of frames is split.
"""

import struct
from collections.abc import Callable, Sequence
from dataclasses import astuple

from tpvpn.bundle import Bundle
from tpvpn.link import Memory, Receive
from tpvpn.manager.kernel_exit import ExitSession, KernelExit
from tpvpn.manager.metrics import Load
from tpvpn.manager.socket_carrier import SocketCarrier
from tpvpn.manager.socket_exit import SocketExit, SocketPlace
from tpvpn.proto.config import Pair
from tpvpn.pump import MAX_PACKET, Counters, Pump
from tpvpn.wire import frame, vnet
from tpvpn.wire.vnet import Offload

_HEADER = frame.HEADER_LENGTH


class MixedCarrier:
    """Both carriers of a session on its links."""

    def __init__(self, bundle: Bundle, pump: Pump, sockets: SocketCarrier, by_sockets: int, *, offload: bool) -> None:
        self._bundle, self._pump, self._sockets = bundle, pump, sockets
        self._by_sockets = by_sockets << 4
        self._peek = struct.Struct(f">I{vnet.HEADER_LENGTH if offload else 0}xB")

    @property
    def counters(self) -> Counters:
        """The sum of both, as it is now."""
        parts = astuple(self._pump.counters), astuple(self._sockets.counters)
        return Counters(*map(sum, zip(*parts, strict=True)))

    def start(self) -> None:
        """Take the links over."""
        self._pump.start()
        self._sockets.start()
        self._bundle.receive = self.receive
        self._bundle.on_drained = self._on_drained

    def stop(self) -> None:
        """End both; the links are their owner's to close."""
        self._pump.stop()
        self._sockets.stop()

    def link_again(self) -> None:
        """There was no link for a while."""
        self._sockets.link_again()

    def receive(self, buffer: Memory, start: int, end: int) -> int:
        """Consume the whole frames of buffer[start:end], each run by its version's carrier; where the rest begins."""
        peek, by_sockets = self._peek.unpack_from, self._by_sockets
        pump, sockets = self._pump.receive, self._sockets.receive
        taker: Receive = pump
        at = run = start
        while end - at >= _HEADER:
            word, version = peek(buffer, at)
            following = at + _HEADER + (word & 0xFFFFFF)
            if following > end:
                break
            if word <= MAX_PACKET:
                wanted = sockets if version & 0xF0 == by_sockets else pump
                if wanted is not taker:
                    if at > run and (rest := taker(buffer, run, at)) < at:
                        return rest
                    taker, run = wanted, at
            at = following
        return taker(buffer, run, end)

    def _on_drained(self) -> None:
        self._pump.resume()
        self._sockets.resume()


class MixedPlace:
    """A session's places at both exits; each has the address of what it carries."""

    def __init__(self, kernel: ExitSession, sockets: SocketPlace, *, offload: bool) -> None:
        self._kernel, self._sockets, self._offload = kernel, sockets, offload
        self.ipv4, self.ipv6 = kernel.ipv4 or sockets.ipv4, kernel.ipv6 or sockets.ipv6

    def agree(self, offloads: Offload) -> Offload:
        """Keep to those of these offloads that both have; which they are. OSError when the kernel refuses."""
        return self._kernel.agree(self._sockets.agree(offloads))

    def attach(self, bundle: Bundle, on_frame: Callable[[int, bytes], None]) -> MixedCarrier:
        """What carries the session's packets, each by its version."""
        pump, sockets = self._kernel.attach(bundle, on_frame), self._sockets.attach(bundle, on_frame)
        return MixedCarrier(bundle, pump, sockets, 4 if self._sockets.ipv4 else 6, offload=self._offload)

    def set_virtual(self, pairs: Sequence[Pair]) -> None:
        """Map these virtual subnets and no others; a TpvpnError, with nothing changed, when the kernel refuses."""
        carried = 4 if self._kernel.ipv4 else 6
        self._kernel.set_virtual([pair for pair in pairs if pair[0].version == carried])
        self._sockets.set_virtual([pair for pair in pairs if pair[0].version != carried])

    def close(self) -> None:
        """Give both places back."""
        self._kernel.close()
        self._sockets.close()


class MixedExit:
    """Both exits, which are open already, as one; `close()` closes them."""

    def __init__(self, kernel: KernelExit, sockets: SocketExit) -> None:
        self._kernel, self._sockets = kernel, sockets
        self.mtu = min(kernel.mtu, sockets.mtu)

    @property
    def kinds(self) -> dict[int, str | None]:
        """How each family leaves."""
        return {version: self._kernel.kinds[version] or self._sockets.kinds[version] for version in (4, 6)}

    def add_session(self, wanted4: str | None, wanted6: str | None, *, offload: bool) -> MixedPlace:
        """A place at both; errors are theirs."""
        kernel = self._kernel.add_session(wanted4, wanted6, offload=offload)
        try:
            return MixedPlace(kernel, self._sockets.add_session(wanted4, wanted6, offload=offload), offload=offload)
        except BaseException:
            kernel.close()
            raise

    def facts(self) -> dict[str, object]:
        """What sockets cannot do."""
        return self._sockets.facts()

    def load(self) -> Load:
        """What sockets have open."""
        return self._sockets.load()

    def dropped(self) -> dict[str, int]:
        """Packets dropped so far, by reason."""
        kernel, sockets = self._kernel.dropped(), self._sockets.dropped()
        return {name: kernel.get(name, 0) + sockets.get(name, 0) for name in kernel | sockets}

    def close(self) -> None:
        """Close both."""
        self._sockets.close()
        self._kernel.close()
