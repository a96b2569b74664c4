"""The methods by their names in the configuration."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from continual.method import Method
from continual.methods.ewc import Ewc
from continual.methods.gs_lora import GsLora
from continual.methods.i_lora import ILora
from continual.methods.inflora import InfLora
from continual.methods.o_lora import OLora
from continual.methods.replay import Replay


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One method."""

    kind: type[Method]
    make: Callable[[Any], Method]
    """From the section `continual`."""
    sections: tuple[str, ...] = ()
    """Parts of the section that it reads."""
    low_rank: bool = False
    """Whether it works on factors only, so that lora=none is refused."""
    restarts: bool = True
    """Whether factors may be merged and drawn anew inside a task."""
    forgets: bool = False
    """Whether it serves requests to forget."""
    heads: bool = False
    """Whether LTE's heads may train a task apart, each with factors of its own."""

    @property
    def folds(self) -> bool:
        """Whether base weights take up each task's update at its end."""
        return self.kind.folds

    @property
    def trains_down(self) -> bool:
        """Whether `down` trains."""
        return self.kind.trains_down


METHODS: dict[str, Entry] = {
    "sequential": Entry(kind=Method, make=lambda config: Method(), heads=True),
    "joint": Entry(kind=Method, make=lambda config: Method(), heads=True),
    "per_task": Entry(kind=Method, make=lambda config: Method()),
    "replay": Entry(kind=Replay, make=lambda config: Replay(config.replay), sections=("replay",), heads=True),
    "ewc": Entry(kind=Ewc, make=lambda config: Ewc(config.ewc), sections=("ewc",), restarts=False),
    "inflora": Entry(
        kind=InfLora, make=lambda config: InfLora(config.inflora), sections=("inflora",), low_rank=True, heads=True
    ),
    "i_lora": Entry(
        kind=ILora,
        make=lambda config: ILora(config.i_lora, config.replay),
        sections=("i_lora", "replay"),
        low_rank=True,
        restarts=False,
    ),
    "o_lora": Entry(
        kind=OLora, make=lambda config: OLora(config.o_lora), sections=("o_lora",), low_rank=True, restarts=False
    ),
    "gs_lora": Entry(
        kind=GsLora,
        make=lambda config: GsLora(config.gs_lora),
        sections=("gs_lora",),
        low_rank=True,
        restarts=False,
        forgets=True,
    ),
}
"""`joint` trains on all tasks at once, `per_task` on each from the stream's start: what they do is in the stages."""
