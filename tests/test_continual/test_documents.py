import gzip
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from continual import corpora, documents
from continual.corpora import documents_of
from continual.documents import UnreadableError
from continual.sources import Source, find_corpus

RECORDS = [{"text": f"record {n}: {'x' * (n % 50)} \u00e9", "id": n} for n in range(300)]
TEXTS = [record["text"] for record in RECORDS]


def lines(records):
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def read(path, text_field="text", **settings):
    return list(documents_of(find_corpus(Source(path=str(path), **settings), "data.path"), text_field))


def write_parquet(path, records):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path, row_group_size=70)


WRITERS = {
    "records.jsonl": lambda path: path.write_bytes(lines(RECORDS)),
    "records.json": lambda path: path.write_bytes(lines(RECORDS)),
    "records.jsonl.gz": lambda path: path.write_bytes(gzip.compress(lines(RECORDS))),
    "records.json.gz": lambda path: path.write_bytes(gzip.compress(lines(RECORDS))),
    "records.parquet": lambda path: write_parquet(path, RECORDS),
    "saved": lambda path: datasets.Dataset.from_list(RECORDS).save_to_disk(path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_documents(name, tmp_path):
    WRITERS[name](tmp_path / name)
    assert read(tmp_path / name) == TEXTS


def test_a_split_of_a_saved_data_set_is_read(tmp_path):
    splits = {"train": TEXTS[:3], "test": TEXTS[3:5]}
    datasets.DatasetDict(
        {name: datasets.Dataset.from_dict({"text": texts}) for name, texts in splits.items()}
    ).save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved") == TEXTS[:3]
    assert read(tmp_path / "saved", split="test") == TEXTS[3:5]


@pytest.mark.parametrize("unit_bytes", [1, 100, 999, 10**6])
def test_json_lines_are_read_once_however_the_file_is_cut(unit_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "UNIT_BYTES", unit_bytes)
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(RECORDS)[:-1].replace(b"\n", b"\n\n", 40))
    assert read(path) == TEXTS


@pytest.mark.parametrize("separator", ["\n", " ", ""])
def test_long_text_is_cut_into_pieces_that_make_the_whole(separator, tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "UNIT_BYTES", 3 * documents.PIECE_BYTES)
    text = "".join(f"{n} \u4e2d\u6587\u00e9{separator}" if separator else "\u4e2d\u6587\u00e9" for n in range(60_000))
    path = tmp_path / "long.txt"
    path.write_text(text, encoding="utf-8")
    pieces = read(path)
    assert "".join(pieces) == text
    assert len(pieces) == path.stat().st_size // documents.PIECE_BYTES > 5
    if separator:
        assert all(piece.endswith(separator) for piece in pieces)


def test_short_files_are_documents_in_the_order_of_their_names(tmp_path):
    for name in ["b/2.txt", "a.md", "b/1.txt", ".hidden", "b/__pycache__/x.pyc"]:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(name)
    assert read(tmp_path) == ["a.md", "b/1.txt", "b/2.txt"]
    assert read(tmp_path / "**/*.txt") == ["b/1.txt", "b/2.txt"]


def test_a_folder_of_records_leaves_out_what_describes_them(tmp_path):
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "info.json").write_text("{}")
    (tmp_path / "part-0.jsonl").write_bytes(lines(RECORDS[:2]))
    write_parquet(tmp_path / "part-1.parquet", RECORDS[2:4])
    assert read(tmp_path) == TEXTS[:4]


@pytest.mark.parametrize("name", ["python_library", "python_reference", "python_headers"])
def test_embedded_text_is_there_and_different(name):
    if name == "python_headers" and not corpora_has_headers():
        pytest.skip("this Python has no C headers")
    texts = read(name)
    assert len(texts) > 50
    assert {"python_library": "def ", "python_reference": "statement", "python_headers": "#define"}[name] in "".join(
        texts
    )


def corpora_has_headers():
    from continual.embedded import python_headers

    return bool(python_headers())


BROKEN = [
    ("a.jsonl", lines(RECORDS[:2]) + b"{broken\n", r"a\.jsonl, line 3: not valid JSON"),
    ("a.json", b"[\n" + lines(RECORDS[:1]) + b"]", r"a\.json, line 1: not valid JSON .*one object per line"),
    ("a.jsonl", b'["text"]\n', r"line 1: a line must hold a JSON object"),
    ("a.jsonl", b'{"content": "x", "id": 3}\n', r"no field 'text'; set data\.text_field to one of: content, id"),
    ("a.jsonl", b'{"text": null}\n', r"line 1: field 'text' must hold text, got NoneType"),
    ("a.jsonl", b'{"text": "\\ud800"}\n', r"line 1: field 'text' holds half a surrogate pair"),
    ("a.jsonl", b'{"text": "\xff"}\n', r"line 1: not valid JSON"),
    ("a.jsonl.gz", gzip.compress(lines(RECORDS))[:-20], r"a\.jsonl\.gz, line \d+: "),
    ("a.jsonl.gz", b"plain", r"a\.jsonl\.gz, line 1: Not a gzipped file"),
    ("a.txt", b"fine \xff", r"a\.txt is not UTF-8 text \(byte 5\)"),
    ("a.parquet", b"plain", r"a\.parquet is not a Parquet file"),
]


@pytest.mark.parametrize(("name", "content", "message"), BROKEN)
def test_what_cannot_be_read_is_named_with_its_place(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UnreadableError, match=message):
        read(tmp_path / name)


def test_line_numbers_are_right_in_later_units(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "UNIT_BYTES", 500)
    (tmp_path / "a.jsonl").write_bytes(lines(RECORDS[:200]) + b"{broken\n")
    with pytest.raises(UnreadableError, match="line 201:"):
        read(tmp_path / "a.jsonl")


@pytest.mark.parametrize("name", ["records.parquet", "saved"])
def test_missing_and_wrong_fields_of_tables_are_named(name, tmp_path):
    WRITERS[name](tmp_path / name)
    with pytest.raises(UnreadableError, match=r"no field 'body'; set data\.text_field to one of: text, id"):
        read(tmp_path / name, "body")
    with pytest.raises(UnreadableError, match="field 'id' must hold text, got int"):
        read(tmp_path / name, "id")


def test_a_name_that_is_nothing_here_and_not_on_the_hub_says_so():
    with pytest.raises(UnreadableError, match="nowhere/at-all is no embedded corpus, file or folder"):
        read("nowhere/at-all")


def test_hub_data_sets_are_known_without_a_network():
    corpus = find_corpus(Source(path="allenai/c4", name="en", split="validation"), "data.path")
    other = find_corpus(Source(path="allenai/c4", name="en"), "data.path")
    assert corpus.label == "allenai/c4:en"
    assert len({corpus.fingerprint(), other.fingerprint()}) == 2
