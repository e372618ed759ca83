"""What is written down rather than typed: the keys of the configuration, and their values with where each is from.

Pure: the bytes of a file in, values out. It knows neither where the file is nor what becomes of the values. A key is
one line of KEYS. The file is composed to YAML nodes, which know their line and column, and walked along the keys, so
that no object is constructed and no alias expanded; the first thing that is no key, or not what the key takes, is one
UsageError. `merge()` lays one configuration over another: the flags over the file, the file over what an admin wrote.
"""

import ipaddress
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, NoReturn, TypeAlias, TypeVar, get_args

from tpvpn.errors import UsageError
from tpvpn.route.prefix import Prefix
from tpvpn.route.verdict import OnConflict

if TYPE_CHECKING:
    from yaml import Node

T = TypeVar("T")

LIMIT = 1 << 16
"""Bytes of a file; composing the worst of this size takes about two seconds."""
LONGEST = 256
"""Characters of a value that are read: more than any host name (253) or subnet has."""


class Source(NamedTuple):
    """Where a value is from: a file and its line, or a word alone ("default", "--never-proxy")."""

    name: str
    line: int = 0

    @property
    def place(self) -> str:
        """As an editor or a compiler writes it."""
        return f"{self.name}:{self.line}" if self.line else self.name

    def __str__(self) -> str:
        return f"{self.name} line {self.line}" if self.line else self.name


DEFAULT = Source("default")


@dataclass(frozen=True, slots=True)
class Value(Generic[T]):
    """A value and where it is from."""

    value: T
    source: Source


@dataclass(frozen=True, slots=True)
class Key(Generic[T]):
    """A key: how a word of it is read (UsageError when it is none), and what that is; a list when it has no default.

    With `fields` an item is a mapping with just these, and `read` takes the words of all.
    """

    name: str
    read: Callable[..., T]
    takes: str
    default: T | None = None
    united: bool = True
    """Lists of several layers are one; else the uppermost that has any holds alone."""
    fields: tuple[str, ...] = ()


class NameMapping(NamedTuple):
    """A name, and the name or address that it stands for, in small letters and without a dot at the end."""

    name: str
    alias: str

    def __str__(self) -> str:
        return f"{self.name} → {self.alias}"


def subnet(text: str) -> Prefix:
    """An address or subnet; a host name has its own error."""
    if re.fullmatch(HOST_NAME, text):
        raise UsageError(f"{text!r} is a host name, whose addresses may change: give addresses")
    return Prefix.parse(text)


def subnet_or_name(text: str) -> Prefix | str:
    """An address, a subnet, or a host name, in small letters."""
    if re.fullmatch(HOST_NAME, text):
        return text.lower()
    if ":" in text or "/" in text or not re.search("[^0-9.]", text):
        return Prefix.parse(text)
    raise UsageError(
        f"{text!r} is not an address, subnet or host name; write it like 10.130.0.0/16, fd00:130::/64 or db.example.com"
    )


HOST_NAME = re.compile(
    r"(?=.{1,253}\.?$)"  # RFC 1123, section 2.1; RFC 1035, section 2.3.4
    r"(?:(?!-)[a-z0-9-]{1,63}(?<!-)\.)*"
    r"(?=[0-9-]*[a-z])(?!0x[0-9a-f]*\.?$)"  # "0x7f.1" and "0x7f000001" are addresses to a resolver
    r"(?!-)[a-z0-9-]{1,63}(?<!-)\.?",
    re.ASCII | re.IGNORECASE,
)


def host_name(text: str) -> str:
    """A host name in small letters, without a dot at the end."""
    if not re.fullmatch(HOST_NAME, text):
        raise UsageError(f"{text!r} is no host name; write it like db.example.com")
    return text.lower().rstrip(".")


def suffix(text: str) -> str:
    """A suffix of host names, with which `*.` or a dot may stand in front."""
    return host_name(text.removeprefix("*").removeprefix("."))


def name_mapping(name: str, alias: str) -> NameMapping:
    """A name, and what it stands for."""
    try:
        return NameMapping(host_name(name), str(ipaddress.ip_address(alias)))
    except ValueError:
        return NameMapping(host_name(name), host_name(alias))


def on_conflict(text: str) -> OnConflict:
    """What a conflict leads to."""
    for word in get_args(OnConflict):
        if text == word:
            return word
    raise UsageError(f"{text!r} is not one of {', '.join(get_args(OnConflict))}")


