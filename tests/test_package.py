"""What scripts/package builds, installed and used: in a root of its own, on the lab's laptop, with a real session."""

import hashlib
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from string import Template

import pytest
import yaml

from tpvpn import __version__
from tpvpn.lab.lab import Lab

ROOT = Path(__file__).parent.parent
URL = "https://example.com/files"
PACKAGE = """
set -e
mount -t tmpfs tmpfs "$1"
mkdir "$1/upper" "$1/work" "$1/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$1/upper,workdir=$1/work" "$1/root"
for place in dev proc sys; do mount --rbind "/$place" "$1/root/$place"; done
cp "$2" "$1/root/tpvpn.deb"
shift_root=$1
inside() { chroot "$shift_root/root" "$@"; }
inside dpkg --force-unsafe-io --install /tpvpn.deb >&2
shift 2
inside tpvpn --version
inside kubectl-tpvpn plan --service-cidr 10.130.0.0/16
inside kubectl_complete-tpvpn lab u
inside mandoc -T lint -W warning /usr/share/man/man1/tpvpn.1.gz
inside zsh -fic 'autoload -U compinit; compinit -D -u; echo "${_comps[tpvpn]}"'
inside tpvpn connect --dns off --token-file "$token" "$@"
inside dpkg --purge tpvpn >&2
echo "left: $(find "$shift_root/upper" -path '*tpvpn*' ! -name tpvpn.deb ! -path '*/run/*' ! -path '*/.local/state/*')"
"""
"""What purge leaves is looked for; the log of a session is its user's."""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory with all that is built."""
    out = tmp_path_factory.mktemp("package")
    subprocess.run([ROOT / "scripts" / "package", URL], env={**os.environ, "OUT": str(out)}, check=True, timeout=200)
    return out


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    lab = Lab(f"pk{os.getpid()}", vpn="none")
    lab.up()
    try:
        lab.start_manager()
        yield lab
    finally:
        lab.down()


def words(lab: Lab) -> list[str]:
    """The rest of `connect`, around a page of the cluster."""
    manager = ["--manager", f"tcp://{lab.manager}", "--service-cidr", "10.130.0.0/16"]
    return [*manager, "--", "curl", "--silent", "--max-time", "5", "http://10.130.0.80/"]


def test_the_debian_package_connects_and_leaves_nothing(built: Path, lab: Lab, tmp_path: Path) -> None:
    (package,) = built.glob("*.deb")
    script = f"token={lab.token_file}\n{PACKAGE}"
    ran = lab.run("laptop", ["unshare", "--mount", "sh", "-c", script, "sh", str(tmp_path), str(package), *words(lab)])
    assert ran.returncode == 0, ran.stderr
    version, *plan, offered, last, function, page, left = ran.stdout.splitlines()
    assert version == f"tpvpn {__version__}"
    assert plan[0] == "connect would go ahead: of 1 subnet, 1 routed."
    assert (offered.partition("\t")[0], last, function) == ("up", ":4", "_tpvpn")
    assert page == "cluster 10.130.0.80"
    assert left == "left: "


def test_the_one_file_connects(built: Path, lab: Lab) -> None:
    written = "find /var/cache/tpvpn/* -newer /var/cache/tpvpn/*/pyvenv.cfg -type f"
    script = f'mount -t tmpfs tmpfs /var/cache && "$@" && ls /var/cache/tpvpn && {written}'
    connect = [str(built / "tpvpn"), "connect", "--dns", "off", "--token-file", str(lab.token_file), *words(lab)]
    ran = lab.run("laptop", ["unshare", "--mount", "sh", "-c", script, "sh", *connect])
    assert ran.returncode == 0, ran.stderr
    page, *trees = ran.stdout.splitlines()
    assert page == "cluster 10.130.0.80"
    assert len(trees) == 1, "and nothing was written into it"


def test_the_one_file_is_a_plugin_and_any_users(built: Path, tmp_path: Path) -> None:
    (archive,) = built.glob("kubectl-tpvpn_*.tar.gz")
    os.chmod(tmp_path, 0o777)
    for directory in list(tmp_path.parents)[:2]:
        os.chmod(directory, 0o755)
    with tarfile.open(archive) as tar:
        assert tar.getnames() == ["kubectl-tpvpn", "LICENSE"]
        tar.extractall(tmp_path, filter="data")

    def run(cache: Path, *words: str) -> subprocess.CompletedProcess[str]:
        nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
        environment = {"PATH": "/usr/bin:/bin", "XDG_CACHE_HOME": str(cache)}
        command = [*nobody, "/usr/bin/python3", tmp_path / "kubectl-tpvpn", *words]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    assert run(tmp_path / "cache", "--help").stdout.startswith("usage: kubectl tpvpn ")
    assert run(tmp_path / "cache", "version").stdout == f"tpvpn {__version__}\n"
    refused = run(Path("/proc"), "version")
    assert refused.returncode == 1
    assert refused.stderr.startswith("tpvpn: cannot unpack into /proc/tpvpn (")
    os.rename(tmp_path / "cache", tmp_path / "theirs")
    subprocess.run(["chown", "--recursive", "1:1", tmp_path / "theirs"], check=True)
    refused = run(tmp_path / "theirs", "version")
    assert "is another user's: set XDG_CACHE_HOME" in refused.stderr


def test_the_one_file_says_which_python_it_wants(tmp_path: Path) -> None:
    text = Template((ROOT / "packaging" / "unpack.py").read_text())
    (tmp_path / "tpvpn").write_text(text.substitute(version="3.99", machine=os.uname().machine, tree="0"))
    refused = subprocess.run([sys.executable, tmp_path / "tpvpn"], capture_output=True, text=True)
    assert refused.returncode == 1
    machine = os.uname().machine
    assert refused.stderr == (
        f"tpvpn: this file is for Python 3.99 on {machine}: run it as `python3.99 FILE`, or take the one for yours\n"
    )


def test_krews_manifest_names_the_archive(built: Path) -> None:
    manifest = yaml.safe_load((built / "tpvpn.yaml").read_text())
    assert manifest["apiVersion"] == "krew.googlecontainertools.github.com/v1alpha2"
    assert (manifest["kind"], manifest["metadata"]) == ("Plugin", {"name": "tpvpn"})
    spec = manifest["spec"]
    assert spec["version"] == f"v{__version__}"
    assert 0 < len(spec["shortDescription"]) <= 50
    assert spec["description"] and spec["caveats"]
    (platform,) = spec["platforms"]
    assert set(platform) == {"selector", "uri", "sha256", "bin", "files"}
    assert platform["selector"]["matchLabels"]["os"] == "linux"
    archive = built / platform["uri"].removeprefix(f"{URL}/")
    assert platform["sha256"] == hashlib.sha256(archive.read_bytes()).hexdigest()
    with tarfile.open(archive) as tar:
        assert {one["from"] for one in platform["files"]} == set(tar.getnames())
        assert tar.getmember(platform["bin"]).mode & 0o111


def test_the_wheel_has_what_is_no_module(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for path in (path for path in (ROOT / "src").rglob("*") if path.is_file() and "__pycache__" not in path.parts):
        assert str(path.relative_to(ROOT / "src")) in names
    assert len(list(built.glob("tpvpn-*.tar.gz"))) == 1
