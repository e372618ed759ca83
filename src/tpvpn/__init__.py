"""tpvpn: a laptop's way into a Kubernetes cluster, at home beside any VPN."""

__version__ = "0.1.0"
