"""Values in words: what a progress line shows of a record, in few characters."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any


def amount(value: float, unit: str = "") -> str:
    """A quantity in about three digits with a decimal prefix: 12345 -> 12.3k."""
    prefix, scaled = "", float(value)
    for larger in "kMGTPE":
        if abs(scaled) < 999.5:
            break
        prefix, scaled = larger, scaled / 1000
    digits = 2 if abs(scaled) < 9.995 else 1 if abs(scaled) < 99.95 else 0
    text = f"{scaled:.{digits}f}" if prefix else f"{scaled:.3g}"
    return f"{text} {prefix}{unit}" if unit else text + prefix


def duration(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss, and from two days on in days and hours."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24}d {hours % 24}h"
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def perplexity(loss: float) -> str:
    """The exponential of a loss in nats."""
    return f"{math.exp(loss):.4g}" if loss < 20 else "nan" if math.isnan(loss) else ">1e8"


def cell(value: object) -> str:
    """A table cell: thousands separated, six digits of a float, a dash for nothing."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


class Readings:
    """The latest values of a training loop, and the time that the rest of it will take."""

    def __init__(self, total_steps: int, start_step: int) -> None:
        self.total, self.step = total_steps, start_step
        self._first: tuple[int, float] | None = None
        self._now = 0.0
        self._record: dict[str, Any] = {}
        self._cycle: tuple[int, int | None] | None = None

    def update(self, step: int, record: Mapping[str, Any], cycle: int | None, cycles: int | None) -> None:
        """Take over what is new; what the record lacks stays as it was."""
        self.step, self._now = step, time.monotonic()
        if self._first is None:  # later ones only: the first step pays for warm-up and compilation
            self._first = step, self._now
        self._record.update({key: value for key, value in record.items() if value is not None})
        self._cycle = None if cycle is None else (cycle, cycles)

    @property
    def share(self) -> float:
        """What is done, from 0 to 1."""
        return self.step / self.total if self.total else 1.0

    @property
    def left(self) -> str:
        """Time left, or ? while nothing is known."""
        if self._first is None or self.step <= self._first[0]:
            return "?"
        pace = (self._now - self._first[1]) / (self.step - self._first[0])
        return duration(pace * (self.total - self.step))

    def numbers(self) -> list[str]:
        """Each known value with its name."""
        shown = []
        if self._cycle is not None:
            cycle, cycles = self._cycle
            shown.append(f"cycle {cycle + 1}" + (f"/{cycles}" if cycles is not None else ""))
        for key, words in _WORDS.items():
            value = self._record.get(key)
            if value is not None:
                shown.append(words(value))
        return shown


_WORDS: dict[str, Callable[[float], str]] = {
    "loss": lambda value: f"loss {value:.4f}  ppl {perplexity(value)}",
    "val_loss": lambda value: f"val {value:.4f}",
    "lr": lambda value: f"lr {value:.2e}",
    "tokens_per_second": lambda value: f"{amount(value)} tok/s",
    "mfu": lambda value: f"mfu {value:.1%}",
    "memory_bytes": lambda value: f"mem {amount(value, 'B')}",
}
