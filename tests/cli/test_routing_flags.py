"""The routing flags over a configuration: what they ask for, and the one sentence where they make no sense."""

import argparse
import os
import shlex
from pathlib import Path

import pytest

from tpvpn.cli.routing import HOSTS, add_routing_flags, names_a_cluster, routing
from tpvpn.config import Config, parse
from tpvpn.errors import UsageError
from tpvpn.route.prefix import Prefix
from tpvpn.route.verdict import Policy, Request, Wanted

CLUSTER = "--service-cidr 10.130.0.0/16 --pod-cidr 10.132.0.0/16"
WANTED = (
    Wanted(Prefix.parse("10.130.0.0/16"), "service", "--service-cidr"),
    Wanted(Prefix.parse("10.132.0.0/16"), "pod", "--pod-cidr"),
)
FILE = """\
client:
  routing:
    allowConflictingSubnets: [10.128.0.0/9]
    alsoProxySubnets: [10.9.0.0/16, db.example.com]
    neverProxySubnets:
    - 10.130.9.0/24
    onConflict: skip
"""


def asked(command: str, file: str = "") -> Request:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_routing_flags(parser)
    return routing(parser.parse_args(shlex.split(command)), parse(file.encode(), "c.yaml") if file else Config())


def refused(command: str, file: str = "") -> str:
    with pytest.raises(UsageError) as error:
        asked(command, file)
    return str(error.value)


def prefixes(*words: str) -> tuple[Prefix, ...]:
    return tuple(map(Prefix.parse, words))


# -- what is asked for -------------------------------------------------------------------------------------------------


def test_flags_alone() -> None:
    request = asked(
        f"{CLUSTER} --also-proxy 10.9.0.0/16,DB.example.com --never-proxy 10.130.9.9 --never-proxy fd00::/8 "
        "--allow-conflicting-subnets '10.130.0.0/16, 10.132.0.0/16' --on-conflict skip --virtual pod"
    )
    assert request == Request(
        (*WANTED, Wanted(Prefix.parse("10.9.0.0/16"), "also", "--also-proxy")),
        Policy(
            allow=prefixes("10.130.0.0/16", "10.132.0.0/16"),
            never=((Prefix.parse("10.130.9.9"), "--never-proxy"), (Prefix.parse("fd00::/8"), "--never-proxy")),
            on_conflict="skip",
            virtual=("pod",),
            given=(
                *("--service-cidr", "10.130.0.0/16", "--pod-cidr", "10.132.0.0/16"),
                *("--also-proxy", "10.9.0.0/16,DB.example.com", "--never-proxy", "10.130.9.9"),
                *("--never-proxy", "fd00::/8", "--virtual", "pod"),
            ),
        ),
        (("db.example.com", "--also-proxy"),),
    )


def test_the_configuration_alone() -> None:
    request = asked(CLUSTER, FILE)
    assert request == Request(
        (*WANTED, Wanted(Prefix.parse("10.9.0.0/16"), "also", "c.yaml line 4")),
        Policy(
            allow=prefixes("10.128.0.0/9"),
            never=((Prefix.parse("10.130.9.0/24"), "c.yaml line 6"),),
            on_conflict="skip",
            given=tuple(CLUSTER.split()),
        ),
        (("db.example.com", "c.yaml line 4"),),
    )


def test_flags_lie_over_the_configuration() -> None:
    request = asked(
        f"{CLUSTER} --also-proxy 10.9.0.0/16,10.8.0.0/16,db.example.com --never-proxy 10.7.0.0/16,10.130.9.0/24 "
        "--allow-conflicting-subnets 10.0.0.0/9 --on-conflict fail",
        FILE,
    )
    assert request.wanted[2:] == tuple(
        Wanted(prefix, "also", "--also-proxy") for prefix in prefixes("10.9.0.0/16", "10.8.0.0/16")
    )
    assert request.names == (("db.example.com", "--also-proxy"),)
    assert request.policy.never == tuple(
        (prefix, "--never-proxy") for prefix in prefixes("10.7.0.0/16", "10.130.9.0/24")
    )
    assert request.policy.allow == prefixes("10.0.0.0/9", "10.128.0.0/9")
    assert request.policy.on_conflict == "fail"


def test_whether_a_cluster_is_named() -> None:
    parser = argparse.ArgumentParser()
    add_routing_flags(parser)
    assert not names_a_cluster(parser.parse_args(["--also-proxy", "10.0.0.0/8"]))
    assert names_a_cluster(parser.parse_args(["--pod-cidr", "10.0.0.0/8"]))
    assert refused("--also-proxy 10.0.0.0/8") == (
        "the cluster's subnets are not known: give --service-cidr and/or --pod-cidr, "
        "for example --service-cidr 10.96.0.0/12"
    )


