"""Other tunnels beside which tpvpn is measured, set up as their manuals say; each joins the laptop and the node.

A peer carries one of the direct twins' addresses, by a host route of the laptop. `number` tells a peer's addresses from
the others'.
"""

import shutil
import subprocess
from pathlib import Path
from typing import Any

from bench.ways import TIMEOUT, Way, descendants
from tpvpn.lab import Lab, Where
from tpvpn.lab.openvpn import make_keys
from tpvpn.lab.topology import NODE, TWINS


class Peer(Way):
    """A tunnel between a process on the laptop and one on the node."""

    number: int
    programs: tuple[str, ...]

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self.address = TWINS[self.number]
        self.inside: dict[Where, str] = {"laptop": f"198.18.{self.number}.2", "node": f"198.18.{self.number}.1"}
        self.processes: dict[Where, subprocess.Popen[Any]] = {}

    @classmethod
    def missing(cls) -> str | None:
        """The first of its programs that is not installed."""
        return next((program for program in cls.programs if shutil.which(program) is None), None)

    def start(self) -> dict[str, float]:
        """Start both ends once, and wait until the cluster answers through them."""
        if not self.processes:
            self.tunnel()
            if self.lab.probe("laptop", [self.address], deadline=TIMEOUT, wait=True)[self.address] is None:
                raise RuntimeError(f"{self.name} is not ready")
        return {}

    def tunnel(self) -> None:
        """Start both ends and route the peer's address through them."""
        raise NotImplementedError

    def run_end(self, where: Where, argv: list[str]) -> None:
        """Start the process of one end."""
        with self.lab.log(f"{self.name}-{where}").open("wb") as log:
            self.processes[where] = self.lab.popen(where, argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def ends(self) -> dict[str, list[int]]:
        """The two processes."""
        return {where: descendants(process.pid) for where, process in self.processes.items()}


class OpenVpn(Peer):
    """OpenVPN over UDP with its default cipher, without the kernel's data channel offload."""

    name = "openvpn"
    number = 1
    programs = ("openvpn", "openssl")

    def tunnel(self) -> None:
        """Point to point, each side knowing the other's certificate."""
        keys = self.lab.run_directory / self.name
        keys.mkdir()
        make_keys(keys)
        self.run_end("node", [*self._side(keys, "node"), "--tls-server", "--dh", "none", "--local", NODE])
        route = ["--route", self.address, "255.255.255.255"]
        self.run_end("laptop", [*self._side(keys, "laptop"), "--tls-client", "--nobind", "--remote", NODE, *route])

    def _side(self, keys: Path, where: Where) -> list[str]:
        name, peer = ("server", "client") if where == "node" else ("client", "server")
        other: Where = "laptop" if where == "node" else "node"
        fingerprint = (keys / f"{peer}.fingerprint").read_text()
        files = ["--cert", f"{keys / name}.crt", "--key", f"{keys / name}.key", "--peer-fingerprint", fingerprint]
        addresses = ["--ifconfig", self.inside[where], self.inside[other]]
        return ["openvpn", "--dev-type", "tun", "--dev", "peer-openvpn", "--disable-dco", *addresses, *files]


class WireGuardGo(Peer):
    """wireguard-go, WireGuard in user space."""

    name = "wireguard-go"
    number = 2
    programs = ("wireguard-go", "wg")

    def tunnel(self) -> None:
        """One peer at each side; the program's control sockets are found by the devices' names."""
        devices: dict[Where, str] = {"laptop": f"wgl-{self.lab.prefix}"[:15], "node": f"wgn-{self.lab.prefix}"[:15]}
        public = {where: self._make_key(where) for where in devices}
        peers: dict[Where, list[str]] = {
            "node": ["peer", public["laptop"], "allowed-ips", f"{self.inside['laptop']}/32"],
            "laptop": ["peer", public["node"], "allowed-ips", "0.0.0.0/0", "endpoint", f"{NODE}:51820"],
        }
        for where, device in devices.items():
            self.run_end(where, ["wireguard-go", "--foreground", device])
            control = Path("/var/run/wireguard") / f"{device}.sock"
            self.lab.wait(control.exists, self.processes[where], f"{self.name}-{where}")
            key = str(self._key(where))
            port = ["listen-port", "51820"] if where == "node" else []
            self.lab.run(where, ["wg", "set", device, "private-key", key, *port, *peers[where]])
            self.lab.run(where, ["ip", "address", "add", f"{self.inside[where]}/24", "dev", device])
            self.lab.run(where, ["ip", "link", "set", device, "up"])
        self.lab.run("laptop", ["ip", "route", "add", self.address, "dev", devices["laptop"]])

    def _key(self, where: Where) -> Path:
        return self.lab.run_directory / f"{self.name}-{where}.key"

    def _make_key(self, where: Where) -> str:
        private = self.lab.run(where, ["wg", "genkey"]).stdout
        self._key(where).touch(0o600)
        self._key(where).write_text(private)
        return self.lab.run(where, ["wg", "pubkey"], input=private).stdout.strip()


PEERS: tuple[type[Peer], ...] = (OpenVpn, WireGuardGo)
