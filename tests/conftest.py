"""Every test: 8 virtual CPU devices, no silent broadcasting, array annotations checked.

Programs of tests run once or twice, so XLA spends little on their machine code. Those of processes
that tests start, such as train.py, are compiled as users have them.
"""

import os

import jax
import pytest
from jaxtyping import install_import_hook

os.environ["JAX_PLATFORMS"] = "cpu"  # for the processes that tests start
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_disable_most_optimizations", True)
install_import_hook(["dsv3_jax", "sharding"], "typeguard.typechecked")


@pytest.fixture
def programs(tmp_path_factory, monkeypatch):
    """Of processes that a test starts, the later ones find what an earlier one compiled."""
    folder = tmp_path_factory.getbasetemp() / "programs"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder))
