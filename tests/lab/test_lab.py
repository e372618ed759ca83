"""The lab is what its drawing says, and leaves the machine as it was."""

import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from peers import eventually
from tpvpn.errors import TpvpnError, UsageError
from tpvpn.lab import Lab, Vpn, Where
from tpvpn.lab.lab import RUN
from tpvpn.lab.names import CROWD, LAPTOP, POD, RESOLVERS
from tpvpn.lab.processes import Processes, start_time
from tpvpn.lab.topology import (
    NODE,
    PODS,
    PODS6,
    SERVICES,
    SERVICES6,
    TWINS,
    TWINS6,
    VPN_HOSTS,
    VPN_HOSTS6,
)

PREFIX = f"tv{os.getpid()}"
IN_THE_CLUSTER = [*PODS, *SERVICES, *PODS6, *SERVICES6]


def host() -> dict[str, str]:
    """Everything of the first network namespace that a lab could leave something in."""
    commands = (
        "ip -json link show",
        "ip -json rule show",
        "ip -json -6 rule show",
        "ip route show table all",
        "ip -6 route show table all",
        "nft list ruleset",
    )
    seen = {line: subprocess.run(line.split(), capture_output=True, text=True, check=True).stdout for line in commands}
    namespaces = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    seen["namespaces"] = "".join(line for line in namespaces.splitlines() if line.startswith(PREFIX))
    seen["run directory"] = str(sorted(path.name for path in RUN.glob(f"{PREFIX}*")))
    seen["resolv.conf"] = Path("/etc/resolv.conf").read_text()
    return seen


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(PREFIX) as lab:
        yield lab


def test_every_host_of_the_vpn_answers_the_laptop(lab: Lab) -> None:
    hosts = [*VPN_HOSTS, *VPN_HOSTS6]
    assert lab.probe("laptop", hosts) == {host: f"vpn {host}" for host in hosts}


def test_the_direct_twins_answer_the_laptop(lab: Lab) -> None:
    twins = [*TWINS, *TWINS6]
    assert lab.probe("laptop", twins) == {twin: f"cluster {twin}" for twin in twins}


def test_the_cluster_answers_the_node_and_not_the_laptop(lab: Lab) -> None:
    assert lab.probe("node", IN_THE_CLUSTER) == {address: f"cluster {address}" for address in IN_THE_CLUSTER}
    assert lab.probe("laptop", IN_THE_CLUSTER) == dict.fromkeys(IN_THE_CLUSTER)


def test_what_the_laptop_sends_to_the_cluster_dies_in_the_vpn(lab: Lab) -> None:
    # Several, since the kernel sends few such answers a second.
    ping = lab.run("laptop", ["ping", "-c", "4", "-i", "0.5", "-W", "1", SERVICES[1]], check=False)
    assert ping.returncode == 1
    assert "From 10.8.0.1" in ping.stdout


def test_udp_is_echoed_from_the_address_that_was_asked(lab: Lab) -> None:
    program = (
        "import socket; s = socket.socket(type=socket.SOCK_DGRAM); s.settimeout(2); "
        f"s.sendto(b'hello', ('{PODS[0]}', 7)); print(s.recvfrom(99))"
    )
    assert lab.run("node", [sys.executable, "-c", program]).stdout == f"(b'hello', ('{PODS[0]}', 7))\n"


def test_iperf_serves_pods_and_twins(lab: Lab) -> None:
    for where, address in (("node", PODS[0]), ("node", SERVICES[1]), ("laptop", TWINS[0]), ("laptop", TWINS6[0])):
        lab.run(where, ["iperf3", "--client", address, "--bytes", "1M"])
        lab.run(where, ["iperf3", "--client", address, "--udp", "--bytes", "10K"])