ALLOW = Key("client.routing.allowConflictingSubnets", Prefix.parse, "a list of subnets")
ALSO = Key("client.routing.alsoProxySubnets", subnet_or_name, "a list of subnets and host names")
NEVER = Key("client.routing.neverProxySubnets", subnet, "a list of subnets")
ON_CONFLICT: Key[OnConflict] = Key(
    "client.routing.onConflict", on_conflict, f"one of {', '.join(get_args(OnConflict))}", "fail"
)
INCLUDE = Key("client.dns.includeSuffixes", suffix, "a list of domains")
EXCLUDE = Key("client.dns.excludeSuffixes", suffix, "a list of domains")
MAPPINGS = Key(
    "client.dns.mappings",
    name_mapping,
    "a list of mappings with name and aliasFor",
    fields=("name", "aliasFor"),
)
SERVICES = Key("serviceCIDRs", Prefix.parse, "a list of subnets", united=False)
PODS = Key("podCIDRs", Prefix.parse, "a list of subnets", united=False)
KEYS: tuple[Key[Any], ...] = (ALLOW, ALSO, NEVER, ON_CONFLICT, INCLUDE, EXCLUDE, MAPPINGS, SERVICES, PODS)


@dataclass(frozen=True, slots=True)
class Config:
    """The values that are given, by key."""

    values: dict[Key[Any], tuple[Value[Any], ...]] = field(default_factory=dict[Key[Any], tuple[Value[Any], ...]])

    def all(self, key: Key[T]) -> tuple[Value[T], ...]:
        """The values of a list, each once; of any other key its one value."""
        given = self.values.get(key, ())
        return given if given or key.default is None else (Value(key.default, DEFAULT),)

    def one(self, key: Key[T]) -> Value[T]:
        """The value of a key that has a default."""
        return self.all(key)[0]


def merge(*layers: Config) -> Config:
    """One of several, the first on top: most lists are united, of other keys the uppermost value holds."""
    merged = dict[Key[Any], tuple[Value[Any], ...]]()
    for key in KEYS:
        first = dict[Any, Value[Any]]()
        given = [layer.values[key] for layer in layers if layer.values.get(key)]
        for value in (value for values in (given if key.united else given[:1]) for value in values):
            first.setdefault(value.value, value)
        merged[key] = tuple(first.values())[: None if key.default is None else 1]
    return Config(merged)


def parse(data: bytes, file: str, *, strict: bool = True) -> Config:
    """Read a configuration file's bytes; UsageError says where in `file` something is wrong and what is allowed.

    Not `strict`: what another version wrote, whose further keys are passed over.
    """
    if len(data) > LIMIT:
        raise UsageError(f"{file} is larger than {LIMIT // 1024} KiB, which no configuration needs: make it smaller")
    root = compose(data, file)
    return merge(Config({} if root is None else dict(read_mapping(root, TREE, "", file, strict))))


Tree: TypeAlias = "dict[str, Key[Any] | Tree]"


def tree_of(keys: tuple[Key[Any], ...]) -> Tree:
    """The keys as the nested mappings of a file."""
    root: Tree = {}
    for key in keys:
        *above, last = key.name.split(".")
        here = root
        for word in above:
            below = here.setdefault(word, {})
            assert isinstance(below, dict), f"{key.name} lies below a key that has a value"
            here = below
        here[last] = key
    return root


TREE = tree_of(KEYS)


def compose(data: bytes, file: str) -> "Node | None":
    """The file's YAML document; None when there is none."""
    import yaml  # 30 ms, and most people have no file

    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        before = data[: error.start].decode()
        raise UsageError(
            f"{position(before, file)}: byte 0x{data[error.start]:02x} is not UTF-8: save the file as UTF-8 text"
        ) from None
    try:
        loader = yaml.SafeLoader(text)
    except yaml.reader.ReaderError as error:
        where, character = position(text[: error.position], file), ord(text[error.position])
        raise UsageError(f"{where}: the character U+{character:04X} is not allowed in YAML: remove it") from None
    try:
        return loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        index = error.problem_mark.index if error.problem_mark else loader.index
        why = ", ".join(part for part in (error.context, error.problem) if part)
        why += ": indent with spaces, not tabs" if text[index : index + 1] == "\t" else ""
    except RecursionError:
        index, why = loader.index, "it is nested deeper than any key"
    except (ValueError, OverflowError):  # a "\UFFFFFFFF", a %YAML of 5,000 digits
        index, why = loader.index, "a number is out of range"
    raise UsageError(f"{position(text[:index], file)}: this is not the YAML of a configuration: {why}")


