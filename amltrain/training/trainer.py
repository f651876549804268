"""The training loop.

    batch -> task (model, loss, AML: one forward) -> backward -> clip -> optimizer        every micro-batch / every step
    every so often: log, evaluate, save, and stop if asked

One number leaves the device per optimizer step: loss, gradient norm and requests to stop travel together, averaged over
the processes, so that all of them take the same decision.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, broadcast_object_list, send_to_device
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm

from amltrain.config import RunConfig, save_config
from amltrain.data.collate import collate
from amltrain.data.loaders import build_sampler, build_train_loader
from amltrain.errors import UserError
from amltrain.evaluation.alignment import build_alignment_diagnostics
from amltrain.evaluation.evaluator import evaluate_model
from amltrain.evaluation.pictures import prediction_sheet, save_picture
from amltrain.evaluation.results import Results, table, write_results
from amltrain.randomness import random_key
from amltrain.records import Batch
from amltrain.training import checkpoint as checkpoints
from amltrain.training.interruption import REQUEUE_EXIT_CODE, Interruption, mark_requeue
from amltrain.training.optim import build_optimizer, lr_factor, set_lr
from amltrain.training.setup import (
    build_accelerator,
    build_parts,
    ensure_prepared,
    on_main_process,
    plan_batches,
    write_model_folder,
)
from amltrain.training.tracking import History, banner, say, start_trackers

CALIBRATION_SAMPLES = 64


@dataclass
class Progress:
    """What a resumed run must know besides weights and optimizer; saved as state/trainer.json.

    step: optimizer steps done. skipped: steps whose loss or gradient was not finite; bad_in_a_row: the newest of them.
    """

    step: int = 0
    best: float = -math.inf
    best_step: int = 0
    worse_in_a_row: int = 0
    skipped: int = 0
    bad_in_a_row: int = 0
    spread: list[int] = field(default_factory=list)


@dataclass
class StepStats:
    """Averages over the micro-batches and processes of one optimizer step."""

    loss: float
    grad_norm: float
    stop: bool
    extras: dict[str, float]

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def train(config: RunConfig) -> list[Results]:
    """Run a whole training: prepare, train or go on, evaluate, save. Returns the last evaluation's results.

    Raises UserError for anything the user can mend; SystemExit(75) after a request to stop was followed.
    """
    trainer = Trainer(config)
    try:
        return trainer.run()
    except torch.cuda.OutOfMemoryError as error:
        raise UserError(
            f"the GPU is out of memory with micro batches of {trainer.plan.micro}; set train.micro_batch_size to "
            f"{max(1, trainer.plan.micro // 2)} (the rest is accumulated, the result stays the same) or "
            f"model.gradient_checkpointing to true"
        ) from error
    finally:
        trainer.accelerator.end_training()


class Trainer:
    """A run: built from its config, then `run()`."""

    def __init__(self, config: RunConfig) -> None:
        self.config, self.output = config, Path(config.output)
        self.accelerator = build_accelerator(config)
        self.plan = plan_batches(config.train, self.accelerator.num_processes)
        on_main_process(self.accelerator, self._prepare_output)
        self.resume_from = self._find_resumable()
        on_main_process(self.accelerator, lambda: ensure_prepared(config.data, self.say))
        self.parts = build_parts(config, processes=self.plan.processes, on_cuda=self.accelerator.device.type == "cuda")
        self.total_steps = self._count_steps()
        self.steps_per_epoch = max(1, round(len(self.parts.dataset) / self.plan.samples))
        self.interruption = Interruption(config.train.time_limit)
        self.progress = Progress(spread=[self.plan.processes, self.plan.micro, self.plan.accumulation])
        self.results: list[Results] = []

    def run(self) -> list[Results]:
        self._start()
        bar = tqdm(
            total=self.total_steps,
            initial=self.progress.step,
            desc="train",
            unit="step",
            smoothing=0.05,
            disable=not self.accelerator.is_main_process,
        )
        for batches in self._steps():
            stats = self._optimizer_step(batches)
            bar.update()
            self._after_step(stats, bar)
        bar.close()
        if not self.results:  # resumed after the last step
            self._evaluate()
        self._finish()
        return self.results

    def _optimizer_step(self, batches: list[Batch]) -> StepStats:
        """One optimizer step over the micro-batches of one global batch."""
        accelerator, optimizer = self.accelerator, self.optimizer
        set_lr(optimizer, self._lr_factor())
        losses: list[Tensor] = []
        extras: dict[str, list[Tensor]] = {}
        for number, batch in enumerate(batches):
            with accelerator.accumulate(self.task):
                # dropout is a function of (seed, micro-batch), the same after resuming and at any number of processes
                torch.manual_seed(random_key(self.config.seed, self.progress.step, self._position(number)))
                with accelerator.autocast():
                    result = self.task(batch)
                accelerator.backward(result["loss"])
                losses.append(result["loss"].detach())
                for name, value in result.items():
                    if name != "loss" and value.dim() == 0:
                        extras.setdefault(name, []).append(value.detach())
                if self.diagnostics is not None:
                    self.diagnostics.update(result)
                if accelerator.sync_gradients:
                    norm = self._clip()
                    stats = self._reduce(losses, norm, extras)
                    if stats.finite or accelerator.scaler is not None:  # fp16's scaler skips overflows by itself
                        optimizer.step()
                    optimizer.zero_grad()
        if self.ema is not None and stats.finite:
            self.ema.update_parameters(accelerator.unwrap_model(self.task).model)
        self._count_bad(stats, batches)
        self.progress.step += 1
        return stats

    def _clip(self) -> Tensor:
        """Norm of the whole gradient before clipping; the same on every process."""
        limit = self.config.optim.clip_norm
        norm = self.accelerator.clip_grad_norm_(self.task.parameters(), math.inf if limit is None else limit)
        if norm is None:  # DeepSpeed clips inside its step and may not say
            return torch.zeros((), device=self.accelerator.device)
        return torch.as_tensor(norm, device=self.accelerator.device, dtype=torch.float32)

    def _reduce(self, losses: list[Tensor], norm: Tensor, extras: dict[str, list[Tensor]]) -> StepStats:
        stop = torch.tensor(float(self.interruption.requested()), device=self.accelerator.device)
        means = [torch.stack(values).float().mean() for values in extras.values()]
        values = torch.stack([torch.stack(losses).float().mean(), norm, stop, *means])
        loss, grad_norm, stop_share, *rest = self.accelerator.reduce(values, reduction="mean").tolist()
        return StepStats(loss, grad_norm, stop_share > 0, dict(zip(extras, rest, strict=True)))

    def _count_bad(self, stats: StepStats, batches: list[Batch]) -> None:
        overflow = self.accelerator.scaler is not None and math.isfinite(stats.loss)
        if stats.finite or overflow:
            self.progress.bad_in_a_row = 0
            return
        self.progress.skipped += 1
        self.progress.bad_in_a_row += 1
        ids = [int(i) for batch in batches for i in self.accelerator.gather(batch.sample_id).tolist()]
        self.say(
            f"step {self.progress.step + 1}: loss {stats.loss}, gradient norm {stats.grad_norm}; the step is skipped, "
            f"samples {ids}"
        )
        self.history.add(self.progress.step + 1, {"skipped_samples": ids})
        if self.progress.bad_in_a_row >= self.config.train.max_bad_steps:
            good = [str(path) for path in checkpoints.checkpoints(self.output)[-1:]] or ["none yet"]
            raise UserError(
                f"{self.progress.bad_in_a_row} steps in a row were not finite; lower optim.lr, or use bf16 instead of "
                f"fp16 (last good checkpoint: {good[0]})"
            )

    def _after_step(self, stats: StepStats, bar: tqdm) -> None:
        step, config = self.progress.step, self.config
        last = step == self.total_steps
        bar.set_postfix(loss=f"{stats.loss:.4f}", lr=f"{self.optimizer.param_groups[0]['lr']:.1e}", refresh=False)
        if step % config.train.log_every == 0 or last:
            self._log(
                {
                    "loss": stats.loss,
                    "grad_norm": stats.grad_norm,
                    "lr_factor": self._lr_factor(step - 1),
                    **stats.extras,
                }
            )
        if self.diagnostics is not None:
            reduce, is_main = self.accelerator.reduce, self.accelerator.is_main_process
            self._log(self.diagnostics.after_step(step, self.task, reduce, is_main) or {})
        evaluate = last or step % (config.evaluation.every_steps or self.steps_per_epoch) == 0
        improved = self._evaluate() if evaluate else False
        scheduled = step % config.checkpoint.every_steps == 0 if config.checkpoint.every_steps else evaluate
        if scheduled or improved or last or stats.stop:
            self._save(improved)
        if stats.stop and not last:
            self._leave()
        patience = config.evaluation.patience
        if evaluate and patience is not None and self.progress.worse_in_a_row >= patience and not last:
            self.say(f"no better {config.evaluation.best_metric} in {patience} evaluations: stopping early")
            self.total_steps = step

    def _evaluate(self) -> bool:
        """Evaluate every split; whether the best metric improved."""
        model = self._inference_model()
        self.results = [
            evaluate_model(
                self.accelerator,
                model,
                loader,
                self.parts.protocol,
                pictures=self.config.evaluation.pictures,
                provenance={
                    "model": self.config.model.name,
                    "step": self.progress.step,
                    "seed": self.config.seed,
                    "weights": "ema" if self.ema is not None else "raw",
                    "shuffled_sentences": self.config.evaluation.shuffle_sentences,
                    "max_samples": self.config.evaluation.max_samples,
                },
            )
            for loader in self.parts.eval_loaders.values()
        ]
        values = {
            f"{name}/{metric}": value
            for name, results in zip(self.parts.eval_loaders, self.results, strict=True)
            for metric, value in results.metrics.items()
        }
        self._log(values)
        self.say(f"step {self.progress.step}\n{table(self.results)}")
        if self.accelerator.is_main_process:
            write_results(self.output / "results.json", self.results)
            for name, results in zip(self.parts.eval_loaders, self.results, strict=True):
                if results.predictions:
                    dataset = self.parts.eval_loaders[name].dataset
                    picture = f"{checkpoints.checkpoint_name(self.progress.step)}-{name.replace(':', '-')}.png"
                    save_picture(prediction_sheet(results, dataset), self.output / "pictures" / picture)
        return self._judge(self._best_value())

    def _best_value(self) -> float:
        """The metric that chooses the best checkpoint: `metric` of the first split, or `split/metric`."""
        split, _, metric = self.config.evaluation.best_metric.rpartition("/")
        names = list(self.parts.eval_loaders)
        if split and split not in names:
            raise UserError(f"evaluation.best_metric names split {split!r}; evaluated are {', '.join(names)}")
        return self.results[names.index(split) if split else 0].score(metric)

    def _judge(self, value: float) -> bool:
        progress = self.progress
        if value > progress.best:
            progress.best, progress.best_step, progress.worse_in_a_row = value, progress.step, 0
            return True
        progress.worse_in_a_row += 1
        return False

    def _save(self, best: bool) -> None:
        state = self.accelerator.get_state_dict(self.task)
        weights = {key.removeprefix("model."): value for key, value in state.items() if key.startswith("model.")}
        if self.ema is not None:
            weights = self.ema.module.state_dict()
        path = checkpoints.save_checkpoint(
            self.accelerator,
            self.output,
            self.progress.step,
            self.progress.__dict__,
            lambda folder: write_model_folder(folder, self.config, self.parts, weights),
        )
        if self.accelerator.is_main_process:
            if best:
                checkpoints.point(self.output, "best", path)
            checkpoints.prune(self.output, self.config.checkpoint.keep)
        self.accelerator.wait_for_everyone()

    def _start(self) -> None:
        """Wrap for Accelerate, calibrate AML or resume, and say what will run."""
        accelerator, config = self.accelerator, self.config
        task = self.parts.task.to(accelerator.device)
        if self.resume_from is None and task.needs_calibration:
            calibration = task.calibrate(self._calibration_batches(), reduce=accelerator.reduce)
            self.say(f"AML temperature {calibration.temperature:.4g}: mean score {calibration.mean_score:.3f}")
        groups = task.param_groups(config.optim.lr, config.optim.weight_decay)
        o = config.optim
        optimizer = build_optimizer(groups, o.optimizer, lr=o.lr, betas=o.betas, eps=o.eps, amsgrad=o.amsgrad)
        decay = config.train.ema_decay
        self.ema = (
            None
            if decay is None
            else AveragedModel(task.model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
        )
        if self.ema is not None:
            if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
                raise UserError("train.ema_decay needs whole weights on every process: use DDP, or leave it out")
            accelerator.register_for_checkpointing(self.ema)
        if config.train.compile:
            task.compile()
        self.task, self.optimizer = accelerator.prepare(task, optimizer)
        self.task.train()
        if self.resume_from is not None:
            self._resume(self.resume_from)
        self.history = History(self.output / "log.jsonl", self.progress.step, enabled=accelerator.is_main_process)
        self.diagnostics = build_alignment_diagnostics(config.aml, self.parts.dataset, self.output, accelerator.device)
        start_trackers(accelerator, config)
        self.say(banner(config, self.parts, accelerator, self.plan, self.total_steps))

    def _resume(self, path: Path) -> None:
        self.accelerator.load_state(str(path / "state"))
        spread = self.progress.spread
        self.progress = Progress(**checkpoints.load_trainer_state(path))
        if self.progress.spread != spread:
            before, now = (" x ".join(map(str, s)) for s in (self.progress.spread, spread))
            self.say(f"the run was spread {before} (processes x micro x accumulated) and goes on as {now}")
        self.progress.spread = spread
        self.say(f"going on from {path} at step {self.progress.step}")

    def _steps(self) -> Iterator[list[Batch]]:
        """The micro-batches of this process, one optimizer step's after the other."""
        loader = build_train_loader(
            self.parts.dataset,
            self.config.data,
            seed=self.config.seed,
            global_batch_size=self.plan.samples,
            micro_batch_size=self.plan.micro,
            total_steps=self.total_steps,
            first_step=self.progress.step,
        )
        waiting: list[Batch] = []
        for batch in self.accelerator.prepare_data_loader(loader):
            waiting.append(batch)
            if len(waiting) == self.plan.accumulation:
                yield waiting
                waiting = []
                if self.progress.step >= self.total_steps:  # stopped early
                    return

    def _calibration_batches(self) -> Iterator[Batch]:
        """This process's share of the first samples of the run."""
        sampler = build_sampler(
            self.parts.dataset,
            self.config.data,
            seed=self.config.seed,
            global_batch_size=CALIBRATION_SAMPLES,
            total_steps=1,
        )
        draws = list(sampler)[self.accelerator.process_index :: self.plan.processes]
        for start in range(0, len(draws), self.plan.micro):
            batch = collate([self.parts.dataset[draw] for draw in draws[start : start + self.plan.micro]])
            yield send_to_device(batch, self.accelerator.device)

    def _inference_model(self) -> Any:
        if self.ema is not None:
            return self.ema.module
        return self.accelerator.unwrap_model(self.task).model

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
        """Which micro-batch of the global batch this process's `number`-th is."""
        return number * self.plan.processes + self.accelerator.process_index

    def _count_steps(self) -> int:
        if self.config.train.max_steps is not None:
            return self.config.train.max_steps
        if self.config.train.epochs is None:
            raise UserError("give train.epochs or train.max_steps")
        return max(1, self.config.train.epochs * len(self.parts.dataset) // self.plan.samples)

    def _prepare_output(self) -> None:
        try:
            self.output.mkdir(parents=True, exist_ok=True)
            checkpoints.remove_leftovers(self.output)
            mark_requeue(self.output, False)
            save_config(self.config, self.output / "config.yaml")
        except OSError as error:
            raise UserError(f"cannot write to {self.output}: {error.strerror}; choose another --output") from error

    def _find_resumable(self) -> Path | None:
        found: list[Path | None] = [None]

        def find() -> None:
            found[0] = checkpoints.find_resumable(self.output, self.config.resume, self.say)

        on_main_process(self.accelerator, find)
        return broadcast_object_list(found)[0]

    def _log(self, values: dict[str, float]) -> None:
        if not values:
            return
        self.accelerator.log(values, step=self.progress.step)
        self.history.add(self.progress.step, values)

    def _leave(self) -> None:
        self.say(
            f"asked to stop ({self.interruption.reason or 'by another process'}): saved at step {self.progress.step}"
        )
        if self.accelerator.is_main_process:
            mark_requeue(self.output, True)
        raise SystemExit(REQUEUE_EXIT_CODE)

    def _finish(self) -> None:
        best = self.progress
        self.say(
            f"done: {self.progress.step} steps, {best.skipped} skipped; best {self.config.evaluation.best_metric} "
            f"{best.best:.2f} at step {best.best_step}; {self.output}/best/model and {self.output}/last/model"
        )

    def say(self, text: str) -> None:
        say(self.accelerator, text)
