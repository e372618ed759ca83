"""Which systems tpvpn runs on: one sentence for each that is none of them, with what to do there.

It is asked before anything is imported that only Linux has; the parsers of all commands can be made anywhere.
"""

from tpvpn.errors import PrivilegeError

_NEEDS = "tpvpn needs Linux's TUN devices and routing tables"
_ELSEWHERE = {
    "Darwin": "macOS has none: run it in a Linux virtual machine, whose programs then reach the cluster",
    "Windows": "Windows has none: run it in WSL2 (`wsl --install`, then install tpvpn in there), whose programs then "
    "reach the cluster",
}
_WSL1 = "WSL1 has none: make this distribution one of WSL2, from Windows: `wsl --list`, then `wsl --set-version NAME 2`"


def unfit(system: str, release: str) -> str | None:
    """Why tpvpn cannot run on a system with this kernel release (uname(2)), and what can be done; None where it can."""
    if system == "Linux":
        # WSL1 calls itself 4.4.0-19041-Microsoft, the real kernel of WSL2 5.15.90.1-microsoft-standard-WSL2.
        return f"{_NEEDS}, and {_WSL1}" if release.endswith("-Microsoft") else None
    if system.startswith(("CYGWIN", "MSYS", "MINGW")):
        system = "Windows"
    return f"{_NEEDS}, and {_ELSEWHERE.get(system) or f'{system} has none: run it on Linux'}"


def require() -> None:
    """PrivilegeError on a system where tpvpn cannot run."""
    import platform  # --help does without

    if reason := unfit(platform.system(), platform.release()):
        raise PrivilegeError(reason)
