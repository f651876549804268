"""The training loop.

    batch -> method (model and loss: one forward) -> backward -> clip -> optimizer        every micro-batch / every step
    log, evaluate, save, and stop if asked                                               at their intervals

One tensor leaves the device per optimizer step: loss, gradient norm, requests to stop and failed saves travel together,
averaged over the processes, so that all of them take the same decision.
"""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from amltrain.checkpoints import run_folder as checkpoints
from amltrain.checkpoints.resume import resume_progress, write_config
from amltrain.checkpoints.run_folder import FINISHED_FILE
from amltrain.checkpoints.saver import Saver
from amltrain.checkpoints.state import Progress
from amltrain.config.schema import RunConfig
from amltrain.distributed import on_main_process, set_tf32
from amltrain.errors import UserError
from amltrain.evaluation.results import Results, write_results
from amltrain.methods.base import Method
from amltrain.randomness import random_key
from amltrain.records import Batch
from amltrain.training.batches import step_batches
from amltrain.training.build import write_model_folder
from amltrain.training.callbacks import History, Meter, banner, log_line, profiled, track_evaluation
from amltrain.training.engine import Engine, build_engine
from amltrain.training.failures import NormStatistics, check_weights, describe_samples, drop_frames, explained
from amltrain.training.optim import lr_factor, set_lr, uncompiled
from amltrain.training.preemption import Preemption
from amltrain.training.start import Start, open_run
from amltrain.training.validation import best_value, dry_run, evaluate_splits, zero_score_hint

STOP_CHECK = 8
"""Micro-batches between agreements to stop inside a step that several processes share."""


class StopRequestedError(Exception):
    """A request to stop that came inside a step; the step is dropped and done again by the next start."""


@dataclass
class StepStats:
    """Averages over the micro-batches and processes of one optimizer step."""

    loss: float
    grad_norm: float
    stop: bool
    save_failed: bool
    extras: dict[str, float]

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def train(config: RunConfig) -> list[Results]:
    """Run a whole training: prepare, train or resume, evaluate, save. Returns the last evaluation's results.

    Raises UserError for anything that the user can fix, SystemExit(75) after following a request to stop.
    """
    if config.train.dry_run:
        with dry_run(config) as short:
            return _train(short)
    return _train(config)


def _train(config: RunConfig) -> list[Results]:
    preemption = Preemption(config.train.time_limit)
    with preemption.listening(), open_run(config, preemption) as start:
        try:
            with explained(config, start.plan.micro):
                with preemption.leaving_at_once(lambda: preemption.leave(config.folder)):
                    trainer = Trainer(config, start, preemption)
                with trainer.closing():
                    return trainer.run()
        except BaseException as error:
            drop_frames(error)
            raise


