"""Every test: 8 virtual CPU devices, no silent broadcasting, array annotations checked."""

import jax
from jaxtyping import install_import_hook

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")
install_import_hook(["dsv3_jax", "sharding"], "typeguard.typechecked")
