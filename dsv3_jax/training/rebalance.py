"""Which experts are redundant while a run trains: chosen anew from the load it sees."""

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from dsv3_jax.config import Config
from sharding.eplb import choose_redundant
from sharding.mesh import REPLICATED, make_global_array, mesh_spec


class Redundancy:
    """The placement in use, and the load since it was chosen; nothing if the config has none.

    `slots` is what a step takes: int32 [L R] on all devices, or None.
    """

    def __init__(self, config: Config, mesh: Mesh, saved: dict | None = None):
        """Begin with even loads, or as `saved` by a run with as many slots."""
        model, self._every = config.model, config.parallel.rebalance_every
        self._mesh, self.slots = mesh, None
        self._n_slots = model.moe.n_redundant if model.moe else 0
        if not self._n_slots:
            return
        self._load = np.ones((model.n_moe_layers, model.moe.n_experts), np.float32)
        if saved and np.shape(saved["slots"])[1] == self._n_slots:
            self._load = np.array(saved["load"], np.float32)
            self._use(np.array(saved["slots"], np.int32))
        else:
            self._place()

    def due(self, step: int) -> bool:
        """Whether experts are placed anew after this step."""
        return self._n_slots > 0 and step % self._every == 0

    def observe(self, step: int, load: Float[np.ndarray, "L E"]):
        """Take a step's load into account; if it is due, change the placement."""
        if self._n_slots:
            self._load = self._load + load
            if self.due(step):
                self._place()

    def saved(self) -> dict | None:
        """What a checkpoint keeps, as plain values."""
        if not self._n_slots:
            return None
        return {"slots": np.asarray(self.slots).tolist(), "load": self._load.tolist()}

    def _place(self):
        spec = mesh_spec(self._mesh)
        self._use(choose_redundant(self._load, self._n_slots, spec.nodes, spec.ep))
        self._load = np.ones_like(self._load)

    def _use(self, slots: np.ndarray):
        self.slots = make_global_array(slots, self._mesh, REPLICATED)
