import base64
import json
import math
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.report import main, report
from launch.reports import figures
from launch.reports.history import differences, flat, read_histories, read_history
from launch.watching.records import append_records
from relora.errors import ConfigError
from relora.spectrum import effective_rank, singular_values

MODULES = [
    f"model.layers.{layer}.{kind}" for layer in range(2) for kind in ("attn.q_proj", "attn.o_proj", "mlp.up_proj")
]


def make_run(folder: Path, *, steps: int = 40, every: int | None = 10, rank: int = 2, finished: bool = True) -> Path:
    """Write the folder of a run whose loss falls, with or without restarts, as training writes it."""
    folder.mkdir(parents=True)
    metrics, spectra = folder / "metrics.jsonl", folder / "spectra.jsonl"
    generator = torch.Generator().manual_seed(0)
    updates = {name: torch.zeros(12, 8) for name in MODULES}
    for step in range(1, steps + 1):
        record: dict[str, Any] = {"step": step, "tokens": 100 * step, "loss": 2 + 3 / step, "lr": 1e-3 / step}
        if step == 6 and every:
            append_records(metrics, {"event": "warm_start_end", "step": 5})
        append_records(metrics, {**record, "grad_norm": 1.0, "tokens_per_second": 900.0 + step, "memory_bytes": 2**30})
        if step % 20 == 0:
            append_records(metrics, {"event": "evaluate", "step": step, "val_loss": 2.5 + 3 / step, "seconds": 0.1})
        if every and step % every == 0 and step < steps:
            append_records(
                metrics, {"event": "restart", "step": step, "restart": step // every, "layers": len(MODULES)}
            )
            for name, update in updates.items():
                up, down = (torch.randn(shape, generator=generator) for shape in ((12, rank), (rank, 8)))
                update.add_(up @ down)
                values = singular_values(update)
                append_records(
                    spectra,
                    {
                        "step": step,
                        "restart": step // every,
                        "module": name,
                        "shape": [12, 8],
                        "singular_values": values.tolist(),
                        "effective_rank": effective_rank(values),
                        "numerical_rank": min(8, rank * step // every),
                        "update_ratio": 0.1,
                    },
                )
    lora = f"{{rank: {rank}, rank_pattern: {{}}}}" if every else "null"
    (folder / "config.yaml").write_text(f"lora: {lora}\noptimizer:\n  lr: 0.001\nrun:\n  dir: {folder}\n")
    if finished:
        summary = {"status": "done", "steps": steps, "val_loss": 2.575, "tokens_per_second": 920.5, "matrix": [[1.0]]}
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "relora")


def is_png(path: Path) -> bool:
    data = path.read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    return data[:8] == b"\x89PNG\r\n\x1a\n" and width > 600 and height > 200


def test_the_series_are_those_of_the_records(run):
    history = read_history(run)
    assert history.series("loss") == (list(range(1, 41)), [2 + 3 / step for step in range(1, 41)])
    assert history.series("mfu") == ([], [])
    assert history.validation() == ([20, 40], [2.5 + 3 / 20, 2.5 + 3 / 40])
    assert history.marks("restart") == [10, 20, 30]


def test_the_validation_loss_may_stand_in_a_steps_record(tmp_path):
    append_records(tmp_path / "metrics.jsonl", {"step": 3, "loss": 1.0, "val_loss": 1.5}, {"step": 4, "loss": 0.9})
    assert read_history(tmp_path).validation() == ([3], [1.5])


def test_a_loss_that_was_not_finite_is_a_gap(tmp_path):
    append_records(tmp_path / "metrics.jsonl", {"step": 1, "loss": 2.0}, {"step": 2, "loss": math.nan})
    assert read_history(tmp_path).series("loss") == ([1], [2.0])


def test_spectra_are_found_by_module_in_the_order_of_restarts(run):
    layers = read_history(run).layers()
    assert list(layers) == MODULES
    assert all([record["restart"] for record in records] == [1, 2, 3] for records in layers.values())


def test_the_rank_is_bounded_by_adapter_rank_times_merges_and_by_the_shape(tmp_path):
    history = read_history(make_run(tmp_path / "wide", rank=3))
    assert figures.rank_bound(history, history.layers()[MODULES[0]]) == [3, 6, 8]
    history.config["lora.rank_pattern.q_proj"] = 1
    assert figures.rank_bound(history, history.layers()[MODULES[0]]) == []


def test_the_mean_effective_rank_is_over_the_modules_of_a_restart(run):
    history = read_history(run)
    steps, means = figures.mean_effective_rank(history)
    assert steps == [10, 20, 30]
    of_first = [record["effective_rank"] for record in history.spectra if record["step"] == 10]
    assert means[0] == pytest.approx(sum(of_first) / len(MODULES))
    assert means[0] < means[1] < means[2]


def test_smoothing_keeps_short_series_and_averages_long_ones():
    short = list(range(5)), [1.0, 5.0, 2.0, 8.0, 3.0]
    assert figures.smoothed(short) == short
    steps, values = figures.smoothed((list(range(1000)), [float(step % 2) for step in range(1000)]))
    assert len(steps) == len(values) == 1000
    assert all(abs(value - 0.5) < 0.1 for value in values)


def test_figures_show_the_data_and_mark_the_restarts(run):
    history = read_history(run)
    loss, perplexity = figures.loss_figure([history]).axes
    drawn = [line.get_ydata() for line in loss.get_lines()]
    assert any(list(values) == history.series("loss")[1] for values in drawn)
    assert any(list(values) == history.validation()[1] for values in drawn)
    assert any(
        list(line.get_ydata()) == [math.exp(v) for v in history.validation()[1]] for line in perplexity.get_lines()
    )
    marks = [line.get_xdata()[0] for line in loss.get_lines() if list(line.get_ydata()) == [0, 1]]
    assert marks == [10, 20, 30, 5]


def test_each_layer_and_kind_has_its_panel_of_singular_values(run):
    history = read_history(run)
    figure = figures.spectra_figure(history)
    panels = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]
    assert len(panels) == len(MODULES)
    drawn = [list(line.get_ydata()) for line in panels[0].get_lines() if len(line.get_ydata()) == 8]
    assert drawn == [record["singular_values"] for record in history.layers()[MODULES[0]]]
    assert panels[0].get_yscale() == "log"


