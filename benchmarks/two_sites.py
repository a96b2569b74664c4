"""One model trained on two sites that a slow link joins: gradients summed over it in every step, or heads that sync.

A site is a network namespace on this machine with one process; the link between them is throttled to what is asked
for. Bytes are those that the kernel counts on a site's device, beside those that the run counts. Where namespaces are
not permitted, both processes talk over the loopback, unthrottled, and the results say so.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import IO, Any

import torch

from benchmarks.namespaces import DEVICE, PORT, Link, Sites, sites
from benchmarks.outcome import Document, document, markdown, write_document
from benchmarks.parallel_traffic import ALL_REDUCE, ring
from benchmarks.quality_methods import trainable_parameters
from benchmarks.runs import RunFailed
from launch import exits
from launch.reports.history import read_history
from launch.watching.readings import amount
from relora.errors import ConfigError

_FP32 = 4
_MEGABIT = 1e6 / 8


@dataclass(kw_only=True, slots=True, frozen=True)
class Study:
    """What is trained for how long, over which link."""

    steps: int
    turns: int
    """How often each method runs; they take turns."""
    megabits: float
    """Per second, each way."""
    latency: float
    """Seconds, one way."""
    rank: int
    every: int
    """Steps between syncs."""
    overrides: tuple[str, ...]


FULL = Study(
    steps=60,
    turns=2,
    megabits=20,
    latency=0.02,
    rank=8,
    every=10,
    overrides=(
        "model.config.hidden_size=128",
        "model.config.num_attention_heads=4",
        "model.config.intermediate_size=344",
        "model.config.initializer_range=0.088",
        "data.sequence_length=64",
        "training.global_batch_size=16",
        "schedule.warmup_steps=10",
        "evaluation.sequences=64",
    ),
)
QUICK = replace(
    FULL,
    steps=4,
    turns=2,
    megabits=100,
    latency=0.002,
    rank=2,
    every=2,
    overrides=(
        "model.config.hidden_size=32",
        "model.config.num_attention_heads=4",
        "model.config.intermediate_size=88",
        "data.sequence_length=64",
        "training.global_batch_size=4",
        "schedule.warmup_steps=2",
        "evaluation.sequences=8",
    ),
)
_ALWAYS = (
    "training.skip_sigma=0",
    "training.threads=1",
    "evaluation.every=0",
    "evaluation.spectra=none",
    "checkpoint.every=0",
    "run.save_start=false",
    "run.save_final=false",
)


def methods(study: Study) -> dict[str, tuple[str, ...]]:
    """What is compared, and its settings."""
    low_rank = (f"lora.rank={study.rank}", f"lora.alpha={2 * study.rank}", "optimizer.lr=0.008")
    heads = ("lte=heads", "lte.heads=2", f"lte.sync_every={study.every}")
    outer = ("lte.outer=nesterov", "lte.outer_lr=0.7", "lte.outer_momentum=0.9")
    cycles = ("relora.warm_start_steps=0", f"relora.every={study.steps // 2}", "schedule.restart_warmup_steps=1")
    return {
        "full rank, DDP": ("lora=none", "optimizer.lr=0.002"),
        "ReLoRA, DDP": (*low_rank, *cycles),
        "LTE, reset none": (*low_rank, *heads),
        "LTE, reset factors": (*low_rank, *heads, "lte.reset=factors"),
        "DiLoCo": ("lora=none", "optimizer.lr=0.002", *heads, *outer),
    }


class Place:
    """Where the processes of two sites run: in namespaces, or over the loopback if there are none."""

    def __init__(self, joined: Sites | None) -> None:
        self._joined = joined

    def start(self, site: int, command: Sequence[str], log: IO[str]) -> "subprocess.Popen[Any]":
        """Start a site's process, as a launcher of one process for each of two machines would."""
        ranks = {"RANK": str(site), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        around = {**ranks, "OMP_NUM_THREADS": "1"}
        if self._joined is not None:
            return self._joined.start(site, command, env=around, stdout=log, stderr=subprocess.STDOUT)
        nearby = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(PORT)}
        return subprocess.Popen(command, env={**os.environ, **nearby, **around}, stdout=log, stderr=subprocess.STDOUT)

    def sent(self) -> float | None:
        """Bytes that a site has sent, by the kernel's count for its device, headers included; the mean of both."""
        if self._joined is None:
            return None
        tables = [
            self._joined.run(site, ["cat", "/proc/net/dev"], stdout=subprocess.PIPE, text=True).stdout
            for site in (0, 1)
        ]
        return fmean(device_sent(table, DEVICE) for table in tables)


def device_sent(table: str, device: str) -> int:
    """Bytes that a device has sent, by what Linux tells in /proc/net/dev."""
    counts = dict(line.split(":") for line in table.splitlines() if ":" in line)
    return int({name.strip(): values for name, values in counts.items()}[device].split()[8])


