"""`tpvpn run`: an ordinary user's command has the cluster, the VPN and the laptop's network, which is unchanged."""

import contextlib
import errno
import json
import os
import pty
import re
import shlex
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from laptop import TPVPN, WANTED, Laptop
from loopback_api_server import ACCOUNT, api_server

from peers import eventually
from tpvpn.lab.topology import NODE, PODS, PODS6, SERVICES, SERVICES6, TWINS, TWINS6, VPN_HOSTS, VPN_HOSTS6
from tpvpn.sandbox.namespaces import why
from user import User, ordinary_user

LAN = "192.0.2.2"
"""The laptop's own address there."""
VPN_RESOLVER = "10.0.0.1"
RESOLVED = "/run/systemd/resolve/io.systemd.Resolve"
"""Where systemd-resolved is asked by the resolver library, which must not be: it knows nothing of the cluster."""


@pytest.fixture(scope="module")
def user(laptop: Laptop) -> Iterator[User]:
    with ordinary_user() as user:
        yield user


@contextlib.contextmanager
def unchanged(laptop: Laptop) -> Iterator[None]:
    """Nothing of it is left on the laptop in the end."""
    before = laptop.state()
    yield
    laptop.is_as(before)


def command(laptop: Laptop, user: User, *argv: str, options: tuple[str, ...] = ()) -> list[str]:
    """What has the user run `argv` inside; the process that it starts is tpvpn's."""
    link = user.link(laptop.lab.manager, laptop.lab.token_file.read_text())
    return laptop.command(user.host(user.shell([*TPVPN, "run", *link, *WANTED, *options, "--", *argv])))


def run(laptop: Laptop, user: User, *argv: str, options: tuple[str, ...] = ()) -> "subprocess.CompletedProcess[str]":
    with unchanged(laptop):
        return subprocess.run(command(laptop, user, *argv, options=options), capture_output=True, text=True, timeout=30)


class Shell:
    """A shell that runs inside and is told what to do."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        self.pid, self.namespace = map(int, self.ask("echo $$ $(stat -Lc %i /proc/self/ns/net)").split())

    def ask(self, line: str) -> str:
        """What it says to a command, in one line."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def helper(self) -> int:
        """The process that the namespaces are made by."""
        (pid,) = (one for one in processes_in(self.namespace) if one != self.pid)
        return pid

    def ends(self, code: int) -> None:
        """It must end with this code, and nothing of it may be left."""
        assert self.process.wait(10) == code
        eventually(lambda: not processes_in(self.namespace), 3, "nothing is in the namespace, so there is none")


@contextlib.contextmanager
def shell(laptop: Laptop, user: User) -> Iterator[Shell]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with unchanged(laptop), subprocess.Popen(command(laptop, user, "sh"), text=True, **pipes) as process:
        try:
            yield Shell(process)
        finally:
            process.kill()


def processes_in(namespace: int) -> list[int]:
    found: list[int] = []
    for one in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.stat(one / "ns" / "net").st_ino == namespace:
                found.append(int(one.name))
    return found


def curl(*hosts: str) -> str:
    urls = (f"http://[{host}]/" if host.count(":") > 1 else f"http://{host}/" for host in hosts)
    return shlex.join(["curl", "--silent", "--show-error", "--globoff", "--fail", *urls])


def reached(who: str, targets: tuple[str, ...]) -> list[str]:
    return [f"{who} {target}" for target in targets]


@contextlib.contextmanager
def served(laptop: Laptop) -> Iterator[str]:
    """A server of the laptop's own that answers once; where."""
    listening = laptop.socket(socket.AF_INET)
    listening.bind((LAN, 0))
    listening.listen()

    def answer() -> None:
        with contextlib.suppress(OSError), listening.accept()[0] as connected:
            connected.recv(4096)
            connected.sendall(b"HTTP/1.0 200 OK\r\n\r\nlaptop\n")

    answering = threading.Thread(target=answer)
    answering.start()
    try:
        yield f"{LAN}:{listening.getsockname()[1]}"
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        answering.join()


def test_everything_is_reached_by_its_own_way(laptop: Laptop, user: User) -> None:
    """The cluster by the tunnel; the VPN's hosts, the LAN's and the laptop's own address as the laptop does."""
    cluster = (*SERVICES[:2], *PODS[:1], *SERVICES6[:1], *PODS6[:1])
    vpn, lan = (*VPN_HOSTS, *VPN_HOSTS6), (*TWINS, *TWINS6)
    with served(laptop) as own:
        done = run(laptop, user, "sh", "-ec", curl(*cluster, *vpn, *lan, "web.default", "www.example.com", own))
    assert done.returncode == 0, done.stderr
    *numbers, web, public, last = done.stdout.splitlines()
    assert numbers == reached("cluster", cluster) + reached("vpn", vpn) + reached("cluster", lan)
    assert web in reached("cluster", (SERVICES[1], SERVICES6[0]))
    assert public in reached("cluster", (TWINS[3], TWINS6[0]))
    assert last == "laptop"


