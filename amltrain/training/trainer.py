"""The training loop.

    batch -> method (model and loss: one forward) -> backward -> clip -> optimizer        every micro-batch / every step
    every so often: log, evaluate, save, and stop if asked

One number leaves the device per optimizer step: loss, gradient norm and requests to stop travel together, averaged over
the processes, so that all of them take the same decision.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import DistributedType, send_to_device
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm

from amltrain.config.schema import RunConfig
from amltrain.data.collate import collate
from amltrain.data.ensure import ensure_training_data
from amltrain.data.loaders import build_sampler, build_train_loader
from amltrain.data.transforms import normalise_batch
from amltrain.errors import UserError
from amltrain.evaluation.results import Results
from amltrain.hub.push import Publisher, build_publisher
from amltrain.models import model_info
from amltrain.randomness import random_key
from amltrain.records import Batch
from amltrain.training import checkpoint as checkpoints
from amltrain.training.build import build_parts, write_model_folder
from amltrain.training.distributed import (
    PREPARATION,
    build_accelerator,
    check_shardable,
    is_sharded,
    model_weights,
    on_main_process,
    skip_bad_steps,
)
from amltrain.training.failures import explained, release
from amltrain.training.nonfinite import NormStatistics, check_weights, describe_samples
from amltrain.training.optim import build_optimizer, lr_factor, set_lr
from amltrain.training.preemption import Preemption
from amltrain.training.resume import check_shared, prepare_output, write_config
from amltrain.training.state import Progress
from amltrain.training.tracking import History, banner, say, start_trackers
from amltrain.training.validation import best_value, check_best_metric, evaluate_splits

SETUP_SAMPLES = 64


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
        with explained(config, trainer.plan.micro):
            return trainer.run()
    except BaseException as error:
        release(error)
        raise
    finally:
        trainer.accelerator.end_training()


class Trainer:
    """A run: built from its config, then `run()`."""

    def __init__(self, config: RunConfig) -> None:
        model_info(config.model.name)  # a misspelt name ends a run before anything is prepared
        self.config, self.output = config, Path(config.output)
        self.accelerator, self.plan = build_accelerator(config)
        self.publisher: Publisher | None = None
        self.resume_from: Path | None = on_main_process(self.accelerator, self._open_output)
        check_shared(self.accelerator, self.output)
        on_main_process(self.accelerator, lambda: ensure_training_data(config.data, self.say), wait=PREPARATION)
        on_cuda = self.accelerator.device.type == "cuda"
        self.parts = build_parts(config, processes=self.plan.processes, on_cuda=on_cuda, resume_from=self.resume_from)
        check_best_metric(config.evaluation, list(self.parts.eval_loaders))
        self.total_steps = self._count_steps()
        self.steps_per_epoch = max(1, round(len(self.parts.dataset) / self.plan.samples))
        self.preemption = Preemption(config.train.time_limit)
        self.progress = Progress(spread=list(self.plan), seed=config.seed, samples=len(self.parts.dataset))
        self.results: list[Results] = []

    def run(self) -> list[Results]:
        with self.preemption.listening():
            self._start()
            if self._evaluation_is_due():  # the run was cut off before it could
                self._evaluate_and_save()
            bar = tqdm(
                total=self.total_steps,
                initial=self.progress.step,
                desc="train",
                unit="step",
                smoothing=0.05,
                disable=not self.accelerator.is_main_process,
            )
            with bar:
                for batches in () if self._is_done() else self._steps():
                    stats = self._optimizer_step(batches)
                    bar.update()
                    self._after_step(stats, bar)
                    if self._is_done():
                        break
            if not self.results:  # there was nothing left to train
                self._evaluate()
        self._finish()
        return self.results

    def _optimizer_step(self, batches: list[Batch]) -> StepStats:
        """One optimizer step over the micro-batches of one global batch."""
        accelerator, optimizer = self.accelerator, self.optimizer
        before = accelerator.unwrap_model(self.method).before_step
        for line in before(self.progress.step, batches, accelerator.reduce):
            self.say(line)
        self.norm_statistics.keep()
        full_lr = self.config.optim.first_epoch_full_lr and self.progress.step < self.steps_per_epoch
        set_lr(optimizer, self._lr_factor(), self.config.optim.lr if full_lr else None)
        losses: list[Tensor] = []
        extras: dict[str, list[Tensor]] = {}
        for number, batch in enumerate(batches):
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
                if self.recorder is not None:
                    self.recorder.update(result)
                if accelerator.sync_gradients:
                    norm = self._clip()
                    stats = self._reduce(losses, norm, extras)
                    if stats.finite or accelerator.scaler is not None:  # fp16's scaler skips overflows by itself
                        optimizer.step()
                    optimizer.zero_grad()
        if not stats.finite:
            self.norm_statistics.take_back()
        elif self.ema is not None:
            self.ema.update_parameters(accelerator.unwrap_model(self.method).model)
        self._count_bad(stats, batches)
        self.progress.step += 1
        return stats

    def _clip(self) -> Tensor:
        """Norm of the whole gradient before clipping; the same on every process."""
        limit = self.config.optim.clip_norm
        norm = self.accelerator.clip_grad_norm_(self.method.parameters(), math.inf if limit is None else limit)
        if norm is None:  # DeepSpeed clips inside its step and may not say
            return torch.zeros((), device=self.accelerator.device)
        return torch.as_tensor(norm, device=self.accelerator.device, dtype=torch.float32)

    def _reduce(self, losses: list[Tensor], norm: Tensor, extras: dict[str, list[Tensor]]) -> StepStats:
        stop = torch.full_like(norm, float(self.preemption.requested()))
        means = [torch.stack(values).float().mean() for values in extras.values()]
        values = torch.stack([torch.stack(losses).float().mean(), norm, stop, *means])
        loss, grad_norm, stop_share, *rest = self.accelerator.reduce(values, reduction="mean").tolist()
        return StepStats(loss, grad_norm, stop_share > 0, dict(zip(extras, rest, strict=True)))

    def _count_bad(self, stats: StepStats, batches: list[Batch]) -> None:
        """Count a step that was not finite, name its samples, and give up after too many in a row."""
        scaler = self.accelerator.scaler
        # fp16's scaler overflows now and then by design, until it has nothing left to scale down
        overflow = scaler is not None and math.isfinite(stats.loss) and not stats.finite and scaler.get_scale() >= 1
        self.progress.count(bad=not stats.finite and not overflow)
        if not self.progress.bad_in_a_row:
            return
        step = self.progress.step + 1
        ids = [int(i) for batch in batches for i in self.accelerator.gather(batch.sample_id).tolist()]
        self.say(f"step {step}: loss {stats.loss}, gradient norm {stats.grad_norm}; the step is skipped, samples {ids}")
        self.history.add(step, {"skipped_samples": describe_samples(self.parts.dataset, ids)})
        if self.progress.bad_in_a_row >= self.config.train.max_bad_steps:
            raise UserError(
                f"{self.progress.bad_in_a_row} steps in a row were not finite; lower optim.lr, or use bf16 instead of "
                f"fp16 (last good checkpoint: {self._last_good()})"
            )

    def _last_good(self) -> str:
        """The newest checkpoint: weights that are not finite are never saved."""
        return next((str(path) for path in reversed(checkpoints.checkpoints(self.output))), "none yet")

    def _after_step(self, stats: StepStats, bar: tqdm) -> None:
        """Log, save, leave if asked, evaluate."""
        step, config = self.progress.step, self.config
        bar.set_postfix(loss=f"{stats.loss:.4f}", lr=f"{self.optimizer.param_groups[0]['lr']:.1e}", refresh=False)
        if step % config.train.log_every == 0 or step == self.total_steps:
            rate = {"lr_factor": self._lr_factor(step - 1)}
            self._log({"loss": stats.loss, "grad_norm": stats.grad_norm, **rate, **stats.extras})
        self._record()
        if stats.stop or self._falls_on(config.checkpoint.every_steps or self._evaluation_interval()):
            self._save()
        if stats.stop:
            self._leave()
        if self._evaluation_is_due():
            self._evaluate_and_save()

    def _falls_on(self, interval: int) -> bool:
        return self.progress.step % interval == 0 or self.progress.step == self.total_steps

    def _evaluation_interval(self) -> int:
        return self.config.evaluation.every_steps or self.steps_per_epoch

    def _evaluation_is_due(self) -> bool:
        """Whether this step wants an evaluation that it has not had."""
        progress = self.progress
        return (
            progress.evaluated < progress.step
            and bool(self.parts.eval_loaders)
            and self._falls_on(self._evaluation_interval())
        )

    def _is_done(self) -> bool:
        patience = self.config.evaluation.patience
        if patience is not None and self.progress.worse_in_a_row >= patience:
            self.say(f"no better {self.config.evaluation.best_metric} in {patience} evaluations: stopping early")
            return True
        return self.progress.step >= self.total_steps

    def _record(self) -> None:
        """Log a row of the method's own statistics when one is due."""
        if self.recorder is not None:
            row = self.recorder.after_step(
                self.progress.step, self.method, self.accelerator.reduce, self.accelerator.is_main_process
            )
            if row is not None:
                self._log(row)

    def _evaluate_and_save(self) -> None:
        """What is trained is saved first: neither a kill nor a request to stop during the evaluation costs a step."""
        if self.progress.saved < self.progress.step:
            self._save()
        with self.preemption.leaving_at_once(self._leave):
            self._evaluate()
        self._save()  # with its scores

    def _evaluate(self) -> None:
        """Evaluate every split, and note the best metric."""
        if not self.parts.eval_loaders:
            return
        values, self.results = evaluate_splits(
            self.accelerator, self._inference_model(), self.parts, self.config, self.progress.step
        )
        self._log(values)
        self.progress.judge(best_value(self.results, list(self.parts.eval_loaders), self.config.evaluation))

    def _save(self) -> None:
        step, progress = self.progress.step, self.progress
        weights = model_weights(self.accelerator, self.method) if self.ema is None else self.ema.module.state_dict()
        on_main_process(self.accelerator, lambda: check_weights(weights, step, self._last_good()))
        results = [r for r in self.results if r.provenance["step"] == step]
        progress.saved = step
        path = checkpoints.save_checkpoint(
            self.accelerator,
            self.output,
            step,
            progress.state_dict(),
            lambda folder: write_model_folder(folder, self.config, self.parts, weights, results),
        )
        if self.accelerator.is_main_process:
            best = progress.best_step == step
            if best:
                checkpoints.point(self.output, "best", path)
            if (
                self.publisher is not None
                and (best or self.config.hub.push == "last")
                and not self._evaluation_is_due()
            ):
                self.publisher.submit(path)
            checkpoints.prune(self.output, self.config.checkpoint.keep)
        self.accelerator.wait_for_everyone()

    def _start(self) -> None:
        """Set the method up or resume, wrap for Accelerate, and log what will run."""
        accelerator, config = self.accelerator, self.config
        method = self.parts.method.to(accelerator.device)
        if self.resume_from is None:
            for line in method.setup(self._first_batches(), accelerator.reduce):
                self.say(line)
        groups, o = method.param_groups(config.optim.lr, config.optim.weight_decay), config.optim
        optimizer = build_optimizer(groups, o.optimizer, lr=o.lr, betas=o.betas, eps=o.eps, amsgrad=o.amsgrad)
        self.ema = self._average(method.model)
        # a sharded model runs only through its wrapper: evaluation gets a whole one to fill
        self.whole_model = copy.deepcopy(method.model) if is_sharded(accelerator) else None
        self.recorder = method.recorder(self.parts.dataset, self.output, accelerator.device)
        if method.before_step_needs_weights and is_sharded(accelerator):
            raise UserError(
                f"method {method.name} with these options needs whole weights between steps; "
                "change them, or use DDP or ZeRO-1/2"
            )
        if config.train.compile:
            method.compile()
        check_shardable(accelerator, method)
        self.method, self.optimizer = accelerator.prepare(method, optimizer)
        skip_bad_steps(accelerator, self.optimizer)
        self.norm_statistics = NormStatistics(accelerator.unwrap_model(self.method))
        self.method.train()
        if self.resume_from is not None:
            self._resume(self.resume_from)
        on_main_process(accelerator, lambda: write_config(config))
        self.history = History(self.output / "log.jsonl", self.progress.step, enabled=accelerator.is_main_process)
        start_trackers(accelerator, config, self.progress.step)
        self.say(banner(config, self.parts, accelerator, self.plan, self.total_steps))

    def _average(self, model: nn.Module) -> AveragedModel | None:
        decay = self.config.train.ema_decay
        if decay is None:
            return None
        if is_sharded(self.accelerator):
            raise UserError("train.ema_decay needs whole weights on every process: use DDP, or leave it out")
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
        self.accelerator.register_for_checkpointing(average)
        return average

    def _resume(self, path: Path) -> None:
        accelerator, saved = self.accelerator, checkpoints.load_trainer_state(path)
        self.progress = self.progress.resumed(saved, str(path))
        if saved["spread"] != self.progress.spread:
            before, now = (" x ".join(map(str, spread)) for spread in (saved["spread"], self.progress.spread))
            self.say(f"the run was spread {before} (processes x micro x accumulated) and goes on as {now}")
            if accelerator.distributed_type == DistributedType.DEEPSPEED and saved["spread"][0] != self.plan.processes:
                raise UserError(
                    f"{path} was saved by DeepSpeed on {saved['spread'][0]} processes, and DeepSpeed resumes on that "
                    f"many only; start as many, or start anew from {path}/model with --model.checkpoint"
                )
        accelerator.load_state(str(path / "state"))
        accelerator.step = 0  # it counts micro-batches, of which a step may now have another number
        if path.resolve().parent != self.output.resolve():
            self.progress.best, self.progress.worse_in_a_row = -math.inf, 0  # the best one stays in its own folder
        elif self.progress.best_step == self.progress.step and accelerator.is_main_process:
            checkpoints.point(self.output, "best", path)  # a kill may have come between saving and pointing
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
        normalization = self.parts.dataset.transform.normalization
        for batch in self.accelerator.prepare_data_loader(loader):
            waiting.append(normalise_batch(batch, normalization))
            if len(waiting) == self.plan.accumulation:
                yield waiting
                waiting = []

    def _first_batches(self) -> Iterator[Batch]:
        """This process's share of the first samples of the run."""
        sampler = build_sampler(
            self.parts.dataset,
            self.config.data,
            seed=self.config.seed,
            global_batch_size=max(SETUP_SAMPLES, self.plan.processes),
            total_steps=1,
        )
        draws = list(sampler)[self.accelerator.process_index :: self.plan.processes]
        for start in range(0, len(draws), self.plan.micro):
            batch = collate([self.parts.dataset[draw] for draw in draws[start : start + self.plan.micro]])
            batch = send_to_device(batch, self.accelerator.device)
            yield normalise_batch(batch, self.parts.dataset.transform.normalization)

    def _inference_model(self) -> nn.Module:
        if self.ema is not None:
            return self.ema.module
        if self.whole_model is not None:
            self.whole_model.load_state_dict(model_weights(self.accelerator, self.method))
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
        """Which micro-batch of the global batch this process's `number`-th is."""
        return number * self.plan.processes + self.accelerator.process_index

    def _count_steps(self) -> int:
        if self.config.train.max_steps is not None:
            return self.config.train.max_steps
        if self.config.train.epochs is None:
            raise UserError("give train.epochs or train.max_steps")
        return max(1, self.config.train.epochs * len(self.parts.dataset) // self.plan.samples)

    def _open_output(self) -> Path | None:
        self.publisher = build_publisher(self.config.hub, self.say)
        return prepare_output(self.config, self.say)

    def _log(self, values: dict[str, float]) -> None:
        self.accelerator.log(values, step=self.progress.step)
        self.history.add(self.progress.step, values)

    def _leave(self) -> None:
        self.say(
            f"asked to stop ({self.preemption.reason or 'by another process'}): saved at step {self.progress.step}; "
            f"the same command goes on from there"
        )
        self.preemption.leave(self.output)

    def _finish(self) -> None:
        p, folders = self.progress, f"{self.output}/last/model"
        if self.results:
            folders = f"{self.output}/best/model and {folders}"
            best = f"; best {self.config.evaluation.best_metric} {p.best:.2f} at step {p.best_step}"
        self.say(f"done: {p.step} steps, {p.skipped} skipped{best if self.results else ''}; {folders}")
        if self.publisher is not None:
            final = self.output / self.config.hub.push
            self.publisher.finish(final, f"push it later: amltrain push {final} {self.config.hub.repo}")

    def say(self, text: str) -> None:
        say(self.accelerator, text)
