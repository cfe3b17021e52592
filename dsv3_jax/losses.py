"""Cross-entropy over a head that is never whole, and the training loss (report sec. 2.1.2, 2.2)."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

from dsv3_jax.config import LossConfig
from dsv3_jax.model.deepseek import DeepSeekV3
from dsv3_jax.model.moe import RouterStats
from dsv3_jax.shapes import Array, Bool, Float, Float32, Int
from sharding import context_parallel
from sharding.collectives import psum_data
from sharding.layout import Layout
from sharding.mesh import MeshSpec
from sharding.vocab_parallel import n_vocab_chunks, scan_vocab_chunks

PIECE = 8192  # most rows of the head that a device holds at a time


class Batch(NamedTuple):
    """Rows of T + 1 + D tokens (D = MTP depth); T of them are inputs, the rest targets only."""

    tokens: Int[Array, "B W"]
    loss_mask: Bool[Array, "B W"]  # True = counts as a target
    doc_start: Int[Array, "B W"] | None = None  # position where the document of each token begins


class Losses(NamedTuple):
    """Sums over this shard that add up, over all shards, to means over the global batch."""

    total: Float32[Array, ""]
    main: Float32[Array, ""]
    mtp: Float32[Array, ""]
    balance: Float32[Array, ""]


def training_loss(
    model: DeepSeekV3,
    batch: Batch,
    config: LossConfig,
    mtp_weight: Float32[Array, ""] | float,
    layout: Layout,
    remat: str,
) -> tuple[Losses, RouterStats | None]:
    """main + mtp_weight * mean over depths + balance_weight * sum over MoE layers.

    Returns:
        The losses, and the statistics of all MoE layers, those of MTP last.
    """
    tokens, doc_start = inputs_of(batch, model.config.mtp_depth)
    hidden, stats = model.trunk(tokens, layout, remat, doc_start)
    counts = target_counts(batch, model.config.mtp_depth, layout)
    main, mtp, mtp_stats = output_losses(model, hidden, batch, counts, layout, remat)
    both = [part for part in (stats, mtp_stats) if part is not None]
    stats = jax.tree.map(lambda *parts: jnp.concatenate(parts), *both) if both else None
    balance = jnp.zeros((), jnp.float32) if stats is None else stats.balance.sum()
    n_sequences = batch.tokens.shape[0] * layout.mesh.n_data_shards // layout.context
    return losses_of(main, mtp, balance, n_sequences, config, mtp_weight), stats


def inputs_of(batch: Batch, depth: int) -> tuple[Int[Array, "B T"], Int[Array, "B T"] | None]:
    """The tokens that the main model reads, and `doc_start` of `causal_attention` for them."""
    length = batch.tokens.shape[1] - 1 - depth
    doc_start = None if batch.doc_start is None else batch.doc_start[:, :length]
    return batch.tokens[:, :length], doc_start


def targets_of(batch: Batch, ahead: int, length: int, layout: Layout) -> Bool[Array, "B T"]:
    """Which of the first `length` places are to predict the token `ahead` places on.

    With documents apart, none is to predict a token of another document.
    """
    mask = batch.loss_mask[:, ahead : ahead + length]
    if batch.doc_start is None:
        return mask
    return mask & (
        batch.doc_start[:, ahead : ahead + length]
        <= context_parallel.positions(length, layout)[None, :]
    )


def target_counts(batch: Batch, depth: int, layout: Layout) -> Float32[Array, " A"]:
    """How many targets the losses of the token 1, 2, ... places on have in the global batch."""
    length = batch.tokens.shape[1] - 1 - depth
    targets = (targets_of(batch, ahead, length, layout) for ahead in range(1, depth + 2))
    counts = jnp.stack([mask.sum().astype(jnp.float32) for mask in targets])
    return psum_data(counts) if layout.mesh.n_data_shards > 1 else counts


def output_losses(
    model: DeepSeekV3,
    hidden: Float[Array, "B T D"],
    batch: Batch,
    counts: Float32[Array, " A"],
    layout: Layout,
    remat: str,
) -> tuple[Float32[Array, ""], Float32[Array, ""], RouterStats | None]:
    """Main loss, mean MTP loss and the statistics of MTP from the trunk's hidden states.

    Args:
        batch: what `hidden` comes from, all rows of this shard or some.
        counts: of the whole batch, from `target_counts`.
    """
    depth, length = model.config.mtp_depth, hidden.shape[1]
    main = _mean_loss(model, hidden, batch, 1, counts[0], layout)
    if not depth:
        return main, jnp.zeros((), jnp.float32), None
    following = [batch.tokens[:, k : k + length] for k in range(1, depth + 1)]
    doc_start = inputs_of(batch, depth)[1]
    ahead, stats = model.mtp_trunk(hidden, jnp.stack(following), layout, remat, doc_start)
    terms = [_mean_loss(model, ahead[k], batch, k + 2, counts[k + 1], layout) for k in range(depth)]
    return main, sum(terms) / depth, stats


def losses_of(main, mtp, balance, n_sequences: int, config: LossConfig, mtp_weight) -> Losses:
    """The losses and their weighted sum.

    Args:
        balance: the balance loss summed over MoE layers and sequences.
        n_sequences: of the global batch.
    """
    balance = balance / n_sequences
    total = main + mtp_weight * mtp + config.balance_weight * balance
    return Losses(total, main, mtp, balance)


def _mean_loss(model: DeepSeekV3, hidden, batch: Batch, ahead: int, count, layout: Layout):
    """Cross-entropy of the token `ahead` places on: this shard's part of the global mean."""
    length = hidden.shape[1]
    labels = batch.tokens[:, ahead : ahead + length].reshape(-1)
    mask = targets_of(batch, ahead, length, layout).reshape(-1)
    rows = rearrange(hidden, "b t d -> (b t) d")
    head = model.head[...].astype(rows.dtype)
    share = mask.astype(jnp.float32) / jnp.maximum(count, 1.0)
    return cross_entropy(rows, head, labels, share, layout.mesh)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def cross_entropy(
    rows: Float[Array, "t D"],
    head: Float[Array, "v D"],
    labels: Int[Array, " t"],
    share: Float32[Array, " t"],
    mesh: MeshSpec,
) -> Float32[Array, ""]:
    """Sum of share * -log softmax(rows head^T)[label].

    The head comes past in pieces of at most `PIECE` rows; a running maximum and sum give the
    log-sum-exp. Of [t, V] logits only [t, PIECE] exist at a time. Under differentiation a second
    walk follows at once and leaves the gradients, which are no larger than the inputs; with a
    single piece the compiler finds the logits of both walks to be the same.

    Args:
        head: this rank's rows of the output head.
        share: weight of each row.
    """
    log_sum, chosen = _log_sum(rows, head, labels, mesh)
    return (share * (log_sum - chosen)).sum()


