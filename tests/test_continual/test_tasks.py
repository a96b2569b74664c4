"""Tasks of each kind, opened from small files of the formats that users have."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from continual.classes import Scenario
from continual.data import DataConfig
from continual.stream import parse_tasks, stages_of
from continual.tasks import open_tasks
from relora.errors import ConfigError


@pytest.fixture
def opened(tmp_path):
    def call(*tasks, scenario=Scenario.class_incremental, seed=0, **settings):
        config = DataConfig(path=None, cache=str(tmp_path / "cache"), **{"sequence_length": 32, **settings})
        return open_tasks(parse_tasks([{"steps": 2, **task} for task in tasks]), config, scenario=scenario, seed=seed)

    return call


def test_answers_count_and_prompts_do_not(opened, tmp_path):
    for split, count in (("train", 6), ("test", 3)):
        items = [{"prompt": f"say {number}", "answer": f"it is {number}"} for number in range(count)]
        (tmp_path / f"{split}.json").write_text(json.dumps(items))
    task = opened({"name": "talk", "kind": "instruction", "data": str(tmp_path)}).tasks[0]
    assert len(task.train) == 6
    batch = task.train.batch(0, 6)
    assert not batch.even
    for ids, labels in zip(batch.inputs["input_ids"], batch.labels, strict=True):
        answer = bytes(int(one) for one in labels[labels >= 0] if one < 256).decode()
        assert answer.strip().startswith("it is")
        assert torch.equal(ids[labels >= 0], labels[labels >= 0])
    assert len(next(iter(task.held_out.values()))) == 3


def test_class_folders_of_images_keep_their_published_halves(opened, tmp_path):
    for half, count in (("train", 4), ("test", 2)):
        for shade, name in ((40, "dark"), (220, "light")):
            folder = tmp_path / "faces" / half / name
            folder.mkdir(parents=True)
            for number in range(count):
                Image.fromarray(np.full((9, 9, 3), shade, np.uint8)).save(folder / f"{number}.png")
    task = {"name": "faces", "kind": "classification", "data": {"path": str(tmp_path / "faces"), "image_size": 4}}
    found = opened(task)
    assert found.class_names == ["dark", "light"]
    assert found.image == (4, 3)
    batch = found.tasks[0].train.batch(0, 8)
    assert batch.inputs["pixel_values"].shape == (8, 3, 4, 4)
    bright = batch.inputs["pixel_values"].mean((1, 2, 3)) > 0.5
    assert torch.equal(bright.long(), batch.labels)
    assert len(found.tasks[0].train) == 8
    assert len(next(iter(found.tasks[0].held_out.values()))) == 4


def test_a_later_task_changes_nothing_of_the_earlier_ones(opened):
    def digits(name, *classes):
        return {"name": name, "kind": "classification", "data": "digits", "classes": list(classes)}

    one = opened(digits("a", "0", "1"), digits("b", "2", "3"))
    more = opened(digits("a", "0", "1"), digits("b", "2", "3"), digits("c", "7"))
    assert more.class_names[:4] == one.class_names
    for before, after in zip(one.tasks, more.tasks, strict=False):
        assert before.fingerprint == after.fingerprint
        assert np.array_equal(before.train.identities(0, 50), after.train.identities(0, 50))


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ({"classes": ["eleven"]}, "eleven"),
        ({"data": "digitz"}, "digitz"),
        ({"data": {"path": "digits", "image_sise": 4}}, "image_size"),
    ],
)
def test_a_task_without_its_data_is_refused_by_name(opened, task, said):
    with pytest.raises(ConfigError, match=said):
        opened({"name": "a", "kind": "classification", "data": "digits", **task})


@pytest.mark.parametrize(
    ("retain", "said"),
    [
        ("moon.txt", "moon.txt is to be forgotten too"),
        (None, "retain is missing"),
        ([], "forget.retain"),
        ("nowhere.txt", "nowhere.txt"),
    ],
)
def test_a_request_to_forget_documents_says_what_is_kept(opened, tmp_path, retain, said):
    (tmp_path / "moon.txt").write_text("moon and stars\n" * 200)
    kept = str(tmp_path / retain) if isinstance(retain, str) else retain
    with pytest.raises(ConfigError, match=said):
        opened({"name": "forget", "kind": "forget", "data": str(tmp_path / "moon.txt"), "retain": kept})


def test_a_task_that_teaches_a_forgotten_class_again_takes_the_request_back(opened):
    def digits(name, kind, *classes):
        return {"name": name, "kind": kind, "data": "digits", "classes": list(classes)}

    values = [
        digits("a", "classification", "0", "1", "2"),
        digits("drop", "forget", "1"),
        digits("b", "classification", "0", "1", "2"),
        digits("again", "forget", "1"),
    ]
    found = opened(*values, scenario=Scenario.domain)
    stages = stages_of(parse_tasks([{"steps": 2, **one} for one in values]), found.tasks, 8)
    assert [stage.forgotten for stage in stages] == [(), (1,), (), (1,)]
    assert [stage.seen for stage in stages] == [(0, 1, 2)] * 4
    assert set(found.tasks[1].forget.batch(0, 40).labels.tolist()) == {1}
    assert set(found.tasks[1].train.batch(0, 40).labels.tolist()) == {0, 2}