# -- single hosts ------------------------------------------------------------------------------------------------------


def test_hosts_of_flags_and_files(tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text("# the databases\n\n10.130.0.5   # ann's\r\n  fd00:130::5/128\n10.130.0.1\n10.130.0.6")
    command = f"{CLUSTER} --host 10.130.0.1,10.130.0.2/32 --host fd00:130::1 --host 10.130.0.1 --hosts-file {file}"
    for words, config in (("--on-conflict hosts", ""), ("", FILE.replace("skip", "hosts"))):
        request = asked(f"{command} {words}", config)
        assert [(prefix.address(), source) for prefix, source in request.policy.hosts] == [
            ("10.130.0.1", "--host"),
            ("10.130.0.2", "--host"),
            ("fd00:130::1", "--host"),
            ("10.130.0.5", f"{file} line 3"),
            ("fd00:130::5", f"{file} line 4"),
            ("10.130.0.6", f"{file} line 6"),
        ]
        assert request.policy.given[-8:] == (
            *("--host", "10.130.0.1,10.130.0.2/32", "--host", "fd00:130::1"),
            *("--host", "10.130.0.1", "--hosts-file", str(file)),
        )


def test_the_limit_counts_each_host_once(tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    most = [f"10.130.{number // 256}.{number % 256}\n" for number in range(HOSTS)]
    file.write_text("".join(most * 2))
    command = f"{CLUSTER} --on-conflict hosts --hosts-file {file}"
    assert len(asked(command).policy.hosts) == HOSTS == 1024
    assert len(asked(f"{command} --host 10.130.0.0").policy.hosts) == HOSTS
    assert refused(f"{command} --host 10.132.0.1") == (
        "1,025 hosts are given, and at most 1,024 can be routed one by one: give fewer, or allow a subnet with "
        "--allow-conflicting-subnets"
    )


SUBNET = "is not an address or subnet; write it like 10.130.0.0/16 or fd00:130::/64"
NULS = "\0" * 100
STAYS = "which is loopback, link-local, multicast or unspecified and stays with the host: give the address of a service"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("10.130.0.0/31", "10.130.0.0/31 is a subnet: give single addresses, 10.130.0.1 for example"),
        ("fd00::/127", "fd00::/127 is a subnet: give single addresses, fd00::1 for example"),
        ("127.0.0.1", f"127.0.0.1 is in 127.0.0.0/8, {STAYS} or pod"),
        ("0.0.0.0", f"0.0.0.0 is in 0.0.0.0/8, {STAYS} or pod"),
        ("224.0.0.251", f"224.0.0.251 is in 224.0.0.0/4, {STAYS} or pod"),
        ("169.254.169.254", f"169.254.169.254 is in 169.254.0.0/16, {STAYS} or pod"),
        ("::1", f"::1 is in ::1/128, {STAYS} or pod"),
        ("fe80::1", f"fe80::1 is in fe80::/10, {STAYS} or pod"),
        ("10.130.0", f"'10.130.0' {SUBNET}"),
        ("10.130.0.1 10.130.0.2", f"'10.130.0.1 10.130.0.2' {SUBNET}"),
        ("10.130.0.1%eth0", f"'10.130.0.1%eth0' {SUBNET}"),
        ("web.default", "'web.default' is a host name, whose addresses may change: give addresses"),
    ],
)
def test_what_is_no_host(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "hosts"
    file.write_text(f"10.130.0.1\n{text}\n")
    assert refused(f"{CLUSTER} --on-conflict hosts --host '{text}'") == f"--host: {said}"
    assert refused(f"{CLUSTER} --on-conflict hosts --hosts-file {file}") == f"{file} line 2: {said}"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"10.130.0.1\n\xff\xfe\n", f"{{file}} line 2: '\\\\xff\\\\xfe' {SUBNET}"),
        (b"\x00" * 5000, f"{{file}} line 1: {NULS!r} {SUBNET}"),
        (
            b"# nobody\n\n",
            "on-conflict is hosts (--on-conflict), but no address is in {file}: give some with --host or --hosts-file",
        ),
        (b"#" * (1 << 20) + b"\n", "--hosts-file {file} is larger than 1 MiB: give at most 1,024 addresses"),
    ],
    ids=["bytes", "zeros", "empty", "large"],
)
def test_files_that_hold_no_hosts(tmp_path: Path, data: bytes, said: str) -> None:
    file = tmp_path / "hosts"
    file.write_bytes(data)
    assert refused(f"{CLUSTER} --on-conflict hosts --hosts-file {file}") == said.format(file=file)


