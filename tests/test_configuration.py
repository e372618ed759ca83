"""The configuration file's bytes: what they give, and the one sentence for whatever is wrong with them."""

import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tpvpn.config import (
    ALLOW,
    ALSO,
    INCLUDE,
    KEYS,
    LIMIT,
    MAPPINGS,
    NEVER,
    ON_CONFLICT,
    Config,
    Source,
    Value,
    merge,
    parse,
    subnet_or_name,
)
from tpvpn.errors import UsageError
from tpvpn.route.prefix import Prefix

FILE = """\
# what the VPN's administrators said
client:
  routing:
    allowConflictingSubnets: [10.128.0.0/9, "fd00:130::/64"]
    alsoProxySubnets:
    - 198.51.100.7
    - DB.example.com
    neverProxySubnets:
    - 10.1.0.0/16
    - 10.1.0.0/16
    onConflict: skip
"""


def read(text: str | bytes) -> Config:
    return parse(text if isinstance(text, bytes) else text.encode(), "c.yaml")


def routing(text: str) -> str:
    """A file with this below `routing`, which is line 3, column 5."""
    return "client:\n  routing:\n    " + text.replace("\n", "\n    ")


def names(text: str) -> str:
    """The same below `dns`."""
    return routing(text).replace("routing", "dns")


def plain(config: Config) -> dict[str, list[str]]:
    return {key.name.rpartition(".")[2]: [str(one.value) for one in config.all(key)] for key in KEYS}


def test_every_value_knows_its_line() -> None:
    config = read(FILE)
    assert config.all(ALLOW) == (
        Value(Prefix.parse("10.128.0.0/9"), Source("c.yaml", 4)),
        Value(Prefix.parse("fd00:130::/64"), Source("c.yaml", 4)),
    )
    assert config.all(ALSO) == (
        Value(Prefix.parse("198.51.100.7/32"), Source("c.yaml", 6)),
        Value("db.example.com", Source("c.yaml", 7)),
    )
    assert config.all(NEVER) == (Value(Prefix.parse("10.1.0.0/16"), Source("c.yaml", 9)),)
    assert config.one(ON_CONFLICT) == Value("skip", Source("c.yaml", 11))
    assert (str(config.one(ON_CONFLICT).source), config.one(ON_CONFLICT).source.place) == (
        "c.yaml line 11",
        "c.yaml:11",
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n\n# nothing\n",
        "---\n...\n",
        "\ufeff",
        "{}",
        "null",
        "client:",
        "client: {}",
        "client: {routing: }",
        routing("onConflict:"),
        routing("onConflict: null"),
        routing("alsoProxySubnets: []"),
        routing("neverProxySubnets: ~"),
        "%YAML 1.1\n---\nclient: {}\n",
    ],
)
def test_nothing_is_the_defaults(text: str) -> None:
    assert plain(read(text)) == {
        "allowConflictingSubnets": [],
        "alsoProxySubnets": [],
        "neverProxySubnets": [],
        "onConflict": ["fail"],
        "includeSuffixes": [],
        "excludeSuffixes": [],
        "mappings": [],
        "serviceCIDRs": [],
        "podCIDRs": [],
    }
    assert read(text).one(ON_CONFLICT).source == Source("default")


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("[10:20:30:40:50:51:0:1]", ["10:20:30:40:50:51:0:1/128"]),  # sexagesimal to YAML 1.1
        ("['10.0.0.0/8', \"10.1.0.0/16\"]", ["10.0.0.0/8", "10.1.0.0/16"]),
        ("[no, on, 1e3.example]", ["no", "on", "1e3.example"]),
        ("&a [a.example, b.example]", ["a.example", "b.example"]),
        ("[&a a.example, *a]", ["a.example"]),
        ("[!!str a.example]", ["a.example"]),
        ("- a.example\r\n- b.example\r\n", ["a.example", "b.example"]),
    ],
)
def test_text_is_taken_as_it_stands(text: str, values: list[str]) -> None:
    newline = "\n" if text.startswith("-") else " "
    assert plain(read(routing(f"alsoProxySubnets:{newline}{text}")))["alsoProxySubnets"] == values


def test_names() -> None:
    text = "includeSuffixes: ['*.Corp.Example', .b.example.]\nmappings:\n- {name: DB, aliasFor: 10.1.2.3}\n"
    config = read(names(text + "- {name: a.example, aliasFor: Web.Prod}"))
    assert [one.value for one in config.all(INCLUDE)] == ["corp.example", "b.example"]
    assert [one.value for one in config.all(MAPPINGS)] == [("db", "10.1.2.3"), ("a.example", "web.prod")]
    assert config.all(MAPPINGS)[1].source == Source("c.yaml", 6)


