"""Which traffic goes where: prefixes, the kernel's forwarding view, conflicts, the plan, and the netlink door."""
