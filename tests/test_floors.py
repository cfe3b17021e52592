"""The floors of the code: imports go down only, and some things occur in one place only."""

import ast
import functools
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

FLOORS = {
    "sharding": 1,
    "dsv3_jax.shapes": 2,
    "dsv3_jax.config": 2,
    "dsv3_jax.config_cli": 2,
    "dsv3_jax.errors": 2,
    "dsv3_jax.cli": 2,
    "dsv3_jax.progress": 2,
    "dsv3_jax.files": 2,
    "dsv3_jax.hardware": 2,
    "dsv3_jax.interconnect": 2,
    "dsv3_jax.schedules": 2,
    "dsv3_jax.mesh_checks": 2,
    "dsv3_jax.numerics": 3,
    "dsv3_jax.params": 4,
    "dsv3_jax.layer_scan": 4,
    "dsv3_jax.model": 4,
    "dsv3_jax.flops": 5,
    "dsv3_jax.pipeline_plan": 5,
    "dsv3_jax.losses": 5,
    "dsv3_jax.optimizer": 5,
    "dsv3_jax.checkpoint": 5,
    "dsv3_jax.data": 5,
    "dsv3_jax.weights": 5,
    "dsv3_jax.serving": 6,
    "dsv3_jax.training": 6,
    "dsv3_jax.generate": 7,
    "dsv3_jax.evaluation": 7,
    "dsv3_jax.posttrain": 7,
    "dsv3_jax.aot": 7,
    "dsv3_jax": 8,  # the package's own __init__: names for its users, not for its modules
    "configs": 8,
    "train": 8,
    "tools": 8,
    "dsv3_jax.aot.__main__": 8,
    "dsv3_jax.plan": 8,
}
SAME_FLOOR = {  # (importer, imported): may import
    ("dsv3_jax.layer_scan", "dsv3_jax.params"),
    ("dsv3_jax.model", "dsv3_jax.params"),
    ("dsv3_jax.model", "dsv3_jax.layer_scan"),
    ("dsv3_jax.config_cli", "dsv3_jax.errors"),
    ("dsv3_jax.cli", "dsv3_jax.config"),
    ("dsv3_jax.schedules", "dsv3_jax.config"),
    ("dsv3_jax.mesh_checks", "dsv3_jax.config"),
    ("dsv3_jax.mesh_checks", "dsv3_jax.schedules"),
    ("dsv3_jax.schedules", "dsv3_jax.shapes"),
    ("dsv3_jax.interconnect", "dsv3_jax.hardware"),
    ("dsv3_jax.pipeline_plan", "dsv3_jax.flops"),
    ("dsv3_jax.weights", "dsv3_jax.checkpoint"),
    ("dsv3_jax.weights", "dsv3_jax.data"),
    ("dsv3_jax.training", "dsv3_jax.serving"),
    ("train", "configs"),
    ("dsv3_jax.plan", "configs"),
    ("dsv3_jax.aot.__main__", "configs"),
}

COLLECTIVES = {
    "all_gather",
    "all_gather_invariant",
    "all_to_all",
    "axis_index",
    "axis_size",
    "pbroadcast",
    "pcast",
    "pmax",
    "pmean",
    "pmin",
    "ppermute",
    "pshuffle",
    "psum",
    "psum_scatter",
    "pswapaxes",
    "pvary",
    "ragged_all_to_all",
}
PLACEMENT = {"shard_map", "PartitionSpec", "NamedSharding"}

FOREIGN = """
    q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim qk_head_dim v_head_dim
    n_routed_experts n_shared_experts num_experts_per_tok moe_intermediate_size n_group topk_group
    topk_method routed_scaling_factor norm_topk_prob scoring_func first_k_dense_replace
    num_hidden_layers hidden_size intermediate_size num_attention_heads num_key_value_heads
    rms_norm_eps rope_theta rope_scaling original_max_position_embeddings max_position_embeddings
    initializer_range num_nextn_predict_layers aux_loss_alpha seq_aux
    embed_tokens lm_head self_attn q_a_proj q_b_proj q_proj kv_a_proj_with_mqa kv_b_proj o_proj
    gate_proj up_proj down_proj input_layernorm post_attention_layernorm shared_experts
    e_score_correction_bias eh_proj enorm hnorm shared_head
""".split()


def files(*where: str) -> list[Path]:
    paths = [path for name in where for path in sorted((ROOT / name).rglob("*.py"))]
    return [path for path in paths if "__pycache__" not in path.parts]


def program() -> list[Path]:
    """The code that runs: everything but tests and benchmarks."""
    return [*files("sharding", "dsv3_jax", "configs", "tools"), ROOT / "train.py"]


