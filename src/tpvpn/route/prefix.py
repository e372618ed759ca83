"""Prefix algebra for both address families; the only door to netaddr.

A `Prefix` is a value: three integers that sort and hash fast, so that 100,000 routes are cheap. The set algebra on many prefixes
(union, difference, aggregation) is netaddr's.
"""

from typing import NamedTuple


class Prefix(NamedTuple):
    """An IP network: `version` 4 or 6, `network` as an integer, `length` in bits."""

    version: int
    network: int
    length: int
