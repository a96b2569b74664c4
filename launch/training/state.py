"""What a run knows of itself between two steps: everything a checkpoint keeps beside tensors."""

from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from relora.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class RunState:
    """Counters and histories of a run; plain values only."""

    step: int = 0
    """Finished updates, skipped ones included."""
    tokens: int = 0
    """Tokens of all finished updates."""
    position: int = 0
    """Sequences consumed: the whole state of the data."""
    restarts: int = 0
    """Finished restarts; the next one has this index plus one."""
    asked_restarts: list[int] = field(default_factory=list)
    """Steps after which a restart was asked for; after a return to a checkpoint, some of them lie ahead."""
    syncs: int = 0
    """Finished syncs of LTE."""
    bytes_sent: int = 0
    """What one head has sent to the others."""
    sync_seconds: float = 0.0
    """Wall time in which training stood still for syncs."""
    number: int = 0
    """Of this head among elastic ones."""
    era: int = 0
    """How often a run of elastic heads had gone back to a checkpoint."""
    paths: dict[str, str] = field(default_factory=dict)
    """What lora.forward=auto has taken, by low-rank layer."""
    begun: int = 0
    """Stages of a stream that have begun."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """What each task's samples gave, before the stream and after each stage: the rows of the matrix."""
    boundaries: list[str] = field(default_factory=list)
    """Folder names of the checkpoints at the ends of stages."""
    gone_back: str | None = None
    """The task that continual.restart_from went back to, last."""
    learned: list[float] = field(default_factory=list)
    """Targets that this head has learned from since the last sync of each fragment of LTE's layers."""
    skipped: list[int] = field(default_factory=list)
    """Steps whose update was refused."""
    losses: list[float] = field(default_factory=list)
    """Losses of the recent accepted updates, oldest first: the guard's window."""
    grad_norms: list[float] = field(default_factory=list)
    """Their gradient norms."""
    train_loss: float | None = None
    """Loss of the last update."""
    val_loss: float | None = None
    """Loss of the last validation."""
    val_step: int | None = None
    """The step that it was made at."""
    best_val_loss: float | None = None
    """Lowest validation loss among the checkpoints written at a validated step."""
    best_checkpoint: str | None = None
    """Folder name of that checkpoint."""
    train_seconds: float = 0.0
    """Wall time inside the loop, over all attempts that led here."""
    peak_memory_bytes: int = 0
    """Highest memory in use, over all attempts."""

    def advance(self, *, sequences: int, tokens: int) -> None:
        """Count one finished update."""
        self.step += 1
        self.position += sequences
        self.tokens += tokens

    def note_best(self, checkpoint: str) -> None:
        """Remember a checkpoint that is about to be written, if validation at its step was the best so far."""
        if self.val_loss is None or self.val_step != self.step:
            return
        if self.best_val_loss is None or self.val_loss < self.best_val_loss:
            self.best_val_loss, self.best_checkpoint = self.val_loss, checkpoint

    def forget_spikes(self) -> None:
        """Let the guard look at a new task without the memory of the one before."""
        self.losses, self.grad_norms = [], []

    def own(self) -> dict[str, Any]:
        """What differs between LTE's heads."""
        return {name: getattr(self, name) for name in ("skipped", "losses", "grad_norms", "train_loss", "learned")}

    def fellow(self) -> "RunState":
        """The state of another head of the same process, which has the same past."""
        return deepcopy(self)

    def take_own(self, values: dict[str, Any]) -> None:
        """Take over what `own` gave."""
        for name, value in values.items():
            setattr(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RunState":
        """The state that a checkpoint holds.

        Raises:
            ConfigError: it was written by another version.
        """
        names = {entry.name for entry in fields(cls)}
        if set(values) != names:
            raise ConfigError(
                f"the checkpoint's counters are {sorted(values)}, this version has {sorted(names)}: "
                "continue the run with the version that wrote it"
            )
        return cls(**values)
