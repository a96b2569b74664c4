"""A small run that is disturbed on purpose for half an hour, and must end to the last bit as an undisturbed one.

A script with a seed kills processes, launchers, supervisors and nodes, stops some, asks others to stop, and damages
checkpoints, at random moments: in steps, in saves, while the run starts. Whenever a run is done, it is compared and the
next one begins, until the time is over.
"""

import argparse
import importlib.util
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.outcome import Document, document, markdown, write_document
from benchmarks.page import write_tables
from benchmarks.soak_faults import HERE, LAUNCHER, Fault, Plan, of_cluster
from benchmarks.soak_run import ROOT, Cluster, LocalRun, Run, SlurmRun, SoakFailed, differences, numbers_of
from launch import exits

_START_SECONDS = 600.0
"""How long a run may need to get to its next step, or to come to an end."""
_ENVIRONMENT = f"launcher.environment={{PYTHONPATH: {ROOT}, OMP_NUM_THREADS: '1', DS_ACCELERATOR: cpu}}"


def words_of(folder: Path, steps: int) -> list[str]:
    """A run of two cycles and more on text that is made here."""
    text = folder / "text.txt"
    dice = random.Random(0)
    lines = [f"Ship {n} carried {dice.randrange(900)} crates of tea to port {dice.randrange(60)}." for n in range(4000)]
    text.write_text("\n".join(lines), encoding="utf-8")
    return [
        f"data.path=[{text}]",
        f"data.cache={folder / 'cache'}",
        "data.sequence_length=32",
        "data.validation_fraction=0.1",
        "model.config.hidden_size=32",
        "model.config.num_hidden_layers=2",
        "model.config.num_attention_heads=2",
        "model.config.intermediate_size=64",
        "lora.rank=4",
        "lora.dropout=0.1",
        f"training.steps={steps}",
        "training.global_batch_size=4",
        "training.threads=1",
        "parallel=zero2",
        "parallel.silence_seconds=5",
        "parallel.timeout_seconds=60",
        "relora.every=25",
        "relora.warm_start_steps=20",
        "schedule.warmup_steps=5",
        "schedule.restart_warmup_steps=2",
        "evaluation.every=20",
        "evaluation.sequences=8",
        "checkpoint.every=5",
        "optimizer.lr=0.003",
    ]


@dataclass(kw_only=True, slots=True)
class Tally:
    """What has happened so far."""

    faults: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    attempts: int = 0
    starts: int = 0
    repeated: int = 0
    steps: int = 0
    seconds: float = 0.0
    undisturbed_seconds: float = 0.0


def undisturbed(run: Run) -> tuple[dict[str, Any], float]:
    """The numbers of a run that nobody disturbs, and its seconds."""
    began = time.monotonic()
    if not run.wait(run.keep_going, seconds=2 * _START_SECONDS, pause=0.3):
        raise SoakFailed(f"the undisturbed run does not end: {run.said()}")
    return numbers_of(run.folder), time.monotonic() - began


def disturbed(run: Run, plan: Plan, tally: Tally, until: float) -> None:
    """Disturb a run until it is done, or the time is over; then let it end."""
    while not run.keep_going() and time.monotonic() < until:
        fault, steps, seconds = plan.next()
        if not _reach(run, steps, seconds):
            continue
        at, before = run.look(), (len(run.attempts), run.starts)
        if not fault.strike(run, plan.dice):
            continue
        tally.faults[fault.name] += 1
        print(f"{time.strftime('%H:%M:%S')} {run.folder.name}, step {at}: {fault.told}", flush=True)
        if not run.wait(partial(_follows, run, before), seconds=_START_SECONDS, pause=0.1):
            raise SoakFailed(f"nothing follows when {fault.told}: {run.said()}")
    if not run.wait(run.keep_going, seconds=2 * _START_SECONDS, pause=0.3):
        raise SoakFailed(f"{run.folder} does not come to its end: {run.said()}")


def _reach(run: Run, steps: int | None, seconds: float) -> bool:
    """Wait for a fault's moment; returns False if the run ended before."""
    if steps is not None:
        target = run.look() + steps
        if not run.wait(lambda: run.look() >= target or not run.supervisor(), seconds=_START_SECONDS, pause=0.005):
            raise SoakFailed(f"{run.folder} makes no step: {run.said()}")
    time.sleep(seconds)
    return bool(run.supervisor())


def _follows(run: Run, before: tuple[int, int]) -> bool:
    """Whether another attempt has begun, or the run is done."""
    return run.keep_going() or len(run.attempts) > before[0]


