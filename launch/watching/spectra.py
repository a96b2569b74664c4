"""Measures at restarts and syncs how many directions the training has used: the singular values of W - W_start.

W_start lies in the run's start/ folder and is read one matrix at a time, so memory stays small. The model
is not changed. What the numbers mean is in relora/spectrum.py.
"""

import json
from collections.abc import Callable, Iterable
from itertools import zip_longest
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from launch.watching.records import Record, append_records
from parallel.collectives import gather_objects
from parallel.runtime import Runtime
from relora.convert import low_rank_modules
from relora.errors import ConfigError
from relora.linear import LowRankLinear
from relora.spectrum import effective_rank, numerical_rank, singular_values

KEPT_VALUES = 512


class Spectra:
    """Appends one line per low-rank layer to spectra.jsonl whenever it is asked to."""

    def __init__(self, start_folder: Path, run_dir: Path, choice: str) -> None:
        self._start_folder = start_folder
        self._path = run_dir / "spectra.jsonl"
        self._choice = choice

    def modules(self, model: nn.Module) -> list[str]:
        """The low-rank layers that are measured."""
        return select_modules(low_rank_modules(model), self._choice)

    @torch.no_grad()
    def measure(
        self,
        model: nn.Module,
        weight_of: Callable[[LowRankLinear], Tensor],
        runtime: Runtime,
        *,
        step: int,
        merges: int,
    ) -> None:
        """Decompose the update of every selected layer so far; each process takes its turn, the main one writes.

        `merges` counts restarts and syncs; `weight_of` gives a layer's whole weight with its delta in fp32. All
        processes ask it for the same layers.

        Raises: ConfigError when start/ does not hold the layer's first weight.
        """
        layers = low_rank_modules(model)
        start = StartWeights(self._start_folder)
        mine: list[Record] = []
        for number, name in enumerate(self.modules(model)):
            now = weight_of(layers[name])
            if number % runtime.world_size == runtime.process_rank:
                measured = _measure(layers[name], now, start.read(f"{name}.weight"), merges)
                mine.append({"step": step, "restart": merges, "module": name, **measured})
        by_process = [iter(records) for records in gather_objects(runtime, mine)]
        in_order = [record for turn in zip_longest(*by_process) for record in turn if record is not None]
        if runtime.is_main:
            append_records(self._path, *in_order)


class StartWeights:
    """Lazy access to the tensors of a Hugging Face folder, in one safetensors file or several."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        index = folder / "model.safetensors.index.json"
        self._files: dict[str, str] | None = None
        if index.exists():
            self._files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]

    def read(self, name: str) -> Tensor:
        """One tensor as it is stored.

        Raises: ConfigError when it is not there.
        """
        file = "model.safetensors" if self._files is None else self._files.get(name)
        if file is not None and (self._folder / file).exists():
            with safe_open(self._folder / file, framework="pt") as tensors:
                stored: list[str] = tensors.keys()
                if name in stored:
                    tensor: Tensor = tensors.get_tensor(name)
                    return tensor
        raise ConfigError(
            f"{self._folder} does not hold {name}, which low-rank training began from: restore the folder (or train "
            "on with evaluation.spectra=none)"
        )


def select_modules(names: Iterable[str], choice: str) -> list[str]:
    """`all` names, none, or as a `sample` those in the first, middle and last layer of each stack of layers.

    A layer's number is the first number in a dotted name, and what stands before it names the stack.
    """
    names = list(names)
    if choice != "sample":
        return names if choice == "all" else []
    stacks: dict[str, set[int]] = {}
    for stack, number in filter(None, map(_layer_of, names)):
        stacks.setdefault(stack, set()).add(number)
    wanted = set()
    for stack, numbers in stacks.items():
        ordered = sorted(numbers)
        wanted |= {(stack, ordered[place]) for place in (0, len(ordered) // 2, -1)}
    return [name for name in names if _layer_of(name) in wanted] if stacks else names


def _layer_of(name: str) -> tuple[str, int] | None:
    parts = name.split(".")
    for place, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[:place]), int(part)
    return None


def _measure(layer: LowRankLinear, now: Tensor, start: Tensor, merges: int) -> Record:
    before = start.to(now.device, torch.float32)
    now, before = (now.t(), before.t()) if layer.transposed else (now, before)
    delta = now - before
    values = singular_values(delta)
    if layer.quantised is not None:
        eps = layer.quantised.eps
    else:
        eps = torch.finfo(torch.float32 if layer.extra_bits is not None else layer.weight.dtype).eps
    return {
        "shape": list(delta.shape),
        "singular_values": [float(f"{value:.6g}") for value in values[:KEPT_VALUES].tolist()],
        "effective_rank": effective_rank(values),
        "numerical_rank": numerical_rank(values, float(torch.linalg.matrix_norm(now)), merges, eps),
        "update_ratio": float(torch.linalg.matrix_norm(delta) / torch.linalg.matrix_norm(before)),
    }
