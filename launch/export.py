"""`export`: a checkpoint as a Hugging Face model, as a PEFT adapter with its base, or as an SVD of its update.

It reads files and needs no GPU, no engine and hardly any data; memory stays near two files of weights.
"""

import difflib
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TypeVar

import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError

from continual.folders import new_folder
from launch import exits
from launch.config import Dtype, to_typed
from launch.models.description import description_of
from launch.models.forms import Form, Source, check_form, write_adapter, write_model, write_svd
from launch.models.snapshot import Snapshot
from launch.training.course import make_method
from launch.usage import asks_for_help, field_docs
from launch.watching.console import Console, make_console
from parallel.checkpoint import Checkpoint, list_checkpoints, read_checkpoint
from parallel.files import is_disk_error, share
from parallel.parts import DamagedCheckpoint
from relora.errors import ConfigError

_Kind = TypeVar("_Kind", bound=Enum)
_HELP = """\
usage: accrete export run.dir=RUN [export.key=value ...]

Writes a checkpoint of RUN as a Hugging Face model or as a PEFT adapter. docs/export.md tells more.
"""


@dataclass(kw_only=True, slots=True)
class ExportConfig:
    """The words of the command."""

    checkpoint: str = "latest"
    """latest, best (by validation loss), the name of one of the run's checkpoints, or a checkpoint folder."""
    to: Form = Form.model
    """model: merged, as train writes final/; adapter: the factors of this cycle, and in base/ their base; svd: the
    whole update since start/ as an adapter for start/."""
    rank: int | None = None
    """svd only: its adapter rank; default: lora.rank."""
    out: Path | None = None
    """Folder to write, new or empty; default: RUN/export/CHECKPOINT-TO."""
    dtype: Dtype | None = None
    """fp32 or bf16; default: training.dtype, and fp32 for svd."""

    def __post_init__(self) -> None:
        if self.rank is not None and self.to is not Form.svd:
            raise ConfigError(f"export.rank={self.rank} has no effect with export.to={self.to.value}: leave it out")
        if self.rank is not None and self.rank < 1:
            raise ConfigError(f"export.rank must be at least 1, got {self.rank}")


_KEYS = ["run.dir", *(f"export.{name}" for name in field_docs(ExportConfig))]


def main(argv: Sequence[str] | None = None) -> int:
    """The command `export`; returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if asks_for_help(words) or not words:
        print(_HELP)
        for key, meaning in field_docs(ExportConfig).items():
            print(textwrap.fill(f"  export.{key:<14}{meaning}", 110, subsequent_indent=" " * 23))
        return exits.DONE if words else exits.REFUSED
    return exits.run(lambda: _command(words))


def _command(words: Sequence[str]) -> int:
    run_dir, config = parse(words)
    export(run_dir, config, make_console(enabled=True))
    return exits.DONE


def parse(words: Sequence[str]) -> tuple[Path, ExportConfig]:
    """The run folder and the checked words of a command line.

    Raises: ConfigError
    """
    given: dict[str, str] = {}
    for word in words:
        key, _, value = word.partition("=")
        if key not in _KEYS:
            near = difflib.get_close_matches(key, _KEYS, n=1)
            raise ConfigError(f"unknown key {key}: " + (f"did you mean {near[0]}?" if near else ", ".join(_KEYS)))
        if not value:
            raise ConfigError(f"{key} needs a value: write {key}=VALUE")
        given[key.removeprefix("export.")] = value
    if "run.dir" not in given:
        raise ConfigError("export needs run.dir=RUN, the folder that train printed")
    dtype, rank, out = given.get("dtype"), given.get("rank"), given.get("out")
    if rank is not None and not rank.isdecimal():
        raise ConfigError(f"export.rank must be a whole number, got {rank!r}")
    config = ExportConfig(
        checkpoint=given.get("checkpoint", "latest"),
        to=_choice(Form, "to", given.get("to", "model")),
        rank=None if rank is None else int(rank),
        out=None if out is None else Path(out).expanduser(),
        dtype=None if dtype is None else _choice(Dtype, "dtype", dtype),
    )
    return Path(given["run.dir"]).expanduser(), config


def export(run_dir: Path, config: ExportConfig, console: Console) -> Path:
    """Write a checkpoint of a run in another form; returns the folder.

    Raises:
        ConfigError: it does not have this form, is damaged, or the folder cannot be written.
    """
    checkpoint = find_checkpoint(run_dir, config.checkpoint)
    name = f"{checkpoint.folder.name}-{config.to.value}"
    out = (config.out or run_dir / "export" / name).resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"export.out={out} is there already: remove it, or name another folder")
    trained = to_typed(OmegaConf.create(checkpoint.state["config"]))
    description = description_of(run_dir, trained)
    snapshot = Snapshot(checkpoint, description.hf_config, trained.lora, written=make_method(trained).written)
    source = Source(run_dir=run_dir, config=trained, snapshot=snapshot, description=description)
    check_form(config.to, source, config.rank)
    console.info(f"step {checkpoint.state['run']['step']} of {run_dir}, from {checkpoint.folder.name}")
    try:
        with new_folder(out, within=out.parent) as folder:
            _write(source, config, folder, out, console)
            share(folder)
    except (OSError, SafetensorError) as error:
        if not is_disk_error(error):
            raise
        raise ConfigError(f"export.out={out} cannot be written: {error}. Free some space or name another") from error
    console.info(f"written: {out}")
    return out


def find_checkpoint(run_dir: Path, choice: str) -> Checkpoint:
    """The checkpoint that export.checkpoint names, with its files checked.

    Raises: ConfigError when it is not there or damaged.
    """
    folders = list_checkpoints(run_dir / "checkpoints")
    names = [folder.name for folder in folders]
    if choice in ("latest", "best") and not folders:
        raise ConfigError(f"run.dir={run_dir} holds no checkpoint: name the folder that train printed")
    if choice == "best":
        choice = _read(folders[0]).state["run"]["best_checkpoint"] or "best"
        if choice not in names:
            raise ConfigError(f"export.checkpoint=best: none is kept in {run_dir}; there are {', '.join(names)}")
    if choice == "latest":
        return _read(folders[0])
    folder = run_dir / "checkpoints" / choice if choice in names else Path(choice).expanduser()
    if not folder.is_dir():
        raise ConfigError(
            f"export.checkpoint={choice} does not exist: name a folder, latest, best, or one of "
            f"{', '.join(names) or 'none'}"
        )
    return _read(folder)


def _read(folder: Path) -> Checkpoint:
    try:
        return read_checkpoint(folder)
    except DamagedCheckpoint as error:
        raise ConfigError(f"damaged checkpoint: {error}. Name another one with export.checkpoint=NAME") from error


def _write(source: Source, config: ExportConfig, folder: Path, final: Path, console: Console) -> None:
    usual = torch.float32 if config.to is Form.svd else source.config.torch_dtype
    dtype = {None: usual, Dtype.fp32: torch.float32, Dtype.bf16: torch.bfloat16}[config.dtype]
    if config.to is Form.model:
        write_model(source.snapshot, source.description, folder, dtype)
    elif config.to is Form.adapter:
        write_adapter(source, folder, dtype, final=final, console=console)
    else:
        write_svd(source, folder, dtype, rank=config.rank, console=console)


def _choice(kind: type[_Kind], key: str, word: str) -> _Kind:
    try:
        return kind(word)
    except ValueError as error:
        words = ", ".join(entry.value for entry in kind)
        raise ConfigError(f"export.{key} must be one of {words}, got {word!r}") from error


if __name__ == "__main__":
    sys.exit(main())