def everything() -> list[Path]:
    return [*program(), *files("tests", "benchmarks")]


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def place(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{node.lineno}"


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path):
    """(node, module) of every import, wherever it stands; `from a import b` may mean a.b."""
    known = {module_of(other) for other in program()}
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name
        elif isinstance(node, ast.ImportFrom):
            package = node.module or ""
            if node.level:
                here = (module_of(path) + ".x" * (path.name == "__init__.py")).split(".")
                package = ".".join([*here[: -node.level], *filter(None, [node.module])])
            for alias in node.names:
                inner = f"{package}.{alias.name}"
                yield node, inner if inner in known else package


def ours(module: str) -> bool:
    return module.split(".")[0] in {"sharding", "dsv3_jax", "configs", "tools", "train"}


def unit_of(module: str) -> str | None:
    """The entry of FLOORS that a module belongs to."""
    if module in FLOORS:
        return module
    parts = module.split(".")
    above = [".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1)]
    return next((name for name in above if name in FLOORS and name != "dsv3_jax"), None)


def names_used(path: Path):
    """(node, name) of every attribute and imported name."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Attribute):
            yield node, node.attr
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield node, alias.name


def fail_with(violations: list[str]):
    assert not violations, "\n" + "\n".join(violations)


def test_every_module_has_a_floor():
    fail_with([f"{path}: no floor" for path in program() if unit_of(module_of(path)) is None])


def test_imports_go_down():
    violations = []
    for path in program():
        unit = unit_of(module_of(path))
        for node, module in imports(path):
            other = unit_of(module)
            if not ours(module) or unit is None or other == unit or (unit, other) in SAME_FLOOR:
                continue
            if other is None or FLOORS[other] >= FLOORS[unit]:
                violations.append(f"{place(path, node)}: {unit} imports {module}")
    fail_with(violations)


def test_presets_import_the_config_only():
    """And other presets, to change them."""
    presets = [f"configs.{path.stem}" for path in files("configs")]
    violations = [
        f"{place(path, node)}: imports {module}"
        for path in files("configs")
        for node, module in imports(path)
        if module not in ("dsv3_jax.config", "dsv3_jax.errors", "configs", *presets)
        and module.split(".")[0] not in sys.stdlib_module_names
    ]
    fail_with(violations)


def test_sharding_needs_arrays_only():
    """JAX, NumPy, and what types and rearranges arrays."""
    allowed = {"jax", "numpy", "jaxtyping", "einops", "sharding", *sys.stdlib_module_names}
    violations = [
        f"{place(path, node)}: imports {module}"
        for path in files("sharding")
        for node, module in imports(path)
        if module.split(".")[0] not in allowed
    ]
    fail_with(violations)


def test_collectives_and_placements_stay_in_sharding():
    """Training may also place whole arrays (NamedSharding); it takes the specs from sharding."""
    violations = []
    for path in program():
        if path.relative_to(ROOT).parts[0] == "sharding":
            continue
        training = module_of(path).startswith("dsv3_jax.training")
        forbidden = (COLLECTIVES | PLACEMENT) - ({"NamedSharding"} if training else set())
        for node, name in names_used(path):
            if name in forbidden:
                violations.append(f"{place(path, node)}: {name}")
    fail_with(violations)


def test_foreign_names_stay_in_hf_weights():
    pattern = re.compile(rf"\b({'|'.join(FOREIGN)})\b")
    violations = [
        f"{path.relative_to(ROOT)}:{number}: {found[0]}"
        for path in program()
        if path.name not in ("hf_config.py", "hf_names.py")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if (found := pattern.search(line))
    ]
    fail_with(violations)


def test_no_private_jax():
    violations = [
        f"{place(path, node)}: {module}"
        for path in everything()
        for node, module in imports(path)
        if re.match(r"jax(lib)?\._src|jaxlib\b", module)
    ]
    for path in everything():
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Attribute) and node.attr == "_src":
                violations.append(f"{place(path, node)}: {ast.unparse(node)}")
    fail_with(violations)


@pytest.mark.parametrize("package", ["pickle", "cloudpickle", "dill", "joblib", "shelve", "chex"])
def test_program_does_not_import(package):
    """Data is never code (no pickle), and test dependencies stay in tests."""
    violations = [
        place(path, node)
        for path in program()
        for node, module in imports(path)
        if module.split(".")[0] == package
    ]
    fail_with(violations)


def test_numpy_files_are_read_without_pickle():
    violations = [
        place(path, node.value)
        for path in everything()
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.keyword)
        and node.arg == "allow_pickle"
        and not (isinstance(node.value, ast.Constant) and node.value.value is False)
    ]
    fail_with(violations)


def test_files_are_short():
    lengths = {path: len(path.read_text().splitlines()) for path in everything()}
    fail_with([f"{p.relative_to(ROOT)}: {n} lines" for p, n in lengths.items() if n > 400])
