"""DeepSeek-V3 in JAX and Flax: train, post-train and serve on TPU and GPU."""

import typing

if typing.TYPE_CHECKING:
    from dsv3_jax.weights.pretrained import load_pretrained
    from dsv3_jax.weights.save import save_pretrained

__all__ = ["load_pretrained", "save_pretrained"]


def __getattr__(name: str):
    """Import the package's functions when they are first used: JAX takes seconds to import."""
    match name:
        case "load_pretrained":
            from dsv3_jax.weights.pretrained import load_pretrained

            return load_pretrained
        case "save_pretrained":
            from dsv3_jax.weights.save import save_pretrained

            return save_pretrained
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
