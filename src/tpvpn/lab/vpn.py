"""What the lab asks of a real VPN: files for both ends, a command for each, and the words that say that it is up.

Each VPN is a module beside this one. It knows no lab: only the directory for its files, whether there is IPv6, and
whether it takes the laptop's whole traffic (`full`) or the private routes alone. Both commands run in the foreground,
and SIGTERM takes back all that they did; the client's output has `up` in it as soon as its routes are there.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar


@dataclass(frozen=True, slots=True)
class VpnProgram(ABC):
    """A VPN of one lab; `tools`: each program it runs, with the package that has it."""

    directory: Path
    ipv6: bool
    full: bool

    tools: ClassVar[Mapping[str, str]]
    up: ClassVar[str]

    @abstractmethod
    def prepare(self) -> None:
        """Write keys and configuration; before anything of the lab runs."""

    @abstractmethod
    def server(self) -> list[str]:
        """The command of the VPN's far end."""

    @abstractmethod
    def client(self) -> list[str]:
        """The command of the laptop's end."""
