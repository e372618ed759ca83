"""A real strongSwan between the laptop and the VPN's far end: charon at both, with IKEv2 and a shared key.

ESP is done by charon itself (plugin kernel-libipsec): a TUN device ipsec0 and, on the laptop, routes in table 220
behind rule 220. So it runs on a kernel without ESP too.
"""

import os
from typing import ClassVar

from tpvpn.lab.topology import TUNNEL_CLIENT, TUNNEL_CLIENT6, VPN_CLIENT, VPN_SERVER
from tpvpn.lab.vpn import VpnProgram

DAEMON = """
swanctl {{ load = random openssl }}
charon-systemd {{
    load = random nonce openssl hmac kdf kernel-libipsec kernel-netlink socket-default vici updown
    plugins {{ vici {{ socket = {socket} }} }}
    filelog {{ stdout {{ default = 1 }} }}
}}
"""
CONNECTION = """
connections {{ lab {{
    version = 2
    local_addrs = {address}
    local {{ auth = psk
        id = {name} }}
    remote {{ auth = psk
        id = {peer} }}
    {address_of}
    children {{ lab {{ {side}_ts = {blocks} }} }}
}} }}
secrets {{ ike {{ secret = 0s{secret} }} }}
"""
RUN = """
charon-systemd &
trap 'kill $!; wait $!; exit' TERM
until swanctl --load-all --uri "$1" --file "$2"; do sleep 0.05; done >/dev/null 2>&1
[ server = "$3" ] || swanctl --initiate --timeout 5 --child lab --uri "$1" && echo the tunnel is up
wait
"""


class StrongSwan(VpnProgram):
    """A gateway that assigns addresses, and the laptop; ipsec0 at both ends."""

    tools: ClassVar = {"charon-systemd": "charon-systemd", "swanctl": "strongswan-swanctl"}
    up = "the tunnel is up"

    def prepare(self) -> None:
        """Write strongswan.conf(5) and swanctl.conf(5) for "server" and "client"."""
        blocks = "10.0.0.0/8,fd10::/16" if self.ipv6 else "10.0.0.0/8"
        shared = {"secret": "bGFi" + os.urandom(24).hex(), "blocks": blocks}
        client = {
            "name": "client", "peer": "server", "address": VPN_CLIENT, "side": "remote",
            "address_of": f"remote_addrs = {VPN_SERVER}\nvips = {'0.0.0.0,::' if self.ipv6 else '0.0.0.0'}",
        }  # fmt: skip
        server = {
            "name": "server", "peer": "client", "address": VPN_SERVER, "side": "local",
            "address_of": f"pools = {'v4,v6' if self.ipv6 else 'v4'}",
        }  # fmt: skip
        pools = f"pools {{ v4 {{ addrs = {TUNNEL_CLIENT}/32 }}\n v6 {{ addrs = {TUNNEL_CLIENT6}/128 }} }}\n"
        for end, more in ((client, ""), (server, pools)):
            daemon = self.directory / f"{end['name']}.strongswan.conf"
            daemon.write_text(DAEMON.format(socket=self._socket(end["name"])))
            connection = self.directory / f"{end['name']}.swanctl.conf"
            connection.touch(0o600)
            connection.write_text(CONNECTION.format(**shared, **end) + more)

    def server(self) -> list[str]:
        """The VPN's gateway."""
        return self._command("server")

    def client(self) -> list[str]:
        """The laptop's end."""
        return self._command("client")

    def _command(self, name: str) -> list[str]:
        own = ["env", f"STRONGSWAN_CONF={self.directory / name}.strongswan.conf"]
        return [*own, "sh", "-c", RUN, "charon", self._socket(name), f"{self.directory / name}.swanctl.conf", name]

    def _socket(self, name: str) -> str:
        return f"unix://{self.directory}/{name}.vici"
