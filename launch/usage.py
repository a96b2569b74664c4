"""Help texts, made from the configuration itself, so that they cannot go stale."""

import ast
import inspect
import textwrap
from collections.abc import Sequence
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from typing import Any, get_args, get_type_hints

import yaml

from launch.config import CONF, TrainConfig, load, resolved

_HEAD = """\
usage: accrete train [group=option ...] [section.key=value ...]
   or: python -m launch.train ...

Trains a language model; without arguments, a small one by ReLoRA on the text that ships with Python, in about
two minutes on two cores. The same command continues a run that was stopped or killed, if it names run.dir.

examples:
  accrete train run.dir=runs/first
  accrete train relora=none                                plain LoRA
  accrete train lora=none                                  full-rank training
  accrete train experiment=relora_llama_130m data.path=[corpus.jsonl] data.tokenizer=my-tokenizer
  accrete train model=pretrained model.name_or_path=./llama training.dtype=bf16 relora.warm_start_steps=500

exit codes: 0 done; 2 something to correct, named in one message; 75 stopped by request, checkpoint written; 1 else
"""


def asks_for_help(words: Sequence[str]) -> bool:
    """Whether the command line wants the help text."""
    return any(word in ("-h", "--help", "help") for word in words)


def train_help() -> str:
    """The help of `train`: usage, groups with their options, and every key with its default and meaning."""
    parts = [_HEAD, "groups (group=option):"]
    for folder in sorted(path for path in CONF.iterdir() if path.is_dir() and path.name != "launcher"):
        options = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
        parts.append(textwrap.fill(f"  {folder.name:<12}{options}", 110, subsequent_indent=" " * 14))
    parts.append(
        "\nkeys (section.key=value), with the values of a run without arguments; of what it lacks, the defaults:"
    )
    values = resolved(load([]))
    for section, hint in get_type_hints(TrainConfig).items():
        owner = next((entry for entry in (hint, *get_args(hint)) if is_dataclass(entry)), None)
        if owner is not None:
            parts.append("\n".join(keys_help(section, owner, values[section] or {})))
    return "\n".join(parts)


def keys_help(section: str, owner: Any, values: dict[str, Any]) -> list[str]:
    """A section's keys with their values and meanings, those of the classes that it builds on or holds included.

    What `values` lacks has the class's own default; a section within has its keys in place of a value.
    """
    meanings, hints = field_docs(owner), get_type_hints(owner)
    lines = [f"\n{section}: {(owner.__doc__ or '').strip()}"]
    for entry in fields(owner):
        key, value = f"{section}.{entry.name}", values.get(entry.name, entry.default)
        if is_dataclass(hints[entry.name]):
            within = keys_help(key, hints[entry.name], values.get(entry.name, {}))
            lines += [f"  {key}: {meanings[entry.name]}", *within[1:]]
            continue
        lines.append(f"  {key}" if value is MISSING else f"  {key}={_written(value)}")
        lines.append(textwrap.indent(textwrap.fill(meanings[entry.name], 104), " " * 6))
    return lines


def _written(value: Any) -> str:
    """A value as a command line would give it."""
    plain = value.value if isinstance(value, Enum) else value
    text = yaml.safe_dump(plain, default_flow_style=True, width=10_000).strip()
    return text.removesuffix("...").strip()


def field_docs(owner: type) -> dict[str, str]:
    """The strings under a dataclass's fields, by field name, those of the classes that it builds on first."""
    base = owner.__base__
    inherited = field_docs(base) if base is not None and is_dataclass(base) else {}
    tree = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
    assert isinstance(tree, ast.ClassDef)
    found: dict[str, str] = {}
    for field, text in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            assert isinstance(field.target, ast.Name)
            found[field.target.id] = " ".join(str(text.value.value).split())
    return inherited | found
