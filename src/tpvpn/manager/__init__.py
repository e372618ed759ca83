"""The traffic manager: one process, one port, standard library alone."""
