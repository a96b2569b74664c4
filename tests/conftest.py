"""Fixtures for all tests, and libraries kept offline."""

import atexit
import gc
import os

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", WANDB_MODE="offline", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from parallel.runtime import Runtime, start
from tests.processes import Forker, Pool

atexit.register(gc.unfreeze)  # libraries complain at the end of what is never collected


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
def forker() -> Forker:
    """A process that others are started from without importing everything again."""
    serving = Forker()
    yield serving
    serving.close()


@pytest.fixture(scope="session")
def _pools():
    open_pools: dict[int, Pool] = {}
    yield open_pools
    for pool in open_pools.values():
        pool.close()


@pytest.fixture(scope="session")
def on_processes(forker, _pools):
    """Call function(runtime, *arguments) on `count` real processes; returns their results in order of ranks.

    The function must be at the top level of its test module; arguments and results must be picklable.
    """

    def call(function, count, *arguments, seconds=120.0):
        if count not in _pools:
            _pools[count] = Pool(forker, count)
        try:
            return _pools[count].call(function, arguments, seconds)
        except BaseException:
            _pools.pop(count).close()  # its processes may wait for each other for ever
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


@pytest.fixture(scope="session")
def tiny_in(runtime, corpus):
    """Overrides, for a folder, of a whole run that takes a second or two: a warm start and three cycles."""

    def words(folder):
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
            "training.peak_flops=1e12",  # left to itself each process measures it for half a second
            "relora.every=5",
            "relora.warm_start_steps=5",
            "schedule.warmup_steps=2",
            "schedule.restart_warmup_steps=2",
            "evaluation.every=10",
            "evaluation.sequences=8",
            "checkpoint.every=4",
            "optimizer.lr=0.01",
            f"run.dir={folder}",
        ]

    return words


@pytest.fixture
def tiny(tiny_in, tmp_path):
    """Those overrides, for the folder `run` of a test."""
    return tiny_in(tmp_path / "run")


@pytest.fixture(scope="session")
def tiny_words(tiny_in):
    """Those overrides but the folder."""
    return [word for word in tiny_in("") if not word.startswith("run.dir=")]


LONG = ["test_slurm.py", "test_submit.py", "test_elastic.py", "test_kill.py", "test_launch/test_processes.py",
        "test_launch/test_heads.py", "test_train.py", "test_parallel/test_heads.py", "test_stream_layouts.py",
        "test_layouts.py"]  # fmt: skip
"""Files of minutes, begun first: no worker of xdist has one of them left when the other is done."""


def pytest_configure(config: pytest.Config) -> None:
    """Keep xdist from beginning with the files of most tests, which are the quick ones."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put long files first."""
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: next((places[name] for name in LONG if str(item.path).endswith(name)), len(LONG)))
