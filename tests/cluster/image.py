"""An OCI image layout as a tar, for `ctr images import`: image.py OUT.tar NAME:TAG [--layer TAR] [--add SRC=DST].

Each --layer is the uncompressed tar of a root file system; what is added makes one more layer.
"""

import argparse
import hashlib
import json
import shutil
import tarfile
import tempfile
from pathlib import Path

TYPE = "application/vnd.oci.image."


class Layout:
    """The blobs of an image, by digest, in a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._blobs = directory / "blobs" / "sha256"
        self._blobs.mkdir(parents=True)

    def file(self, path: Path) -> dict[str, object]:
        """Add a file; its descriptor, without a media type."""
        with path.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        shutil.copyfile(path, self._blobs / digest)
        return {"digest": f"sha256:{digest}", "size": path.stat().st_size}

    def json(self, value: object) -> dict[str, object]:
        """Add an object; its descriptor, without a media type."""
        path = self.directory / "value"
        path.write_text(json.dumps(value))
        try:
            return self.file(path)
        finally:
            path.unlink()


def layer_of(added: list[str], path: Path) -> None:
    """A layer with files SRC at DST, owned by root."""

    def clean(info: tarfile.TarInfo) -> tarfile.TarInfo:
        info.uid = info.gid = info.mtime = 0
        info.uname = info.gname = ""
        return info

    with tarfile.open(path, "w") as tar:
        for words in added:
            source, _, destination = words.partition("=")
            tar.add(source, arcname=destination.lstrip("/"), filter=clean)


def write(out: Path, name: str, layers: list[Path], added: list[str], command: list[str]) -> None:
    """Write the image."""
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        layout = Layout(Path(scratch) / "layout")
        if added:
            layer_of(added, Path(scratch) / "added.tar")
            layers = [*layers, Path(scratch) / "added.tar"]
        blobs = [layout.file(layer) for layer in layers]
        path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        config = {
            "architecture": "amd64",
            "os": "linux",
            "config": {"Env": [path], "Cmd": command, "WorkingDir": "/"},
            "rootfs": {"type": "layers", "diff_ids": [blob["digest"] for blob in blobs]},
        }
        manifest = {
            "schemaVersion": 2,
            "mediaType": f"{TYPE}manifest.v1+json",
            "config": {"mediaType": f"{TYPE}config.v1+json", **layout.json(config)},
            "layers": [{"mediaType": f"{TYPE}layer.v1.tar", **blob} for blob in blobs],
        }
        names = {"io.containerd.image.name": name, "org.opencontainers.image.ref.name": name.rpartition(":")[2]}
        entry = {"mediaType": f"{TYPE}manifest.v1+json", **layout.json(manifest), "annotations": names}
        (layout.directory / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
        (layout.directory / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
        part = out.with_suffix(".part")
        with tarfile.open(part, "w") as tar:
            for each in ("oci-layout", "index.json", "blobs"):
                tar.add(layout.directory / each, arcname=each)
        part.rename(out)


def main() -> None:
    """The command described above."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("name")
    parser.add_argument("--layer", action="append", type=Path, default=[])
    parser.add_argument("--add", action="append", default=[], metavar="SRC=DST")
    parser.add_argument("--command", nargs=argparse.REMAINDER, default=[])
    options = parser.parse_args()
    write(options.out, options.name, options.layer, options.add, options.command)


if __name__ == "__main__":
    main()
