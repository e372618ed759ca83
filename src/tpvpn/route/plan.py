"""The plan: what is routed, what is withheld and why, and the operations that take the kernel from here to there.

Pure: a `View`, what is wanted and the policy in, values out. Applying a plan twice is harmless; each operation knows its inverse.
"""

from dataclasses import dataclass
from typing import Literal

from tpvpn.route.fib import Route, Rule


@dataclass(frozen=True, slots=True)
class Operation:
    """Add or remove one route or rule of ours."""

    verb: Literal["add", "remove"]
    target: Route | Rule

    def inverse(self) -> "Operation":
        """The operation that undoes this one."""
        return Operation("remove" if self.verb == "add" else "add", self.target)
