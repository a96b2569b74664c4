"""Greedy answers: those of transformers token for token, on every layout, and in the matrix of a stream."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig

from launch import exits, train
from launch.training.decoding import continued

EOS = 7
SIZES = {
    "vocab_size": 24,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 20,
}
MODELS = {
    "llama": LlamaConfig(**SIZES, intermediate_size=24, initializer_range=0.3),
    "neox": GPTNeoXConfig(**SIZES, intermediate_size=24, initializer_range=0.3),
    "gpt2": GPT2Config(vocab_size=24, n_embd=16, n_layer=2, n_head=2, n_positions=20, initializer_range=0.3),
}
LENGTHS = [5, 1, 9, 3, 12, 2]


@pytest.mark.parametrize("name", MODELS)
def test_what_is_written_is_what_transformers_generates_for_each_prompt_alone(name):
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(MODELS[name]).eval()
    draw = np.random.default_rng(0)
    prompts = [draw.integers(8, 24, size=length) for length in LENGTHS]
    device = torch.device("cpu")
    together = continued(model, prompts, eos=EOS, most=8, length=20, device=device)
    for prompt, written in zip(prompts, together, strict=True):
        ids = torch.from_numpy(prompt)[None]
        settings = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": EOS, "pad_token_id": EOS}
        alone = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, len(prompt) :].tolist()
        assert written == (alone[: alone.index(EOS)] if EOS in alone else alone)
    assert any(len(written) < 8 for written in together) or name != "llama", "an end is met"


def test_nothing_is_written_beyond_the_length_that_a_sequence_may_have():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS["gpt2"]).eval()
    prompts = [np.arange(8, 8 + length) for length in (10, 4)]
    written = continued(model, prompts, eos=0, most=50, length=12, device=torch.device("cpu"))
    assert [len(one) for one in written] == [2, 8]


ITEMS = [("one", "two"), ("a", "b"), ("red", "blue"), ("up", "down"), ("in", "out")]


@pytest.fixture
def stream(tmp_path):
    tasks = []
    for name, items in (("first", ITEMS), ("second", [(prompt[::-1], answer[::-1]) for prompt, answer in ITEMS])):
        folder = tmp_path / name
        folder.mkdir()
        for split in ("train", "test"):
            content = [{"prompt": f"{prompt}: ", "answer": answer} for prompt, answer in items]
            (folder / f"{split}.json").write_text(json.dumps(content))
        metric = {"first": "exact", "second": "choice"}[name]
        tasks.append(f"{{name: {name}, kind: instruction, data: {folder}, steps: 40, metric: {metric}}}")

    def words(folder, *more):
        shape = ["hidden_size=32", "intermediate_size=48", "num_hidden_layers=1", "num_attention_heads=2"]
        return [
            "model=llama_tiny",
            *(f"model.config.{one}" for one in shape),
            "continual=custom",
            f"continual.tasks=[{', '.join(tasks)}]",
            "relora=none",
            "lora=none",
            "data.sequence_length=16",
            f"data.cache={tmp_path / 'cache'}",
            "training.global_batch_size=8",
            "optimizer.lr=0.02",
            "schedule.warmup_steps=2",
            "schedule.restart_warmup_steps=0",
            "evaluation.every=0",
            "evaluation.batch_size=2",
            f"run.dir={folder}",
            *more,
        ]

    return words


def rows_of(folder):
    return json.loads((folder / "summary.json").read_text())["matrix"]


def test_the_matrix_of_a_stream_of_answers_holds_their_scores(stream, tmp_path):
    folder = tmp_path / "run"
    assert train.main(stream(folder)) == exits.DONE
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["score"] == "accuracy"
    assert summary["baseline"] == [0.0, 0.0]
    assert summary["matrix"][0][0] == summary["matrix"][1][1] == 1.0
    assert summary["forgetting"] == pytest.approx(1.0 - summary["matrix"][1][0])
    stages = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    scores = next(one["scores"] for one in stages if one.get("event") == "stage" and one["index"] == 1)
    assert {name: one["metric"] for name, one in scores.items()} == {"first": "exact", "second": "choice"}
    assert scores["second"]["perplexity"] < 1.5


def _train(_, overrides):
    return train.main(overrides)


@pytest.mark.parametrize(("size", "layout"), [(2, ["parallel.tensor=2"]), (4, ["parallel=zero3", "parallel.tensor=2"])])
def test_several_processes_write_the_same_answers(on_processes, stream, tmp_path, size, layout):
    one, several = tmp_path / "one", tmp_path / "several"
    short = ["training.stop_after=48", "continual.save_models=false"]
    assert train.main(stream(one, *short)) == exits.PREEMPTED
    assert on_processes(_train, size, stream(several, *layout, *short)) == [exits.PREEMPTED] * size
    told = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (one, several)
    ]
    ours, theirs = (
        [[score["accuracy"] for score in event["scores"].values()] for event in events if event.get("event") == "stage"]
        for events in told
    )
    assert ours == theirs
    assert any(score > 0 for row in ours for score in row)
