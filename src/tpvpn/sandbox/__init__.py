"""A user, network and mount namespace for one command (`tpvpn run`), in which a session needs no right of the host."""
