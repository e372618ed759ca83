"""nf_tables by hand: a table of ours with chains and rules, made in one transaction, gone with the process.

It knows nftables' netlink messages and the rules that a laptop's device needs; the manager's rules are in
`manager/kernel_exit`. A rule is a sequence of expressions from a small vocabulary that reads like nft(8):
`iifname("tpvpn-s*"), ct_state("new"), counter("inbound"), DROP`. A table has the `owner` flag: it belongs to a netlink
socket, nobody else may change it, and the kernel removes it when the socket closes, also after SIGKILL. The standard
library only; nft(8) is the tests' oracle.

Wire (linux/netfilter/nf_tables.h): integers in attributes are big-endian; a batch is NFNL_MSG_BATCH_BEGIN, messages,
NFNL_MSG_BATCH_END in one datagram: all of it happens, or nothing.
"""

import errno
import ipaddress
import struct
from dataclasses import dataclass
from typing import Literal

from tpvpn.errors import PrivilegeError, TpvpnError, UsageError
from tpvpn.netlink import (
    NLM_F_ACK,
    NLM_F_APPEND,
    NLM_F_CREATE,
    NLM_F_EXCL,
    NLM_F_REQUEST,
    Message,
    NetlinkError,
    NetlinkSocket,
    attribute,
    attribute_text,
    nest,
    parse_attributes,
)

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_NETLINK_NETFILTER = 12
_SUBSYSTEM = 10  # NFNL_SUBSYS_NFTABLES
_BATCH_BEGIN, _BATCH_END = 0x10, 0x11
_NEWTABLE, _NEWCHAIN, _NEWRULE, _DELRULE, _NEWOBJ, _GETOBJ = (_SUBSYSTEM << 8 | kind for kind in (0, 3, 6, 8, 18, 19))
_NFPROTO_INET = 1
_NFPROTO = {4: 2, 6: 10}
_TABLE_OWNER = 0x2
_OBJECT_COUNTER = 1
_REGISTER = 1  # the first of 16 bytes; the next is the second
_VERDICT_REGISTER = 0
_EQUAL, _UNEQUAL = 0, 1
_META_IIFNAME, _META_OIFNAME, _META_NFPROTO = 6, 7, 15

Expression = bytes
"""One or several encoded expressions: what a part of a rule becomes."""


def _u32(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack("!I", value))


# Attribute numbers below are those of the enum named beside them, in linux/netfilter/nf_tables.h.


def _expression(name: str, *attributes: bytes) -> Expression:
    return nest(1, attribute_text(1, name), nest(2, *attributes))  # NFTA_LIST_ELEM; nft_expr_attributes


def _value(kind: int, value: bytes) -> bytes:
    return nest(kind, attribute(1, value))  # nft_data_attributes


def _compare(value: bytes, operator: int = _EQUAL) -> Expression:
    return _expression("cmp", _u32(1, _REGISTER), _u32(2, operator), _value(3, value))  # nft_cmp_attributes


def _mask(mask: bytes) -> Expression:
    registers = _u32(1, _REGISTER) + _u32(2, _REGISTER)  # nft_bitwise_attributes
    return _expression("bitwise", registers, _u32(3, len(mask)), _value(4, mask), _value(5, bytes(len(mask))))


def _meta(key: int) -> Expression:
    return _expression("meta", _u32(1, _REGISTER), _u32(2, key))  # nft_meta_attributes


def _device(key: int, name: str, unequal: bool) -> Expression:
    # IFNAMSIZ bytes for a whole name; a name that ends in * is compared as far as it goes, as nft does.
    value = name[:-1].encode() if name.endswith("*") else name.encode().ljust(16, b"\0")
    return _meta(key) + _compare(value, _UNEQUAL if unequal else _EQUAL)


def iifname(name: str, *, unequal: bool = False) -> Expression:
    """The packet came in by this device; `tpvpn-s*` means every name that begins so."""
    return _device(_META_IIFNAME, name, unequal)


def oifname(name: str, *, unequal: bool = False) -> Expression:
    """The packet goes out by this device."""
    return _device(_META_OIFNAME, name, unequal)


def family(version: int) -> Expression:
    """The packet is IPv4 or IPv6 (`meta nfproto`)."""
    return _meta(_META_NFPROTO) + _compare(bytes([_NFPROTO[version]]))


def _address(network: Network, offset4: int, offset6: int, unequal: bool) -> Expression:
    offset = offset4 if network.version == 4 else offset6
    width = network.max_prefixlen // 8
    # nft_payload_attributes; the base is NFT_PAYLOAD_NETWORK_HEADER
    load = _expression("payload", _u32(1, _REGISTER), _u32(2, 1), _u32(3, offset), _u32(4, width))
    masked = _mask(network.netmask.packed) if network.prefixlen < network.max_prefixlen else b""
    compared = _compare(network.network_address.packed, _UNEQUAL if unequal else _EQUAL)
    return family(network.version) + load + masked + compared


