"""Losses and gradients of a step whose layers lie in pipeline stages (report sec. 3.2.1).

Between steps nothing is different from a mesh without stages (`sharding/layout.py`). A step sends
every MoE layer's weights to the ranks of its stage, runs all micro-batches through the one loop of
`sharding/pipeline.py`, and sends the sums of the gradients back. Embedding, dense layers, final
norm, head and MTP are whole on all ranks; those of the first and the last stage use them, so
embedding and head, which both use, are one parameter with one gradient.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from dsv3_jax.config import Config
from dsv3_jax.layer_scan import kept_by, with_inputs, without
from dsv3_jax.losses import LossFn, add_balance, model_inputs, n_sequences
from dsv3_jax.model.deepseek import abstract_model, token_positions
from dsv3_jax.model.moe import RouterStats
from dsv3_jax.numerics.fp8 import Fp8Weight, GradTap
from dsv3_jax.numerics.policy import Policy
from dsv3_jax.numerics.split_backward import Deferred, Name, Shapes, weight_gradient
from dsv3_jax.params import (
    all_gather_params,
    grad_taps,
    map_params,
    named_arrays,
    param_specs,
    quantize_params,
    scatter_to_stages,
    set_grad_taps,
)
from dsv3_jax.pipeline_plan import pipeline_of
from dsv3_jax.training.state import split_model
from sharding.collectives import pmax_all, psum_all
from sharding.layout import Layout, gather_layers, max_per_layer, own_layers
from sharding.mesh import BATCH, REPLICATED, manual_region
from sharding.pipeline import Gradients, Parts, PyTree, layers_of, run


def pipelined(
    config: Config, mesh: Mesh | AbstractMesh, layout: Layout, loss_fn: LossFn
) -> Callable:
    """As `loss_and_gradients` in step.py, on a mesh with stages.

    Weights are gathered once a step, whatever `parallel.zero` says, and layers run in one piece:
    the exchange of one micro-batch has another beside it.
    """
    policy, layout = (
        Policy.of(config.precision),
        dataclasses.replace(layout, zero=1, overlap_chunks=1),
    )
    pipeline = pipeline_of(config, layout.mesh)
    n_layers, micro = sum(pipeline.sizes), config.pipeline.micro_batch_size
    places = layers_of(pipeline.table, pipeline.sizes)
    places = tuple(map(tuple, places.reshape(len(places), -1).tolist()))
    model = abstract_model(config.model, policy)
    layer_graph = nnx.graphdef(model.moe)
    _, params, *_ = split_model(model)
    model.moe = None
    ends_graph, *_ = split_model(model)
    stored = param_specs(params, layout)

    def shard(params, bias, batch, tokens_seen, _):
        in_use = quantize_params(params, layout) if policy.fp8 else params
        stack = scatter_to_stages(nnx.State(in_use["moe"]), layout, policy.compute, places)
        stage_bias = jax.tree.map(lambda x: own_layers(x, places), nnx.State(bias["moe"]))
        context = loss_fn.prepare(batch, tokens_seen, layout)
        weights = all_gather_params(without_layers(in_use), layout, policy.compute)
        sequences, balance_weight = n_sequences(batch, layout), config.losses.balance_weight
        d_balance = balance_weight / sequences
        remat = config.parallel.remat
        ends = EmbedAndHead(
            ends_graph, weights, without_layers(bias), loss_fn, context, d_balance, layout, remat
        )
        layer = _Layer(layer_graph, config, layout, d_balance, loss_fn.lookahead)
        parts = Parts(
            first=ends.embed,
            forward=layer.forward,
            last=ends.head_and_loss,
            backward=layer.backward,
            late=layer.late,
            first_backward=ends.embed_backward,
            join=_join,
        )
        micros = jax.tree.map(lambda x: rearrange(x, "(m b) ... -> m b ...", b=micro), batch)
        found = run(pipeline.table, pipeline.sizes, parts, (stack, stage_bias), micros)

        def home(path: str, x: jax.Array, variable: nnx.Param) -> jax.Array:
            about = (variable.axes, variable.global_shape)
            part, _, inner = path.partition(".")
            if part == "moe":
                grad = layout.gather_from_stages(found.gradients[inner], x, *about, places)
            else:
                grad = layout.reduce_scatter_grad(found.shared[path], x, *about)
            return layout.psum_replicated(grad, *about)

        loss, terms, mtp_stats = found.seen_last
        loss, terms = psum_all((loss, terms))
        stats = _of_all(found.seen, mtp_stats, places, n_layers)
        losses = add_balance(loss, terms, stats.balance.sum(), sequences, balance_weight)
        return losses, stats, map_params(home, params)

    return manual_region(
        shard,
        mesh,
        in_specs=(stored, REPLICATED, BATCH, REPLICATED, REPLICATED),
        out_specs=(REPLICATED, REPLICATED, stored),
    )


def without_layers(state: nnx.State) -> nnx.State:
    """All but what lies in stages."""
    return nnx.State({name: part for name, part in state.items() if name != "moe"})


class EmbedAndHead(NamedTuple):
    """All that comes before the first MoE layer and after the last, forwards and backwards."""

    graph: nnx.GraphDef
    weights: nnx.State  # in use
    bias: nnx.State
    loss_fn: LossFn
    context: PyTree  # from `loss_fn.prepare`
    d_balance: float  # gradient of the loss by the balance loss of a sequence
    layout: Layout
    remat: str

    def _model(self, taps: nnx.State):
        return nnx.merge(self.graph, set_grad_taps(self.weights, taps), self.bias)

    def _embed(self, taps: nnx.State, micro) -> jax.Array:
        tokens, doc_start = model_inputs(micro, self.loss_fn.lookahead)
        return self._model(taps).embed_and_dense(tokens, self.layout, self.remat, doc_start)

    def _loss(self, taps: nnx.State, x: jax.Array, micro):
        """A micro-batch's part of the loss, that of the balance of MTP's experts included."""
        model = self._model(taps)
        loss, terms, stats = self.loss_fn.from_hidden(
            model, model.norm(x), micro, self.context, self.layout, self.remat
        )
        balance = jnp.zeros(()) if stats is None else stats.balance.sum()
        return loss + self.d_balance * balance, (loss, terms, stats)

    def embed(self, micro) -> jax.Array:
        return self._embed(grad_taps(self.weights), micro)

    def embed_backward(self, d_x: jax.Array, micro) -> Gradients:
        _, pull = jax.vjp(lambda taps: self._embed(taps, micro), grad_taps(self.weights))
        return _named(pull(d_x)[0])

    def head_and_loss(self, x: jax.Array, micro):
        gradient = jax.grad(self._loss, (0, 1), has_aux=True)
        (d_taps, d_x), aux = gradient(grad_taps(self.weights), x, micro)
        return d_x, _named(d_taps), aux


class _Layer:
    """Forward and backward of one MoE layer, the gradients of its products' weights apart.

    Of the rest of its parameters, and of experts in further rounds of the exchange, the gradients
    come at once.
    """

    def __init__(self, graph, config: Config, layout: Layout, d_balance: float, lookahead: int):
        """
        Args:
            d_balance: gradient of the loss with respect to a layer's balance loss.
        """
        self.graph, self.layout, self.d_balance = graph, layout, d_balance
        self.lookahead = lookahead
        self.run = kept_by(self._run, config.parallel.remat)
        self.pull = None  # the structure of a layer's backward, without what it has kept

    def _run(self, weights, taps, factors, x, doc_start=None):
        """((y, balance loss), what was seen); taps and factors are there for their gradients."""
        params, bias = weights

        def ready(path: str, value, variable: nnx.Param):
            if not variable.fp8:
                return value
            if isinstance(value, Fp8Weight) and path in taps:
                value = value._replace(tap=GradTap(taps[path]))
            shapes = isinstance(factors, Shapes)
            return Deferred(value, Name(path), factors if shapes else factors[path])

        block = nnx.merge(self.graph, map_params(ready, params), bias)
        positions = token_positions(jnp.zeros(x.shape[:2], jnp.int32), self.layout)
        y, stats = block(x, positions, self.layout, doc_start)
        return (y, stats.balance), stats

    def _inputs(self, weights, x):
        """What `_run` gets besides x: weights, taps, and zeros for factors."""
        taps = {
            path: jnp.zeros(value.quantized.values.shape, jnp.float32)
            for path, value in named_arrays(weights[0]).items()
            if isinstance(value, Fp8Weight) and self._has_more_rounds(weights[0], path)
        }
        shapes = Shapes()
        jax.eval_shape(lambda w, s, x: self._run(w, s, shapes, x), weights, taps, x)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), dict(shapes))
        return weights, taps, zeros

    def _has_more_rounds(self, params, path: str) -> bool:
        variable = dict(_variables(params))[path]
        return "expert" in variable.axes and self.layout.mesh.ep > 1

    def forward(self, weights, x, micro):
        inputs, doc_start = self._inputs(weights, x), model_inputs(micro, self.lookahead)[1]
        run = functools.partial(self.run, doc_start=doc_start)
        (y, _), pull, stats = jax.vjp(run, *inputs, x, has_aux=True)
        kept, self.pull = jax.tree.flatten(without(pull, inputs))
        return y, kept, stats

    def backward(self, weights, kept, d_y):
        inputs = self._inputs(weights, d_y)
        pull = with_inputs(self.pull.unflatten(kept), inputs)
        d_weights, d_taps, factors, d_x = pull((d_y, jnp.float32(self.d_balance)))
        grads = {
            path: grad
            for path, grad in named_arrays(d_weights[0]).items()
            if path not in factors or self._has_more_rounds(weights[0], path)
        }
        return d_x, grads | d_taps, factors

    def late(self, factors) -> Gradients:
        platform = self.layout.mesh.platform
        return {path: weight_gradient(pair, platform) for path, pair in factors.items()}


def _variables(state: nnx.State) -> list[tuple[str, nnx.Variable]]:
    return [(".".join(path), variable) for path, variable in nnx.to_flat_state(state)]


def _named(taps: nnx.State) -> Gradients:
    """Gradients of `grad_taps` by dotted path."""
    return {
        path: grad.weight if isinstance(grad, GradTap) else grad
        for path, grad in named_arrays(taps).items()
    }


def _join(total, new):
    """Sums; of the rounds of exchanges, the most."""

    def one(total, new):
        if not isinstance(new, RouterStats):
            return total + new
        sums = jax.tree.map(jnp.add, total, new)
        return sums._replace(rounds=jnp.maximum(total.rounds, new.rounds))

    return jax.tree.map(one, total, new, is_leaf=lambda x: isinstance(x, RouterStats))


def _of_all(seen: RouterStats, last: RouterStats | None, places, n_layers: int) -> RouterStats:
    """The statistics of all MoE layers over the global batch, those of MTP last."""
    sums = jax.tree.map(lambda x: gather_layers(x, None, places, n_layers), seen)
    sums = sums._replace(rounds=max_per_layer(seen.rounds, places, n_layers))
    if last is not None:
        sums = jax.tree.map(lambda *both: jnp.concatenate(both), sums, last)
    return psum_all(sums)._replace(rounds=pmax_all(sums.rounds))
