"""What is tracked, where, and how much of it."""

from dataclasses import dataclass, field, fields
from enum import Enum

from relora.errors import ConfigError

_LONGEST_TAG = 64  # W&B refuses longer ones when a run begins


class TrackerKind(str, Enum):
    """Who is told."""

    wandb = "wandb"
    tensorboard = "tensorboard"


class TrackerMode(str, Enum):
    """Whether records go to the server at once."""

    auto = "auto"
    """online where an API key is configured, else offline; WANDB_MODE decides where it is set."""
    online = "online"
    offline = "offline"


class Images(str, Enum):
    """Which pictures are sent."""

    none = "none"
    end = "end"
    """The report's figures when the run is done, and a stream's heat map after each task."""
    restarts = "restarts"
    """And singular values and ranks whenever they are measured."""


class Artifacts(str, Enum):
    """Which files are sent."""

    none = "none"
    manifests = "manifests"
    """Each checkpoint's list of files with sizes and checksums, and where it lies; not its tensors."""
    final = "final"
    """The model in final/."""
    all = "all"


class SystemMetrics(str, Enum):
    """Whose load W&B samples: one process of a node does."""

    none = "none"
    first = "first"
    """Of the first node, in the run itself."""
    nodes = "nodes"
    """Of every node, each further one in a run of its own."""


class HeadRuns(str, Enum):
    """What becomes of LTE's heads."""

    together = "together"
    """One run tells the losses of all of them, at syncs."""
    apart = "apart"
    """Each head but the first has a run of its own beside it, with a record for each step."""


@dataclass(kw_only=True, slots=True)
class TrackerConfig:
    """Where a run appears in Weights & Biases or TensorBoard."""

    kind: TrackerKind = TrackerKind.wandb
    """wandb or tensorboard; chosen by tracker=..."""
    dir: str | None = None
    """Where files lie: of W&B in a folder `wandb` there, of TensorBoard in one of the run's name; null: run folder."""
    images: Images = Images.end
    """none, end (figures when the run is done, a stream's heat map after each task) or restarts (and spectra then)."""
    heads: HeadRuns = HeadRuns.together
    """LTE's heads: together in one run, or apart in a run each."""
    project: str = "accrete"
    """Project name."""
    entity: str | None = None
    """User or team; null: the key's default."""
    group: str | None = None
    """Runs of one study share a group; null: a sweep, the heads of one training, or the runs of one job have one."""
    name: str | None = None
    """Display name; null: the run's name, and in a sweep or with elastic heads the folder's, too."""
    job_type: str | None = None
    """What a run is within its group; null: train, head or node."""
    tags: list[str] = field(default_factory=list)
    """Words to find the run by."""
    notes: str | None = None
    """A sentence about the run."""
    mode: TrackerMode = TrackerMode.auto
    """auto, online or offline (send later by `wandb sync`)."""
    artifacts: Artifacts = Artifacts.none
    """none, manifests (of checkpoints), final (the model) or all."""
    alerts: bool = True
    """Tell by mail or Slack, as W&B is set, of refused updates, failures and stops from outside."""
    system_metrics: SystemMetrics = SystemMetrics.first
    """Load of machines, from one process each: none, first (node) or nodes (all)."""
    tag_commands: bool = False
    """Do what tags say that are given to the running run in W&B, and take them away."""
    init_timeout_seconds: float = 20.0
    """How long to wait for the server before the run is tracked offline."""
    finish_timeout_seconds: float = 60.0
    """How long to wait at the end for what is not sent yet; `wandb sync` can send it later."""

    def __post_init__(self) -> None:
        if self.kind is TrackerKind.tensorboard:
            self._check_tensorboard()
        if not self.project:
            raise ConfigError("tracker.project must not be empty: name one, or choose tracker=none")
        for key, usual in (("init_timeout_seconds", 20), ("finish_timeout_seconds", 60)):
            seconds = getattr(self, key)
            if not seconds > 0:
                raise ConfigError(f"tracker.{key} must be above 0, got {seconds}: leave it at {usual}")
        for tag in self.tags:
            if not 1 <= len(tag) <= _LONGEST_TAG:
                raise ConfigError(
                    f"tracker.tags must have 1 to {_LONGEST_TAG} characters each, got {tag!r}: shorten it"
                )

    def _check_tensorboard(self) -> None:
        plain = TrackerConfig()
        for name in (entry.name for entry in fields(self)):
            if name not in ("kind", "dir", "images", "heads") and getattr(self, name) != getattr(plain, name):
                raise ConfigError(f"tracker.{name} has no effect with tracker=tensorboard: leave it out, or take wandb")
