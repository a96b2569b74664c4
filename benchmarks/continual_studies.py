"""The studies of continual training: which recipes each runs, and the small stream that only shows that it works."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.runs import Job
from launch.config import CONF

METHODS = ("sequential", "replay", "ewc", "o_lora", "inflora", "i_lora", "joint", "per_task")
"""In the order of the tables; a study runs those that have a recipe for its stream."""
# The same for every run: one thread, and nothing is written that nobody reads.
ALWAYS = (
    "training.threads=1",
    "evaluation.spectra=none",
    "checkpoint.every=0",
    "continual.save_models=false",
    "run.save_start=false",
    "run.log_every=10",
)


@dataclass(kw_only=True, slots=True, frozen=True)
class Study:
    """A stream, and how it becomes a minute's worth."""

    name: str
    """What its recipes are called, before the method."""
    title: str
    quick: tuple[str, ...]
    """Settings of the small stream."""

    @property
    def methods(self) -> list[str]:
        """Those with a recipe."""
        return [method for method in METHODS if (CONF / "experiment" / f"{self.name}_{method}.yaml").is_file()]

    def job(self, runs: Path, method: str, seed: int, *, quick: bool) -> Job:
        """The run of a method with a seed."""
        overrides = (f"experiment={self.name}_{method}", f"run.seed={seed}", *ALWAYS, *(self.quick if quick else ()))
        return Job(folder=runs / method / f"seed_{seed}", overrides=overrides)


def _tasks(kind: str, entries: Sequence[str], steps: int) -> str:
    told = [f"{{name: t{number}, kind: {kind}, steps: {steps}, {entry}}}" for number, entry in enumerate(entries)]
    return f"continual.tasks=[{', '.join(told)}]"


STUDIES = {
    study.name: study
    for study in (
        Study(
            name="digits",
            title="Digits: classes that come one after the other",
            quick=(
                _tasks(
                    "classification",
                    ["data: digits, classes: ['0', '1'], full_rank: true", "data: digits, classes: ['2', '3']"],
                    8,
                ),
                "training.global_batch_size=8",
            ),
        ),
        Study(
            name="python_three",
            title="Python's own text: domains that come one after the other",
            quick=(
                _tasks("causal_lm", ["data: python_library, full_rank: true", "data: python_reference"], 8),
                "data.max_tokens=40000",
                "data.sequence_length=64",
                "model.config.hidden_size=32",
                "model.config.num_attention_heads=4",
                "model.config.intermediate_size=88",
                "schedule.warmup_steps=2",
                "schedule.restart_warmup_steps=1",
                "evaluation.sequences=8",
            ),
        ),
    )
}
