"""The parts of a run that never change: devices, text, optimizer, and the shape of its state."""

from pathlib import Path
from typing import NamedTuple

import jax
import optax
from jax.sharding import Mesh

from dsv3_jax.config import Config
from dsv3_jax.data.corpus import Corpus, load_corpus
from dsv3_jax.data.loader import Loader
from dsv3_jax.losses import next_token_loss
from dsv3_jax.numerics.policy import Policy
from dsv3_jax.optimizer import make_optimizer
from dsv3_jax.pipeline_plan import Pipeline, make_pipeline
from dsv3_jax.schedules import BatchSizes, with_batch
from dsv3_jax.training.state import (
    TrainState,
    abstract_state,
    init_sharded_state,
    load_state,
    make_layout,
)
from dsv3_jax.training.step import make_step
from dsv3_jax.training.workdir import check_tokenizer
from dsv3_jax.weights.sources import open_weights
from sharding.layout import Layout
from sharding.mesh import MeshSpec, make_mesh, mesh_spec, process_batch_shard


class Setup(NamedTuple):
    """The parts of a run that stay the same in all its steps."""

    config: Config
    mesh: Mesh
    layout: Layout
    corpus: Corpus
    sizes: BatchSizes
    optimizer: optax.GradientTransformation
    abstract_state: TrainState  # shapes, dtypes and placements
    pipeline: Pipeline | None  # None without stages


def set_up(config: Config, spec: MeshSpec, workdir: Path) -> Setup:
    """Make the mesh, load the text, and lay out the state; save the tokenizer in the workdir.

    Raises:
        NotImplementedError: the devices lack a ragged all-to-all, and the config asks for it.
    """
    mesh = make_mesh(spec)
    layout = make_layout(config, mesh_spec(mesh))
    if layout.ragged and layout.mesh.platform == "cpu":
        raise NotImplementedError(
            "parallel.transport='ragged': XLA has no ragged all-to-all for CPUs; use 'padded'"
        )
    model, train = config.model, config.train
    corpus = load_corpus(
        config.data,
        vocab_size=model.vocab_size,
        seq_len=train.seq_len,
        extra=1 + model.mtp_depth,
    )
    if jax.process_index() == 0:
        corpus.tokenizer.save(workdir / "tokenizer.json")
    optimizer = make_optimizer(config.optimizer, Policy.of(config.precision))
    return Setup(
        config=config,
        mesh=mesh,
        layout=layout,
        corpus=corpus,
        sizes=BatchSizes.of(train),
        optimizer=optimizer,
        abstract_state=abstract_state(config, optimizer, mesh, layout),
        pipeline=make_pipeline(config, layout.mesh) if spec.pp > 1 else None,
    )


def make_loader(setup: Setup) -> Loader:
    """Return the loader of this process's shard of the training batches."""
    train = setup.config.train
    shard = process_batch_shard(setup.mesh, setup.config.parallel.context)
    return Loader(setup.corpus.train, setup.sizes, train.seed, shard)


def initial_state(setup: Setup) -> TrainState:
    """Return the state before the first step: random weights, or those of `config.init_from`."""
    config, optimizer, abstract = setup.config, setup.optimizer, setup.abstract_state
    if config.init_from is None:
        return init_sharded_state(config, optimizer, abstract)
    source = open_weights(config.init_from)
    check_tokenizer(source.directory, setup.corpus.tokenizer)
    return load_state(source, optimizer, abstract)


def compile_step(setup: Setup, batch_size: int, *arguments) -> jax.stages.Compiled:
    """Compile the training step for batches of `batch_size` sequences, and these arguments."""
    config = with_batch(setup.config, batch_size)
    loss_fn = next_token_loss(config.losses, config.model.mtp_depth)
    step = make_step(config, setup.optimizer, setup.mesh, setup.layout, loss_fn, setup.sizes)
    return step.lower(*arguments).compile()
