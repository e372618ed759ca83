"""The benchmark: the direct path, tpvpn and other tunnels, measured in turns in one lab."""
