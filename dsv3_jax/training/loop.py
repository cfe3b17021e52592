"""The training run: data, state, steps, evaluation, checkpoints, and what it leaves behind."""

import contextlib
import dataclasses
import json
import signal
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.text
from jax.sharding import Mesh, NamedSharding

from dsv3_jax import data
from dsv3_jax.checkpoint import Checkpoints
from dsv3_jax.chips import multiplies_fp8
from dsv3_jax.config import Config
from dsv3_jax.costs import training_flops_per_token
from dsv3_jax.fit import check_mesh, why_not
from dsv3_jax.losses import Batch
from dsv3_jax.numerics.policy import Policy
from dsv3_jax.optimizer import make_optimizer
from dsv3_jax.overrides import differences, to_dict
from dsv3_jax.stages import pipeline_of
from dsv3_jax.training import metrics, plots
from dsv3_jax.training.batches import batch_of
from dsv3_jax.training.evaluate import make_evaluation, make_sampler
from dsv3_jax.training.fp8_stats import make_fp8_stats, shares
from dsv3_jax.training.history import LoadHistory
from dsv3_jax.training.redundancy import Redundancy
from dsv3_jax.training.state import (
    TrainState,
    abstract_state,
    fresh_state,
    layout_of,
    state_from,
)
from dsv3_jax.training.step import Metrics, make_step
from dsv3_jax.weights.sources import open_weights
from sharding.mesh import (
    BATCH,
    MeshSpec,
    make_mesh,
    share_of_process,
    spec_of,
    without_stages,
)

# Fields that may differ from those a workdir was begun with: they don't change what is learned.
FREE = (
    "train.steps",
    "train.eval",
    "train.sample",
    "checkpoint.",
    "parallel.",
    "pipeline.",
    "data.cache_dir",
    "fp8_stats",
    "model.moe.n_redundant",
)


def train(config: Config, spec: MeshSpec, workdir: Path) -> Path:
    """Train until `config.train.steps`, from the newest checkpoint in `workdir` if it has one."""
    check_mesh(config, spec)
    check_workdir(config, workdir)
    return Run(config, spec, workdir).to_the_end()


def check_workdir(config: Config, workdir: Path):
    """Note the config in the workdir, or raise a ValueError if another config began it."""
    path = workdir / "config.json"
    if path.exists():
        changed = differences(config, json.loads(path.read_text()))
        fixed = [line for line in changed if not line.startswith(FREE)]
        if fixed:
            raise ValueError(
                f"{workdir} was begun with another config:\n  "
                + "\n  ".join(fixed)
                + "\nuse that config again, or another --workdir"
            )
    workdir.mkdir(parents=True, exist_ok=True)
    metrics.write_atomically(path, json.dumps(to_dict(config), indent=2) + "\n")


