"""Names: the host's own resolvers, and names whose addresses are to be routed."""
