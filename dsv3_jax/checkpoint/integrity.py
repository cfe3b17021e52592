"""One number for the bits of an array, so that a flipped one is never silent."""

import collections

import jax
import jax.numpy as jnp

from dsv3_jax.shapes import Array, UInt32


def fingerprints(arrays: dict[str, Array]) -> dict[str, str]:
    """One 32-bit number an array, in hex, that depends on its bits and not on its sharding.

    It is the sum modulo 2^32 of mix(word xor mix(index)) over all elements, with the element's bits
    as `word` and its place in the whole array as `index`. `mix` is a bijection, so a change within
    one element, such as a flipped bit, changes one term and therefore always the sum; mixing the
    index makes a term depend on its place, so that exchanged elements show. Integer sums commute,
    so devices may add in any order. Other damage passes with a chance of 2^-32.
    """
    groups = collections.defaultdict(dict)  # one program runs on one set of devices
    for path, array in arrays.items():
        groups[frozenset(array.sharding.device_set)][path] = array
    totals = collections.ChainMap(*(jax.device_get(_totals(group)) for group in groups.values()))
    return {path: f"{int(totals[path]):08x}" for path in arrays}


@jax.jit
def _totals(arrays: dict[str, Array]) -> dict[str, UInt32[Array, ""]]:
    return {path: fingerprint(array) for path, array in arrays.items()}


def fingerprint(array: Array) -> UInt32[Array, ""]:
    """The number that `fingerprints` writes in hex, of one array."""
    bits = array.astype(jnp.uint8) if array.dtype == bool else array
    word = {1: jnp.uint8, 2: jnp.uint16}.get(bits.dtype.itemsize, jnp.uint32)
    words = jax.lax.bitcast_convert_type(bits, word).astype(jnp.uint32)  # 64 bits: two words
    # No reshape to one dim: each device numbers the elements it holds, without communication.
    index = jnp.zeros(words.shape, jnp.uint32)
    for dim, size in enumerate(words.shape):
        place = jax.lax.broadcasted_iota(jnp.uint32, words.shape, dim)
        index = index * jnp.uint32(size) + place
    return _mix(words ^ _mix(index)).sum(dtype=jnp.uint32)


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """A bijection of 32-bit words that spreads each bit over all (the finalizer of MurmurHash3)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
