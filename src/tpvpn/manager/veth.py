"""A veth pair in a TUN's place, for pods that may neither be given /dev/net/tun nor make it.

The kernel routes to one end; packet sockets on the other read and write with a virtio-net header (packet(7),
PACKET_VNET_HDR), so packets of 64 KiB pass in one piece as through a TUN. Needs CAP_NET_ADMIN and CAP_NET_RAW.

- Of two sockets that read, one has the filter "TCP", the other all else: the two queues of `tun`. A third writes.
- Each packet has an Ethernet header, and virtio-net's offsets count from there (cooked sockets, which have none, are
  refused PACKET_VNET_HDR: packet_setsockopt in net/packet/af_packet.c): it is kept apart by readv and writev.
- The end that the kernel routes to has no ARP: it sends to its own address, which is not the other end's, so the stack
  there sees "another host's" packets and drops them (ip_rcv_core in net/ipv4/ip_input.c); the sockets came first.
- A packet that virtio-net has no word for (SCTP or a tunnel in one piece) cannot be read: the device is told by ethtool
  not to take such, as a TUN is by TUNSETOFFLOAD.
- A pair outlives its process, in a pod until the pod ends: `remove_pairs` is for whoever comes next.
"""

import array
import contextlib
import errno
import fcntl
import os
import socket
import struct
from collections.abc import Callable

from tpvpn.manager.forwarding import ipv6_present
from tpvpn.netlink import RouteSocket
from tpvpn.wire.vnet import EMPTY, HEADER_LENGTH, Offload

_MTU = 1500
_LINK = 14
"""Bytes of an Ethernet header."""
_ADDRESS = bytes.fromhex("02747076706e")  # of the kernel's end; locally administered
_BUFFER = 1 << 20
"""Bytes that wait in a queue, as the kernel counts them: a dozen super-packets."""

# linux/if_packet.h, linux/if_ether.h, asm-generic/socket.h, linux/sockios.h, linux/ethtool.h
_SOL_PACKET, _PACKET_VNET_HDR, _PACKET_QDISC_BYPASS, _PACKET_IGNORE_OUTGOING = 263, 15, 20, 23
_ETH_P_ALL, _ETH_P_IP, _ETH_P_IPV6 = 0x0003, 0x0800, 0x86DD
_SO_ATTACH_FILTER, _SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 26, 32, 33
_SIOCETHTOOL = 0x8946
_GSSET_INFO, _GSTRINGS, _SFEATURES, _SS_FEATURES = 0x37, 0x1B, 0x3B, 4
_NAME_LENGTH = 32

_HEADER = struct.Struct("<BBHHHH")
_MOST = 0xFFFF - _LINK

# linux/filter.h: take the protocol from where the IP version has it (RFC 791 section 3.1, RFC 8200 section 3).
_INSTRUCTION = struct.Struct("=HBBI")
_LOAD_BYTE, _SHIFT_RIGHT, _JUMP, _JUMP_EQUAL, _RETURN = 0x30, 0x74, 0x05, 0x15, 0x06
_LOAD_PROTOCOL = (
    *((_LOAD_BYTE, 0, 0, _LINK), (_SHIFT_RIGHT, 0, 0, 4), (_JUMP_EQUAL, 0, 2, 6)),
    *((_LOAD_BYTE, 0, 0, _LINK + 6), (_JUMP, 0, 0, 1)),
    (_LOAD_BYTE, 0, 0, _LINK + 9),
)
_WHOLE = 0xFFFFFFFF

_FEATURES = {
    "tx-checksum-ip-generic": Offload.CHECKSUM,
    "tx-tcp-segmentation": Offload.TSO4,
    "tx-tcp6-segmentation": Offload.TSO6,
    "tx-tcp-ecn-segmentation": Offload.ECN,
}
"""What ethtool calls the offloads; UDP's are left out, since virtio-net has a word for them from Linux 6.2 on only."""
_IN_SOFTWARE = "tx-generic-segmentation"
_BEYOND = ("tx-gso-list", "tx-checksum-sctp")
_OFFLOADS = Offload.CHECKSUM | Offload.TSO4 | Offload.TSO6 | Offload.ECN