def test_a_cluster_by_a_kubeconfig(laptop: Laptop, user: User) -> None:
    """Whose API server is at the laptop's 127.0.0.1, as kind has it, and whose plugin is the user and no more."""
    with api_server(laptop) as url, unchanged(laptop):
        user.log_in(url, ACCOUNT)
        argv = user.shell([*TPVPN, "run", "--", "sh", "-ec", curl("web", SERVICES[0], PODS6[0], VPN_HOSTS[0])])
        done = subprocess.run(laptop.command(user.host(argv)), capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    web, *numbers = done.stdout.splitlines()
    assert web in reached("cluster", (SERVICES[1], SERVICES6[0]))
    assert numbers == reached("cluster", (SERVICES[0], PODS6[0])) + reached("vpn", VPN_HOSTS[:1])
    assert int(user.status("plugin")["CapEff"], 16) == 0


def test_what_is_in_tmp_is_there_too(laptop: Laptop, user: User, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    for one in (tmp_path.parent, tmp_path.parent.parent):
        one.chmod(0o755)
    (tmp_path / "file").write_text("here\n")
    done = run(laptop, user, "sh", "-c", f"cd {shlex.quote(str(tmp_path))} && cat file")
    assert done.returncode == 0 and done.stdout.startswith("here\n"), done.stderr


def test_without_a_vpn(laptop: Laptop, user: User) -> None:
    laptop.lab.vpn_down()
    try:
        done = run(laptop, user, "sh", "-ec", curl(SERVICES[1], TWINS[0]))
        assert (done.returncode, done.stdout) == (0, f"cluster {SERVICES[1]}\ncluster {TWINS[0]}\n"), done.stderr
    finally:
        laptop.lab.vpn_up()
        laptop.settle()


def test_the_command_is_the_user_in_a_place_of_its_own(laptop: Laptop, user: User) -> None:
    """And two at once, each with a network namespace, while the laptop has nothing new; errors are the real ones."""
    before = laptop.state()
    with shell(laptop, user) as one, shell(laptop, user) as other:
        assert laptop.state() == before
        assert one.namespace != other.namespace
        assert one.ask("id -u; :") == str(user.home.stat().st_uid)
        assert one.ask("pwd") == str(Path.cwd())
        assert one.ask("echo $HOME") == str(user.home)
        status = one.ask(f"{shlex.join(TPVPN)} status --output json | tr -d '\\n'; echo")
        assert [session["state"] for session in json.loads(status)["sessions"]] == ["ready"]
        assert laptop.tpvpn("status").stdout == "no session runs here\n"
        assert int(one.ask("grep CapEff: /proc/self/status | cut -f2"), 16) == 0
        for running in one, other:
            assert running.ask(curl(SERVICES[1])) == f"cluster {SERVICES[1]}"
            assert running.ask(curl(VPN_HOSTS[0])) == f"vpn {VPN_HOSTS[0]}"
        for port, host in ((9, NODE), (80, "10.9.9.9")):  # refused by the host, and by a router on the way
            connecting = f"bash -c 'exec 3<>/dev/tcp/{host}/{port}' 2>&1 | head -1 | grep -o '[^:]*$'"
            assert one.ask(connecting) == laptop.sh(connecting).strip()
        assert one.ask(f"ping -c1 -W3 {PODS[0]} | grep -c ttl=; ") == "1"
        assert one.ask(f"ping -c1 -W3 {NODE} | grep -c ttl=; ") == "1"
        for running in one, other:
            assert running.process.stdin
            running.process.stdin.write("exit 5\n")
            running.process.stdin.flush()
            running.ends(5)


def test_names_when_a_vpn_brings_its_own_resolver(laptop: Laptop, user: User) -> None:
    """It puts another file in the place of /etc/resolv.conf, which takes what stood in its place inside with it."""
    bound = f"import socket; socket.socket(socket.AF_UNIX).bind('{RESOLVED}')"
    restart = 'mkdir -p "${1%/*}"; rm -f "$1"; python3 -c "$2"'
    laptop.sh(restart, RESOLVED, bound)
    with shell(laptop, user) as running:
        assert running.ask(curl("web.default")).startswith("cluster ")
        found = "(getent ahostsv4 {} || echo none) | head -1"
        assert running.ask(found.format("wiki.corp.example")) == "none"
        assert [running.ask("stat -c %F " + RESOLVED) for _ in range(2)] == ["character special file"] * 2
        before = laptop.sh("cat /etc/resolv.conf")
        put = 'printf %s "$1" >/etc/resolv.new; mv /etc/resolv.new /etc/resolv.conf'
        try:
            laptop.sh(restart, RESOLVED, bound)
            laptop.sh(put, f"nameserver {VPN_RESOLVER}\nsearch corp.example\n")
            searched = "search corp.example default.svc.cluster.local"  # by its own file again, not the host's
            eventually(lambda: running.ask("grep ^search /etc/resolv.conf") == searched, 5, searched)
            assert running.ask(found.format("wiki.corp.example")).startswith(VPN_HOSTS[1])
            assert running.ask(found.format("wiki")).startswith(VPN_HOSTS[1])
            assert running.ask(curl("web.default")).startswith("cluster ")
            assert running.ask("stat -c %F " + RESOLVED) == "character special file"
        finally:
            laptop.sh(put, before)
            laptop.sh('rm "$1"', RESOLVED)


@pytest.mark.parametrize(
    ("argv", "code"),
    [(["sh", "-c", "kill -KILL $$"], 137), (["no-such-command"], 127)],
    ids=["SIGKILL", "not found"],
)
def test_the_exit_code_is_the_commands_own(laptop: Laptop, user: User, argv: list[str], code: int) -> None:
    done = run(laptop, user, *argv)
    assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr


def test_the_command_hears_the_signal(laptop: Laptop, user: User) -> None:
    trap = ["sh", "-c", "trap 'exit 9' TERM; kill -TERM $PPID; while :; do sleep 0.05; done"]
    assert run(laptop, user, *trap).returncode == 9


def test_the_terminal_is_the_commands(laptop: Laptop, user: User) -> None:
    """Ctrl-C in it ends what runs in a shell, not the shell; job control works."""
    pid, terminal = pty.fork()
    if pid == 0:
        argv = command(laptop, user, "bash", "--norc", "-i")
        os.execvp(argv[0], argv)
    said = b""

    def hears(pattern: bytes) -> bool:
        nonlocal said
        with contextlib.suppress(OSError):
            said += os.read(terminal, 4096)
        return re.search(pattern, said) is not None

    try:
        os.write(terminal, b"sh -c \"echo re''ady; exec sleep 100\"\n")
        eventually(lambda: hears(rb"\nready\r"), 15, "a shell")
        os.write(terminal, b"\x03")
        os.write(terminal, b"sleep 100 & jobs; kill %1; wait; exit 4\n")
        eventually(lambda: hears(rb"Running +sleep 100"), 10, "a job")
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    finally:
        os.close(terminal)
    assert code == 4


@pytest.mark.parametrize("victim", ["tpvpn", "helper"])
def test_nothing_is_left_when_a_process_is_killed(laptop: Laptop, user: User, victim: str) -> None:
    """Of tpvpn, and of the process inside, whose namespaces end with the command."""
    with shell(laptop, user) as running:
        pids = {"tpvpn": running.process.pid, "helper": running.helper()}
        os.kill(pids[victim], signal.SIGKILL)
        running.ends({"tpvpn": -signal.SIGKILL, "helper": 7}[victim])


@pytest.mark.parametrize(
    ("forbid", "named"),
    [
        (
            'unshare --user --map-root-user sh -ec \'echo 0 >/proc/sys/user/max_user_namespaces; exec "$@"\' sh "$@"',
            "user.max_user_namespaces=10000",
        ),
        (
            'chmod 600 /dev/net/tun; exec setpriv --reuid={uid} --regid={uid} --clear-groups "$@"',
            "chmod 666 /dev/net/tun",
        ),
    ],
    ids=["a limit", "the device"],
)
def test_what_forbids_it_here_is_named(laptop: Laptop, user: User, forbid: str, named: str) -> None:
    """In a user namespace, and with a device file, of the test's own: the machine's stay as they are."""
    tried = [*TPVPN, "run", "--manager", "tcp://192.0.2.1:7070", *WANTED, "--", "true"]
    inside = ["sh", "-ec", forbid.format(uid=user.home.stat().st_uid), "sh", *tried]
    done = subprocess.run(laptop.command(user.host(inside)), capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (5, ""), done.stderr
    (sentence,) = done.stderr.splitlines()
    assert named in sentence
    assert "connect" in sentence


@pytest.mark.parametrize(
    ("name", "number", "switches", "named"),
    [
        ("user", errno.EPERM, {"kernel.unprivileged_userns_clone": "0"}, "kernel.unprivileged_userns_clone=1"),
        (
            "net",
            errno.EPERM,
            {"kernel.unprivileged_userns_clone": "1", "kernel.apparmor_restrict_unprivileged_userns": "1"},
            "kernel.apparmor_restrict_unprivileged_userns=0",
        ),
        ("net", errno.ENOSPC, {}, "user.max_net_namespaces"),
        ("user", errno.EPERM, {}, "seccomp=unconfined"),
        ("user", errno.EINVAL, {}, "this kernel is built without"),
    ],
)
def test_what_forbids_it_is_named(name: str, number: int, switches: dict[str, str], named: str) -> None:
    sentence = why(name, OSError(number, os.strerror(number)), switches.get)
    assert named in sentence
    assert "sudo tpvpn connect" in sentence


def test_a_command_is_wanted(laptop: Laptop) -> None:
    for words, said in ((["ls"], "behind `--`"), (["--dns", "resolved", "--", "ls"], "--dns resolved")):
        done = laptop.tpvpn("run", *words)
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        assert said in done.stderr
