"""What keeps a session from working on this laptop: looking at it, and judging what was seen."""