@pytest.mark.parametrize(
    ("file", "why"), [("/nowhere", "No such file or directory"), ("/etc", "Is a directory"), ("/dev/zero", "larger")]
)
def test_files_that_cannot_be_read(file: str, why: str) -> None:
    said = refused(f"{CLUSTER} --on-conflict hosts --hosts-file {file}")
    assert f"--hosts-file {file}" in said and why in said


def test_hosts_out_of_a_pipe() -> None:
    reader, writer = os.pipe()
    os.write(writer, b"10.130.0.7\n")
    os.close(writer)
    request = asked(f"{CLUSTER} --on-conflict hosts --hosts-file /dev/fd/{reader}")
    os.close(reader)
    assert request.policy.hosts == ((Prefix.parse("10.130.0.7"), f"/dev/fd/{reader} line 1"),)


@pytest.mark.parametrize(
    ("words", "file", "said"),
    [
        ("--host 10.130.0.1", "", "--host would be for nothing, since on-conflict is fail (default)"),
        ("--hosts-file f", "", "--hosts-file would be for nothing, since on-conflict is fail (default)"),
        ("--host 10.130.0.1 --hosts-file f", FILE, "--host and --hosts-file would be for nothing"),
        ("--host 10.130.0.1", FILE, "--host would be for nothing, since on-conflict is skip (c.yaml line 7)"),
        ("--host 10.130.0.1 --on-conflict virtual", "", "since on-conflict is virtual (--on-conflict)"),
        ("--on-conflict hosts", "", "on-conflict is hosts (--on-conflict), but none is given: give some with --host"),
        ("", FILE.replace("skip", "hosts"), "on-conflict is hosts (c.yaml line 7), but none is given"),
    ],
)
def test_hosts_and_on_conflict_belong_together(words: str, file: str, said: str) -> None:
    assert said in refused(f"{CLUSTER} {words}", file)


# -- virtual subnets, host names ---------------------------------------------------------------------------------------


def test_virtual() -> None:
    request = asked(f"{CLUSTER} --virtual 10.130.0.0/16,pod --virtual 10.9.0.0/16 --virtual pod", FILE)
    assert request.policy.virtual == (Prefix.parse("10.130.0.0/16"), "pod", Prefix.parse("10.9.0.0/16"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            f"{CLUSTER} --also-proxy 10.9.0.0/16 --virtual 10.130.0.0/17",
            "--virtual: 10.130.0.0/17 is none of the wanted subnets, "
            "which are 10.130.0.0/16, 10.132.0.0/16, 10.9.0.0/16",
        ),
        (
            "--service-cidr 10.130.0.0/16 --virtual service,pod",
            "--virtual: no pod subnet is wanted: give --pod-cidr, or leave out --virtual pod",
        ),
        (
            "--pod-cidr 10.130.0.0/16 --virtual service",
            "--virtual: no service subnet is wanted: give --service-cidr, or leave out --virtual service",
        ),
        (f"{CLUSTER} --virtual also", f"--virtual: 'also' {SUBNET}"),
        (f"{CLUSTER} --virtual Pod", f"--virtual: 'Pod' {SUBNET}"),
        (
            f"{CLUSTER} --virtual 10.130.0.1/16",
            "--virtual: 10.130.0.1/16 has host bits set; the network is 10.130.0.0/16, give that instead",
        ),
        (
            f"{CLUSTER} --never-proxy vpn.example.com",
            "--never-proxy: 'vpn.example.com' is a host name, whose addresses may change: give addresses",
        ),
        (
            f"{CLUSTER} --also-proxy my_db.example",
            "--also-proxy: 'my_db.example' is not an address, subnet or host name; write it like 10.130.0.0/16, "
            "fd00:130::/64 or db.example.com",
        ),
        (f"{CLUSTER} --also-proxy 10.9.0", f"--also-proxy: '10.9.0' {SUBNET}"),
        (f"{CLUSTER} --also-proxy 10.9.0.0/x", f"--also-proxy: '10.9.0.0/x' {SUBNET}"),
        (f"{CLUSTER} --also-proxy 10.9.0.0/16,", f"--also-proxy: '' {SUBNET}"),
        (f"{CLUSTER} --allow-conflicting-subnets vpn.example", f"--allow-conflicting-subnets: 'vpn.example' {SUBNET}"),
    ],
)
def test_refused(words: str, said: str) -> None:
    assert refused(words) == said
