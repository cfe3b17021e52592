"""A model of several sizes for meshes with stages, and what the plain program makes of it.

The reference takes one sequence at a time, as micro-batches do, so that sums of both sides differ
only in how sequences are added up. All tokens are targets: the loss is the mean over sequences.
"""

import functools
import operator

import jax
import numpy as np
from flax import nnx
from reference.small_step import LENGTH, VOCAB, config_of, loss_of, placed

from dsv3_jax.config import Config
from dsv3_jax.config_cli import override
from dsv3_jax.losses import Batch
from dsv3_jax.model.deepseek import abstract_model
from dsv3_jax.numerics.policy import Policy
from dsv3_jax.training.state import split_model
from dsv3_jax.training.step import loss_and_gradients


@functools.cache
def config_with(n_layers: int, n_rows: int, *settings: str) -> Config:
    """`small_step`'s model with so many layers, one of them dense, and so many sequences."""
    sizes = (f"model.n_layers={n_layers}", f"train.batch={n_rows}")
    return override(config_of(), *sizes, *settings)


@functools.cache
def parameters(config: Config):
    """Numbers for parameters and balance biases; norm scales differ from 1."""
    rng = np.random.default_rng(0)

    def numbers(variable):
        vector = len(variable.get_metadata().get("global_shape", ())) == 1
        values = vector + 0.1 * rng.normal(size=variable.shape)
        return variable.replace(values.astype(np.float32))

    _, params, bias, _ = split_model(abstract_model(config.model, Policy()))
    return jax.tree.map(numbers, (params, bias), is_leaf=lambda x: isinstance(x, nnx.Variable))


def batch_of(n_rows: int) -> Batch:
    rng = np.random.default_rng(n_rows)
    tokens = rng.integers(0, VOCAB, (n_rows, LENGTH + 2)).astype(np.int32)
    return Batch(tokens, np.ones(tokens.shape, bool))


def run(mesh: str, config: Config, batch: Batch | None = None, bias: nnx.State | None = None):
    """(losses, statistics, gradients) of the program on a mesh, as NumPy arrays."""
    fn = jax.jit(loss_and_gradients(config, *placed(mesh, config), loss_of(config)))
    batch = batch_of(config.train.batch) if batch is None else batch
    params, biases = parameters(config)
    found = fn(params, biases if bias is None else bias, batch, np.float32(0), None)
    return jax.tree.map(np.asarray, found)


@functools.cache
def plain(n_layers: int, n_rows: int, *settings: str):
    """The mean over sequences of what one device makes of each by itself; loads are sums."""
    config, whole = config_with(n_layers, 1, *settings), batch_of(n_rows)
    fn = jax.jit(loss_and_gradients(config, *placed("dp1", config), loss_of(config)))
    params = parameters(config)
    rows = [
        jax.tree.map(np.asarray, fn(*params, jax.tree.map(row, whole), np.float32(0), None))
        for row in (operator.itemgetter(slice(i, i + 1)) for i in range(n_rows))
    ]
    losses, stats, grads = jax.tree.map(lambda *parts: np.mean(parts, 0, np.float64), *rows)
    return losses, stats._replace(load=n_rows * stats.load), grads
