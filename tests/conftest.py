"""Every test: 8 virtual CPU devices, no silent broadcasting, array annotations checked."""

import os

import jax
from jaxtyping import install_import_hook

os.environ["JAX_PLATFORMS"] = "cpu"  # for the processes that tests start
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")
install_import_hook(["dsv3_jax", "sharding"], "typeguard.typechecked")
