"""What a checkpoint can be written as: a merged model, this cycle's adapter with its base, an SVD of the update."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from launch.config import TrainConfig
from launch.models.description import Description
from launch.models.model import in_place_of
from launch.models.snapshot import Snapshot
from launch.watching.console import Console
from launch.watching.spectra import StartWeights
from parallel.files import is_disk_error
from relora.adapter import Factors, names_to_save, save_adapter
from relora.convert import Scaling
from relora.errors import ConfigError
from relora.truncate import truncated


class Form(str, Enum):
    """The words of export.to."""

    model = "model"
    adapter = "adapter"
    svd = "svd"


@dataclass(kw_only=True, slots=True, frozen=True)
class Source:
    """What is written from."""

    run_dir: Path
    config: TrainConfig
    snapshot: Snapshot
    description: Description


def check_form(form: Form, source: Source, rank: int | None) -> None:
    """Whether a checkpoint has a form.

    Raises: ConfigError
    """
    if form is Form.model:
        return
    if source.config.lora is None:
        raise ConfigError(
            f"export.to={form.value} needs low-rank layers, but {source.run_dir} was trained at full rank "
            "(lora=none): use export.to=model"
        )
    if not source.snapshot.layers:
        raise ConfigError(
            f"export.to={form.value} needs low-rank layers, but this checkpoint is from the full-rank warm start: use "
            f"export.to=model, or a checkpoint after step {source.config.warm_start_steps}"
        )
    if form is Form.svd:
        if not (source.run_dir / "start").is_dir():
            raise ConfigError(
                f"export.to=svd compares with {source.run_dir / 'start'}, which does not exist (run.save_start=false "
                "leaves it out): use export.to=model or export.to=adapter"
            )
        wanted = rank or source.config.lora.rank
        for name in source.snapshot.layers:
            limit = source.snapshot.largest_rank(name)
            if wanted > limit:
                raise ConfigError(f"export.rank must be at most min(in, out) = {limit} of {name}, got {wanted}")


def write_model(
    snapshot: Snapshot, description: Description, folder: Path, dtype: torch.dtype, *, merged: bool = True
) -> None:
    """The whole model as `train` writes final/; or without the delta of the current cycle."""
    snapshot.write_weights(folder, dtype, merged=merged)
    description.write(folder, snapshot.skeleton, dtype)


def write_folder(
    snapshot: Snapshot, description: Description, folder: Path, dtype: torch.dtype, *, merged: bool = True
) -> None:
    """The whole model in a folder that appears at once, in place of one of that name.

    Raises: ConfigError when the disk is full or not writable; what was there before is untouched.
    """
    try:
        with in_place_of(folder) as partial:
            write_model(snapshot, description, partial, dtype, merged=merged)
    except (OSError, SafetensorError) as error:
        if not is_disk_error(error):
            raise
        raise ConfigError(
            f"{folder} cannot be written: {error}. Free some space and start the same command again"
        ) from error


def write_adapter(source: Source, folder: Path, dtype: torch.dtype, *, final: Path, console: Console) -> None:
    """The current cycle's factors for PEFT, and in base/ the model that they belong to.

    Args:
        final: the folder's name when it is complete, by which the adapter finds its base.
    """
    snapshot, lora = source.snapshot, source.config.lora
    assert lora is not None
    (folder / "base").mkdir()
    write_model(snapshot, source.description, folder / "base", dtype, merged=False)
    factors: dict[str, Factors] = {}
    for name in snapshot.layers:
        down, up = snapshot.factors(name)
        factors[name] = down.to(dtype), up.to(dtype)
    if not any(up.any() for _, up in factors.values()):
        console.info("a cycle has just begun: the adapter is still zero, and base/ is the whole model")
    rslora = lora.scaling == Scaling.rslora
    save_adapter(folder, snapshot.skeleton, factors, alpha=lora.alpha, rslora=rslora, base=final / "base")


def write_svd(source: Source, folder: Path, dtype: torch.dtype, *, rank: int | None, console: Console) -> None:
    """All that low-rank training has changed since start/, cut to a rank, as a PEFT adapter for start/.

    Dense parameters that changed come along whole. What the cut leaves out of each layer is printed.
    """
    snapshot, lora = source.snapshot, source.config.lora
    assert lora is not None
    rank = rank or lora.rank
    start = _start_of(source)
    factors: dict[str, Factors] = {}
    rows: list[tuple[str, float, float]] = []
    for name in snapshot.layers:
        delta = snapshot.weight(f"{name}.weight", merged=True) - start(f"{name}.weight").float()
        delta = delta.t() if snapshot.is_transposed(name) else delta
        down, up = truncated(delta, rank)
        rows.append((name, float(delta.norm()), float((delta - up @ down).norm())))
        factors[name] = down.to(dtype), up.to(dtype)
    changed = [name for name in snapshot.trained if not torch.equal(snapshot.tensor(name), start(name))]
    dense = {name: snapshot.tensor(name) for name in names_to_save(snapshot.skeleton, changed, snapshot.layers)}
    dense = {name: value.to(dtype) if value.is_floating_point() else value for name, value in dense.items()}
    base = (source.run_dir / "start").resolve()
    save_adapter(folder, snapshot.skeleton, factors, alpha=rank, rslora=False, base=base, dense=dense)
    _show(rows, rank, len(dense), console)


def _start_of(source: Source) -> Callable[[str], Tensor]:
    folder = source.run_dir / "start"
    weights = StartWeights(folder)

    def read(name: str) -> Tensor:
        try:
            return weights.read(name)
        except SafetensorError as error:
            raise ConfigError(f"{folder} is damaged: {error}") from error

    return read


def _show(rows: list[tuple[str, float, float]], rank: int, dense: int, console: Console) -> None:
    norm, rest = (math.hypot(*column) for column in ([row[1] for row in rows], [row[2] for row in rows]))
    rows = [*rows, ("all", norm, rest)]
    lines = [(name, size, left, left / size if size else 0.0) for name, size, left in rows]
    console.table(f"update since start/, cut to rank {rank}", ("layer", "norm", "left out", "share"), lines)
    if dense:
        console.info(f"{dense} dense tensors changed and are carried whole")
