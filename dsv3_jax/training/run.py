"""The training run: data, state, steps, evaluation, checkpoints, and what it leaves behind."""

import contextlib
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import rich.console
import rich.text
from jax.experimental import multihost_utils

from dsv3_jax.checkpoint import CheckpointManager, SaveFailed
from dsv3_jax.config import Config
from dsv3_jax.data.corpus import load_corpus
from dsv3_jax.data.loader import Loader, RowBatch
from dsv3_jax.flops import training_flops_per_token
from dsv3_jax.losses import Batch, next_token_loss
from dsv3_jax.mesh_checks import check_mesh
from dsv3_jax.numerics.policy import Policy
from dsv3_jax.optimizer import make_optimizer
from dsv3_jax.pipeline_plan import pipeline_of
from dsv3_jax.schedules import BatchSizes, with_batch
from dsv3_jax.training import messages, plots, reporting
from dsv3_jax.training.audit import Copies, paces, slow_devices
from dsv3_jax.training.batches import device_batch
from dsv3_jax.training.ema import HostEma
from dsv3_jax.training.evaluation import HeldOut
from dsv3_jax.training.expert_load import LoadHistory
from dsv3_jax.training.goodput import Ledger, goodput
from dsv3_jax.training.health import Bad, Events, Guard, Spikes, TooManyBad
from dsv3_jax.training.host import process_began
from dsv3_jax.training.rebalance import Redundancy
from dsv3_jax.training.state import abstract_state, fresh_state, layout_of, state_from
from dsv3_jax.training.step import Metrics, make_step
from dsv3_jax.training.workdir import check_text, check_tokenizer, check_workdir
from dsv3_jax.weights.sources import open_weights
from sharding.mesh import MeshSpec, make_mesh, mesh_spec, process_batch_shard


def train(config: Config, spec: MeshSpec, workdir: Path) -> Path:
    """Train until `config.train.steps`, from the newest checkpoint in `workdir` if it has one."""
    check_mesh(config, spec)
    check_workdir(config, workdir)
    return Run(config, spec, workdir).to_the_end()


class Pending(NamedTuple):
    """A step that has been dispatched, and whose numbers are still to be read."""

    step: int
    numbers: Metrics  # on the device
    batch: RowBatch  # its rows on this process
    begin: int  # its first sequence in the order


