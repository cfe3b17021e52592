"""What a run measures between training steps: held-out loss, FP8 counts, a sample of text."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from dsv3_jax.config import Config
from dsv3_jax.data.corpus import Corpus
from dsv3_jax.data.loader import eval_batches
from dsv3_jax.losses import Batch
from dsv3_jax.training.batches import device_batch
from dsv3_jax.training.evaluate import make_evaluation, make_sampler
from dsv3_jax.training.fp8_stats import make_fp8_stats, shares
from dsv3_jax.training.state import layout_of
from sharding.mesh import BATCH, fold_pp_into_dp, mesh_spec, process_batch_shard


class HeldOut:
    """The programs and batches for it.

    Stages are for training steps alone: here the mesh has none, and weights are gathered a layer at
    a time.
    """

    def __init__(self, config: Config, mesh: Mesh, corpus: Corpus):
        self._config, self._corpus, self._mesh = config, corpus, mesh
        self._layout = layout_of(config, mesh_spec(mesh))
        if mesh_spec(mesh).pp > 1:
            self._mesh = fold_pp_into_dp(mesh)
            flat = layout_of(config, mesh_spec(self._mesh))
            self._layout = dataclasses.replace(flat, zero=3)
        train, share = config.train, process_batch_shard(self._mesh, config.parallel.context)
        self._rows = eval_batches(corpus.held_out, train.batch, train.eval_batches, share)
        how = (config, self._mesh, self._layout)
        self._losses = make_evaluation(*how)
        self._fp8_stats = make_fp8_stats(*how) if config.fp8_stats else None

    def measure(
        self, params: nnx.State, bias: nnx.State, mean: nnx.State | None
    ) -> dict[str, float]:
        """Losses of the weights, and of their mean if there is one; a row of the metrics."""
        batches = [Batch(*device_batch(rows, self._config, self._mesh)) for rows in self._rows]

        def losses(weights: nnx.State) -> tuple[float, float]:
            found = [self._losses(weights, bias, batch) for batch in batches]
            main, mtp = np.mean(
                [jax.device_get((x.terms["loss"], x.terms["mtp_loss"])) for x in found], axis=0
            )
            return float(main), float(mtp)

        main, mtp = losses(params)
        row = {"eval_loss": main, "eval_mtp_loss": mtp}
        if mean is not None:
            row["eval_ema_loss"] = losses(mean)[0]
        if self._fp8_stats is not None:
            row |= shares(jax.device_get(self._fp8_stats(params, bias, batches[0])))
        return row

    def sample(self, params: nnx.State, bias: nnx.State) -> tuple[str, str]:
        """Prompt from the held-out text, and what the model makes of it."""
        shares, new = self._layout.mesh.n_data_shards, self._config.train.sample_tokens
        prompt = np.asarray(self._corpus.held_out[0].tokens[:16])
        rows = np.zeros((shares, prompt.size + new), np.int32)
        rows[:, : prompt.size] = prompt
        keys = jax.random.split(jax.random.key(self._config.train.seed), shares)
        keys = np.asarray(jax.random.key_data(keys))
        sharding = NamedSharding(self._mesh, BATCH)
        rows, keys = (
            jax.make_array_from_callback(x.shape, sharding, lambda index, x=x: x[index])
            for x in (rows, keys)
        )
        sampler = make_sampler(self._config, self._mesh, self._layout)
        out = sampler(params, bias, rows, jnp.int32(prompt.size), keys)
        row = np.asarray(out.addressable_shards[0].data)[0]
        decode = self._corpus.tokenizer.decode
        return decode(prompt.tolist()), decode(row[prompt.size :].tolist())
