"""Checks of single fields; each raises a ValueError that names the field and its value."""


def check_positive(config, section: str, *names: str):
    """Raise unless the named fields of `config` are above 0."""
    for name in names:
        if getattr(config, name) <= 0:
            raise ValueError(f"{section}.{name}={getattr(config, name)} must be positive")


def check_not_negative(config, section: str, *names: str):
    """Raise if one of the named fields of `config` is below 0."""
    for name in names:
        if getattr(config, name) < 0:
            raise ValueError(f"{section}.{name}={getattr(config, name)} must not be negative")


def check_choice(name: str, value: object, known: tuple):
    """Raise unless `value` is one of the known ones."""
    if value not in known:
        raise ValueError(f"{name}={value!r} must be {' or '.join(map(repr, known))}")


def check_multiple(name: str, value: int, unit_name: str, unit: int):
    """Raise unless `unit` divides `value`; both are named as a user sets them."""
    if value % unit:
        raise ValueError(f"{name}={value} must be a multiple of {unit_name}={unit}")
