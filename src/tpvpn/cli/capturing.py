"""The flags of a capture, and the capture that they ask for."""

import argparse
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tpvpn.errors import UsageError

if TYPE_CHECKING:
    from tpvpn.capture import Capture

SIZE = 100


def add_capture_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags about a file of the tunnel's packets."""
    group = parser.add_argument_group("capture")
    group.add_argument(
        "--capture",
        metavar="FILE[,FILTER]",
        help="write the tunnel's packets to a pcapng file, perhaps only those of a filter in tcpdump's words",
    )
    group.add_argument(
        "--capture-size", type=int, metavar="MB", help=f"of FILE, FILE.1, …: the oldest packets go ({SIZE})"
    )
    group.add_argument("--capture-snaplen", type=int, metavar="BYTES", help="cut each packet to so much (it is whole)")


async def capture_of(
    arguments: argparse.Namespace, stack: contextlib.AsyncExitStack, say: Callable[[str], None]
) -> "Capture | None":
    """The capture that is asked for, until the stack unwinds; UsageError when the flags make no sense."""
    size, snap_length = arguments.capture_size, arguments.capture_snaplen
    if arguments.capture is None:
        if size is not None or snap_length is not None:
            raise UsageError("--capture-size and --capture-snaplen are for a capture: give --capture FILE")
        return None
    from tpvpn import packet_filter
    from tpvpn.capture import capturing

    if size is not None and not 1 <= size <= 1 << 20:
        raise UsageError(f"--capture-size {size}: megabytes, 1 to {1 << 20}")
    if snap_length is not None and not 1 <= snap_length <= 1 << 16:
        raise UsageError(f"--capture-snaplen {snap_length}: bytes, 1 to {1 << 16}")
    file, comma, text = arguments.capture.partition(",")
    if not file:
        raise UsageError("--capture wants the name of a file")
    wanted = packet_filter.parse(text) if comma else None
    most = (size or SIZE) * 10**6
    return await stack.enter_async_context(
        capturing(Path(file), say, size=most, snap_length=snap_length or 0, wanted=wanted)
    )