def test_two_modules_of_one_name_in_a_layer_keep_apart(tmp_path):
    folder = make_run(tmp_path / "gpt2")
    text = (
        (folder / "spectra.jsonl")
        .read_text()
        .replace("attn.q_proj", "attn.c_proj")
        .replace("mlp.up_proj", "mlp.c_proj")
    )
    (folder / "spectra.jsonl").write_text(text)
    figure = figures.rank_figure(read_history(folder))
    assert [axes.get_title() for axes in figure.axes[:3]] == ["attn.c_proj", "attn.o_proj", "mlp.c_proj"]


def test_a_report_of_one_run_lies_in_its_folder(run):
    files = report([run])
    assert [file.name for file in files] == [
        "loss.png",
        "learning_rate.png",
        "throughput.png",
        "spectra.png",
        "rank.png",
        "report.html",
    ]
    assert {file.parent for file in files} == {run / "report"}
    assert all(is_png(file) for file in files[:-1])


def test_the_page_holds_its_images_and_the_outcome(run):
    *images, page = report([run])
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)=["'](?!data:)""", text)
    held = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    assert [base64.b64decode(image) for image in held] == [image.read_bytes() for image in images]
    assert "<td>val_loss</td><td>2.575</td>" in text
    assert "<td>lora.rank</td><td>2</td>" in text
    assert "matrix" not in text


def test_several_runs_are_compared_by_outcome_and_settings(run, tmp_path):
    full = make_run(tmp_path / "full", every=None)
    other = make_run(tmp_path / "r1", rank=1, finished=False)
    files = report([run, full, other], tmp_path / "out")
    names = {file.name for file in files}
    assert {"effective_rank.png", "spectra_relora.png", "rank_r1.png"} <= names
    assert "spectra_full.png" not in names
    text = files[-1].read_text(encoding="utf-8")
    assert "<td>lora.rank</td><td>2</td><td>-</td><td>1</td>" in text
    assert "<td>optimizer.lr</td>" not in text
    assert "Not finished: r1." in text


def test_only_settings_that_differ_are_listed():
    class Fake:
        def __init__(self, config: dict[str, Any]) -> None:
            self.config = config

    runs = [Fake({"a": 1, "b": [1], "c": None}), Fake({"a": 1, "b": [2]}), Fake({"a": 1, "b": [1], "d": 0})]
    assert differences(runs) == [["b", [1], [2], [1]], ["d", None, None, 0]]


def test_nested_settings_become_dotted_keys():
    assert flat({"a": {"b": {"c": 1}, "d": [2]}, "e": {}}) == {"a.b.c": 1, "a.d": [2]}


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    folders = [make_run(tmp_path / study / "seed0") for study in ("a", "b")]
    assert [history.name for history in read_histories(folders)] == ["a/seed0", "b/seed0"]
    names = [history.name for history in read_histories([folders[0], folders[0]])]
    assert len(set(names)) == 2


def test_a_run_that_goes_on_and_was_torn_is_drawn(tmp_path):
    folder = make_run(tmp_path / "torn", finished=False)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "loss": 2.')
    (folder / "config.yaml").unlink()
    assert read_history(folder).series("loss")[0][-1] == 40
    assert all(is_png(file) for file in report([folder])[:-1])


def test_a_run_before_its_first_step_is_drawn(tmp_path):
    append_records(tmp_path / "metrics.jsonl", {"event": "evaluate", "step": 0, "val_loss": 9.0})
    assert len(report([tmp_path])) == 4


def test_a_full_rank_run_has_no_figures_of_spectra(tmp_path):
    files = report([make_run(tmp_path / "full", every=None)])
    assert [file.name for file in files] == ["loss.png", "learning_rate.png", "throughput.png", "report.html"]


def test_names_from_outside_cannot_break_the_page(tmp_path):
    folder = make_run(tmp_path / "a<b>&")
    text = report([folder])[-1].read_text(encoding="utf-8")
    assert "a<b>" not in text
    assert "a&lt;b&gt;&amp;" in text


def test_what_is_not_a_run_is_refused_with_one_line_and_exit_code_2(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank").mkdir()
    (tmp_path / "blank" / "metrics.jsonl").touch()
    for name, reason in (("missing", "does not exist"), ("empty", "is missing"), ("blank", "is empty")):
        assert main([str(tmp_path / name)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        assert reason in err
        assert str(tmp_path / name) in err
    with pytest.raises(ConfigError, match="does not exist"):
        report([tmp_path / "missing"])


def test_a_place_that_cannot_hold_the_report_is_refused(run, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main([str(run), "--out", str(tmp_path / "file")]) == 2
    assert "--out" in capsys.readouterr().err


def test_the_command_prints_the_files_it_wrote(run, tmp_path):
    command = [sys.executable, "-m", "launch.report", str(run), "--out", str(tmp_path / "out")]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=100, check=True
    )
    written = done.stdout.splitlines()
    assert written[-1] == str(tmp_path / "out" / "report.html")
    assert sorted(written) == sorted(str(path) for path in (tmp_path / "out").iterdir())
