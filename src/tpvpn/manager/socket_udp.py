"""UDP at the socket exit: an association between a client's port and one destination is a connected socket.

It ends when it was idle: after 60 s, after 180 s once it was answered (as connection tracking has it for streams),
sooner for DNS, whose clients take a new port for each question.
"""

import socket

from tpvpn.manager.socket_datagram import DatagramFlow
from tpvpn.manager.socket_flow import Owner, family_of
from tpvpn.wire import ip, udp

IDLE, IDLE_ANSWERED, IDLE_DNS = 60.0, 180.0, 10.0
_DNS = 53


class UdpFlow(DatagramFlow):
    """One association; OSError when no socket can be had or nothing leads there."""

    def __init__(self, owner: Owner, key: bytes, packet: ip.Packet, real: bytes) -> None:
        self._client_port, self._port = key[-4] << 8 | key[-3], key[-2] << 8 | key[-1]
        opened = socket.socket(family_of(real), socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        super().__init__(owner, key, packet, real, opened, self._port, IDLE_DNS if self._port == _DNS else IDLE)

    def _answer(self, data: bytes) -> None:
        if self.idle == IDLE:
            self.idle = IDLE_ANSWERED
        datagram = udp.Datagram(self._port, self._client_port, data)
        self._put(ip.UDP, udp.build(self._destination, self._client, datagram))

    def _quoted(self, data: bytes) -> bytes:
        body = udp.build(self._client, self._destination, udp.Datagram(self._client_port, self._port, data))
        return ip.build(self._client, self._destination, ip.UDP, body)


def answered_key(quoted: ip.Bytes) -> bytes:
    """The key of the flow whose answer an ICMP error quotes, cut anywhere; of no flow when it is no datagram."""
    four = bool(quoted) and quoted[0] >> 4 == 4
    at, source, protocol = ((quoted[0] & 15) * 4, quoted[12:16], 9) if four else (40, quoted[8:24], 6)
    ports = bytes(quoted[at : at + 4])
    if len(ports) < 4 or at < ip.HEADER_LENGTH4 or quoted[protocol] != ip.UDP:
        return b""
    return bytes(source) + b"u" + ports[2:] + ports[:2]
