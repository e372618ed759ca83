"""All checks, as one table, and taking them together: each in its own time, none in more than the whole has.

A check is a function that looks and gives what was found; what it raises is a check that says so.
"""

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any

from tpvpn.doctor import cluster, daemons, host, names, session
from tpvpn.doctor.check import Check, warning
from tpvpn.doctor.patient import Patient, Rooted, Wishes
from tpvpn.errors import TpvpnError

SCHEMA = "tpvpn.doctor/1"
SECONDS = 12.0
"""For all checks, which are taken at the same time."""
_LOOKUPS = "timeout:3 attempts:1"
"""How long programs wait for a name server (resolv.conf(5)), or a dead one would hold us for half a minute."""

LOOKS: tuple[tuple[str, Callable[[Patient], Awaitable[Iterable[Check]]]], ...] = (
    ("privileges", host.privileges),
    ("kernel", host.kernel),
    ("kubeconfig", cluster.kubeconfig),
    ("API server", cluster.api_server),
    ("clock", cluster.clock),
    ("rights in the cluster", cluster.rbac),
    ("manager", cluster.manager),
    ("session", session.connection),
    ("subnets", session.subnets),
    ("names", names.names),
    ("VPNs", host.vpns),
    ("MTU", cluster.mtu),
    ("firewalls", host.firewalls),
    ("daemons", daemons.daemons),
    ("leftovers", host.leftovers),
)
"""Each group of checks, in the order in which they are shown."""


@dataclass(frozen=True, slots=True)
class Found:
    """All checks, each with its group."""

    session: str | None
    """The session that was examined, when one runs."""
    checks: tuple[tuple[str, Check], ...]
    status: dict[str, Any] | None

    @property
    def ok(self) -> bool:
        """Whether nothing keeps anybody from working."""
        return all(check.ok for _, check in self.checks)

    def as_json(self) -> dict[str, Any]:
        """As `tpvpn doctor --output json` shows it."""
        shown: dict[str, Any] = {"schema": SCHEMA, "ok": self.ok, "session": self.session}
        return shown | {"checks": [{"group": group, **check.as_json()} for group, check in self.checks]}


async def examine(wishes: Wishes, seen: Rooted) -> Found:
    """Take all checks."""
    os.environ.setdefault("RES_OPTIONS", _LOOKUPS)
    async with contextlib.AsyncExitStack() as stack:
        patient = Patient(wishes, seen, stack)
        stack.push_async_callback(patient.close)
        groups = await asyncio.gather(*(_take(group, look(patient)) for group, look in LOOKS))
        checks = [(group, check) for (group, _), found in zip(LOOKS, groups, strict=True) for check in found]
        running = patient.session
        return Found(running and running.name, tuple(checks), await patient.known_status())


async def _take(group: str, look: Awaitable[Iterable[Check]]) -> list[Check]:
    identity = group.lower().replace(" ", "-")
    try:
        async with asyncio.timeout(SECONDS):
            return list(await look)
    except TimeoutError:
        return [warning(identity, f"not known after {SECONDS:.0f} s", "ask again; what is named above may hold it up")]
    except (TpvpnError, OSError) as error:
        return [warning(identity, f"could not be looked at: {error}", "mend that, and ask again")]
