"""How much memory this process may use, as its cgroup says: of version 2 or 1, from within a container or beside it."""

import contextlib
from pathlib import Path

_PLACES = {"": ("/sys/fs/cgroup", "memory.max"), "memory": ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")}
"""By the controller that /proc/self/cgroup names (cgroups(7)): where its hierarchy is, and the file."""
_NO_LIMIT = 1 << 60


def limit() -> int | None:
    """Bytes; None when nothing limits it."""
    found = list[int]()
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            for controller in _PLACES.keys() & set(controllers.split(",")):
                root, name = _PLACES[controller]
                # A container sees its own cgroup as the root, and may be told its path beside that.
                found += filter(None, map(_read, (Path(root + path) / name, Path(root) / name)))
    return min(found, default=None)


def _read(file: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):  # "max"
        number = int(file.read_text())
        return number if number < _NO_LIMIT else None
    return None
