"""What the processes of a supervised job look at before they build anything: whether all machines can do the same.

It runs within the job, for only there the machines are known, and costs seconds. What one machine lacks and others have
is blamed on it, so that the supervisor leaves it out; what all lack, the user must mend. What a single machine can
say of itself is the doctor's part (launch/examination.py).
"""

import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from socket import gethostname
from statistics import median
from typing import Any

from continual.sources import parse_sources
from launch.config import TrainConfig
from launch.environment import git_commit
from launch.examination import packages_of
from launch.jobs.attempt import NodeTrouble, folder_of
from launch.jobs.network import NO_PREFLIGHT
from parallel.bandwidth import round_trips, time_all_reduce
from parallel.collectives import barrier, broadcast_object, gather_objects
from parallel.runtime import Runtime, with_limit
from relora.errors import ConfigError

_LIMIT_SECONDS = 60.0
"""Of each exchange."""
_FILES_SECONDS = 30.0
"""Of a machine's look at files."""
_SETTLE_SECONDS = 10.0
"""After which a file that one machine has written must be seen by another: NFS keeps what it knows for a while."""
_CLOCK_SECONDS = 5.0
"""Torchrun takes a machine for lost whose clock is 15 s behind the others'."""
_LINK_SECONDS = 2.0
"""For 1 MiB there and back: slower than 1 MB/s."""
_MOST_FILES = 10_000


@dataclass(kw_only=True, slots=True)
class Sight:
    """What a process has seen; files are looked at by the first one of each machine."""

    host: str
    facts: dict[str, str]
    """What must be alike, by name."""
    data: dict[str, str] = field(default_factory=dict)
    """What is there of the run's files, by path."""
    folder: str | None = None
    """Why the run folder cannot be written to; None if it can."""


@dataclass(kw_only=True, slots=True)
class Trouble:
    """Something that some machines have otherwise than the first one."""

    hosts: list[str]
    what: str
    """The sentence that begins with `on HOST`."""
    way_out: str


def preflight(config: TrainConfig, folder: Path, runtime: Runtime, say: Callable[[str], None]) -> None:
    """Compare the machines of a supervised job of several processes; returns at once elsewhere.

    Collectives: on all processes alike.

    Raises:
        NodeTrouble: of one machine of several.
        ConfigError: of all others than the first, or of the job.
    """
    supervised = folder_of(os.environ) is not None and os.environ.get(NO_PREFLIGHT[0]) != NO_PREFLIGHT[1]
    if runtime.world_size == 1 or not broadcast_object(runtime, supervised):
        return
    began = time.perf_counter()
    brief = with_limit(runtime, _LIMIT_SECONDS)
    hosts = gather_objects(brief, gethostname())
    first = {host: hosts.index(host) for host in hosts}
    troubles = _files(config, folder, brief, first)
    offsets = _clock_offsets(brief, first)
    trips = round_trips(brief, [rank for rank in first.values() if rank])
    reduced = time_all_reduce(runtime, limit_seconds=_LIMIT_SECONDS)
    measured = broadcast_object(brief, (offsets, {hosts[rank]: seconds for rank, seconds in trips.items()}))
    troubles += _measured_troubles(*measured)
    if not all(gather_objects(brief, reduced is not None)):
        raise ConfigError(
            f"preflight: an all-reduce over all processes did not end within {_LIMIT_SECONDS:g} s: name the network "
            "device between machines by launcher.interface (ip -brief address shows them)"
        )
    _judge(troubles, list(first))
    room = broadcast_object(brief, _lack_of_room(folder) if runtime.is_main else "")
    if room:
        raise ConfigError(f"preflight: {room}")
    assert reduced is not None
    furthest = max(map(abs, measured[0].values()), default=0.0)
    say(
        f"preflight: {runtime.world_size} processes on {len(first)} machine{'s' if len(first) > 1 else ''} are alike, "
        f"clocks within {furthest:.3f} s, all-reduce of 1 MiB in {reduced * 1e3:.1f} ms; "
        f"{time.perf_counter() - began:.2f} s"
    )


def _files(config: TrainConfig, folder: Path, brief: Runtime, first: Mapping[str, int]) -> list[Trouble]:
    """Compare what processes run and which files machines see, with one written by each."""
    meeting = folder / ".preflight"
    word = secrets.token_hex(8)
    if brief.is_main:
        shutil.rmtree(meeting, ignore_errors=True)
        meeting.mkdir()
    word = broadcast_object(brief, word)
    host, leads = gethostname(), brief.process_rank in first.values()
    sights = gather_objects(brief, look(config, meeting, host, word, leads=leads))
    seen = broadcast_object(brief, _seen(meeting, word, first) if brief.is_main else None)
    if brief.is_main:
        shutil.rmtree(meeting, ignore_errors=True)
    return troubles_of(sights, seen, folder)


def look(config: TrainConfig, meeting: Path, host: str, word: str, *, leads: bool) -> Sight:
    """What this process sees; the first one of its machine leaves a word for process 0."""
    sight = Sight(host=host, facts=packages_of())
    if not leads:
        return sight
    sight.facts["the code of Accrete"] = git_commit() or "installed"
    found: dict[str, Any] = {}

    def files() -> None:
        try:
            (meeting / host).write_text(word, encoding="ascii")
        except OSError as error:
            found["folder"] = error.strerror or str(error)
        found["data"] = {path: _extent(Path(path).expanduser()) for path in _paths(config)}

    thread = threading.Thread(target=files, daemon=True)  # a file system that is gone may never answer
    thread.start()
    thread.join(_FILES_SECONDS)
    sight.data, sight.folder = found.get("data", {}), found.get("folder")
    if thread.is_alive():
        sight.folder = f"no answer within {_FILES_SECONDS:g} s"
    return sight


