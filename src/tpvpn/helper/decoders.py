"""Decoders of JSON: each takes a value of any type, and gives what it stands for; ValueError says what it is not."""

from collections.abc import Callable, Mapping
from typing import Any, cast

Decoder = Callable[[Any], Any]


def text(limit: int) -> Decoder:
    """Text of 1 to `limit` characters."""

    def decode(value: Any) -> str:
        if not isinstance(value, str) or not 0 < len(value) <= limit:
            raise ValueError(f"{value!r} is no text of 1 to {limit} characters")
        return value

    return decode


def integer(low: int, high: int) -> Decoder:
    """An integer of a range, and no boolean."""

    def decode(value: Any) -> int:
        if type(value) is not int or not low <= value <= high:
            raise ValueError(f"{value!r} is no integer from {low} to {high}")
        return value

    return decode


def one_of(*values: Any) -> Decoder:
    """One of these values, of its very type."""

    def decode(value: Any) -> Any:
        if not any(type(value) is type(known) and value == known for known in values):
            raise ValueError(f"{value!r} is none of {values}")
        return value

    return decode


def many(item: Decoder, limit: int) -> Decoder:
    """A list of at most so many, as a tuple."""

    def decode(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list) or len(cast(list[Any], value)) > limit:
            raise ValueError(f"{value!r} is no list of at most {limit}")
        return tuple(item(entry) for entry in cast(list[Any], value))

    return decode


def optional(item: Decoder) -> Decoder:
    """That, or null."""
    return lambda value: None if value is None else item(value)


def record(kind: Callable[..., Any], table: Mapping[str, Decoder]) -> Decoder:
    """An object with these fields and no others, as arguments of `kind`; those with a default may be left out."""

    def decode(value: Any) -> Any:
        if not isinstance(value, dict):
            raise ValueError(f"{value!r} is no object")
        given = cast(dict[str, Any], value)
        if unknown := given.keys() - table.keys():
            raise ValueError(f"unknown fields {sorted(unknown)}")
        try:
            return kind(**{name: table[name](field) for name, field in given.items()})
        except TypeError as error:
            raise ValueError(f"missing fields: {error}") from error

    return decode