def _logits(rows, piece):
    return jnp.einsum("tD,pD->tp", rows, piece, preferred_element_type=jnp.float32)


def _log_sum(rows, head, labels, mesh):
    """log of sum over V of exp(logits), and the label's logit, both [t]."""

    def step(carry, piece, ids):
        peak, total, chosen = carry
        logits = _logits(rows, piece)
        higher = jnp.maximum(peak, logits.max(-1))
        total = total * jnp.exp(peak - higher) + jnp.exp(logits - higher[:, None]).sum(-1)
        place = jnp.searchsorted(ids, labels)[:, None]  # ids ascend
        mine = jnp.take(ids, place[:, 0], mode="clip") == labels
        logit = jnp.take_along_axis(logits, place, axis=1, mode="clip")[:, 0]
        return (higher, total, chosen + jnp.where(mine, logit, 0.0)), None

    zero = jnp.zeros(rows.shape[0], jnp.float32)
    pieces = n_vocab_chunks(head.shape[0], mesh, PIECE)
    (peak, total, chosen), _ = scan_vocab_chunks(
        step, (zero - jnp.inf, zero, zero), head, pieces, mesh
    )
    return peak + jnp.log(total), chosen


def _forward(rows, head, labels, share, mesh):
    log_sum, chosen = _log_sum(rows, head, labels, mesh)

    def step(d_rows, piece, ids):
        probability = jnp.exp(_logits(rows, piece) - log_sum[:, None])
        mine = labels[:, None] == ids[None, :]
        d_logits = ((probability - mine) * share[:, None]).astype(rows.dtype)
        wide = {"preferred_element_type": jnp.float32}
        d_rows = d_rows + jnp.einsum("tp,pD->tD", d_logits, piece, **wide)
        return d_rows, jnp.einsum("tp,tD->pD", d_logits, rows, **wide)

    pieces = n_vocab_chunks(head.shape[0], mesh, PIECE)
    d_rows, d_head = scan_vocab_chunks(step, jnp.zeros(rows.shape, jnp.float32), head, pieces, mesh)
    loss = (share * (log_sum - chosen)).sum()
    return loss, (d_rows.astype(rows.dtype), d_head.astype(head.dtype))


def _backward(mesh, gradients, grad):
    d_rows, d_head = gradients
    return d_rows * grad.astype(d_rows.dtype), d_head * grad.astype(d_head.dtype), None, None


cross_entropy.defvjp(_forward, _backward)