def test_the_laptop_has_a_resolver_file_and_no_bus_of_the_machine(lab: Lab) -> None:
    mine = Path("/etc/resolv.conf").read_bytes()
    replace = "echo nameserver 10.9.9.9 > /etc/new && mv /etc/new /etc/resolv.conf && cat /etc/resolv.conf"
    assert lab.run("laptop", ["sh", "-c", replace]).stdout == "nameserver 10.9.9.9\n"
    assert "10.9.9.9" in lab.run("laptop", ["cat", "/etc/resolv.conf"]).stdout
    lab.run("laptop", ["tee", "/etc/resolv.conf"], input=LAPTOP)
    assert Path("/etc/resolv.conf").read_bytes() == mine
    assert (
        lab.run(
            "laptop", ["sh", "-c", "ls -A /run/dbus /run/systemd 2>/dev/null | grep -v :"], check=False
        ).stdout.split()
        == []
    )


def dig(lab: Lab, where: Where, server: str, *words: str) -> list[str]:
    """The data of the answers; "NXDOMAIN" when there is no such name."""
    shown = lab.run(where, ["dig", f"@{server}", "+noall", "+answer", "+comments", "+timeout=2", *words]).stdout
    if "status: NXDOMAIN" in shown:
        return ["NXDOMAIN"]
    return [line.split(maxsplit=4)[4] for line in shown.splitlines() if line and not line.startswith(";")]


@pytest.mark.parametrize("server", RESOLVERS["cluster"])
def test_the_clusters_resolver_answers_as_a_clusters_does(lab: Lab, server: str) -> None:
    ask = partial(dig, lab, "node", server)
    web = "web.default.svc.cluster.local"
    assert ask(web) == [SERVICES[1]]
    assert ask(web, "AAAA") == [SERVICES6[0]]
    assert ask("db.default.svc.cluster.local") == list(PODS)
    assert ask("first.default.svc.cluster.local") == ["second.default.svc.cluster.local.", f"{web}.", SERVICES[1]]
    assert ask("mail.default.svc.cluster.local", "MX") == [f"10 {web}."]
    assert ask(f"_http._tcp.{web}", "SRV") == [f"0 100 80 {web}."]
    assert ask("dns-version.cluster.local", "TXT") == ['"1.1.0"']
    assert len(ask("long.default.svc.cluster.local", "TXT")) == 20
    assert len(set(ask("crowd.default.svc.cluster.local"))) == CROWD
    for address, name in ((SERVICES[1], web), (SERVICES6[0], web), (PODS[1], "db-1.db.default.svc.cluster.local")):
        assert ask("-x", address) == [f"{name}."]
    for nothing in ("nowhere.default.svc.cluster.local", "web", "nowhere.example"):
        assert ask(nothing) == ["NXDOMAIN"]
    assert ask("-x", "10.130.0.81") == ["NXDOMAIN"]
    assert ask("www.example.com") == [TWINS[3]]


def test_the_laptop_asks_the_resolvers_of_its_lan_and_of_the_vpn(lab: Lab) -> None:
    of_vpn, of_lan = partial(dig, lab, "laptop", VPN_HOSTS[0]), partial(dig, lab, "laptop", NODE)
    assert of_vpn("wiki.corp.example") == [VPN_HOSTS[1]]
    assert of_vpn("-x", VPN_HOSTS[1]) == ["wiki.corp.example."]
    assert of_vpn("www.example.com") == ["NXDOMAIN"]
    assert of_lan("www.example.com") == [TWINS[3]]
    assert of_lan("cdn.example.org") == ["www.example.org.", TWINS[1]]
    assert of_lan("wiki.corp.example") == of_lan("web.default.svc.cluster.local") == ["NXDOMAIN"]
    lan = lab.run("laptop", ["getent", "ahostsv4", "www.example.com"]).stdout
    assert lan.startswith(TWINS[3])


def test_a_manager_has_a_pods_resolver(lab: Lab) -> None:
    command = lab.pod_command(["cat", "/etc/resolv.conf"])
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == POD


def test_commands_run_in_the_current_directory(lab: Lab) -> None:
    for where in ("laptop", "node"):
        assert lab.run(where, ["pwd"]).stdout.strip() == str(Path.cwd())


