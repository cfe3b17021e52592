"""The table of kernels: a complete row per platform, and one signature per operation."""

import inspect

import pytest

from dsv3_jax.numerics.kernels import pick


def arguments(fn) -> list[str]:
    """Return the names of a function's arguments, without the keywords that tests pass."""
    parameters = inspect.signature(inspect.unwrap(fn)).parameters.values()
    return [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]


@pytest.mark.parametrize("platform", ["tpu", "gpu", "cuda"])
def test_kernels_take_the_arguments_of_their_reference(platform):
    kernels, reference = pick(platform), pick("cpu")
    for name, fn in kernels._asdict().items():
        assert arguments(fn) == arguments(getattr(reference, name)), name


def test_platforms_without_kernels_run_the_reference():
    assert pick("cpu") == pick("METAL")
    assert pick("gpu") == pick("cuda")
    assert pick("tpu").attention is not pick("cpu").attention
