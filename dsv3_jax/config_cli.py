"""Configs as text: fields set by `--set a.b=value`, and plain values for config.json."""

import ast
import copy
import dataclasses
import math
import types
import typing

from dsv3_jax.errors import did_you_mean

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


def override(config, *assignments: str):
    """Return `config` with fields replaced, e.g. by "optimizer.peak_lr=1e-3", checked as a whole.

    Raises:
        KeyError: a name is unknown; the message gives the nearest one, or the new name of a field.
        ValueError: no "=", a value that does not fit the field's type, or fields that do not fit
            together.
    """
    values = to_dict(config)
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise ValueError(f"--set {assignment!r}: expected section.field=value")
        path = path.strip()
        if path in RENAMED:
            raise KeyError(f"{path} is now {RENAMED[path]}")
        _assign(type(config), values, path, text.strip())
    return from_dict(type(config), values)


def _assign(config_type: type, values: dict, path: str, text: str):
    """Parse `text` and put it at `path` into the plain values of a config."""
    *sections, name = path.split(".")
    for key in sections:
        hint = _type_hint(config_type, path, key)
        if not isinstance(values[key], dict):
            raise KeyError(f"config key {path!r}: {key!r} is {values[key]!r} and has no fields")
        config_type, values = _dataclass_in(hint), values[key]
    hint = _type_hint(config_type, path, name)
    if dataclasses.is_dataclass(hint):
        values[name] |= _named_values(hint, path, text)
    else:
        values[name] = _parse(path, text, hint)


def _type_hint(config_type: type, path: str, key: str):
    hints = typing.get_type_hints(config_type)
    if key not in hints:
        raise KeyError(f"unknown config key {path!r}: in it {key!r}: {did_you_mean(key, hints)}")
    return hints[key]


def _dataclass_in(hint) -> type | None:
    """Return the dataclass in a type hint such as `X` or `X | None`; None without one."""
    return next(filter(dataclasses.is_dataclass, (hint, *typing.get_args(hint))), None)


def _named_values(config_type: type, path: str, name: str) -> dict:
    """Return the values of the fields that a name stands for, as in "precision=fp8"."""
    known = getattr(config_type, "NAMED", {})
    if name not in known:
        first = dataclasses.fields(config_type)[0].name
        hint = did_you_mean(name, known) if known else f"set its fields, such as {path}.{first}"
        raise ValueError(f"--set {path}={name}: no such {path}; {hint}")
    return known[name]


def _parse(path: str, text: str, hint):
    """Return `text` as a value of the annotated type; numbers may be written as 1e9 or 10_000."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if type(None) in options and text == "None":
        return None
    field_type = next(option for option in options if option is not type(None))
    if field_type is str:
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = None
    if field_type in (int, float) and type(value) in (int, float) and math.isfinite(value):
        if field_type(value) == value:
            return field_type(value)
    elif field_type is bool and isinstance(value, bool):
        return value
    raise ValueError(f"--set {path}={text}: expected {getattr(field_type, '__name__', field_type)}")


def to_dict(config) -> dict:
    """Return the config as plain nested values, for config.json."""
    return dataclasses.asdict(config)


def from_dict(config_type: type, values: dict):
    """Return the config, or the section of one, whose `to_dict` is `values`.

    Raises:
        KeyError: an unknown name; the message gives the nearest one.
    """
    hints = typing.get_type_hints(config_type)
    for name in values.keys() - hints.keys():
        raise KeyError(f"{config_type.__name__} has no field {name!r}: {did_you_mean(name, hints)}")

    def value_of(name: str, value):
        section = _dataclass_in(hints[name])
        return from_dict(section, value) if section and isinstance(value, dict) else value

    return config_type(**{name: value_of(name, value) for name, value in values.items()})


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
    """Return nested values as one dict by dotted names."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
