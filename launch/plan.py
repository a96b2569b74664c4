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
from launch.comparison import outlooks
from launch.config import TrainConfig, load
from launch.console import make_console
from launch.model import model_config
from launch.plan_tables import figures, show
from launch.usage import asks_for_help, field_docs
from relora.errors import ConfigError

_Number = TypeVar("_Number", int, float)
_HELP = """\
usage: accrete plan [group=option ...] [section.key=value ...] [plan.key=value ...]

Prints what a run would need: parameters; memory of each process by kind, in the low-rank phase and at full rank;
FLOPs and bytes sent of a step and of a restart; and how memory changes with ZeRO stage, tensor degree and number of
processes. Takes the words of `accrete train`, trains nothing and needs no GPU. docs/plan.md tells more.

  accrete plan experiment=relora_llama_7b parallel=zero2 plan.processes=8 plan.gpu_memory=80
"""


@dataclass(kw_only=True, slots=True)
class PlanConfig:
    """The words of the command."""

    processes: int | None = None
    """Number of processes, one for each GPU; default: parallel.tensor."""
    gpu_memory: float | None = None
    """GiB of a GPU: says whether the run fits, and which layouts would."""
    json: Path | None = None
    """File for the same figures, in bytes; `--json FILE` means the same."""

    def __post_init__(self) -> None:
        if self.processes is not None and self.processes < 1:
            raise ConfigError(f"plan.processes must be at least 1, got {self.processes}")
        if self.gpu_memory is not None and not 0 < self.gpu_memory < float("inf"):
            raise ConfigError(f"plan.gpu_memory must be above 0 GiB, got {self.gpu_memory}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command `plan`; returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if asks_for_help(words):
        print(_HELP)
        for key, meaning in field_docs(PlanConfig).items():
            print(textwrap.fill(f"  plan.{key:<14}{meaning}", 110, subsequent_indent=" " * 21))
        return exits.DONE
    return exits.run(lambda: _command(words))


def _command(words: Sequence[str]) -> int:
    own, overrides = parse(words)
    config = load(overrides)
    if config.lte is not None:
        raise ConfigError("plan does not know lte yet: plan one head by lte=none, with its processes and its batch")
    hf_config = model_config(config.model, vocab_size=_vocabulary(config), sequence_length=config.data.sequence_length)
    phases = outlooks(config, hf_config, own.processes or config.parallel.tensor)
    show(make_console(enabled=True), config, phases, own.gpu_memory)
    if own.json is not None:
        try:
            own.json.write_text(json.dumps(figures(phases), indent=2) + "\n", encoding="utf-8")
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
