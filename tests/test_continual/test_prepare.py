import json
import multiprocessing

import numpy as np
import pytest

from continual import corpora
from continual.parts import Recipe
from continual.prepare import prepare
from continual.sources import Source, find_corpus
from continual.tokenizer import byte_tokenizer, encoder_of
from relora.errors import ConfigError

TEXTS = [f"document {n} " + "word " * (n % 40) for n in range(1000)]


def recipe(**settings):
    defaults = {"text_field": "text", "validation_fraction": 0.2, "max_tokens": None}
    return Recipe(encoder=encoder_of(byte_tokenizer(), "bytes"), **(defaults | settings))


def make(path, cache, *, workers=1, progress=None, **settings):
    corpus = find_corpus(Source(path=str(path)), "data.path")
    return prepare(corpus, recipe(**settings), cache, key="data.path", workers=workers, progress=progress)


def read(prepared, side):
    tokens = np.fromfile(prepared.folder / side / "tokens.bin", dtype=prepared.dtype)
    ends = np.fromfile(prepared.folder / side / "documents.bin", dtype=np.int64)
    assert all(tokens[ends - 1] == 256)
    starts = [0, *ends[:-1]]
    return [bytes(tokens[a : b - 1].astype(np.uint8)).decode() for a, b in zip(starts, ends, strict=True)]


@pytest.fixture
def records(tmp_path, monkeypatch):
    """JSON lines in about 30 units of work."""
    monkeypatch.setattr(corpora, "UNIT_BYTES", 5000)
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def test_every_document_is_on_one_side_in_its_order(records, tmp_path):
    prepared = make(records, tmp_path / "cache")
    train, validation = read(prepared, "train"), read(prepared, "validation")
    held = set(validation)
    assert train == [text for text in TEXTS if text not in held]
    assert validation == [text for text in TEXTS if text in held]
    assert 150 < len(validation) < 250


def test_counts_are_those_of_the_text(records, tmp_path):
    prepared = make(records, tmp_path / "cache")
    for side, counts in (("train", prepared.train), ("validation", prepared.validation)):
        texts = read(prepared, side)
        assert counts.documents == len(texts)
        assert counts.text_bytes == sum(len(text.encode()) for text in texts)
        assert counts.tokens == counts.text_bytes + counts.documents


def test_number_of_processes_changes_nothing(records, tmp_path):
    one, two = make(records, tmp_path / "one"), make(records, tmp_path / "two", workers=2)
    assert (one.train, one.validation) == (two.train, two.validation)
    for file in ("train/tokens.bin", "validation/tokens.bin", "train/documents.bin", "meta.json"):
        assert (one.folder / file).read_bytes() == (two.folder / file).read_bytes()


class Interruption(Exception):
    pass


def test_interrupted_work_goes_on_where_it_was(records, tmp_path):
    whole = make(records, tmp_path / "whole")
    seen = []

    def interrupt(task, done, total):
        seen.append(done)
        if len(seen) == 7:
            raise Interruption

    with pytest.raises(Interruption):
        make(records, tmp_path / "cache", progress=interrupt)
    assert not list((tmp_path / "cache").glob("*/meta.json"))
    rest = []
    again = make(records, tmp_path / "cache", progress=lambda task, done, total: rest.append((task, done, total)))
    tokenizing = [done for task, done, _ in rest if task.startswith("tokenizing")]
    assert tokenizing[0] > seen[-1]
    assert tokenizing[-1] == rest[0][2]
    assert (again.folder / "train/tokens.bin").read_bytes() == (whole.folder / "train/tokens.bin").read_bytes()
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.name != "locks"] == [again.folder.name]


def test_prepared_text_is_not_prepared_again(records, tmp_path):
    make(records, tmp_path / "cache")
    calls = []
    make(records, tmp_path / "cache", progress=lambda *call: calls.append(call))
    assert calls == []
    make(records, tmp_path / "cache", progress=lambda *call: calls.append(call), validation_fraction=0.3)
    assert calls


