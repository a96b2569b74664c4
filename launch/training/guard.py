"""Refuses updates that would hurt: a loss or gradient that is not finite, or far above its recent values.

Its window lives in the run's state, so that a resumed run decides as the uninterrupted one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev

from launch.training.state import RunState


class TrainingDiverged(RuntimeError):
    """Too many updates were refused in a short time."""

    def __init__(self, message: str, *, step: int, host: str | None = None) -> None:
        """Keep the step, and the only machine whose numbers were not finite, if there is one."""
        super().__init__(message)
        self.step, self.host = step, host


@dataclass(kw_only=True, slots=True, frozen=True)
class Guard:
    """Decides about each update before it is made."""

    sigma: float
    """Deviations above the mean that count as a spike; 0: only values that are not finite are refused."""
    window: int
    """Accepted updates that mean and deviation are taken over; spikes are looked for once it is full."""
    max_skips: int
    """Refused updates within the window's length that end the run."""

    def objection(self, state: RunState, *, loss: float, grad_norm: float) -> str | None:
        """Why the coming update should be refused, or None."""
        for name, value, history in (("loss", loss, state.losses), ("gradient norm", grad_norm, state.grad_norms)):
            if not math.isfinite(value):
                return f"{name} is {value}"
            limit = self._limit(history)
            if limit is not None and value > limit:
                return f"{name} {value:.4g} is above {limit:.4g}, {self.sigma:g} deviations over its recent mean"
        return None

    def record(self, state: RunState, *, loss: float, grad_norm: float, refused: str | None) -> None:
        """Remember an update, accepted or not.

        Raises:
            TrainingDiverged: too many were refused lately.
        """
        if refused is None:
            state.losses = [*state.losses, loss][-self.window :]
            state.grad_norms = [*state.grad_norms, grad_norm][-self.window :]
            return
        state.skipped.append(state.step)
        recent = self._recent(state)
        if recent >= self.max_skips:
            raise TrainingDiverged(
                f"{recent} of the last {self.window} updates were refused, the last at step {state.step} "
                f"because its {refused}. Lower optimizer.lr or training.max_grad_norm, look at the data near "
                "that step, or raise training.max_skips; the last checkpoint is from before",
                step=state.step,
            )

    def storm(self, state: RunState) -> str | None:
        """What there is to tell when, with this refused update, half of those that end the run have come together."""
        recent = self._recent(state)
        if 2 * recent < self.max_skips or 2 * (recent - 1) >= self.max_skips:
            return None
        return f"{recent} of the last {self.window} updates were refused; {self.max_skips} end the run"

    def _recent(self, state: RunState) -> int:
        return sum(step > state.step - self.window for step in state.skipped)

    def _limit(self, history: Sequence[float]) -> float | None:
        if self.sigma == 0 or len(history) < self.window:
            return None
        return fmean(history) + self.sigma * pstdev(history)