def saddr(network: Network, *, unequal: bool = False) -> Expression:
    """The packet is of the network's family and its source is (not) in the network."""
    return _address(network, 12, 8, unequal)


def daddr(network: Network, *, unequal: bool = False) -> Expression:
    """The packet is of the network's family and its destination is (not) in the network."""
    return _address(network, 16, 24, unequal)


_STATES = {"invalid": 1, "established": 2, "related": 4, "new": 8}


def ct_state(*states: Literal["invalid", "established", "related", "new"]) -> Expression:
    """Connection tracking says one of these of the packet's flow."""
    load = _expression("ct", _u32(1, _REGISTER), _u32(2, 0))  # nft_ct_attributes, NFT_CT_STATE
    bits = struct.pack("=I", sum(_STATES[state] for state in states))  # a register's own order, not the network's
    return load + _mask(bits) + _compare(bytes(4), _UNEQUAL)


def counter(name: str) -> Expression:
    """Count the packet in a named counter, which `Table` makes."""
    return _expression("objref", _u32(1, _OBJECT_COUNTER), attribute_text(2, name))


def _verdict(code: int) -> Expression:
    verdict = nest(2, _u32(1, code))  # NFTA_DATA_VERDICT; nft_verdict_attributes
    return _expression("immediate", _u32(1, _VERDICT_REGISTER), nest(2, verdict))  # nft_immediate_attributes


ACCEPT, DROP = _verdict(1), _verdict(0)
MASQUERADE = _expression("masq")
_NAT_DESTINATION, _RANGE_NETMAP = 1, 1 << 6  # NFT_NAT_DNAT; NF_NAT_RANGE_NETMAP in linux/netfilter/nf_nat.h


def netmap(network: Network) -> Expression:
    """The flow's destination becomes the address at the same place in this network (`dnat ip prefix to`)."""
    first, last = network.network_address.packed, network.broadcast_address.packed
    registers = (_REGISTER, _REGISTER + 1)
    loads = [
        _expression("immediate", _u32(1, register), _value(2, address))  # nft_immediate_attributes
        for register, address in zip(registers, (first, last), strict=True)
    ]
    kind = _u32(1, _NAT_DESTINATION) + _u32(2, _NFPROTO[network.version])  # nft_nat_attributes
    return b"".join(loads) + _expression(
        "nat", kind, _u32(3, registers[0]), _u32(4, registers[1]), _u32(7, _RANGE_NETMAP)
    )


Hook = Literal["prerouting", "input", "forward", "output", "postrouting"]
_HOOKS: dict[Hook, int] = {"prerouting": 0, "input": 1, "forward": 2, "output": 3, "postrouting": 4}
RAW, DSTNAT, FILTER, SRCNAT = -300, -100, 0, 100
"""Priorities: before connection tracking, where destinations are translated, the usual one, where sources are."""


@dataclass(frozen=True, slots=True)
class Chain:
    """A base chain, named after its hook, that accepts what its rules let pass; each rule is a list of expressions."""

    hook: Hook
    rules: tuple[tuple[Expression, ...], ...]
    kind: Literal["filter", "nat"] = "filter"
    priority: int = FILTER


class Table:
    """A live table of the inet family: it stands from construction until `close()` or the end of the process.

    Errors: PrivilegeError without CAP_NET_ADMIN or without a recent enough nf_tables in the kernel, UsageError when
    another process owns a table of this name.
    """

    def __init__(self, name: str, chains: tuple[Chain, ...], counters: tuple[str, ...] = ()) -> None:
        self.name = name
        try:
            self._socket = NetlinkSocket(_NETLINK_NETFILTER)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise TpvpnError(f"cannot make nft table {name}: {error.strerror}") from error
            raise PrivilegeError(_NO_NFTABLES) from error
        try:
            self._socket.send(_batch(_table_messages(name, chains, counters)))
        except NetlinkError as error:
            self._socket.close()
            raise _explained(name, error) from error

    def replace_rules(self, chains: tuple[Chain, ...]) -> None:
        """Put these rules, of chains that the table has, in the place of all its rules: at once, or not at all."""
        table = attribute_text(1, self.name)
        flush = Message(_DELRULE, NLM_F_REQUEST, _nfgenmsg(_NFPROTO_INET) + table)
        try:
            self._socket.send(
                _batch([flush, *(message for chain in chains for message in _rule_messages(table, chain))])
            )
        except NetlinkError as error:
            raise _explained(self.name, error) from error

    def close(self) -> None:
        """Remove the table."""
        self._socket.close()

    def counters(self) -> dict[str, int]:
        """Packets counted so far, by the counter's name."""
        wanted = attribute_text(1, self.name) + _u32(3, _OBJECT_COUNTER)
        found: dict[str, int] = {}
        for message in self._socket.dump(_GETOBJ, _nfgenmsg(_NFPROTO_INET) + wanted):
            fields = parse_attributes(message.payload[4:])
            packets = parse_attributes(fields[4])[2]
            found[fields[2].rstrip(b"\0").decode()] = int.from_bytes(packets, "big")
        return found