@contextmanager
def two_sites(study: Study) -> Iterator[tuple[Place, str]]:
    """Within it there are two sites, and a sentence about what joins them."""
    link = Link(bandwidth=study.megabits * _MEGABIT, latency=study.latency)
    with ExitStack() as stack:
        try:
            joined = stack.enter_context(sites([link, link]))
        except ConfigError as error:
            yield Place(None), f"the loopback, not throttled, and its bytes not counted: {error}"
            return
        yield Place(joined), f"{study.megabits:g} Mbit/s each way, {1000 * study.latency:g} ms one way"


def train(place: Place, overrides: Sequence[str], folder: Path) -> dict[str, Any]:
    """Train on both sites; what came of it, and the bytes that a site sent from start to end.

    Raises:
        RunFailed: a process ended with an error.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "launch.train", *overrides, f"run.dir={folder}"]
    before = place.sent()
    logs = [folder.with_name(f"{folder.name}-site_{site}.log") for site in (0, 1)]
    with ExitStack() as stack:
        files = [stack.enter_context(log.open("w", encoding="utf-8")) for log in logs]
        processes = [place.start(site, command, file) for site, file in enumerate(files)]
        codes = [process.wait() for process in processes]
    if any(codes):
        raise RunFailed(f"{folder} ended with exit codes {codes}: see {logs[0]} and {logs[1]}")
    after = place.sent()
    summary = read_history(folder).summary
    told = {
        key: summary[key]
        for key in ("val_loss", "tokens", "tokens_per_second", "wall_seconds", "bytes_sent", "sync_share")
    }
    return told | {"sent": None if before is None or after is None else after - before}


def measure(study: Study, place: Place, runs: Path) -> list[dict[str, Any]]:
    """A row for each method: its runs, in turns with the others, and one without any step."""
    base = ("model=llama_tiny", *study.overrides, *_ALWAYS)
    chosen = methods(study)
    runs_of: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen}
    idle = {}
    for turn in range(study.turns + 1):
        steps = study.steps if turn else 0
        for number, (name, words) in enumerate(chosen.items()):
            overrides = (*base, f"training.steps={steps}", *words)
            outcome = train(place, overrides, runs / f"method_{number}-turn_{turn}")
            told = f"{outcome['wall_seconds']:.0f} s of training, loss {outcome['val_loss']:.4f}"
            print(f"[turn {turn}/{study.turns}] {name}: {told}", flush=True)
            if turn:
                runs_of[name].append(outcome)
            else:
                idle[name] = outcome["sent"]
    return [_row(study, name, (*base, *chosen[name]), runs_of[name], idle[name]) for name in chosen]


def _row(
    study: Study, name: str, overrides: Sequence[str], turns: Sequence[dict[str, Any]], idle: float | None
) -> dict[str, Any]:
    summed = "lte=heads" not in overrides
    gradients = study.steps * ring(ALL_REDUCE, _FP32 * trainable_parameters(overrides), 2) if summed else 0
    speeds = [turn["tokens_per_second"] for turn in turns]
    sent = [turn["sent"] for turn in turns if turn["sent"] is not None]
    return {
        "method": name,
        "tokens": turns[0]["tokens"],
        "val_loss": turns[0]["val_loss"],
        "tokens_per_second": median(speeds),
        "slowest": min(speeds),
        "fastest": max(speeds),
        "sync_share": None if summed else median(turn["sync_share"] for turn in turns),
        "counted": gradients or turns[0]["bytes_sent"],
        "sent": median(sent) if sent else None,
        "sent_without_training": idle,
        "turns": list(turns),
    }


def tables(study: Document) -> str:
    """The rows as Markdown."""
    first = study["rows"][0]
    lines = []
    for row in study["rows"]:
        trained = None if row["sent"] is None else row["sent"] - row["sent_without_training"]
        lines.append(
            [
                row["method"],
                f"{row['tokens_per_second']:,.0f}",
                f"{row['tokens_per_second'] / first['tokens_per_second']:.1f}",
                "" if row["sync_share"] is None else f"{row['sync_share']:.0%}",
                f"{row['val_loss']:.3f}",
                amount(row["counted"], "B"),
                "-" if trained is None else amount(trained, "B"),
                "-" if trained is None else f"{trained / row['counted']:.3f}",
            ]
        )
    headers = ["method", "tokens/s", "of DDP's", "in syncs", "loss", "counted", "on the link", "ratio"]
    return markdown(headers, lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    summary = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.two_sites", description=summary)
    parser.add_argument("--quick", action="store_true", help="a minute's worth that only shows that it works")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    options = parser.parse_args(argv)
    return exits.run(lambda: _command(QUICK if options.quick else FULL, options.json))


def _command(study: Study, json: Path | None) -> int:
    with tempfile.TemporaryDirectory() as runs, two_sites(study) as (place, link):
        print(f"link: {link}", flush=True)
        rows = measure(study, place, Path(runs))
    outcome = document("two_sites", torch.device("cpu"), settings=asdict(study), link=link, rows=rows)
    print(tables(outcome))
    if json:
        write_document(json, outcome)
    return exits.DONE


if __name__ == "__main__":
    sys.exit(main())