def test_up_again_changes_nothing_and_other_options_are_refused(lab: Lab) -> None:
    holder = (lab.run_directory / "laptop.pid").read_text()
    Lab(PREFIX).up()
    assert (lab.run_directory / "laptop.pid").read_text() == holder
    with pytest.raises(UsageError, match="lab down"):
        Lab(PREFIX, vpn="none").up()
    assert Lab.existing(PREFIX).options == lab.options


def test_a_lab_leaves_nothing() -> None:
    before = host()
    with Lab(f"{PREFIX}-gone") as lab:
        assert host()["run directory"] != before["run directory"]
        process = lab.popen("laptop", ["sleep", "60"])
    assert process.returncode is not None
    assert host() == before


def test_down_without_a_lab_is_harmless() -> None:
    before = host()
    Lab(f"{PREFIX}-never").down()
    assert host() == before


def test_a_lab_that_fails_half_way_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = host()
    monkeypatch.setattr("tpvpn.lab.lab.MASQUERADE", "no such thing")
    with pytest.raises((TpvpnError, subprocess.CalledProcessError)):
        Lab(f"{PREFIX}-half").up()
    assert host() == before


def test_another_process_takes_a_lab_down() -> None:
    before = host()
    program = f"from tpvpn.lab import Lab; Lab('{PREFIX}-other').up()"
    subprocess.run([sys.executable, "-c", program], check=True)
    assert Lab.existing(f"{PREFIX}-other").probe("laptop", [VPN_HOSTS[0]])[VPN_HOSTS[0]]
    Lab(f"{PREFIX}-other").down()
    assert host() == before
    with pytest.raises(UsageError, match="lab up"):
        Lab.existing(f"{PREFIX}-other")


def test_two_labs_at_once(lab: Lab) -> None:
    with Lab(f"{PREFIX}-two", vpn="none", ipv6=False) as two:
        assert two.probe("laptop", [TWINS[0], VPN_HOSTS[0]]) == {TWINS[0]: f"cluster {TWINS[0]}", VPN_HOSTS[0]: None}
        assert "inet6" not in two.run("laptop", ["ip", "address"]).stdout
    assert lab.probe("laptop", [VPN_HOSTS[0]])[VPN_HOSTS[0]]


DEVICES = {"routes": "tun0", "openvpn": "tun0", "openvpn-full": "tun0", "wireguard": "wg0", "wireguard-full": "wg0",
           "strongswan": "ipsec0"}  # fmt: skip


def whole(lab: Lab) -> str:
    """All of the laptop that a VPN could leave something in."""
    shows = "ip rule; ip -6 rule; ip route show table all; ip -6 route show table all; ip -o link; nft list ruleset"
    return lab.run("laptop", ["sh", "-ec", shows]).stdout


@pytest.mark.parametrize("vpn", DEVICES)
def test_a_vpn_comes_and_goes(vpn: Vpn) -> None:
    """Its hosts answer by its device while it is up, nobody does else, and it takes back all that it did."""
    hosts = [*VPN_HOSTS, *VPN_HOSTS6]
    twins = [*TWINS, *TWINS6]
    with Lab(f"{PREFIX}-vpn", vpn=vpn) as lab:
        lab.vpn_down()
        assert not lab.vpn_is_up()
        tentative = ["ip", "-6", "address", "show", "tentative"]
        eventually(lambda: not lab.run("laptop", tentative).stdout, 5, "duplicate address detection")
        without = whole(lab)
        assert lab.probe("laptop", hosts, deadline=0.5) == dict.fromkeys(hosts)
        for _ in range(2):
            lab.vpn_up()
            assert lab.vpn_is_up()
            assert lab.probe("laptop", hosts, wait=True, deadline=5) == {host: f"vpn {host}" for host in hosts}
            assert lab.probe("laptop", IN_THE_CLUSTER, deadline=0.5) == dict.fromkeys(IN_THE_CLUSTER)
            for host in (VPN_HOSTS[1], VPN_HOSTS6[0]):
                assert f" dev {DEVICES[vpn]} " in lab.run("laptop", ["ip", "route", "get", host]).stdout
            assert lab.probe("laptop", twins, wait=True, deadline=5) == {twin: f"cluster {twin}" for twin in twins}
            lab.vpn_down()
            assert whole(lab) == without


