"""Configs in other clothes: fields replaced by `--set a.b=value`, plain values for config.json."""

import ast
import dataclasses
import difflib
import math
import types
import typing


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """A " (did you mean ...?)" for an unknown name, or the list of names if none is near."""
    known = sorted(known)
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {match[0]!r}?" if match else f"known: {', '.join(known)}"


def override(config, assignment: str):
    """`config` with one field replaced, e.g. "optimizer.peak_lr=1e-3".

    Raises:
        KeyError: a name on the path is unknown; the message gives the nearest one.
        ValueError: no "=", or a value that does not fit the field's type.
    """
    path, sign, text = assignment.partition("=")
    if not sign:
        raise ValueError(f"--set {assignment!r}: expected section.field=value")
    return _replace(config, path.strip(), path.strip().split("."), text.strip())


def _replace(config, path: str, keys: list[str], text: str):
    hints = typing.get_type_hints(type(config))
    if keys[0] not in hints:
        raise KeyError(f"unknown config key {path!r}: in it {keys[0]!r}: {nearest(keys[0], hints)}")
    if len(keys) == 1 and dataclasses.is_dataclass(hints[keys[0]]):
        value = _named(getattr(config, keys[0]), path, text)
    elif len(keys) == 1:
        value = _parse(path, text, hints[keys[0]])
    elif dataclasses.is_dataclass(child := getattr(config, keys[0])):
        value = _replace(child, path, keys[1:], text)
    else:
        raise KeyError(f"config key {path!r}: {keys[0]!r} is {child!r} and has no fields")
    return dataclasses.replace(config, **{keys[0]: value})


def _named(config, path: str, name: str):
    """A part of a config with the fields that a name stands for, such as "precision=fp8"."""
    known = getattr(type(config), "NAMED", {})
    if name not in known:
        first = dataclasses.fields(config)[0].name
        ask = nearest(name, known) if known else f"set its fields, such as {path}.{first}"
        raise ValueError(f"--set {path}={name}: no such {path}; {ask}")
    return dataclasses.replace(config, **known[name])


def _parse(path: str, text: str, hint):
    """`text` as a value of the annotated type; numbers may be written as 1e9 or 10_000."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if type(None) in options and text == "None":
        return None
    kind = next(option for option in options if option is not type(None))
    if kind is str:
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = None
    if kind in (int, float) and type(value) in (int, float) and math.isfinite(value):
        if kind(value) == value:
            return kind(value)
    elif kind is bool and isinstance(value, bool):
        return value
    raise ValueError(f"--set {path}={text}: expected {getattr(kind, '__name__', kind)}")


def to_dict(config) -> dict:
    """The config as plain nested values, for config.json."""
    return dataclasses.asdict(config)


def differences(config, saved: dict) -> list[str]:
    """A line "a.b: saved -> now" for each field of `config` that differs from a `to_dict`."""
    now, before = _flatten(to_dict(config)), _flatten(saved)
    return [
        f"{key}: {before.get(key)!r} -> {now.get(key)!r}"
        for key in sorted(now.keys() | before.keys())
        if now.get(key) != before.get(key)
    ]


def _flatten(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in tree.items():
        inner = isinstance(value, dict)
        flat |= _flatten(value, f"{prefix}{key}.") if inner else {prefix + key: value}
    return flat


def from_dict(kind: type, values: dict):
    """A config, or a part of one, from a `to_dict` of it.

    Raises:
        KeyError: an unknown name; the message gives the nearest one.
    """
    hints = typing.get_type_hints(kind)
    for name in values.keys() - hints.keys():
        raise KeyError(f"{kind.__name__} has no field {name!r}: {nearest(name, hints)}")

    def value_of(name: str, value):
        options = (hints[name], *typing.get_args(hints[name]))
        inner = next(filter(dataclasses.is_dataclass, options), None)
        return from_dict(inner, value) if inner and isinstance(value, dict) else value

    return kind(**{name: value_of(name, value) for name, value in values.items()})
