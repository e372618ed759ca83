"""Judgement: what was seen in, checks out. Pure."""
