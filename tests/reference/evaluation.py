"""What the tests of evaluation share: the recorded runs, and their model."""

import functools
import json
from pathlib import Path

import jax

from dsv3_jax.data.chat import Prompts, load_prompts
from dsv3_jax.evaluation.scorer import Scorer
from dsv3_jax.serving.generator import Generator
from dsv3_jax.serving.model_view import ModelView
from dsv3_jax.weights.pretrained import load_model
from dsv3_jax.weights.sources import open_weights
from sharding.mesh import make_mesh, parse_mesh

GOLDENS = Path(__file__).parent.parent / "goldens/lmeval"
CHECKPOINT = GOLDENS / "checkpoint"
RUNS = ("bos_default", "nobos")  # prompts begin with bos, or not


@functools.cache
def golden(run: str) -> dict:
    return json.loads((GOLDENS / f"results/{run}.json").read_text())


@functools.cache
def prompts() -> Prompts:
    return load_prompts(CHECKPOINT)


@functools.cache
def scorer(mesh_text: str = "dp1", batch: int = 8) -> Scorer:
    """All rows have one length, so that tests compile little."""
    spec = parse_mesh(mesh_text)
    mesh = make_mesh(spec, jax.devices()[: spec.n_devices])
    source = open_weights(CHECKPOINT)
    view = ModelView.take(load_model(source, "float32", mesh), mesh)
    generator = Generator(view, multiple=128)
    return Scorer(generator, source.max_length, batch, min_length=source.max_length)
