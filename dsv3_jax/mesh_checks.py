"""Whether the program of a config can be divided over a mesh, and if not, what would work."""

import math

from dsv3_jax.config import Config, ModelConfig
from dsv3_jax.schedules import BatchSizes, with_batch
from sharding.mesh import MeshSpec
from sharding.schedules import nearest_micro


def check_mesh(config: Config, mesh: MeshSpec):
    """Raise a ValueError, with what would work, unless `mesh` divides the program of `config`."""
    train, context = config.train, config.parallel.context
    if mesh.ranks % context:
        raise ValueError(
            f"mesh {mesh}: a sequence lies over parallel.context={context} ranks of a node, and "
            f"ep has {mesh.ranks}; parallel.context={math.gcd(mesh.ranks, context)} works, and "
            f"so does ep{context}"
        )
    axes = "dp * ep" if context == 1 else "dp * ep / parallel.context"
    for batch in reversed(BatchSizes.of(train).sizes):
        ramp = f" (on the way from train.first_batch={train.first_batch} to {train.batch})"
        what = f"train.batch={batch} sequences" + ramp * (batch < train.batch)
        _check_divides(what, batch, axes, mesh.n_data_shards // context, mesh)
    check_model_mesh(config.model, mesh)
    if mesh.pp > 1:
        for batch in BatchSizes.of(config.train).sizes:
            _check_pipeline(with_batch(config, batch), mesh)


def rows_a_device(config: Config, mesh: MeshSpec) -> int:
    """Sequences, or slices of them, that a device has of a step's batch."""
    return config.train.batch * config.parallel.context // mesh.n_data_shards


def n_micro_batches(config: Config, mesh: MeshSpec) -> int:
    """Micro-batches of a step that pass through the pipeline."""
    return rows_a_device(config, mesh) // config.pipeline.micro_batch_size


def why_not(schedule: str, config: Config, mesh: MeshSpec) -> str | None:
    """Why a schedule cannot run that config on that mesh, with what would work; None if it can."""
    model, n_micro = config.model, n_micro_batches(config, mesh)
    n_stages = mesh.pp * (2 if schedule == "dualpipev" else 1)
    # The embedding with the dense layers, and the output head with MTP, are as good as layers.
    n_parts = model.n_layers - model.n_dense + 2
    fits = nearest_micro(schedule, mesh.pp, n_micro)
    if fits is None:
        return f"dualpipe needs an even number of stages, not pp={mesh.pp}"
    if n_parts < n_stages:
        most = n_parts // (2 if schedule == "dualpipev" else 1)
        return (
            f"{schedule} on pp={mesh.pp} makes {n_stages} stages of {n_parts - 2} layers with "
            f"experts and both ends of the model; at most pp={most} works"
        )
    if fits != n_micro:
        batch = (
            fits * config.pipeline.micro_batch_size * mesh.n_data_shards // config.parallel.context
        )
        return (
            f"{schedule} on pp={mesh.pp} needs {fits} micro-batches, and train.batch="
            f"{config.train.batch} makes {n_micro} of pipeline.micro_batch_size="
            f"{config.pipeline.micro_batch_size} on {mesh.n_data_shards} devices a stage; "
            f"train.batch={batch} works"
        )
    return None


def _check_pipeline(config: Config, mesh: MeshSpec):
    rows, micro = rows_a_device(config, mesh), config.pipeline.micro_batch_size
    if rows % micro:
        raise ValueError(
            f"mesh {mesh}: the {rows} sequences that a device has of train.batch="
            f"{config.train.batch} are no multiple of pipeline.micro_batch_size={micro}"
        )
    if config.model.n_dense == config.model.n_layers:
        raise ValueError(
            f"mesh {mesh}: stages are made of layers with experts, and model.n_dense="
            f"{config.model.n_dense} leaves none; use dp in place of pp"
        )
    if config.model.moe and config.model.moe.n_redundant:
        raise NotImplementedError(
            f"mesh {mesh}: model.moe.n_redundant={config.model.moe.n_redundant} with pipeline "
            f"stages; set it to 0, or use dp in place of pp"
        )
    schedule = config.pipeline.schedule
    if reason := why_not("zb1p" if schedule == "auto" else schedule, config, mesh):
        raise ValueError(f"mesh {mesh}: {reason}")


def check_model_mesh(model: ModelConfig, mesh: MeshSpec):
    """Raise a ValueError unless the parameters of `model` can be divided over `mesh`."""
    sizes = {"model.vocab_size": model.vocab_size, "model.width": model.width}
    if model.moe:
        sizes = {"model.moe.n_experts": model.moe.n_experts} | sizes
        if extra := model.moe.n_redundant:
            _check_divides(f"model.moe.n_redundant={extra}", extra, "ep", mesh.ep, mesh)
        groups = model.moe.n_groups
        if mesh.nodes > 1:
            _check_divides(f"model.moe.n_groups={groups}", groups, "nodes", mesh.nodes, mesh)
    for name, size in sizes.items():
        _check_divides(f"{name}={size}", size, "ep", mesh.ep, mesh)


def _check_divides(what: str, size: int, axis: str, shares: int, mesh: MeshSpec):
    if size % shares:
        fits = max(n for n in range(1, shares + 1) if size % n == 0)
        raise ValueError(
            f"mesh {mesh}: {what} cannot be divided over {axis}={shares}; nearest that work: "
            f"{axis}={fits}, or {max(size // shares, 1) * shares} instead of {size}"
        )
