"""What a stream's score matrix says: how well tasks are learned, and how much of them is kept. Pure arithmetic.

In all formulas R[i, j] is the score on task j after stage i, b[j] the score before any training, l(j) the stage that
learned task j (j, where each stage has a task of its own), T the number of finished stages. "Earlier tasks" are those
with l(j) < T - 1. Gains point upwards: a gain of x over y is x - y, and y - x where lower scores are better, such as
losses. A formula that needs an entry which was not measured, or that has no task to speak of, gives None.
docs/continual_metrics.md tells who uses which.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

Entry = float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreMatrix:
    """The scores of a stream; what was not measured is None, and a row may end early."""

    rows: Sequence[Sequence[Entry]]
    """A row for each finished stage, an entry for each task."""
    baseline: Sequence[Entry] = ()
    """The scores before any training."""
    samples: Sequence[int] = ()
    """How many samples each task is measured on; empty: not known."""
    learned: Sequence[int | None] | None = None
    """The stage that learned each task, None for one that no stage did, or unlearned; None: stage j learned task j."""
    higher_is_better: bool = True
    """Whether a high score is a good one, as with accuracy; else as with a loss."""

    @property
    def last(self) -> int:
        """The newest row."""
        return len(self.rows) - 1

    def at(self, row: int, task: int) -> Entry:
        """R[row, task]."""
        return _entry(self.rows[row], task)

    def origin(self, task: int) -> int | None:
        """The stage that learned a task, if it is finished."""
        stage = task if self.learned is None else self.learned[task]
        return stage if stage is not None and stage <= self.last else None

    def seen(self, row: int) -> list[int]:
        """The tasks that are learned after a stage."""
        tasks = range(len(self.rows) if self.learned is None else len(self.learned))
        return [task for task in tasks if (origin := self.origin(task)) is not None and origin <= row]

    @property
    def earlier(self) -> list[tuple[int, int]]:
        """The tasks that other stages followed, each with the stage that learned it."""
        found = ((task, self.origin(task)) for task in self.seen(self.last))
        return [(task, origin) for task, origin in found if origin is not None and origin < self.last]

    def gain(self, now: Entry, then: Entry) -> Entry:
        """By how much a score is better than another."""
        if now is None or then is None:
            return None
        return now - then if self.higher_is_better else then - now

    def best(self, scores: Sequence[Entry]) -> Entry:
        """The best of some scores, all measured."""
        known = [score for score in scores if score is not None]
        if len(known) < len(scores) or not known:
            return None
        return max(known) if self.higher_is_better else min(known)


def last_score(matrix: ScoreMatrix) -> Entry:
    """mean over learned j of R[T-1, j].

    Source: mammoth "class-il accuracy", TRACE "OP", O-LoRA "average accuracy".
    """
    return _row_mean(matrix, matrix.last, by_samples=False) if matrix.rows else None


def last_score_by_samples(matrix: ScoreMatrix) -> Entry:
    """sum over learned j of n[j] R[T-1, j], over the sum of n[j].

    Source: PILOT and InfLoRA "total", Avalanche "StreamAccuracy".
    """
    return _row_mean(matrix, matrix.last, by_samples=True) if matrix.rows else None


def average_score(matrix: ScoreMatrix) -> Entry:
    """mean over i of the mean over the tasks learned by stage i of R[i, j]: average incremental accuracy.

    Source: Rebuffi et al. 2017 (iCaRL), with equal weights of tasks.
    """
    return _mean([_row_mean(matrix, row, by_samples=False) for row in range(len(matrix.rows))])


def average_score_by_samples(matrix: ScoreMatrix) -> Entry:
    """mean over i of the accuracy on all samples of the tasks learned by stage i.

    Source: PILOT "Average Accuracy (CNN)"; InfLoRA's averaged accuracy.
    """
    return _mean([_row_mean(matrix, row, by_samples=True) for row in range(len(matrix.rows))])


def learning_score(matrix: ScoreMatrix) -> Entry:
    """mean over learned j of R[l(j), j]: what tasks reach just after their own stage.

    Source: Riemer et al. 2019 (MER) "learning accuracy"; of a model per task it is the oracle.
    """
    origins = ((task, matrix.origin(task)) for task in matrix.seen(matrix.last))
    return _mean([matrix.at(origin, task) for task, origin in origins if origin is not None])


def forgetting_max(matrix: ScoreMatrix) -> Entry:
    """mean over earlier j of max over l(j) <= i <= T-1 of R[i, j], minus R[T-1, j]; never negative.

    Source: mammoth `forgetting`, PILOT `print_forget`.
    """
    return _mean(list(forgetting_by_task(matrix).values()))


def forgetting_by_task(matrix: ScoreMatrix) -> dict[int, Entry]:
    """What `forgetting_max` is the mean of, for each earlier task."""
    return _forgetting_by_task(matrix, lambda origin: range(origin, matrix.last + 1))


def forgetting_chaudhry(matrix: ScoreMatrix) -> Entry:
    """mean over earlier j of max over l(j) <= i <= T-2 of R[i, j], minus R[T-1, j]; below 0 if the last stage helped.

    Source: Chaudhry et al. 2018 (Riemannian walk).
    """
    return _forgetting(matrix, lambda origin: range(origin, matrix.last))


def forgetting_first(matrix: ScoreMatrix) -> Entry:
    """mean over earlier j of R[l(j), j] - R[T-1, j]; the negative of `bwt`.

    Source: Avalanche `Forgetting`.
    """
    return _forgetting(matrix, lambda origin: range(origin, origin + 1))


def bwt(matrix: ScoreMatrix) -> Entry:
    """Backward transfer: mean over earlier j of R[T-1, j] - R[l(j), j].

    Source: Lopez-Paz and Ranzato 2017 (GEM).
    """
    return _mean(_changes(matrix))


def bwt_clipped(matrix: ScoreMatrix) -> Entry:
    """sum over earlier j of min(R[T-1, j] - R[l(j), j], 0), over the number of all learned tasks.

    Source: TreeLoRA `collect_results.py`, which divides by T where GEM has T - 1.
    """
    mean = _mean([None if change is None else min(change, 0.0) for change in _changes(matrix)])
    return None if mean is None else mean * len(matrix.earlier) / len(matrix.seen(matrix.last))


def fwt(matrix: ScoreMatrix) -> Entry:
    """Forward transfer: mean over learned j with l(j) >= 1 of R[l(j)-1, j] - b[j].

    Source: Lopez-Paz and Ranzato 2017 (GEM), with b measured before any training.
    """
    origins = ((task, matrix.origin(task)) for task in matrix.seen(matrix.last))
    return _mean(
        [matrix.gain(matrix.at(stage - 1, task), _entry(matrix.baseline, task)) for task, stage in origins if stage]
    )


def h_mean(drop: float, retained: float) -> float:
    """2 drop retained / (drop + retained); 0 where either is not above 0.

    `drop` is the accuracy on forgotten classes before less that after, `retained` the accuracy on all other classes.
    Source: GS-LoRA (2403.11530), whose code adds 1e-8 to the denominator.
    """
    return 2 * drop * retained / (drop + retained) if drop > 0 and retained > 0 else 0.0


TRANSFERS: dict[str, Callable[[ScoreMatrix], Entry]] = {
    "forgetting_max": forgetting_max,
    "forgetting_chaudhry": forgetting_chaudhry,
    "forgetting_first": forgetting_first,
    "bwt": bwt,
    "bwt_clipped": bwt_clipped,
    "fwt": fwt,
}
"""What is a difference of scores, by name."""


def summary(matrix: ScoreMatrix, *, score: str = "accuracy") -> dict[str, Any]:
    """The matrix and all that is said of it, by the names of summary.json; `score` is what the entries are.

    `forgetting` is forgetting_max. Losses in nats also give perplexities: exponentials of the mean loss, so that a
    difference of losses is the logarithm of a ratio of perplexities.
    """
    levels = {
        f"average_{score}": average_score(matrix),
        f"last_{score}": last_score(matrix),
        f"average_{score}_by_samples": average_score_by_samples(matrix),
        f"last_{score}_by_samples": last_score_by_samples(matrix),
        f"learning_{score}": learning_score(matrix),
    }
    if score == "loss":
        levels |= {f"{name}_perplexity": _exponential(levels[f"{name}_loss"]) for name in ("average", "last")}
    width = max((len(row) for row in (*matrix.rows, matrix.baseline)), default=0)
    return {
        "matrix": [[_entry(row, task) for task in range(width)] for row in matrix.rows],
        "baseline": [_entry(matrix.baseline, task) for task in range(width)] if matrix.baseline else None,
        **levels,
        "forgetting": forgetting_max(matrix),
        **{name: formula(matrix) for name, formula in TRANSFERS.items()},
    }


def _row_mean(matrix: ScoreMatrix, row: int, *, by_samples: bool) -> Entry:
    tasks = matrix.seen(row)
    if not by_samples:
        return _mean([matrix.at(row, task) for task in tasks])
    weights = [matrix.samples[task] if task < len(matrix.samples) else 0 for task in tasks]
    if not all(weights):  # a weight that is not known
        return None
    shares = [weight * len(tasks) / sum(weights) for weight in weights]
    scores = [matrix.at(row, task) for task in tasks]
    return _mean([None if score is None else score * share for score, share in zip(scores, shares, strict=True)])


def _forgetting(matrix: ScoreMatrix, rows: Callable[[int], Sequence[int]]) -> Entry:
    return _mean(list(_forgetting_by_task(matrix, rows).values()))


def _forgetting_by_task(matrix: ScoreMatrix, rows: Callable[[int], Sequence[int]]) -> dict[int, Entry]:
    return {
        task: matrix.gain(matrix.best([matrix.at(row, task) for row in rows(origin)]), matrix.at(matrix.last, task))
        for task, origin in matrix.earlier
    }


def _changes(matrix: ScoreMatrix) -> list[Entry]:
    return [matrix.gain(matrix.at(matrix.last, task), matrix.at(origin, task)) for task, origin in matrix.earlier]


def _entry(row: Sequence[Entry], task: int) -> Entry:
    return row[task] if task < len(row) else None


def _mean(values: Sequence[Entry]) -> Entry:
    known = [value for value in values if value is not None]
    return fmean(known) if known and len(known) == len(values) else None


def _exponential(value: Entry) -> Entry:
    return None if value is None else math.exp(min(value, 700.0))  # near the largest that a float holds
