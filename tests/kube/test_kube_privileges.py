"""Who reads the kubeconfig and runs its plugins, however tpvpn is started: always the user, with no capability.

With a real sudo. The API server answers where a session is wanted; elsewhere there is none, and the plugin tells all.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import yaml
from kubernetes_lab import ADMIN, IMAGE, LAPTOP, Kubernetes

from peers import eventually
from user import ALLOWED, GROUP, NAME, NOTHING, PATH, UID, WITH_PASSWORD, User, ordinary_user

TPVPN = (sys.executable, "-m", "tpvpn")
NOWHERE = "https://127.0.0.1:1"
SUDO = ("sudo", "-n")
NONE = "0" * 16


@pytest.fixture
def user() -> Iterator[User]:
    with ordinary_user() as user:
        yield user


def run(user: User, argv: Sequence[str], rule: str = NOTHING, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the user's, without a terminal, in a network of its own, to its end."""
    command = ["unshare", "--net", "setsid", "--wait", *user.host(user.shell(argv, **environment), rule)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def is_the_users_alone(user: User) -> dict[str, str]:
    """The plugin, and the process that ran it, were the user's and had no capability; the plugin's environment."""
    for status in (user.status("plugin"), user.status("tpvpn")):
        assert status["Uid"].split() == status["Gid"].split() == [str(UID)] * 4
        assert sorted(status["Groups"].split()) == [str(UID), str(GROUP)]
        assert [status[f"Cap{kind}"] for kind in ("Inh", "Prm", "Eff", "Amb")] == [NONE] * 4
    seen = user.environment()
    assert (seen["HOME"], seen["USER"], seen["LOGNAME"]) == (str(user.home), NAME, NAME)
    return seen


def test_started_as_the_user_the_environment_is_the_users_own(user: User) -> None:
    user.log_in(NOWHERE)
    elsewhere = user.home / "elsewhere"
    user.kubeconfig.rename(elsewhere)
    ended = run(user, [*TPVPN, "connect"], ALLOWED, KUBECONFIG=str(elsewhere), CLOUD_KEY="secret")
    assert ended.returncode == 4, ended.stderr
    seen = is_the_users_alone(user)
    assert seen["CLOUD_KEY"] == "secret"
    assert seen["PATH"].startswith(f"{user.home}/bin:")
    assert seen["KUBECONFIG"] == str(elsewhere)


@pytest.mark.parametrize("command", ["connect", "plan"])
def test_started_by_sudo_the_plugin_is_the_users(user: User, command: str) -> None:
    user.log_in(NOWHERE)
    user.kubeconfig.write_text(user.kubeconfig.read_text().replace("tell-who", str(user.home / "bin" / "tell-who")))
    ended = run(user, [*SUDO, *TPVPN, command], ALLOWED)
    assert ended.returncode == 4, ended.stderr
    assert NOWHERE in ended.stderr
    is_the_users_alone(user)


def test_sudo_may_keep_the_kubeconfig(user: User) -> None:
    user.log_in(NOWHERE)
    elsewhere = user.home / "elsewhere"
    user.kubeconfig.rename(elsewhere)
    elsewhere.write_text(elsewhere.read_text().replace("tell-who", str(user.home / "bin" / "tell-who")))
    sudo = (*SUDO, "--preserve-env=KUBECONFIG")
    ended = run(user, [*sudo, *TPVPN, "connect"], ALLOWED, KUBECONFIG=str(elsewhere))
    assert ended.returncode == 4, ended.stderr
    assert is_the_users_alone(user)["KUBECONFIG"] == str(elsewhere)


def test_a_services_plugin_has_not_its_capability(user: User) -> None:
    user.log_in(NOWHERE)
    ambient = ["setpriv", "--inh-caps=+net_admin", "--ambient-caps=+net_admin"]
    become, *shell = user.shell([*TPVPN, "connect"])
    assert become == ambient[0]
    ended = subprocess.run(
        ["unshare", "--net", *user.host([*ambient, *shell])], capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 4, ended.stderr
    is_the_users_alone(user)


def readers(file: Path) -> set[tuple[str, str]]:
    """Effective uid and capabilities of each process that has the file open, but this one."""
    found = set[tuple[str, str]]()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            if any(os.path.samefile(one, file) for one in (process / "fd").iterdir()):
                status = (process / "status").read_text()
                uid = re.search(r"^Uid:\t\d+\t(\d+)", status, re.M)
                effective = re.search(r"^CapEff:\t(\w+)", status, re.M)
                assert uid and effective
                found |= {(uid[1], effective[1])} if process.name != str(os.getpid()) else set()
    return found


@pytest.mark.parametrize("command", ["connect", "plan"])
def test_nobody_with_roots_rights_opens_the_kubeconfig(user: User, command: str) -> None:
    """It is a pipe: whoever opens it waits there to be looked at."""
    text = user.log_in(NOWHERE)
    user.kubeconfig.unlink()
    os.mkfifo(user.kubeconfig)
    user.kubeconfig.chmod(0o644)
    ended = list[subprocess.CompletedProcess[str]]()
    running = threading.Thread(target=lambda: ended.append(run(user, [*SUDO, *TPVPN, command], ALLOWED)))
    running.start()
    opened: set[tuple[str, str]] = set()
    with user.kubeconfig.open("r+b", buffering=0) as pipe:  # to read too: opening a pipe that nobody reads would wait
        eventually(lambda: bool(opened.update(readers(user.kubeconfig)) or opened), 5, "a reader")
        pipe.write(text.encode())
    running.join()
    assert opened == {(str(UID), NONE)}
    assert ended[0].returncode == 4, ended[0].stderr
    assert f"runs tell-who, which is not there: PATH is {PATH}" in ended[0].stderr, "sudo's PATH is another"


# -- with a cluster ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def token(cluster: Kubernetes) -> Iterator[str]:
    """Of one who may all in namespace `privileges`, and may look around."""
    with cluster.namespace("privileges") as namespace:
        cluster.kubectl("create", "serviceaccount", "ann", "--namespace", namespace)
        account = f"--serviceaccount={namespace}:ann"
        cluster.kubectl("create", "clusterrolebinding", "privileges-ann", "--clusterrole=cluster-admin", account)
        try:
            yield cluster.kubectl("create", "token", "ann", "--namespace", namespace).strip()
        finally:
            cluster.kubectl("delete", "clusterrolebinding", "privileges-ann")


def log_in(user: User, token: str) -> None:
    admins = yaml.safe_load(ADMIN.read_text())["clusters"][0]["cluster"]
    user.log_in(admins["server"], token, admins["certificate-authority-data"], "privileges")


CONNECT = ("connect", "--name", "privileges", "--image", IMAGE)


def on_the_laptop(user: User, argv: Sequence[str], rule: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the user's, without a terminal, on the cluster's laptop, to its end."""
    command = ["nsenter", f"--net=/run/netns/{LAPTOP}", "setsid", "--wait", *user.host(user.shell(argv), rule)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100)


def made(cluster: Kubernetes) -> str:
    """What of a manager there is."""
    return cluster.kubectl("get", "jobs,pods,secrets", "--namespace", "privileges", "--output", "name")


@pytest.mark.parametrize("sudo", [(), SUDO], ids=["by the user", "by sudo"])
def test_a_session_is_the_users_own(user: User, cluster: Kubernetes, token: str, sudo: tuple[str, ...]) -> None:
    log_in(user, token)
    user.kubeconfig.write_text(user.kubeconfig.read_text().replace("tell-who", str(user.home / "bin" / "tell-who")))
    inside = "id -u; grep -c '^Cap[EPA].*0000000000000000$' /proc/self/status; grep CapEff /proc/$PPID/status"
    inside += "; ping -c 1 -W 3 10.130.0.10 >&2; ip route get 10.130.0.10"
    ended = on_the_laptop(user, [*sudo, *TPVPN, *CONNECT, "--", "sh", "-c", inside], ALLOWED)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[:3] == [str(UID), "3", f"CapEff:\t{NONE}"]
    assert "dev tpvpn-privileg" in ended.stdout
    is_the_users_alone(user)
    eventually(lambda: not made(cluster), 30, "nothing is left")


def test_run_needs_no_sudo(user: User, cluster: Kubernetes, token: str) -> None:
    log_in(user, token)
    inside = "id -u; ping -c 1 -W 3 10.130.0.10 >&2; ip route get 10.130.0.10"
    ended = on_the_laptop(user, [*TPVPN, "run", "--image", IMAGE, "--", "sh", "-c", inside], NOTHING)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[0] == str(UID)
    assert "dev tpvpn0" in ended.stdout
    is_the_users_alone(user)
    eventually(lambda: not made(cluster), 30, "nothing is left")


def test_a_plan_by_sudo_is_the_users_own(user: User, cluster: Kubernetes, token: str) -> None:
    log_in(user, token)
    user.kubeconfig.write_text(user.kubeconfig.read_text().replace("tell-who", str(user.home / "bin" / "tell-who")))
    ended = on_the_laptop(user, [*SUDO, *TPVPN, "plan", "--output", "json"], ALLOWED)
    assert ended.returncode == 0, ended.stderr
    assert "needs root" in " ".join(json.loads(ended.stdout)["warnings"])
    is_the_users_alone(user)


@pytest.mark.parametrize("rule", [WITH_PASSWORD, NOTHING], ids=["a password is wanted", "not allowed"])
def test_a_sudo_that_refuses_comes_before_anything_is_made(
    user: User, cluster: Kubernetes, token: str, rule: str
) -> None:
    log_in(user, token)
    eventually(lambda: not made(cluster), 30, "what other tests made is gone")
    ended = on_the_laptop(user, [*TPVPN, *CONNECT], rule)
    assert ended.returncode == 5, ended.stderr
    last = ended.stderr.splitlines()[-1]
    assert last.startswith("tpvpn: sudo did not start the root helper")
    assert f"`sudo {sys.executable} -m tpvpn connect --name privileges --image {IMAGE}`" in last
    assert f"`{sys.executable} -I -m tpvpn.helper.root`" in last
    assert not made(cluster)
