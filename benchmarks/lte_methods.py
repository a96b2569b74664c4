"""What the study of LTE compares: the ways to train on several machines, their settings, and the length of runs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

from benchmarks.runs import Job


class Family(str, Enum):
    """A way to train, whatever the number of machines."""

    ddp = "full rank"
    relora = "ReLoRA"
    lte_none = "LTE, reset none"
    lte_factors = "LTE, reset factors"
    diloco = "DiLoCo"

    @property
    def has_heads(self) -> bool:
        """Whether machines train apart; the others sum gradients in every step."""
        return self not in (Family.ddp, Family.relora)


@dataclass(kw_only=True, slots=True, frozen=True)
class Study:
    """How long and how large the runs are."""

    steps: int
    rank: int
    cycle: int
    """Steps between restarts of ReLoRA."""
    rewarm: int
    """Steps that its rate takes to rise again after one."""
    machines: tuple[int, ...]
    """Numbers of heads, or of replicas."""
    rhythms: tuple[int, ...]
    """Steps between syncs."""
    reference: tuple[int, int]
    """Number of heads, and steps between syncs, of the cell in which the learning rates of heads are chosen."""
    rates: dict[Family, tuple[float, ...]]
    """Learning rates that are tried first, each twice the one before."""
    extensions: int
    """How often a sweep whose best rate lies at an edge goes on beyond it."""
    overrides: tuple[str, ...]
    """Settings that all runs share."""


FULL = Study(
    steps=300,
    rank=8,
    cycle=100,
    rewarm=10,
    machines=(2, 4, 8),
    rhythms=(1, 10, 50),
    reference=(4, 10),
    rates={
        Family.ddp: (0.002, 0.004),
        Family.relora: (0.004, 0.008),
        Family.lte_none: (0.004, 0.008, 0.016),
        Family.lte_factors: (0.004, 0.008, 0.016),
        Family.diloco: (0.001, 0.002, 0.004),
    },
    extensions=1,
    overrides=(
        "model.config.hidden_size=128",
        "model.config.num_hidden_layers=2",
        "model.config.num_attention_heads=4",
        "model.config.intermediate_size=344",
        "model.config.initializer_range=0.088",  # 1 / sqrt(hidden_size): docs/results/quality.md tells why
        "data.sequence_length=64",
        "training.global_batch_size=16",
        "schedule.warmup_steps=30",
        "evaluation.every=50",
        "evaluation.sequences=256",
        "evaluation.batch_size=64",
    ),
)
QUICK = replace(
    FULL,
    steps=8,
    rank=2,
    cycle=4,
    rewarm=1,
    machines=(2,),
    rhythms=(4,),
    reference=(2, 4),
    rates={family: rates[:1] for family, rates in FULL.rates.items()},
    extensions=0,
    overrides=(
        "model.config.hidden_size=32",
        "model.config.num_attention_heads=4",
        "model.config.intermediate_size=88",
        "data.sequence_length=64",
        "training.global_batch_size=4",
        "schedule.warmup_steps=2",
        "evaluation.every=4",
        "evaluation.sequences=8",
        "evaluation.batch_size=8",
    ),
)
# No update is left out, and a run has one thread.
_ALWAYS = (
    "training.skip_sigma=0",
    "training.threads=1",
    "evaluation.spectra=all",
    "checkpoint.every=0",
    "run.log_every=10",
)


@dataclass(kw_only=True, slots=True, frozen=True)
class Cell:
    """One way to train on some machines; those that sum gradients train alike on any number, so theirs is 1."""

    family: Family
    machines: int
    every: int
    """Steps between exchanges."""

    @property
    def name(self) -> str:
        """What tables and folders call it."""
        return (
            f"{self.family.value}, {self.machines} heads, T = {self.every}"
            if self.family.has_heads
            else self.family.value
        )

    def overrides(self, study: Study) -> tuple[str, ...]:
        """Its settings but for the rate."""
        base = ("model=llama_tiny", f"training.steps={study.steps}", *study.overrides, *_ALWAYS)
        low_rank = (f"lora.rank={study.rank}", f"lora.alpha={2 * study.rank}")
        heads = ("lte=heads", f"lte.heads={self.machines}", f"lte.sync_every={self.every}")
        match self.family:
            case Family.ddp:
                return (*base, "lora=none")
            case Family.relora:
                cycles = (f"relora.every={study.cycle}", f"schedule.restart_warmup_steps={study.rewarm}")
                return (*base, *low_rank, *cycles, "relora.warm_start_steps=0")
            case Family.lte_none:
                return (*base, *low_rank, *heads, "lte.reset=none")
            case Family.lte_factors:
                return (*base, *low_rank, *heads, "lte.reset=factors")
            case Family.diloco:
                outer = ("lte.outer=nesterov", "lte.outer_lr=0.7", "lte.outer_momentum=0.9")
                return (*base, "lora=none", *heads, *outer)

    def job(self, study: Study, runs: Path, rate: float, *, apart: bool) -> Job:
        """The run at a learning rate, its heads in processes of their own or all in one."""
        folder = runs / self.family.name / f"heads_{self.machines}-every_{self.every}-lr_{rate:g}"
        overrides = (*self.overrides(study), f"optimizer.lr={rate:g}")
        return Job(folder=folder, overrides=overrides, processes=self.machines if apart else 1)


def cells(study: Study) -> list[Cell]:
    """All cells of a study, in the order of its tables."""
    found = []
    grid = [(machines, every) for machines in study.machines for every in study.rhythms]
    for family in Family:
        if family.has_heads:
            found += [Cell(family=family, machines=machines, every=every) for machines, every in grid]
        else:
            found.append(Cell(family=family, machines=1, every=1))
    return found


def reference(study: Study, family: Family) -> Cell:
    """The cell by which a family's learning rate is chosen."""
    machines, every = study.reference if family.has_heads else (1, 1)
    return Cell(family=family, machines=machines, every=every)


def families(chosen: Sequence[Cell]) -> list[Family]:
    """The families of some cells, in order."""
    return list(dict.fromkeys(cell.family for cell in chosen))
