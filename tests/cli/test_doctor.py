"""`tpvpn doctor` on a lab's laptop, with the files, servers and sessions that it speaks of."""

import json
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from laptop import ALLOWED, TPVPN, Laptop, lab_with_manager

from peers import eventually
from resolved_lab import Resolved
from user import UID, ordinary_user

NAME = "kubernetes.default.svc.cluster.local"
STEPS = ["stub", "server", "programs"]
FILES = ["nsswitch", "mdns", "nss-resolve", "firefox", "chromium", "dnssec"]
SESSION = ["session", "resolv.conf", "search"]
MDNS = "files mdns4_minimal [NOTFOUND=return] dns"


@pytest.fixture(scope="module")
def laptop() -> Iterator[Laptop]:
    with lab_with_manager() as laptop:
        yield laptop


@pytest.fixture
def etc(laptop: Laptop) -> Iterator[Callable[[str, str], None]]:
    """Writes a file below the laptop's /etc, which is then as it was."""
    place = laptop.lab.run_directory / "etc"
    before: dict[Path, bytes | None] = {}

    def write(name: str, text: str) -> None:
        file = place / name
        before.setdefault(file, file.read_bytes() if file.exists() else None)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    yield write
    for file, data in before.items():
        file.unlink(missing_ok=True) if data is None else file.write_bytes(data)


class Doctor:
    """What the doctor says on a laptop, with a home that is nobody's."""

    def __init__(self, laptop: Laptop, home: Path) -> None:
        self.laptop, self.home = laptop, home

    def run(self, *options: str) -> subprocess.CompletedProcess[str]:
        return self.laptop.run("env", f"HOME={self.home}", *TPVPN, "doctor", *options)

    def says(self, *options: str) -> dict[str, Any]:
        """It as JSON, whose exit code fits."""
        done = self.run("--output", "json", *options)
        assert not done.stderr, done.stderr
        said = json.loads(done.stdout)
        assert said["schema"] == "tpvpn.doctor/1"
        assert done.returncode == (0 if said["ok"] else 1)
        assert said["ok"] == all(one["ok"] for one in said["checks"])
        for one in said["checks"]:
            assert set(one) == {"group", "id", "state", "ok", "sentence", "remedy"}
            assert (one["state"] == "ok") == (one["remedy"] is None) and one["ok"] == (one["state"] != "failure")
        return said

    def names(self) -> list[str]:
        """The checks on names, by their ids."""
        return [one["id"] for one in self.says()["checks"] if one["group"] == "names"]

    def found(self, *options: str) -> dict[str, dict[str, Any]]:
        """What failed, by its id."""
        return {one["id"]: one for one in self.says(*options)["checks"] if not one["ok"]}


@pytest.fixture
def doctor(laptop: Laptop, tmp_path: Path) -> Doctor:
    return Doctor(laptop, tmp_path)


def test_nothing_is_in_the_way(doctor: Doctor) -> None:
    assert doctor.names() == FILES
    done = doctor.run()
    assert done.returncode == 0 and re.search(r"\n\nnothing is in the way \([0-9]+ warnings\)\n\Z", done.stdout)
    assert "\nNames\n  ok       programs of glibc ask DNS servers\n" in done.stdout and "\x1b" not in done.stdout


def test_a_session_that_works(doctor: Doctor, laptop: Laptop, etc: Callable[[str, str], None]) -> None:
    with laptop.connected(*ALLOWED):
        said = doctor.says()
        assert (said["ok"], said["session"]) == (True, "default"), said
        assert doctor.names() == [*FILES, *SESSION, *STEPS]
        etc("nsswitch.conf", f"hosts: {MDNS}\n")
        assert doctor.found() == {}, "programs do find the name"
    assert set(doctor.found()) == {"mdns"}


