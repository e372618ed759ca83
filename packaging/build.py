"""Builds what people install: a Debian package, one file for any machine with its Python, krew's archive and manifest.

    .venv/bin/python packaging/build.py WHEEL OUT [URL]

All have the same tree inside: `bin/` and `lib/python3.X/site-packages/`, with tpvpn and its dependencies as .venv has
them, and a pyvenv.cfg. So to an interpreter it is a virtual environment, and whatever tpvpn starts (its root helper, by
sudo) finds the same modules. Some of them are compiled, so what is built is for one minor version of Python.
"""

import compileall
import gzip
import hashlib
import importlib.metadata
import io
import os
import platform
import py_compile
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from string import Template

from packaging.requirements import Requirement

HERE = Path(__file__).parent
ROOT = HERE.parent
PYTHON = f"python{sys.version_info.major}.{sys.version_info.minor}"
PREFIX = Path("/usr/lib/tpvpn")
COMMANDS = ("tpvpn", "kubectl-tpvpn", "kubectl_complete-tpvpn")
SCRIPT = f"#!{PREFIX}/bin/python\nimport sys\n\nfrom tpvpn.cli import main\n\nsys.exit(main())\n"
WHEN = (1980, 1, 2, 0, 0, 0)
CONTROL = """\
Package: tpvpn
Version: {version}
Architecture: {architecture}
Maintainer: tpvpn's authors <tpvpn@localhost>
Section: net
Priority: optional
Installed-Size: {size}
Depends: python3 (>= {python}), python3 (<< {next}), libc6
Recommends: sudo
Suggests: bash-completion
Description: a laptop's way into a Kubernetes cluster that is at home beside any VPN
 It routes the cluster's subnets and names to the laptop without taking anything from
 a VPN that has routes of its own, and says what is in the way.
"""


def needed(name: str, found: dict[str, importlib.metadata.Distribution]) -> None:
    """All distributions that one needs at run time, itself included."""
    if name.lower().replace("_", "-") in found:
        return
    found[name.lower().replace("_", "-")] = distribution = importlib.metadata.distribution(name)
    for line in distribution.requires or ():
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            needed(requirement.name, found)


def make_tree(wheel: Path, tree: Path) -> None:
    """The tree, as it is unpacked or installed."""
    site = tree / "lib" / PYTHON / "site-packages"
    site.mkdir(parents=True)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    distributions: dict[str, importlib.metadata.Distribution] = {}
    needed("tpvpn", distributions)
    del distributions["tpvpn"]  # that is the wheel
    for distribution in distributions.values():
        for file in distribution.files or ():
            if ".." not in file.parts and "__pycache__" not in file.parts:
                (site / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(distribution.locate_file(file), site / file)
    (tree / "bin").mkdir()
    for name in COMMANDS:
        (tree / "bin" / name).write_text(SCRIPT)
        (tree / "bin" / name).chmod(0o755)
    compile_all(tree)


def make_deb(tree: Path, version: str, out: Path) -> Path:
    """tpvpn_VERSION_ARCHITECTURE.deb: the tree goes to /usr/lib, for Debian's own interpreter."""
    architecture = subprocess.check_output(["dpkg", "--print-architecture"], text=True).strip()
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory) / "root"
        place(root / PREFIX.relative_to("/"))
        shutil.move(tree, root / PREFIX.relative_to("/"))
        (root / "usr/lib/tpvpn/bin/python").symlink_to(f"/usr/bin/{PYTHON}")
        (root / "usr/lib/tpvpn/pyvenv.cfg").write_text("home = /usr/bin\ninclude-system-site-packages = false\n")
        for name in COMMANDS:
            place(root / "usr/bin" / name)
            (root / "usr/bin" / name).symlink_to(f"../lib/tpvpn/bin/{name}")
        shells = ROOT / "src/tpvpn/cli/shells"
        date = os.environ["SOURCE_DATE_EPOCH"]
        man = subprocess.check_output([sys.executable, "-m", "tpvpn.cli.reference", "man"])
        for path, data in (
            ("share/bash-completion/completions/tpvpn", (shells / "tpvpn.bash").read_bytes()),
            ("share/zsh/vendor-completions/_tpvpn", (shells / "tpvpn.zsh").read_bytes()),
            ("share/fish/vendor_completions.d/tpvpn.fish", (shells / "tpvpn.fish").read_bytes()),
            ("share/man/man1/tpvpn.1.gz", gzip.compress(man, mtime=int(date))),
            ("share/doc/tpvpn/copyright", (ROOT / "LICENSE").read_bytes()),
            ("share/doc/tpvpn/changelog.gz", gzip.compress((ROOT / "CHANGELOG.md").read_bytes(), mtime=int(date))),
            ("lib/systemd/system/tpvpn@.service", (HERE / "systemd/tpvpn@.service").read_bytes()),
        ):
            place(root / "usr" / path).write_bytes(data)
        size = sum(path.lstat().st_size for path in root.rglob("*")) // 1024
        after = f"{sys.version_info.major}.{sys.version_info.minor + 1}"
        words = {"version": version, "architecture": architecture, "size": size}
        control = CONTROL.format(python=PYTHON.removeprefix("python"), next=after, **words)
        place(root / "DEBIAN/control").write_text(control)
        subprocess.run(["chmod", "--recursive", "u=rwX,go=rX", root], check=True)
        deb = out / f"tpvpn_{version}_{architecture}.deb"
        subprocess.run(["dpkg-deb", "--root-owner-group", "-Zgzip", "-z4", "--build", root, deb], check=True, stdout=2)
    return deb