class Veth:
    """An open pair, as a `tpvpn.tun.Device`: the kernel's end is `name`."""

    def __init__(self, name: str, netlink: RouteSocket, *, offload: bool) -> None:
        self.name = name
        self.offloads = _OFFLOADS if offload else Offload(0)
        with contextlib.ExitStack() as stack:
            netlink.add_veth(name, _other(name), _ADDRESS)
            stack.callback(_remove, netlink, socket.if_nametoindex(name))
            netlink.bring_up(socket.if_nametoindex(_other(name)), mtu=_MTU, queue_length=1000, ipv6=ipv6_present())
            queue, prompt = (stack.enter_context(_listening(_other(name), tcp)) for tcp in (True, False))
            self.fd, self.prompt_fd = queue.fileno(), prompt.fileno()
            writer = stack.enter_context(_socket())
            # A qdisc drops all for some milliseconds after its device has found a carrier (net/core/link_watch.c).
            writer.setsockopt(_SOL_PACKET, _PACKET_QDISC_BYPASS, 1)
            writer.bind((_other(name), 0))
            self._writer = writer.fileno()
            self.set_offloads(self.offloads)
            self._open = stack.pop_all()
        link = _ADDRESS + bytes(6)
        kinds = {4: _ETH_P_IP, 6: _ETH_P_IPV6}
        self._headers = {version: bytearray(EMPTY + link + kind.to_bytes(2, "big")) for version, kind in kinds.items()}
        self._offload = offload

    def reader(self, queue: int) -> Callable[[memoryview], int | None]:
        """Reads the next packet of a queue; None when it is empty."""
        readv, link, ignored = os.readv, memoryview(bytearray(_LINK)), memoryview(bytearray(HEADER_LENGTH + _LINK))

        def read(into: memoryview) -> int | None:
            try:
                length = readv(queue, (into[:HEADER_LENGTH], link, into[HEADER_LENGTH:])) - _LINK
            except BlockingIOError:
                return None
            flags, kind, linear, size, start, offset = _HEADER.unpack_from(into)
            if flags or kind:
                _HEADER.pack_into(into, 0, flags, kind, max(0, linear - _LINK), size, max(0, start - _LINK), offset)
            return length

        def read_bare(into: memoryview) -> int | None:
            try:
                return readv(queue, (ignored, into)) - len(ignored)
            except BlockingIOError:
                return None

        return read if self._offload else read_bare

    def write(self, _queue: int, packet: memoryview) -> int:
        """Hand the kernel a packet; OSError when it refuses."""
        at = HEADER_LENGTH if self._offload else 0
        header = self._headers.get(packet[at] >> 4) if len(packet) > at else None
        if header is None:
            raise _invalid()
        if at:
            flags, kind, linear, size, start, offset = _HEADER.unpack_from(packet)
            if linear > _MOST or start > _MOST:
                raise _invalid()
            _HEADER.pack_into(header, 0, flags, kind, linear and linear + _LINK, size, start + _LINK, offset)
        return os.writev(self._writer, (header, packet[at:]))

    def set_offloads(self, offloads: Offload) -> None:
        """Narrow what the kernel hands out to what both ends agreed on."""
        _set_features(self._writer, self.name, offloads)
        self.offloads = offloads

    def close(self) -> None:
        """Close the sockets and remove the pair, and with it its addresses and its routes."""
        self._open.close()


def remove_pairs(netlink: RouteSocket, prefix: str) -> None:
    """Remove the pairs that another process left behind; its name for the kernel's ends began with `prefix`."""
    for device in netlink.devices():
        if device.name.startswith(prefix):
            _remove(netlink, device.index)


def _remove(netlink: RouteSocket, index: int) -> None:
    try:
        netlink.remove_device(index)
    except OSError as error:
        if error.errno != errno.ENODEV:  # it went with its other end
            raise


def _invalid() -> OSError:
    return OSError(errno.EINVAL, os.strerror(errno.EINVAL))


def _other(name: str) -> str:
    return f"{name}p"


def _socket() -> socket.socket:
    """A packet socket that hears nothing before it is bound to a protocol."""
    made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, 0)
    made.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
    for force, option in ((_SO_SNDBUFFORCE, socket.SO_SNDBUF), (_SO_RCVBUFFORCE, socket.SO_RCVBUF)):
        try:
            made.setsockopt(socket.SOL_SOCKET, force, _BUFFER)
        except PermissionError:  # a pod in a user namespace of its own: as much as net.core.rmem_max allows
            made.setsockopt(socket.SOL_SOCKET, option, _BUFFER)
    return made


def _listening(device: str, tcp: bool) -> socket.socket:
    """What hears the TCP that comes to this device, or all else."""
    reader = _socket()
    try:
        verdicts = ((_RETURN, 0, 0, _WHOLE if tcp else 0), (_RETURN, 0, 0, 0 if tcp else _WHOLE))
        program = (*_LOAD_PROTOCOL, (_JUMP_EQUAL, 0, 1, socket.IPPROTO_TCP), *verdicts)
        code = array.array("B", b"".join(_INSTRUCTION.pack(*one) for one in program))
        reader.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HP", len(program), code.buffer_info()[0]))
        reader.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
        reader.bind((device, _ETH_P_ALL))
    except BaseException:
        reader.close()
        raise
    return reader


def _set_features(control: int, device: str, offloads: Offload) -> None:
    """What the kernel may hand this device uncut and without its checksum: these, and nothing else (ethtool(8))."""
    sizes = _ethtool(control, device, struct.pack("=IIQI", _GSSET_INFO, 0, 1 << _SS_FEATURES, 0))
    count: int = struct.unpack("=IIQI", sizes)[3]
    texts = _ethtool(control, device, struct.pack("=III", _GSTRINGS, _SS_FEATURES, count) + bytes(_NAME_LENGTH * count))
    valid = wanted = 0
    for number in range(count):
        at = 12 + _NAME_LENGTH * number
        name = texts[at : at + _NAME_LENGTH].rstrip(b"\0").decode()
        if name in _FEATURES or name in _BEYOND or (name.endswith("-segmentation") and name != _IN_SOFTWARE):
            valid |= 1 << number
            wanted |= (name in _FEATURES and _FEATURES[name] in offloads) << number
    blocks = -(-count // 32)
    request = struct.pack("=II", _SFEATURES, blocks)
    for shift in range(0, 32 * blocks, 32):
        request += struct.pack("=II", valid >> shift & 0xFFFFFFFF, wanted >> shift & 0xFFFFFFFF)
    _ethtool(control, device, request)


def _ethtool(control: int, device: str, request: bytes) -> bytes:
    memory = array.array("B", request)
    fcntl.ioctl(control, _SIOCETHTOOL, struct.pack("16sP16x", device.encode(), memory.buffer_info()[0]))
    return memory.tobytes()