def test_every_file(doctor: Doctor, etc: Callable[[str, str], None]) -> None:
    etc("nsswitch.conf", f"passwd: files\nhosts:\t\t{MDNS}\n")
    found = doctor.found()
    assert list(found) == ["mdns"]
    assert "write `hosts: files dns mdns4_minimal` for `hosts: " + MDNS + "`" in found["mdns"]["remedy"]
    etc("nsswitch.conf", "hosts: files\n")
    assert "write `hosts: files dns`" in doctor.found()["nsswitch"]["remedy"]
    etc("nsswitch.conf", "hosts: files dns\n")
    etc("systemd/resolved.conf", "[Resolve]\nDNSSEC=no\n")
    etc("systemd/resolved.conf.d/vpn.conf", "[Resolve]\nDNSSEC=yes\n")
    assert list(doctor.found()) == ["dnssec"]
    etc("systemd/resolved.conf.d/vpn.conf", "")
    for place in ("opt/chrome", "chromium", "opt/edge"):
        policy = f"{place}/policies/managed/company.json"
        etc(policy, '{"DnsOverHttpsMode": "secure", "DnsOverHttpsTemplates": "https://dns.example/q"}')
        assert f"/etc/{policy}" in doctor.found()["chromium"]["sentence"]
        etc(policy, "{}")
    etc("firefox/policies/policies.json", '{"policies": {"DNSOverHTTPS": {"Enabled": true}}}')
    done = doctor.run()
    assert done.returncode == 1
    assert (
        "\n  failure  /etc/firefox/policies/policies.json has Firefox ask a server over HTTPS for names, which knows "
        'none below svc\n             in its "DNSOverHTTPS" write `"ExcludedDomains": ["svc"]`, or `"Enabled": false`\n'
    ) in done.stdout


@pytest.mark.parametrize(
    "place",
    [".mozilla/firefox", "snap/firefox/common/.mozilla/firefox", ".var/app/org.mozilla.firefox/.mozilla/firefox"],
)
def test_every_place_of_a_profile(doctor: Doctor, place: str) -> None:
    profile = doctor.home / place / "a1b2.default-release"
    profile.mkdir(parents=True)
    (profile / "prefs.js").write_text('// Mozilla\nuser_pref("network.trr.mode", 3);\n')
    assert str(profile) in doctor.found()["firefox"]["sentence"]
    (profile / "user.js").write_text('user_pref("network.trr.mode", 5);\n')
    assert doctor.found() == {}


@pytest.mark.parametrize(
    "place",
    [
        ".config/google-chrome",
        ".config/chromium",
        ".config/microsoft-edge",
        "snap/chromium/common/chromium",
        ".var/app/com.google.Chrome/config/google-chrome",
    ],
)
def test_every_place_of_a_state(doctor: Doctor, place: str) -> None:
    state = doctor.home / place / "Local State"
    state.parent.mkdir(parents=True)
    state.write_text(json.dumps({"dns_over_https": {"mode": "secure", "templates": ""}, "long": "x" * 3_000_000}))
    assert str(state) in doctor.found()["chromium"]["sentence"]


def test_files_that_are_none(doctor: Doctor, etc: Callable[[str, str], None]) -> None:
    profile = doctor.home / ".mozilla/firefox/x"
    profile.mkdir(parents=True)
    os.mkfifo(profile / "prefs.js")
    (profile / "user.js").symlink_to("/dev/zero")
    (doctor.home / ".config/chromium/Local State").mkdir(parents=True)
    etc("chromium/policies/managed/x.json", "[" * 200_000)
    (doctor.laptop.lab.run_directory / "etc/chromium/policies/managed/x.json").write_bytes(b"\xff\xfe{")
    assert doctor.found() == {}


def test_another_program_writes_resolv_conf(doctor: Doctor, laptop: Laptop, etc: Callable[[str, str], None]) -> None:
    etc("resolv.conf", "search corp.example\nnameserver 192.0.2.10\n")
    with laptop.connected(*ALLOWED, "--dns", "file") as session:
        ours = laptop.sh("cat /etc/resolv.conf")
        assert doctor.found() == {}
        session.process.send_signal(signal.SIGSTOP)  # it must not see the file half written
        try:
            text = ours.replace("search corp.example ", "search ").replace(
                "nameserver ", "nameserver 192.0.2.10\nnameserver "
            )
            laptop.sh('printf %s "$1" > /etc/resolv.conf', text)
        finally:
            session.process.send_signal(signal.SIGCONT)
        found = doctor.found()
        assert set(found) == {"resolv.conf", "search", "server"}, found
        assert "192.0.2.10 first" in found["resolv.conf"]["sentence"]
        assert "corp.example" in found["search"]["sentence"]
        assert "NXDOMAIN" in found["server"]["sentence"]
        laptop.sh('printf %s "$1" > /etc/resolv.conf', ours)
        assert doctor.found() == {}


