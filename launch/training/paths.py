"""Which path each low-rank layer takes in a run: as configured, or by measurement with `lora.forward=auto`.

What was measured is kept in paths.json of data.cache, by machine and shape. What a run has once taken it keeps: the
choice is part of its state, so that a resumed run computes as before whatever the clock says now.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

from continual.data import open_cache
from launch.config import TrainConfig
from launch.environment import processor
from parallel.collectives import broadcast_object
from parallel.files import write_atomically
from parallel.runtime import Runtime
from relora.choice import LayerShape, candidates, fastest, measure, shape_of
from relora.convert import low_rank_modules
from relora.errors import ConfigError
from relora.kernels.setting import has_triton, run_on
from relora.paths import ForwardPath
from relora.quantised import BaseFormat

TABLE = "paths.json"


def check_device(config: TrainConfig, device: torch.device) -> None:
    """Rules about the device that a process trains on.

    Raises:
        ConfigError: kernels were asked for, and cannot run here.
    """
    if config.lora is None or config.lora.forward is not ForwardPath.fused or run_on(device):
        return
    missing = f"this process trains on the {device.type.upper()}" if has_triton() else "Triton is not installed"
    way_out = "" if has_triton() else "pip install 'accrete[triton]', or "
    raise ConfigError(
        f"lora.forward=fused needs Triton and a GPU, and {missing}: {way_out}choose lora.forward=addmm, which computes "
        "the same, or auto, which measures what can run"
    )


def take_paths(model: nn.Module, config: TrainConfig, runtime: Runtime, kept: Mapping[str, str]) -> dict[str, str]:
    """Give the model's low-rank layers their paths; returns what to keep: nothing, unless `auto` has chosen.

    The main process measures, for all: between processes of the tensor axis paths must not differ.

    Args:
        kept: what the run has taken so far, by layer.
    """
    if config.lora is None or config.lora.forward is not ForwardPath.auto:
        return {}
    layers = low_rank_modules(model)
    allowed = _allowed(config, runtime.device)
    mine = {name: kept[name] for name in layers if kept.get(name) in {path.value for path in allowed}}
    if runtime.is_main:
        share = config.microbatch(runtime.batch.size)
        tokens, updates = share * config.data.sequence_length, config.job_batch // runtime.batch.size // share
        shapes = {
            name: shape_of(layer, tokens=tokens, microbatches=updates)
            for name, layer in layers.items()
            if name not in mine
        }
        times = _times(set(shapes.values()), allowed, runtime.device, open_cache(config.data) / TABLE)
        mine |= {name: fastest(times[shape]).value for name, shape in shapes.items()}
    taken = broadcast_object(runtime, mine)
    for name, layer in layers.items():
        layer.path = ForwardPath(taken[name])
    return taken


def told(taken: Mapping[str, str]) -> str:
    """The choice in one line."""
    counts: dict[str, dict[str, int]] = {}
    for name, path in taken.items():
        of_path = counts.setdefault(path, {})
        leaf = name.rpartition(".")[2]
        of_path[leaf] = of_path.get(leaf, 0) + 1
    return "lora.forward=auto takes " + "; ".join(
        f"{path} for {', '.join(f'{count} {leaf}' for leaf, count in of_path.items())}"
        for path, of_path in counts.items()
    )


def _allowed(config: TrainConfig, device: torch.device) -> list[ForwardPath]:
    assert config.lora is not None
    may_form = config.parallel.zero_stage < 3 and config.lora.dropout == 0 and config.lora.base is BaseFormat.full
    return candidates(device, config.torch_dtype, may_form=may_form)


def _times(
    shapes: set[LayerShape], paths: list[ForwardPath], device: torch.device, table: Path
) -> dict[LayerShape, dict[ForwardPath, float]]:
    """Seconds of each path, from the table where it has them."""
    known = _read(table)
    place = known.setdefault(_machine(device), {})
    found = {}
    for shape in sorted(shapes, key=lambda one: one.key):
        row = place.get(shape.key, {})
        if any(path.value not in row for path in paths):
            row = {path.value: seconds for path, seconds in measure(shape, paths, device).items()}
            place[shape.key] = row
            with suppress(OSError):  # another run may write it, too, and it is only a memory
                write_atomically(table, json.dumps(known, indent=1) + "\n")
        found[shape] = {path: row[path.value] for path in paths}
    return found


def _read(table: Path) -> dict[str, dict[str, dict[str, float]]]:
    try:
        known = json.loads(table.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not there, or damaged
        return {}
    return known if isinstance(known, dict) else {}


def _machine(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    threads = "" if device.type == "cuda" else f", {torch.get_num_threads()} threads"
    return f"{name}{threads}, torch {torch.__version__}"
