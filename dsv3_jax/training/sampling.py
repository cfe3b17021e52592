"""The text that a run writes at its end: the serving engine on the training weights."""

import numpy as np

from dsv3_jax.numerics.policy import Policy
from dsv3_jax.serving.generator import Generator
from dsv3_jax.serving.model_view import ModelView
from dsv3_jax.serving.sampling import Sampling
from dsv3_jax.training.setup import Setup
from dsv3_jax.training.state import TrainState
from sharding.mesh import fold_pp_into_dp

PROMPT_TOKENS = 16
SAMPLING = Sampling(temperature=0.7)


def sample_text(setup: Setup, state: TrainState) -> tuple[str, str]:
    """Return a prompt from the held-out text, and the model's continuation of it."""
    config, corpus = setup.config, setup.corpus
    prompt = np.asarray(corpus.held_out[0].tokens[:PROMPT_TOKENS]).tolist()
    tokens, n_new = [], config.train.sample_tokens
    if n_new > 0:
        mesh = fold_pp_into_dp(setup.mesh)
        policy = Policy.of(config.precision)
        view = ModelView.of_state(config.model, policy, mesh, state.params, state.bias)
        steps = Generator(view)([prompt], n_new, SAMPLING, seed=config.train.seed)
        tokens = [int(step.tokens[0]) for step in steps]
    return corpus.tokenizer.decode(prompt), corpus.tokenizer.decode(tokens)