SUBNET = "is not an address or subnet; write it like 10.130.0.0/16 or fd00:130::/64"
NEITHER = "is not an address, subnet or host name; write it like 10.130.0.0/16, fd00:130::/64 or db.example.com"
NOT_YAML = "this is not the YAML of a configuration"
BROKEN: list[tuple[str | bytes, str | None]] = [
    # keys
    ("klient: {}", "1:1: there is no key klient: did you mean client?"),
    ("server: {}", "1:1: there is no key server: the file takes client, serviceCIDRs, podCIDRs"),
    ("onConflict: skip", "1:1: there is no key onConflict: did you mean client.routing.onConflict?"),
    (
        "client:\n  proxy: {}",
        "2:3: there is no key client.proxy: client takes routing, dns",
    ),
    (routing("onconflict: skip"), "3:5: there is no key client.routing.onconflict: did you mean onConflict?"),
    (
        routing("neverProxySubnet: []"),
        "3:5: there is no key client.routing.neverProxySubnet: did you mean neverProxySubnets?",
    ),
    (
        routing("mtu: 1400"),
        "3:5: there is no key client.routing.mtu: client.routing takes allowConflictingSubnets, alsoProxySubnets, "
        "neverProxySubnets, onConflict",
    ),
    ("? [client]\n: {}", "1:3: there is no key '': the file takes client, serviceCIDRs, podCIDRs"),
    ("1: 2", "1:1: there is no key 1: the file takes client, serviceCIDRs, podCIDRs"),
    ('"a\\nb": 2', "1:1: there is no key 'a\\nb': the file takes client, serviceCIDRs, podCIDRs"),
    ("<<: {client: {}}", "1:1: there is no key '<<': the file takes client, serviceCIDRs, podCIDRs"),
    (
        routing("onConflict: skip\nonConflict: fail"),
        "4:5: client.routing.onConflict is given twice, first in line 3: keep one of them",
    ),
    ("client: {}\nclient: {}", "2:1: client is given twice, first in line 1: keep one of them"),
    # types
    ("- client", "1:1: the file takes a mapping with client, serviceCIDRs, podCIDRs, not a list"),
    ("client", "1:1: the file takes a mapping with client, serviceCIDRs, podCIDRs, not text"),
    ("client: 7", "1:9: client takes a mapping with routing, dns, not text"),
    (
        "client: {routing: []}",
        "1:19: client.routing takes a mapping with allowConflictingSubnets, alsoProxySubnets, neverProxySubnets, "
        "onConflict, not a list",
    ),
    (
        routing("neverProxySubnets: 10.0.0.0/8"),
        "3:24: client.routing.neverProxySubnets takes a list of subnets, not text",
    ),
    (
        routing("alsoProxySubnets: {a.example: }"),
        "3:23: client.routing.alsoProxySubnets takes a list of subnets and host names, not a mapping",
    ),
    (
        routing("alsoProxySubnets: [a.example, [b.example]]"),
        "3:35: client.routing.alsoProxySubnets takes a list of subnets and host names, and one item is a list",
    ),
    (
        routing("alsoProxySubnets:\n- "),
        "4:6: client.routing.alsoProxySubnets takes a list of subnets and host names, and one item is nothing",
    ),
    (
        routing("onConflict: [skip]"),
        "3:17: client.routing.onConflict takes one of fail, skip, hosts, virtual, not a list",
    ),
    (
        routing("onConflict: !!python/name:os.system skip"),
        "3:17: client.routing.onConflict takes one of fail, skip, hosts, virtual, not a tagged value",
    ),
    ("!!set {client}", "1:1: the file takes a mapping with client, serviceCIDRs, podCIDRs, not a tagged value"),
    ("!!map client", "1:1: the file takes a mapping with client, serviceCIDRs, podCIDRs, not a tagged value"),
    (
        names("mappings: [db.example.com]"),
        "3:16: client.dns.mappings takes a list of mappings with name and aliasFor, and one item is text",
    ),
    (
        names("mappings:\n- name: a.example\n  alias: b"),
        "5:7: an item of client.dns.mappings has name and aliasFor, each once, and nothing else",
    ),
    (
        names("mappings:\n- {name: a.example, name: b.example}"),
        "4:25: an item of client.dns.mappings has name and aliasFor, each once, and nothing else",
    ),
    (names("mappings:\n- name: a.example"), "4:7: an item of client.dns.mappings lacks aliasFor"),
    (names("mappings: [{}]"), "3:16: an item of client.dns.mappings lacks name and aliasFor"),
    (
        names("mappings: [{name: [], aliasFor: b}]"),
        "3:23: name takes a host name or address, not a list",
    ),
    # values
    (
        names("mappings: [{name: a b, aliasFor: c}]"),
        "3:16: client.dns.mappings: 'a b' is no host name; write it like db.example.com",
    ),
    (
        names("includeSuffixes: ['*.']"),
        "3:23: client.dns.includeSuffixes: '' is no host name; write it like db.example.com",
    ),
    (
        routing("onConflict: pray"),
        "3:17: client.routing.onConflict: 'pray' is not one of fail, skip, hosts, virtual",
    ),
    (routing("onConflict: true"), "3:17: client.routing.onConflict: 'true' is not one of fail, skip, hosts, virtual"),
    (
        routing("neverProxySubnets: [10.0.0.0/33]"),
        f"3:25: client.routing.neverProxySubnets: '10.0.0.0/33' {SUBNET}",
    ),
    (
        routing("allowConflictingSubnets:\n- 10.130.0.1/16"),
        "4:7: client.routing.allowConflictingSubnets: 10.130.0.1/16 has host bits set; the network is 10.130.0.0/16, "
        "give that instead",
    ),
    (
        routing("allowConflictingSubnets: [vpn.example.com]"),
        f"3:31: client.routing.allowConflictingSubnets: 'vpn.example.com' {SUBNET}",
    ),
    (
        routing("neverProxySubnets: [vpn.example.com]"),
        "3:25: client.routing.neverProxySubnets: 'vpn.example.com' is a host name, whose addresses may change: "
        "give addresses",
    ),
    (routing("alsoProxySubnets: [my_db]"), f"3:24: client.routing.alsoProxySubnets: 'my_db' {NEITHER}"),
    (routing("alsoProxySubnets: ['']"), f"3:24: client.routing.alsoProxySubnets: '' {SUBNET}"),
    (
        routing("alsoProxySubnets: ['" + "a" * 5000 + "']"),
        f"3:24: client.routing.alsoProxySubnets: '{'a' * 256}' {NEITHER}",
    ),
    (routing('alsoProxySubnets: ["\\uD800"]'), f"3:24: client.routing.alsoProxySubnets: '\\ud800' {NEITHER}"),
    # no YAML, or no text
    (
        "client:\n\trouting: {}",
        f"2:1: {NOT_YAML}: while scanning for the next token, found character '\\t' that cannot start any token: "
        "indent with spaces, not tabs",
    ),
    ("client: {", f"1:10: {NOT_YAML}: while parsing a flow node, expected the node content, but found '<stream end>'"),
    ("client: *a", f"1:9: {NOT_YAML}: found undefined alias 'a'"),
    ("a: b: c", f"1:5: {NOT_YAML}: mapping values are not allowed here"),
    (
        "client: {}\n---\nclient: {}",
        f"2:1: {NOT_YAML}: expected a single document in the stream, but found another document",
    ),
    ("client: " + "[" * 5000, None),
    ("client: [" * 5000, None),
    ('client: "\\UFFFFFFFF"', f"1:12: {NOT_YAML}: a number is out of range"),
    ('client: "\\U00110000"', f"1:12: {NOT_YAML}: a number is out of range"),
    ("%YAML " + "1" * 5000, None),
    (b"client:\n  \xff\xfe", "2:3: byte 0xff is not UTF-8: save the file as UTF-8 text"),
    ("client: {}".encode("utf-16"), "1:1: byte 0xff is not UTF-8: save the file as UTF-8 text"),
    ("client:\n  routing\x00", "2:10: the character U+0000 is not allowed in YAML: remove it"),
    # bombs
    (
        "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nclient: *c",
        "1:1: there is no key a: the file takes client, serviceCIDRs, podCIDRs",
    ),
    (
        routing("alsoProxySubnets: &a [*a, *a]"),
        "3:23: client.routing.alsoProxySubnets takes a list of subnets and host names, and one item is a list",
    ),
    ("&a client: *a", "1:1: client takes a mapping with routing, dns, not text"),
    (
        "client: &a {routing: *a}",
        "1:13: there is no key client.routing.routing: "
        "client.routing takes allowConflictingSubnets, alsoProxySubnets, neverProxySubnets, onConflict",
    ),
]


