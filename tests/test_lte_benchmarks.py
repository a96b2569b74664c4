"""The benchmarks of LTE: their arithmetic and rules, and that the documents show the figures of the JSON files."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import lte, two_sites
from benchmarks.lte_costs import LINK, Spending, spending
from benchmarks.lte_methods import QUICK, Family, cells
from benchmarks.lte_picture import draw_curves, draw_grid
from benchmarks.outcome import read_document
from benchmarks.quality_methods import trainable_parameters
from benchmarks.runs import Result
from launch import exits, train
from launch.config import load
from launch.reports.history import History
from parallel.link_model import Method, Trip

ROOT = Path(__file__).parent.parent


def history(cell):
    """As a run of the quick study leaves it."""
    syncs = [
        {"event": "sync", "step": step, "bytes": 1000, "cosine_mean": 0.25, "shrinkage": 0.5}
        for step in range(cell.every, QUICK.steps + 1, cell.every)
        if cell.family.has_heads
    ]
    return History(name="run", steps=[], events=syncs, spectra=[], summary={"steps": QUICK.steps}, config={})


def method(*, every, sent):
    """Half a second for a step, three messages for an exchange."""
    return Method(name="method", computing=0.5, every=every, trips=[Trip(bytes=sent, hops=3)])


@pytest.fixture
def found(monkeypatch):
    """Finished runs of the quick study, which were never made."""

    def spent(cell, study, machines):
        return Spending(machines=machines, method=method(every=cell.every, sent=1000 * machines))

    monkeypatch.setattr(lte, "spending", spent)
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


def test_each_family_has_the_rate_that_does_best_in_its_reference_cell_beyond_the_first_ones_if_need_be(
    tmp_path, monkeypatch
):
    made = []

    def pretend(jobs, *, workers):
        made.extend(job.folder for job in jobs)

    def loss_of(folder):
        rate = float(folder.name.rpartition("_")[2])
        return Result(val_loss=1 + abs(rate - 0.016), tokens=2048, restarts=0, seconds=1.0, curve=[])

    monkeypatch.setattr(lte, "run_all", pretend)
    monkeypatch.setattr(lte, "read_result", loss_of)
    monkeypatch.setattr(lte, "read_history", lambda folder: history(cells(QUICK)[0]))
    study = replace(QUICK, machines=(2, 4), rates=dict.fromkeys(Family, (0.004, 0.008)), extensions=1)
    found = lte.make_runs(study, tmp_path, workers=1, apart=False)
    assert {lte.best_rate(study, found, family) for family in Family} == {0.016}
    rates = sorted(folder.name for folder in made if folder.parent.name == Family.diloco.name)
    first = [f"heads_2-every_4-lr_{rate}" for rate in (0.004, 0.008, 0.016)]
    assert rates == [*first, "heads_4-every_4-lr_0.016"], "other cells run at the best rate alone"
    assert len(made) == len(set(made))


def test_a_machine_spends_its_steps_and_its_exchanges():
    spent = Spending(machines=3, method=method(every=2, sent=1000))
    assert (spent.sent(1), spent.seconds(1)) == (0, 0.5)
    assert spent.sent(5) == 2000
    assert spent.seconds(5) == 5 * 0.5 + 2 * Trip(bytes=1000, hops=3).seconds(LINK)


def test_gradients_travel_in_every_step_over_a_ring_and_heads_send_at_syncs_only(corpus):
    data = (f"data.path=[{corpus}]", f"data.cache={corpus.parent / 'cache'}")
    study = replace(QUICK, overrides=(*QUICK.overrides, *data))
    ddp, relora, none, factors, diloco = (spending(cell, study, 2) for cell in cells(study))
    entries = {one: trainable_parameters(cell.overrides(study)) for one, cell in zip("dr", cells(study), strict=False)}
    assert ddp.sent(1) == 4 * entries["d"], "an all-reduce of two in fp32: half of everything, twice"
    assert relora.sent(1) == 4 * entries["r"]
    assert none.sent(3) == diloco.sent(3) == 0
    assert none.sent(4) == factors.sent(4) == pytest.approx(4 * entries["r"], rel=0.01), "two heads: each its own"
    assert diloco.sent(4) == pytest.approx(4 * entries["d"], rel=0.01)
    assert ddp.method.computing == diloco.method.computing


def test_rows_and_tables_are_of_all_cells(found):
    outcome = lte.results(QUICK, found)
    assert [row["method"] for row in outcome["rows"]] == [family.value for family in Family]
    row = outcome["rows"][2]
    assert (row["exchanges"], row["sent"], row["cosine"]) == (2, 4000, 0.25)
    assert [point["sent"] for point in row["curve"]] == [0, 2000, 4000]
    assert row["seconds"] > row["compute_seconds"]
    text = lte.tables(outcome)
    assert all(f"| {family.value} " in text for family in Family)
    assert "| 4 |" in " ".join(text.split()), "DDP sends in each of 8 steps, LTE in two"


def test_pictures_are_drawn_from_the_document(found, tmp_path):
    outcome = json.loads(json.dumps(lte.results(QUICK, found)))
    for draw in (draw_grid, draw_curves):
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
def test_the_study_runs_all_methods_at_the_same_tokens(runtime, corpus, tmp_path, monkeypatch):
    def in_this_process(jobs, *, workers):
        assert all(train.main([*job.overrides, f"run.dir={job.folder}"]) == exits.DONE for job in jobs)

    monkeypatch.setattr(lte, "run_all", in_this_process)
    data = (f"data.path=[{corpus}]", f"data.cache={corpus.parent / 'cache'}", "model.config.num_hidden_layers=1")
    study = replace(QUICK, overrides=(*QUICK.overrides, *data))
    outcome = lte.results(study, lte.make_runs(study, tmp_path, workers=1, apart=False))
    rows = {row["method"]: row for row in outcome["rows"]}
    assert {row["tokens"] for row in rows.values()} == {8 * 4 * 64}
    assert rows["LTE, reset none"]["numerical_rank"] <= 2 * QUICK.rank < rows["LTE, reset factors"]["numerical_rank"]
    assert rows["LTE, reset factors"]["sent"] < rows["DiLoCo"]["sent"] < rows["full rank"]["sent"]


@pytest.mark.slow
def test_two_sites_train_over_a_link_that_carries_what_was_counted_and_little_more(tmp_path):
    study = two_sites.QUICK
    words = (*study.overrides, "training.steps=4", *two_sites.methods(study)["LTE, reset factors"])
    with two_sites.two_sites(study) as (place, _):
        outcome = two_sites.train(
            place, ("model=llama_tiny", "model.config.num_hidden_layers=1", *words), tmp_path / "run"
        )
    assert outcome["tokens"] == 4 * 4 * 64
    assert outcome["bytes_sent"] > 20_000
    if outcome["sent"] is not None:  # else namespaces are not permitted here
        assert outcome["bytes_sent"] < outcome["sent"] < 1.1 * outcome["bytes_sent"] + 200_000


@pytest.mark.parametrize("module", [lte, two_sites])
def test_the_documents_show_the_figures_of_the_json_files(module):
    name = module.__name__.rpartition(".")[2]
    shown = (ROOT / "docs/results/lte.md").read_text(encoding="utf-8").splitlines()
    for line in module.tables(read_document(ROOT / f"benchmarks/results/{name}.json")).splitlines():
        assert line in shown
