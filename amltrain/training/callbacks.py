"""What happens beside the loop: log, method statistics, weight average, pictures, trackers, the Hub, the profiler.

Each is a callback; `Callback` in run.py is the contract. Your own is a class under `@register_callback`, in a file that
`--import` names, and `train.callbacks: [its name]`.
"""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile, schedule
from tqdm.auto import tqdm

from amltrain.config.schema import RunConfig
from amltrain.evaluation.results import Results
from amltrain.hub.push import Publisher, build_publisher
from amltrain.methods.base import Recorder
from amltrain.registry import CALLBACKS, NoOptions
from amltrain.run_folder import BEST, EXAMPLES, LAST, PICTURES, PROFILE, STATE, checkpoint_name, step_of
from amltrain.training.run import Callback, Run, Step
from amltrain.training.tracking import banner, log_line, track_evaluation

Kind = TypeVar("Kind", bound=Callable[..., Callback])


def register_callback(name: str, *, options: type = NoOptions) -> Callable[[Kind], Kind]:
    """Register a class (or function) that makes a callback from its options: `Kind(options)`.

    options: a dataclass whose fields all have defaults; it is the section of a run that bears the callback's name.
    """

    def register(kind: Kind) -> Kind:
        CALLBACKS.add(name, kind, options=options)
        return kind

    return register


def build_callbacks(config: RunConfig) -> list[Callback]:
    """Build the callbacks of every run, in the order in which they are called, then those that the config names."""
    always: list[Callback] = [
        WeightAverage(),
        StepLog(),
        MethodStatistics(),
        Profile(),
        Pictures(),
        Trackers(),
        Publish(),
    ]
    options = config.callback_options
    named = [CALLBACKS[name].value(options.get(name) or CALLBACKS.options(name)()) for name in config.train.callbacks]
    return [*always, *named]


class WeightAverage(Callback):
    """Updates the moving average of the weights (train.ema_decay) after every finite step."""

    def on_step(self, run: Run, step: Step) -> None:
        if run.ema is not None and step.finite:
            run.ema.update_parameters(run.bare_method.model)


class StepLog(Callback):
    """Prints the header, the progress bar or plain lines, and writes log.jsonl and the trackers' values."""

    bar: tqdm | None = None

    def on_start(self, run: Run) -> None:
        run.log(banner(run.config, run.components, run.accelerator, run.plan, run.total_steps, run.last_step))
        self.bar = tqdm(
            total=run.last_step,
            initial=run.progress.step,
            desc="train",
            unit="step",
            smoothing=0.05,
            disable=None if run.is_main else True,  # None: no bar unless on a terminal
        )

    def on_step(self, run: Run, step: Step) -> None:
        assert self.bar is not None
        self.bar.update()
        self.bar.set_postfix(loss=f"{step.loss:.4f}", lr=f"{step.lr:.1e}", refresh=False)
        progress = run.progress
        progress.add_loss(step.loss)
        if progress.step % run.config.train.log_every == 0 or progress.step == run.last_step:
            rate = {"lr_factor": step.lr_factor, "lr": step.lr, "epoch": progress.step / run.steps_per_epoch}
            measured = {"loss": step.loss, "grad_norm": step.grad_norm, **rate, **step.extras, **run.meter.read()}
            run.track(measured)
            if self.bar.disable:
                run.log(log_line(progress.step, run.last_step, run.plan.samples, measured))
        if progress.step % run.steps_per_epoch == 0:
            run.track({"epoch_loss": progress.take_mean_loss()})

    def on_finish(self, run: Run) -> None:
        self.on_stop(run)

    def on_stop(self, run: Run) -> None:
        if self.bar is not None:
            self.bar.close()


class MethodStatistics(Callback):
    """Feeds the method's recorder, if it has one, and logs its rows."""

    recorder: Recorder | None = None

    def on_start(self, run: Run) -> None:
        self.recorder = run.bare_method.recorder(run.components.dataset, run.output, run.accelerator.device)
        if self.recorder is not None and run.resumed:
            self.recorder.restore(run.progress.window, run.accelerator.device)

    def on_step(self, run: Run, step: Step) -> None:
        if self.recorder is None:
            return
        for values in step.results:
            self.recorder.update({name: value for name, value in values.items() if name != "loss"})
        row = self.recorder.after_step(run.progress.step, run.method, run.accelerator.reduce, run.is_main)
        if row is not None:
            run.track(row)

    def before_save(self, run: Run) -> None:
        run.progress.window = None if self.recorder is None else self.recorder.window(run.accelerator.reduce)


