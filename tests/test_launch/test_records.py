import json
import math

import pytest

from launch.watching.records import append_records, read_records, truncate_records
from relora.errors import ConfigError


def test_what_is_appended_is_read_back_in_order(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_records(path, {"step": 1, "loss": 2.5})
    append_records(path, {"event": "restart", "step": 2}, {"step": 3, "nested": {"a": [1, 2]}})
    assert read_records(path) == [
        {"step": 1, "loss": 2.5},
        {"event": "restart", "step": 2},
        {"step": 3, "nested": {"a": [1, 2]}},
    ]


def test_a_record_is_on_disk_once_appended(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_records(path, {"step": 1})
    assert path.read_bytes() == b'{"step": 1}\n'


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_stay_valid_json(tmp_path, value):
    path = tmp_path / "metrics.jsonl"
    append_records(path, {"step": 1, "loss": value, "deep": [{"x": value}], "lr": 0.5})

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    record = json.loads(path.read_text(), parse_constant=refuse)
    assert record == {"step": 1, "loss": None, "deep": [{"x": None}], "lr": 0.5}


@pytest.mark.parametrize("torn", [b'{"step": 3, "lo', b"\0\0\0\0", b'{"step": 3, "name": "\xc3'])
def test_a_torn_last_line_is_passed_over(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + torn)
    assert [record["step"] for record in read_records(path)] == [1, 2]


def test_a_damaged_line_in_the_middle_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "lo\n{"step": 3}\n')
    with pytest.raises(ConfigError, match=r"metrics\.jsonl, line 2 "):
        read_records(path)


def test_truncating_drops_later_steps_and_the_torn_line_and_keeps_bytes(tmp_path):
    path = tmp_path / "metrics.jsonl"
    kept = b'{"step": 1, "x": 1e-05}\n{"note": "no step"}\n{"event": "restart", "step": 2}\n'
    path.write_bytes(kept + b'{"step": 3}\n{"step": 4}\n{"step": 5, "l')
    assert truncate_records(path, 2) == 2
    assert path.read_bytes() == kept
    append_records(path, {"step": 3})
    assert read_records(path)[-1] == {"step": 3}
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_whole_last_line_without_its_end_does_not_swallow_the_next_record(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}')
    truncate_records(path, 2)
    append_records(path, {"step": 3})
    assert [record["step"] for record in read_records(path)] == [1, 2, 3]


def test_truncating_a_missing_file_makes_none(tmp_path):
    assert truncate_records(tmp_path / "metrics.jsonl", 0) == 0
    assert not list(tmp_path.iterdir())
