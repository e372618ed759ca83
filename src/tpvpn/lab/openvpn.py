"""A real OpenVPN between the laptop and the VPN's far end: server, client, and keys made for this lab alone.

The server pushes the private routes, and for a full tunnel `redirect-gateway def1`: the laptop gets exactly what a
corporate VPN installs, by the same program. Each side has a self-signed certificate and knows the other by its
fingerprint (--peer-fingerprint): no authority is needed.
"""

import subprocess
from pathlib import Path
from typing import ClassVar

from tpvpn.lab.topology import VPN_SERVER
from tpvpn.lab.vpn import VpnProgram


class OpenVpn(VpnProgram):
    """One server and one client, on tun0 at both ends."""

    tools: ClassVar = {"openvpn": "openvpn", "openssl": "openssl"}
    up = "Initialization Sequence Completed"

    def prepare(self) -> None:
        """Make the keys."""
        make_keys(self.directory)

    def server(self) -> list[str]:
        """The VPN's server."""
        options = ["--topology", "subnet", "--dh", "none", "--server", "10.8.0.0", "255.255.255.0"]
        options += ["--push", "route 10.0.0.0 255.0.0.0"]
        if self.ipv6:
            options += ["--server-ipv6", "fd10:8::/64", "--push", "route-ipv6 fd10::/16"]
        if self.full:
            options += ["--push", f"redirect-gateway def1{' ipv6' if self.ipv6 else ''}"]
        return [*self._common("server", "client"), *options]

    def client(self) -> list[str]:
        """The laptop's VPN client."""
        return [*self._common("client", "server"), "--client", "--nobind", "--remote", VPN_SERVER]

    def _common(self, name: str, peer: str) -> list[str]:
        fingerprint = (self.directory / f"{peer}.fingerprint").read_text()
        own = self.directory / name
        files = f"--cert {own}.crt --key {own}.key --peer-fingerprint {fingerprint}"
        return ["openvpn", "--dev", "tun0", "--verb", "3", "--disable-dco", *files.split()]


def make_keys(directory: Path) -> None:
    """Write NAME.crt, NAME.key and NAME.fingerprint for "server" and "client"."""
    for name in ("server", "client"):
        key, certificate = directory / f"{name}.key", directory / f"{name}.crt"
        curve = "ec_paramgen_curve:prime256v1"
        request = ["req", "-x509", "-newkey", "ec", "-pkeyopt", curve, "-nodes", "-days", "30"]
        files = ["-keyout", str(key), "-out", str(certificate)]
        subprocess.run(["openssl", *request, "-subj", f"/CN={name}", *files], check=True, capture_output=True)
        key.chmod(0o600)
        fingerprint = subprocess.run(
            ["openssl", "x509", "-in", str(certificate), "-noout", "-fingerprint", "-sha256"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        (directory / f"{name}.fingerprint").write_text(fingerprint.partition("=")[2].strip())
