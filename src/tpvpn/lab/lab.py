"""One lab: builds the namespaces of `topology`, runs its servers, runs commands inside, and takes all of it down again.

What it needs to know later is under its run directory: the process records, the manager's token, and `state.json`,
which is written last, so a lab without it is one whose building failed. The first network namespace of the machine is
never touched: devices are born inside the namespaces. Commands on the laptop run in a mount namespace too, with an /etc
of its own and without the machine's D-Bus and systemd sockets: what a program does to the resolver there stays there.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tpvpn import rundir
from tpvpn.errors import PrivilegeError, TpvpnError, UsageError
from tpvpn.lab import names
from tpvpn.lab.openvpn import OpenVpn
from tpvpn.lab.processes import Processes
from tpvpn.lab.restricted import NOBODY, restricted
from tpvpn.lab.strongswan import StrongSwan
from tpvpn.lab.topology import (
    MASQUERADE,
    NODE,
    TUNNEL_ONLY,
    WHERE,
    Exit,
    Vpn,
    Where,
    batches,
    iperf_addresses,
    is_full,
    routes_down,
    routes_up,
    served,
)
from tpvpn.lab.vpn import VpnProgram
from tpvpn.lab.wireguard import WireGuard

RUN = Path("/run/tpvpn-lab")
MANAGER = f"{NODE}:7070"
TIMEOUT = 15.0  # seconds until what was started must be ready

# Each program the lab runs, with the package that has it.
TOOLS = {"ip": "iproute2", "nft": "nftables", "nsenter": "util-linux", "iperf3": "iperf3", "ping": "iputils-ping",
         "dnsmasq": "dnsmasq-base"}  # fmt: skip
VPN_PROGRAMS: dict[str, type[VpnProgram]] = {"openvpn": OpenVpn, "wireguard": WireGuard, "strongswan": StrongSwan}

# The laptop's mounts, made by a shell that then keeps them: $1 the run directory, $2 a file that says they are there.
LAPTOP = """
set -e
mount -t sysfs sysfs /sys
mount --bind "$1/etc" /etc
for hidden in /run/dbus /run/systemd /run/wireguard; do
    if [ -d "$hidden" ]; then mount -t tmpfs tmpfs "$hidden"; fi
