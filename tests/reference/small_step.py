"""A training step small enough for every mesh: model, batch, and when two results are the same.

The model has every part (dense, MoE, MTP; sizes distinct). Gradients agree to 1e-4 of a tensor's
largest value and losses to 1e-5 relative: float32 sums in another order. Loads are counts and agree
exactly.
"""

import functools

import chex
import jax
import numpy as np
from flax import nnx

from dsv3_jax.config import (
    AttentionConfig,
    Config,
    LossConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    TrainConfig,
)
from dsv3_jax.losses import Batch, LossFn, next_token_loss
from dsv3_jax.mesh_checks import check_mesh
from dsv3_jax.model.deepseek import abstract_model
from dsv3_jax.numerics.policy import Policy
from dsv3_jax.training.state import make_layout, split_model
from sharding.mesh import make_mesh, parse_mesh

BATCH_SIZE, LENGTH, VOCAB, N_EXPERTS, TOP_K, N_MOE = 8, 16, 64, 8, 2, 3  # MoE layers with MTP's


def config_of(zero: int = 1, remat: str = "report", pieces: int = 1) -> Config:
    return Config(
        name="test",
        model=ModelConfig(
            vocab_size=VOCAB,
            width=32,
            n_layers=3,
            n_dense=1,
            dense_hidden=40,
            attention=AttentionConfig(
                n_heads=2, q_rank=24, kv_rank=16, nope_dim=6, rope_dim=4, value_dim=10
            ),
            moe=MoEConfig(
                n_experts=N_EXPERTS, n_shared=1, hidden=12, top_k=TOP_K, n_groups=4, topk_groups=2
            ),
            init_std=0.15,
        ),
        train=TrainConfig(batch=BATCH_SIZE, seq_len=LENGTH, steps=3),
        optimizer=OptimizerConfig(peak_lr=1e-2, warmup_steps=2),
        losses=LossConfig(balance_weight=0.05, bias_update_speed=0.01),
        precision=PrecisionConfig(compute="float32", moments="float32"),
        parallel=ParallelConfig(zero=zero, remat=remat, overlap_chunks=pieces),
    )


def loss_of(config: Config) -> LossFn:
    return next_token_loss(config.losses, config.model.mtp_depth)


def placed(mesh_text: str, config: Config):
    spec = parse_mesh(mesh_text)
    check_mesh(config, spec)
    return make_mesh(spec, jax.devices()[: spec.n_devices]), make_layout(config, spec)


@functools.cache
def parameters():
    """Numbers for the abstract model; norm scales differ from 1 and balance biases from 0."""
    rng = np.random.default_rng(0)

    def numbers(variable):
        vector = len(variable.get_metadata().get("global_shape", ())) == 1
        values = vector + 0.15 * rng.normal(size=variable.shape)
        return variable.replace(values.astype(np.float32))

    _, params, bias, _ = split_model(abstract_model(config_of().model, Policy()))
    return jax.tree.map(numbers, (params, bias), is_leaf=lambda x: isinstance(x, nnx.Variable))


def batch_of(seed: int) -> Batch:
    """Row i prefers tokens near 8 i, and the second half of the rows has few targets."""
    rng = np.random.default_rng(seed)
    near = np.arange(BATCH_SIZE)[:, None] * 8 + rng.integers(0, 8, (BATCH_SIZE, LENGTH + 2))
    anywhere = rng.integers(0, VOCAB, near.shape)
    tokens = np.where(rng.uniform(size=near.shape) < 0.7, near, anywhere).astype(np.int32)
    rate = np.where(np.arange(BATCH_SIZE) < BATCH_SIZE // 2, 0.9, 0.1)
    mask = rng.uniform(size=tokens.shape) < rate[:, None]
    mask[5] = False  # on some meshes a shard without targets
    return Batch(tokens, mask)


def assert_same_gradients(got, want):
    wanted = dict(jax.tree.flatten_with_path(want)[0])
    assert len(wanted) > 30
    for path, value in jax.tree.flatten_with_path(got)[0]:
        name, size = jax.tree_util.keystr(path), np.abs(wanted[path]).max()
        error = np.abs(value - wanted[path]).max()
        assert error <= 1e-4 * size, f"{name}: off by {error}, largest {size}"


def assert_same(got, want):
    losses, stats, grads = got
    chex.assert_trees_all_close(losses, want[0], rtol=1e-5, atol=0)
    np.testing.assert_array_equal(stats.load, want[1].load)
    np.testing.assert_allclose(stats.balance, want[1].balance, rtol=1e-5)
    assert_same_gradients(grads, want[2])
