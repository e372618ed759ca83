"""The other sessions of this host that have names, as their directories tell of them."""

from tpvpn import rundir
from tpvpn.dns.policy import Neighbour


def neighbours(name: str, table: int) -> tuple[Neighbour, ...]:
    """Those beside the session that has this name and routing table, the oldest first.

    Of two sessions the older one has the lower table, as for routes; one that has announced nothing has no names.
    """
    found = [(one, rundir.announced(one.name)) for one in rundir.sessions() if one.name != name]
    return tuple(Neighbour(one.name, said, one.table < table) for one, said in found if said is not None)
