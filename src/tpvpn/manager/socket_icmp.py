"""Ping at the socket exit: an echo's identifier and its destination are a ping socket (icmp(7)), where the pod may.

It knows echo requests and replies. The kernel chooses the identifier under which a request leaves and lets in the
replies to that alone; the client sees its own. Whether the pod may is a sysctl, net.ipv4.ping_group_range, that holds
for both families; where it may not, nothing is faked.
"""

import socket

from tpvpn.manager.socket_datagram import DatagramFlow
from tpvpn.manager.socket_flow import Owner
from tpvpn.wire import icmp, ip

IDLE = 30.0
"""Seconds, as net.netfilter.nf_conntrack_icmp_timeout."""
_SOCKETS = {4: (socket.AF_INET, socket.IPPROTO_ICMP), 16: (socket.AF_INET6, socket.IPPROTO_ICMPV6)}
_TYPES = {4: (icmp.ECHO_REQUEST4, icmp.ECHO_REPLY4, ip.ICMP4), 16: (icmp.ECHO_REQUEST6, icmp.ECHO_REPLY6, ip.ICMP6)}


def ping_permitted(address_length: int) -> bool:
    """Whether this process may have ping sockets of the family whose addresses have so many bytes."""
    try:
        _open(address_length).close()
    except OSError:
        return False
    return True


def _open(address_length: int) -> socket.socket:
    family, protocol = _SOCKETS[address_length]
    return socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK, protocol)


class EchoFlow(DatagramFlow):
    """The echoes of one identifier to one destination; OSError when no socket can be had or nothing leads there."""

    def __init__(self, owner: Owner, key: bytes, packet: ip.Packet, real: bytes) -> None:
        self._identifier = key[-2] << 8 | key[-1]
        self._request, self._reply, self._protocol = _TYPES[len(real)]
        super().__init__(owner, key, packet, real, _open(len(real)), 0, IDLE)

    def _answer(self, data: bytes) -> None:
        if len(data) >= icmp.HEADER_LENGTH and data[0] == self._reply:
            self._put(self._protocol, self._message(self._reply, data, self._destination, self._client))

    def _quoted(self, data: bytes) -> bytes | None:
        if len(data) < icmp.HEADER_LENGTH:
            return None
        body = self._message(self._request, data, self._client, self._destination)
        return ip.build(self._client, self._destination, self._protocol, body)

    def _message(self, kind: int, data: bytes, source: bytes, destination: bytes) -> bytes:
        """A message as the socket has it, with the client's identifier."""
        sequence = data[6] << 8 | data[7]
        message = icmp.Message(kind, 0, self._identifier << 16 | sequence, data[icmp.HEADER_LENGTH :])
        return icmp.build(source, destination, message)


def for_socket(message: icmp.Message) -> bytes:
    """A request as a ping socket wants it: the kernel fills in identifier and checksum."""
    return bytes((message.type, 0, 0, 0)) + message.word.to_bytes(4, "big") + bytes(message.body)
