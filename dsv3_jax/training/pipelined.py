"""Losses and gradients of a step whose MoE layers lie in pipeline stages (report sec. 3.2.1).

Between steps nothing differs from a mesh without stages: parameters lie where ZeRO puts them, with
"pp" as one more data axis (sharding/layout.py), so checkpoints don't know stages. A step sends the
weights of every MoE layer to the ranks of its stage in one all-to-all, runs all micro-batches
through the loop of sharding/pipeline.py, and sends the summed gradients back.

That loop wants the forward and the backward of a layer as two functions with plain arrays between
them, and the backward in two parts, B and W. `MoELayer` makes them from the same block that the
plain step differentiates as a whole: `jax.vjp` gives the backward as a pytree, whose leaves are the
residuals; its structure is found before the loop (`make_stage_fns`). From the residuals are
stripped the weights, which need no copy per micro-batch. Weight gradients are deferred by
numerics/split_backward.py.

Embedding, dense layers, final norm, head and MTP (`EmbedAndHead`) are whole on all ranks, and used
on those of the first and the last stage. So embedding and head, which the main model and MTP share,
are one parameter with one gradient, as the report wants (sec. 2.2). The last stage computes the
loss of each micro-batch by the `LossFn` of the plain step, forwards and backwards at once.
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
from dsv3_jax.layer_scan import apply_remat, restore_inputs, strip_inputs
from dsv3_jax.losses import LossFn, add_balance, model_inputs, n_sequences
from dsv3_jax.model.deepseek import abstract_model, token_positions
from dsv3_jax.model.moe import RouterStats
from dsv3_jax.numerics.fp8 import Fp8Weight, GradTap
from dsv3_jax.numerics.policy import Policy
from dsv3_jax.numerics.split_backward import (
    DeferredWgrad,
    OperandShapes,
    ParamPath,
    operand_shapes,
    wgrad_of,
)
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
from dsv3_jax.pipeline_plan import make_pipeline
from dsv3_jax.training.state import split_model
from sharding.collectives import pmax_all, psum_all
from sharding.layout import Layout, StageLayers, gather_layers, max_per_layer, own_layers
from sharding.mesh import BATCH, REPLICATED, manual_region
from sharding.pipeline import Gradients, PyTree, StageFns, run_pipeline
from sharding.ticks import layers_of_ranks


def pipelined(
    config: Config, mesh: Mesh | AbstractMesh, layout: Layout, loss_fn: LossFn
) -> Callable:
    """Return what `loss_and_gradients` in step.py returns, on a mesh with stages.

    Weights are gathered once per step, whatever `parallel.zero` says, and layers take all of a
    micro-batch at once: its token exchange overlaps with the work of another micro-batch.
    """
    layout = dataclasses.replace(layout, zero=1, overlap_chunks=1)
    policy, pipeline = Policy.of(config.precision), make_pipeline(config, layout.mesh)
    n_layers, n_rows = sum(pipeline.sizes), config.pipeline.micro_batch_size
    of_ranks = layers_of_ranks(pipeline.table, pipeline.sizes)
    of_ranks = tuple(map(tuple, of_ranks.reshape(len(of_ranks), -1).tolist()))
    model = abstract_model(config.model, policy)
    layer_graph = nnx.graphdef(model.moe)
    _, params, *_ = split_model(model)
    model.moe = None
    ends_graph, *_ = split_model(model)
    stored, balance_weight = param_specs(params, layout), config.losses.balance_weight

    def shard(params, bias, batch, tokens_seen, _):
        in_use = quantize_params(params, layout) if policy.fp8 else params
        stack = scatter_to_stages(nnx.State(in_use["moe"]), layout, policy.compute, of_ranks)
        stage_bias = jax.tree.map(lambda x: own_layers(x, of_ranks), nnx.State(bias["moe"]))
        ends = EmbedAndHead(
            graph=ends_graph,
            weights=all_gather_params(without_layers(in_use), layout, policy.compute),
            bias=without_layers(bias),
            loss_fn=loss_fn,
            context=loss_fn.prepare(batch, tokens_seen, layout),
            d_balance=balance_weight / n_sequences(batch, layout),
            layout=layout,
            remat=config.parallel.remat,
        )
        layer = MoELayer(
            layer_graph, layout, config.parallel.remat, ends.d_balance, loss_fn.lookahead
        )
        micros = jax.tree.map(lambda x: rearrange(x, "(m b) ... -> m b ...", b=n_rows), batch)
        one_layer, micro = jax.tree.map(lambda x: x[0], ((stack, stage_bias), micros))
        stage_fns = make_stage_fns(ends, layer, one_layer, micro)
        result = run_pipeline(
            pipeline.table, pipeline.sizes, stage_fns, (stack, stage_bias), micros
        )

        def stored_grad(path: str, x: jax.Array, variable: nnx.Param) -> jax.Array:
            axes, shape = variable.axes, variable.global_shape
            part, _, inner = path.partition(".")
            if part == "moe":
                grad = layout.gather_from_stages(
                    result.layer_grads[inner], x, axes, shape, of_ranks
                )
            else:
                grad = layout.reduce_scatter_grad(result.shared_grads[path], x, axes, shape)
            return layout.psum_replicated(grad, axes, shape)

        loss, terms, mtp_stats = result.head_aux
        loss, terms = psum_all((loss, terms))
        stats = global_stats(result.aux, mtp_stats, of_ranks, n_layers)
        losses = add_balance(
            loss, terms, stats.balance.sum(), n_sequences(batch, layout), balance_weight
        )
        return losses, stats, map_params(stored_grad, params)

    return manual_region(
        shard,
        mesh,
        in_specs=(stored, REPLICATED, BATCH, REPLICATED, REPLICATED),
        out_specs=(REPLICATED, REPLICATED, stored),
    )


def without_layers(state: nnx.State) -> nnx.State:
    """Return all but the layers that are divided into stages."""
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


@dataclasses.dataclass(frozen=True)
class MoELayer:
    """Forward, backward and deferred weight gradients of one MoE layer.

    The gradients of matmul weights are deferred. All others come with the backward, and so do those
    of experts in extra rounds of the exchange, which are rare.
    """

    graph: nnx.GraphDef
    layout: Layout
    remat: str
    d_balance: float  # gradient of the loss by the balance loss of a sequence
    lookahead: int

    def run(self, weights, taps, operands, x, doc_start=None):
        """Return ((y, balance loss), stats).

        Args:
            weights: parameters and balance bias.
            taps: by path, of FP8 weights that have extra rounds.
            operands: zeros by path, never read: their gradients are the wgrad operands. None while
                `operand_shapes` looks for their shapes.
        """
        params, bias = weights

        def prepare(path: str, value, variable: nnx.Param):
            if not variable.fp8:
                return value
            if path in taps:
                value = value._replace(tap=GradTap(taps[path]))
            return DeferredWgrad(value, ParamPath(path), operands and operands[path])

        block = nnx.merge(self.graph, map_params(prepare, params), bias)
        positions = token_positions(jnp.zeros(x.shape[:2], jnp.int32), self.layout)
        y, stats = block(x, positions, self.layout, doc_start)
        return (y, stats.balance), stats

    def operand_shapes(self, weights, x) -> OperandShapes:
        """Return the shapes of `operands`, found by a trace of the layer."""

        def run(weights, x):
            return self.run(weights, self.zero_taps(weights), None, x)

        return operand_shapes(run, named_arrays(weights[0]), weights, x)

    def zero_taps(self, weights) -> dict[str, jax.Array]:
        return {
            path: jnp.zeros(variable.get_value().quantized.values.shape, jnp.float32)
            for path, variable in _variables(weights[0])
            if isinstance(variable.get_value(), Fp8Weight) and self.has_extra_rounds(variable)
        }

    def has_extra_rounds(self, variable: nnx.Param) -> bool:
        return "expert" in variable.axes and self.layout.mesh.ep > 1

    def vjp(self, shapes: OperandShapes, weights, x, micro):
        """Return the output, its backward function without its inputs, and the stats."""
        inputs = self.inputs(shapes, weights)
        doc_start = model_inputs(micro, self.lookahead)[1]
        run = apply_remat(functools.partial(self.run, doc_start=doc_start), self.remat)
        (y, _), pull, stats = jax.vjp(run, *inputs, x, has_aux=True)
        return y, strip_inputs(pull, inputs), stats

    def inputs(self, shapes: OperandShapes, weights):
        """Return what `run` gets besides x: weights, and zeros for taps and operands."""
        operands = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return weights, self.zero_taps(weights), operands

    def backward(self, shapes: OperandShapes, structure, weights, residuals, d_y):
        """Return d_x, the gradients that are not deferred, and the wgrad operands.

        Args:
            structure: the treedef of the backward function that `vjp` returns.
            residuals: the leaves of it.
        """
        pull = restore_inputs(structure.unflatten(residuals), self.inputs(shapes, weights))
        d_weights, d_taps, operands, d_x = pull((d_y, jnp.float32(self.d_balance)))
        grads = {
            path: d_variable.get_value()
            for path, d_variable in _variables(d_weights[0])
            if path not in operands or self.has_extra_rounds(d_variable)
        }
        return d_x, grads | d_taps, operands

    def wgrad(self, operands: OperandShapes) -> Gradients:
        platform = self.layout.mesh.platform
        return {path: wgrad_of(pair, platform) for path, pair in operands.items()}


def make_stage_fns(ends: EmbedAndHead, layer: MoELayer, weights, micro) -> StageFns:
    """Return the functions of a pipeline stage.

    What the backward of a layer needs to know besides arrays is found here, before the loop, by
    traces of the layer: the shapes of the wgrad operands, and the structure of the backward
    function, whose leaves are the residuals that `forward` hands out and `backward` gets.

    Args:
        weights: of one layer.
        micro: one micro-batch.
    """
    x = jax.eval_shape(ends.embed, micro)
    shapes = layer.operand_shapes(weights, x)
    vjp = functools.partial(layer.vjp, shapes)
    expected, structure = jax.tree.flatten(jax.eval_shape(vjp, weights, x, micro)[1])

    def forward(weights, x, micro):
        y, pull, stats = vjp(weights, x, micro)
        residuals = jax.tree.leaves(pull)
        if [(r.shape, r.dtype) for r in residuals] != [(e.shape, e.dtype) for e in expected]:
            raise TypeError("two traces of a layer left different residuals")
        return y, residuals, stats

    return StageFns(
        embed=ends.embed,
        forward=forward,
        head_and_loss=ends.head_and_loss,
        backward=functools.partial(layer.backward, shapes, structure),
        wgrad=layer.wgrad,
        embed_backward=ends.embed_backward,
        add_aux=add_aux,
    )


def _variables(state: nnx.State) -> list[tuple[str, nnx.Variable]]:
    return [(".".join(path), variable) for path, variable in nnx.to_flat_state(state)]


def _named(taps: nnx.State) -> Gradients:
    """Return gradients of `grad_taps` by dotted path."""
    return {
        path: grad.weight if isinstance(grad, GradTap) else grad
        for path, grad in named_arrays(taps).items()
    }


def add_aux(total, new):
    """Add outputs of two micro-batches; of the rounds of exchanges, take the most."""

    def add(total, new):
        if not isinstance(new, RouterStats):
            return total + new
        sums = jax.tree.map(jnp.add, total, new)
        return sums._replace(rounds=jnp.maximum(total.rounds, new.rounds))

    return jax.tree.map(add, total, new, is_leaf=lambda x: isinstance(x, RouterStats))


def global_stats(
    own: RouterStats, mtp: RouterStats | None, of_ranks: StageLayers, n_layers: int
) -> RouterStats:
    """Return the statistics of all MoE layers over the global batch, those of MTP last.

    Args:
        own: of the layers that this rank holds.
        of_ranks: layers that each rank holds.
    """
    sums = jax.tree.map(lambda x: gather_layers(x, None, of_ranks, n_layers), own)
    sums = sums._replace(rounds=max_per_layer(own.rounds, of_ranks, n_layers))
    if mtp is not None:
        sums = jax.tree.map(lambda *both: jnp.concatenate(both), sums, mtp)
    return psum_all(sums)._replace(rounds=pmax_all(sums.rounds))