@pytest.mark.parametrize("locked", [True, False])
def test_two_at_once_do_no_harm(records, tmp_path, monkeypatch, locked):
    if not locked:
        monkeypatch.setattr("fcntl.flock", refuse)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=make, args=(records, tmp_path / "cache")) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    together, alone = make(records, tmp_path / "cache"), make(records, tmp_path / "alone")
    assert (together.train, together.validation) == (alone.train, alone.validation)
    assert (together.folder / "train/tokens.bin").read_bytes() == (alone.folder / "train/tokens.bin").read_bytes()


def refuse(*_):
    raise OSError("no locks here")


def test_equal_documents_are_never_on_both_sides(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps({"text": f"text {n % 50}"}) + "\n" for n in range(1000)))
    prepared = make(path, tmp_path / "cache")
    train, validation = read(prepared, "train"), read(prepared, "validation")
    assert not set(train) & set(validation)
    assert len(train) + len(validation) == 1000


def test_held_out_documents_stay_held_out_when_text_is_added(tmp_path):
    sides = []
    for number, texts in enumerate([TEXTS[:800], ["new at the front", *TEXTS]]):
        path = tmp_path / f"{number}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        sides.append(set(read(make(path, tmp_path / "cache"), "validation")))
    assert sides[0] <= sides[1]


def test_a_small_share_of_little_text_still_holds_some_out(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    prepared = make(path, tmp_path / "cache", validation_fraction=1e-6)
    assert 4096 <= prepared.validation.tokens < 4096 + 300
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:2]))
    prepared = make(path, tmp_path / "cache", validation_fraction=1e-6)
    assert (prepared.train.documents, prepared.validation.documents) == (1, 1)


def test_nothing_is_held_out_when_not_asked(records, tmp_path):
    assert read(make(records, tmp_path / "cache", validation_fraction=0.0), "train") == TEXTS


@pytest.mark.parametrize("workers", [1, 2])
def test_max_tokens_takes_the_first_whole_documents(records, tmp_path, workers):
    prepared = make(records, tmp_path / "cache", validation_fraction=0.0, max_tokens=30_000, workers=workers)
    ends = np.cumsum([len(text) + 1 for text in TEXTS])
    expected = int((ends <= 30_000).sum())
    assert read(prepared, "train") == TEXTS[:expected]
    assert 29_000 < prepared.train.tokens <= 30_000


def test_max_tokens_may_be_the_end_of_a_document(records, tmp_path):
    ends = np.cumsum([len(text) + 1 for text in TEXTS])
    prepared = make(records, tmp_path / "cache", validation_fraction=0.0, max_tokens=int(ends[99]))
    assert prepared.train.documents == 100


def test_max_tokens_leaves_the_rest_unread(records, tmp_path):
    with records.open("a") as file:
        file.write("{broken\n")
    assert make(records, tmp_path / "cache", max_tokens=30_000).train.tokens < 30_000
    with pytest.raises(ConfigError, match="line 1001"):
        make(records, tmp_path / "cache")


def test_blank_documents_are_left_out(tmp_path):
    for name, text in {"a": "", "b": " \n", "c": "text", "d": "more"}.items():
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_text(text)
    assert read(make(tmp_path / "in", tmp_path / "cache", validation_fraction=0.0), "train") == ["text", "more"]


def test_text_that_gives_nothing_is_refused(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(" \n")
    with pytest.raises(ConfigError, match=r"data\.path: a\.txt holds no text"):
        make(path, tmp_path / "cache")
    path.write_text("a single document")
    with pytest.raises(ConfigError, match=r"data\.validation_fraction: a\.txt is a single document"):
        make(path, tmp_path / "cache")
    with pytest.raises(ConfigError, match=r"data\.max_tokens must leave at least one document"):
        make(path, tmp_path / "cache", max_tokens=3)


def test_errors_in_processes_name_file_and_line(records, tmp_path):
    with records.open("a") as file:
        file.write("{broken\n")
    with pytest.raises(ConfigError, match=r"data\.path: .*records\.jsonl, line 1001: not valid JSON"):
        make(records, tmp_path / "cache", workers=2)
