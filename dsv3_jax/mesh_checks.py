"""Checks that a mesh can divide the program of a config; errors name what would work."""

import math

from dsv3_jax.config import Config, ModelConfig
from dsv3_jax.schedules import BatchSizes, with_batch
from sharding.mesh import MeshSpec
from sharding.schedules import nearest_n_micro


def check_mesh(config: Config, mesh: MeshSpec):
    """Check that `mesh` divides the program of `config`.

    Raises:
        ValueError: it does not; the error names what would work.
        NotImplementedError: redundant experts with pipeline stages.
    """
    train, context = config.train, config.parallel.context
    if mesh.ranks % context:
        raise ValueError(
            f"mesh {mesh}: a sequence lies over parallel.context={context} ranks of a node, and "
            f"ep has {mesh.ranks}; parallel.context={math.gcd(mesh.ranks, context)} works, and "
            f"so does ep{context}"
        )
    axes = "dp * ep" if context == 1 else "dp * ep / parallel.context"
    for batch in reversed(BatchSizes.of(train).sizes):
        name = f"train.batch={batch} sequences"
        if batch < train.batch:
            name += f" (on the way from train.first_batch={train.first_batch} to {train.batch})"
        _check_divides(name, batch, axes, mesh.n_data_shards // context, mesh)
    check_model_mesh(config.model, mesh)
    if mesh.pp > 1:
        for batch in BatchSizes.of(config.train).sizes:
            _check_pipeline(with_batch(config, batch), mesh)


def rows_per_device(config: Config, mesh: MeshSpec) -> int:
    """Return the sequences, or slices of sequences, per device in a step's batch."""
    return config.train.batch * config.parallel.context // mesh.n_data_shards


def n_micro_batches(config: Config, mesh: MeshSpec) -> int:
    """Return the micro-batches of a step that pass through the pipeline."""
    return rows_per_device(config, mesh) // config.pipeline.micro_batch_size


def schedule_obstacle(schedule: str, config: Config, mesh: MeshSpec) -> str | None:
    """Return why a schedule cannot run the config on the mesh, and what would work; None if it can.

    Every stage needs work. The embedding with the dense layers counts as a layer here, and so does
    the output head with MTP.
    """
    model, n_micro = config.model, n_micro_batches(config, mesh)
    stages_per_rank = 2 if schedule == "dualpipev" else 1
    n_stages = mesh.pp * stages_per_rank
    n_units = model.n_layers - model.n_dense + 2
    needed_micro = nearest_n_micro(schedule, mesh.pp, n_micro)
    if needed_micro is None:
        return f"dualpipe needs an even number of stages, not pp={mesh.pp}"
    if n_units < n_stages:
        return (
            f"{schedule} on pp={mesh.pp} makes {n_stages} stages of {n_units - 2} layers with "
            f"experts and both ends of the model; at most pp={n_units // stages_per_rank} works"
        )
    if needed_micro != n_micro:
        rows = needed_micro * config.pipeline.micro_batch_size
        batch = rows * mesh.n_data_shards // config.parallel.context
        return (
            f"{schedule} on pp={mesh.pp} needs {needed_micro} micro-batches, and train.batch="
            f"{config.train.batch} makes {n_micro} of pipeline.micro_batch_size="
            f"{config.pipeline.micro_batch_size} on {mesh.n_data_shards} devices per stage; "
            f"train.batch={batch} works"
        )
    return None


def _check_pipeline(config: Config, mesh: MeshSpec):
    rows, micro = rows_per_device(config, mesh), config.pipeline.micro_batch_size
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
    if reason := schedule_obstacle("zb1p" if schedule == "auto" else schedule, config, mesh):
        raise ValueError(f"mesh {mesh}: {reason}")


def check_model_mesh(model: ModelConfig, mesh: MeshSpec):
    """Check that `mesh` divides the parameters of `model`.

    Raises:
        ValueError: it does not; the error names what would work.
    """
    sizes = {"model.vocab_size": model.vocab_size, "model.width": model.width}
    if model.moe:
        sizes = {"model.moe.n_experts": model.moe.n_experts} | sizes
        if n_redundant := model.moe.n_redundant:
            name = f"model.moe.n_redundant={n_redundant}"
            _check_divides(name, n_redundant, "ep", mesh.ep, mesh)
        groups = model.moe.n_groups
        if mesh.nodes > 1:
            _check_divides(f"model.moe.n_groups={groups}", groups, "nodes", mesh.nodes, mesh)
    for name, size in sizes.items():
        _check_divides(f"{name}={size}", size, "ep", mesh.ep, mesh)


def _check_divides(name: str, size: int, axis: str, n_shards: int, mesh: MeshSpec):
    if size % n_shards:
        divisor = max(n for n in range(1, n_shards + 1) if size % n == 0)
        raise ValueError(
            f"mesh {mesh}: {name} cannot be divided over {axis}={n_shards}; nearest that work: "
            f"{axis}={divisor}, or {max(size // n_shards, 1) * n_shards} instead of {size}"
        )
