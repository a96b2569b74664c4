"""The SLURM job script of a run: a pure function from settings to text that a reader can follow and sbatch can take.

What users name freely (paths, run names, values) stands in single quotes of the shell; what stands in #SBATCH lines,
which SLURM reads by rules of its own, is restricted by launch/jobs/launcher.py.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.jobs.launcher import SlurmConfig, Start
from launch.jobs.network import NO_PREFLIGHT, network_settings
from launch.jobs.supervise import HANG_SECONDS

_PORTS = "15000 + SLURM_JOB_ID % 15000"
"""Below Linux's ephemeral ports (32768), which other programs are given at random."""


def job_script(
    config: SlurmConfig,
    runs: Sequence[tuple[list[str], Path]],
    *,
    array: str | None,
    name: str,
    here: Path,
    python: str,
    interpreter: str,
    options: Sequence[str] = (),
) -> str:
    """The script; it must be submitted from the folder that its log belongs into.

    Args:
        runs: overrides of `accrete train`, run.dir among them, and the run folder; one, or with `array` any number.
        array: the numbers of an array's jobs, as SLURM writes them.
        here: where training runs, so that relative paths mean what they meant to the user.
        python: the interpreter of the training processes.
        interpreter: a Python for the supervisor, which needs no packages.
        options: further words for the supervisor.
    """
    parts = [
        "#!/bin/bash",
        *_header(config, name, array),
        "",
        f"cd -- {shlex.quote(str(here))} || exit",
        *_environment(config),
        "",
        *(_run(*runs[0]) if array is None else _of_array(runs)),
        *_meeting(config),
        f'exec {shlex.quote(interpreter)} -m launch.jobs.supervise --run-dir "$run" \\',
        f"  --attempts {config.attempts}{_hang(config)}{' --requeue' if config.requeue else ''} "
        f"{''.join(shlex.quote(word) + ' ' for word in options)}-- \\",
        *_command(config, shlex.quote(python)),
    ]
    return "\n".join(parts) + "\n"


def _hang(config: SlurmConfig) -> str:
    return "" if config.hang_seconds == HANG_SECONDS else f" --hang-seconds {config.hang_seconds:g}"


def meeting_script(config: SlurmConfig, *, name: str, here: Path, folder: Path, number: Path, python: str) -> str:
    """The script of the small job where elastic heads meet.

    Args:
        folder: the meeting point's.
        number: the file that will hold the number of the heads' job.
    """
    given = {option.removeprefix("--").partition("=")[0] for option in config.meeting}
    options: dict[str, str | int | None] = {
        "job-name": f"{_plain(name)}_meeting",
        "nodes": 1,
        "ntasks": 1,
        "partition": config.partition,
        "account": config.account,
        "qos": config.qos,
        "time": config.time,
        "signal": f"B:USR1@{_LAST_SECONDS}",
        "output": "meeting-%j.log",
        "open-mode": "append",
    }
    meet = [
        *(["srun --ntasks=1", *_container(config)] if config.container_image is not None else []),
        f"{shlex.quote(python)} -m launch.meet --folder {shlex.quote(str(folder))} --port 0",
        '  --name "$SLURMD_NODENAME" &',
    ]
    lines = [
        "#!/bin/bash",
        *_options({key: value for key, value in options.items() if key not in given}, config),
        *(f"#SBATCH {option}" for option in config.meeting),
        "",
        f"cd -- {shlex.quote(str(here))} || exit",
        *_modules(config),
        *_variables(config),
        "",
        *_continued(meet),
        "meet=$!",
    ]
    if config.requeue:
        lines += [
            "# All that counts is on disk. The command must outlive the end that SLURM has for this job's processes.",
            """trap '(trap "" TERM; exec scontrol requeue "$SLURM_JOB_ID") && sleep 60' USR1""",
        ]
    return "\n".join([*lines, _LOOKING.format(number=shlex.quote(str(number)))])


_LAST_SECONDS = 5
"""Before its time limit the meeting point lets heads that have the same limit leave in order."""
_LOOKING = """\
while kill -0 "$meet" 2>/dev/null; do
  sleep 30 &
  wait -n "$meet" "$!"
  # heads that were cancelled or given up leave nobody to meet
  left=$(squeue --noheader --format=%i --jobs="$(cat {number})" 2>/dev/null) && [ -z "$left" ] && kill "$meet"
done
wait "$meet"
"""


def _run(words: Sequence[str], run_dir: Path) -> list[str]:
    return [f"run={shlex.quote(str(run_dir))}", "words=(", *(f"  {shlex.quote(word)}" for word in words), ")"]


