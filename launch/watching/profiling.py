"""`run.profile_steps`: torch's profiler over a few steps of a run, written to its folder.

The first steps of a process allocate, compile and open files; they are left out, and one more warms the profiler up.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from launch.training.run import Run

SKIPPED = 3
"""Steps before the profiled ones."""
_ROWS = 40


@contextmanager
def profiled(run: Run) -> Iterator[None]:
    """Profile the steps that are wanted of what runs within; a trace and a table for each process."""
    wanted, process_rank = run.config.run.profile_steps, run.runtime.process_rank
    if not wanted:
        yield
        return
    folder = run.folder.path / "profile"
    folder.mkdir(exist_ok=True)

    def write(found: Any) -> None:
        found.export_chrome_trace(str(folder / f"trace_{process_rank}.json.gz"))
        _write_table(found, folder / f"operations_{process_rank}.txt")
        run.watch.say(f"profile of {wanted} steps: {folder}")

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if run.runtime.device.type == "cuda" else [])]
    plan = schedule(skip_first=SKIPPED - 1, wait=0, warmup=1, active=wanted, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=write, profile_memory=True) as profiler:
        run.stepped = profiler.step
        try:
            yield
        finally:
            run.stepped = None


def _write_table(found: Any, path: Path) -> None:
    averages = found.key_averages()
    key = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    path.write_text(averages.table(sort_by=key, row_limit=_ROWS) + "\n", encoding="utf-8")
