"""A run's model as a continual method may use it: all that needs other processes or the engine goes through here.

Implements `continual.method.Trainee`; its plain twin is tests/plain_trainee.py.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from continual.batches import Batch, HeldOut, Samples
from continual.method import Stage, Term
from continual.order import Indices
from launch.training.objective import accumulate, row_losses, turns
from launch.training.run import Run
from parallel.collectives import share_work, sum_over
from parallel.engine import Engine
from relora.linear import LowRankLinear
from relora.optimizer import step_sizes
from relora.restart import ParameterStore


class EngineTrainee:
    """The model of the current phase."""

    def __init__(self, run: Run, return_to_start: Callable[[], None]) -> None:
        self._run = run
        self._return_to_start = return_to_start
        self.lr = 0.0

    @property
    def _engine(self) -> Engine:
        assert isinstance(self._run.engine, Engine), "a stream has one head"
        return self._run.engine

    @property
    def model(self) -> nn.Module:
        """The bare model."""
        return self._run.model

    @property
    def layers(self) -> Mapping[str, LowRankLinear]:
        """Low-rank layers by name."""
        return {} if self._run.conversion is None else self._run.conversion.low_rank

    @property
    def store(self) -> ParameterStore:
        """Masters and Adam state."""
        return self._engine.store

    @property
    def device(self) -> torch.device:
        """That of this process."""
        return self._run.runtime.device

    @property
    def seed(self) -> int:
        """The run's."""
        return self._run.config.run.seed

    @property
    def step(self) -> int:
        """Finished updates."""
        return self._run.state.step

    @property
    def stages(self) -> Sequence[Stage]:
        """All of the run's."""
        return self._run.course.stages

    @property
    def global_batch(self) -> int:
        """Samples of an update."""
        return self._run.config.job_batch

    def targets(self) -> Mapping[str, nn.Module]:
        """The modules that are low-rank, or will be after a warm start."""
        return {name: self.model.get_submodule(name) for name in self._run.targets}

    def trainable(self) -> Mapping[str, nn.Parameter]:
        """The parameters that train, by name."""
        return {name: one for name, one in self.model.named_parameters() if one.requires_grad}

    def mine(self, identities: Indices) -> Indices:
        """This process's share of samples."""
        axis = self._run.runtime.batch
        share, rest = divmod(len(identities), axis.size)
        assert not rest, f"{len(identities)} samples cannot be shared by {axis.size} processes"
        return identities[axis.index * share : (axis.index + 1) * share]

    def turns(self, samples: HeldOut | Samples, count: int) -> Iterator[tuple[Batch, bool]]:
        """The first `count` samples, shared by all processes."""
        run = self._run
        size = run.config.validation_batch(run.runtime.batch.size)
        batches = (samples.batch(start, min(size, count - start)) for start in range(0, count, size))
        for batch, counts in turns(batches, run.runtime.batch, 1):
            yield batch.to(self.device), counts

    def row_losses(self, output: Any, batch: Batch) -> Tensor:
        """The cross-entropy of each sample. Shapes: (B,)."""
        return row_losses(self.model, output, batch)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over all processes that see different samples."""
        return sum_over(self._run.runtime.batch, tensor)

    def share_work(self, names: Sequence[str], work: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Do a piece of work for each name on one process, for all."""
        return share_work(self._run.runtime, names, work)

    def whole_inputs(self, layer: str, inputs: Tensor) -> Tensor:
        """A layer's inputs with all features. Shapes: (..., in)."""
        return self._engine.store.whole_inputs(self.model.get_submodule(layer), inputs)

    def whole(self, parameter: nn.Parameter) -> Tensor:
        """A parameter's master in the plain model's shape."""
        return self._engine.store.whole(parameter)

    def assembled(self, parts: Mapping[nn.Parameter, Tensor]) -> dict[nn.Parameter, Tensor]:
        """Tensors in parts like masters, in the shapes that modules compute with."""
        return self._engine.store.assembled(parts)

    def swapped(self, values: Mapping[nn.Parameter, Tensor]) -> AbstractContextManager[None]:
        """While it is open, forward passes use other values of parameters."""
        return self._engine.store.swapped(values)

    def squared_norms(self, parameters: Sequence[nn.Parameter], parts: Sequence[Tensor] | None = None) -> Tensor:
        """The squared Frobenius norm of each whole master, or of tensors cut like them."""
        return self._engine.store.squared_norms(parameters, parts)

    def step_sizes(self, parameter: nn.Parameter) -> Tensor:
        """What the last update multiplied each entry of Adam's first moment by."""
        optimizer, moments = self._run.config.optimizer, self._engine.store.moments(parameter)
        assert moments is not None, "an update was made"
        return step_sizes(moments, lr=self.lr, beta=optimizer.betas[1], eps=optimizer.eps)

    def backward(self, terms: Iterable[Term]) -> list[Tensor]:
        """Forward and backward of terms; returns this process's part of each one's weighted mean loss."""
        run = self._run
        return [
            accumulate(
                run.engine,
                term,
                targets=[self.targets_of(term.batch)],
                microbatch_size=run.microbatch,
                device=self.device,
            )[0]
            for term in terms
        ]

    def targets_of(self, batch: Batch) -> int:
        """Targets of all processes' batches together."""
        axis = self._run.runtime.data
        if batch.even:
            return batch.targets * axis.size
        return int(sum_over(axis, torch.tensor(batch.targets, device=self.device)))

    def gradients(self, terms: Iterable[Term]) -> dict[nn.Parameter, Tensor]:
        """The gradient of a loss, in parts like masters; nothing is updated."""
        self.backward([self._run.among(term) for term in terms])
        return self._engine.take_gradients()

    def add_gradients(self, gradients: Mapping[nn.Parameter, Tensor]) -> None:
        """Add to the gradients of the update in progress."""
        store = self._engine.store
        self._engine.add_gradients({one: store.cut(one, value) for one, value in gradients.items()})

    def return_to_start(self) -> None:
        """Put the weights back that the stream began with."""
        self._return_to_start()