def position(before: str, file: str) -> str:
    """The place behind this text."""
    lines = before.split("\n")
    return f"{file}:{len(lines)}:{len(lines[-1]) + 1}"


def wrong(node: "Node", file: str, why: str) -> NoReturn:
    """The error of a node."""
    raise UsageError(f"{file}:{node.start_mark.line + 1}:{node.start_mark.column + 1}: {why}")


TAG = "tag:yaml.org,2002:"
SHAPES = {"mapping": ("map",), "sequence": ("seq",), "scalar": ("str", "int", "float", "bool", "timestamp", "null")}
"""The tags that each kind of node has by itself; text is read as it stands, whatever YAML takes it for."""


def shape(node: "Node") -> str:
    """What a node is, in a word: "nothing" is an empty value or null."""
    kind, tag = str(getattr(node, "id", "")), node.tag
    if tag.removeprefix(TAG) not in SHAPES[kind] and tag not in (f"{TAG}merge", f"{TAG}value"):
        return "a tagged value"
    return "nothing" if tag == f"{TAG}null" else {"mapping": "a mapping", "sequence": "a list"}.get(kind, "text")


def read_mapping(
    node: "Node", tree: Tree, path: str, file: str, strict: bool
) -> "Iterator[tuple[Key[Any], tuple[Value[Any], ...]]]":
    """The values below a mapping; `path` is its own key, with a dot behind."""
    if (is_a := shape(node)) == "nothing":
        return
    if is_a != "a mapping":
        wrong(node, file, f"{path.rstrip('.') or 'the file'} takes a mapping with {', '.join(tree)}, not {is_a}")
    seen = dict[str, int]()
    for name, value in node.value:
        word = name.value if shape(name) == "text" else ""
        if word not in tree:
            if not strict:
                continue
            wrong(name, file, unknown(word, tree, path))
        if word in seen:
            wrong(name, file, f"{path}{word} is given twice, first in line {seen[word]}: keep one of them")
        seen[word] = name.start_mark.line + 1
        below = tree[word]
        if isinstance(below, Key):
            yield below, tuple(read_values(value, below, file))
        else:
            yield from read_mapping(value, below, f"{path}{word}.", file, strict)


def read_values(node: "Node", key: Key[Any], file: str) -> Iterator[Value[Any]]:
    """The values of a key; none when it is left empty."""
    is_a, many = shape(node), key.default is None
    if is_a == "nothing":
        return
    if is_a != ("a list" if many else "text"):
        wrong(node, file, f"{key.name} takes {key.takes}, not {is_a}")
    for item in node.value if many else [node]:
        if (is_a := shape(item)) != ("a mapping" if key.fields else "text"):
            wrong(item, file, f"{key.name} takes {key.takes}, and one item is {is_a}")
        words = read_fields(item, key, file) if key.fields else [item.value]
        try:
            yield Value(key.read(*(word[:LONGEST] for word in words)), Source(file, item.start_mark.line + 1))
        except UsageError as error:
            wrong(item, file, f"{key.name}: {error}")


def read_fields(node: "Node", key: Key[Any], file: str) -> list[str]:
    """The words of an item's fields, each of which must be there once."""
    found = dict[str, str]()
    for name, value in node.value:
        word = name.value if shape(name) == "text" else ""
        if word not in key.fields or word in found:
            wrong(name, file, f"an item of {key.name} has {' and '.join(key.fields)}, each once, and nothing else")
        if (is_a := shape(value)) != "text":
            wrong(value, file, f"{word} takes a host name or address, not {is_a}")
        found[word] = value.value
    if missing := [one for one in key.fields if one not in found]:
        wrong(node, file, f"an item of {key.name} lacks {' and '.join(missing)}")
    return [found[one] for one in key.fields]


def unknown(word: str, tree: Tree, path: str) -> str:
    """The sentence on a key that is none here: the one that was probably meant, or those there are."""
    import difflib

    name = path + (word if re.fullmatch(r"[\w.-]{1,60}", word, re.ASCII) else repr(word[:60]))
    close = difflib.get_close_matches(word[:60], tree, 1) or [key.name for key in KEYS if key.name.endswith(f".{word}")]
    if close:
        return f"there is no key {name}: did you mean {close[0]}?"
    return f"there is no key {name}: {path.rstrip('.') or 'the file'} takes {', '.join(tree)}"