def troubles_of(sights: Sequence[Sight], seen: Sequence[str], folder: Path) -> list[Trouble]:
    """What machines have otherwise than the first one.

    Args:
        sights: of all processes.
        seen: the machines whose words process 0 has found in the run folder.
    """
    own = sights[0]
    found: dict[str, Trouble] = {}

    def note(key: str, sight: Sight, what: str, way_out: str) -> None:
        trouble = found.setdefault(key, Trouble(hosts=[], what=what, way_out=way_out))
        if sight.host not in trouble.hosts:
            trouble.hosts.append(sight.host)

    for sight in sights:
        for name, value in sight.facts.items():
            if value != own.facts[name]:
                what = f"{name} is {value}, but {own.facts[name]} on {own.host}"
                note(name, sight, what, "start all processes from one environment and one checkout")
        if sight.folder is not None:
            way_out = "name a folder by run.dir that all machines share and may write to"
            note("folder", sight, f"run.dir={folder} cannot be written to ({sight.folder})", way_out)
        elif "the code of Accrete" in sight.facts and sight.host not in seen:
            way_out = "name a folder by run.dir on a file system that all machines share"
            note("folder", sight, f"run.dir={folder} is another folder than on {own.host}", way_out)
        for path, extent in sight.data.items():
            if extent != own.data[path]:
                what = f"{path} is {extent}, but {own.data[path]} on {own.host}"
                note(path, sight, what, "let all machines read the same files, on a shared file system or as copies")
    return list(found.values())


def _measured_troubles(offsets: Mapping[str, float], trips: Mapping[str, float]) -> list[Trouble]:
    off = {host: seconds for host, seconds in offsets.items() if abs(seconds) > _CLOCK_SECONDS}
    slow = {host: seconds for host, seconds in trips.items() if seconds > _LINK_SECONDS}
    found = []
    if off:
        seconds = next(iter(off.values()))
        what = f"the clock is {abs(seconds):.1f} s {'ahead' if seconds > 0 else 'behind'}"
        found.append(Trouble(hosts=list(off), what=what, way_out="let chronyd or ntpd set the clock"))
    if slow:
        seconds = next(iter(slow.values()))
        what = f"1 MiB takes {seconds:.1f} s to process 0 and back, which should take no {_LINK_SECONDS:g} s"
        way_out = "see whether launcher.interface names the fast network, and whether the machine's link is up"
        found.append(Trouble(hosts=list(slow), what=what, way_out=way_out))
    return found


def _judge(troubles: Sequence[Trouble], hosts: Sequence[str]) -> None:
    """Raise the first trouble: it is a machine's own if another machine, beside the first, has it not."""
    if not troubles:
        return
    trouble = troubles[0]
    host = trouble.hosts[0]
    more = f" (and on {', '.join(trouble.hosts[1:])})" if len(trouble.hosts) > 1 else ""
    others = f"; {len(troubles) - 1} other findings" if len(troubles) > 1 else ""
    message = f"preflight: on {host}{more} {trouble.what}: {trouble.way_out}{others}"
    if len(trouble.hosts) < len(hosts) - 1:
        raise NodeTrouble(host, message)
    raise ConfigError(message)


def _paths(config: TrainConfig) -> list[str]:
    """What the run reads beside its own folder, as far as it may be named by a path."""
    data = config.data
    sources = [
        one for value in (data.path, data.validation_path) if value is not None for one in parse_sources(value, "")
    ]
    named = [*(source.path for source in sources), data.tokenizer, config.model.name_or_path]
    return list(dict.fromkeys(name for name in named if name))


def _extent(path: Path) -> str:
    """What is there, in words that are the same on all machines that see the same."""
    try:
        if path.is_dir():
            files = sorted(one for one in path.rglob("*") if one.is_file())[:_MOST_FILES]
        elif path.exists():
            files = [path]
        else:
            files = sorted(path.parent.glob(path.name)) if "*" in path.name and path.parent.is_dir() else []
        if not files:
            return "not there"
        with files[0].open("rb") as file:
            file.read(1)
        return f"{len(files)} file{'s' if len(files) > 1 else ''} of {sum(one.stat().st_size for one in files):,} bytes"
    except OSError as error:
        return f"not readable ({error.strerror})"


def _seen(meeting: Path, word: str, first: Mapping[str, int]) -> list[str]:
    """The machines whose word is there; others are waited for, since NFS takes its time."""
    deadline = time.monotonic() + _SETTLE_SECONDS
    while True:
        there = [host for host in first if _text(meeting / host) == word]
        if len(there) == len(first) or time.monotonic() > deadline:
            return there
        time.sleep(0.1)


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii")
    except OSError:
        return None


def _clock_offsets(brief: Runtime, first: Mapping[str, int]) -> dict[str, float]:
    """By how much each machine's clock is ahead of process 0's, as exact as processes leave a barrier together."""
    rounds = []
    for _ in range(3):
        barrier(brief)
        times = gather_objects(brief, time.time())
        rounds.append({host: times[rank] - times[0] for host, rank in first.items()})
    return {host: median(one[host] for one in rounds) for host in first}


def _lack_of_room(folder: Path) -> str:
    """Why the next checkpoint will not fit, whose size the newest one tells; empty if it will."""
    steps = sorted((folder / "checkpoints").glob("step_*"))
    size = sum(one.stat().st_size for one in steps[-1].rglob("*") if one.is_file()) if steps else 0
    free = shutil.disk_usage(folder).free
    if free >= size:
        return ""
    return (
        f"{free:,} bytes are free in {folder}, but the next checkpoint takes {size:,}, as {steps[-1].name} does: make "
        "room, or lower checkpoint.keep"
    )
