"""Fixtures for all tests, and libraries kept offline."""

import gc
import os

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", WANDB_MODE="offline", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import importlib.util
from pathlib import Path

import pytest

from parallel.runtime import Runtime, start


@pytest.fixture(scope="module", autouse=True)
def _imports_are_no_garbage() -> None:
    """Spare collections of garbage, of which DeepSpeed makes a dozen for each engine, all that is imported by now."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def runtime() -> Runtime:
    """The process group of one process, which every run in this process joins."""
    with start() as running:
        yield running


@pytest.fixture(scope="session")
def _pools():
    spec = importlib.util.spec_from_file_location("processes", Path(__file__).with_name("processes.py"))
    processes = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(processes)
    open_pools = {}
    yield processes.Pool, open_pools
    for pool in open_pools.values():
        pool.close()


@pytest.fixture
def on_processes(_pools):
    """Call function(runtime, *arguments) on `count` real processes; returns their results in order of ranks.

    The function must be at the top level of its test module; arguments and results must be picklable.
    """
    make, pools = _pools

    def call(function, count, *arguments, seconds=120.0):
        if count not in pools:
            pools[count] = make(count)
        try:
            return pools[count].call(function, arguments, seconds)
        except BaseException:
            pools.pop(count).close()  # its processes may wait for each other for ever
            raise

    return call


TEXT = "\n\n".join(
    f"Chapter {n}. The {n % 7}th ship carried {n * n} crates of tea to port {n % 13}, where {n} sailors slept."
    for n in range(400)
)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder of small text files, and a cache of their own."""
    folder = tmp_path_factory.mktemp("corpus")
    for index, part in enumerate(TEXT.split("\n\n")):
        (folder / f"{index:03d}.txt").write_text(part * 3, encoding="utf-8")
    return folder


@pytest.fixture
def tiny(runtime, corpus, tmp_path):
    """Overrides of a whole run that takes a second or two: a warm start and three cycles."""
    return [
        f"data.path=[{corpus}]",
        f"data.cache={corpus.parent / 'cache'}",
        "data.sequence_length=32",
        "data.validation_fraction=0.1",
        "model.config.hidden_size=32",
        "model.config.num_hidden_layers=2",
        "model.config.num_attention_heads=2",
        "model.config.intermediate_size=64",
        "lora.rank=4",
        "training.steps=20",
        "training.global_batch_size=4",
        "training.threads=1",
        "relora.every=5",
        "relora.warm_start_steps=5",
        "schedule.warmup_steps=2",
        "schedule.restart_warmup_steps=2",
        "evaluation.every=10",
        "evaluation.sequences=8",
        "checkpoint.every=4",
        "optimizer.lr=0.01",
        f"run.dir={tmp_path / 'run'}",
    ]
