"""A real WireGuard between the laptop and the VPN's far end: wg-quick(8) at both, over wireguard-go.

What it changes on the laptop is thereby what wg-quick changes: with AllowedIPs of the private blocks, routes in main;
with all addresses, a table and a mark 51820, two rules a family, an nft table and src_valid_mark.
"""

import subprocess
from pathlib import Path
from typing import ClassVar

from tpvpn.lab.topology import TUNNEL_CLIENT, TUNNEL_CLIENT6, TUNNEL_SERVER, TUNNEL_SERVER6, VPN_SERVER
from tpvpn.lab.vpn import VpnProgram

SOCKETS = "/run/wireguard"
"""Where wireguard-go and wg(8) meet, by device name: every lab's wg0 needs one of its own."""

RUN = """
set -e
wg-quick up "$1"
echo the tunnel is up
sleep infinity &
trap 'kill $!; wg-quick down "$1"; exit' TERM
wait
"""
ALONE = f"mount -t tmpfs tmpfs {SOCKETS}\n{RUN}"


class WireGuard(VpnProgram):
    """Two peers, wg0 at both ends."""

    tools: ClassVar = {"wg-quick": "wireguard-tools", "wireguard-go": "wireguard-go", "sysctl": "procps"}
    up = "the tunnel is up"

    def prepare(self) -> None:
        """Write DIRECTORY/server/wg0.conf and DIRECTORY/client/wg0.conf, in the format of wg-quick(8)."""
        Path(SOCKETS).mkdir(exist_ok=True)
        private = {name: _wg("genkey") for name in ("server", "client")}
        public = {name: _wg("pubkey", key) for name, key in private.items()}
        everything, blocks = ("0.0.0.0/0", "::/0"), ("10.0.0.0/8", "fd10::/16")
        self._write(
            "server",
            f"[Interface]\nPrivateKey = {private['server']}\nListenPort = 51820\n"
            f"Address = {self._both(f'{TUNNEL_SERVER}/24', f'{TUNNEL_SERVER6}/64')}\n"
            f"[Peer]\nPublicKey = {public['client']}\n"
            f"AllowedIPs = {self._both(f'{TUNNEL_CLIENT}/32', f'{TUNNEL_CLIENT6}/128')}\n",
        )
        self._write(
            "client",
            f"[Interface]\nPrivateKey = {private['client']}\n"
            f"Address = {self._both(f'{TUNNEL_CLIENT}/24', f'{TUNNEL_CLIENT6}/64')}\n"
            f"[Peer]\nPublicKey = {public['server']}\nEndpoint = {VPN_SERVER}:51820\n"
            f"AllowedIPs = {self._both(*(everything if self.full else blocks))}\n",
        )

    def server(self) -> list[str]:
        """The VPN's far end, with a mount namespace of its own for the socket; the laptop has one already."""
        return ["unshare", "--mount", "sh", "-c", ALONE, "wg0", str(self.directory / "server" / "wg0.conf")]

    def client(self) -> list[str]:
        """The laptop's end."""
        return ["sh", "-c", RUN, "wg0", str(self.directory / "client" / "wg0.conf")]

    def _both(self, v4: str, v6: str) -> str:
        return f"{v4}, {v6}" if self.ipv6 else v4

    def _write(self, name: str, text: str) -> None:
        path = self.directory / name / "wg0.conf"
        path.parent.mkdir()
        path.touch(0o600)
        path.write_text(text)


def _wg(command: str, text: str = "") -> str:
    return subprocess.run(["wg", command], input=text, check=True, capture_output=True, text=True).stdout.strip()