def _of_array(runs: Sequence[tuple[list[str], Path]]) -> list[str]:
    lines = ['case "$SLURM_ARRAY_TASK_ID" in']
    for number, (words, run_dir) in enumerate(runs):
        lines += [f"  {number})", *(f"    {line}" for line in _run(words, run_dir)), "    ;;"]
    return [*lines, "esac"]


def _header(config: SlurmConfig, name: str, array: str | None) -> list[str]:
    nodes = f"{config.least_nodes}-{config.nodes}" if config.least_nodes is not None else str(config.nodes)
    tasks = 1 if config.start is Start.torchrun else config.node_processes
    options: dict[str, str | int | None] = {
        "job-name": _plain(name),
        "nodes": nodes,
        "ntasks-per-node": tasks,
        "cpus-per-task": config.cpus_per_node and max(1, config.cpus_per_node // tasks),
        "gpus-per-node": config.gpus_per_node,
        "mem": config.memory,
        "partition": config.partition,
        "account": config.account,
        "qos": config.qos,
        "time": config.time,
        "constraint": config.constraint,
        "exclude": config.exclude,
        "array": array,
        "signal": f"B:USR1@{config.signal_seconds}",
        "output": "slurm-%j.log" if array is None else "slurm-%A_%a.log",
        "open-mode": "append",
    }
    return [*_options(options, config), *(f"#SBATCH {option}" for option in config.sbatch)]


def _options(options: Mapping[str, str | int | None], config: SlurmConfig) -> list[str]:
    lines = [f"#SBATCH --{option}={value}" for option, value in options.items() if value is not None]
    return [*lines, "#SBATCH --requeue" if config.requeue else "#SBATCH --no-requeue"]


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]", "_", name)


def _environment(config: SlurmConfig) -> list[str]:
    lines = _modules(config)
    if config.cpus_per_node is not None:
        lines.append('export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"  # srun does not take it from the job')
        threads = max(1, config.cpus_per_node // config.node_processes)
        lines.append(f"export OMP_NUM_THREADS={threads}  # the cores of a process")
    network = network_settings(
        interface=config.interface,
        infiniband=config.infiniband,
        gpus=config.gpus_per_node is not None,
        torchrun=config.start is Start.torchrun,
        grace_seconds=config.signal_seconds,
    )
    lines += [f"export {name}={shlex.quote(value)}  # {reason}" for name, value, reason in network]
    if not config.preflight:
        lines.append(f"export {'='.join(NO_PREFLIGHT)}  # launcher.preflight=false")
    return lines + _variables(config)


def _modules(config: SlurmConfig) -> list[str]:
    return [f"module load {shlex.quote(module)}" for module in config.modules] + config.setup


def _variables(config: SlurmConfig) -> list[str]:
    return [f"export {name}={shlex.quote(value)}" for name, value in (config.environment or {}).items()]


def _meeting(config: SlurmConfig) -> list[str]:
    if config.start is not Start.torchrun:
        return []
    return ['head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)', f"port=$(({_PORTS}))"]


def _command(config: SlurmConfig, python: str) -> list[str]:
    tasks = 1 if config.start is Start.torchrun else config.node_processes
    count = "SLURM_JOB_NUM_NODES" if tasks == 1 else f"((SLURM_JOB_NUM_NODES * {tasks}))"
    lines = [
        f'srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="${count}" --ntasks-per-node={tasks}',
        "--kill-on-bad-exit=1" + (" --mpi=pmix" if config.start is Start.pmix else ""),
        *_container(config),
    ]
    if config.start is Start.torchrun:
        lines += [
            f'{python} -m torch.distributed.run --nnodes="$SLURM_JOB_NUM_NODES"',
            f"--nproc-per-node={config.node_processes} --max-restarts=0",
            '--rdzv-backend=c10d --rdzv-endpoint="$head:$port" --rdzv-id="$SLURM_JOB_ID"',
            '-m launch.train "${words[@]}"',
        ]
    else:
        lines.append(f'{python} -m launch.train "${{words[@]}}"')
    return [f"  {line}" for line in _continued(lines)]


def _container(config: SlurmConfig) -> list[str]:
    """What srun is told of a container."""
    lines = []
    if config.container_image is not None:
        lines.append(f"--container-image={shlex.quote(config.container_image)}")
    if config.container_mounts:
        lines.append(f"--container-mounts={shlex.quote(','.join(config.container_mounts))}")
    return lines


def _continued(lines: Sequence[str]) -> list[str]:
    return [*(f"{line} \\" for line in lines[:-1]), lines[-1]]