class Trainer:
    """A run, ready when constructed; `run()` trains."""

    def __init__(self, config: RunConfig, start: Start, preemption: Preemption) -> None:
        self.config, self.output, self.preemption = config, config.folder, preemption
        self.accelerator, self.plan, self.publisher = start.accelerator, start.plan, start.publisher
        set_tf32(config.train.tf32)
        engine: Engine = build_engine(config, start, self.log)
        self.components, self.method, self.optimizer = engine.components, engine.method, engine.optimizer
        self.ema, self.whole_model, self.recorder = engine.ema, engine.whole_model, engine.recorder
        self.total_steps, self.last_step, self.steps_per_epoch = (
            engine.total_steps,
            engine.last_step,
            engine.steps_per_epoch,
        )
        self.norm_statistics = NormStatistics(self.accelerator.unwrap_model(self.method))
        self.saver = Saver(
            self.accelerator,
            self.output,
            self.method,
            self.optimizer,
            self.ema,
            keep=config.checkpoint.keep,
            write_model=self._write_model,
        )
        samples = len(self.components.dataset)
        self.progress = Progress(spread=list(self.plan), seed=config.seed, samples=samples)
        if start.resume_from is not None:
            self.progress = resume_progress(self.saver, start.resume_from, self.progress, self.output, self.log)
            if self.recorder is not None:
                self.recorder.restore(self.progress.window, self.accelerator.device)
        self.results: list[Results] = []
        self.meter = Meter(self.plan.samples, self.accelerator.device)
        on_main_process(self.accelerator, lambda: write_config(config))
        main = self.accelerator.is_main_process
        self.history = History(self.output / "log.jsonl", self.progress.log_lines, enabled=main)
        self.log(banner(config, self.components, self.accelerator, self.plan, self.total_steps, self.last_step))

    def run(self) -> list[Results]:
        """Train to the end. Returns the last evaluation's results."""
        if self._evaluation_is_due():  # the run was stopped before it could
            self._evaluate_and_add_scores()
        if self.config.checkpoint.initial and self.progress.step == 0:
            self._save()
        bar = tqdm(
            total=self.last_step,
            initial=self.progress.step,
            desc="train",
            unit="step",
            smoothing=0.05,
            disable=None if self.accelerator.is_main_process else True,  # None: no bar unless on a terminal
        )
        with bar, profiled(self.config.train.profile, self.output, self.accelerator) as profiler:
            batches = self._steps()
            while not self._is_done():
                stats = self._try_step(batches)
                self.meter.step()
                bar.update()
                profiler.step()
                self._after_step(stats, bar)
        self.saver.wait()
        if not self.results:  # there was nothing left to train
            self._evaluate()
        self._finish()
        return self.results

    def closing(self) -> "_Closing":
        """Wait for a running save when the block ends, however it ends."""
        return _Closing(self)

    def _try_step(self, batches: Iterator[list[Batch]]) -> StepStats:
        """Take one optimizer step; on a request to stop during it, drop the step, save and exit."""
        try:
            return self._optimizer_step(next(batches))
        except StopRequestedError:
            self.optimizer.zero_grad()
            self.norm_statistics.take_back()
            if self.progress.saved < self.progress.step:
                self._save()
            self._leave()
            raise  # not reached

    def _optimizer_step(self, batches: list[Batch]) -> StepStats:
        """Take one optimizer step over the micro-batches of one global batch."""
        accelerator, optimizer = self.accelerator, self.optimizer
        method: Method = accelerator.unwrap_model(self.method)
        for line in method.before_step(self.progress.step, batches, accelerator.reduce):
            self.log(line)
        self.norm_statistics.keep()
        full_lr = self.config.optim.first_epoch_full_lr and self.progress.step < self.steps_per_epoch
        set_lr(optimizer, self._lr_factor(), self.config.optim.lr if full_lr else None)
        losses: list[Tensor] = []
        extras: dict[str, list[Tensor]] = {}
        recorded: list[dict[str, Tensor]] = []  # counted once the step is whole: a request to stop may drop it
        for number, batch in enumerate(batches):
            self._stop_inside_step(number)
            with accelerator.accumulate(self.method):
                # dropout is a function of (seed, micro-batch), the same after resuming and at any number of processes
                torch.manual_seed(random_key(self.config.seed, self.progress.step, self._position(number)))
                with accelerator.autocast():
                    result = self.method(batch)
                accelerator.backward(result["loss"])
                losses.append(result["loss"].detach())
                for name, value in result.items():
                    if name != "loss" and value.ndim == 0:
                        extras.setdefault(name, []).append(value.detach())
                recorded.append({name: value for name, value in result.items() if name != "loss"})
                if accelerator.sync_gradients:
                    norm = self._clip()
                    stats = self._reduce(losses, norm, extras)
                    if stats.finite or accelerator.scaler is not None:  # fp16's scaler skips overflows by itself
                        optimizer.step()
                    optimizer.zero_grad()
        if not stats.finite:
            self.norm_statistics.take_back()
        elif self.ema is not None:
            self.ema.update_parameters(method.model)
        if self.recorder is not None:
            for values in recorded:
                self.recorder.update(values)
        self._count_bad(stats, batches)
        self.progress.step += 1
        return stats

    def _stop_inside_step(self, number: int) -> None:
        """Raise StopRequestedError between micro-batches when the run is asked to stop.

        One process can decide alone; several agree every `STOP_CHECK` micro-batches. FSDP and DeepSpeed finish the
        step: what they have accumulated cannot be dropped.
        """
        if number == 0 or self.saver.writes_shards:
            return
        if self.accelerator.num_processes == 1:
            stop = self.preemption.reason is not None
        elif number % STOP_CHECK == 0:
            asked = torch.tensor(float(self.preemption.reason is not None), device=self.accelerator.device)
            stop = bool(self.accelerator.reduce(asked, reduction="sum") > 0)
        else:
            return
        if stop:
            raise StopRequestedError

    def _clip(self) -> Tensor:
        """Clip the whole gradient; returns its norm before, the same on every process."""
        limit = self.config.optim.clip_norm
        norm = self.accelerator.clip_grad_norm_(self.method.parameters(), math.inf if limit is None else limit)
        if norm is None:  # DeepSpeed clips inside its step and may not return it
            return torch.zeros((), device=self.accelerator.device)
        return torch.as_tensor(norm, device=self.accelerator.device, dtype=torch.float32)

    def _reduce(self, losses: list[Tensor], norm: Tensor, extras: dict[str, list[Tensor]]) -> StepStats:
        stop = torch.full_like(norm, float(self.preemption.requested()))
        failed = torch.full_like(norm, float(self.saver.failed))
        means = [torch.stack(values).float().mean() for values in extras.values()]
        values = torch.stack([torch.stack(losses).float().mean(), norm, stop, failed, *means])
        loss, grad_norm, stops, failures, *rest = self.accelerator.reduce(values, reduction="mean").tolist()
        return StepStats(loss, grad_norm, stops > 0, failures > 0, dict(zip(extras, rest, strict=True)))

    def _count_bad(self, stats: StepStats, batches: list[Batch]) -> None:
        """Count a step that was not finite, log its samples, and give up after too many in a row."""
        scaler = self.accelerator.scaler
        # fp16's scaler overflows now and then by design, until it has nothing left to scale down
        overflow = scaler is not None and math.isfinite(stats.loss) and not stats.finite and scaler.get_scale() >= 1
        self.progress.count(bad=not stats.finite and not overflow)
        if not self.progress.bad_in_a_row:
            return
        step = self.progress.step + 1
        ids = [int(i) for batch in batches for i in self.accelerator.gather(batch.sample_id).tolist()]
        self.log(f"step {step}: loss {stats.loss}, gradient norm {stats.grad_norm}; the step is skipped, samples {ids}")
        self.history.add(step, {"skipped_samples": describe_samples(self.components.dataset, ids)})
        if self.progress.bad_in_a_row >= self.config.train.max_bad_steps:
            self.saver.wait()
            raise UserError(
                f"{self.progress.bad_in_a_row} steps in a row were not finite; lower optim.lr, or use bf16 instead of "
                f"fp16 (last good checkpoint: {self._last_good()})"
            )

    def _last_good(self) -> str:
        """The newest checkpoint: weights that are not finite are never saved."""
        return next((str(path) for path in reversed(checkpoints.checkpoints(self.output))), "none yet")

    def _after_step(self, stats: StepStats, bar: tqdm) -> None:
        """Log, save, stop if asked, evaluate."""
        step, config = self.progress.step, self.config
        if stats.save_failed:
            self.saver.wait()  # raises
        lr = self.optimizer.param_groups[0]["lr"]
        bar.set_postfix(loss=f"{stats.loss:.4f}", lr=f"{lr:.1e}", refresh=False)
        self.progress.add_loss(stats.loss)
        if step % config.train.log_every == 0 or step == self.last_step:
            rate = {"lr_factor": self._lr_factor(step - 1), "lr": lr, "epoch": step / self.steps_per_epoch}
            values = {"loss": stats.loss, "grad_norm": stats.grad_norm, **rate, **stats.extras, **self.meter.read()}
            self._track(values)
            if bar.disable:
                self.log(log_line(step, self.last_step, self.plan.samples, values))
        if step % self.steps_per_epoch == 0:
            self._track({"epoch_loss": self.progress.take_mean_loss()})
        self._record()
        if stats.stop or self._falls_on(config.checkpoint.every_steps or self._evaluation_interval()):
            self._save()
        if stats.stop:
            self._leave()
        if self._evaluation_is_due():
            self._evaluate_and_add_scores()

    def _falls_on(self, interval: int) -> bool:
        return self.progress.step % interval == 0 or self.progress.step == self.last_step

    def _evaluation_interval(self) -> int:
        return self.config.evaluation.every_steps or self.steps_per_epoch

    def _evaluation_is_due(self) -> bool:
        """Whether this step wants an evaluation that it has not had."""
        progress = self.progress
        return (
            progress.evaluated < progress.step
            and bool(self.components.eval_loaders)
            and self._falls_on(self._evaluation_interval())
        )

    def _is_done(self) -> bool:
        patience = self.config.evaluation.patience
        if patience is not None and self.progress.worse_in_a_row >= patience:
            self.log(f"no better {self.config.evaluation.best_metric} in {patience} evaluations: stopping early")
            return True
        return self.progress.step >= self.last_step

    def _record(self) -> None:
        """Log a row of the method's own statistics when one is due."""
        if self.recorder is not None:
            row = self.recorder.after_step(
                self.progress.step, self.method, self.accelerator.reduce, self.accelerator.is_main_process
            )
            if row is not None:
                self._track(row)

    def _evaluate_and_add_scores(self) -> None:
        """Save first, so that neither a kill nor a request to stop during the evaluation costs a step."""
        if self.progress.saved < self.progress.step:
            self._save()
        with self.preemption.leaving_at_once(self._leave, time_limit=True):
            self._evaluate()
        with self.meter.paused():
            self.saver.wait()
            on_main_process(self.accelerator, self._add_scores)

    def _evaluate(self) -> None:
        """Evaluate every split, and note the best metric; a finished run that is started again logs nothing twice."""
        if not self.components.eval_loaders:
            return
        step, splits = self.progress.step, list(self.components.eval_loaders)
        with self.meter.paused(), uncompiled() if self.config.train.compile else nullcontext():
            model, config = self._inference_model(), self.config
            values, self.results = evaluate_splits(self.accelerator, model, self.components, config, step)
            if self.progress.evaluated == step:
                return
            self._track(values)
            track_evaluation(self.accelerator, self.output, self.results, step)
        value = best_value(self.results, splits, self.config.evaluation)
        if hint := zero_score_hint(value, self.config, self.last_step):
            self.log(hint)
        self.progress.log_lines = self.history.lines
        self.progress.judge(value)

    def _add_scores(self) -> None:
        """Add the evaluation to its checkpoint; point `best` at it and push it if it is one."""
        step = self.progress.step
        path = self.output / checkpoints.checkpoint_name(step)
        checkpoints.add_scores(path, self.progress.state_dict(), lambda file: write_results(file, self.results))
        best = self.progress.best_step == step
        if best:
            checkpoints.point(self.output, "best", path)
            checkpoints.prune(self.output, self.config.checkpoint.keep)
        if self.publisher is not None and (best or self.config.hub.push == "last"):
            self.publisher.submit(path)

    def _save(self) -> None:
        progress, recorder = self.progress, self.recorder
        progress.saved, progress.log_lines = progress.step, self.history.lines
        progress.window = None if recorder is None else recorder.window(self.accelerator.reduce)
        pushes = self.publisher is not None and self.config.hub.push == "last" and not self._evaluation_is_due()
        submit = self.publisher.submit if pushes and self.publisher is not None else None
        with self.meter.paused():
            self.saver.save(progress.step, progress.state_dict(), submit)

    def _write_model(self, folder: Path, weights: dict[str, Tensor]) -> None:
        check_weights(weights, int(self.progress.saved), self._last_good())
        write_model_folder(folder, self.config, self.components, weights)

    def _steps(self) -> Iterator[list[Batch]]:
        return step_batches(
            self.accelerator,
            self.components.dataset,
            self.config,
            self.plan,
            first_step=self.progress.step,
            total_steps=self.last_step,
            meter=self.meter,
            preemption=self.preemption,
            stop=self._stop_waiting,
        )

    def _stop_waiting(self) -> None:
        raise StopRequestedError

    def _inference_model(self) -> torch.nn.Module:
        if self.ema is not None:
            return self.ema.module
        if self.whole_model is not None:
            self.whole_model.load_state_dict(self.saver.weights())
            return self.whole_model
        return self.accelerator.unwrap_model(self.method).model

    def _lr_factor(self, step: int | None = None) -> float:
        o = self.config.optim
        return lr_factor(
            self.progress.step if step is None else step,
            self.total_steps,
            o.schedule,
            power=o.power,
            warmup_steps=o.warmup_steps,
            milestones=o.milestones,
            gamma=o.gamma,
        )

    def _position(self, number: int) -> int:
        """Return the position of this process's `number`-th micro-batch in the global batch."""
        return number * self.plan.processes + self.accelerator.process_index

    def _track(self, values: dict[str, float]) -> None:
        self.accelerator.log(values, step=self.progress.step)
        self.history.add(self.progress.step, values)

    def _leave(self) -> None:
        """Exit once the running save is complete; called from a signal handler during an evaluation."""
        if fault := self.saver.join():
            raise UserError(fault)
        self.log(
            f"asked to stop ({self.preemption.reason or 'by another process'}): saved at step {self.progress.saved}; "
            f"rerun the same command to resume"
        )
        self.preemption.leave(self.output)

    def _finish(self) -> None:
        p, folders, best = self.progress, f"; {self.output}/last/model", ""
        if self.results:
            folders = f"; {self.output}/best/model and {self.output}/last/model"
            best = f"; best {self.config.evaluation.best_metric} {p.best:.2f} at step {p.best_step}"
        if self.config.train.dry_run:
            folders = ""  # removed in a moment
        self.log(f"done: {p.step} steps, {p.skipped} skipped{best}{folders}")
        on_main_process(self.accelerator, (self.output / FINISHED_FILE).touch)
        if self.publisher is not None:
            final = self.output / self.config.hub.push
            self.publisher.finish(final, f"push it later: amltrain push {final} {self.config.hub.repo}")

    def log(self, text: str) -> None:
        """Print a line on the main process."""
        if self.accelerator.is_main_process:
            tqdm.write(text)


class _Closing:
    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        fault = self.trainer.saver.join()
        if fault and kind is not None:
            self.trainer.log(f"WARNING: {fault}")