def _nfgenmsg(family: int, resource: int = 0) -> bytes:
    return struct.pack("!BBH", family, 0, resource)


def _batch(messages: list[Message]) -> list[Message]:
    """The messages as one transaction; the last alone is acknowledged: errors of the others come by themselves."""
    *first, last = messages
    mark = _nfgenmsg(0, _SUBSYSTEM)
    return [
        Message(_BATCH_BEGIN, NLM_F_REQUEST, mark),
        *first,
        last._replace(flags=last.flags | NLM_F_ACK),
        Message(_BATCH_END, NLM_F_REQUEST, mark),
    ]


def _table_messages(name: str, chains: tuple[Chain, ...], counters: tuple[str, ...]) -> list[Message]:
    table = attribute_text(1, name)
    messages = [_create(_NEWTABLE, table + _u32(2, _TABLE_OWNER), NLM_F_EXCL)]
    for counted in counters:
        fields = attribute_text(2, counted) + _u32(3, _OBJECT_COUNTER) + nest(4)
        messages.append(_create(_NEWOBJ, table + fields))
    for chain in chains:
        hook = nest(4, _u32(1, _HOOKS[chain.hook]), attribute(2, struct.pack("!i", chain.priority)))
        fields = attribute_text(3, chain.hook) + hook + _u32(5, 1) + attribute_text(7, chain.kind)
        messages += [_create(_NEWCHAIN, table + fields), *_rule_messages(table, chain)]
    return messages


def _rule_messages(table: bytes, chain: Chain) -> list[Message]:
    head = table + attribute_text(2, chain.hook)
    return [_create(_NEWRULE, head + nest(4, *rule), NLM_F_APPEND) for rule in chain.rules]


def _create(kind: int, attributes: bytes, flags: int = 0) -> Message:
    return Message(kind, NLM_F_REQUEST | NLM_F_CREATE | flags, _nfgenmsg(_NFPROTO_INET) + attributes)


_NO_NFTABLES = "nf_tables with its `owner` flag is missing: use a kernel from Linux 5.12 on, with CONFIG_NF_TABLES"
_INCOMPLETE = "the kernel lacks nft_ct, nft_masq, nft_nat, nft_chain_nat or nft_objref: load these modules on the host"


def _explained(name: str, error: NetlinkError) -> TpvpnError:
    if error.errno in (errno.EPERM, errno.EEXIST) and error.position > 0:
        # The kernel takes what is not permitted at all back at the batch's first message.
        return UsageError(f"nft table {name} belongs to a running program: end that one first")
    if error.errno == errno.EPERM:
        return PrivilegeError(
            "changing nf_tables needs CAP_NET_ADMIN: run as root, or give the container `--cap-add NET_ADMIN`"
        )
    if error.errno in (errno.EOPNOTSUPP, errno.EPROTONOSUPPORT, errno.EINVAL) and error.position <= 1:
        return PrivilegeError(_NO_NFTABLES)
    if error.errno == errno.ENOENT:
        return PrivilegeError(_INCOMPLETE)
    return TpvpnError(f"cannot change nft table {name}: {error.strerror} (message {error.position})")


def install_laptop_guard(device: str, ipv4: str | None, ipv6: str | None) -> Table:
    """Guard the laptop's tunnel device: nothing comes in for another address, nor any new flow; drops are counted.

    What goes out with a source other than ours (containers behind the laptop, sockets bound to another address) leaves
    as ours. A family without address takes nothing in. Errors: as `Table`.
    """
    return Table(f"tpvpn-{device}", _laptop_chains(device, ipv4, ipv6), ("foreign_address", "new_flow"))


def _laptop_chains(device: str, ipv4: str | None, ipv6: str | None) -> tuple[Chain, ...]:
    own = {4: ipv4, 6: ipv6}
    hosts = {version: ipaddress.ip_network(address) for version, address in own.items() if address is not None}
    not_ours = [daddr(hosts[version], unequal=True) if version in hosts else family(version) for version in own]
    # Before connection tracking, so that it holds for translated flows too.
    foreign = [(iifname(device), elsewhere, counter("foreign_address"), DROP) for elsewhere in not_ours]
    answers = (
        (iifname(device), ct_state("established", "related"), ACCEPT),
        (iifname(device), counter("new_flow"), DROP),
    )
    masquerade = [(oifname(device), saddr(address, unequal=True), MASQUERADE) for address in hosts.values()]
    return (
        Chain("prerouting", tuple(foreign), priority=RAW),
        Chain("input", answers),
        Chain("forward", answers),
        Chain("postrouting", tuple(masquerade), kind="nat", priority=SRCNAT),
    )
