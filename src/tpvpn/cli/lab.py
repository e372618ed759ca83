"""`tpvpn lab up|down|vpn|shell`: the lab for people, with the commands to try next."""

import argparse
import os
import sys

from tpvpn.cli import Commands
from tpvpn.lab.lab import Lab
from tpvpn.lab.topology import EXITS, POD_CIDR, PODS, SERVICE_CIDR, SERVICES, VPN_HOSTS, VPNS, WHERE, Where


def add_parser(commands: Commands) -> None:
    """Add `lab` and its commands."""
    summary = "a laptop on a VPN, a node and a cluster in network namespaces of this machine"
    lab = commands.add_parser("lab", help=summary, description=f"Build {summary}.")
    verbs = lab.add_subparsers(dest="lab_command", required=True, metavar="COMMAND")
    up = verbs.add_parser("up", help="build the lab and start a traffic manager on its node")
    up.add_argument(
        "--vpn", choices=VPNS, default="routes", help="the laptop's VPN: plain routes or a real one (routes)"
    )
    up.add_argument("--ipv6", action=argparse.BooleanOptionalAction, default=True, help="with IPv6 everywhere")
    up.add_argument("--exit", choices=EXITS, default="kernel", help="the manager's: socket needs no privilege (kernel)")
    up.add_argument("--manager", action=argparse.BooleanOptionalAction, default=True, help="start a traffic manager")
    down = verbs.add_parser("down", help="take the lab down, with every process it started")
    vpn = verbs.add_parser("vpn", help="start or end the laptop's VPN client in a lab that is up")
    vpn.add_argument("turn", choices=("up", "down"))
    shell = verbs.add_parser("shell", help="a shell, or a command, inside the lab (on the laptop)")
    for command in (up, down, vpn, shell):
        command.add_argument("--prefix", default="tpvpn", help="name of the lab, when there are several (tpvpn)")
    shell.add_argument("words", nargs=argparse.REMAINDER, metavar="[laptop|vpn|node|cluster] [-- CMD]")
    lab.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Do what the command line says; 0, or the exit code of a TpvpnError."""
    if arguments.lab_command == "up":
        lab = Lab(arguments.prefix, vpn=arguments.vpn, ipv6=arguments.ipv6, exit=arguments.exit)
        lab.up()
        if arguments.manager and lab.probe("node", [lab.manager], path="/healthz")[lab.manager] is None:
            lab.start_manager()
        print(guide(lab, sys.argv[0]))
    elif arguments.lab_command == "down":
        Lab(arguments.prefix).down()
    elif arguments.lab_command == "vpn":
        lab = Lab.existing(arguments.prefix)
        (lab.vpn_up if arguments.turn == "up" else lab.vpn_down)()
    else:
        shell(Lab.existing(arguments.prefix), arguments.words)
    return 0


def shell(lab: Lab, words: list[str]) -> None:
    """Become a command (or a shell) inside; does not return."""
    first = words[0] if words else "laptop"
    where: Where = first if first in WHERE else "laptop"
    command = words[1:] if first in WHERE else words
    command = command[1:] if command[:1] == ["--"] else command
    argv = lab.command(where, command or [os.environ.get("SHELL", "/bin/sh")])
    os.execvp(argv[0], argv)


def guide(lab: Lab, program: str) -> str:
    """What exists now, and the exact commands to try next."""
    tpvpn = f"{program} lab"
    option = "" if lab.prefix == "tpvpn" else f" --prefix {lab.prefix}"
    inside = f"{tpvpn} shell{option} --"
    cluster = f"--service-cidr {SERVICE_CIDR} --pod-cidr {POD_CIDR}"
    manager = f"--manager tcp://{lab.manager} --token-file {lab.token_file}"
    vpn = {
        "routes": "on a VPN whose private route 10.0.0.0/8 covers the cluster",
        "openvpn": "on a real OpenVPN that pushed the private route 10.0.0.0/8, which covers the cluster",
        "openvpn-full": "on a real OpenVPN that pushed 10.0.0.0/8 and takes the default route too",
        "wireguard": "on a real WireGuard whose private route 10.0.0.0/8 covers the cluster",
        "wireguard-full": "on a real WireGuard that takes all traffic",
        "strongswan": "on a real strongSwan whose private route 10.0.0.0/8, in table 220, covers the cluster",
        "none": "on no VPN",
    }[lab.options["vpn"]]
    return f"""\
The lab is up, in network namespaces:
  {lab.namespace("laptop")}   {vpn}
  {lab.namespace("vpn")}      the VPN's far end, with the hosts {", ".join(VPN_HOSTS)}
  {lab.namespace("node")}     where the traffic manager listens, {lab.manager}
  {lab.namespace("cluster")}  services {", ".join(SERVICES)}; pods {", ".join(PODS)}

Try next:
  {inside} curl --silent http://{VPN_HOSTS[1]}/
  {inside} {program} plan {cluster}
  {inside} {program} connect {manager} {cluster} \\
      --allow-conflicting-subnets {SERVICE_CIDR},{POD_CIDR} -- curl --silent http://{SERVICES[1]}/
  {tpvpn} down{option}"""
