"""The configuration file as commands meet it: where it is, whose it is, `config view`, and `plan` by it."""

import json
import os
import pwd
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pod import namespace, run
from tpvpn.config import KEYS, MAPPINGS, parse

TPVPN = (sys.executable, "-m", "tpvpn")
CLUSTER = ("--service-cidr", "10.130.0.0/16", "--pod-cidr", "10.132.0.0/16")
NOBODY = pwd.getpwnam("nobody")
FILE = """\
client:
  routing:
    allowConflictingSubnets: [10.132.0.0/16]
    alsoProxySubnets:
    - 10.9.0.0/16
    - "no"
    neverProxySubnets: [10.130.9.0/24, fd00::/64]
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home with an empty directory for the configuration."""
    (tmp_path / ".config" / "tpvpn").mkdir(parents=True)
    return tmp_path


@pytest.fixture
def file(home: Path) -> Path:
    return home / ".config" / "tpvpn" / "config.yaml"


def tpvpn(home: Path, *words: str, under: tuple[str, ...] = (), **environment: str) -> subprocess.CompletedProcess[str]:
    """The command with this home, and no more of the environment than PATH."""
    words_of = {"PATH": os.environ["PATH"], "HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1", **environment}
    return subprocess.run([*under, *TPVPN, *words], capture_output=True, text=True, timeout=30, env=words_of)


def values(done: subprocess.CompletedProcess[str]) -> dict[str, tuple[object, str]]:
    """`config view --output json`, by the last word of the key."""
    assert done.returncode == 0, done.stderr
    return {one["key"].rpartition(".")[2]: (one["value"], one["source"]) for one in json.loads(done.stdout)["values"]}


# -- config view -------------------------------------------------------------------------------------------------------


def test_without_a_file(home: Path) -> None:
    done = tpvpn(home, "config", "view")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        "# ~/.config/tpvpn/config.yaml\n"
        "client:\n"
        "  routing:\n"
        "    allowConflictingSubnets: []  # default\n"
        "    alsoProxySubnets: []  # default\n"
        "    neverProxySubnets: []  # default\n"
        '    onConflict: "fail"  # default\n'
        "  dns:\n"
        "    includeSuffixes: []  # default\n"
        "    excludeSuffixes: []  # default\n"
        "    mappings: []  # default\n"
        "serviceCIDRs: []  # default\n"
        "podCIDRs: []  # default\n"
    )
    assert json.loads(tpvpn(home, "config", "view", "--output", "json").stdout) == {
        "schema": "tpvpn.config/1",
        "file": f"{home}/.config/tpvpn/config.yaml",
        "values": [
            {"key": key.name, "value": [] if key.default is None else key.default, "source": "default"} for key in KEYS
        ],
    }


def test_text_can_be_pasted_back(home: Path, file: Path) -> None:
    file.write_text(FILE)
    done = tpvpn(home, "config", "view")
    assert done.stdout == (
        "# ~/.config/tpvpn/config.yaml\n"
        "client:\n"
        "  routing:\n"
        "    allowConflictingSubnets:\n"
        "    - 10.132.0.0/16  # ~/.config/tpvpn/config.yaml:3\n"
        "    alsoProxySubnets:\n"
        "    - 10.9.0.0/16  # ~/.config/tpvpn/config.yaml:5\n"
        '    - "no"  # ~/.config/tpvpn/config.yaml:6\n'
        "    neverProxySubnets:\n"
        "    - 10.130.9.0/24  # ~/.config/tpvpn/config.yaml:7\n"
        "    - fd00::/64  # ~/.config/tpvpn/config.yaml:7\n"
        '    onConflict: "fail"  # default\n'
        "  dns:\n"
        "    includeSuffixes: []  # default\n"
        "    excludeSuffixes: []  # default\n"
        "    mappings: []  # default\n"
        "serviceCIDRs: []  # default\n"
        "podCIDRs: []  # default\n"
    )
    pasted, written = parse(done.stdout.encode(), "pasted"), parse(FILE.encode(), "written")
    for key in KEYS:
        assert [one.value for one in pasted.all(key)] == [one.value for one in written.all(key)]


