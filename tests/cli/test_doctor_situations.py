"""`tpvpn doctor` in situations that are broken on purpose: each is named by the right check, with the right remedy."""

import json
import os
import signal
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from socket import create_server
from typing import Any

import pytest
from api_server import ApiServer, api_server
from laptop import ALLOWED, SERVICE_CIDR, TPVPN, WANTED4, Laptop, lab_with_manager

from peers import eventually, self_signed
from pod import inside
from tpvpn.lab.topology import NODE
from user import NOTHING, WITH_PASSWORD, User, ordinary_user

Found = dict[str, dict[str, Any]]
"""What is not well, by its check."""


@pytest.fixture(scope="module")
def laptop() -> Iterator[Laptop]:
    with lab_with_manager() as laptop:
        yield laptop


@pytest.fixture(scope="module")
def _server(laptop: Laptop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    with api_server(laptop.lab.namespace("node"), NODE, tmp_path_factory.mktemp("api")) as server:
        yield server


@pytest.fixture
def server(_server: ApiServer) -> ApiServer:
    """An API server that is well."""
    _server.reset()
    return _server


def said_by(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    """All checks; the exit code says whether one failed."""
    assert not done.stderr, done.stderr
    checks = json.loads(done.stdout)["checks"]
    assert done.returncode == (1 if any(one["state"] == "failure" for one in checks) else 0)
    return checks


def ill(checks: list[dict[str, Any]]) -> Found:
    return {one["id"]: one for one in checks if one["state"] != "ok"}


def doctor(laptop: Laptop, *words: str, kubeconfig: Path | str = "/none", **environment: str) -> list[dict[str, Any]]:
    variables = [f"{name}={value}" for name, value in {"KUBECONFIG": str(kubeconfig), **environment}.items()]
    return said_by(laptop.run("env", *variables, *TPVPN, "doctor", "--output", "json", *words))


def named(found: Found, identity: str, state: str, sentence: str, remedy: str) -> None:
    """The check says this of it."""
    one = found.get(identity)
    assert one is not None, found
    assert one["state"] == state and sentence in one["sentence"] and remedy in one["remedy"], one


# -- this host ---------------------------------------------------------------------------------------------------------


def bare(script: str, *environment: str) -> Found:
    """In a network namespace and mounts that are nobody else's, after a script."""
    command = ["unshare", "--net", "--mount", "sh", "-ec", f'{script}\nexec "$@"', "sh", "env", "KUBECONFIG=/none"]
    done = subprocess.run(
        [*command, *environment, *TPVPN, "doctor", "--output", "json"], capture_output=True, text=True, timeout=60
    )
    return ill(said_by(done))


def test_no_tun_device_no_ipv6_and_no_kubeconfig() -> None:
    off = "sysctl -qw net.ipv6.conf.all.disable_ipv6=1 net.ipv6.conf.default.disable_ipv6=1"
    found = bare(f"{off}\nmount -t tmpfs none /dev/net")
    named(found, "tun", "failure", "/dev/net/tun is missing", "modprobe tun")
    named(found, "ipv6", "warning", "IPv6 is off", "disable_ipv6=0")
    named(found, "kubeconfig", "warning", "there is no kubeconfig at /none", "--kubeconfig FILE")
    for identity in ("login", "api-server", "rbac", "installed", "clock"):
        assert found[identity]["state"] == "warning" and found[identity]["sentence"].startswith("not looked at: ")


def test_a_tun_device_that_nobody_may_open() -> None:
    found = bare("mount -t tmpfs -o nodev none /dev/net\nmknod -m 666 /dev/net/tun c 10 200")
    named(found, "tun", "failure", "not even by root", "--device /dev/net/tun")
    assert [one for one in found.values() if one["state"] == "failure"] == [found["tun"]]


@pytest.fixture
def user() -> Iterator[User]:
    with ordinary_user() as user:
        yield user


def as_user(laptop: Laptop, user: User, rule: str, before: str = ":", **environment: str) -> Found:
    command = user.shell([*TPVPN, "doctor", "--output", "json"], **environment)
    return ill(said_by(laptop.run(*user.host(["sh", "-ec", f'{before}; exec "$@"', "sh", *command], rule))))


def test_an_ordinary_user_without_sudo(laptop: Laptop, user: User) -> None:
    found = as_user(laptop, user, NOTHING, PATH="/none")
    named(found, "privileges", "failure", "sudo is not installed", "as root")
    named(found, "firewalls", "warning", "needs root", "sudo tpvpn doctor")


def test_a_password_for_sudo_and_a_tun_device_of_roots(laptop: Laptop, user: User) -> None:
    found = as_user(laptop, user, WITH_PASSWORD, "chmod 600 /dev/net/tun")
    named(found, "privileges", "warning", "sudo wants a password", "in sudoers")
    named(found, "tun", "warning", "by root alone", "chmod 666")


# -- kubeconfigs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words", "sentence"),
    [
        ("{", (), "is no kubeconfig"),
        ('{"contexts": [], "clusters": [], "users": []}', ("--context", "prod"), "has no context prod"),
    ],
)
def test_a_kubeconfig_that_is_none(
    laptop: Laptop, tmp_path: Path, text: str, words: tuple[str, ...], sentence: str
) -> None:
    file = tmp_path / "kubeconfig"
    file.write_text(text)
    found = ill(doctor(laptop, *words, kubeconfig=file))
    named(found, "kubeconfig", "failure", sentence, "--context NAME")
    assert found["api-server"]["state"] == "warning"


def plugin(command: object) -> dict[str, Any]:
    said = {"apiVersion": "client.authentication.k8s.io/v1", "command": str(command), "interactiveMode": "Never"}
    return {"exec": said}


def test_an_exec_plugin_that_is_missing(laptop: Laptop, server: ApiServer, tmp_path: Path) -> None:
    found = ill(doctor(laptop, kubeconfig=server.kubeconfig(tmp_path / "k", user=plugin("log-me-in"))))
    named(found, "login", "failure", "runs log-me-in, which is not there", "on PATH")


def test_an_exec_plugin_that_fails(laptop: Laptop, server: ApiServer, tmp_path: Path) -> None:
    script = tmp_path / "log-me-in"
    script.write_text("#!/bin/sh\necho no such realm >&2; exit 3\n")
    script.chmod(0o755)
    found = ill(doctor(laptop, kubeconfig=server.kubeconfig(tmp_path / "k", user=plugin(script))))
    named(found, "login", "failure", "no such realm", "log in to the cluster again")


def test_a_client_certificate_that_has_expired(laptop: Laptop, server: ApiServer, tmp_path: Path) -> None:
    key, request, expired = (str(tmp_path / f"me.{ending}") for ending in ("key", "csr", "crt"))
    asked = ("req", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=me", "-keyout", key, "-out", request)
    signed = ("x509", "-req", "-in", request, "-signkey", key, "-days", "-1", "-out", expired)
    for words in (asked, signed):
        subprocess.run(["openssl", *words], check=True, capture_output=True)
    files = {"client-certificate": expired, "client-key": key}
    found = ill(doctor(laptop, kubeconfig=server.kubeconfig(tmp_path / "k", user=files)))
    named(found, "certificate", "failure", "has expired at 20", "kubeadm certs renew")


# -- API servers -------------------------------------------------------------------------------------------------------


def test_a_cluster_that_is_well(laptop: Laptop, server: ApiServer, tmp_path: Path) -> None:
    checks = doctor(laptop, "--pod-cidr", "172.20.0.0/16", kubeconfig=server.kubeconfig(tmp_path / "k"))
    assert ill(checks) == {}
    by_id = {one["id"]: one["sentence"] for one in checks}
    assert f"https://{NODE}:{server.port} answers in " in by_id["api-server"]
    assert f"{NODE} goes by" in by_id["api-route"] and "lan" in by_id["api-route"]
    assert by_id["rbac"] == "what you may do suffices for a session"
    assert by_id["clock"] == "this host's clock and the API server's agree"
    assert by_id["subnet"] == "pod subnet 172.20.0.0/16 is free to be routed"


def test_a_conflict_a_lack_of_rights_and_a_clock(laptop: Laptop, server: ApiServer, tmp_path: Path) -> None:
    server.ahead = 3600
    server.deny = {("list", "nodes"), ("create", "secrets")}
    found = ill(doctor(laptop, kubeconfig=server.kubeconfig(tmp_path / "k")))
    named(found, "clock", "failure", "60 minutes behind the API server's", "timedatectl set-ntp true")
    named(found, "rbac-cluster-list-nodes", "warning", "you may not list nodes: ", "kubectl create clusterrole ")
    named(found, "rbac", "failure", "may not start one of your own", "tpvpn helm install")
    named(found, "subnet", "failure", "10.0.0.0/8", "tpvpn connect --allow-conflicting-subnets")


@pytest.mark.parametrize(("status", "identity", "state"), [(401, "login", "failure"), (403, "login", "warning")])
def test_who_is_nobody_there(
    laptop: Laptop, server: ApiServer, tmp_path: Path, status: int, identity: str, state: str
) -> None:
    server.status = status
    found = ill(doctor(laptop, kubeconfig=server.kubeconfig(tmp_path / "k")))
    named(found, identity, state, "does not accept" if status == 401 else "forbids", "kubectl auth whoami")
    assert "api-server" not in found, "it answers"


def test_another_authority(laptop: Laptop, server: ApiServer, tmp_path: Path) -> None:
    other = self_signed(tmp_path, "other")
    cluster = {"certificate-authority-data": None, "certificate-authority": str(other.certificate)}
    found = ill(doctor(laptop, kubeconfig=server.kubeconfig(tmp_path / "k", cluster=cluster)))
    named(found, "api-server", "failure", "does not trust", "certificate-authority")


def test_a_server_that_refuses_behind_a_vpns_route(laptop: Laptop, server: ApiServer, tmp_path: Path) -> None:
    """The lab's VPN has 10.0.0.0/8, and hosts there on which no API server listens."""
    cluster = {"server": "https://10.20.0.99:6443"}
    found = ill(doctor(laptop, kubeconfig=server.kubeconfig(tmp_path / "k", cluster=cluster)))
    named(found, "api-server", "failure", "cannot reach the API server https://10.20.0.99:6443: ", "VPN")
    named(found, "api-route", "warning", "10.0.0.0/8 via 10.8.0.1 dev tun0 (openvpn", "leave 10.20.0.99 out")


def test_a_server_that_is_silent(laptop: Laptop, server: ApiServer, tmp_path: Path) -> None:
    with inside(laptop.namespace), create_server(("127.0.0.1", 0)) as silent:
        cluster = {"server": f"https://127.0.0.1:{silent.getsockname()[1]}"}
        found = ill(doctor(laptop, kubeconfig=server.kubeconfig(tmp_path / "k", cluster=cluster)))
    named(found, "api-server", "failure", "did not answer within 4 s", "curl -k https://127.0.0.1")


def test_a_proxy_that_is_not_there(laptop: Laptop, server: ApiServer, tmp_path: Path) -> None:
    file = server.kubeconfig(tmp_path / "k", cluster={"proxy-url": "http://127.0.0.1:9"})
    named(ill(doctor(laptop, kubeconfig=file)), "api-server", "failure", "the proxy 127.0.0.1", "")


def test_a_manager_that_is_broken(laptop: Laptop, server: ApiServer, tmp_path: Path) -> None:
    """Its ConfigMap and Secret are there, and nothing behind its service."""
    place = "/api/v1/namespaces/tpvpn"
    labels = {"app.kubernetes.io/version": "0.0.1"}
    server.objects[f"{place}/configmaps/tpvpn"] = {
        "kind": "ConfigMap",
        "metadata": {"labels": labels},
        "data": {"port": "7070"},
    }
    server.objects[f"{place}/secrets/tpvpn"] = {"kind": "Secret", "data": {"tokens": "YTogYg=="}}
    found = ill(doctor(laptop, kubeconfig=server.kubeconfig(tmp_path / "k")))
    named(found, "installed", "warning", "version 0.0.1", "tpvpn helm upgrade")
    named(found, "transport", "failure", "no way leads to the manager", "kubectl get pods --namespace tpvpn")


# -- sessions ----------------------------------------------------------------------------------------------------------


def test_a_killed_session(laptop: Laptop) -> None:
    with laptop.start(*ALLOWED, "--name", "dead", "--dns", "file", wanted=WANTED4) as session:
        session.wait_ready()
        journal = laptop.directory / "dead" / "journal"
        helper = next(int(one.parts[2]) for one in Path("/proc").glob("[0-9]*/fd/*") if _leads(one, journal))
        for pid in (helper, session.process.pid):
            os.kill(pid, signal.SIGKILL)
        session.wait()
    checks = [one for one in doctor(laptop) if one["id"] == "leftovers"]
    assert [one["state"] for one in checks] == ["failure", "warning", "warning"], checks
    assert "/etc/resolv.conf is that of session dead" in checks[0]["sentence"]
    assert all(one["remedy"] == "sudo tpvpn cleanup" for one in checks)
    assert laptop.tpvpn("cleanup").returncode == 0
    assert "leftovers" not in ill(doctor(laptop))


def _leads(link: Path, to: Path) -> bool:
    try:
        return link.readlink() == to
    except OSError:
        return False


@pytest.fixture(scope="module")
def session(laptop: Laptop) -> Iterator[Laptop]:
    with laptop.connected(*ALLOWED, wanted=WANTED4):
        yield laptop


def test_a_session_that_is_well(session: Laptop) -> None:
    checks = doctor(session)
    assert not [one for one in checks if one["state"] == "failure"]
    by_id = {one["id"]: one["sentence"] for one in checks}
    assert "is answered in " in by_id["transport"] and " ms" in by_id["transport"]
    assert "is connected by " in by_id["manager"] and "answers through the tunnel" in by_id["probe"]
    assert f"{SERVICE_CIDR} is routed" in "\n".join(one["sentence"] for one in checks)


def test_a_route_that_is_shadowed_a_firewall_and_a_small_mtu(session: Laptop) -> None:
    session.sh("nft 'add table ip wall; add chain ip wall o { type filter hook output priority 0; }'")
    session.sh("nft add rule ip wall o oifname tpvpn0 ip daddr 10.132.0.0/16 drop")
    session.sh("ip link set eth0 mtu 900; ip rule add pref 0 to 10.130.0.0/16 lookup main")  # none can be before that
    try:
        found = doctor(session)
    finally:
        session.sh("nft delete table ip wall; ip link set eth0 mtu 1500; ip rule del pref 0 to 10.130.0.0/16")
    named(ill(found), "firewalls", "failure", "10.132.0.0/16 are dropped by chain o", "nft -a list chain ip wall o")
    named(ill(found), "mtu", "warning", "eth0 has an MTU of 900", "ip link set eth0 mtu 1400")
    named(
        ill(found), "subnet", "failure", "10.130.0.0/16 is shadowed by 10.130.0.0/32 via 10.8.0.1 dev tun0", "`ip rule`"
    )


def test_a_bundle(session: Laptop, server: ApiServer, tmp_path: Path) -> None:
    """Secrets of the kubeconfig and of a log are not in it; names only where they may be."""
    log = tmp_path / "state" / "tpvpn" / "default.log"
    log.parent.mkdir(parents=True)
    log.write_text("GET https://api.corp.example/ of ann\nAuthorization: Bearer abc.def\nvery-secret-token\n")
    variables = [f"KUBECONFIG={server.kubeconfig(tmp_path / 'k')}", f"XDG_STATE_HOME={log.parents[1]}"]

    def bundle(name: str, *words: str) -> dict[str, str]:
        file = tmp_path / name
        done = session.run("env", *variables, *TPVPN, "doctor", "--bundle", str(file), *words)
        assert str(file) in done.stderr and file.stat().st_mode & 0o777 == 0o600
        with tarfile.open(file) as archive:
            contents = {one.name.removeprefix("tpvpn-doctor/"): archive.extractfile(one) for one in archive}
            return {name: found.read().decode() for name, found in contents.items() if found}

    plain = bundle("plain.tar.gz")
    assert set(plain) >= {"doctor.json", "status.json", "versions.json", "kubeconfig.json", "network.txt"}
    assert set(plain) >= {"resolv.conf", "nsswitch.conf", "logs/default.log"}
    text = "\n".join(plain.values())
    assert "very-secret-token" not in text and "abc.def" not in text
    assert "api.corp.example" in text and "10.130.0.0/16" in plain["network.txt"]
    assert json.loads(plain["status.json"])["sessions"][0]["name"] == "default"
    redacted = "\n".join(bundle("redacted.tar.gz", "--redact-names").values())
    assert "ann" not in redacted.split() and "corp.example" not in redacted and "user-" in redacted
    again = session.run("env", *variables, *TPVPN, "doctor", "--bundle", str(tmp_path / "plain.tar.gz"))
    assert again.returncode == 2 and "is there already" in again.stderr
    alone = session.tpvpn("doctor", "--redact-names")
    assert alone.returncode == 2 and "give --bundle FILE too" in alone.stderr


def test_a_session_of_another_user(session: Laptop, user: User) -> None:
    found = as_user(session, user, NOTHING)
    named(found, "session", "warning", "this session is another user's", "sudo tpvpn doctor")


def test_a_manager_that_is_gone(session: Laptop) -> None:
    manager = session.process("node", "manager")

    def state() -> str:
        return json.loads(session.tpvpn("status", "--output", "json").stdout)["sessions"][0]["state"]

    os.kill(manager, signal.SIGSTOP)
    try:
        eventually(lambda: state() == "reconnecting", 20, "it is missed")
        named(ill(doctor(session)), "manager", "failure", "default is reconnecting", "see that it runs")
    finally:
        os.kill(manager, signal.SIGCONT)
    eventually(lambda: state() == "ready", 20, "it is back")
