"""`plan`: what a training command would need and move, before it waits in a queue.

Nothing is trained and no GPU is needed. docs/plan.md tells where the figures come from and how far they hold.
"""

import difflib
import json
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from continual.tokenizer import BYTES, bpe_vocabulary, byte_tokenizer, encoder_of, load_tokenizer
from launch import exits
from launch.config import TrainConfig, load
from launch.models.model import model_config
from launch.planning.comparison import outlooks
from launch.planning.plan_links import study
from launch.planning.plan_tables import figures, show, show_links
from launch.planning.skeleton import Skeletons
from launch.usage import asks_for_help, field_docs
from launch.watching.console import make_console
from parallel.link_model import Link
from relora.errors import ConfigError
from relora.paths import ForwardPath

_Number = TypeVar("_Number", int, float)
_UNITS = {"gpu_memory": "GiB", "link_bandwidth": "Gbit/s", "gpu_flops": "TFLOP/s", "step_seconds": "s"}
_GPU_FLOPS = 150.0  # TFLOP/s: about half of an A100's peak in bf16
_OF_LTE = ("link_bandwidth", "gpu_flops", "step_seconds")
_HELP = """\
usage: accrete plan [group=option ...] [section.key=value ...] [plan.key=value ...]

Prints what a run would need: parameters; memory of each process by kind, in the low-rank phase and at full rank;
FLOPs and bytes sent of a step and of a restart; and how memory changes with ZeRO stage, tensor degree and number of
processes. With lte=heads also what a sync costs, and step time, idle share and bytes on links from NVLink to the
internet, beside DiLoCo and DDP. Takes the words of `accrete train`, trains nothing and needs no GPU. docs/plan.md tells
more.

  accrete plan experiment=relora_llama_7b parallel=zero2 plan.processes=8 plan.gpu_memory=80
  accrete plan experiment=relora_llama_1b lte=heads lte.heads=8 plan.link_bandwidth=1 plan.link_latency=30
"""


@dataclass(kw_only=True, slots=True)
class PlanConfig:
    """The words of the command."""

    processes: int | None = None
    """Number of processes, one for each GPU; default: parallel.tensor, with lte times lte.heads."""
    gpu_memory: float | None = None
    """GiB of a GPU: says whether the run fits, and which layouts would."""
    link_bandwidth: float | None = None
    """Gbit/s, each way, of the link that joins a head of LTE to the others; says where LTE is faster than DDP."""
    link_latency: float | None = None
    """Milliseconds that a message takes from head to head, one way (half of what ping says); default: 0."""
    gpu_flops: float | None = None
    """TFLOP/s that a process reaches in training (its MFU times its peak), for times with lte; default: 150."""
    step_seconds: float | None = None
    """In place of plan.gpu_flops: seconds of a step, measured, without waiting for other heads."""
    json: Path | None = None
    """File for the same figures, in bytes; `--json FILE` means the same."""

    def __post_init__(self) -> None:
        if self.processes is not None and self.processes < 1:
            raise ConfigError(f"plan.processes must be at least 1, got {self.processes}")
        for key, unit in _UNITS.items():
            value = getattr(self, key)
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"plan.{key} must be above 0 {unit}, got {value}")
        if self.link_latency is not None and not 0 <= self.link_latency < float("inf"):
            raise ConfigError(f"plan.link_latency must be 0 ms or more, got {self.link_latency}")
        if self.link_latency is not None and self.link_bandwidth is None:
            raise ConfigError("plan.link_latency has no effect without plan.link_bandwidth: set that, too")
        if self.gpu_flops is not None and self.step_seconds is not None:
            raise ConfigError("plan.gpu_flops has no effect with plan.step_seconds: leave out one of the two")

    @property
    def link(self) -> Link | None:
        """The link that was asked for."""
        if self.link_bandwidth is None:
            return None
        return Link(bandwidth=self.link_bandwidth * 1e9 / 8, latency=(self.link_latency or 0.0) / 1000)


