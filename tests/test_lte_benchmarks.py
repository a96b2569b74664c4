"""The benchmarks of LTE: their arithmetic and rules, and that the documents show the figures of the JSON files."""

import json
from pathlib import Path

import pytest

from benchmarks import lte, two_sites
from benchmarks.lte_costs import SCENARIO, Scenario, Spending, spending
from benchmarks.lte_methods import QUICK, Cell, Family, cells, reference
from benchmarks.lte_picture import draw_curves, draw_grid
from benchmarks.outcome import read_document
from benchmarks.quality_methods import trainable_parameters
from benchmarks.runs import Result
from launch import exits
from launch.config import load
from launch.history import History

ROOT = Path(__file__).parent.parent


def history(cell):
    """As a run of the quick study leaves it."""
    syncs = [
        {"event": "sync", "step": step, "bytes": 1000, "cosine_mean": 0.25, "shrinkage": 0.5}
        for step in range(cell.every, QUICK.steps + 1, cell.every)
        if cell.family.has_heads
    ]
    return History(name="run", steps=[], events=syncs, spectra=[], summary={"steps": QUICK.steps}, config={})


@pytest.fixture
def found(monkeypatch):
    """Finished runs of the quick study, which were never made."""
    monkeypatch.setattr("benchmarks.lte_costs.trainable_parameters", lambda overrides: 500)
    monkeypatch.setattr("benchmarks.lte_costs.step_flops_of", lambda overrides: 1e9)
    curve = [(0, 5.0), (1024, 4.0), (2048, 3.0)]
    result = Result(val_loss=3.0, tokens=2048, restarts=0, seconds=1.0, curve=curve)
    return {(cell, QUICK.rates[cell.family][0]): (result, history(cell)) for cell in cells(QUICK)}


def test_every_cell_composes_sees_the_same_tokens_and_has_a_folder_of_its_own(tmp_path):
    chosen = cells(QUICK)
    configs = [load(cell.overrides(QUICK)) for cell in chosen]
    sizes = {(one.total_steps, one.training.global_batch_size, one.data.sequence_length) for one in configs}
    assert len(sizes) == 1, "the heads share the global batch"
    assert len({cell.job(QUICK, tmp_path, 0.001, apart=False).folder for cell in chosen}) == len(chosen)
    assert [cell.job(QUICK, tmp_path, 0.001, apart=True).processes for cell in chosen] == [1, 1, 2, 2, 2]


def test_a_familys_rate_is_the_one_that_does_best_in_its_reference_cell():
    at = reference(lte.FULL, Family.lte_none)
    found = {
        (at, rate): (Result(val_loss=loss, tokens=1, restarts=0, seconds=1.0, curve=[]), history(at))
        for rate, loss in zip(lte.FULL.rates[Family.lte_none], (2.0, 1.9, 2.1), strict=True)
    }
    assert lte.best_rate(lte.FULL, found, Family.lte_none) == lte.FULL.rates[Family.lte_none][1]


def test_an_exchange_takes_its_bytes_and_the_latency_of_a_ring():
    link = Scenario(flops=1.0, bandwidth=8000.0, latency=0.5)
    assert link.exchange_seconds(2000, 3) == 2.0 + 4 * 0.5
    spent = Spending(machines=3, step_seconds=10.0, exchanges={2: 2000, 4: 1000})
    assert spent.after(1, link) == (0, 10.0)
    assert spent.after(4, link) == (3000, 40.0 + 4.0 + 3.0)


