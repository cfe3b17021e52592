"""The training run: steps, and between them evaluations, audits, saves and roll-backs.

The metrics of a step are read while the next one runs, so that devices never wait for Python. Only
a step that something is done after is waited for before the next one begins.
"""

import contextlib
import time
from pathlib import Path
from typing import NamedTuple

import jax
import rich.text

from dsv3_jax.config import Config
from dsv3_jax.data.loader import RowBatch
from dsv3_jax.losses import Batch
from dsv3_jax.mesh_checks import check_mesh
from dsv3_jax.training import messages, plots
from dsv3_jax.training.batches import device_batch
from dsv3_jax.training.ema import HostEma
from dsv3_jax.training.evaluation import Evaluation
from dsv3_jax.training.expert_load import LoadHistory
from dsv3_jax.training.goodput import Ledger, goodput, process_start_time
from dsv3_jax.training.health import (
    ReplicaAudit,
    SkippedStep,
    SkipPolicy,
    SpikeDetector,
    TooManySkipped,
    slow_devices,
    time_devices,
)
from dsv3_jax.training.rebalance import ExpertRebalancer
from dsv3_jax.training.records import read_rows
from dsv3_jax.training.reporting import Reporter
from dsv3_jax.training.sampling import sample_text
from dsv3_jax.training.saving import Restored, RunCheckpoints
from dsv3_jax.training.setup import compile_step, initial_state, make_loader, set_up
from dsv3_jax.training.step import Metrics
from dsv3_jax.training.stopping import StopSignal
from dsv3_jax.training.workdir import check_workdir
from sharding.mesh import MeshSpec


def train(config: Config, spec: MeshSpec, workdir: Path) -> Path:
    """Train until `config.train.steps`, from the newest checkpoint in `workdir` if it has one.

    Raises:
        SystemExit: a signal stopped the run, and it has saved; the code is 128 + the signal.
        FloatingPointError: too many steps in a row were skipped, and no checkpoint is from before.
    """
    check_mesh(config, spec)
    check_workdir(config, workdir)
    return Run(config, spec, workdir).run()


class Pending(NamedTuple):
    """A dispatched step whose metrics have not been read yet."""

    step: int
    metrics: Metrics  # on the device
    batch: RowBatch  # its rows on this process
    first_row: int  # its first sequence in the order of the data


