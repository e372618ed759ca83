"""The root helper and the user's side of it: the only part of the laptop's two processes that has root's rights."""
