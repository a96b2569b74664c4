"""Step time, peak memory and bytes sent of ReLoRA on layouts of processes, beside full rank and beside the plan.

For each number of processes one set of them measures all layouts in turn. Plain python starts the sets itself; under
torchrun, srun, mpirun or deepspeed the processes that are there are the one set.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import device_here
from benchmarks.outcome import Document, document, write_document
from benchmarks.parallel_layouts import Shape, configured, entries
from benchmarks.parallel_tables import tables
from benchmarks.parallel_turns import measure
from launch import exits
from launch.config import CONF
from parallel.launchers import announced, own_words
from parallel.runtime import start
from parallel.watchdog import watched

_DEFAULT = {
    "model": "llama_tiny",
    "rank": 16,
    "batch": 8,
    "microbatch": 2,
    "sequence": 128,
    "dtype": "fp32",
    "persistence": 1000,
    "stages": [0, 1, 2, 3],
    "tensor": [1, 2],
    "repetitions": 7,
}
_QUICK = {"rank": 4, "batch": 4, "sequence": 32, "stages": [0, 3], "repetitions": 3}
_PROCESSES, _QUICK_PROCESSES = [1, 2, 4], [2]
_SET = "--set"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    words = own_words(sys.argv[1:] if argv is None else argv)
    options = _parser().parse_args(words)
    if options.quick:
        _fill(options, _QUICK)
    _fill(options, _DEFAULT)
    return exits.run(lambda: _command(options))


def _fill(options: argparse.Namespace, values: dict[str, Any]) -> None:
    vars(options).update({key: value for key, value in values.items() if getattr(options, key) is None})


def _command(options: argparse.Namespace) -> int:
    found = announced(os.environ)
    if options.set is not None or found.world_size > 1:
        study = _one_set(options)
        if study is None:
            return exits.DONE
        if options.set is not None:
            options.set.write_text(json.dumps(study), encoding="utf-8")
            return exits.DONE
        studies = [study]
    else:
        studies = []
        for count in _counts(options):
            _check(count, options)
        for count in _counts(options):
            code = _started(count, options, studies)
            if code != exits.DONE:
                return code
    outcome = results(options, studies)
    print(tables(outcome))
    if options.json:
        write_document(options.json, outcome)
    return exits.DONE


def _one_set(options: argparse.Namespace) -> dict[str, Any] | None:
    """What this process and its fellows measure; None on all but the main one."""
    torch.set_num_threads(options.threads)
    with start() as runtime, watched(runtime, explain=exits.explain):
        chosen = entries(runtime.world_size, stages=options.stages, tensor=options.tensor)
        return measure(chosen, _shape(options), runtime, repetitions=options.repetitions)


def _check(count: int, options: argparse.Namespace) -> None:
    """Refuse what no set of `count` processes can measure, before any is started.

    Raises:
        ConfigError: the shape makes no run on a layout.
    """
    shape = _shape(options)
    for entry in entries(count, stages=options.stages, tensor=options.tensor):
        config, _ = configured(entry, shape)
        config.training.microbatch(entry.layout.data)


def _started(count: int, options: argparse.Namespace, studies: list[dict[str, Any]]) -> int:
    """Start `count` processes and add what they measured; returns their exit code."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "set.json"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
        command = [*launcher, "-m", "benchmarks.parallel", *_words(options), _SET, str(file)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
        code = subprocess.run(command, check=False, env=environment).returncode
        if code == exits.DONE:
            studies.append(json.loads(file.read_text(encoding="utf-8")))
        return code


def _counts(options: argparse.Namespace) -> list[int]:
    """Numbers of processes: as asked for, else those that this machine has GPUs for."""
    if options.processes:
        return sorted(set(options.processes))
    usual = _QUICK_PROCESSES if options.quick else _PROCESSES
    gpus = torch.cuda.device_count()
    return [count for count in usual if count <= gpus] if gpus else usual


def results(options: argparse.Namespace, studies: Sequence[dict[str, Any]]) -> Document:
    """The document: a set of rows for each number of processes."""
    settings = {**asdict(_shape(options)), "threads": options.threads, "repetitions": options.repetitions}
    return document("parallel", device_here(), settings=settings, sets=list(studies))


def _shape(options: argparse.Namespace) -> Shape:
    return Shape(**{key: getattr(options, key) for key in Shape.__dataclass_fields__})


def _words(options: argparse.Namespace) -> list[str]:
    """The options that make the same set."""
    keys = [*_DEFAULT, "threads"]
    values = {key: getattr(options, key) for key in keys}
    return [
        word
        for key, value in values.items()
        for word in (f"--{key}", *map(str, value if isinstance(value, list) else [value]))
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parallel", description=(__doc__ or "").splitlines()[0])
    models = sorted(path.stem for path in (CONF / "model").glob("llama*.yaml"))
    parser.add_argument("--processes", type=int, nargs="+", metavar="N", help=f"default {_PROCESSES}, as GPUs allow")
    parser.add_argument("--model", choices=models, help=f"default {_DEFAULT['model']}")
    for name in ("rank", "batch", "microbatch", "sequence", "repetitions"):
        parser.add_argument(f"--{name}", type=int, help=f"default {_DEFAULT[name]}")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], help=f"default {_DEFAULT['dtype']}")
    parser.add_argument(
        "--persistence",
        type=int,
        help=f"parameters of so many entries stay whole at stage 3; default {_DEFAULT['persistence']}, "
        "for a small model; DeepSpeed's own is 100000",
    )
    parser.add_argument("--stages", type=int, nargs="+", choices=range(4), help="ZeRO stages; default all")
    parser.add_argument("--tensor", type=int, nargs="+", help=f"tensor degrees; default {_DEFAULT['tensor']}")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each process; default 1")
    parser.add_argument("--quick", action="store_true", help="few layouts of a small shape, within a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    parser.add_argument(_SET, type=Path, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
