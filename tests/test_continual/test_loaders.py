"""Labelled sets in the formats that they are published in, from small files; what is broken in them is named."""

import json
import pickle
import struct

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from continual.classes import Scenario
from continual.data import DataConfig
from continual.labelled_sets import open_set
from continual.set_spec import parse_set
from continual.stream import parse_tasks
from continual.tasks import open_tasks
from relora.errors import ConfigError


def load(path, **settings):
    return open_set(parse_set({"path": str(path), **settings}, "data"), "data")


def refused(path, said, **settings):
    with pytest.raises(ConfigError, match=said):
        load(path, **settings)


# What Python 2 wrote, as CIFAR's authors did: byte strings, and an array by numpy.core.multiarray.


def py2_text(text):
    return b"U" + bytes([len(text)]) + text.encode()


def py2_list(values):
    return b"](" + b"".join(b"K" + bytes([one]) if isinstance(one, int) else py2_text(one) for one in values) + b"e"


def py2_array(rows):
    count = b"M" + struct.pack("<H", rows.shape[1])
    return (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K"
        + bytes([len(rows)])
        + count
        + b"\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T"
        + struct.pack("<I", rows.size)
        + rows.tobytes()
        + b"tb"
    )


def py2_dict(**entries):
    return b"\x80\x02}(" + b"".join(py2_text(name) + value for name, value in entries.items()) + b"u."


@pytest.fixture
def cifar(tmp_path):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    draw = np.random.default_rng(0)
    pixels = {"train": draw.integers(0, 256, (6, 3072), np.uint8), "test": draw.integers(0, 256, (3, 3072), np.uint8)}
    labels = {"train": [0, 1, 2, 0, 1, 2], "test": [2, 1, 0]}
    for side in ("train", "test"):
        told = py2_dict(
            batch_label=py2_text(side),
            fine_labels=py2_list(labels[side]),
            coarse_labels=py2_list([0] * len(labels[side])),
            data=py2_array(pixels[side]),
        )
        (folder / side).write_bytes(told)
    names = ["apple", "baby", "bear"]
    (folder / "meta").write_bytes(py2_dict(fine_label_names=py2_list(names), coarse_label_names=py2_list(["all"])))
    return folder, pixels, labels


def test_cifar_is_read_as_python_2_wrote_it(cifar):
    folder, pixels, labels = cifar
    found = load(folder)
    assert found.classes == ["apple", "baby", "bear"]
    for part, side in ((found.train, "train"), (found.test, "test")):
        assert part.labels.tolist() == labels[side]
        served = part.content.inputs(np.arange(len(labels[side])))["pixel_values"]
        assert torch.equal(served, torch.from_numpy(pixels[side].reshape(-1, 3, 32, 32).astype(np.float32)) / 255)
    small = load(folder, image_size=8, mean=0.5, std=0.25).train.content.inputs(np.array([0]))["pixel_values"]
    assert small.shape == (1, 3, 8, 8)
    assert -2.0 <= small.min() < -0.2 < 0.2 < small.max() <= 2.0


def test_of_a_pickle_nothing_is_run(cifar, tmp_path):
    folder, _, _ = cifar
    (folder / "test").write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "run").encode() + b"'\ntR.")
    refused(folder, "os.system, which is no plain value")
    assert not (tmp_path / "run").exists()
    (folder / "test").write_bytes((folder / "train").read_bytes()[:-40])
    refused(folder, "test is not a file of CIFAR's archive")
    (folder / "test").write_bytes(py2_dict(fine_labels=py2_list([7]), data=py2_array(np.zeros((1, 3072), np.uint8))))
    refused(folder, "label 7 of sample 0 is out of range: with 3 classes, labels are 0 to 2")
    (folder / "test").write_bytes(pickle.dumps({"fine_labels": [0]}, protocol=2))
    refused(folder, "it lacks data")


def picture(path, shade, side=9):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((side, side + 2, 3), shade, np.uint8)).save(path)