def main(argv: Sequence[str] | None = None) -> int:
    """The command `plan`; returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if asks_for_help(words):
        print(_HELP)
        for key, meaning in field_docs(PlanConfig).items():
            print(textwrap.fill(f"  plan.{key:<16}{meaning}", 110, subsequent_indent=" " * 23))
        return exits.DONE
    return exits.run(lambda: _command(words))


def _command(words: Sequence[str]) -> int:
    own, overrides = parse(words)
    config = load(overrides)
    if config.continual is not None:
        raise ConfigError(
            "plan knows runs of one task: a stream needs the memory of its method, too. Plan one task with "
            "continual=none and training.steps"
        )
    if config.lte is None:
        for key in _OF_LTE:
            if getattr(own, key) is not None:
                raise ConfigError(f"plan.{key} has no effect without heads: choose lte=heads")
    hf_config = model_config(config.model, vocab_size=_vocabulary(config), sequence_length=config.data.sequence_length)
    skeletons = Skeletons(config, hf_config)
    phases = outlooks(config, skeletons, own.processes or config.heads * config.parallel.tensor)
    console = make_console(enabled=True)
    show(console, config, phases, own.gpu_memory)
    if config.lora is not None and config.lora.forward is ForwardPath.auto:
        console.info("lora.forward=auto measures when a run starts; it is planned as addmm")
    told = figures(phases)
    if config.lte is not None:
        links = study(
            config,
            skeletons,
            phases[0].cost,
            link=own.link,
            gpu_flops=(own.gpu_flops or _GPU_FLOPS) * 1e12,
            step_seconds=own.step_seconds,
        )
        show_links(console, config.lte, links)
        told["links"] = links.figures()
    if own.json is not None:
        try:
            own.json.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"plan.json={own.json} cannot be written: {error.strerror}") from error
    return exits.DONE


def parse(words: Sequence[str]) -> tuple[PlanConfig, list[str]]:
    """The command's own words, checked, and the others, which are `train`'s.

    Raises:
        ConfigError: a word of its own that is unknown or has no such value.
    """
    own: dict[str, str] = {}
    others: list[str] = []
    left = iter(words)
    for word in left:
        key, _, value = word.partition("=")
        if key == "--json":
            key, value = "plan.json", value or next(left, "")
        if not key.startswith("plan."):
            others.append(word)
            continue
        keys = [f"plan.{name}" for name in field_docs(PlanConfig)]
        if key not in keys:
            near = difflib.get_close_matches(key, keys, n=1)
            raise ConfigError(f"unknown key {key}: " + (f"did you mean {near[0]}?" if near else ", ".join(keys)))
        if not value:
            raise ConfigError(f"{key} needs a value: write {key}=VALUE")
        own[key.removeprefix("plan.")] = value
    path = own.get("json")
    config = PlanConfig(
        processes=_number("processes", own, int),
        gpu_memory=_number("gpu_memory", own, float),
        link_bandwidth=_number("link_bandwidth", own, float),
        link_latency=_number("link_latency", own, float),
        gpu_flops=_number("gpu_flops", own, float),
        step_seconds=_number("step_seconds", own, float),
        json=None if path is None else Path(path).expanduser(),
    )
    return config, others


def _number(key: str, given: dict[str, str], kind: type[_Number]) -> _Number | None:
    if key not in given:
        return None
    try:
        return kind(given[key])
    except ValueError:
        raise ConfigError(f"plan.{key} must be a{' whole' if kind is int else ''} number, got {given[key]!r}") from None


def _vocabulary(config: TrainConfig) -> int:
    """Size of the vocabulary that the data brings; 0 when the model's configuration names its own."""
    values = config.model.config
    if config.model.name_or_path is not None or not isinstance(values, dict) or values.get("vocab_size") is not None:
        return 0
    name = config.data.tokenizer
    tokenizer = byte_tokenizer() if name == BYTES else None
    return bpe_vocabulary(name) or encoder_of(tokenizer or load_tokenizer(name), name).vocab_size


if __name__ == "__main__":
    sys.exit(main())
