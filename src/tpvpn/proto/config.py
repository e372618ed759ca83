"""The `config` control frame: a client's virtual subnets, changed during its session (docs/reference/wire.md).

Pure. A pair says that a virtual subnet, out of a space that neither clusters nor VPNs use, stands for a subnet of the
cluster of the same size. A frame of another shape is a ProtocolError and ends the link; pairs that cannot be mapped are
a ManagerError, which is answered with its words.

    client                                               manager
      config  id, virtual: all pairs from now on     ->
                                                     <-    config  id            they are in force
                                                           config  id, error     they are not; nothing changed
"""

import ipaddress
from collections.abc import Sequence
from itertools import pairwise
from typing import cast

from tpvpn.errors import ManagerError, ProtocolError
from tpvpn.proto import message
from tpvpn.proto.session import VIRTUAL4, VIRTUAL6

MAX_PAIRS = 64
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Pair = tuple[Network, Network]
"""A virtual subnet and the cluster's own."""


def encode_change(number: int, pairs: Sequence[tuple[str, str]]) -> bytes:
    """What a client sends: all its pairs from now on."""
    return message.encode("config", id=number, virtual=[list(pair) for pair in pairs])


def encode_answer(number: int, error: str | None) -> bytes:
    """What the manager answers: the change is in force, or why it is not."""
    return message.encode("config", id=number, **({} if error is None else {"error": error}))


def change(what: message.Message) -> tuple[int, list[tuple[str, str]]]:
    """The id and the pairs of texts of a client's `config`; ProtocolError when it has another shape."""
    number = message.member(what, "id", int)
    pairs: list[tuple[str, str]] = []
    for pair in cast(list[object], message.member(what, "virtual", list)):
        match pair:
            case [str(virtual), str(real)]:
                pairs.append((virtual, real))
            case _:
                raise ProtocolError(f"the config of the other end has no pair of subnets in {str(pair)[:60]!r}")
    return number, pairs


def mapping(pairs: Sequence[tuple[str, str]]) -> list[Pair]:
    """The pairs as subnets that can be mapped; ManagerError with what is wrong."""
    if len(pairs) > MAX_PAIRS:
        raise ManagerError(f"{len(pairs)} virtual subnets are too many: a session has at most {MAX_PAIRS}")
    mapped = [_pair(_subnet(virtual), _subnet(real)) for virtual, real in pairs]
    # Of subnets in this order only neighbours can overlap, if any do: they nest or are apart.
    ordered = sorted((virtual for virtual, _ in mapped), key=lambda one: (one.version, int(one.network_address)))
    for one, other in pairwise(ordered):
        if one.overlaps(other):
            raise ManagerError(f"the virtual subnets {one} and {other} overlap")
    return mapped


def _pair(virtual: Network, real: Network) -> Pair:
    pool = VIRTUAL4 if virtual.version == 4 else VIRTUAL6
    if (virtual.version, virtual.prefixlen) != (real.version, real.prefixlen):
        raise ManagerError(f"{virtual} and {real} are of different sizes: nothing maps one to the other")
    # Elsewhere it would be the address of something else, for this client.
    if virtual.network_address not in pool or virtual.prefixlen < pool.prefixlen:
        raise ManagerError(f"{virtual} is no virtual subnet: those are in {pool}")
    return virtual, real


def _subnet(text: str) -> Network:
    try:
        if "%" in text:
            raise ValueError
        return ipaddress.ip_network(text)
    except ValueError as error:
        shown = message.printable(text, 60)
        raise ManagerError(f"{shown!r} is no subnet: one is written as 10.130.0.0/16, without host bits") from error
