"""The kernel's IPsec policies, as far as they decide over packets that the host sends.

It knows nothing of subnets that are wanted. A policy-based VPN (strongSwan, libreswan) has no route: its policies take
a packet after the routing has chosen a way for it. Only root may read them (xfrm_user_rcv_msg in
net/xfrm/xfrm_user.c), and only root may ask to hear of changes; a subscribed socket may be handed to anyone, since the
kernel asks for the sender's right too (netlink_ns_capable), and policies hold no keys.
"""

import errno
import socket
import struct
from contextlib import closing
from typing import Literal

from tpvpn.netlink import NetlinkSocket, parse_attributes
from tpvpn.route.fib import IpsecPolicy
from tpvpn.route.prefix import Prefix

# linux/netlink.h, linux/xfrm.h
_NETLINK_XFRM = 6
_XFRM_MSG_GETPOLICY = 0x15
_XFRMNLGRP_POLICY = 4
_XFRMA_TMPL, _XFRMA_MARK, _XFRMA_IF_ID = 5, 21, 31
_POLICY_OUT = 1
_POLICY_BLOCK = 1
_POLICY_INFO = struct.Struct("=16s16s8xHBB12x96x8xBB6x")
"""struct xfrm_userpolicy_info: of the selector the addresses, family and lengths; direction and action."""
_POLICY_ID_LENGTH = 64
"""sizeof(struct xfrm_userpolicy_id), all zero in a dump's request."""
_VERSIONS: dict[int, tuple[Literal[4, 6], int]] = {socket.AF_INET: (4, 4), socket.AF_INET6: (6, 16)}
"""Version and length of an address by family."""


def read_policies() -> tuple[IpsecPolicy, ...]:
    """The policies that encrypt or reject packets of the host, each once, whatever ports or protocol they select.

    None in a kernel without XFRM. OSError EPERM without the right.
    """
    try:
        kernel = NetlinkSocket(_NETLINK_XFRM)
    except OSError as error:
        if error.errno == errno.EPROTONOSUPPORT:
            return ()
        raise
    with closing(kernel):
        answers = kernel.dump(_XFRM_MSG_GETPOLICY, bytes(_POLICY_ID_LENGTH))
    policies = (_policy(answer.payload) for answer in answers)
    return tuple(dict.fromkeys(policy for policy in policies if policy is not None))


def watch() -> socket.socket | None:
    """A socket on which something arrives whenever a policy changes (ENOBUFS: much did); None without XFRM.

    OSError EPERM without the right.
    """
    kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
    try:
        changes = socket.socket(socket.AF_NETLINK, kind, _NETLINK_XFRM)
    except OSError as error:
        if error.errno == errno.EPROTONOSUPPORT:
            return None
        raise
    try:
        changes.bind((0, 1 << (_XFRMNLGRP_POLICY - 1)))
    except BaseException:
        changes.close()
        raise
    return changes


def _policy(payload: bytes) -> IpsecPolicy | None:
    """The policy in a message; None when an ordinary packet of the host never meets it, or passes it unchanged."""
    destination, source, family, *lengths, direction, action = _POLICY_INFO.unpack_from(payload)
    # A socket's own policies have directions of their own (XFRM_POLICY_MAX + …).
    if direction != _POLICY_OUT or family not in _VERSIONS:
        return None
    attributes = parse_attributes(payload[_POLICY_INFO.size :])
    # Policies of a route-based VPN concern only what is routed to its device, which has the id or sets the mark.
    interface = any(attributes.get(_XFRMA_IF_ID, b""))
    marked = any(attributes.get(_XFRMA_MARK, b"")[:4])
    blocks = action == _POLICY_BLOCK
    if interface or marked or not (blocks or attributes.get(_XFRMA_TMPL)):
        return None
    version, size = _VERSIONS[family]
    there, here = (
        Prefix.around(version, int.from_bytes(address[:size]), length)
        for address, length in zip((destination, source), lengths, strict=True)
    )
    return IpsecPolicy(here, there, blocks)