@pytest.mark.parametrize(("text", "said"), BROKEN, ids=lambda value: repr(value)[:60])
def test_broken(text: str | bytes, said: str | None) -> None:
    with pytest.raises(UsageError) as error:
        read(text)
    if said is None:
        assert "1:" in str(error.value) and NOT_YAML in str(error.value)
    else:
        assert str(error.value) == f"c.yaml:{said}"


def test_too_large() -> None:
    assert read(b"#" * LIMIT) == read("")
    with pytest.raises(
        UsageError, match=r"^c\.yaml is larger than 64 KiB, which no configuration needs: make it smaller$"
    ):
        read(b"#" * (LIMIT + 1))


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("a", True),
        ("localhost", True),
        ("db.example.com", True),
        ("db.example.com.", True),
        ("3com.example", True),
        ("xn--bcher-kva.example", True),
        ("a-b.c-d", True),
        ("a" * 63 + ".example", True),
        (".".join(["a" * 49] * 5) + ".aaa", True),
        (".".join(["a" * 49] * 5) + ".aaaa", False),
        ("a" * 64 + ".example", False),
        ("-a.example", False),
        ("a-.example", False),
        ("a..example", False),
        (".example", False),
        ("my_db.example", False),
        ("*.example", False),
        ("bücher.example", False),
        ("a example", False),
        ("a.example\n", False),
        ("a.example:80", False),
        ("https://a.example/", False),
        ("1.2.3", False),
        ("1-2", False),
        ("0x7f.1", False),
        ("0x7f000001", False),
        ("127.0x1", False),
        ("a.1", False),
    ],
)
def test_host_names(text: str, good: bool) -> None:
    if good:
        assert subnet_or_name(text.upper()) == text
    else:
        with pytest.raises(UsageError):
            subnet_or_name(text)


