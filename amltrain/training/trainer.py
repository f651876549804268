"""The training loop.

    batch -> method (model and loss: one forward) -> backward -> clip -> optimizer        every micro-batch / every step
    log, evaluate, save, and stop if asked                                               at their intervals

Everything beside this is a callback. One tensor leaves the device per optimizer step: loss, gradient norm, requests to
stop and failed saves go together, averaged over the processes, so that all of them take the same decision.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.tensor import DTensor

from amltrain import run_folder
from amltrain.config.schema import RunConfig
from amltrain.data.dataset import ReferDataset
from amltrain.data.loaders import build_train_loader
from amltrain.data.transforms import prepare_batch
from amltrain.distributed import BatchPlan, on_main_process
from amltrain.errors import UserError
from amltrain.evaluation.results import Results, write_results
from amltrain.models.base import RISModel
from amltrain.randomness import random_key
from amltrain.records import Batch
from amltrain.run_folder import BEST, FINISHED_FILE, RESULTS_FILE
from amltrain.training.build import MethodBuilder
from amltrain.training.callbacks import build_callbacks
from amltrain.training.optim import epoch_factor, set_lr, uncompiled
from amltrain.training.run import Callback, Run, Step, open_run
from amltrain.training.stopping import NormStatistics, Preemption, describe_samples, drop_frames, explained
from amltrain.training.tracking import Meter
from amltrain.training.validation import best_value, dry_run, evaluate_splits, with_samples, zero_score_hint


def step_batches(
    accelerator: Accelerator,
    dataset: ReferDataset,
    config: RunConfig,
    plan: BatchPlan,
    *,
    first_step: int,
    total_steps: int,
    meter: Meter,
    preemption: Preemption,
    stop: Callable[[], None],
) -> Iterator[list[Batch]]:
    """Yield this process's micro-batches of every optimizer step from `first_step` on.

    stop: called, and must raise, when a request to stop comes while one process waits for data; several processes
    answer it in the step, together. A loader that gives nothing for `train.loader_timeout` minutes raises RuntimeError.
    """
    loader = build_train_loader(
        dataset,
        config.data,
        seed=config.seed,
        global_batch_size=plan.samples,
        micro_batch_size=plan.micro,
        total_steps=total_steps,
        first_step=first_step,
    )
    if loader.num_workers > 0:
        loader.timeout = 60 * config.train.loader_timeout
    batches = iter(accelerator.prepare_data_loader(loader))
    while True:
        step: list[Batch] = []
        while len(step) < plan.accumulation:
            alone = accelerator.num_processes == 1
            with meter.waiting(), preemption.leaving_at_once(stop) if alone else nullcontext():
                try:
                    step.append(prepare_batch(next(batches), dataset.transform.normalization))
                except StopIteration:
                    return
        yield step


STOP_CHECK = 8
"""Micro-batches between agreements to stop inside a step that several processes share."""


class StopRequestedError(Exception):
    """A request to stop that came inside a step; the step is dropped and done again by the next start."""


def train(
    config: RunConfig,
    *,
    callbacks: Sequence[Callback] = (),
    model: RISModel | None = None,
    method: MethodBuilder | None = None,
) -> list[Results]:
    """Run a whole training: prepare, train or resume, evaluate, save. Returns the last evaluation's results.

    callbacks: added to those of every run and of the config. model: trained instead of building `model.name`, whose
    registered model it must equal in architecture; method: builds the method instead of `config.method`. Raises
    UserError for anything that the user can fix, SystemExit(75) after following a request to stop.
    """
    with dry_run(config) if config.train.dry_run else nullcontext(config) as chosen:
        preemption = Preemption(chosen.train.time_limit)
        every = [*build_callbacks(chosen), *callbacks]
        with (
            preemption.listening(),
            explained(chosen),
            open_run(chosen, preemption, callbacks=every, model=model, method=method) as run,
        ):
            try:
                return Trainer(run).run_to_end()
            except BaseException as error:
                drop_frames(error)
                raise


class Trainer:
    """The loop over a run that is ready."""

    def __init__(self, run: Run) -> None:
        self.run, self.config, self.accelerator, self.progress = run, run.config, run.accelerator, run.progress
        self.optimizer, self.steps_per_epoch = run.optimizer, run.steps_per_epoch
        self.norm_statistics = NormStatistics(run.bare_method)
        self._hinted = False

    def run_to_end(self) -> list[Results]:
        """Train to the end. Returns the last evaluation's results."""
        run, saver = self.run, self.run.saver
        fault = None
        try:
            self._tell("on_start")
            if run.evaluation_is_due():  # the run was stopped before it could
                self._evaluate_and_add_scores()
            if self.config.checkpoint.initial and self.progress.step == 0:
                self._save()
            batches = self._steps()
            while not self._is_done():
                step = self._try_step(batches)
                run.meter.step()
                self._after_step(step)
            self._wait_for_save()
            if not run.results:  # there was nothing left to train
                self._evaluate()
                saved = run.output / run_folder.checkpoint_name(self.progress.step)
                if run.results:
                    on_main_process(self.accelerator, partial(self._name_weights, saved))
            self._finish()
            return run.results
        except BaseException:
            fault = saver.join()
            raise
        finally:
            self._tell("on_stop")
            if fault:
                run.log(f"WARNING: {fault}")

    def _tell(self, event: str, *arguments: Any, **keywords: Any) -> None:
        for callback in self.run.callbacks:
            getattr(callback, event)(self.run, *arguments, **keywords)

    def _try_step(self, batches: Iterator[list[Batch]]) -> Step:
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

    def _optimizer_step(self, batches: list[Batch]) -> Step:
        """Take one optimizer step over the micro-batches of one global batch."""
        accelerator, run = self.accelerator, self.run
        for line in run.bare_method.before_step(self.progress.step, batches, accelerator.reduce):
            run.log(line)
        self.norm_statistics.keep()
        factor = self._set_lr()
        results: list[dict[str, Tensor]] = []
        for number, batch in enumerate(batches):
            self._stop_inside_step(number)
            with accelerator.accumulate(run.method):
                # dropout is a function of (seed, micro-batch), the same after resuming and at any number of processes
                torch.manual_seed(random_key(self.config.seed, self.progress.step, self._position(number)))
                with accelerator.autocast():
                    result = run.method(batch)
                accelerator.backward(result["loss"])
                results.append({name: value.detach() for name, value in result.items()})
                if accelerator.sync_gradients:
                    step = self._reduce(results, self._clip())
                    if step.finite or accelerator.scaler is not None:  # fp16's scaler skips overflows by itself
                        self.optimizer.step()
                    self.optimizer.zero_grad()
        if not step.finite:
            self.norm_statistics.take_back()
        step.lr, step.lr_factor, step.results = self.optimizer.param_groups[0]["lr"], factor, results
        self._count_bad(step, batches)
        self.progress.step += 1
        return step

    def _set_lr(self) -> float:
        """Set every group's rate for this step; returns the schedule's factor."""
        o, step = self.config.optim, self.progress.step
        factor = epoch_factor(
            step,
            self.run.total_steps,
            self.steps_per_epoch,
            o.schedule,
            per_epoch=o.per_epoch,
            epoch_lag=o.epoch_lag,
            first_epochs=o.first_epochs,
            power=o.power,
            warmup_steps=o.warmup_steps,
            milestones=o.milestones,
            gamma=o.gamma,
        )
        base = o.lr if o.first_epoch_full_lr and step < self.steps_per_epoch else None
        set_lr(self.optimizer, factor, base, o.min_lr)
        return factor

    def _stop_inside_step(self, number: int) -> None:
        """Raise StopRequestedError between micro-batches when the run is asked to stop.

        One process can decide alone; several agree every `STOP_CHECK` micro-batches. FSDP and DeepSpeed finish the
        step: what they have accumulated cannot be dropped.
        """
        if number == 0 or self.run.saver.writes_shards:
            return
        reason = self.run.preemption.reason
        if self.accelerator.num_processes == 1:
            stop = reason is not None
        elif number % STOP_CHECK == 0:
            asked = torch.tensor(float(reason is not None), device=self.accelerator.device)
            stop = bool(self.accelerator.reduce(asked, reduction="sum") > 0)
        else:
            return
        if stop:
            raise StopRequestedError

    def _clip(self) -> Tensor:
        """Clip the whole gradient; returns its norm before, [] float32, the same on every process."""
        limit = self.config.optim.clip_norm
        norm = self.accelerator.clip_grad_norm_(self.run.method.parameters(), math.inf if limit is None else limit)
        if norm is None:  # DeepSpeed clips inside its step and may not return it
            return torch.zeros((), device=self.accelerator.device)
        if isinstance(norm, DTensor):  # FSDP2: every process holds a partial sum
            norm = norm.full_tensor()
        return torch.as_tensor(norm, device=self.accelerator.device, dtype=torch.float32)

    def _reduce(self, results: list[dict[str, Tensor]], norm: Tensor) -> Step:
        """Average the step's scalars over micro-batches and processes: the one wait for the device."""
        scalars = {name for result in results for name, value in result.items() if value.ndim == 0}
        names = ["loss", *(name for name in results[0] if name in scalars and name != "loss")]
        loss, *means = [torch.stack([result[name] for result in results]).float().mean() for name in names]
        stop = torch.full_like(norm, float(self.run.preemption.requested()))
        failed = torch.full_like(norm, float(self.run.saver.failed))
        values = torch.stack([loss, norm, stop, failed, *means])
        mean_loss, grad_norm, stops, failures, *rest = self.accelerator.reduce(values, reduction="mean").tolist()
        return Step(mean_loss, grad_norm, stops > 0, failures > 0, dict(zip(names[1:], rest, strict=True)))

    def _count_bad(self, step: Step, batches: list[Batch]) -> None:
        """Count a step that was not finite, log its samples, and give up after too many in a row."""
        scaler, run, progress = self.accelerator.scaler, self.run, self.progress
        # fp16's scaler overflows now and then by design, until it has nothing left to scale down
        overflow = scaler is not None and math.isfinite(step.loss) and not step.finite and scaler.get_scale() >= 1
        progress.count(bad=not step.finite and not overflow)
        if not progress.bad_in_a_row:
            return
        number = progress.step + 1
        ids = [int(i) for batch in batches for i in self.accelerator.gather(batch.sample_id).tolist()]
        run.log(f"step {number}: loss {step.loss}, gradient norm {step.grad_norm}; the step is skipped, samples {ids}")
        run.history.add(number, {"skipped_samples": describe_samples(run.components.dataset, ids)})
        if progress.bad_in_a_row >= self.config.train.max_bad_steps:
            run.saver.wait()
            raise UserError(
                f"{progress.bad_in_a_row} steps in a row were not finite; lower optim.lr, or use bf16 instead of "
                f"fp16 (last good checkpoint: {run_folder.newest(run.output)})"
            )

    def _after_step(self, step: Step) -> None:
        """Log, save, stop if asked, evaluate."""
        run = self.run
        if step.save_failed:
            run.saver.wait()  # raises
        self._tell_of_saves()
        self._tell("on_step", step)
        if step.stop or run.falls_on(self.config.checkpoint.every_steps or run.evaluation_interval):
            self._save()
        if step.stop:
            self._leave()
        if run.evaluation_is_due():
            self._evaluate_and_add_scores()

    def _is_done(self) -> bool:
        patience = self.config.evaluation.patience
        if patience is not None and self.progress.worse_in_a_row >= patience:
            self.run.log(f"no better {self.config.evaluation.best_metric} in {patience} evaluations: stopping early")
            return True
        return self.progress.step >= self.run.last_step

    def _evaluate_and_add_scores(self) -> None:
        """Save first, so that neither a kill nor a request to stop during the evaluation costs a step."""
        if self.progress.saved < self.progress.step:
            self._save()
        with self.run.preemption.leaving_at_once(self._leave, time_limit=True):
            self._evaluate()
        with self.run.meter.paused():
            self._wait_for_save()
            on_main_process(self.accelerator, self._add_scores)

    def _evaluate(self) -> None:
        """Evaluate every split, and note the best metric."""
        run, config, step = self.run, self.config, self.progress.step
        if not run.components.eval_loaders:
            return
        with run.meter.paused(), uncompiled() if config.train.compile else nullcontext():
            scored = evaluate_splits(self.accelerator, run.inference_model(), run.components, config, step)
            run.results = list(scored.values())
            self._tell("on_evaluation", scored)
        if self.progress.evaluated == step:
            return
        value = best_value(run.results, list(scored), config.evaluation)
        if not self._hinted and (hint := zero_score_hint(value, config, run.last_step)):
            run.log(hint)
            self._hinted = True
        self.progress.log_lines = run.history.lines
        self.progress.judge(value)

    def _add_scores(self) -> None:
        """Add the evaluation to its checkpoint, and point `best` at it if it is one; main process only."""
        output, best = self.run.output, self.progress.best_step == self.progress.step
        path = output / run_folder.checkpoint_name(self.progress.step)
        named = self._name_weights(path)
        run_folder.add_scores(path, self.progress.state_dict(), partial(write_results, results=named))
        if best:
            run_folder.point(output, BEST, path)
            run_folder.prune(output, self.config.checkpoint.keep)
        self._tell("on_scores", path, best=best)

    def _name_weights(self, checkpoint: Path) -> list[Results]:
        """Write the run's results again with the hash of the weights, known once the checkpoint is complete."""
        weights = run_folder.saved_weights(checkpoint)
        named = [replace(r, provenance={**r.provenance, "weights_sha256": weights}) for r in self.run.results]
        self.run.results = named
        write_results(self.run.output / RESULTS_FILE, [with_samples(result) for result in named])
        return named

    def _save(self) -> None:
        progress, run = self.progress, self.run
        progress.saved, progress.log_lines = progress.step, run.history.lines
        self._tell("before_save")
        states = {type(callback).__name__: callback.state_dict() for callback in run.callbacks}
        progress.callbacks = {name: state for name, state in states.items() if state is not None}
        with run.meter.paused():
            run.saver.save(progress.step, progress.state_dict())
        self._tell_of_saves()

    def _wait_for_save(self) -> None:
        self.run.saver.wait()
        self._tell_of_saves()

    def _tell_of_saves(self) -> None:
        """Call `on_save` for checkpoints that the background has finished; main process only."""
        for checkpoint in self.run.saver.take_finished():
            self._tell("on_save", checkpoint)

    def _steps(self) -> Iterator[list[Batch]]:
        run = self.run
        return step_batches(
            self.accelerator,
            run.components.dataset,
            self.config,
            run.plan,
            first_step=self.progress.step,
            total_steps=run.last_step,
            meter=run.meter,
            preemption=run.preemption,
            stop=_stop_waiting,
        )

    def _position(self, number: int) -> int:
        """Return the position of this process's `number`-th micro-batch in the global batch."""
        return number * self.run.plan.processes + self.accelerator.process_index

    def _leave(self) -> None:
        """Exit once the running save is complete; called from a signal handler during an evaluation."""
        run = self.run
        if fault := run.saver.join():
            raise UserError(fault)
        run.log(
            f"asked to stop ({run.preemption.reason or 'by another process'}): saved at step {self.progress.saved}; "
            f"rerun the same command to resume"
        )
        run.preemption.leave(run.output, started=True)

    def _finish(self) -> None:
        run, p, folders, best = self.run, self.progress, f"; {self.run.output}/last/model", ""
        if run.results:
            folders = f"; {run.output}/best/model and {run.output}/last/model"
            best = f"; best {self.config.evaluation.best_metric} {p.best:.2f} at step {p.best_step}"
        if self.config.train.dry_run:
            folders = ""  # removed in a moment
        run.log(f"done: {p.step} steps, {p.skipped} skipped{best}{folders}")
        on_main_process(self.accelerator, (run.output / FINISHED_FILE).touch)
        self._tell("on_finish")


def _stop_waiting() -> None:
    raise StopRequestedError
