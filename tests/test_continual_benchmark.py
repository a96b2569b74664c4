"""The study of continual training: its jobs compose, its tables follow from the document, its page keeps its words."""

from pathlib import Path

import pytest

from benchmarks.continual import main
from benchmarks.continual_studies import STUDIES
from benchmarks.continual_tables import tables
from benchmarks.outcome import read_document
from benchmarks.page import BEGIN, END, write_tables
from launch import exits
from launch.config import load
from launch.watching.stage_records import Score, StageRecord
from relora.errors import ConfigError

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def stage(index, seconds, **accuracies):
    scores = {task: Score(loss=1.0, accuracy=value, samples=10) for task, value in accuracies.items()}
    record = StageRecord(step=index, task=f"t{index}", index=index, scores=scores, seconds=seconds, method_bytes=1000)
    return record.values()


def document(**methods):
    runs = [
        {"method": method, "seed": seed, "stages": stages}
        for method, of in methods.items()
        for seed, stages in enumerate(of)
    ]
    return {"runs": runs}


@pytest.mark.parametrize("name", STUDIES)
def test_every_method_of_a_study_has_settings_that_compose_and_a_folder_of_its_own(name, tmp_path):
    study = STUDIES[name]
    assert {"sequential", "replay", "inflora", "joint"} <= set(study.methods)
    for quick in (False, True):
        jobs = [study.job(tmp_path, method, seed, quick=quick) for method in study.methods for seed in (0, 1)]
        assert len({job.folder for job in jobs}) == len(jobs)
        for method, job in zip(study.methods, jobs[1::2], strict=True):
            config = load(job.overrides)
            assert (config.continual.method, config.run.seed) == (method, 1)


def test_tables_have_means_and_deviations_over_seeds_and_the_distance_to_a_model_per_task():
    found = document(
        sequential=[
            [stage(0, 1.0, t0=0.9), stage(1, 2.0, t0=0.3, t1=0.8)],
            [stage(0, 1.0, t0=0.9), stage(1, 4.0, t0=0.5, t1=0.8)],
        ],
        per_task=[[stage(0, 1.0, t0=0.9), stage(1, 1.0, t0=0.9, t1=0.85)] for _ in range(2)],
    )
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in tables(found).splitlines()]
    rows = [cells for cells in lines if cells and cells[0] == "sequential"]
    assert rows[0][1:7] == ["2", "2", "60.0 (7.1)", "75.0 (3.5)", "85.0 (0.0)", "50.0 (14.1)"]
    assert rows[1] == ["sequential", "-50.0 (14.1)", "-5.0 (0.0)"]
    assert rows[2] == ["sequential", "4", "0 B", "1.00 kB"]
    assert ["t1", "40.0 (14.1)", "80.0 (0.0)"] in lines


def test_a_page_gets_new_tables_and_keeps_its_words(tmp_path):
    page = tmp_path / "page.md"
    write_tables(page, title="Title", tables="| old |")
    page.write_text(page.read_text().replace(END, f"{END}\n\nWords that stay."))
    write_tables(page, title="Other", tables="| new |")
    assert page.read_text() == f"# Title\n\n{BEGIN}\n\n| new |\n\n{END}\n\nWords that stay.\n"
    page.write_text("words")
    with pytest.raises(ConfigError, match="has no lines"):
        write_tables(page, title="Title", tables="")


@pytest.mark.slow
def test_the_study_runs_and_a_method_of_its_own_per_task_forgets_nothing(tmp_path):
    words = [
        "digits",
        "--quick",
        "--seeds",
        "0",
        "--methods",
        "sequential",
        "per_task",
        "--runs",
        str(tmp_path / "runs"),
    ]
    files = ["--json", str(tmp_path / "d.json"), "--picture", str(tmp_path / "d.png"), "--page", str(tmp_path / "d.md")]
    assert main([*words, *files]) == exits.DONE
    found = read_document(tmp_path / "d.json")
    assert tables(found) in (tmp_path / "d.md").read_text()
    own = next(run["stages"] for run in found["runs"] if run["method"] == "per_task")
    assert own[-1]["scores"]["t0"] == own[-2]["scores"]["t0"]
    for name in ("d.png", "d_tasks.png"):
        assert (tmp_path / name).stat().st_size > 5_000


@pytest.mark.parametrize(
    "name", [one for one in ("continual_digits", "python_three") if (RESULTS / f"{one}.json").is_file()]
)
def test_the_documents_show_the_figures_of_the_json_files(name):
    shown = (ROOT / "docs" / "results" / f"{name}.md").read_text(encoding="utf-8")
    assert tables(read_document(RESULTS / f"{name}.json")) in shown