class Profile(Callback):
    """Profiles `train.profile` steps with torch.profiler."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    def on_start(self, run: Run) -> None:
        self._profiler = self._stack.enter_context(profiled(run)) if run.config.train.profile and run.is_main else None

    def on_step(self, run: Run, step: Step) -> None:
        if self._profiler is not None:
            self._profiler.step()

    def on_stop(self, run: Run) -> None:
        self._stack.close()


class Pictures(Callback):
    """Draws the predictions that an evaluation kept."""

    def on_evaluation(self, run: Run, results: dict[str, Results]) -> None:
        if not run.is_main:
            return
        for name, result in results.items():
            if result.predictions:
                from amltrain.evaluation.draw import (
                    best_example,
                    prediction_sheet,
                    save_picture,
                )  # matplotlib: a second

                picture = f"{checkpoint_name(run.progress.step)}-{name.replace(':', '-')}.png"
                dataset = run.components.eval_loaders[name].dataset
                save_picture(prediction_sheet(result, dataset), run.output / PICTURES / picture)
                if example := best_example(result, dataset):
                    save_picture(example[0], run.output / EXAMPLES / picture, example[1])


class Trackers(Callback):
    """Sends an evaluation's scores, table and pictures to the trackers, and its scores to log.jsonl."""

    def on_evaluation(self, run: Run, results: dict[str, Results]) -> None:
        if run.progress.evaluated == run.progress.step:
            return  # a finished run that is started again logs nothing twice
        run.track(
            {f"{name}/{metric}": value for name, result in results.items() for metric, value in result.metrics.items()}
        )
        track_evaluation(run.accelerator, run.output, list(results.values()), run.progress.step)


class Publish(Callback):
    """Pushes every new best, or every new last checkpoint's model or all of it, to the Hub in the background."""

    publisher: Publisher | None = None

    def on_start(self, run: Run) -> None:
        if run.is_main:
            self.publisher = build_publisher(run.config.hub, tqdm.write)

    def on_save(self, run: Run, checkpoint: Path) -> None:
        scores_follow = bool(run.components.eval_loaders) and run.falls_on(run.evaluation_interval, step_of(checkpoint))
        if self.publisher is not None and run.config.hub.push != BEST and not scores_follow:
            self.publisher.submit(checkpoint)

    def on_scores(self, run: Run, checkpoint: Path, *, best: bool) -> None:
        if self.publisher is not None and (best or run.config.hub.push != BEST):
            self.publisher.submit(checkpoint)

    def on_finish(self, run: Run) -> None:
        if self.publisher is not None:
            kind, repo = run.config.hub.push, run.config.hub.repo
            final = run.output / (BEST if kind == BEST else LAST)
            later = f"amltrain push {run.output} {repo} --state" if kind == STATE else f"amltrain push {final} {repo}"
            self.publisher.finish(final, f"push it later: {later}")

    def on_stop(self, run: Run) -> None:
        if self.publisher is not None:
            self.publisher.close()


SKIPPED = 2
"""Steps before the profiled ones."""


def profiled(run: Run) -> Any:
    """Return a profiler of `train.profile` optimizer steps, after SKIPPED others; call `step()` after each of them.

    Writes OUTPUT/profile/trace.json, for chrome://tracing or ui.perfetto.dev, and OUTPUT/profile/operators.txt.
    """
    steps, folder = run.config.train.profile, run.output / PROFILE
    folder.mkdir(exist_ok=True)
    on_cuda = torch.cuda.is_available()

    def write(profiler: Any) -> None:
        profiler.export_chrome_trace(str(folder / "trace.json"))
        order = "self_cuda_time_total" if on_cuda else "self_cpu_time_total"
        (folder / "operators.txt").write_text(profiler.key_averages().table(sort_by=order, row_limit=40) + "\n")
        tqdm.write(f"profile of {steps} steps: {folder}/operators.txt and {folder}/trace.json")

    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    plan = schedule(wait=SKIPPED - 1, warmup=1, active=steps or 1, repeat=1)
    return profile(activities=kinds, schedule=plan, on_trace_ready=write)