def test_gradients_travel_in_every_step_and_heads_tell_what_they_sent(found):
    ddp, heads = cells(QUICK)[0], cells(QUICK)[2]
    summed = spending(ddp, (), 4, history(ddp), SCENARIO)
    assert summed.exchanges == dict.fromkeys(range(1, 9), 2 * 3 * 4 * 500 // 4), "a ring's all-reduce in fp32"
    assert spending(heads, (), 2, history(heads), SCENARIO).exchanges == {4: 1000, 8: 1000}
    assert summed.step_seconds == 1e9 / 4 / SCENARIO.flops


def test_rows_and_tables_are_of_all_cells(found):
    outcome = lte.results(QUICK, found)
    assert [row["method"] for row in outcome["rows"]] == [family.value for family in Family]
    row = outcome["rows"][2]
    assert (row["exchanges"], row["sent"], row["cosine"]) == (2, 2000, 0.25)
    assert [point["sent"] for point in row["curve"]] == [0, 1000, 2000]
    assert row["seconds"] > row["compute_seconds"]
    text = lte.tables(outcome)
    assert all(f"| {family.value} " in text for family in Family)
    assert "| 8 |" in " ".join(text.split()), "DDP sends 8 steps x 2,000 bytes, LTE 2 x 1,000"


def test_pictures_are_drawn_from_the_document(found, tmp_path):
    outcome = json.loads(json.dumps(lte.results(QUICK, found)))
    for draw in (draw_curves, draw_grid):
        draw(outcome, tmp_path / "picture.png")
        assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_the_bytes_that_a_device_sent_are_found_in_the_kernels_table():
    zeros = " 0" * 6
    table = f"Inter-| Receive | Transmit\n face |bytes packets\n    lo: 120 2{zeros} 120 2{zeros}\n"
    table += f" link0: 1234567 99{zeros} 765432 88{zeros}\n"
    assert two_sites.device_sent(table, "link0") == 765432


def test_two_sites_compare_methods_at_equal_tokens():
    base = ("model=llama_tiny", *two_sites.QUICK.overrides, f"training.steps={two_sites.QUICK.steps}")
    configs = [load((*base, *words)) for words in two_sites.methods(two_sites.QUICK).values()]
    assert {one.training.global_batch_size for one in configs} == {4}
    assert [one.heads for one in configs] == [1, 1, 2, 2, 2]


def test_without_namespaces_the_sites_talk_over_the_loopback_and_it_is_said(monkeypatch):
    from relora.errors import ConfigError

    def refused(links):
        raise ConfigError("not permitted here")

    monkeypatch.setattr(two_sites, "sites", refused)
    with two_sites.two_sites(two_sites.QUICK) as (place, link):
        assert place.sent() is None
        assert "not throttled" in link


@pytest.mark.slow
def test_the_study_runs_all_methods_at_the_same_tokens(tmp_path):
    words = ["--quick", "--json", str(tmp_path / "lte.json"), "--picture", str(tmp_path / "lte.png")]
    assert lte.main([*words, "--runs", str(tmp_path / "runs")]) == exits.DONE
    rows = {row["method"]: row for row in read_document(tmp_path / "lte.json")["rows"]}
    assert {row["tokens"] for row in rows.values()} == {8 * 4 * 64}
    assert rows["LTE, reset none"]["numerical_rank"] <= 2 * QUICK.rank < rows["LTE, reset factors"]["numerical_rank"]
    assert rows["LTE, reset factors"]["sent"] < rows["DiLoCo"]["sent"] < rows["full rank"]["sent"]
    assert rows["full rank"]["sent"] == 8 * 4 * trainable_parameters(
        Cell(family=Family.ddp, machines=1, every=1).overrides(QUICK)
    )


@pytest.mark.slow
def test_two_sites_train_over_a_link_whose_bytes_are_those_that_were_counted(tmp_path):
    file = tmp_path / "two_sites.json"
    assert two_sites.main(["--quick", "--json", str(file)]) == exits.DONE
    for row in read_document(file)["rows"]:
        assert row["tokens"] == 4 * 4 * 64
        if row["sent"] is not None:  # else namespaces are not permitted here
            trained = row["sent"] - row["sent_without_training"]
            assert row["counted"] < trained < 1.1 * row["counted"] + 100_000, "and headers, and what the watchdog says"


@pytest.mark.parametrize("module", [lte, two_sites])
def test_the_documents_show_the_figures_of_the_json_files(module):
    name = module.__name__.rpartition(".")[2]
    shown = (ROOT / "docs/results/lte.md").read_text(encoding="utf-8").splitlines()
    for line in module.tables(read_document(ROOT / f"benchmarks/results/{name}.json")).splitlines():
        assert line in shown