@pytest.fixture
def renditions(tmp_path):
    """ImageNet-R with the split lists of InfLoRA's code, which were made elsewhere."""
    folder = tmp_path / "imagenet-r"
    lists = {"train": ([], []), "test": ([], [])}
    for number, wordnet in enumerate(["n01443537", "n01484850", "n01494475"]):
        for count in range(3):
            name = f"{wordnet}/art_{count}.jpg"
            picture(folder / name, 80 * number)
            names, labels = lists["test" if count == 2 else "train"]
            names.append(f"data/imagenet-r/{name}")
            labels.append(number)
    for side, (names, labels) in lists.items():
        (folder / f"imagenet-r_{side}.yaml").write_text(json.dumps({"data": names, "targets": labels}))
    return folder


def test_imagenet_r_has_the_split_of_its_lists(renditions):
    found = load(renditions, image_size=4)
    assert found.classes == ["n01443537", "n01484850", "n01494475"]
    assert (found.train.labels.tolist(), found.test.labels.tolist()) == ([0, 0, 1, 1, 2, 2], [0, 1, 2])
    shades = found.test.content.inputs(np.arange(3))["pixel_values"].mean((1, 2, 3))
    assert shades.tolist() == pytest.approx([0.0, 80 / 255, 160 / 255], abs=0.01)
    (renditions / "n01484850" / "art_2.jpg").unlink()
    refused(renditions, r"imagenet-r_test\.yaml lists data/imagenet-r/n01484850/art_2\.jpg, which is not below")
    (renditions / "imagenet-r_test.yaml").write_text("data: [a]\ntargets: [0, 1]\n")
    refused(renditions, "data and targets, two lists of one length")


@pytest.fixture
def domains(tmp_path):
    """DomainNet: a list of lines for each domain and side."""
    folder = tmp_path / "domainnet"
    for shade, domain in ((40, "clipart"), (200, "real")):
        for side, counts in (("train", (0, 1)), ("test", (2,))):
            lines = []
            for number, name in enumerate(["aircraft_carrier", "The_Eiffel_Tower"]):
                for count in counts:
                    place = f"{domain}/{name}/{domain}_{number:03d}_{count:06d}.jpg"
                    picture(folder / place, shade + 20 * number)
                    lines.append(f"{place} {number}")
            (folder / f"{domain}_{side}.txt").write_text("\n".join(lines) + "\n")
    return folder


def test_domainnet_is_a_stream_of_domains_with_the_same_classes(domains, tmp_path):
    tasks = [
        {"name": name, "kind": "classification", "steps": 1}
        | {"data": {"path": str(domains), "domain": name, "image_size": 4}}
        for name in ("clipart", "real")
    ]
    config = DataConfig(path=None, cache=str(tmp_path))
    opened = open_tasks(parse_tasks(tasks), config, scenario=Scenario.domain, seed=0)
    assert opened.class_names == ["aircraft_carrier", "The_Eiffel_Tower"]
    means = [float(task.train.batch(0, 4).inputs["pixel_values"].mean()) for task in opened.tasks]
    assert means == pytest.approx([50 / 255, 210 / 255], abs=0.01)
    assert [len(next(iter(task.held_out.values()))) for task in opened.tasks] == [2, 2]
    whole = load(domains)
    assert len(whole.train.labels) == 8
    refused(domains, "domain=paint.*has lists of clipart, real", domain="paint")
    (domains / "real_test.txt").write_text("real/The_Eiffel_Tower/real_001_000002.jpg one\n")
    refused(domains, r"real_test\.txt, line 1: a line is the path of an image, a space and its label")


def test_faces_in_folders_hold_out_a_share_of_each_person(tmp_path):
    folder = tmp_path / "CASIA-WebFace"
    for person in ("0000045", "0000099"):
        for count in range(10):
            picture(folder / person / f"{count:03d}.jpg", 10 * count)
    found = load(folder, image_size=4, test_fraction=0.3)
    assert (found.classes, found.test) == (["0000045", "0000099"], None)
    config = DataConfig(path=None, cache=str(tmp_path))
    task = {"name": "faces", "kind": "classification", "steps": 1}
    task |= {"data": {"path": str(folder), "image_size": 4, "test_fraction": 0.3}}
    (opened,) = open_tasks(parse_tasks([task]), config, scenario=Scenario.class_incremental, seed=0).tasks
    held_out = next(iter(opened.held_out.values()))
    assert (len(opened.train), len(held_out)) == (14, 6)
    assert held_out.batch(0, 6).labels.bincount().tolist() == [3, 3]
    (folder / "0000045" / "000.jpg").write_bytes(b"no image")
    with pytest.raises(ConfigError, match=r"0000045/000\.jpg cannot be read as an image"):
        opened.train.batch(0, 14)


