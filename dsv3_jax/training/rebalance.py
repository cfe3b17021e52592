"""Redundant experts while a run trains: chosen anew from the load since the last choice."""

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from dsv3_jax.config import Config
from sharding.eplb import choose_redundant
from sharding.mesh import REPLICATED, make_global_array, mesh_spec


class ExpertRebalancer:
    """The redundant experts in use and the load since they were chosen; idle if a config has none.

    `slots` [L R] int32 is the expert in each redundant slot, on all devices; None without any.
    """

    def __init__(self, config: Config, mesh: Mesh, saved: dict | None = None):
        """Begin with even loads, or as `to_dict` of a run with as many slots was."""
        model, self._every = config.model, config.parallel.rebalance_every
        self._mesh, self.slots = mesh, None
        self._n_slots = model.moe.n_redundant if model.moe else 0
        if not self._n_slots:
            return
        self._load = np.ones((model.n_moe_layers, model.moe.n_experts), np.float32)
        if saved and np.shape(saved["slots"])[1] == self._n_slots:
            self._load = np.array(saved["load"], np.float32)
            self._put(np.array(saved["slots"], np.int32))
        else:
            self._choose()

    def is_due(self, step: int) -> bool:
        """Return whether experts are chosen anew after this step."""
        return self._n_slots > 0 and step % self._every == 0

    def observe(self, step: int, load: Float[np.ndarray, "L E"]):
        """Add the load of a step; if it is due, choose anew."""
        if self._n_slots:
            self._load = self._load + load
            if self.is_due(step):
                self._choose()

    def to_dict(self) -> dict | None:
        """Return plain values for a checkpoint; the names are those on disk."""
        if not self._n_slots:
            return None
        return {"slots": np.asarray(self.slots).tolist(), "load": self._load.tolist()}

    def _choose(self):
        spec = mesh_spec(self._mesh)
        self._put(choose_redundant(self._load, self._n_slots, spec.nodes, spec.ep))
        self._load = np.ones_like(self._load)

    def _put(self, slots: np.ndarray):
        self.slots = make_global_array(slots, self._mesh, REPLICATED)
