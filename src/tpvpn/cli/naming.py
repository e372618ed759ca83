"""What is wanted of names, of the configuration file of whoever runs the command and of what an admin set."""

import argparse
from collections.abc import Sequence

from tpvpn.cli.config import load
from tpvpn.config import EXCLUDE, INCLUDE, MAPPINGS, Config, merge
from tpvpn.dns.policy import Naming

NOTHING = Config()


def naming(
    arguments: argparse.Namespace, admin: Config = NOTHING, namespace: str = "", namespaces: Sequence[str] = ()
) -> Naming:
    """All of it; the namespace is that of the flags where the cluster does not say it. UsageError of the file."""
    merged = merge(load(), admin)
    connected: str = namespace or getattr(arguments, "namespace", None) or "default"
    return Naming(
        connected,
        tuple(namespaces) or (connected,),
        tuple(one.value for one in merged.all(INCLUDE)),
        tuple(one.value for one in merged.all(EXCLUDE)),
        tuple((one.value.name, one.value.alias) for one in merged.all(MAPPINGS)),
    )
