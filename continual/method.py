"""What a continual method is, what it stands on, and the stage that it works in.

A method sees a model through a `Trainee` and never knows how many processes train it. It is called at fixed moments
of a stage, and whatever it must remember between two steps is in its `MethodState`, so that every run resumes exactly.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from continual.answers import AnswerMetric
from continual.batches import Batch, HeldOut, Samples
from continual.order import Indices
from relora.linear import LowRankLinear
from relora.restart import ParameterStore

Forward = Callable[..., Any]
"""The model in training: called with a Batch, and with further arguments of the model such as
`output_hidden_states=True`; returns what the model of transformers returns."""
Loss = Callable[[Forward, Batch], Tensor]
"""A loss summed over the batch's targets."""


class TaskKind(str, Enum):
    """What is learned from a task's samples."""

    causal_lm = "causal_lm"
    """The next token of text."""
    instruction = "instruction"
    """The tokens of answers to prompts."""
    classification = "classification"
    """The class of a text or an image."""
    forget = "forget"
    """To forget some classes or documents, and to retain others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskData:
    """The opened data of a task."""

    train: Samples
    """What is trained on; of a forget task, what is to be retained."""
    held_out: Mapping[str, HeldOut]
    """What is measured on, by name; the first is the task's own."""
    fingerprint: str
    """Digest of what decides the samples and their order; no paths."""
    classes: tuple[int, ...] = ()
    """Outputs of the classifier that the task's classes have; of a forget task, those to be forgotten."""
    forget: Samples | None = None
    """What a forget task wants to be forgotten."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One task of a stream, and when it is trained."""

    index: int
    name: str
    kind: TaskKind
    first: int
    """Updates of the run before it."""
    steps: int
    """Its updates."""
    data: TaskData
    seen: tuple[int, ...] = ()
    """Outputs of all classes of this task and the ones before it."""
    forgotten: tuple[int, ...] = ()
    """Those among them that this task or one before it asks to forget."""
    full_rank: bool = False
    """Whether all weights train: a warm start."""
    lr: float | None = None
    """Its peak learning rate; None: the run's."""
    metric: AnswerMetric = AnswerMetric.loss
    """What it is measured by, beside the loss."""

    @property
    def own_held_out(self) -> HeldOut:
        """What the task itself is measured on; of a request to forget, what it is to retain."""
        return self.data.held_out.get("retained") or next(iter(self.data.held_out.values()))

    @property
    def end(self) -> int:
        """Updates of the run at its end."""
        return self.first + self.steps


@dataclass(frozen=True, kw_only=True, slots=True)
class Term:
    """A share of an update's loss: weight * (the loss summed over its batch / the targets of all processes)."""

    name: str
    batch: Batch
    """This process's samples; all processes have as many."""
    weight: float = 1.0
    loss: Loss | None = None
    """None: the cross-entropy."""
    stage: "Stage | None" = None
    """Whose samples a classifier is shown; None: those of the stage in training."""
    all_seen: bool = False
    """Whether all classes seen so far compete, also where continual.logits=task lets only the stage's own do so."""


@dataclass(kw_only=True, slots=True)
class MethodState:
    """All that a method remembers between two steps; equal on all processes but for `parts`."""

    values: dict[str, Any] = field(default_factory=dict)
    """Plain values, as JSON holds them."""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """Whole tensors."""
    parts: dict[str, tuple[nn.Parameter, Tensor]] = field(default_factory=dict)
    """Tensors that belong to a parameter and are cut like its master: shaped as `store.master(parameter)`, flat."""


