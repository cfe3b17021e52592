"""The load of each rank for a placement of experts, counted slot by slot."""

import numpy as np


def with_homes(redundant: np.ndarray, n_experts: int, n_ranks: int) -> np.ndarray:
    """Redundant experts [L R] -> the expert in every slot [L E+R]: a rank's own, then those."""
    rows = redundant.reshape(len(redundant), n_ranks, redundant.shape[1] // n_ranks)
    homes = np.arange(n_experts, dtype=np.int32).reshape(1, n_ranks, -1)
    slots = np.concatenate([homes.repeat(len(redundant), axis=0), rows], axis=2)
    return slots.reshape(len(redundant), -1)


def rank_load(load: np.ndarray, slots: np.ndarray, n_ranks: int) -> np.ndarray:
    """Loads [L E] of experts -> loads [L n_ranks], for the expert in every slot [L P]."""
    count = (slots[:, :, None] == np.arange(load.shape[1])[None, None, :]).sum(1)
    assert count.all(), "an expert has no slot"
    share = np.take_along_axis(load / count, slots.astype(np.int64), axis=1)
    return share.reshape(len(load), n_ranks, -1).sum(-1)
