"""A session at the socket exit: the frames of its link become flows, and what flows answer becomes frames.

It knows which packet belongs to which flow, and what is said of packets that belong to none; a flow's own protocol is
`socket_tcp`'s, `socket_udp`'s and `socket_icmp`'s.

Theory of operation. Nothing awaits, and nothing is logged for a packet.
- Link to sockets: one receive brings a run of frames. Each goes to its flow at once, as a view of the receive buffer;
  when all are there, the flows that had some advance: one send into a socket and one acknowledgment for all of them.
- Sockets to link: the flow of a readable socket gets a turn to write; the turns of one pass of the event loop fill one
  buffer and leave by one send. While the link is congested there are no turns, and connections with something on its
  way are not read: the windows of the real ones close, and the queues of the others drop. A flow that begins to want a
  turn has it before those that had one and want more (as in RFC 8290 section 4.2): no answer waits for downloads.
"""

import asyncio
import errno
import logging
import struct
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import TypeVar

from tpvpn.bundle import Links
from tpvpn.errors import ProtocolError
from tpvpn.link import Memory
from tpvpn.manager.outbox import Outbox
from tpvpn.manager.reach import SessionReach
from tpvpn.manager.socket_flow import Flow, error_of, text_of
from tpvpn.manager.socket_icmp import EchoFlow, for_socket
from tpvpn.manager.socket_tcp import BUFFER, MOST_BUFFER, TcpFlow, write_reset
from tpvpn.manager.socket_udp import UdpFlow, answered_key
from tpvpn.manager.socket_watch import Watch
from tpvpn.proto.flow import Bucket, FlowTable, Pool, Shares, Timers
from tpvpn.proto.reassembly import Reassembler
from tpvpn.pump import MAX_PACKET, Counters, hand_on
from tpvpn.wire import frame, icmp, ip, tcp, udp, vnet
from tpvpn.wire.icmp import Error

log = logging.getLogger("tpvpn.manager")

FLOW_RATE, FLOW_BURST = 5000.0, 5000.0
"""New flows a second in each session: more than Python makes, so that a flood leaves time for others."""
HALF_OPEN = 1024
ERROR_RATE, ERROR_BURST = 1000.0, 100.0
"""ICMP errors and resets a second, as net.ipv4.icmp_msgs_per_sec."""
_HEADER = frame.HEADER_LENGTH
_F = TypeVar("_F", UdpFlow, EchoFlow)
_TURN, _LOOK = 0.004, 15
"""Seconds that a session receives, or sends, in a row. Looked at every 16 packets: of the smallest 10,000 come at once,
and would keep all others waiting for 0.2 s."""
_TURNS = 1 << 18  # bytes gathered before they are sent while more flows wait for their turn