def compile_all(tree: Path) -> None:
    """Compile all modules, so that nothing is written beside them later, least of all by root in a user's home."""
    mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
    inside = {"stripdir": str(tree), "prependdir": str(PREFIX)}
    if not compileall.compile_dir(tree / "lib", quiet=1, workers=0, invalidation_mode=mode, **inside):
        raise SystemExit("packaging/build.py: a module cannot be compiled")


def place(path: Path) -> Path:
    """A path whose directory is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def make_single(tree: Path, out: Path) -> Path:
    """`tpvpn`: one file that unpacks the tree on its first run."""
    packed = io.BytesIO()
    digest = hashlib.sha256()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files(tree):
            digest.update(f"{name}\0{len(data)}\0".encode() + data)
            archive.writestr(zipfile.ZipInfo(name, WHEN), data, zipfile.ZIP_DEFLATED, 1)
        words = {
            "version": PYTHON.removeprefix("python"),
            "tree": digest.hexdigest()[:16],
            "machine": platform.machine(),
        }
        archive.writestr(
            zipfile.ZipInfo("__main__.py", WHEN), Template((HERE / "unpack.py").read_text()).substitute(words)
        )
    single = out / "tpvpn"
    single.write_bytes(b"#!/usr/bin/env python3\n" + packed.getvalue())
    single.chmod(0o755)
    return single


def files(tree: Path) -> Iterator[tuple[str, bytes]]:
    """All files of a tree, in an order that stays."""
    for path in sorted(tree.rglob("*")):
        if path.is_file():
            yield str(path.relative_to(tree)), path.read_bytes()


def make_krew(single: Path, version: str, out: Path, url: str) -> None:
    """The plugin's archive, and the manifest that names it by its hash."""
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    archive = out / f"kubectl-tpvpn_{version}_linux_{machine}.tar.gz"
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name, path, mode in (("kubectl-tpvpn", single, 0o755), ("LICENSE", ROOT / "LICENSE", 0o644)):
            data = path.read_bytes()
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode, entry.mtime = len(data), mode, int(os.environ["SOURCE_DATE_EPOCH"])
            tar.addfile(entry, io.BytesIO(data))
    archive.write_bytes(gzip.compress(packed.getvalue(), 1, mtime=0))
    words = {"version": version, "machine": machine, "python": PYTHON.removeprefix("python")}
    words |= {"uri": f"{url}/{archive.name}", "sha256": hashlib.sha256(archive.read_bytes()).hexdigest()}
    (out / "tpvpn.yaml").write_text(Template((HERE / "krew/tpvpn.yaml").read_text()).substitute(words))


def main(wheel: Path, out: Path, url: str) -> None:
    """All of them, into one directory."""
    os.environ.setdefault("SOURCE_DATE_EPOCH", str(int(time.time())))
    version = importlib.metadata.version("tpvpn")
    with tempfile.TemporaryDirectory() as directory:
        tree = Path(directory) / "tpvpn"
        make_tree(wheel, tree)
        make_krew(make_single(tree, out), version, out, url)
        make_deb(tree, version, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