ROWS = [("a good one", 1), ("a bad one", 0), ("the best", 1)]


def write_lines(folder):
    for side, rows in (("train", ROWS), ("test", ROWS[:2])):
        text = "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows)
        (folder / f"{side}.jsonl").write_text(text)


def write_parquet(folder):
    """As the Hub stores data sets: names of classes in the file's metadata."""
    names = {"info": {"features": {"label": {"names": ["0", "1"], "_type": "ClassLabel"}}}}
    for side, rows in (("train", ROWS), ("test", ROWS[:2])):
        table = pyarrow.Table.from_pylist([{"text": text, "label": label} for text, label in rows])
        table = table.replace_schema_metadata({"huggingface": json.dumps(names)})
        pyarrow.parquet.write_table(table, folder / f"{side}-00000-of-00001.parquet")


@pytest.mark.parametrize("write", [write_lines, write_parquet])
def test_labelled_text_is_the_same_from_lines_and_from_parquet(write, tmp_path):
    write(tmp_path)
    found = load(tmp_path)
    assert (found.modality.value, found.classes) == ("texts", ["0", "1"])
    assert (found.train.labels.tolist(), found.test.labels.tolist()) == ([1, 0, 1], [1, 0])
    assert list(found.train.content.texts) == [text for text, _ in ROWS]
    assert load(tmp_path, names=["bad", "good"]).classes == ["bad", "good"]


@pytest.mark.parametrize(
    ("name", "rows", "said"),
    [
        ("a.jsonl", [{"text": "x", "label": 0}, {"text": "y"}], "line 2 of .*a.jsonl has no label in 'label'"),
        ("a.jsonl", [{"label": 0}], "line 1 of .*a.jsonl has no text in 'text'"),
        ("a.parquet", [{"text": "x", "label": None}], "row 0 of .*a.parquet has no label in 'label'"),
        ("a.parquet", [{"text": "x", "class": 1}], "a.parquet has no column 'label'; it has text, class"),
    ],
)
def test_a_text_without_its_label_is_named_with_its_place(name, rows, said, tmp_path):
    path = tmp_path / name
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    refused(path, said)


def test_a_label_beyond_the_names_is_out_of_range(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "x", "label": 2}) + "\n")
    refused(path, "label 2 of sample 0 is out of range: with 2 classes, labels are 0 to 1", names=["bad", "good"])


def test_images_in_parquet_keep_the_split_of_their_names(tmp_path):
    for side, shades in (("train", (10, 250)), ("validation", (250,)), ("test", (10,))):
        rows = []
        for shade in shades:
            picture(tmp_path / "one.png", shade)
            rows.append(
                {"img": {"bytes": (tmp_path / "one.png").read_bytes(), "path": None}, "fine_label": shade // 200}
            )
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / f"{side}-0.parquet")
    found = load(tmp_path, image_size=4, names=["dark", "light"])
    assert (found.train.labels.tolist(), found.test.labels.tolist()) == ([0, 1], [0])
    assert found.train.content.inputs(np.arange(2))["pixel_values"].mean((1, 2, 3)).round().tolist() == [0.0, 1.0]


def items(folder, **splits):
    folder.mkdir()
    for split, count in splits.items():
        told = [{"prompt": f"{split} {number}", "answer": str(number)} for number in range(count)]
        (folder / f"{split}.json").write_text(json.dumps(told))
    return {"name": folder.name, "kind": "instruction", "data": str(folder), "steps": 1}


def test_trace_is_measured_on_its_tests_else_on_its_evals(tmp_path):
    tasks = [items(tmp_path / "C-STANCE", train=5, eval=3, test=4), items(tmp_path / "FOMC", train=5, eval=3)]
    config = DataConfig(path=None, cache=str(tmp_path), sequence_length=32)
    opened = open_tasks(parse_tasks(tasks), config, scenario=Scenario.class_incremental, seed=0)
    sizes = [(len(task.train), len(next(iter(task.held_out.values())))) for task in opened.tasks]
    assert sizes == [(5, 4), (5, 3)]
    held_out = opened.tasks[0].held_out["test"]
    assert {item.prompt for item in held_out.items(0, 4)} == {f"test {number}" for number in range(4)}