class Run:
    """One process's part of a run."""

    def __init__(self, config: Config, spec: MeshSpec, workdir: Path):
        self.config, self.workdir = config, workdir
        self.mesh = make_mesh(spec)
        self.layout = layout_of(config, spec_of(self.mesh))
        if self.layout.ragged and self.layout.mesh.platform == "cpu":
            raise NotImplementedError(
                "parallel.transport='ragged': XLA has no ragged all-to-all for CPUs; use 'padded'"
            )
        train, extra = config.train, 1 + config.model.mtp_depth
        self.corpus = data.load(
            config.data, vocab_size=config.model.vocab_size, seq_len=train.seq_len, extra=extra
        )
        self.corpus.tokenizer.save(workdir / "tokenizer.json")
        context = config.parallel.context
        share = share_of_process(self.mesh, context)
        self.loader = data.Loader(self.corpus.train, train.batch, train.seed, share)
        self.tokens_per_step = train.batch * train.seq_len
        policy = Policy.of(config.precision)
        optimizer = make_optimizer(config.optimizer, policy, self.tokens_per_step)
        self.step = make_step(config, optimizer, self.mesh, self.layout)
        self.pipeline = pipeline_of(config, self.layout.mesh) if spec.pp > 1 else None
        # All that is not a training step has no stages, and gathers weights a layer at a time.
        self.flat_mesh, self.flat_layout = self.mesh, self.layout
        if self.pipeline is not None:
            self.flat_mesh = without_stages(self.mesh)
            flat = layout_of(config, spec_of(self.flat_mesh))
            self.flat_layout = dataclasses.replace(flat, zero=3)
        self.held_out = data.eval_batches(
            self.corpus.held_out,
            train.batch,
            train.eval_batches,
            share_of_process(self.flat_mesh, context),
        )
        how = (config, self.flat_mesh, self.flat_layout)
        self.evaluation = make_evaluation(*how)
        self.fp8_stats = make_fp8_stats(*how) if config.fp8_stats else None
        kept = (config.checkpoint.keep, config.checkpoint.keep_every)
        self.checkpoints = Checkpoints(workdir / "checkpoints", *kept)
        self.state = self._start(optimizer)
        self.peak, self.peak_label = metrics.device_peak(jax.local_devices()[0], policy.compute)
        self.flops = training_flops_per_token(config.model, train.seq_len)
        self.loads = LoadHistory(workdir / "expert_load.npz", self.first, train.steps)
        self.stopped_by: int | None = None

    def _start(self, optimizer) -> TrainState:
        """The newest checkpoint's state, or a fresh one; sets where the run starts."""
        abstract = abstract_state(self.config, optimizer, self.mesh, self.layout)
        self.first = self.checkpoints.latest_step() or 0
        if not self.first:
            self.redundancy = Redundancy(self.config, self.mesh)
            if self.config.init_from is None:
                return fresh_state(self.config, optimizer, abstract)
            return state_from(open_weights(self.config.init_from), optimizer, abstract)
        state, extra = self.checkpoints.restore(abstract)
        self.loader.set_state(extra["loader"])
        self.redundancy = Redundancy(self.config, self.mesh, extra.get("redundancy"))
        return state

    def to_the_end(self) -> Path:
        """Steps until the last one, or a signal; then a sample and plots."""
        self._announce()
        log = metrics.MetricsLog(self.workdir, self.first)
        progress = metrics.Progress(self.config.train.steps, self.first, self.peak_label)
        with _signals(self), progress, jax.transfer_guard("disallow"):
            self._steps(log, progress)
        log.close()
        self._save(self.first)
        self.checkpoints.close()
        rows = metrics.read(self.workdir / "metrics.jsonl")
        plots.plot_loss(rows, self.workdir / "plots/loss.png", self.corpus.unigram_entropy)
        if self.config.fp8_stats:
            plots.plot_fp8(rows, self.workdir / "plots/fp8.png")
        if self.pipeline is not None:
            plots.plot_pipeline(self.pipeline, self.workdir / "plots/pipeline.png")
        if self.config.model.moe:
            plots.plot_expert_load(*self.loads.arrays(), self.workdir / "plots/expert_load.png")
        if self.stopped_by is not None:
            print(f"stopped and saved at step {self.first}; the same command goes on from there")
            raise SystemExit(128 + self.stopped_by)
        self._finish(rows)
        return self.workdir

    def _steps(self, log: metrics.MetricsLog, progress: metrics.Progress):
        """Dispatch step after step; each one's numbers are read while the next one runs."""
        config, pending, clock = self.config, None, time.perf_counter()
        while self.first < config.train.steps and self.stopped_by is None:
            batch = self._batch(next(self.loader), self.mesh)
            self.state, numbers = self.step(self.state, batch, self.redundancy.slots)
            self.first += 1
            if pending is not None:
                clock = self._report(log, progress, *pending, clock)
            pending = (self.first, numbers)
            last = self.first == config.train.steps
            evaluates = last or self.first % config.train.eval_every == 0
            saves = self.first % config.checkpoint.every == 0
            if evaluates or saves or self.redundancy.due(self.first):
                clock = self._report(log, progress, *pending, clock)
                pending = None
            if evaluates:
                self._evaluate(log, progress)
            if saves:
                self._save(self.first)
            if pending is None:
                clock = time.perf_counter()
        if pending is not None:
            self._report(log, progress, *pending, clock)

    def _batch(self, rows: dict[str, np.ndarray], mesh: Mesh) -> Batch:
        return batch_of(rows["tokens"], self.config, mesh, self.corpus.tokenizer.eos_id)

    def _report(self, log, progress, step: int, numbers: Metrics, since: float) -> float:
        """Log one step's numbers once it has run; returns when that was."""
        numbers = jax.device_get(numbers)
        now = time.perf_counter()
        speed = self.tokens_per_step / (now - since)
        if numbers.router is not None:
            self._check(step, numbers.router.lost)
            self.loads.add(step, numbers.router.load)
            self.redundancy.observe(step, numbers.router.load)
        log.log(self._row(step, numbers) | {"tokens_per_second": speed})
        progress.update(
            step,
            loss=float(numbers.losses.main),
            tokens_per_second=speed,
            utilization=speed * self.flops / (self.peak * self.mesh.size),
        )
        return now

    def _check(self, step: int, lost: np.ndarray):
        """Raise a FloatingPointError that names the layers whose router had no finite logits."""
        if not lost.any():
            return
        end = self.config.model.n_layers
        names = [
            f"layer {layer}" if layer < end else f"MTP module {layer - end + 1}"
            for layer in np.flatnonzero(lost) + self.config.model.n_dense
        ]
        saved = self.checkpoints.latest_step()
        kept = f"the newest checkpoint is that of step {saved}" if saved else "there is none yet"
        raise FloatingPointError(
            f"step {step}: the router logits of {int(lost.max()):,} tokens are not finite in "
            f"{', '.join(names)}; they were not routed. No checkpoint holds this step; {kept}. Try "
            f"a lower optimizer.peak_lr or precision.compute=float32"
        )

    def _row(self, step: int, numbers: Metrics) -> dict[str, int | float]:
        router = numbers.router
        row = {
            "step": step,
            "tokens": step * self.tokens_per_step,
            "loss": float(numbers.losses.main),
            "mtp_loss": float(numbers.losses.mtp),
            "balance_loss": float(numbers.losses.balance),
            "grad_norm": float(numbers.grad_norm),
            "lr": float(numbers.lr),
        }
        if router is not None:
            row["max_violation"] = float(plots.max_violation(router.load).max())
            row["dropped_tokens"] = int(router.load.sum() - router.sent.sum())
            row["dispatch_rounds"] = int(router.rounds.max())
        return row

    def _evaluate(self, log: metrics.MetricsLog, progress: metrics.Progress):
        batches = [self._batch(rows, self.flat_mesh) for rows in self.held_out]
        losses = [self.evaluation(self.state.params, self.state.bias, b) for b in batches]
        main, mtp = np.mean([jax.device_get((x.main, x.mtp)) for x in losses], axis=0)
        floor = self.corpus.unigram_entropy
        row = {"step": self.first, "eval_loss": float(main), "eval_mtp_loss": float(mtp)}
        if self.fp8_stats:
            counts = self.fp8_stats(self.state.params, self.state.bias, batches[0])
            row |= shares(jax.device_get(counts))
        log.log(row)
        progress.print(
            f"step {self.first:,}: held-out loss {main:.4f} (unigram entropy of the same text "
            f"{floor:.4f}), second token {mtp:.4f}"
        )

    def _save(self, step: int):
        if step not in (0, self.checkpoints.latest_step()):
            self.checkpoints.save(step, self.state, self._beside())
            self.loads.save()

    def _beside(self) -> dict:
        """What a checkpoint holds besides the state."""
        return {"loader": self.loader.get_state(), "redundancy": self.redundancy.saved()}

    def _announce(self):
        model, corpus = self.config.model, self.corpus
        count = sum(x.size for x in jax.tree.leaves(self.state.params))
        init = self.config.init_from
        start = f"starting with the weights of {init}" if init else "starting"
        where = f"resuming at step {self.first}" if self.first else start
        print(
            f"{self.config.name}: {count:,} parameters on mesh {self.layout.mesh} "
            f"({self.mesh.size} {jax.default_backend()} devices), {where}\n"
            f"text: {self.config.data.source}, {corpus.n_train_tokens:,} tokens of "
            f"{model.vocab_size:,}; held out, unigram entropy {corpus.unigram_entropy:.4f} nats\n"
            f"{self._pipeline_note()}{self._fp8_note()}"
            f"writing to {self.workdir}: metrics.jsonl, tensorboard/, checkpoints/, plots/",
            flush=True,
        )

    def _pipeline_note(self) -> str:
        if self.pipeline is None:
            return ""
        why = ""
        if self.config.pipeline.schedule == "auto" and self.pipeline.table.schedule.name == "zb1p":
            why = f" ({why_not('dualpipe', self.config, self.layout.mesh)})"
        return f"pipeline: {self.pipeline}{why}\n"

    def _fp8_note(self) -> str:
        kind = jax.local_devices()[0].device_kind
        if self.config.precision.products != "fp8" or multiplies_fp8(kind):
            return ""
        return (
            f"precision.products=fp8: {kind} devices emulate it; that is as exact, but no faster\n"
        )

    def _finish(self, rows: list[dict]):
        """A continuation of held-out text, and where everything lies."""
        evals = [row["eval_loss"] for row in rows if "eval_loss" in row]
        floor = self.corpus.unigram_entropy
        prompt, text = self._sample()
        sample = rich.text.Text.assemble("\nsample: ", prompt, (text, "bold"), "\n")
        rich.console.Console(highlight=False, soft_wrap=True).print(sample)
        print(
            f"done: held-out loss {evals[-1]:.4f}, {floor - evals[-1]:.4f} nats below the unigram "
            f"entropy {floor:.4f}; plots in {self.workdir / 'plots'}"
        )

    def _sample(self) -> tuple[str, str]:
        """Prompt from the held-out text, and what the model makes of it."""
        shares, new = self.flat_layout.mesh.data, self.config.train.sample_tokens
        prompt = np.asarray(self.corpus.held_out[0][:16])
        rows = np.zeros((shares, prompt.size + new), np.int32)
        rows[:, : prompt.size] = prompt
        keys = jax.random.split(jax.random.key(self.config.train.seed), shares)
        sharding = NamedSharding(self.flat_mesh, BATCH)
        rows = jax.make_array_from_callback(rows.shape, sharding, lambda index: rows[index])
        keys = jax.device_put(jax.random.key_data(keys), sharding)
        sampler = make_sampler(self.config, self.flat_mesh, self.flat_layout)
        out = sampler(self.state.params, self.state.bias, rows, jnp.int32(prompt.size), keys)
        row = np.asarray(out.addressable_shards[0].data)[0]
        decode = self.corpus.tokenizer.decode
        return decode(prompt.tolist()), decode(row[prompt.size :].tolist())


@contextlib.contextmanager
def _signals(run: Run):
    """Ctrl-C or SIGTERM ends the run after the step under way; a second one at once."""

    def stop(number, frame):
        run.stopped_by = number
        signal.signal(number, before[number])

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
