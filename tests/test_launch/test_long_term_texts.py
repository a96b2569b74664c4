"""I-LoRA's two adapters on a language model whose embeddings and norms train, too, on one process and on four."""

import json

import pytest

from launch import exits, train

TASKS = [
    "{name: one, kind: causal_lm, data: python_library, steps: 3}",
    "{name: two, kind: causal_lm, data: python_headers, steps: 4}",
]
WORDS = [
    "model.config.hidden_size=32",
    "model.config.num_hidden_layers=2",
    "model.config.num_attention_heads=2",
    "model.config.intermediate_size=48",
    "data.sequence_length=32",
    "continual=custom",
    f"continual.tasks=[{', '.join(TASKS)}]",
    "continual.method=i_lora",
    "continual.i_lora.decay=0.8",
    "continual.save_models=false",
    "relora=none",
    "lora.rank=4",
    "training.global_batch_size=4",
    "schedule.warmup_steps=1",
    "schedule.restart_warmup_steps=0",
    "evaluation.every=0",
    "evaluation.sequences=8",
]


def _train(_, overrides):
    return train.main(overrides)


def records_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def numbers_of(folder):
    steps = [one for one in records_of(folder) if "event" not in one]
    gaps = [one["consistency"] for one in steps if one["task"] == "two"]
    matrix = json.loads((folder / "summary.json").read_text())["matrix"]
    return [one["loss"] for one in steps], gaps, matrix[-1]


def test_a_language_model_on_four_processes_has_the_numbers_of_one_and_writes_what_it_measured(on_processes, tmp_path):
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert train.main([*WORDS, f"run.dir={alone}"]) == exits.DONE
    words = [*WORDS, f"run.dir={together}", "parallel=zero3", "parallel.tensor=2"]
    assert on_processes(_train, 4, words) == [exits.DONE] * 4
    for ours, theirs in zip(numbers_of(together), numbers_of(alone), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert min(numbers_of(alone)[1][1:]) > 1e-6
    for folder in (alone, together):
        final = next(one for one in records_of(folder) if one.get("event") == "final")
        assert abs(final["merge_difference"]) < 1e-5
