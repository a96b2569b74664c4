"""Streams on files of a user: what is written can be used without this package, and what is wrong is named."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

from launch import exits, train

SHAPE = [
    "model=vit_digits",
    "model.config.hidden_size=16",
    "model.config.intermediate_size=16",
    "model.config.num_hidden_layers=1",
    "model.config.num_attention_heads=2",
    "model.config.image_size=8",
    "model.config.num_channels=3",
]
SHORT = [
    "continual=custom",
    "relora=none",
    "lora=none",
    "training.global_batch_size=4",
    "schedule.warmup_steps=1",
    "schedule.restart_warmup_steps=0",
    "evaluation.every=0",
    "evaluation.sequences=4",
]


@pytest.fixture
def faces(tmp_path):
    draw = np.random.default_rng(0)
    for name in ("ada", "bob"):
        for half, count in (("train", 4), ("test", 2)):
            (tmp_path / "faces" / half / name).mkdir(parents=True)
            for number in range(count):
                pixels = draw.integers(0, 256, (12, 12, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / "faces" / half / name / f"{number}.png")
    return tmp_path / "faces"


def words(folder, *tasks, more=()):
    return [*SHORT, f"continual.tasks=[{', '.join(tasks)}]", f"run.dir={folder}", *more]


def task_of(faces, **more):
    told = "".join(f", {key}: {value}" for key, value in more.items())
    data = f"{{path: {faces}, image_size: 8, mean: 0.5, std: 0.25{told}}}"
    return f"{{name: faces, kind: classification, data: {data}, steps: 2}}"


def test_a_written_classifier_prepares_images_as_training_did(faces, tmp_path):
    assert train.main([*SHAPE, *words(tmp_path / "run", task_of(faces))]) == exits.DONE
    image = Image.open(faces / "test" / "ada" / "0.png")
    small = np.asarray(image.resize((8, 8), Image.Resampling.BILINEAR), dtype=np.float32)
    pixels = (torch.from_numpy(small.transpose(2, 0, 1)) / 255 - 0.5) / 0.25
    for folder in ("final", "tasks/01_faces"):
        model = AutoModelForImageClassification.from_pretrained(tmp_path / "run" / folder).eval()
        processor = AutoImageProcessor.from_pretrained(tmp_path / "run" / folder)
        served = processor(image, return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(served, pixels[None], rtol=0, atol=1e-6)
        with torch.no_grad():
            torch.testing.assert_close(model(pixel_values=served).logits, model(pixel_values=pixels[None]).logits)
            shares = model(pixel_values=served).logits.softmax(1)[0]
        found = pipeline("image-classification", model=model, image_processor=processor)(image)
        assert {one["label"]: pytest.approx(one["score"], abs=1e-5) for one in found} == {
            name: float(share) for name, share in zip(("ada", "bob"), shares, strict=True)
        }


def test_a_stream_whose_files_changed_since_the_checkpoint_is_refused(faces, tmp_path, capsys):
    line = [*SHAPE, *words(tmp_path / "run", task_of(faces))]
    assert train.main([*line, "training.stop_after=1"]) == exits.PREEMPTED
    Image.fromarray(np.zeros((12, 12, 3), np.uint8)).save(faces / "train" / "ada" / "0.png")
    assert train.main(line) == exits.REFUSED
    error = " ".join(capsys.readouterr().err.split())
    assert "continual.tasks.faces: its data changed" in error
    assert "begin anew in another run.dir" in error


LLAMA = [
    "model=llama_tiny",
    *(f"model.config.{one}" for one in ("hidden_size=16", "intermediate_size=24", "num_hidden_layers=1")),
    "model.config.num_attention_heads=2",
    "data.sequence_length=16",
]


def instruction(path, *items, **more):
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return {"name": path.stem, "kind": "instruction", "data": str(path), "validation": str(path), "steps": 2, **more}


def shown(task):
    return "{" + ", ".join(f"{key}: {value}" for key, value in task.items()) + "}"


def test_prompts_longer_than_a_sequence_lose_their_beginning_and_are_counted(tmp_path, capsys):
    items = [{"prompt": "x" * 30 + "ask", "answer": "yes"}, {"prompt": "short", "answer": "no"}]
    task = instruction(tmp_path / "talk.jsonl", *items, metric="exact")
    line = [*LLAMA, *words(tmp_path / "run", shown(task), more=[f"data.cache={tmp_path / 'cache'}"])]
    assert train.main(line) == exits.DONE
    assert "1 prompts cut" in capsys.readouterr().out
    matrix = json.loads((tmp_path / "run" / "summary.json").read_text())["matrix"]
    assert matrix == [[0.0]]


GOOD = {"prompt": "a", "answer": "b"}


@pytest.mark.parametrize(
    ("items", "more", "said"),
    [
        ([GOOD, {"prompt": "a"}], {}, "line 2 of TALK has no answer: an item needs a prompt and an answer"),
        ([GOOD, {"answer": "a"}], {}, "line 2 of TALK has no prompt"),
        ([], {}, "TALK holds no records"),
        ([GOOD], {"data": "nowhere.json"}, "there is no file or folder"),
        ([GOOD], {"metric": "bleu"}, "metric must be one of loss, exact, choice, rouge_l, got 'bleu'"),
        ([GOOD], {"kind": "question"}, "kind must be one of causal_lm, instruction, classification, forget"),
        ([GOOD], {"classes": "[a]"}, "continual.tasks.talk.classes has no effect"),
    ],
)
def test_a_task_of_answers_that_cannot_be_read_is_refused_by_file_and_line(tmp_path, capsys, items, more, said):
    task = instruction(tmp_path / "talk.jsonl", *items, **more)
    line = [*LLAMA, *words(tmp_path / "run", shown(task), more=[f"data.cache={tmp_path / 'cache'}"])]
    assert train.main(line) == exits.REFUSED
    error = capsys.readouterr().err
    assert said.replace("TALK", str(tmp_path / "talk.jsonl")) in " ".join(error.split())
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


DIGITS = "kind: classification, data: digits, steps: 2"


@pytest.mark.parametrize(
    ("tasks", "said"),
    [
        (
            [f"{{name: a, {DIGITS}, classes: ['0', '1']}}", f"{{name: b, {DIGITS}, classes: ['1', '2']}}"],
            "continual.tasks.b.classes: class 1 already belongs to task a",
        ),
        ([f"{{name: a, {DIGITS}}}", f"{{name: a, {DIGITS}}}"], "two tasks are called a: give each a name of its own"),
        (["{name: a, kind: classification, steps: 2}"], "continual.tasks[0].data is missing"),
        ([f"{{name: a, {DIGITS}, metric: exact}}"], "metric=exact has no effect on kind=classification"),
        ([f"{{name: a, {DIGITS}}}", "{name: b, kind: causal_lm, data: python_headers, steps: 2}"], "make two streams"),
    ],
)
def test_tasks_that_do_not_fit_each_other_are_refused_in_one_line(tmp_path, capsys, tasks, said):
    assert train.main(["model=vit_digits", *words(tmp_path / "run", *tasks)]) == exits.REFUSED
    error = capsys.readouterr().err
    assert said in " ".join(error.split())
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_class_without_an_image_is_refused(faces, tmp_path, capsys):
    for path in (faces / "train" / "bob").iterdir():
        path.unlink()
    assert train.main([*SHAPE, *words(tmp_path / "run", task_of(faces))]) == exits.REFUSED
    assert "faces has no samples of class bob to train on" in " ".join(capsys.readouterr().err.split())
