"""The trainers that the benchmark of layouts compares: methods on layouts, all from the same model and global batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from continual.batches import Batch
from continual.method import Term
from launch.config import TrainConfig, load
from launch.models.model import model_config
from launch.planning.estimate import Layout
from launch.training.objective import accumulate
from launch.training.phase import make_engine, make_phase
from parallel.collectives import sum_over
from parallel.runtime import Axis, Runtime, start
from relora.restart import restart

RELORA, FULL_RANK = "ReLoRA", "full rank"
_SEED = 0
_BYTES = 256  # size of the vocabulary where the model leaves it open
_RATE = 5e-4  # Adam amplifies rounding after each reset: at a high rate losses of equal trainers would part soon
_FULL_RANK_STAGES = (0, 3)  # for comparison, without tensor parallelism


@dataclass(kw_only=True, slots=True, frozen=True)
class Shape:
    """What all trainers have in common."""

    model: str
    """An option of conf/model."""
    rank: int
    batch: int
    """Sequences of the global batch."""
    microbatch: int
    sequence: int
    dtype: str
    persistence: int
    """Parameters of so many entries or fewer stay whole at stage 3."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Entry:
    """A method on a layout."""

    method: str
    layout: Layout
    alone: bool = False
    """Whether the main process trains by itself, and the others wait."""

    @property
    def name(self) -> str:
        """As the tables show it."""
        if self.alone:
            return f"{self.method}, one process"
        words = [self.method]
        if self.layout.zero_stage > 0:
            words.append(f"ZeRO {self.layout.zero_stage}")
        elif self.layout.data > 1:
            words.append("ddp")
        if self.layout.tensor > 1:
            words.append(f"tensor {self.layout.tensor}")
        return ", ".join(words)


@dataclass(kw_only=True, slots=True, frozen=True)
class Trainer:
    """An entry, ready to step."""

    entry: Entry
    runtime: Runtime
    """Its mesh."""
    step: Callable[[], float]
    """One update; returns the loss of the global batch before it."""
    restart: Callable[[int], None] | None
    """ReLoRA's restart, given its index."""


def entries(processes: int, *, stages: Sequence[int], tensor: Sequence[int]) -> list[Entry]:
    """Both methods in one process and replicated, and what the ZeRO stages and tensor degrees make of `processes`."""
    alone = [Entry(method=method, layout=_layout(0, 1, 1), alone=True) for method in (RELORA, FULL_RANK)]
    degrees = [degree for degree in sorted({1, *tensor}) if processes % degree == 0]
    wanted = [(RELORA, stage, degree) for degree in degrees for stage in sorted({0, *stages})]
    wanted += [(FULL_RANK, stage, 1) for stage in _FULL_RANK_STAGES if stage in {0, *stages}]
    shared = [Entry(method=method, layout=_layout(stage, degree, processes)) for method, stage, degree in wanted]
    known = {(entry.method, entry.layout) for entry in alone}  # one process, replicated, is one process
    return alone + [entry for entry in shared if (entry.method, entry.layout) not in known]


def _layout(stage: int, tensor: int, processes: int) -> Layout:
    return Layout(zero_stage=stage, tensor=tensor, data=processes // tensor)


def configured(entry: Entry, shape: Shape) -> tuple[TrainConfig, PretrainedConfig]:
    """The configuration of an entry's run.

    Raises:
        ConfigError: the shape makes no run.
    """
    lora = (f"lora.rank={shape.rank}", "relora.warm_start_steps=0") if entry.method == RELORA else ("lora=none",)
    config = load(
        [
            f"model={shape.model}",
            f"data.sequence_length={shape.sequence}",
            f"training.global_batch_size={shape.batch}",
            f"training.microbatch_size={shape.microbatch}",
            f"training.dtype={shape.dtype}",
            f"parallel.zero_stage={entry.layout.zero_stage}",
            f"parallel.tensor={entry.layout.tensor}",
            f"++parallel.deepspeed={{zero_optimization: {{stage3_param_persistence_threshold: {shape.persistence}}}}}",
            *lora,
        ]
    )
    return config, model_config(config.model, vocab_size=_BYTES, sequence_length=shape.sequence)


def build(entry: Entry, shape: Shape, runtime: Runtime) -> Trainer:
    """Build one. Collectives: by all processes, the ones that train alone, too."""
    if entry.alone:
        return _build(entry, shape, _by_itself(runtime))
    with start(tensor=entry.layout.tensor) as meshed:
        return _build(entry, shape, meshed)


def _by_itself(runtime: Runtime) -> Runtime:
    axis = Axis(1, 0, None, (runtime.process_rank,))
    rank, device = runtime.process_rank, runtime.device
    return Runtime(process_rank=rank, world_size=1, device=device, data=axis, tensor=axis, model=axis)


def _build(entry: Entry, shape: Shape, runtime: Runtime) -> Trainer:
    config, hf_config = configured(entry, shape)
    phase = make_phase(config, hf_config, step=0, fresh=True, tensor=entry.layout.tensor)
    engine = make_engine(phase, config, runtime)
    batch, size = _share(shape, runtime.data), config.training.microbatch(runtime.data.size)
    targets, term = [batch.targets * runtime.data.size], Term(name="task", batch=batch)

    def step() -> float:
        part = accumulate(engine, term, targets=targets, microbatch_size=size, device=runtime.device)
        loss = sum_over(runtime.model, part if runtime.tensor.index == 0 else torch.zeros_like(part))
        refused = engine.step(_RATE, lambda norm: None).refused
        assert refused is None, refused
        return float(loss)

    def restart_once(index: int) -> None:
        assert config.relora is not None
        restart(engine.model, config.relora, engine.store, seed=_SEED, restart_index=index)

    return Trainer(entry=entry, runtime=runtime, step=step, restart=None if config.relora is None else restart_once)


def _share(shape: Shape, axis: Axis) -> Batch:
    """This process's sequences of the global batch."""
    generator = torch.Generator().manual_seed(_SEED)
    tokens = torch.randint(_BYTES, (shape.batch, shape.sequence), generator=generator)
    share = shape.batch // axis.size
    mine = tokens[axis.index * share :][:share]
    return Batch(inputs={"input_ids": mine}, labels=mine)
