"""`load_pretrained`: a folder with weights -> a model on a mesh."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dsv3_jax.config import WEIGHT_DTYPES
from dsv3_jax.mesh_checks import check_model_mesh
from dsv3_jax.model.deepseek import DeepSeekV3
from dsv3_jax.numerics.policy import Policy
from dsv3_jax.progress import byte_bar
from dsv3_jax.weights.sources import (
    Official,
    Source,
    as_model,
    open_weights,
    wanted_arrays,
)
from sharding.layout import Layout
from sharding.mesh import MeshSpec, make_mesh, mesh_spec, parse_mesh, start_devices


def load_pretrained(
    directory: str | Path, dtype: str = "float32", mesh: str | Mesh | None = None
) -> DeepSeekV3:
    """The model in a folder: official safetensors, an import of them, or a workdir of train.py.

    Every process reads what its own devices hold. `model(tokens)` gives logits [B T V],
    `model.mtp_logits(tokens)` those of the token after the next.

    Args:
        dtype: "float32" or "bfloat16", of weights and compute; norms, router and balance bias are
            float32 in both. "fp8" for a released checkpoint in FP8 as it is: products take its
            codes, and activations in tiles of 128; what is not in FP8 is bfloat16.
        mesh: one device if None; else e.g. "ep8", or a mesh: experts, embedding and head lie
            split over its expert axes, everything else is whole on every device.

    Raises:
        FileNotFoundError: nothing to load there, or a shard is missing.
        ValueError: damaged files, or tensors that do not fit config.json; names file and tensor.
    """
    return load_model(open_weights(directory), dtype, mesh)


def load_model(source: Source, dtype: str, mesh: str | Mesh | None) -> DeepSeekV3:
    """`load_pretrained` of what is open already."""
    if dtype not in WEIGHT_DTYPES:
        raise ValueError(f"dtype={dtype!r} must be one of {', '.join(WEIGHT_DTYPES)}")
    mesh = mesh_of(mesh)
    spec = mesh_spec(mesh)
    check_model_mesh(source.config, spec)
    if spec.pp > 1:
        flat = dataclasses.replace(spec, pp=1, dp=spec.pp * spec.dp)
        raise ValueError(f"mesh {spec}: only training has pipeline stages; use {flat}")
    wide = jnp.dtype("bfloat16" if dtype == "fp8" else dtype)
    policy = Policy(compute=wide, master=wide, fp8=dtype == "fp8")
    layout = Layout(mesh=spec, zero=0)
    wanted = wanted_arrays(source.config, policy, mesh, layout)
    scales: dict[str, jax.Array] = {}
    if policy.fp8:
        if not isinstance(source, Official):
            raise ValueError(
                f"dtype='fp8' reads the codes of an official checkpoint, and {source.directory} is "
                "none; use dtype='bfloat16'"
            )
        scales = source.scales(mesh, layout)
    with byte_bar(f"loading {source.directory}", source.n_bytes(wanted)) as advance:
        arrays = source.load(wanted, advance=advance)
    return as_model(source.config, policy, arrays, scales)


def mesh_of(mesh: str | Mesh | None) -> Mesh:
    """The mesh that a user names: a string of the mesh grammar, or none for one device."""
    if mesh is None:
        return make_mesh(MeshSpec(), jax.devices()[:1])
    if isinstance(mesh, str):
        return make_mesh(parse_mesh(mesh, len(jax.devices())))
    return mesh


def start_mesh(text: str | None) -> Mesh:
    """The mesh that a command line names, with virtual CPU devices as in train.py; none: one."""
    return mesh_of(None if text is None else make_mesh(start_devices(text)))
