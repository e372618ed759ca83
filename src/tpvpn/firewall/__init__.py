"""Which firewall rules stand in the way of the tunnel's packets: a VPN's kill switch, told before it is felt."""
