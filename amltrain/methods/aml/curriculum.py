"""When masking starts, and how it grows (ours): a function of the step, so a resumed run has the same."""

from typing import Literal, NamedTuple


class Curriculum(NamedTuple):
    """start_after: steps that mask nothing. ramp_steps: further steps over which `ramp` grows from 0 to its value."""

    start_after: int = 0
    ramp_steps: int = 0
    ramp: Literal["tau", "rho"] = "tau"

    @property
    def changes(self) -> bool:
        """Whether masking depends on the step."""
        return bool(self.start_after or self.ramp_steps)

    def factor(self, step: int) -> float:
        """What `ramp` is multiplied by at optimizer step `step` (from 0), 0..1."""
        done = step - self.start_after
        if done < 0:
            return 0.0
        return min(1.0, (done + 1) / self.ramp_steps) if self.ramp_steps else 1.0
