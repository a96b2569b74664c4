"""One run in memory: everything that the loop works on."""

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, field, replace

from torch import Tensor, nn
from transformers import PretrainedConfig

from continual.batches import Batch, joined
from continual.config import Competing
from continual.method import Method, Stage, TaskKind, Term, Trainee
from launch.config import TrainConfig
from launch.training.course import Course
from launch.training.guard import Guard
from launch.training.paths import told
from launch.training.requests import Wishes
from launch.training.run_folder import RunFolder
from launch.training.signals import StopRequest
from launch.training.state import RunState
from launch.watching.pictures import note_spectra
from launch.watching.spectra import Spectra
from launch.watching.watch import Watch
from parallel.elastic import ElasticHeads
from parallel.engine import Engine
from parallel.hosted import HostedEngine
from parallel.pulse import Pulse
from parallel.runtime import Runtime
from parallel.saving import Saver
from relora.convert import Conversion
from relora.sync import HeadSync


@dataclass(kw_only=True, slots=True)
class Run:
    """A run on this process; what differs between processes is named."""

    config: TrainConfig
    folder: RunFolder
    runtime: Runtime
    """Where this process stands in the current phase."""
    apart: Runtime
    """Where it stands when LTE's heads train apart; in a warm start all are one."""
    course: Course
    """What is learned, and when."""
    method: Method
    """What is done against forgetting."""
    stage: Stage
    """The stage that is trained, or was trained last."""
    hf_config: PretrainedConfig
    engine: Engine | HostedEngine
    """Over this process's part of the model, or over the stacked model of the heads that it hosts."""
    conversion: Conversion | None
    outputs: dict[str, Tensor]
    """The parameters of a classifier's outputs as they were drawn; those of classes to come are still so."""
    targets: list[str]
    """Modules that are low-rank, or will be after a warm start."""
    state: RunState
    """Equal on all processes but for times and memory, and for what `RunState.own` names between LTE's heads."""
    guard: Guard
    saver: Saver
    watch: Watch
    """Silent on all processes but the main one."""
    stop: StopRequest
    wishes: Wishes
    """What else the run is asked for."""
    spectra: Spectra | None
    sync: HeadSync | None = None
    """The syncs of LTE's heads; None while all processes train as one."""
    elastic: ElasticHeads | None = None
    """The way to heads that are other jobs."""
    fellows: list[RunState] = field(default_factory=list)
    """The states of the further heads that this process hosts; `state` is the first one's."""
    trainee: Trainee = field(init=False)
    """The model as the method sees it."""
    stepped: Callable[[], None] | None = None
    """Told of each finished update; the profiler's."""
    pulse: Pulse = field(default_factory=Pulse)
    """By which the watchdog sees that steps end."""
    checkpoint_due: bool = False
    """Whether a checkpoint waits for an update that is not refused."""
    suspects: list[tuple[int, dict[int, str]]] = field(default_factory=list)
    """Of each step refused for numbers that are not finite: the processes whose own were not, and their machines."""
    hosts: int = 1
    """Machines, as far as anybody has asked."""
    diverged: dict[int, str] = field(default_factory=dict)
    """Hosted heads that cannot go on, and why; all heads agree on it at the next sync."""

    @property
    def model(self) -> nn.Module:
        """The model of the current phase."""
        return self.engine.model

    @property
    def heads(self) -> Sequence[int]:
        """LTE's heads that this process hosts; one, while all processes train as one."""
        return [0] if self.sync is None else self.sync.hosted

    @property
    def places(self) -> Sequence[int]:
        """Their numbers in this job's checkpoints: an elastic head is the only one there."""
        return [0] if self.elastic is not None else self.heads

    @property
    def states(self) -> list[RunState]:
        """Their states."""
        return [self.state, *self.fellows]

    @property
    def microbatch(self) -> int:
        """Sequences per forward and backward of each head of this process."""
        return self.config.microbatch(self.runtime.batch.size * len(self.heads))

    def among(self, term: Term) -> Term:
        """A term of the loss, with word of the classes that compete for its samples."""
        count, continual, stage = len(self.course.class_names), self.config.continual, term.stage or self.stage
        if not count or term.batch.classes is not None:
            return term
        assert continual is not None
        own = continual.logits is Competing.task and stage.kind is TaskKind.classification and not term.all_seen
        return replace(term, batch=term.batch.among(stage.data.classes if own else stage.seen, count))

    def next_batch(self) -> Batch:
        """This process's share of the next global batch."""
        axis, size, stage = self.runtime.batch, self.config.job_batch, self.stage
        share, train = size // axis.size, stage.data.train
        if self.elastic is None:
            position = (self.state.step - stage.first) * size if self.course.is_stream else self.state.position
            return train.batch(position + axis.index * share, share)
        leased = self.elastic.leased(self.state.step, size, start=axis.index * share, count=share)
        return joined([train.batch(start, stop - start) for start, stop in leased])


def measure_update(run: Run) -> None:
    """Decompose W - W_start as it is now, delta included, where spectra are wanted."""
    state, config = run.state, run.config
    pending = config.lte is None and not config.folds and state.step == run.course.total_steps
    if run.spectra is not None and state.step > 0 and run.conversion is not None:
        merges = state.restarts + state.syncs + int(pending)  # the last cycle's delta is folded in by final/ only
        run.spectra.measure(run.model, run.engine.store.whole_weight, run.runtime, step=state.step, merges=merges)
        if run.runtime.is_main:
            note_spectra(run.watch, run.folder.path)


def show_model(run: Run) -> None:
    """Print what of the model is low-rank, what trains dense and what is frozen, and who shares it."""
    mesh, device = run.runtime.mesh, run.runtime.device.type
    where = f"on {device}"
    if mesh.world_size > 1:
        stage = run.config.parallel.zero_stage
        heads = f"{mesh.heads} heads x " if mesh.heads > 1 else ""
        axes = f"{heads}{mesh.data} data x {mesh.tensor} tensor"
        where = f"on {mesh.world_size} processes ({axes}, ZeRO {stage}, {device})"
    if len(run.heads) > 1:
        where += f", {len(run.heads)} heads in each process"
    trainable = run.engine.store.trainable_entries
    if run.conversion is None:
        run.watch.say(f"full rank: {trainable:,} parameters train {where}")
        return
    lines = [astuple(row) for row in run.conversion.rows()]
    run.watch.console.table("model", ("kind", "modules", "parameters", "trainable", "state"), lines)
    run.watch.say(f"low rank: {trainable:,} parameters train, for a model of {run.conversion.total:,}, {where}")
    if run.state.paths:
        run.watch.say(told(run.state.paths))