def test_json_names_every_place(home: Path, file: Path) -> None:
    file.write_text(FILE)
    shown = "~/.config/tpvpn/config.yaml"
    assert values(tpvpn(home, "config", "view", "--output", "json")) == {
        "allowConflictingSubnets": (["10.132.0.0/16"], f"{shown}:3"),
        "alsoProxySubnets": (["10.9.0.0/16", "no"], f"{shown}:5, {shown}:6"),
        "neverProxySubnets": (["10.130.9.0/24", "fd00::/64"], f"{shown}:7"),
        "onConflict": ("fail", "default"),
        "includeSuffixes": ([], "default"),
        "excludeSuffixes": ([], "default"),
        "mappings": ([], "default"),
        "serviceCIDRs": ([], "default"),
        "podCIDRs": ([], "default"),
    }


def test_mappings_are_shown_with_both_names(home: Path, file: Path) -> None:
    file.write_text("client:\n  dns:\n    mappings:\n    - name: db.example.com\n      aliasFor: db.prod\n")
    shown = tpvpn(home, "config", "view")
    assert '    - {name: "db.example.com", aliasFor: "db.prod"}  # ~/.config/tpvpn/config.yaml:4\n' in shown.stdout
    assert parse(shown.stdout.encode(), "pasted").all(MAPPINGS)[0].value == ("db.example.com", "db.prod")
    assert values(tpvpn(home, "config", "view", "--output", "json"))["mappings"] == (
        [{"name": "db.example.com", "aliasFor": "db.prod"}],
        "~/.config/tpvpn/config.yaml:4",
    )


# -- where the file is -------------------------------------------------------------------------------------------------


def test_xdg_config_home_comes_first(home: Path, file: Path) -> None:
    file.write_text("client: {routing: {onConflict: skip}}")
    other = home / "other" / "tpvpn"
    other.mkdir(parents=True)
    (other / "config.yaml").write_text("client: {routing: {onConflict: virtual}}")
    view = ("config", "view", "--output", "json")
    shown = "~/.config/tpvpn/config.yaml:1"
    assert values(tpvpn(home, *view))["onConflict"] == ("skip", shown)
    chosen = values(tpvpn(home, *view, XDG_CONFIG_HOME=str(home / "other")))
    assert chosen["onConflict"] == ("virtual", "~/other/tpvpn/config.yaml:1")
    chosen = values(tpvpn(Path("/"), *view, XDG_CONFIG_HOME=str(home / "other")))
    assert chosen["onConflict"][0] == "virtual"
    assert values(tpvpn(home, *view, XDG_CONFIG_HOME=str(home / "none")))["onConflict"] == ("fail", "default")
    for ignored in ("", "other", "./other"):  # relative paths are invalid
        assert values(tpvpn(home, *view, XDG_CONFIG_HOME=ignored))["onConflict"] == ("skip", shown)


