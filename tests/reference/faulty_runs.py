"""Runs with faults put in, one after the other in this process.

    python faulty_runs.py FOLDER '{"name": {"bad": [70, 85], "jump": [10, 40], "wait": 0.2}, ...}'

"bad" is a range of the data's order, of whose batches the gradient is not a number; "jump" a step
before which the loader leaves out so many sequences; "wait" how long every batch takes. Prints a
JSON object with what this script measured itself: seconds in all, and seconds of waiting for data.
"""

import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from reference.train_command import settings

from configs import load_preset
from dsv3_jax.config_cli import override
from dsv3_jax.training import run, setup, step
from sharding.mesh import BATCH, make_global_array, start_devices

whole_gradients, Run = step.loss_and_gradients, run.Run


def loss_and_gradients(*arguments):
    """Not a number where no token counts, which no batch of text has."""
    compute = whole_gradients(*arguments)

    def broken(params, bias, batch, *rest):
        losses, stats, grads = compute(params, bias, batch, *rest)
        factor = jnp.where(batch.loss_mask.any(), 1.0, jnp.nan)
        return losses, stats, jax.tree.map(lambda x: x * factor, grads)

    return broken


class FaultyRun(Run):
    """A run with the faults of `faults`."""

    faults: dict = {}

    def _dispatch(self, batch):
        begin = self.loader.row - self.sizes.size(self.step)
        first, last = self.faults.get("bad", (0, 0))
        if first <= begin < last:
            mask = np.zeros(batch.loss_mask.shape, bool)
            batch = batch._replace(loss_mask=make_global_array(mask, self.mesh, BATCH))
        return super()._dispatch(batch)


class FaultyLoader(setup.Loader):
    """A loader that leaves out sequences before one step, or takes time."""

    jump, wait, waited = (0, 0), 0.0, 0.0

    def __next__(self):
        before, sequences = self.jump
        if self.step + 1 == before:
            self.start(self.step, self.row + sequences)
        begin = time.perf_counter()
        time.sleep(self.wait)
        batch = super().__next__()
        FaultyLoader.waited += time.perf_counter() - begin
        return batch


def main(folder: Path, runs: dict[str, dict]):
    step.loss_and_gradients, run.Run = loss_and_gradients, FaultyRun
    setup.Loader, run.process_start_time = FaultyLoader, time.time
    spec, measured = start_devices("dp2,ep2"), {}
    for name, faults in runs.items():
        more = faults.get("settings", [])
        config = override(load_preset("tiny"), *settings(folder / name, *more))
        FaultyRun.faults = faults
        FaultyLoader.jump = faults.get("jump", (0, 0))
        FaultyLoader.wait, FaultyLoader.waited = faults.get("wait", 0.0), 0.0
        begin, error = time.perf_counter(), ""
        try:
            run.train(config, spec, folder / name)
        except FloatingPointError as caught:
            error = str(caught)
        seconds = time.perf_counter() - begin
        measured[name] = {"seconds": seconds, "waited": FaultyLoader.waited, "error": error}
    print(json.dumps(measured))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
