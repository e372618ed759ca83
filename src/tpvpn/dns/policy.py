"""Which question goes to the cluster, and under which name it is asked there.

Pure: names in, decisions out. It knows neither sockets nor the host's resolver.
"""

from dataclasses import dataclass
from typing import Literal

DOMAIN = "cluster.local"
"""The cluster's domain where nobody says another (kubelet's default)."""


@dataclass(frozen=True, slots=True)
class Naming:
    """What is wanted of names, of user, admin and cluster; names in small letters, without a dot at the end."""

    namespace: str = "default"
    """The connected one, whose services have names of one label."""
    namespaces: tuple[str, ...] = ()
    """Those that are known to exist."""
    include: tuple[str, ...] = ()
    """Suffixes that are the cluster's too."""
    exclude: tuple[str, ...] = ()
    """Suffixes that are never the cluster's."""
    mappings: tuple[tuple[str, str], ...] = ()
    """Names, and the name or address that each stands for."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What becomes of a question."""

    where: Literal["cluster", "elsewhere", "nowhere", "address"]
    """Asked in the cluster; of the servers that this host had before; of nobody (there is no such name); known."""
    because: str
    """Why, as the end of a sentence."""
    asked: str | None = None
    """The name that is asked, when it is another one than was given."""
    address: str | None = None