@pytest.mark.parametrize("vpn", ["openvpn-full", "wireguard-full"])
def test_a_full_tunnel_is_the_only_way_to_the_node(vpn: Vpn) -> None:
    with Lab(f"{PREFIX}-full", vpn=vpn) as lab:
        lab.start_manager()
        assert lab.probe("laptop", [lab.manager], path="/healthz", wait=True)[lab.manager]
        lab.vpn_down()
        assert lab.probe("laptop", [lab.manager, *TWINS], path="/healthz", deadline=0.5) == dict.fromkeys(
            [lab.manager, *TWINS]
        )


@pytest.mark.parametrize("vpn", ["openvpn-full", "wireguard-full", "strongswan"])
def test_a_vpn_without_ipv6(vpn: Vpn) -> None:
    with Lab(f"{PREFIX}-four", vpn=vpn, ipv6=False) as lab:
        assert lab.probe("laptop", VPN_HOSTS, wait=True, deadline=5) == {host: f"vpn {host}" for host in VPN_HOSTS}
        assert "inet6" not in lab.run("laptop", ["ip", "address"]).stdout


def test_a_vpn_up_twice_and_without_one() -> None:
    with Lab(f"{PREFIX}-twice", vpn="none") as lab:
        for turn in (lab.vpn_up, lab.vpn_down):
            with pytest.raises(UsageError, match="lab up --vpn"):
                turn()
    with Lab(f"{PREFIX}-twice", vpn="wireguard") as lab:
        holder = (lab.run_directory / "vpn-client.pid").read_text()
        Lab.existing(lab.prefix).vpn_up()
        assert (lab.run_directory / "vpn-client.pid").read_text() == holder
        Lab.existing(lab.prefix).vpn_down()
        lab.vpn_down()
        assert not lab.vpn_is_up()


def test_a_node_that_does_not_forward() -> None:
    with Lab(f"{PREFIX}-still", forwarding=False) as lab:
        assert lab.probe("laptop", [TWINS[0]], deadline=0.5) == {TWINS[0]: None}
        assert lab.probe("node", [PODS[0]])[PODS[0]]


def test_a_socket_exit_has_no_more_than_a_restricted_pod() -> None:
    with Lab(f"{PREFIX}-nobody", exit="socket") as lab:
        proc = Path(f"/proc/{lab.start_manager().pid}")
        status = dict(line.split(":\t", 1) for line in (proc / "status").read_text().splitlines())
        assert set((status["Uid"] + "\t" + status["Gid"]).split()) == {"65534"}
        assert not status["Groups"].split()
        assert {int(status[f"Cap{kind}"], 16) for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {0}
        assert status["NoNewPrivs"] == "1"
        mounts = [line.split() for line in (proc / "mounts").read_text().splitlines()]
        options = {
            point: options.split(",") for _, point, _, options, *_ in mounts
        }  # the last at a point is what is seen
        assert [point for point in options if "ro" not in options[point]] == []
        assert "exit socket" in lab.log("manager").read_text()


@pytest.mark.parametrize("prefix", ["", "a/b", "Lab", "x" * 33])
def test_a_name_that_is_none(prefix: str) -> None:
    with pytest.raises(UsageError):
        Lab(prefix)


def test_a_process_id_that_means_another_process_now_is_left_alone(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as bystander:
        (tmp_path / str(bystander.pid)).write_text("1")
        Processes(tmp_path).end()
        assert start_time(bystander.pid)
        bystander.terminate()


def test_a_process_that_ignores_the_request_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tpvpn.lab.processes.GRACE", 0.1)
    processes = Processes(tmp_path)
    stubborn = processes.start(["sh", "-c", "trap '' TERM; echo; sleep 60"], stdout=subprocess.PIPE)
    assert stubborn.stdout is not None
    with stubborn.stdout as said:
        said.readline()
        processes.end()
    assert stubborn.returncode == -9
    assert list(tmp_path.iterdir()) == []