def test_by_sudo_it_is_the_callers(tmp_path: Path) -> None:
    """The variables that sudo leaves, and files that only some may read; sudo itself is tried in tests/helper."""
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents[:2]:
        parent.chmod(parent.stat().st_mode | 0o011)
    passwd = tmp_path / "passwd"
    passwd.write_text(f"root:x:0:0::/root:/bin/sh\nann:x:{NOBODY.pw_uid}:{NOBODY.pw_gid}::{tmp_path}:/bin/sh\n")
    file = tmp_path / ".config" / "tpvpn" / "config.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("client: {routing: {onConflict: skip}}")
    sudo = {"SUDO_UID": str(NOBODY.pw_uid), "SUDO_GID": str(NOBODY.pw_gid)}
    under = ("unshare", "--mount", "sh", "-ec", 'mount --bind "$0" /etc/passwd; exec "$@"', str(passwd))
    view = ("config", "view", "--output", "json")

    assert values(tpvpn(Path("/root"), *view, under=under, **sudo))["onConflict"] == (
        "skip",
        "~/.config/tpvpn/config.yaml:1",
    )
    # Root's own, when nobody called sudo; no rights of root's for what the caller may not read.
    assert values(tpvpn(Path("/nonexistent"), *view, under=under))["onConflict"] == ("fail", "default")
    file.chmod(0o600)
    refused = tpvpn(Path("/root"), *view, under=under, **sudo)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == (
        "tpvpn: cannot read ~/.config/tpvpn/config.yaml: Permission denied; make it a file that you can read\n"
    )
    os.chown(file, NOBODY.pw_uid, NOBODY.pw_gid)
    assert values(tpvpn(Path("/root"), *view, under=under, **sudo))["onConflict"][0] == "skip"


@pytest.mark.parametrize("uid", ["4242424", "ann"])
def test_by_sudo_of_nobody_known(home: Path, uid: str) -> None:
    done = tpvpn(home, "config", "view", SUDO_UID=uid)
    assert (done.returncode, done.stderr) == (
        2,
        f"tpvpn: SUDO_UID is '{uid}', which is no user of this host: unset it\n",
    )


# -- a file that is none -----------------------------------------------------------------------------------------------

BROKEN = "tpvpn: ~/.config/tpvpn/config.yaml"


def refusals(home: Path) -> set[str]:
    """What each command that reads the file says; all must end with 2, and at once."""
    said = set[str]()
    for words in (("config", "view"), ("config", "view", "--output", "json"), ("plan", *CLUSTER)):
        began = time.monotonic()
        done = tpvpn(home, *words)
        assert (done.returncode, done.stdout) == (2, ""), done
        assert time.monotonic() - began < 10
        said.add(done.stderr)
    return said


def test_broken(home: Path, file: Path) -> None:
    file.write_text("client:\n  routing:\n    onConflit: skip\n")
    assert refusals(home) == {f"{BROKEN}:3:5: there is no key client.routing.onConflit: did you mean onConflict?\n"}
    file.write_bytes(b"\xfe")
    assert refusals(home) == {f"{BROKEN}:1:1: byte 0xfe is not UTF-8: save the file as UTF-8 text\n"}


def test_a_directory_in_its_place(home: Path, file: Path) -> None:
    file.mkdir()
    why = "cannot read ~/.config/tpvpn/config.yaml: Is a directory; make it a file that you can read"
    assert refusals(home) == {f"tpvpn: {why}\n"}


def test_a_link_to_itself(home: Path, file: Path) -> None:
    file.symlink_to(file)
    (said,) = refusals(home)
    assert "Too many levels of symbolic links" in said


def test_a_link_that_leads_nowhere(home: Path, file: Path) -> None:
    file.symlink_to("/nowhere")
    (said,) = refusals(home)
    assert "cannot read ~/.config/tpvpn/config.yaml: No such file or directory" in said


def test_a_file_without_end(home: Path, file: Path) -> None:
    file.symlink_to("/dev/zero")
    assert refusals(home) == {f"{BROKEN} is larger than 64 KiB, which no configuration needs: make it smaller\n"}


def test_what_is_empty_is_no_hindrance(home: Path, file: Path) -> None:
    file.symlink_to("/dev/null")
    assert values(tpvpn(home, "config", "view", "--output", "json"))["onConflict"] == ("fail", "default")
    file.unlink()
    os.mkfifo(file)  # nobody writes to it, and nobody waits for that
    assert values(tpvpn(home, "config", "view", "--output", "json"))["onConflict"] == ("fail", "default")


