"""The cluster, as its API server tells of it: `api` is the door, `discover` asks, `subnets` says what it means."""
