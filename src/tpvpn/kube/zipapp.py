"""The manager as a zipapp, made of the installed package: what a pod on a stock Python runs. Standard library only.

`python -m tpvpn.kube.zipapp OUT` writes it to a file. The same sources give the same bytes.
"""

import io
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

PARTS = (
    *(
        "__init__.py",
        "errors.py",
        "exposition.py",
        "tun.py",
        "netlink.py",
        "nfnetlink.py",
        "link.py",
        "bundle.py",
        "heartbeat.py",
    ),
    *("pump.py", "wire", "proto"),
    *(f"transport/{name}.py" for name in ("__init__", "stream", "inner_tls", "tcp", "upgrade")),
    "manager",
)
_SHEBANG = b"#!/usr/bin/env python3\n"
_MAIN = "from tpvpn.manager.command import main\n\nmain()\n"
_WHEN = (1980, 1, 2, 0, 0, 0)


def build() -> bytes:
    """The zipapp's bytes."""
    out = io.BytesIO()
    out.write(_SHEBANG)
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in _files():
            archive.writestr(zipfile.ZipInfo(name, _WHEN), data, zipfile.ZIP_DEFLATED)
        archive.writestr(zipfile.ZipInfo("__main__.py", _WHEN), _MAIN)
    return out.getvalue()


def _files() -> Iterator[tuple[str, bytes]]:
    root = Path(__file__).parents[1]
    for part in PARTS:
        path = root / part
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            yield f"tpvpn/{file.relative_to(root)}", file.read_bytes()


if __name__ == "__main__":
    Path(sys.argv[1]).write_bytes(build())