def test_unreadable(tmp_path: Path) -> None:
    directory = tmp_path / "tpvpn"
    directory.mkdir()
    (directory / "config.yaml").write_text("")
    (directory / "config.yaml").chmod(0)
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents[:2]:
        parent.chmod(parent.stat().st_mode | 0o011)
    user = ("setpriv", f"--reuid={NOBODY.pw_uid}", "--clear-groups", "--")
    done = tpvpn(Path("/nonexistent"), "config", "view", under=user, XDG_CONFIG_HOME=str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"tpvpn: cannot read {directory}/config.yaml: Permission denied; make it a file that you can read\n"
    )


def test_the_home_of_another(tmp_path: Path) -> None:
    (tmp_path / ".config" / "tpvpn").mkdir(parents=True)
    (tmp_path / ".config" / "tpvpn" / "config.yaml").write_text("broken")
    tmp_path.chmod(0o700)
    user = ("setpriv", f"--reuid={NOBODY.pw_uid}", "--clear-groups", "--")
    assert values(tpvpn(tmp_path, "config", "view", "--output", "json", under=user))["onConflict"][1] == "default"


# -- plan by it --------------------------------------------------------------------------------------------------------


def plan(name: str, home: Path, *words: str) -> tuple[int, dict[str, tuple[str, str]], dict[str, object]]:
    """Exit code, verdict and source by subnet, and all of the plan."""
    done = tpvpn(home, "plan", *CLUSTER, *words, "--output", "json", under=("ip", "netns", "exec", name))
    shown = json.loads(done.stdout)
    return done.returncode, {one["cidr"]: (one["verdict"], one["source"]) for one in shown["subnets"]}, shown


def test_plan_obeys_the_file_and_flags_lie_over_it(home: Path, file: Path) -> None:
    with namespace("config") as name:
        run("ip", "-n", name, "link", "add", "tun0", "type", "veth", "peer", "name", "far")
        run("ip", "-n", name, "addr", "add", "192.0.2.2/24", "dev", "tun0")
        for device in ("tun0", "far"):
            run("ip", "-n", name, "link", "set", device, "up")
        run("ip", "-n", name, "route", "add", "10.0.0.0/8", "via", "192.0.2.1")
        service, pod, also = "10.130.0.0/16", "10.132.0.0/16", "10.9.0.0/16"
        line = "~/.config/tpvpn/config.yaml line"

        code, verdicts, _ = plan(name, home)
        assert code == 3 and [verdicts[one][0] for one in (service, pod)] == ["conflict", "conflict"]

        file.write_text(FILE.replace('    - "no"\n', "").replace("10.132", "10.130.0.0/16, 10.132"))
        code, verdicts, shown = plan(name, home)
        assert (code, verdicts) == (
            3,
            {
                service: ("routed", "--service-cidr"),
                pod: ("routed", "--pod-cidr"),
                also: ("conflict", f"{line} 5"),
            },
        )
        never = {one["cidr"]: one["reason"] for one in shown["never_proxy"]}  # type: ignore[attr-defined]
        assert never == {"10.130.9.0/24": f"{line} 6", "fd00::/64": f"{line} 6"}
        text = tpvpn(home, "plan", *CLUSTER, under=("ip", "netns", "exec", name)).stdout.replace("\\\n", "")
        commands = [shlex.split(line) for line in text.splitlines() if line.startswith("  tpvpn connect")]
        assert len(commands) == 4 and all(set(CLUSTER) < set(command) for command in commands)
        assert not any("--never-proxy" in command for command in commands)  # that is in the file

        code, verdicts, _ = plan(name, home, "--allow-conflicting-subnets", also)
        assert code == 0 and {verdict for verdict, _ in verdicts.values()} == {"routed"}

        file.write_text(file.read_text() + "    onConflict: skip\n")
        assert plan(name, home)[0] == 0
        assert plan(name, home, "--on-conflict", "fail")[0] == 3

        both = tpvpn(home, "plan", *CLUSTER, "--never-proxy", also, under=("ip", "netns", "exec", name))
        assert both.returncode == 2
        assert f"{also} is both also-proxy ({line} 5) and never-proxy (--never-proxy)" in both.stderr
