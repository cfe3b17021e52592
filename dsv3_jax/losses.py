"""Training losses: the interface of a step, and next-token prediction (report sec. 2.1.2, 2.2).

A step knows no particular loss. It takes a `LossFn`, which turns hidden states of the trunk into
this shard's part of a global loss. The plain step calls it once on all rows of a shard; in a
pipeline the last stage calls it once per micro-batch. Both add the router's balance loss, which
every loss has. Pre-training passes `next_token_loss`; SFT, policy gradients or distillation pass
their own, in which `token_log_probs` gives the log-probability of every label and takes a cotangent
per token:

    def prepare(batch, tokens_seen, layout):
        return target_counts(batch, 1, layout)[0]

    def from_hidden(model, hidden, batch, n_targets, layout, remat):
        log_probs = next_token_log_probs(model, hidden, batch, layout)
        mask = target_mask(batch, 0, hidden.shape[1], layout)
        loss = -(mask * batch.advantages[:, 1:] * log_probs).sum() / n_targets
        return loss, {"loss": loss}, None

    make_step(config, optimizer, mesh, layout, LossFn(prepare, from_hidden))

Of [t, V] logits only [t, VOCAB_CHUNK] exist at a time, forwards and backwards.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

from dsv3_jax.config import LossConfig
from dsv3_jax.model.deepseek import DeepSeekV3
from dsv3_jax.model.moe import RouterStats
from dsv3_jax.schedules import mtp_weight
from dsv3_jax.shapes import Array, Bool, Float, Float32, Int
from sharding import context_parallel
from sharding.collectives import psum_data
from sharding.layout import Layout
from sharding.mesh import MeshSpec
from sharding.vocab_parallel import n_vocab_chunks, scan_vocab_chunks

VOCAB_CHUNK = 8192  # most rows of the head that a device holds at a time


class Batch(NamedTuple):
    """Rows of W = T + 1 + D tokens (D = MTP depth); the first T are inputs, all others labels only.

    A loss may have a batch of its own: any pytree of arrays [B W] with these three fields.
    """

    tokens: Int[Array, "B W"]
    loss_mask: Bool[Array, "B W"]  # True = counts as a target
    doc_start: Int[Array, "B W"] | None = None  # position where the document of each token begins


class LossFn(NamedTuple):
    """A training loss, used alike by the plain and by the pipelined step.

    Args:
        prepare: (batch, tokens_seen, layout) -> context, once per step inside the manual region.
            `batch` has this shard's rows; what `from_hidden` must know of the whole batch, such as
            the number of targets, is summed over shards here. `tokens_seen` [] are the tokens that
            the run has trained on before.
        from_hidden: (model, hidden [B T D], batch, context, layout, remat) -> (loss, terms, stats),
            of all rows of a shard or of some. `hidden` comes from the final norm; `model` has no
            MoE layers in a pipeline. `loss` [] and the dict `terms` of scalars, which are written
            to the metrics, are parts that add up over rows and shards; one term is called "loss".
            `stats` are the router statistics of the MTP modules, None if the loss runs none.
        lookahead: T = W - lookahead tokens of a row are inputs of the trunk.
    """

    prepare: Callable
    from_hidden: Callable
    lookahead: int = 1


class Losses(NamedTuple):
    """Sums over this shard that add up, over all shards, to means over the global batch."""

    total: Float32[Array, ""]  # the step's gradients are those of this one
    terms: dict[str, Float32[Array, ""]]  # those of the `LossFn`, and "balance_loss"


def next_token_loss(config: LossConfig, mtp_depth: int) -> LossFn:
    """Return the loss of pre-training, L_main + lambda L_MTP (report eqs. 24 and 25).

    L_main is the cross-entropy of the next token, L_MTP the mean over depths k = 1 .. D of the
    cross-entropy of the token k + 1 positions on, each a mean over all targets of the global batch.
    """

    def prepare(batch: Batch, tokens_seen: Float32[Array, ""], layout: Layout):
        return target_counts(batch, 1 + mtp_depth, layout), mtp_weight(config, tokens_seen)

    def from_hidden(model: DeepSeekV3, hidden, batch: Batch, context, layout: Layout, remat: str):
        counts, weight = context
        main = mean_cross_entropy(model, hidden, batch, 0, counts[0], layout)
        mtp, stats = jnp.zeros((), jnp.float32), None
        if mtp_depth:
            length, doc_start = hidden.shape[1], model_inputs(batch, 1 + mtp_depth)[1]
            shifted = jnp.stack([batch.tokens[:, k : k + length] for k in range(1, 1 + mtp_depth)])
            mtp_hidden, stats = model.mtp_hidden_states(hidden, shifted, layout, remat, doc_start)
            depths = [
                mean_cross_entropy(model, mtp_hidden[k - 1], batch, k, counts[k], layout)
                for k in range(1, 1 + mtp_depth)
            ]
            mtp = sum(depths) / mtp_depth
        return main + weight * mtp, {"loss": main, "mtp_loss": mtp}, stats

    return LossFn(prepare, from_hidden, 1 + mtp_depth)


def training_loss(
    model: DeepSeekV3,
    batch,
    loss_fn: LossFn,
    balance_weight: float,
    tokens_seen: Float32[Array, ""] | float,
    layout: Layout,
    remat: str,
) -> tuple[Losses, RouterStats | None]:
    """Run the model on this shard's rows.

    Returns:
        The losses, and the statistics of all MoE layers, those of MTP last.
    """
    tokens, doc_start = model_inputs(batch, loss_fn.lookahead)
    hidden, stats = model.hidden_states(tokens, layout, remat, doc_start)
    context = loss_fn.prepare(batch, tokens_seen, layout)
    loss, terms, mtp_stats = loss_fn.from_hidden(model, hidden, batch, context, layout, remat)
    both = [part for part in (stats, mtp_stats) if part is not None]
    stats = jax.tree.map(lambda *parts: jnp.concatenate(parts), *both) if both else None
    balance = jnp.zeros((), jnp.float32) if stats is None else stats.balance.sum()
    return add_balance(loss, terms, balance, n_sequences(batch, layout), balance_weight), stats


def add_balance(
    loss: Float32[Array, ""],
    terms: dict[str, Float32[Array, ""]],
    balance: Float32[Array, ""],
    n_sequences: int,
    weight: float,
) -> Losses:
    """Add the sequence-wise balance loss L_Bal of the router (report eqs. 17 to 20) to a loss.

    Args:
        balance: L_Bal / alpha, summed over MoE layers and sequences.
        n_sequences: sequences of the global batch.
        weight: alpha.
    """
    balance = balance / n_sequences
    return Losses(loss + weight * balance, terms | {"balance_loss": balance})


def n_sequences(batch, layout: Layout) -> int:
    """Return the number of sequences of the global batch."""
    return batch.tokens.shape[0] * layout.mesh.n_data_shards // layout.context


def model_inputs(batch, lookahead: int) -> tuple[Int[Array, "B T"], Int[Array, "B T"] | None]:
    """Return the tokens that the trunk reads, and where the document of each begins."""
    length = batch.tokens.shape[1] - lookahead
    doc_start = None if batch.doc_start is None else batch.doc_start[:, :length]
    return batch.tokens[:, :length], doc_start


def target_mask(batch, depth: int, length: int, layout: Layout) -> Bool[Array, "B T"]:
    """Mark which of the first `length` positions are to predict the token depth + 1 positions on.

    With documents apart, none is to predict a token of another document.

    Args:
        depth: 0 for the main model, k for the MTP module of depth k.
    """
    mask = batch.loss_mask[:, 1 + depth : 1 + depth + length]
    if batch.doc_start is None:
        return mask
    doc_start = batch.doc_start[:, 1 + depth : 1 + depth + length]
    return mask & (doc_start <= context_parallel.positions(length, layout)[None, :])


def target_counts(batch, lookahead: int, layout: Layout) -> Float32[Array, " A"]:
    """Count the targets in the global batch, at least 1, for depths 0 .. lookahead - 1."""
    length = batch.tokens.shape[1] - lookahead
    masks = (target_mask(batch, depth, length, layout) for depth in range(lookahead))
    counts = jnp.stack([mask.sum().astype(jnp.float32) for mask in masks])
    return jnp.maximum(psum_data(counts) if layout.mesh.n_data_shards > 1 else counts, 1.0)


def mean_cross_entropy(
    model: DeepSeekV3,
    hidden: Float[Array, "B T D"],
    batch,
    depth: int,
    count: Float32[Array, ""],
    layout: Layout,
) -> Float32[Array, ""]:
    """Return these rows' part of the mean cross-entropy over `count` targets (eqs. 24 and 26).

    Args:
        depth: as in `target_mask`.
    """
    rows, head, labels = _rows_and_labels(model, hidden, batch, depth)
    mask = target_mask(batch, depth, hidden.shape[1], layout).reshape(-1)
    return cross_entropy(rows, head, labels, mask.astype(jnp.float32) / count, layout.mesh)


def next_token_log_probs(
    model: DeepSeekV3, hidden: Float[Array, "B T D"], batch, layout: Layout
) -> Float32[Array, "B T"]:
    """Return the log-probability at every position of the token that follows it."""
    rows, head, labels = _rows_and_labels(model, hidden, batch, 0)
    flat = token_log_probs(rows, head, labels, layout.mesh)
    return rearrange(flat, "(b t) -> b t", b=hidden.shape[0])


def _rows_and_labels(model: DeepSeekV3, hidden, batch, depth: int):
    """Hidden states as rows [t D], the head in their format, and the label of each row."""
    labels = batch.tokens[:, 1 + depth : 1 + depth + hidden.shape[1]].reshape(-1)
    rows = rearrange(hidden, "b t d -> (b t) d")
    return rows, model.head[...].astype(rows.dtype), labels


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def token_log_probs(
    rows: Float[Array, "t D"], head: Float[Array, "v D"], labels: Int[Array, " t"], mesh: MeshSpec
) -> Float32[Array, " t"]:
    """Return log softmax(rows head^T)[label] of every row.

    A first pass over the vocabulary gives the log-sum-exp, a second one in the backward the
    gradients for any cotangent per token.

    Args:
        head: this rank's rows of the output head.
    """
    log_sum_exp, label_logits = _log_sum_exp(rows, head, labels, mesh)
    return label_logits - log_sum_exp


def _log_probs_forward(rows, head, labels, mesh):
    log_sum_exp, label_logits = _log_sum_exp(rows, head, labels, mesh)
    return label_logits - log_sum_exp, (rows, head, labels, log_sum_exp)


def _log_probs_backward(mesh, residuals, grad):
    rows, head, labels, log_sum_exp = residuals
    return *_gradients(rows, head, labels, log_sum_exp, -grad, mesh), None


token_log_probs.defvjp(_log_probs_forward, _log_probs_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def cross_entropy(
    rows: Float[Array, "t D"],
    head: Float[Array, "v D"],
    labels: Int[Array, " t"],
    loss_weights: Float32[Array, " t"],
    mesh: MeshSpec,
) -> Float32[Array, ""]:
    """Return the sum over rows of loss_weight * -log softmax(rows head^T)[label].

    As the weights are known in the forward, the second pass follows the first at once and leaves
    the gradients, which are no larger than the inputs; with a single chunk the compiler finds the
    logits of both passes to be the same. `token_log_probs` has to wait for its cotangents.

    Args:
        head: this rank's rows of the output head.
    """
    log_sum_exp, label_logits = _log_sum_exp(rows, head, labels, mesh)
    return (loss_weights * (log_sum_exp - label_logits)).sum()


def _cross_entropy_forward(rows, head, labels, loss_weights, mesh):
    log_sum_exp, label_logits = _log_sum_exp(rows, head, labels, mesh)
    gradients = _gradients(rows, head, labels, log_sum_exp, loss_weights, mesh)
    return (loss_weights * (log_sum_exp - label_logits)).sum(), gradients


def _cross_entropy_backward(mesh, gradients, grad):
    d_rows, d_head = gradients
    return d_rows * grad.astype(d_rows.dtype), d_head * grad.astype(d_head.dtype), None, None


cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def _logits(rows, chunk):
    return jnp.einsum("tD,pD->tp", rows, chunk, preferred_element_type=jnp.float32)


def _log_sum_exp(rows, head, labels, mesh):
    """Return log of sum over V of exp(logits), and the label's logit, both [t].

    A running maximum and sum over the chunks of the head.
    """

    def step(carry, chunk, ids):
        peak, total, label_logits = carry
        logits = _logits(rows, chunk)
        higher = jnp.maximum(peak, logits.max(-1))
        total = total * jnp.exp(peak - higher) + jnp.exp(logits - higher[:, None]).sum(-1)
        column = jnp.searchsorted(ids, labels)[:, None]  # ids ascend
        in_chunk = jnp.take(ids, column[:, 0], mode="clip") == labels
        logit = jnp.take_along_axis(logits, column, axis=1, mode="clip")[:, 0]
        return (higher, total, label_logits + jnp.where(in_chunk, logit, 0.0)), None

    zero = jnp.zeros(rows.shape[0], jnp.float32)
    n_chunks = n_vocab_chunks(head.shape[0], mesh, VOCAB_CHUNK)
    carry = (zero - jnp.inf, zero, zero)
    (peak, total, label_logits), _ = scan_vocab_chunks(step, carry, head, n_chunks, mesh)
    return peak + jnp.log(total), label_logits


def _gradients(rows, head, labels, log_sum_exp, weights, mesh):
    """Return the gradients of sum(weights * cross-entropy of each row) by rows and head."""

    def step(d_rows, chunk, ids):
        probability = jnp.exp(_logits(rows, chunk) - log_sum_exp[:, None])
        is_label = labels[:, None] == ids[None, :]
        d_logits = ((probability - is_label) * weights[:, None]).astype(rows.dtype)
        d_rows = d_rows + jnp.einsum(
            "tp,pD->tD", d_logits, chunk, preferred_element_type=jnp.float32
        )
        d_chunk = jnp.einsum("tp,tD->pD", d_logits, rows, preferred_element_type=jnp.float32)
        return d_rows, d_chunk

    n_chunks = n_vocab_chunks(head.shape[0], mesh, VOCAB_CHUNK)
    d_rows, d_head = scan_vocab_chunks(
        step, jnp.zeros(rows.shape, jnp.float32), head, n_chunks, mesh
    )
    return d_rows.astype(rows.dtype), d_head.astype(head.dtype)
