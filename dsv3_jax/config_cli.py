"""Configs in other clothes: fields replaced by `--set a.b=value`, plain values for config.json."""

import ast
import copy
import dataclasses
import difflib
import math
import types
import typing

RENAMED = {  # fields of older versions, by their names in them
    "losses.bias_rate": "losses.bias_update_speed",
    "model.moe.n_groups_kept": "model.moe.topk_groups",
    "parallel.capacity": "parallel.capacity_factor",
    "parallel.pieces": "parallel.overlap_chunks",
    "parallel.place_every": "parallel.rebalance_every",
    "pipeline.late": "pipeline.max_deferred_wgrads",
    "pipeline.micro_batch": "pipeline.micro_batch_size",
    "precision.products": "precision.matmul",
}


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """A " (did you mean ...?)" for an unknown name, or the list of names if none is near."""
    known = sorted(known)
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {match[0]!r}?" if match else f"known: {', '.join(known)}"


def override(config, *assignments: str):
    """`config` with fields replaced, e.g. by "optimizer.peak_lr=1e-3", and checked as a whole.

    Raises:
        KeyError: a name on the path is unknown; the message gives the nearest one.
        ValueError: no "=", a value that does not fit the field's type, or a config that can't be.
    """
    values = to_dict(config)
    for assignment in assignments:
        path, sign, text = assignment.partition("=")
        if not sign:
            raise ValueError(f"--set {assignment!r}: expected section.field=value")
        path = path.strip()
        if path in RENAMED:
            raise KeyError(f"{path} is now {RENAMED[path]}")
        _assign(type(config), values, path, text.strip())
    return from_dict(type(config), values)


def _assign(kind: type, values: dict, path: str, text: str):
    """Put the value that `text` means into the plain values of a `kind`."""
    *sections, name = path.split(".")
    for key in sections:
        hint = _hint(kind, path, key)
        if not isinstance(values[key], dict):
            raise KeyError(f"config key {path!r}: {key!r} is {values[key]!r} and has no fields")
        kind, values = _dataclass_in(hint), values[key]
    hint = _hint(kind, path, name)
    if dataclasses.is_dataclass(hint):
        values[name] |= _named(hint, path, text)
    else:
        values[name] = _parse(path, text, hint)


def _hint(kind: type, path: str, key: str):
    hints = typing.get_type_hints(kind)
    if key not in hints:
        raise KeyError(f"unknown config key {path!r}: in it {key!r}: {nearest(key, hints)}")
    return hints[key]


def _dataclass_in(hint) -> type | None:
    """The dataclass that an annotation is, or names beside None."""
    return next(filter(dataclasses.is_dataclass, (hint, *typing.get_args(hint))), None)


def _named(kind: type, path: str, name: str) -> dict:
    """The fields that a name stands for, such as "precision=fp8"."""
    known = getattr(kind, "NAMED", {})
    if name not in known:
        first = dataclasses.fields(kind)[0].name
        ask = nearest(name, known) if known else f"set its fields, such as {path}.{first}"
        raise ValueError(f"--set {path}={name}: no such {path}; {ask}")
    return known[name]


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


def with_new_names(values: dict) -> dict:
    """Return saved values of a config with fields of older versions under today's names."""
    values = copy.deepcopy(values)
    for old, new in RENAMED.items():
        *path, name = old.split(".")
        section = values
        for key in path:
            section = section.get(key) or {}
        if name in section:
            section[new.rpartition(".")[2]] = section.pop(name)
    return values


def differences(config, saved: dict) -> list[str]:
    """Return a line "a.b: saved -> now" for each field that differs from a saved `to_dict`."""
    now, before = _flatten(to_dict(config)), _flatten(with_new_names(saved))
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
        inner = _dataclass_in(hints[name])
        return from_dict(inner, value) if inner and isinstance(value, dict) else value

    return kind(**{name: value_of(name, value) for name, value in values.items()})
