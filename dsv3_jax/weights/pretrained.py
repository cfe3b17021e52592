"""Loading a model from a folder with weights onto a mesh."""

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
from dsv3_jax.weights.abstract_params import Params, abstract_params, build_model
from dsv3_jax.weights.sources import Official, Source, open_weights
from sharding.layout import Layout
from sharding.mesh import MeshSpec, make_mesh, mesh_spec, parse_mesh, start_devices


def load_pretrained(
    directory: str | Path, dtype: str = "float32", mesh: str | Mesh | None = None
) -> DeepSeekV3:
    """Return the model in a folder: official safetensors, or a workdir of train.py.

    Every process reads what its own devices hold. `model(tokens)` gives logits [B T V],
    `model.mtp_logits(tokens)` those of the token after the next.

    Args:
        dtype: "float32" or "bfloat16", of weights and compute; norms, router and balance bias are
            float32 in both. "fp8" for a released checkpoint in FP8 as it is: matmuls take its FP8
            values and scales, and activations in tiles of 128; what is not in FP8 is bfloat16.
        mesh: one device if None; else e.g. "ep8", or a mesh: experts, embedding and head are
            split over its expert axes, everything else is whole on every device.

    Raises:
        FileNotFoundError: nothing to load there, or a shard is missing.
        ValueError: damaged files, or tensors that do not fit config.json; names file and tensor.
    """
    return load_model(open_weights(directory), dtype, mesh)


def load_model(source: Source, dtype: str, mesh: str | Mesh | None) -> DeepSeekV3:
    """Return the model in an open source; else as `load_pretrained`."""
    if dtype not in WEIGHT_DTYPES:
        raise ValueError(f"dtype={dtype!r} must be one of {', '.join(WEIGHT_DTYPES)}")
    mesh = as_mesh(mesh)
    spec = mesh_spec(mesh)
    check_model_mesh(source.config, spec)
    if spec.pp > 1:
        flat = dataclasses.replace(spec, pp=1, dp=spec.pp * spec.dp)
        raise ValueError(f"mesh {spec}: only training has pipeline stages; use {flat}")
    master = jnp.dtype("bfloat16" if dtype == "fp8" else dtype)
    policy = Policy(compute=master, master=master, fp8=dtype == "fp8")
    layout = Layout(mesh=spec, zero=0)
    abstract = abstract_params(source.config, policy, mesh, layout)
    scales: Params = {}
    if policy.fp8:
        if not isinstance(source, Official):
            raise ValueError(
                f"dtype='fp8' reads the FP8 values of an official checkpoint, and "
                f"{source.directory} is none; use dtype='bfloat16'"
            )
        scales = source.scales(mesh, layout)
    with byte_bar(f"loading {source.directory}", source.n_bytes(abstract)) as advance:
        params = source.load(abstract, advance=advance)
    return build_model(source.config, policy, params, scales)


def as_mesh(mesh: str | Mesh | None) -> Mesh:
    """Return a mesh from a string of the mesh grammar; one device if None."""
    if mesh is None:
        return make_mesh(MeshSpec(), jax.devices()[:1])
    if isinstance(mesh, str):
        return make_mesh(parse_mesh(mesh, len(jax.devices())))
    return mesh


def start_mesh(text: str | None) -> Mesh:
    """Return the mesh of a command line, with virtual CPU devices as in train.py; one if None."""
    return as_mesh(None if text is None else make_mesh(start_devices(text)))