done
touch "$2"
exec sleep infinity
"""
# A command with a pod's /etc: $1 is that.
POD = 'mount --bind "$1" /etc; shift; exec "$@"'


class Lab:
    """A lab named by `prefix`, so that several can exist at once; also a context manager.

    `vpn`: what covers 10.0.0.0/8 on the laptop, or, with a full tunnel, everything. `ipv6=False` switches IPv6 off
    everywhere. `forwarding=False` is a node whose ip_forward is 0 (the direct twins are then unreachable). `exit` is
    the traffic manager's, once one is started. `cluster`: what the cluster calls itself, over HTTP and in its names.
    """

    def __init__(
        self,
        prefix: str = "tpvpn",
        *,
        vpn: Vpn = "routes",
        ipv6: bool = True,
        forwarding: bool = True,
        exit: Exit = "kernel",
        cluster: str = "cluster",
    ) -> None:
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,31}", prefix):
            raise UsageError(f"{prefix!r} cannot name a lab: use up to 32 of a-z, 0-9 and -")
        self.prefix = prefix
        self.options: dict[str, Any] = {"vpn": vpn, "ipv6": ipv6, "forwarding": forwarding, "exit": exit}
        self.options |= {"cluster": cluster}
        self.run_directory = RUN / prefix
        self.token_file = self.run_directory / "token"
        self.manager = MANAGER
        self._state = self.run_directory / "state.json"
        self._vpn_client = self.run_directory / "vpn-client.pid"
        self._processes = Processes(self.run_directory / "pids")

    @classmethod
    def existing(cls, prefix: str = "tpvpn") -> Self:
        """The lab of this name that is up; UsageError when there is none."""
        lab = cls(prefix)
        if not lab.is_up():
            raise UsageError(f"there is no lab {prefix}: run `tpvpn lab up` first")
        lab.options = json.loads(lab._state.read_text())["options"]
        return lab

    def __enter__(self) -> Self:
        self.up()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.down()

    # -- up and down ---------------------------------------------------------------------------------------------------

    def is_up(self) -> bool:
        """Whether a lab of this name was built to its end and not taken down."""
        return self._state.exists()

    def up(self) -> None:
        """Build the lab; nothing to do when it is up with the same options.

        Errors: PrivilegeError without root or a program it needs, UsageError when it is up with other options.
        """
        self._require()
        if self.is_up():
            if json.loads(self._state.read_text())["options"] != self.options:
                raise UsageError(f"the lab {self.prefix} is up with other options: run `tpvpn lab down` first")
            return
        self.down()
        try:
            self._build()
        except BaseException:
            self.down()
            raise

    def down(self) -> None:
        """Take everything down that belongs to the lab, however far it was built."""
        self._processes.end()
        for where in WHERE:
            if self.netns(where).exists():
                self._forget_sessions(where)
                _call(["ip", "netns", "delete", self.namespace(where)])
        shutil.rmtree(self.run_directory, ignore_errors=True)

    def _require(self) -> None:
        if os.geteuid() != 0:
            raise PrivilegeError("the lab builds network namespaces: run `tpvpn lab` as root (sudo)")
        program = self._vpn_program()
        tools = TOOLS | (dict(program.tools) if program else {})
        missing = {tool: package for tool, package in tools.items() if shutil.which(tool) is None}
        if missing:
            packages = " ".join(sorted(set(missing.values())))
            raise PrivilegeError(f"the lab needs {', '.join(sorted(missing))}: run `apt-get install {packages}`")

    def _build(self) -> None:
        self.run_directory.mkdir(parents=True)
        self.token_file.touch(0o600)
        self.token_file.write_text(f"lab: {os.urandom(32).hex()}\n")
        os.chown(self.token_file, NOBODY, NOBODY)  # a manager without privilege reads it too
        for where in WHERE:
            _call(["ip", "netns", "add", self.namespace(where)])
            self._forget_sessions(where)
            self._set_switches(where)
        self._apply(batches(self.options["vpn"], self.options["ipv6"]))
        program = self._vpn_program()
        if program:
            program.prepare()
        self._move_laptop_in()
        self.run("node", ["nft", "-f", "-"], input=MASQUERADE)
        if is_full(self.options["vpn"]):
            self.run("vpn", ["nft", "-f", "-"], input=TUNNEL_ONLY)
        self._start_servers()
        self._start_resolvers()
        if program:
            self._start_vpn_end("vpn", "vpn-server", program.server(), program.up)
        if self.options["vpn"] != "none":
            self.vpn_up()
        self._state.write_text(json.dumps({"options": self.options}))

    def _forget_sessions(self, where: Where) -> None:
        """Remove what killed sessions wrote down: the namespace is new, or about to go and its number with it."""
        shutil.rmtree(rundir.base() / str(self.netns(where).stat().st_ino), ignore_errors=True)

    def _apply(self, stages: list[tuple[Where, str]]) -> None:
        names = {where: self.namespace(where) for where in WHERE}
        for where, batch in stages:
            _call(["ip", "-netns", self.namespace(where), "-batch", "-"], batch.format(**names))

    def _set_switches(self, where: Where) -> None:
        """The sysctls of a namespace, before it has devices."""
        forwards = {"laptop": False, "vpn": True, "node": self.options["forwarding"], "cluster": False}[where]
        switches = {
            "net/ipv4/ip_forward": forwards,
            "net/ipv6/conf/all/forwarding": forwards,
            # 0: no limit. The VPN's "unreachable" is to be heard each time.
            "net/ipv4/icmp_ratelimit": 0,
            "net/ipv6/icmp/ratelimit": 0,
            "net/ipv6/conf/all/disable_ipv6": not self.options["ipv6"],
            "net/ipv6/conf/default/disable_ipv6": not self.options["ipv6"],
        }
        for name, value in switches.items():
            self.sysctl(where, name, int(value))
        self.sysctl(where, "net/ipv4/ping_group_range", "0 2147483647")  # as Docker has it

    def _move_laptop_in(self) -> None:
        """Start the process that holds the laptop's mount namespace."""
        self._copy_etc("etc", names.LAPTOP)
        ready = self.run_directory / "laptop.ready"
        shell = ["sh", "-c", LAPTOP, "laptop", str(self.run_directory), str(ready)]
        enter = ["nsenter", f"--net={self.netns('laptop')}", "unshare", "--mount"]
        holder = self._start("laptop", [*enter, *shell])
        self.wait(ready.exists, holder, "laptop")
        (self.run_directory / "laptop.pid").write_text(str(holder.pid))

    def _copy_etc(self, name: str, resolver: str) -> None:
        """Put a copy of the machine's /etc into the run directory, with this resolv.conf in it."""
        copy = self.run_directory / name
        _call(["cp", "--archive", "/etc", str(copy)])
        (copy / "resolv.conf").unlink(missing_ok=True)
        (copy / "resolv.conf").write_text(resolver)

    def _start_resolvers(self) -> None:
        self._copy_etc("pod-etc", names.POD)
        for where in names.RESOLVERS:
            name = f"names-{where}"
            configuration = self.run_directory / f"{name}.conf"
            text = names.configuration(where, self.run_directory, self.options["ipv6"], self.options["cluster"])
            configuration.write_text(text)
            process = self._start(name, self.command(where, ["dnsmasq", f"--conf-file={configuration}"]))
            self.wait(partial(self._says, name, "started, version"), process, name)

    def _start_servers(self) -> None:
        for where in ("vpn", "cluster"):
            addresses = served(where, self.options["ipv6"])
            who = self.options["cluster"] if where == "cluster" else where
            server = [sys.executable, "-m", "tpvpn.lab.servers", who, *addresses]
            self._start(f"servers-{where}", self.command(where, server))
            self._expect(where, addresses, "/", f"servers-{where}")
        for address in iperf_addresses(self.options["ipv6"]):
            name = f"iperf3-{address}"
            server = ["iperf3", "--server", "--bind", address, "--forceflush"]
            process = self._start(name, self.command("cluster", server))
            self.wait(partial(self._says, name, "listening"), process, name)

    # -- the VPN -------------------------------------------------------------------------------------------------------

    def vpn_up(self) -> None:
        """Start the laptop's VPN client and wait until its routes are there; nothing to do when it runs.

        Errors: UsageError in a lab without a VPN, TpvpnError when the client does not start.
        """
        program = self._vpn_program(required=True)
        if self.vpn_is_up():
            return
        if program is None:
            self._apply(routes_up(self.options["ipv6"]))
        else:
            client = self._start_vpn_end("laptop", "vpn-client", program.client(), program.up)
            self._vpn_client.write_text(str(client.pid))

    def vpn_down(self) -> None:
        """End the laptop's VPN client, and wait until it has; nothing to do when it does not run.

        Errors: UsageError in a lab without a VPN.
        """
        program = self._vpn_program(required=True)
        if not self.vpn_is_up():
            return
        if program is None:
            self._apply(routes_down())
        else:
            self._processes.end(int(self._vpn_client.read_text()))

    def vpn_is_up(self) -> bool:
        """Whether the VPN client runs (a VPN of plain routes: whether its device is there)."""
        if self.options["vpn"] == "routes":
            return self.run("laptop", ["ip", "link", "show", "tun0"], check=False).returncode == 0
        return self._vpn_client.exists() and self._processes.runs(int(self._vpn_client.read_text()))

    def _vpn_program(self, required: bool = False) -> VpnProgram | None:
        """The VPN if it is a program, not plain routes."""
        vpn: Vpn = self.options["vpn"]
        if required and vpn == "none":
            raise UsageError(f"the lab {self.prefix} has no VPN: build it with `tpvpn lab up --vpn openvpn`")
        found = VPN_PROGRAMS.get(vpn.partition("-")[0])
        return found(self.run_directory, self.options["ipv6"], is_full(vpn)) if found else None

    def _start_vpn_end(self, where: Where, name: str, argv: list[str], up: str) -> subprocess.Popen[Any]:
        process = self._start(name, self.command(where, argv))
        self.wait(partial(self._says, name, up), process, name)
        return process

    # -- inside --------------------------------------------------------------------------------------------------------

    def namespace(self, where: Where) -> str:
        """The name of a network namespace, as `ip netns` knows it."""
        return f"{self.prefix}-{where}"

    def netns(self, where: Where) -> Path:
        """The file of a network namespace, for setns(2)."""
        return Path("/run/netns") / self.namespace(where)

    def command(self, where: Where, argv: Sequence[str]) -> list[str]:
        """The command that runs `argv` inside, in the current directory."""
        if where != "laptop":
            return ["nsenter", f"--net={self.netns(where)}", *argv]
        holder = (self.run_directory / "laptop.pid").read_text()
        own = ["env", f"--chdir={Path.cwd()}", "--unset=DBUS_SYSTEM_BUS_ADDRESS", "--unset=NOTIFY_SOCKET"]
        return ["nsenter", "--target", holder, "--net", "--mount", *own, *argv]

    def pod_command(self, argv: Sequence[str]) -> list[str]:
        """The command that runs `argv` on the node with a pod's /etc, and so its resolver."""
        in_pod = ["unshare", "--mount", "sh", "-ec", POD, "pod", str(self.run_directory / "pod-etc")]
        return self.command("node", [*in_pod, *argv])

    def run(
        self, where: Where, argv: Sequence[str], *, check: bool = True, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a command inside to its end, as subprocess.run does; output is captured as text, failing is an error."""
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
        return subprocess.run(self.command(where, argv), text=True, check=check, **options)

    def popen(self, where: Where, argv: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Start a command inside, as subprocess.Popen does; `down` ends it if it still runs."""
        return self._processes.start(self.command(where, argv), **options)

    def sysctl(self, where: Where, name: str, value: int | str) -> None:
        """Set a kernel parameter of a namespace, named by its path: "net/ipv4/ip_forward"."""
        _call(["nsenter", f"--net={self.netns(where)}", "tee", f"/proc/sys/{name}"], str(value))

    def probe(
        self, where: Where, targets: Sequence[str], *, deadline: float = 2.0, path: str = "/", wait: bool = False
    ) -> dict[str, str | None]:
        """Who answers HTTP at each of the targets (ADDRESS or ADDRESS:PORT), asked at once from `where`; None: nobody.

        With `wait`, asked again until all answered or `deadline` seconds have passed.
        """
        argv = [sys.executable, "-m", "tpvpn.lab.probe", "--deadline", str(deadline), "--path", path]
        return json.loads(self.run(where, [*argv, *(["--wait"] if wait else []), *targets]).stdout)

    def start_manager(
        self, *extra: str, exit: Exit | None = None, listen: str = MANAGER, name: str = "manager"
    ) -> subprocess.Popen[Any]:
        """Run a traffic manager on the node, with the lab's exit unless one is named; TpvpnError when it is ill.

        One with the socket exit has no more than a pod of PodSecurity `restricted`. `name`: of its log.
        """
        chosen: Exit = exit or self.options["exit"]
        options = ["--listen", listen, "--exit", chosen, "--token-file", str(self.token_file)]
        argv = [sys.executable, "-m", "tpvpn", "manager", *options, *extra]
        process = self._start(name, self.pod_command(restricted(argv) if chosen == "socket" else argv))
        self._expect("node", [listen], "/healthz", name)
        return process

    # -- starting ------------------------------------------------------------------------------------------------------

    def log(self, name: str) -> Path:
        """The file with the output of one of the lab's processes."""
        return self.run_directory / f"{name}.log"

    def _start(self, name: str, argv: Sequence[str]) -> subprocess.Popen[Any]:
        with self.log(name).open("wb") as log:
            return self._processes.start(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait(self, ready: Callable[[], bool], process: subprocess.Popen[Any], name: str) -> None:
        """Wait until a process, whose output is in the log `name`, is ready; TpvpnError when it ends or is too slow."""
        deadline = time.monotonic() + TIMEOUT
        while not ready():
            if process.poll() is not None or time.monotonic() > deadline:
                raise TpvpnError(f"the lab's {name} did not start: {self._last_words(name)}")
            time.sleep(0.02)

    def _expect(self, where: Where, targets: list[str], path: str, name: str) -> None:
        answers = self.probe(where, targets, deadline=TIMEOUT, path=path, wait=True)
        if None in answers.values():
            raise TpvpnError(f"the lab's {name} did not start: {self._last_words(name)}")

    def _says(self, name: str, word: str) -> bool:
        return word in self.log(name).read_text(errors="replace")

    def _last_words(self, name: str) -> str:
        return self.log(name).read_text(errors="replace").strip()[-500:] or "it said nothing"


def _call(argv: list[str], text: str | None = None) -> None:
    done = subprocess.run(argv, input=text, capture_output=True, text=True)
    if done.returncode:
        raise TpvpnError(f"`{' '.join(argv)}` failed: {done.stderr.strip()}")