def test_of_two_sessions_the_lower_one_is_well(doctor: Doctor, laptop: Laptop) -> None:
    with laptop.connected(*ALLOWED, "--dns", "file"):
        upper = ("--service-cidr", "10.99.0.0/16")
        with laptop.connected("--name", "b", "--dns", "file", "--allow-conflicting-subnets", upper[1], wanted=upper):
            assert doctor.found("--name", "default") == {}
            assert doctor.found("--name", "b") == {}


def test_names_that_are_left_alone(doctor: Doctor, laptop: Laptop) -> None:
    with laptop.connected(*ALLOWED, "--dns", "off"):
        found = doctor.found()
        assert list(found) == ["programs"] and "--dns auto" in found["programs"]["remedy"]
        assert "server" not in [one["id"] for one in doctor.says()["checks"]]


def test_at_which_step_a_name_is_lost(doctor: Doctor, laptop: Laptop, etc: Callable[[str, str], None]) -> None:
    with laptop.connected(*ALLOWED):
        etc("nsswitch.conf", "hosts: files\n")
        found = doctor.found()
        assert set(found) == {"nsswitch", "programs"} and NAME in found["programs"]["sentence"]
        etc("nsswitch.conf", "hosts: files dns\n")
        assert doctor.found() == {}

        laptop.sh("nft 'add table ip lost; add chain ip lost o { type filter hook output priority 0; }'")
        laptop.sh("nft add rule ip lost o udp dport 53 drop")
        try:
            found = doctor.found()
            assert list(found) == ["stub"] and "nobody answers at 246." in found["stub"]["sentence"]
        finally:
            laptop.sh("nft delete table ip lost")
        eventually(lambda: doctor.found() == {}, 15, "well again")


def test_the_cluster_knows_no_such_name_or_is_silent(doctor: Doctor, laptop: Laptop) -> None:
    cluster = laptop.process("cluster", "dnsmasq")
    with laptop.connected(*ALLOWED):
        os.kill(cluster, signal.SIGSTOP)
        try:
            found = doctor.found()
            assert list(found) == ["stub"] and "SERVFAIL" in found["stub"]["sentence"], found
        finally:
            os.kill(cluster, signal.SIGCONT)


def test_systemd_resolved_itself(doctor: Doctor, laptop: Laptop) -> None:
    with Resolved(laptop.lab) as resolved:
        resolved.uplink("eth0", "192.0.2.10")
        resolved.use_nss()
        assert doctor.found() == {}
        resolved.resolvectl("dnssec", "eth0", "yes")
        assert doctor.found()["dnssec"]["remedy"] == "resolvectl dnssec eth0 allow-downgrade"
        laptop.sh("resolvectl dnssec eth0 allow-downgrade")
        assert doctor.found() == {}
        with laptop.connected(*ALLOWED):
            assert doctor.found() == {} and doctor.names() == [*FILES, *SESSION, *STEPS]
            os.kill(resolved.pid, signal.SIGSTOP)
            try:
                found = doctor.found()
            finally:
                os.kill(resolved.pid, signal.SIGCONT)
            assert list(found) == ["server"]
            assert "127.0.0.53" in found["server"]["sentence"] and "resolvectl" in found["server"]["remedy"]


def test_a_resolved_that_does_not_know_of_the_session(doctor: Doctor, laptop: Laptop) -> None:
    with Resolved(laptop.lab) as resolved:
        resolved.uplink("eth0", "192.0.2.10")
        resolved.use_nss()
        with laptop.connected(*ALLOWED, "--dns", "file"):
            assert "hosts: files resolve dns" in doctor.found()["nss-resolve"]["remedy"]


def test_with_the_rights_of_who_called_sudo(laptop: Laptop) -> None:
    with ordinary_user() as user:
        profile = user.home / ".mozilla/firefox/x"
        profile.mkdir(parents=True)
        secret = user.write(".mozilla/firefox/x/prefs.js", 'user_pref("network.trr.mode", 2);\n')
        command = user.host(["env", f"SUDO_UID={UID}", f"SUDO_GID={UID}", *TPVPN, "doctor", "--output", "json"])
        doctor = json.loads(laptop.run(*command).stdout)
        assert [one["id"] for one in doctor["checks"] if not one["ok"]] == ["firefox"]
        os.chown(secret, 0, 0)
        doctor = json.loads(laptop.run(*command).stdout)
        assert doctor["ok"], "what the user may not read is not read"


def test_a_session_name_that_is_none(doctor: Doctor) -> None:
    done = doctor.run("--name", "No Name")
    assert done.returncode == 2 and "no session name" in done.stderr
    assert doctor.says("--name", "other")["session"] is None
