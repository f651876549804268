"""Where a run stands: what a resumed run must know besides weights and optimizer."""

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from amltrain.errors import UserError, fits


@dataclass
class Progress:
    """Saved as state/trainer.json.

    step            optimizer steps done; with the seed and the batch size it is also the position in the data
    saved           step of the newest checkpoint; evaluated: of the newest evaluation
    best, best_step best metric so far, and where; worse_in_a_row: evaluations since
    skipped         steps whose loss or gradient was not finite; bad_in_a_row: the newest of them, without a gap
    spread          processes, micro batch, accumulation
    log_lines       lines of log.jsonl so far, which a resumed run keeps
    window          sums of the method's recorder since its last row
    losses          sum of this epoch's finite losses so far, and their number
    seed, samples   of the run and of its training set, which resuming must not change
    engine          what trained: no, multi_cpu, multi_gpu, fsdp, deepspeed, ... (Accelerate's names)
    callbacks       state of callbacks, by class name
    """

    step: int = 0
    saved: int = 0
    evaluated: int = 0
    best: float = -math.inf
    best_step: int = 0
    worse_in_a_row: int = 0
    skipped: int = 0
    bad_in_a_row: int = 0
    spread: list[int] = field(default_factory=list)
    seed: int = 0
    samples: int = 0
    log_lines: int = 0
    window: Any = None
    losses: list[float] = field(default_factory=lambda: [0.0, 0])
    engine: str = ""
    callbacks: dict[str, Any] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def resumed(self, saved: dict[str, Any], name: str) -> "Progress":
        """Continue from a saved progress under this run's spread. Raises UserError if its samples would be others.

        name: of the checkpoint, for the message.
        """
        known = {f.name for f in fields(Progress)}
        spread = saved.get("spread")
        if not saved.keys() <= known or not isinstance(spread, list) or len(spread) != 3:
            raise UserError(f"{name} was made by another version of amltrain; start a new run from its weights")
        if not all(type(value) is int and 0 <= value < 2**63 for value in (*spread, *_counts(saved))):
            raise UserError(f"{name} is damaged: a count in its progress is not one; resume from another checkpoint")
        losses = saved.get("losses", [0.0, 0])
        if not isinstance(losses, list) or not all(fits(value, float) for value in (saved.get("best", 0.0), *losses)):
            raise UserError(f"{name} is damaged: a metric in its progress is no number; resume from another checkpoint")
        before = Progress(**saved)
        for what, then, now in (
            ("train.global_batch_size", math.prod(before.spread), math.prod(self.spread)),
            ("seed", before.seed, self.seed),
            ("the number of training samples", before.samples, self.samples),
        ):
            if then != now:
                raise UserError(
                    f"{name} was made with {what} {then}, not {now}; a resumed run continues with the same samples: "
                    f"set it back, or start a new run in another --output"
                )
        before.spread, before.engine = self.spread, self.engine
        return before

    def judge(self, value: float) -> bool:
        """Note an evaluation's best metric; whether it is the best so far. NaN never is."""
        self.evaluated = self.step
        if value > self.best:
            self.best, self.best_step, self.worse_in_a_row = value, self.step, 0
            return True
        self.worse_in_a_row += 1
        return False

    def add_loss(self, loss: float) -> None:
        """Add a step's loss to the mean of its epoch, unless it is not finite."""
        if math.isfinite(loss):
            self.losses = [self.losses[0] + loss, self.losses[1] + 1]

    def take_mean_loss(self) -> float:
        """Return the mean loss since the last call; NaN where no step was finite."""
        (total, steps), self.losses = self.losses, [0.0, 0]
        return total / steps if steps else math.nan

    def count(self, *, bad: bool) -> None:
        """Note a step whose loss and gradient were finite, or not."""
        self.skipped += bad
        self.bad_in_a_row = self.bad_in_a_row + 1 if bad else 0


def _counts(saved: dict[str, Any]) -> list[Any]:
    """The values that must be whole numbers from 0 on."""
    return [
        value
        for key, value in saved.items()
        if key not in ("spread", "best", "window", "losses", "engine", "callbacks")
    ]
