"""The lab: a laptop on a VPN, a node and a cluster in network namespaces, for the demo, the tests and the benchmark."""

from tpvpn.lab.lab import Lab
from tpvpn.lab.topology import EXITS, VPNS, WHERE, Exit, Vpn, Where

__all__ = ["EXITS", "VPNS", "WHERE", "Exit", "Lab", "Vpn", "Where"]
