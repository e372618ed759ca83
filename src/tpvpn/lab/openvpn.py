"""A real OpenVPN between the laptop and the VPN's far end: server, client, and keys made for this lab alone.

The server pushes the private routes: the laptop gets exactly what a corporate VPN installs, by the same program. Each
side has a self-signed certificate and knows the other by its fingerprint (--peer-fingerprint): no authority is needed.
"""

import subprocess
from pathlib import Path

from tpvpn.lab.topology import VPN_SERVER


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


def _common(directory: Path, name: str, peer: str) -> list[str]:
    fingerprint = (directory / f"{peer}.fingerprint").read_text()
    files = f"--cert {directory / name}.crt --key {directory / name}.key --peer-fingerprint {fingerprint}"
    return ["openvpn", "--dev", "tun0", "--verb", "3", "--disable-dco", *files.split()]


def server(directory: Path, ipv6: bool) -> list[str]:
    """The command of the VPN's server."""
    options = ["--topology", "subnet", "--dh", "none", "--server", "10.8.0.0", "255.255.255.0"]
    options += ["--push", "route 10.0.0.0 255.0.0.0"]
    if ipv6:
        options += ["--server-ipv6", "fd10:8::/64", "--push", "route-ipv6 fd10::/16"]
    return [*_common(directory, "server", "client"), *options]


def client(directory: Path) -> list[str]:
    """The command of the laptop's VPN client."""
    return [*_common(directory, "client", "server"), "--client", "--nobind", "--remote", VPN_SERVER]