def soak(place: Path, arguments: argparse.Namespace, stack: ExitStack) -> Document:
    """Everything; the results."""
    words = words_of(place, arguments.steps)
    tally, faults = Tally(), [*HERE]
    cluster = _cluster(stack) if arguments.slurm else None
    launcher = [f"launcher={arguments.launcher}", "launcher.attempts=6", _ENVIRONMENT]
    if cluster is not None:
        faults = of_cluster(cluster)
        launcher = ["launcher=slurm", "launcher.nodes=2", "launcher.signal_seconds=60", *launcher[1:]]
    elif arguments.launcher != "local":
        launcher.append(f"launcher.processes={arguments.processes}")
        faults.append(LAUNCHER)

    def begin(name: str, *further: str) -> Run:
        if cluster is not None:
            run: Run = stack.enter_context(closing(SlurmRun(place / name, [*words, *further], launcher, cluster)))
        else:
            run = stack.enter_context(closing(LocalRun(place / name, [*words, *further], launcher)))
        return run

    expected, whole = undisturbed(begin("undisturbed"))
    print(f"undisturbed: {whole:.1f} s", flush=True)
    faults = [one for one in faults if not arguments.only or one.name in arguments.only]
    plan, began = Plan(faults, arguments.seed), time.monotonic()
    while time.monotonic() - began < arguments.seconds:
        run = begin(f"run_{tally.runs:03d}", f"checkpoint.asynchronous={str(tally.runs % 2 == 1).lower()}")
        disturbed(run, plan, tally, began + arguments.seconds)
        if unlike := differences(expected, numbers_of(run.folder)):
            raise SoakFailed(f"{run.folder} is not the undisturbed run: {'; '.join(unlike)}")
        tally.runs += 1
        tally.attempts += len(run.attempts)
        tally.starts += run.starts
        tally.repeated += run.repeated
        tally.steps += arguments.steps
        tally.undisturbed_seconds += whole
        print(f"{run.folder.name}: bitwise the undisturbed run, after {len(run.attempts)} attempts", flush=True)
    tally.seconds = time.monotonic() - began
    return _document(arguments, tally, faults)


def _cluster(stack: ExitStack) -> Cluster:
    """SLURM with three nodes on this machine, as the tests have it."""
    spec = importlib.util.spec_from_file_location("slurm_cluster", ROOT / "tests/slurm_cluster.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    cluster: Cluster = stack.enter_context(closing(module.Cluster(3)))
    return cluster


def _document(arguments: argparse.Namespace, tally: Tally, faults: Sequence[Fault]) -> Document:
    settings = {name: getattr(arguments, name) for name in ("seconds", "seed", "steps", "processes")}
    settings["launcher"] = "slurm" if arguments.slurm else arguments.launcher
    return document(
        "soak",
        torch.device("cpu"),
        settings=settings,
        faults=[{"name": one.name, "told": one.told, "count": tally.faults[one.name]} for one in faults],
        runs=tally.runs,
        attempts=tally.attempts,
        starts=tally.starts,
        steps=tally.steps,
        repeated=tally.repeated,
        seconds=round(tally.seconds, 1),
        undisturbed_seconds=round(tally.undisturbed_seconds, 1),
    )


def tables(results: Document) -> str:
    """Faults by kind, and what they cost."""
    settings, faults = results["settings"], results["faults"]
    lines = [[one["told"], str(one["count"])] for one in faults] + [["together", str(sum(f["count"] for f in faults))]]
    nodes = "2 of 3 SLURM nodes" if settings["launcher"] == "slurm" else f"{settings['processes']} processes"
    costs = [
        ["runs, each bitwise the undisturbed one in all records, spectra and weights", f"{results['runs']}"],
        ["attempts", f"{results['attempts']}"],
        ["of these begun by giving the command again", f"{results['starts'] - results['runs']}"],
        ["steps of these runs", f"{results['steps']:,}"],
        ["steps lost and done again", f"{results['repeated']:,}"],
        ["seconds", f"{results['seconds']:,.0f}"],
        ["seconds of as many undisturbed runs", f"{results['undisturbed_seconds']:,.0f}"],
    ]
    head = f"launcher={settings['launcher']}, {nodes}, seed {settings['seed']}"
    return f"{markdown(['fault (' + head + ')', 'survived'], lines)}\n\n{markdown(['', 'count'], costs)}"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    every = [*HERE, LAUNCHER]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=1800.0, help="how long faults are made")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=150, help="of each run")
    parser.add_argument("--launcher", choices=("local", "torchrun", "mpi"), default="torchrun")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", nargs="+", metavar="FAULT", help=f"of {', '.join(one.name for one in every)}")
    parser.add_argument("--slurm", action="store_true", help="two of three nodes of a SLURM cluster that is made here")
    parser.add_argument("--quick", action="store_true", help="a short run and few faults, under a minute")
    parser.add_argument("--folder", type=Path, help="keep runs and logs there")
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--page", type=Path, help="write the tables into that Markdown file")
    words = parser.parse_args(argv)
    if words.quick:
        words.seconds, words.steps, words.launcher, words.processes = 15.0, 60, "local", 1
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(exits.FAILED))  # what was started must not be left
    with ExitStack() as stack:
        place = words.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="soak")))
        place.mkdir(parents=True, exist_ok=True)
        try:
            results = soak(place.resolve(), words, stack)
        except SoakFailed as error:
            print(f"error: {error}", file=sys.stderr)
            return exits.FAILED
    print(tables(results))
    if words.json:
        write_document(words.json, results)
    if words.page:
        write_tables(words.page, title="Soak", tables=tables(results))
    return exits.DONE


if __name__ == "__main__":
    sys.exit(main())
