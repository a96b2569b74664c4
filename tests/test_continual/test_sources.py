import os

import datasets
import pytest

from continual import corpora, embedded
from continual.sources import Source, find_corpus, parse_sources
from relora.errors import ConfigError


def find(path, **settings):
    return find_corpus(Source(path=str(path), **settings), "data.path")


def test_a_name_a_list_and_mappings_are_sources():
    assert parse_sources("a.txt", "data.path") == [Source(path="a.txt")]
    assert parse_sources({"path": "a.txt"}, "data.path") == [Source(path="a.txt")]
    assert parse_sources(["a", {"path": "b", "text_field": "body", "split": None}], "data.path") == [
        Source(path="a"),
        Source(path="b", text_field="body"),
    ]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "data.path must be a source or a list of at least one source"),
        (3, "data.path must be a source or a list"),
        ([3], r"data\.path\[0\] must be a path or a mapping"),
        ([""], r"data\.path\[0\]\.path must be text"),
        ([{"weight": 1}], r"data\.path\[0\] must have a path"),
        ([{"path": "a", "wieght": 1}], r"data\.path\[0\]\.wieght is not a setting of a source; did you mean weight"),
        ([{"path": "a", "zzz": 1}], "zzz is not a setting of a source; it may hold path, weight, name"),
        ([{"path": "a", "weight": 0}], r"data\.path\[0\]\.weight must be a number above 0, got 0"),
        ([{"path": "a", "weight": "half"}], "weight must be a number above 0, got 'half'"),
        ([{"path": "a", "split": 1}], "split must be text, got 1"),
        ([{"path": "a", "weight": 1}, "b"], "every source or none must have a weight; b has none"),
    ],
)
def test_sources_that_mean_nothing_are_refused(value, message):
    with pytest.raises(ConfigError, match=message):
        parse_sources(value, "data.path")


def test_missing_files_and_patterns_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.path: there is no file or folder .*/gone\.txt"):
        find(tmp_path / "gone.txt")
    with pytest.raises(ConfigError, match=r"there is no file or folder .*/some\.jsonl"):
        find("some.jsonl")
    with pytest.raises(ConfigError, match=r"no file matches .*\*\.txt"):
        find(tmp_path / "*.txt")
    with pytest.raises(ConfigError, match=r"the folder .* has no files"):
        find(tmp_path)


def test_a_misspelt_embedded_corpus_is_not_looked_for_on_the_hub():
    with pytest.raises(ConfigError, match="did you mean python_library"):
        find("python_libary")


def test_headers_that_are_not_installed_are_explained(monkeypatch, tmp_path):
    monkeypatch.setattr(embedded, "_place", lambda name: tmp_path / name)
    with pytest.raises(ConfigError, match=r"python_headers is not part of this Python .* install"):
        find("python_headers")


def test_settings_without_effect_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ConfigError, match="split has no effect on"):
        find(tmp_path / "a.txt", split="train")
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "one")
    with pytest.raises(ConfigError, match=r"is a single split; leave out split='test'"):
        find(tmp_path / "one", split="test")
    datasets.DatasetDict({"dev": datasets.Dataset.from_dict({"text": ["a"]})}).save_to_disk(tmp_path / "two")
    with pytest.raises(ConfigError, match="has no split 'train'; set split to one of: dev"):
        find(tmp_path / "two")


def test_small_text_is_known_by_content_wherever_it_lies(tmp_path):
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text("same")
    first = find(tmp_path / "here").fingerprint()
    assert find(tmp_path / "there").fingerprint() == first
    (tmp_path / "there" / "a.txt").write_text("diff")
    assert find(tmp_path / "there").fingerprint() != first


def test_large_text_is_known_by_size_and_time(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "SMALL_BYTES", 3)
    path = tmp_path / "a.txt"
    path.write_text("same")
    os.utime(path, (1, 1))
    first = find(path).fingerprint()
    path.write_text("else")
    os.utime(path, (1, 1))
    assert find(path).fingerprint() == first
    os.utime(path, (2, 2))
    assert find(path).fingerprint() != first
