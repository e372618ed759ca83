"""What only root may see of the laptop, as far as it concerns wanted subnets: IPsec, firewalls, who holds which device.

It decides nothing, and changes nothing. `plan` looks as whoever runs it, a session asks the root helper to look; what
may not be read becomes a warning with the command that reads it, so that nobody takes silence for a clear view.
"""

import errno
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tpvpn import xfrm
from tpvpn.firewall.obstacles import obstacles
from tpvpn.firewall.read import read
from tpvpn.holders import holders
from tpvpn.route.fib import IpsecPolicy
from tpvpn.route.prefix import Prefix, Space

_POLICIES, _HOLDERS, _TEXTS, _TEXT_LENGTH = 400, 100, 10, 1000
"""How much of each a message carries, however long its fields (`helper/protocol.MESSAGE_LIMIT`)."""
_SHORT = _TEXT_LENGTH // 12
"""Letters that are no longer than that as JSON, whatever they are."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What was seen; `holders` is the program by device."""

    policies: tuple[IpsecPolicy, ...]
    holders: Mapping[str, str]
    obstacles: tuple[str, ...]
    """What would stop the tunnel's packets, in words."""
    warnings: tuple[str, ...]


def look(prefixes: Sequence[Prefix], device: str, addresses: Sequence[str]) -> Seen:
    """What concerns these prefixes, were they routed to the device with these addresses."""
    warnings: list[str] = []
    policies = _policies(Space(prefixes), warnings)
    return Seen(policies, holders(), _obstacles(prefixes, device, addresses, warnings), tuple(warnings))


def _policies(space: Space, warnings: list[str]) -> tuple[IpsecPolicy, ...]:
    """Those with a destination in the space, the broadest first."""
    try:
        policies = xfrm.read_policies()
    except OSError as error:
        warnings.append(_unread("IPsec policies", "ip xfrm policy", error))
        return ()
    overlapping = (policy for policy in policies if space.overlaps(policy.destination))
    return tuple(sorted(overlapping, key=lambda policy: policy.destination.length))


def _obstacles(
    prefixes: Sequence[Prefix], device: str, addresses: Sequence[str], warnings: list[str]
) -> tuple[str, ...]:
    """The firewall rules that stop packets between the device and the prefixes."""
    try:
        firewall = read()
    except OSError as error:
        warnings.append(_unread("firewalls", "nft list ruleset", error))
        return ()
    if not firewall.complete:
        error = PermissionError(errno.EACCES, "")
        warnings.append(_unread("tables of iptables-legacy", "iptables-legacy-save", error))
    return tuple(obstacles(firewall, device, addresses, prefixes))


def _unread(what: str, command: str, error: OSError) -> str:
    """The warning that something was not seen."""
    root = error.errno in (errno.EPERM, errno.EACCES)
    why = "were not looked at, which needs root" if root else f"could not be read ({error.strerror})"
    return f"{what} {why}: see `sudo {command}`"


def encode(seen: Seen) -> dict[str, object]:
    """What was seen as JSON that fits a message; of very many policies the broadest, and a warning."""
    warnings = seen.warnings
    if len(seen.policies) > _POLICIES:
        warnings += (f"only {_POLICIES} of {len(seen.policies)} IPsec policies were looked at: see `ip xfrm policy`",)
    return {
        "policies": [
            [str(policy.source), str(policy.destination), policy.blocks] for policy in seen.policies[:_POLICIES]
        ],
        "holders": dict(list(seen.holders.items())[:_HOLDERS]),
        "obstacles": _texts(seen.obstacles),
        "warnings": _texts(warnings),
    }


def _texts(texts: Sequence[str]) -> list[str]:
    more = [f"and {len(texts) - _TEXTS} more like these"] if len(texts) > _TEXTS else []
    return [text if len(json.dumps(text)) <= _TEXT_LENGTH else text[:_SHORT] + "…" for text in texts[:_TEXTS]] + more


def decode(values: Mapping[str, Any]) -> Seen:
    """The inverse of `encode`."""
    policies = (
        IpsecPolicy(Prefix.parse(source), Prefix.parse(destination), blocks)
        for source, destination, blocks in values["policies"]
    )
    return Seen(tuple(policies), values["holders"], tuple(values["obstacles"]), tuple(values["warnings"]))


def merge(parts: Iterable[Seen]) -> Seen:
    """What was seen in several looks as one."""
    seen = list(parts)
    return Seen(
        tuple(dict.fromkeys(policy for part in seen for policy in part.policies)),
        {device: program for part in seen for device, program in part.holders.items()},
        tuple(dict.fromkeys(text for part in seen for text in part.obstacles)),
        tuple(dict.fromkeys(text for part in seen for text in part.warnings)),
    )
