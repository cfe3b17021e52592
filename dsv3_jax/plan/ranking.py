"""The meshes of a number of devices on which a config runs, ranked by their predicted speed."""

from dsv3_jax.config import Config
from dsv3_jax.hardware import GIB, Chip
from dsv3_jax.mesh_checks import check_mesh
from dsv3_jax.plan.memory import memory
from dsv3_jax.plan.speed import speed
from dsv3_jax.schedules import with_batch
from sharding.mesh import MeshSpec


def meshes(n_devices: int) -> list[MeshSpec]:
    """Return all dp x ep of so many devices."""
    sizes = [ep for ep in range(1, n_devices + 1) if n_devices % ep == 0]
    return [MeshSpec(dp=n_devices // ep, ranks=ep) for ep in sizes]


def obstacle(config: Config, mesh: MeshSpec) -> str:
    """Return why the program can't be divided over the mesh; empty if it can."""
    try:
        check_mesh(config, mesh)
    except ValueError as error:
        return str(error).removeprefix(f"mesh {mesh}: ")
    return ""


def node_forms(config: Config, mesh: MeshSpec) -> list[str]:
    """Return the same mesh with its expert groups divided into nodes."""
    forms = [MeshSpec(dp=mesh.dp, nodes=n, ranks=mesh.ep // n) for n in range(2, mesh.ep + 1)]
    return [str(form) for form in forms if form.ep == mesh.ep and not obstacle(config, form)]


def largest_batch(config: Config, mesh: MeshSpec, chip: Chip) -> int:
    """Return the largest batch, up to the config's, that works and fits; 0 if none does."""
    batch, step = 0, max(1, mesh.n_data_shards // config.parallel.context)
    while batch + step <= config.train.batch:
        longer = with_batch(config, batch + step)
        if obstacle(longer, mesh) or sum(memory(longer, mesh).values()) > chip.hbm_bytes:
            break
        batch += step
    return batch


def ranking(config: Config, chip: Chip, n_devices: int, shape: tuple[int, ...]) -> dict:
    """Return the meshes that work, fastest first, and the others, each with its reason."""
    ranked, failed = [], []
    for mesh in meshes(n_devices):
        reason = obstacle(config, mesh)
        parts = {} if reason else memory(config, mesh)
        total = sum(parts.values())
        if total > chip.hbm_bytes:
            batch = largest_batch(config, mesh, chip)
            reason = f"needs {total / GIB:.1f} of {chip.hbm_bytes / GIB:.1f} GiB; "
            reason += f"--set train.batch={batch} fits" if batch else "one sequence is too much"
        if reason:
            failed.append({"mesh": str(mesh), "reason": reason})
            continue
        found = speed(config, mesh, chip, shape)._asdict()
        rates = {"tokens_per_second": found.pop("tokens_per_second"), "mfu": found.pop("mfu")}
        row = {"mesh": str(mesh), "same_as": node_forms(config, mesh)}
        row |= {"memory_bytes": parts | {"total": total}, "seconds": found}
        ranked.append(row | rates)
    return {"meshes": sorted(ranked, key=lambda row: row["seconds"]["step"]), "failed": failed}


def ranking_that_fits(
    config: Config, chip: Chip, n_devices: int, shape: tuple[int, ...]
) -> tuple[int, dict]:
    """Return a batch and its ranking: the config's batch, or if no mesh holds it a smaller one.

    The smaller one is the largest that any mesh holds. The meshes that fail, fail with the
    config's.
    """
    found = ranking(config, chip, n_devices, shape)
    largest = 0
    if not found["meshes"]:
        largest = max(largest_batch(config, mesh, chip) for mesh in meshes(n_devices))
    if largest:
        fitting = ranking(with_batch(config, largest), chip, n_devices, shape)
        found = {"meshes": fitting["meshes"], "failed": found["failed"]}
    return largest or config.train.batch, found