class Trainee(Protocol):
    """The model in training, as a method may use it. All processes make the same calls."""

    lr: float
    """Learning rate of the update that is made or was made last."""

    @property
    def model(self) -> nn.Module:
        """The bare model; outside training its forward pass may be called under `torch.no_grad`."""

    @property
    def layers(self) -> Mapping[str, LowRankLinear]:
        """Low-rank layers by name; none at full rank."""

    @property
    def store(self) -> ParameterStore:
        """Masters and Adam state, cut or whole; edit masters, then `publish`."""

    @property
    def device(self) -> torch.device:
        """That of this process."""

    @property
    def seed(self) -> int:
        """The run's."""

    @property
    def step(self) -> int:
        """Finished updates of the run."""

    @property
    def stages(self) -> Sequence[Stage]:
        """The stream's stages, later ones too."""

    @property
    def global_batch(self) -> int:
        """Samples of an update, over all processes."""

    def targets(self) -> Mapping[str, nn.Module]:
        """The modules that are low-rank, or will be after a warm start, by name."""

    def trainable(self) -> Mapping[str, nn.Parameter]:
        """The parameters that train, by name."""

    def mine(self, identities: Indices) -> Indices:
        """This process's share of samples that all batches hold together; they share evenly."""

    def turns(self, samples: HeldOut | Samples, count: int) -> Iterator[tuple[Batch, bool]]:
        """The first `count` samples, batch by batch, shared by all processes; False where a batch only fills a turn.

        All processes run as many forward passes, since a partitioned model needs everyone for each.
        """

    def row_losses(self, output: Any, batch: Batch) -> Tensor:
        """The cross-entropy of each sample, summed over its targets. Shapes: (B,)."""

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over all processes that see different samples; in place where it can be."""

    def share_work(self, names: Sequence[str], work: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Do a piece of work for each name on one of the processes, and give all results to all."""

    def whole_inputs(self, layer: str, inputs: Tensor) -> Tensor:
        """A low-rank layer's inputs with all features, where tensor parallelism has cut them. Shapes: (..., in)."""

    def whole(self, parameter: nn.Parameter) -> Tensor:
        """A parameter's master in the plain model's shape, on all processes."""

    def assembled(self, parts: Mapping[nn.Parameter, Tensor]) -> dict[nn.Parameter, Tensor]:
        """Tensors in parts like `store.master`, in the shapes that modules compute with; maybe the same memory."""

    def swapped(self, values: Mapping[nn.Parameter, Tensor]) -> AbstractContextManager[None]:
        """While it is open, forward passes use these values, as `assembled` gives them, in place of parameters' own.

        Masters stay as they are. No gradients may be under way. Low-rank factors have `relora.linear.standing_in`.
        """

    def squared_norms(self, parameters: Sequence[nn.Parameter], parts: Sequence[Tensor] | None = None) -> Tensor:
        """The squared Frobenius norm of each whole master, or of tensors cut like them.

        Shapes: (len(parameters),), float64
        """

    def step_sizes(self, parameter: nn.Parameter) -> Tensor:
        """What the last update multiplied each entry of Adam's first moment by, in parts like `store.master`."""

    def gradients(self, terms: Iterable[Term]) -> dict[nn.Parameter, Tensor]:
        """The gradient of a loss, summed over all processes, in parts like `store.master`; nothing is updated."""

    def add_gradients(self, gradients: Mapping[nn.Parameter, Tensor]) -> None:
        """Add to the gradients of the update in progress. Shapes: the plain model's, equal on all processes."""

    def return_to_start(self) -> None:
        """Put the weights back that the stream began with."""


class Method:
    """Training on one task after the other, with nothing against forgetting: the base of all methods."""

    trains_down: ClassVar[bool] = True
    """Whether `down` trains."""
    folds: ClassVar[bool] = False
    """Whether base weights take up each task's update at its end, and factors are drawn anew."""

    @property
    def written(self) -> str | None:
        """Which parts of its state are written to models in place of parameters: what precedes their names there.

        None: the parameters themselves are written.
        """
        return None

    def begin_stage(self, on: Trainee, stage: Stage) -> None:
        """Before the first update of a stage; Adam's state is clear."""

    def terms(self, on: Trainee, stage: Stage, batch: Batch) -> list[Term]:
        """The loss of the next update, given this process's share of the task's batch."""
        return [Term(name="task", batch=batch)]

    def after_backward(self, on: Trainee, stage: Stage) -> None:
        """Before each update, when the gradients of the terms are there."""

    def after_step(self, on: Trainee, stage: Stage) -> None:
        """After each update that was not refused."""

    def end_stage(self, on: Trainee, stage: Stage) -> None:
        """After the last update of a stage, before its update is folded and the model measured."""

    def draw(self, layer: str, shape: Sequence[int], restart_index: int) -> Tensor | None:
        """A fresh `down` for a low-rank layer at a restart; None: at random."""
        return None

    def measured(self, on: Trainee) -> AbstractContextManager[None]:
        """While it is open, the model is what the method wants to be measured and written."""
        return nullcontext()

    def measures(self) -> dict[str, float]:
        """What is worth a line in the records of this step."""
        return {}

    def report(self) -> dict[str, Any]:
        """What is worth telling of the stage that has ended; plain values."""
        return {}

    def state(self) -> MethodState:
        """All that the method remembers."""
        return MethodState()

    def load(self, state: MethodState) -> None:
        """Take over what `state` gave, maybe in another layout of processes; parts are cut for this one.

        Parts of parameters that do not train any more, after a warm start, are gone.
        """