class Run:
    """One process's part of a run. `step` is the last one that was dispatched."""

    def __init__(self, config: Config, spec: MeshSpec, workdir: Path):
        self.config, self.workdir = config, workdir
        self.reporter = Reporter(workdir)
        self.ledger = Ledger(self.reporter.folder, process_start_time())
        self.setup = set_up(config, spec, workdir)
        self.mesh, self.sizes = self.setup.mesh, self.setup.sizes
        self.loader = make_loader(self.setup)
        self.evaluation = Evaluation(config, self.mesh, self.setup.corpus)
        self.checkpoints = RunCheckpoints(self.setup, workdir, self.reporter)
        self.skip_policy = SkipPolicy(config.guard)
        self.spikes = SpikeDetector(config.guard.spike)
        self.ema: HostEma | None = None
        self.step_programs: dict[int, jax.stages.Compiled] = {}  # by batch size
        self.replica_audit: ReplicaAudit | None = None  # compiled at the first audit
        self.stop = StopSignal()
        self._restore_or_initialize()
        self.reporter.start_steps(self.setup, self.step)
        load_path = self.reporter.folder / "expert_load.npz"
        self.loads = LoadHistory(load_path, self.step, config.train.steps)

    def _restore_or_initialize(self):
        with self.ledger.timed("restore"):
            restored = self.checkpoints.restore()
            if restored is not None:
                self._continue_from(restored)
                self.loader.start(self.step, restored.extra["row"])
                return
        self.step, self.state = 0, initial_state(self.setup)
        self.rebalancer = ExpertRebalancer(self.config, self.mesh)
        if self.config.ema.decay is not None:
            self.ema = HostEma(self.state.params, self.config.ema)

    def _continue_from(self, restored: Restored):
        """Take over a checkpoint's state, without its position in the data."""
        self.step, self.state = restored.step, restored.state
        if self.ema is not None:
            self.ema.close()
        if restored.ema_params is not None:
            self.ema = HostEma(restored.ema_params, self.config.ema)
        self.rebalancer = ExpertRebalancer(self.config, self.mesh, restored.extra["redundancy"])
        self.skip_policy.restore(restored.extra["guard"])

    def run(self) -> Path:
        """Train to the last step or a signal, save, and draw; return the workdir."""
        n_parameters = sum(x.size for x in jax.tree.leaves(self.state.params))
        print_line = self.reporter.console.print
        print_line(messages.start(self.setup, n_parameters, self.step, self.workdir), markup=False)
        with contextlib.closing(self.checkpoints):  # whatever happens, a save is finished
            with self.stop, self.reporter.progress, jax.transfer_guard("disallow"):
                self._train()
            self.reporter.metrics.close()
            with self.ledger.timed("save"):
                self.checkpoints.save_last(self.step, self.state, self.ema, self._extra())
                self.loads.save()
        with self.ledger.timed("end"):
            rows = read_rows(self.reporter.folder / "metrics.jsonl")
            plots.plot_run(self.setup, rows, self.loads, self.reporter.folder / "plots")
            if self.stop.number is None:
                self._print_end(rows)
        self.ledger.write()
        print_line(f"time: {goodput(self.reporter.folder)}")
        if self.stop.number is not None:
            print_line(f"stopped and saved at step {self.step}; the same command resumes there")
            raise SystemExit(128 + self.stop.number)
        return self.workdir

    def _train(self):
        """Take all steps, some of them again after a roll-back."""
        while True:
            try:
                with self.ledger.timed("step"):
                    return self._train_steps()
            except TooManySkipped:
                with self.ledger.timed("restore"):
                    self._roll_back()

    def _train_steps(self):
        """Take steps until the last one or a signal."""
        config, first, pending = self.config, self.step, None
        audit_every = config.guard.audit_every
        self.clock = time.perf_counter()
        while self.step < config.train.steps and not self.stop.received(self.step):
            step, first_row = self.step + 1, self.loader.row
            with self.ledger.timed("data"):
                loaded = next(self.loader)
            evaluates = step % config.train.eval_every == 0 or step == config.train.steps
            audits = audit_every is not None and step % audit_every == 0
            saves = step % config.checkpoint.every == 0
            waits = evaluates or audits or saves or self.rebalancer.is_due(step)
            compiles = self.sizes.size(self.step) not in self.step_programs
            if pending is not None and (waits or compiles):
                self._report(pending)  # before the next step begins, to time each by itself
                pending = None

            metrics = self._dispatch(Batch(*device_batch(loaded.rows, config, self.mesh)))
            self.step = step
            self.ledger.record_steps(first, step)
            if pending is not None:
                self._report(pending)
            pending = Pending(step, metrics, loaded, first_row)

            if waits:
                self._report(pending)
                pending = None
                if evaluates:
                    self._evaluate()
                if audits:
                    self._audit()
                if saves:
                    self._save()
                self.clock = time.perf_counter()
        if pending is not None:
            self._report(pending)

    def _dispatch(self, batch: Batch) -> Metrics:
        """Start a step on the devices; the first step of a batch size compiles its program."""
        size = self.sizes.size(self.step)
        arguments = (self.state, batch, self.rebalancer.slots)
        if size not in self.step_programs:
            with self.ledger.timed("compile"):
                self.step_programs[size] = compile_step(self.setup, size, *arguments)
            self.clock = time.perf_counter()
        self.state, metrics = self.step_programs[size](*arguments)
        if self.ema is not None:
            self.ema.update(self.step + 1, self.state.params)
        return metrics

    def _report(self, pending: Pending):
        """Wait for a step, log its metrics, and check its health."""
        step, metrics = pending.step, jax.device_get(pending.metrics)
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        if metrics.router is not None and not metrics.skipped:
            self.loads.add(step, metrics.router.load)
            self.rebalancer.observe(step, metrics.router.load)
        seq_len = self.config.train.seq_len
        row = messages.metrics_row(step, self.sizes.sequences(step) * seq_len, metrics)
        self.reporter.report_step(row, self.sizes.size(step - 1) * seq_len, seconds)
        self._check_health(pending, metrics)

    def _check_health(self, pending: Pending, metrics: Metrics):
        """Report a skipped step or a loss spike; raise TooManySkipped for too many in a row."""
        step, loss = pending.step, float(metrics.losses.terms["loss"])
        size = self.sizes.size(step - 1)
        if metrics.skipped:
            why = messages.why_skipped(metrics, self.config.model)
            batch = messages.batch_identity(pending.batch, pending.first_row, size)
            self.reporter.note("skipped", f"step {step:,} skipped: {why}; {batch}", step)
            if self.skip_policy.skip(SkippedStep(step, why, batch)):
                raise TooManySkipped
            return
        self.skip_policy.accept()
        if above := self.spikes.deviations_above(loss):
            batch = messages.batch_identity(pending.batch, pending.first_row, size)
            text = f"step {step:,}: loss {loss:.4f} stands {above:.1f} deviations out; {batch}"
            self.reporter.note("spike", text, step)

    def _roll_back(self):
        """Restore an earlier checkpoint, and continue with the data after the skipped steps."""
        skipped, saved = self.skip_policy.consecutive_skips, self.checkpoints.steps()
        step = self.skip_policy.roll_back_step(saved)
        if step is None:
            raise FloatingPointError(messages.no_roll_back(skipped, saved))
        row, policy = self.loader.row, self.skip_policy.to_dict()
        self.checkpoints.delete_after(step)
        self._continue_from(self.checkpoints.restore())
        self.skip_policy.restore(policy)
        self.loader.start(self.step, row)
        self.reporter.metrics.rewind(self.step)
        self.loads.rewind(self.step)
        self.reporter.note("rolled back", messages.roll_back(skipped, self.step), self.step)

    def _evaluate(self):
        with self.ledger.timed("evaluate"):
            ema_params = None if self.ema is None else self.ema.params()
            row = self.evaluation.measure(self.state.params, self.state.bias, ema_params)
        self.reporter.metrics.log({"step": self.step} | row)
        entropy = self.setup.corpus.unigram_entropy
        self.reporter.progress.print(messages.evaluation(self.step, row, entropy))

    def _audit(self):
        with self.ledger.timed("audit"):
            state, params = self.state, self.state.params
            if self.replica_audit is None:
                self.replica_audit = ReplicaAudit(state, params, self.mesh, self.setup.layout)
            found = self.replica_audit.mismatches(state, params)
            found += slow_devices(time_devices(self.mesh))
        for text in found:
            self.reporter.note("audit", f"step {self.step:,}: {text}", self.step)

    def _save(self):
        with self.ledger.timed("save"):
            self.checkpoints.save(self.step, self.state, self.ema, self._extra())
            self.loads.save()

    def _extra(self) -> dict:
        """Return what a checkpoint holds besides arrays; the names are those on disk."""
        return {
            "row": self.loader.row,
            "redundancy": self.rebalancer.to_dict(),
            "guard": self.skip_policy.to_dict(),
        }

    def _print_end(self, rows: list[dict]):
        """Print a continuation of held-out text, the last loss, and where everything is."""
        prompt, text = sample_text(self.setup, self.state)
        sample = rich.text.Text.assemble("\nsample: ", prompt, (text, "bold"), "\n")
        self.reporter.console.print(sample)
        end = messages.end(rows, self.setup.corpus.unigram_entropy)
        self.reporter.console.print(f"{end}; plots in {self.workdir / 'plots'}", markup=False)