def test_merge() -> None:
    flags = Config(
        {
            ON_CONFLICT: (Value("hosts", Source("--on-conflict")),),
            NEVER: (Value(Prefix.parse("10.2.0.0/16"), Source("--never-proxy")),),
        }
    )
    file, cluster = (
        read(FILE),
        parse(routing("onConflict: virtual\nneverProxySubnets: [10.3.0.0/16]").encode(), "cluster"),
    )
    both = merge(flags, file, cluster)
    assert [(str(one.value), one.source.place) for one in both.all(NEVER)] == [
        ("10.2.0.0/16", "--never-proxy"),
        ("10.1.0.0/16", "c.yaml:9"),
        ("10.3.0.0/16", "cluster:4"),
    ]
    assert both.one(ON_CONFLICT) == Value("hosts", Source("--on-conflict"))
    assert merge(file, cluster).one(ON_CONFLICT) == Value("skip", Source("c.yaml", 11))
    assert merge(read(""), cluster).one(ON_CONFLICT) == Value("virtual", Source("cluster", 3))
    assert both.all(ALSO) == file.all(ALSO)


def test_merge_of_none_and_of_itself() -> None:
    assert plain(merge()) == plain(Config()) == plain(read(""))
    assert merge(read(FILE), read(FILE)) == read(FILE)
    assert merge(merge(read(FILE)), read("")) == read(FILE)


# -- whatever the bytes are --------------------------------------------------------------------------------------------

WORDS = [
    *("client", "routing", "alsoProxySubnets", "neverProxySubnets", "onConflict", "skip", "10.1.0.0/16", "db.example"),
    *(
        ": ",
        ":\n  ",
        ":\n    ",
        "\n    - ",
        "- ",
        "? ",
        "\n",
        "[",
        "]",
        "{",
        "}",
        ", ",
        "&a ",
        "*a",
        "!!map ",
        "!x ",
        "<<",
    ),
    *(
        "'",
        '"',
        "|\n",
        ">\n",
        "#",
        "\t",
        "---\n",
        "...\n",
        "%YAML ",
        "%TAG ! ",
        "\\",
        "\\U",
        "FFFFFFFF",
        "\r",
        "\x85",
        "é",
    ),
]


def one_answer(data: bytes) -> None:
    """A configuration, or one sentence; anything else is not caught here."""
    try:
        config = parse(data, "c.yaml")
    except UsageError as error:
        assert str(error).startswith("c.yaml:") and "\n" not in str(error)
    else:
        assert plain(config)


@given(st.binary(max_size=300))
@example(b"\xef\xbb\xbf")
def test_any_bytes(data: bytes) -> None:
    one_answer(data)


@settings(max_examples=500)
@given(st.lists(st.sampled_from(WORDS), max_size=40).map("".join))
def test_anything_like_yaml(text: str) -> None:
    one_answer(text.encode())


@settings(max_examples=200)
@given(st.data())
def test_a_file_that_was_damaged(data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(FILE)))
    end = data.draw(st.integers(start, len(FILE)))
    one_answer((FILE[:start] + data.draw(st.sampled_from(WORDS)) + FILE[end:]).encode())


@pytest.mark.parametrize(
    "unit",
    ["[", "{", "- ", "? ", "[?", "!", "'", "#", "a\n", "\n", "- 1\n", "a: b\n", "&a", "[a,", "|\n x\n", "\\", "\t"],
)
def test_the_worst_takes_a_bounded_time(unit: str) -> None:
    began = time.monotonic()
    for text in (unit * (LIMIT // len(unit)), "client: " + unit * (LIMIT // len(unit) - 8)):
        one_answer(text.encode())
    assert time.monotonic() - began < 30