class SocketCarrier:
    """Runs from `start()` to `stop()`; the `Owner` of its flows."""

    def __init__(
        self,
        bundle: Links,
        on_frame: Callable[[int, bytes], None],
        addresses: tuple[bytes | None, bytes | None],
        reach: SessionReach,
        pool: Pool,
        *,
        offload: bool,
        mtu: int,
        clock: Callable[[], float],
    ) -> None:
        self.clock, now = clock, clock()
        self.counters = Counters()
        self.dropped: Counter[str] = Counter()
        self.loop = asyncio.get_running_loop()
        self.outbox = Outbox(bundle, offload=offload)
        self.pool, self.mtu, self.offload = pool, mtu, offload
        self.shares: Shares[Flow] = Shares(BUFFER, MOST_BUFFER)
        self._bundle, self._on_frame, self._addresses, self._reach = bundle, on_frame, addresses, reach
        self.table: FlowTable[bytes, Flow] = FlowTable(pool, now, rate=FLOW_RATE, burst=FLOW_BURST, half_open=HALF_OPEN)
        self._timers: Timers[Flow] = Timers()
        self._reassembler = Reassembler()
        self._errors = Bucket(ERROR_RATE, ERROR_BURST, now)
        self._touched: dict[Flow, None] = {}
        self._first: OrderedDict[Flow, None] = OrderedDict()
        self._turns: OrderedDict[Flow, None] = OrderedDict()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._watch = Watch(self.loop)
        self.watch, self.unwatch = self._watch.add, self._watch.remove
        self._draining = False
        self._running = False

    # -- as the session sees it ----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Take the links over."""
        self._running = True
        self._bundle.receive = self.receive
        self._bundle.on_drained = self.resume

    def link_again(self) -> None:
        """There was no link for a while: what may be lost of what was sent goes again."""
        for flow in list(self.table.flows.values()):
            flow.link_again(self.clock())

    def stop(self) -> None:
        """Close every socket; the links are their owner's to close."""
        self._running = False
        if self._timer:
            self._timer.cancel()
        for flow in list(self.table.flows.values()):
            flow.end()
        self._watch.close()

    # -- as its flows see it -------------------------------------------------------------------------------------------

    @property
    def congested(self) -> bool:
        """The link takes no packets now."""
        return self._bundle.congested

    def answered(self) -> None:
        """A flow is half open no more."""
        self.table.half_open -= 1

    def wants_turn(self, flow: Flow) -> None:
        """It has packets to write, or has just written some."""
        if flow not in self._turns:
            self._first[flow] = None
        self._flush_soon()

    def schedule(self, flow: Flow, due: float | None) -> None:
        """`flow.handle_timeout()` is called then."""
        self._timers.schedule(flow, due)
        if due is not None and (self._timer is None or due < self._timer_at):
            self._set_timer(due)

    def forget(self, flow: Flow) -> None:
        """It has ended: nothing keeps it, nor what is in its buffers, however long the link is congested."""
        self._timers.forget(flow)
        self.shares.forget(flow)
        for waiting in (self._touched, self._first, self._turns):
            waiting.pop(flow, None)
        self.table.remove(flow.key, flow)

    def report(self, error: Error, offending: ip.Packet, speaker: bytes | None, mtu: int = 0) -> None:
        """Say an ICMP error of a packet to the client."""
        packet = None
        if self._errors.take(self.clock()) and (speaker := speaker or self._reach.hop(offending.destination)):
            packet = icmp.build_error(error, offending, speaker, mtu=mtu)
        if packet is None:
            self._drop("unanswered")
            return
        self.outbox.put(packet)
        self._flush_soon()

    # -- link to flows -------------------------------------------------------------------------------------------------

    def receive(self, buffer: Memory, start: int, end: int) -> int:
        """Consume whole frames of buffer[start:end], as many as a turn has; where the rest begins."""
        view, unpack, now = memoryview(buffer), frame.HEADER.unpack_from, self.clock()
        at, packets = start, 0
        self._draining = True  # what flows have to say now is said below
        while end - at >= _HEADER:
            (word,) = unpack(buffer, at)
            following = at + _HEADER + (word & 0xFFFFFF)
            if word > MAX_PACKET:
                hand_on(word, buffer, at, end, self._on_frame)
            if following > end:
                break
            if word <= MAX_PACKET and self._running:  # what comes behind a goodbye begins nothing
                if packets & _LOOK == _LOOK and self.clock() > now + _TURN:
                    self._bundle.leave()
                    break
                packets += 1
                self._receive_packet(view[at + _HEADER : following], now)
            at = following
        self.counters.received_packets += packets
        self.counters.received_bytes += at - start
        for flow in list(self._touched):
            flow.advance(now)
        self._touched.clear()
        self._drain()
        return at

    def _receive_packet(self, data: memoryview, now: float) -> None:
        checked = False
        try:
            if self.offload:
                header, data = vnet.Header.unpack(data), data[vnet.HEADER_LENGTH :]
                packet = ip.parse(data)
                checked = header.leaves_checksum(packet.version, packet.protocol, len(packet.data))
            else:
                packet = ip.parse(data)
            if packet.source not in self._addresses:
                self.counters.foreign_packets += 1
                return
            if packet.hop_limit <= 1:
                self.report(Error.TIME_EXCEEDED, packet, None)
                return
            if packet.is_fragment:
                whole = self._reassembler.add(packet, now)
                self.dropped["fragments"] = self._reassembler.dropped
                if whole is None:
                    return
                packet, checked = ip.parse(whole), False
            self._dispatch(packet, now, checked)
        except (ProtocolError, struct.error):
            self.counters.invalid_packets += 1
        except OSError:  # whether its destination may be reached is not known without a descriptor
            self._drop("socket")

    def _dispatch(self, packet: ip.Packet, now: float, checked: bool) -> None:
        if packet.protocol == ip.TCP:
            self._receive_tcp(packet, now, checked)
        elif packet.protocol == ip.UDP:
            self._receive_udp(packet, now, checked)
        elif packet.protocol in (ip.ICMP4, ip.ICMP6):
            self._receive_icmp(packet, now, checked)
        elif packet.protocol == ip.NO_NEXT:
            self._drop("unanswered")
        elif self._reach.real(packet.destination, self._drop):
            self.report(Error.PROTOCOL_UNREACHABLE, packet, None)

    def _receive_tcp(self, packet: ip.Packet, now: float, checked: bool) -> None:
        segment = tcp.parse(packet, checked=checked)
        key = packet.destination + packet.payload[:4]
        flow = self.table.get(key)
        if isinstance(flow, TcpFlow) and flow.gives_way_to(segment):
            flow.end()
            flow = None
        if not isinstance(flow, TcpFlow):
            flow = self._begin_tcp(key, packet, segment, now)
            if flow is None:
                return
        flow.receive(segment, now)
        self._touched[flow] = None

    def _begin_tcp(self, key: bytes, packet: ip.Packet, segment: tcp.Segment, now: float) -> TcpFlow | None:
        real = self._reach.real(packet.destination, self._drop)
        if real is None:
            return None
        if segment.flags & (tcp.SYN | tcp.ACK | tcp.RST | tcp.FIN) != tcp.SYN:
            if not self._errors.take(now) or not write_reset(self.outbox, packet, segment, offload=self.offload):
                self._drop("unanswered")
            return None
        if not self._admit(now, half_open=True):
            return None
        try:
            flow = TcpFlow(self, key, packet, real)
        except OSError as error:
            self._failed(error, packet)
            return None
        self.table.half_open += 1
        self.table.add(key, flow)
        return flow

    def _receive_udp(self, packet: ip.Packet, now: float, checked: bool) -> None:
        datagram = udp.parse(packet, checked=checked)
        key = packet.destination + b"u" + packet.payload[:4]
        flow = self.table.get(key)
        if not isinstance(flow, UdpFlow):
            flow = self._begin(UdpFlow, key, packet, now)
        if flow:
            flow.send(datagram.payload, packet, now)

    def _receive_icmp(self, packet: ip.Packet, now: float, checked: bool) -> None:
        message = icmp.parse(packet, checked=checked)
        if not icmp.is_echo_request(packet, message):
            self._receive_error(packet, message)
            return
        key = packet.destination + message.identifier.to_bytes(2, "big")
        flow = self.table.get(key)
        if not isinstance(flow, EchoFlow):
            if not self._reach.ping[packet.version]:
                if self._reach.real(packet.destination, self._drop):
                    self.report(Error.PROHIBITED, packet, None)
                return
            flow = self._begin(EchoFlow, key, packet, now)
        if flow:
            flow.send(for_socket(message), packet, now)

    def _receive_error(self, packet: ip.Packet, message: icmp.Message) -> None:
        """A client that wants no more answers: no socket can be told, but without one the next is answered likewise."""
        refused = (message.type, message.code) == icmp.Error.PORT_UNREACHABLE.value[packet.version == 6]
        flow = self.table.get(answered_key(message.body)) if refused else None
        if isinstance(flow, UdpFlow):
            flow.end()
        else:
            self._drop("unanswered")

    def _begin(self, kind: type[_F], key: bytes, packet: ip.Packet, now: float) -> _F | None:
        real = self._reach.real(packet.destination, self._drop)
        if real is None or not self._admit(now, half_open=False):
            return None
        try:
            flow = kind(self, key, packet, real)
        except OSError as error:
            self._failed(error, packet)
            return None
        self.table.add(key, flow)
        return flow

    def _admit(self, now: float, *, half_open: bool) -> bool:
        refusal = self.table.refusal(now, half_open=half_open)
        if refusal:
            self._drop(refusal.value)
        return refusal is None

    def _failed(self, error: OSError, packet: ip.Packet) -> None:
        """No socket: a route that is missing is said, and a lack of ports; a lack of descriptors is silence.

        So is a router whose table of connections is full, or a server whose backlog is: what is sent again gets through
        when one is free. An error would end what a second later works.
        """
        self.pool.give_back()
        if error.errno == errno.EADDRNOTAVAIL and packet.protocol == ip.TCP:
            self._say_ports(packet)
        else:
            self._drop("socket")
        reason = error_of(error.errno)
        if packet.version == 6 and reason is Error.HOST_UNREACHABLE:
            reason = Error.NO_ROUTE  # an unreachable route is one to a router (ip6_pkt_discard in net/ipv6/route.c)
        if reason:
            self.report(reason, packet, None)

    def _say_ports(self, packet: ip.Packet) -> None:
        """Every local port has a connection to this destination, most of them in TIME-WAIT: once in a session."""
        if not self.dropped["ports"]:
            target = f"{text_of(self._reach.translated(packet.destination))} port {tcp.ports(packet.payload)[1]}"
            log.warning(
                "no local port is left for %s: spread its connections or widen net.ipv4.ip_local_port_range", target
            )
        self._drop("ports")

    def _drop(self, reason: str) -> None:
        self.dropped[reason] += 1

    # -- flows to link -------------------------------------------------------------------------------------------------

    def _drain(self) -> None:
        """Give flows their turns, each one after the other, until none has anything to write or the link is full."""
        self._draining = False
        first, turns, outbox, now = self._first, self._turns, self.outbox, self.clock()
        if not outbox.room:  # datagrams have filled it
            outbox.flush()
        while (first or turns) and outbox.room and not self._bundle.congested and self._running:
            is_first = bool(first)
            flow, _ = (first if is_first else turns).popitem(last=False)
            # While others want more, one that asks again at once is one of them.
            if flow.write(outbox, now) or (is_first and turns and self.table.get(flow.key) is flow):
                turns[flow] = None
            if outbox.at > _TURNS:
                outbox.flush()
                if self.clock() > now + _TURN:  # what has come meanwhile is looked at before the rest
                    self._flush_soon()
                    break
        outbox.flush()
        self.counters.sent_packets, self.counters.sent_bytes = outbox.packets, outbox.bytes
        self.dropped["queue"] = outbox.dropped

    def _flush_soon(self) -> None:
        if not self._draining:
            self._draining = True
            self.loop.call_soon(self._drain)

    def resume(self) -> None:
        """Go on: the link takes packets again."""
        if self._running:
            self._drain()

    # -- time ----------------------------------------------------------------------------------------------------------

    def _set_timer(self, due: float) -> None:
        if self._timer:
            self._timer.cancel()
        self._timer_at = due
        self._timer = self.loop.call_later(max(0.001, due - self.clock()), self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        now = self.clock()
        for flow in list(self._timers.due(now)):
            flow.handle_timeout(now)
        due = self._timers.next()
        if due is not None and (self._timer is None or due < self._timer_at):
            self._set_timer(due)
