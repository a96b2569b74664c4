"""Tiny streams on scikit-learn's digits for the real command, and what their runs recorded."""

import json

import torch
from safetensors.torch import load_file

from launch import exits, train

TASKS = [
    "{name: one, kind: classification, data: digits, classes: ['0', '1'], steps: 4, full_rank: true}",
    "{name: two, kind: classification, data: digits, classes: ['2', '3'], steps: 4}",
    "{name: three, kind: classification, data: digits, classes: ['4', '5'], steps: 4}",
]
BATCHES = [
    "model=vit_digits",
    "model.config.hidden_size=16",
    "model.config.intermediate_size=16",
    "model.config.num_hidden_layers=1",
    "model.config.num_attention_heads=2",
    "continual=custom",
    "relora=none",
    "lora.rank=4",
    "lora.dense=[head]",
    "training.global_batch_size=8",
    "schedule.warmup_steps=1",
    "schedule.restart_warmup_steps=0",
    "evaluation.every=0",
    "evaluation.sequences=16",
]
SETTINGS = {"ewc": ["continual.ewc.samples=16", "continual.ewc.group=2", "continual.ewc.strength=100.0"]}


def words(folder, *more, tasks=TASKS, method="inflora"):
    stream = [f"continual.tasks=[{', '.join(tasks)}]", f"continual.method={method}", *SETTINGS.get(method, [])]
    return [*BATCHES, *stream, f"run.dir={folder}", *more]


def runs_by_method(root):
    """A function that gives the folder of an undisturbed run of a method, made when it is first asked for."""
    done = {}

    def run(method):
        if method not in done:
            done[method] = root / method
            assert train.main(words(done[method], method=method)) == exits.DONE
        return done[method]

    return run


def steps_of(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(one["step"], one["task"], one["loss"], one["lr"]) for one in records if "event" not in one]


def rows_of(folder):
    return json.loads((folder / "summary.json").read_text())["matrix"]


def event_of(folder, kind):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return next(one for one in records if one.get("event") == kind)


def same_end(one, other):
    a, b = (load_file(folder / "final" / "model.safetensors") for folder in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