class Run:
    """One process's part of a run; process 0 speaks, and each has its own folder of reports."""

    def __init__(self, config: Config, spec: MeshSpec, workdir: Path):
        self.config, self.workdir = config, workdir
        process = jax.process_index()
        self.folder = workdir / "processes" / str(process) if process else workdir
        self.ledger, self.events = Ledger(self.folder, process_began()), Events(self.folder)
        self.console = rich.console.Console(quiet=process > 0, highlight=False, soft_wrap=True)
        self.mesh = make_mesh(spec)
        self.layout = layout_of(config, mesh_spec(self.mesh))
        if self.layout.ragged and self.layout.mesh.platform == "cpu":
            raise NotImplementedError(
                "parallel.transport='ragged': XLA has no ragged all-to-all for CPUs; use 'padded'"
            )
        train, extra = config.train, 1 + config.model.mtp_depth
        self.corpus = load_corpus(
            config.data, vocab_size=config.model.vocab_size, seq_len=train.seq_len, extra=extra
        )
        if process == 0:
            self.corpus.tokenizer.save(workdir / "tokenizer.json")
        self.sizes = BatchSizes.of(train)
        share = process_batch_shard(self.mesh, config.parallel.context)
        self.loader = Loader(self.corpus.train, self.sizes, train.seed, share)
        self.optimizer = make_optimizer(config.optimizer, Policy.of(config.precision))
        self.pipeline = pipeline_of(config, self.layout.mesh) if spec.pp > 1 else None
        self.held_out = HeldOut(config, self.mesh, self.corpus)
        kept = (config.checkpoint.keep, config.checkpoint.keep_every)
        self.checkpoints = CheckpointManager(workdir / "checkpoints", *kept)
        self.guard, self.spikes = Guard(config.guard), Spikes(config.guard.spike)
        self._start()
        compute = Policy.of(config.precision).compute
        self.peak, self.peak_label = reporting.device_peak(jax.local_devices()[0], compute)
        self.flops = training_flops_per_token(config.model, train.seq_len)
        self.loads = LoadHistory(self.folder / "expert_load.npz", self.first, train.steps)
        self.programs: dict[int, jax.stages.Compiled] = {}
        self.copies: Copies | None = None
        self.stopped_by: int | None = None

    def _start(self):
        """Begin with the newest checkpoint, or anew."""
        config, optimizer = self.config, self.optimizer
        self.abstract = abstract_state(config, optimizer, self.mesh, self.layout)
        self.first, self.ema = 0, None
        with self.ledger.spent_on("restore"):
            row = self._resume()
        if row is not None:
            self.loader.start(self.first, row)
            return
        self.redundancy = Redundancy(config, self.mesh)
        if config.init_from is None:
            self.state = fresh_state(config, optimizer, self.abstract)
        else:
            source = open_weights(config.init_from)
            check_tokenizer(source.directory, self.corpus.tokenizer)
            self.state = state_from(source, optimizer, self.abstract)
        if config.ema.decay is not None:
            self.ema = HostEma(self.state.params, config.ema)

    def _resume(self) -> int | None:
        """Take the newest sound checkpoint, if there is any; returns its next row of the data."""
        wanted = self.abstract
        if self.config.ema.decay is not None:
            wanted = wanted._replace(ema=wanted.params)
        resumed = self.checkpoints.resume(wanted)
        if resumed is None:
            return None
        self.first, state, extra = resumed
        check_text(self.config.data.source, extra["text"], self.corpus.fingerprint)
        self.state = state._replace(ema=None)
        if state.ema is not None:
            if self.ema is not None:
                self.ema.close()
            self.ema = HostEma(state.ema, self.config.ema)
        self.redundancy = Redundancy(self.config, self.mesh, extra["redundancy"])
        self.guard.restore(extra["guard"])
        return extra["row"]

    def to_the_end(self) -> Path:
        """Steps until the last one, or a signal; then a sample and plots."""
        self._announce()
        self.log = reporting.MetricsLog(self.folder, self.first)
        self.progress = reporting.Progress(
            self.config.train.steps, self.first, self.peak_label, self.console
        )
        with contextlib.closing(self.checkpoints):  # whatever happens, a save is finished
            with _signals(self), self.progress, jax.transfer_guard("disallow"):
                self._steps()
            self.log.close()
            with self.ledger.spent_on("save"):
                self._wait_for_save()
                self._start_save()
                self.checkpoints.wait()
        with self.ledger.spent_on("end"):
            rows = reporting.read(self.folder / "metrics.jsonl")
            self._draw(rows)
            if self.stopped_by is None:
                self._finish(rows)
        self.ledger.write()
        self.console.print(f"time: {goodput(self.folder)}")
        if self.stopped_by is not None:
            self.console.print(
                f"stopped and saved at step {self.first}; the same command goes on from there"
            )
            raise SystemExit(128 + self.stopped_by)
        return self.workdir

    def _steps(self):
        """All steps; after too many bad ones in a row, from an earlier one on."""
        while True:
            try:
                with self.ledger.spent_on("step"):
                    return self._forward()
            except TooManyBad:
                with self.ledger.spent_on("restore"):
                    self._go_back()

    def _forward(self):
        """Dispatch step after step; each one's numbers are read while the next one runs."""
        pending, start, self.clock = None, self.first, time.perf_counter()
        while self.first < self.config.train.steps and not self._stops():
            begin, acts = self.loader.row, self._due(self.first + 1)
            with self.ledger.spent_on("data"):
                loaded = next(self.loader)
            new = self.sizes.size(self.first) not in self.programs
            if pending is not None and (acts or new):  # so that its time is its own
                self._report(pending)
                pending = None
            batch = Batch(*device_batch(loaded.rows, self.config, self.mesh))
            numbers = self._step(batch)
            self.first += 1
            self.ledger.steps(start, self.first)
            if pending is not None:
                self._report(pending)
            pending = Pending(self.first, numbers, loaded, begin)
            if acts:
                self._report(pending)
                pending = None
                for act in acts:
                    act()
                self.clock = time.perf_counter()
        if pending is not None:
            self._report(pending)

    def _due(self, step: int) -> list[Callable]:
        """What is to be done after a step, which then is not to wait for its numbers."""
        config = self.config
        audits = config.guard.audit_every
        return [
            *[self._evaluate] * (step == config.train.steps or step % config.train.eval_every == 0),
            *[self._audit] * (audits is not None and step % audits == 0),
            *[self._save] * (step % config.checkpoint.every == 0),
            *[lambda: None] * self.redundancy.due(step),  # its load decides the next placement
        ]

    def _stops(self) -> bool:
        """Whether a signal ends the run here; all processes agree on the step."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(self.first):
            self.stopped_by = signal.SIGTERM
        return self.stopped_by is not None

    def _step(self, batch: Batch) -> Metrics:
        """Dispatch a step; the first of a batch size compiles its program."""
        size = self.sizes.size(self.first)
        arguments = (self.state, batch, self.redundancy.slots)
        if size not in self.programs:
            with self.ledger.spent_on("compile"):
                config = with_batch(self.config, size)
                loss_fn = next_token_loss(config.losses, config.model.mtp_depth)
                how = (self.optimizer, self.mesh, self.layout, loss_fn, self.sizes)
                self.programs[size] = make_step(config, *how).lower(*arguments).compile()
            self.clock = time.perf_counter()
        self.state, numbers = self.programs[size](*arguments)
        if self.ema is not None:
            self.ema.update(self.first + 1, self.state.params)
        return numbers

    def _report(self, pending: Pending):
        """Log one step's numbers once it has run."""
        step, numbers = pending.step, jax.device_get(pending.numbers)
        now = time.perf_counter()
        n_tokens = self.sizes.size(step - 1) * self.sizes.seq_len
        speed, self.clock = n_tokens / (now - self.clock), now
        if numbers.router is not None and not numbers.skipped:
            self.loads.add(step, numbers.router.load)
            self.redundancy.observe(step, numbers.router.load)
        seen = self.sizes.sequences(step) * self.sizes.seq_len
        row = messages.row_of(step, seen, numbers)
        self.log.log(row | {"tokens_per_second": speed})
        self.progress.update(
            step,
            loss=row["loss"],
            tokens_per_second=speed,
            utilization=speed * self.flops / (self.peak * self.mesh.size),
        )
        self._judge(pending, numbers)

    def _judge(self, pending: Pending, numbers: Metrics):
        """Note a step that was skipped, or a loss that stands out."""
        step, loss = pending.step, float(numbers.losses.terms["loss"])
        if numbers.skipped:
            why, batch = messages.why_skipped(numbers, self.config.model), self._identity(pending)
            self._note("skipped", f"step {step:,} skipped: {why}; {batch}", step=step)
            if self.guard.bad(Bad(step, why, batch)):
                raise TooManyBad
            return
        self.guard.good()
        if above := self.spikes.stands_out(loss):
            text = f"step {step:,}: loss {loss:.4f} stands {above:.1f} deviations out"
            self._note("spike", f"{text}; {self._identity(pending)}", step=step)

    def _identity(self, pending: Pending) -> str:
        size = self.sizes.size(pending.step - 1)
        return messages.identity(pending.batch, pending.begin, size)

    def _go_back(self):
        """Take the state of an earlier checkpoint, and go on behind the data that has come."""
        bad, saved = self.guard.row, self.checkpoints.steps()
        step = self.guard.way_back(saved)
        summary = (
            f"{len(bad)} steps in a row, to step {bad[-1].step:,}, were skipped: {bad[-1].why}"
        )
        if step is None:
            there = f"only those of {saved}" if saved else "none"
            raise FloatingPointError(
                f"{summary}. There is no earlier checkpoint to go back to ({there}); try a lower "
                f"optimizer.peak_lr or precision.compute=float32, and look at {bad[0].batch}"
            )
        row, guard = self.loader.row, self.guard.saved()
        self.checkpoints.delete_after(step)
        self._resume()
        self.guard.restore(guard)
        self.loader.start(self.first, row)
        self.log.rewind(self.first)
        self.loads.rewind(self.first)
        text = f"{summary}; back to step {self.first:,}, and on behind their data"
        self._note("rolled back", text, step=self.first)

    def _note(self, event: str, text: str, **facts):
        """Say something, and keep it in events.jsonl."""
        self.events.add(event, text=text, **facts)
        self.console.print(text, markup=False)

    def _evaluate(self):
        with self.ledger.spent_on("evaluate"):
            mean = None if self.ema is None else self.ema.params()
            row = self.held_out.measure(self.state.params, self.state.bias, mean)
        self.log.log({"step": self.first} | row)
        average = f", of the mean weights {row['eval_ema_loss']:.4f}" if self.ema else ""
        self.progress.print(
            f"step {self.first:,}: held-out loss {row['eval_loss']:.4f} (unigram entropy of the "
            f"same text {self.corpus.unigram_entropy:.4f}), second token "
            f"{row['eval_mtp_loss']:.4f}{average}"
        )

    def _audit(self):
        with self.ledger.spent_on("audit"):
            if self.copies is None:
                self.copies = Copies(self.state, self.state.params, self.mesh, self.layout)
            found = self.copies.differ(self.state, self.state.params)
            found += slow_devices(paces(self.mesh))
        for text in found:
            self._note("audit", f"step {self.first:,}: {text}", step=self.first)

    def _save(self):
        """Start a save; one that fails is told, and training goes on."""
        with self.ledger.spent_on("save"):
            self._wait_for_save()
            try:
                self._start_save()
            except SaveFailed as error:
                self._note("not saved", str(error), step=self.first)

    def _wait_for_save(self):
        """Let the save before finish, and tell if it failed."""
        try:
            self.checkpoints.wait()
        except SaveFailed as error:
            self._note("not saved", str(error), step=self.first)

    def _start_save(self):
        if self.first not in (0, self.checkpoints.latest_step()):
            mean = None if self.ema is None else self.ema.params()
            self.checkpoints.save(self.first, self.state._replace(ema=mean), self._beside())
            self.loads.save()

    def _beside(self) -> dict:
        """What a checkpoint holds besides the state."""
        return {
            "row": self.loader.row,
            "text": self.corpus.fingerprint,
            "redundancy": self.redundancy.saved(),
            "guard": self.guard.saved(),
        }

    def _announce(self):
        count = sum(x.size for x in jax.tree.leaves(self.state.params))
        mesh = self.layout.mesh
        lines = [messages.announcement(self.config, mesh, self.corpus, count, self.first)]
        if self.pipeline is not None:
            lines.append(messages.of_pipeline(self.config, mesh, self.pipeline))
        lines += [messages.of_fp8(self.config)] * bool(messages.of_fp8(self.config))
        lines.append(f"writing to {self.workdir}: reporting.jsonl, checkpoints/, plots/ and more")
        self.console.print("\n".join(lines), markup=False)

    def _draw(self, rows: list[dict]):
        folder = self.folder / "plots"
        plots.plot_loss(rows, folder / "loss.png", self.corpus.unigram_entropy)
        if self.config.fp8_stats:
            plots.plot_fp8(rows, folder / "fp8.png")
        if self.pipeline is not None:
            plots.plot_pipeline(self.pipeline, folder / "pipeline.png")
        if self.config.model.moe:
            plots.plot_expert_load(*self.loads.arrays(), folder / "expert_load.png")

    def _finish(self, rows: list[dict]):
        """A continuation of held-out text, and where everything lies."""
        prompt, text = self.held_out.sample(self.state.params, self.state.bias)
        sample = rich.text.Text.assemble("\nsample: ", prompt, (text, "bold"), "\n")
        self.console.print(sample)
        end = messages.end(rows, self.corpus.unigram_entropy)
        self.console.print(f"{end}; plots in {self.workdir / 'plots'}", markup=False)


@contextlib.contextmanager
def _signals(run: Run):
    """Ctrl-C or SIGTERM ends the run after the step under way; a second one at once.

    Where there are several processes, JAX's own service takes SIGTERM for all of them.
    """

    def stop(number, frame):
        run.stopped_by = number
        signal.signal(number, before[number])

    caught = (signal.SIGINT, signal.SIGTERM) if jax.process_count() == 1 else ()
    before = {number: signal.signal(number, stop) for number in caught}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
