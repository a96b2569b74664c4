"""What a report tells of LTE's syncs."""

import math

import pytest

from launch.report import report
from launch.reports import figures, sync_figures
from launch.reports.history import read_history
from launch.watching.records import append_records


@pytest.fixture
def run(tmp_path):
    """The folder of a run of three heads, the second of which misses the second sync."""
    metrics = tmp_path / "metrics.jsonl"
    for step in range(1, 13):
        append_records(metrics, {"step": step, "tokens": 10 * step, "loss": 3.0, "lr": 0.1, "tokens_per_second": 5.0})
        if step % 4 == 0:
            members = [0, 2] if step == 8 else [0, 1, 2]
            sync = {"losses": [2.0 + head for head in members], "delta_norms": [3.0, 4.0, 12.0][: len(members)]}
            sync |= {"cosine_mean": 0.1, "cosine_min": -0.1, "cosine_max": 0.3, "shrinkage": 0.6, "bytes": 1000}
            sync |= {"members": members, "seconds": 2.0, "effective_rank": None if step == 8 else 1.5}
            append_records(metrics, {"event": "sync", "step": step, **sync})
    for step in (4, 12):
        decomposed = {"module": "a.0.q", "shape": [9, 8], "singular_values": [2.0, 1.0], "update_ratio": 0.1}
        ranks = {"effective_rank": 2.0, "numerical_rank": 2}
        append_records(tmp_path / "spectra.jsonl", {"step": step, "restart": step // 4, **decomposed, **ranks})
    (tmp_path / "config.yaml").write_text(
        "lora: {rank: 1}\nlte: {heads: 3, reset: none, outer: none, reset_every: 1}\n"
    )
    return tmp_path


def test_each_head_has_its_series_without_the_syncs_that_it_missed(run):
    heads = sync_figures.by_head(read_history(run).syncs(), "losses")
    assert heads == {
        0: ([4, 8, 12], [2.0, 2.0, 2.0]),
        1: ([4, 12], [3.0, 3.0]),
        2: ([4, 8, 12], [4.0, 4.0, 4.0]),
    }


def test_the_share_of_syncs_is_of_the_time_so_far(run):
    steps, shares = sync_figures.sync_shares(read_history(run))  # a step takes 2 seconds, a sync as well
    assert steps == [4, 8, 12]
    assert shares == pytest.approx([2 / 10, 4 / 20, 6 / 30])


def test_figures_show_what_the_syncs_tell(run):
    history = read_history(run)
    losses, norms, cosines, shrinkage = sync_figures.agreement_figure(history).axes
    assert [line.get_label() for line in losses.get_lines()] == ["head 0", "head 1", "head 2"]
    assert list(norms.get_lines()[2].get_ydata()) == [12.0, 4.0, 12.0]
    assert list(cosines.get_lines()[0].get_ydata()) == [0.1, 0.1, 0.1]
    reference = shrinkage.get_lines()[1].get_ydata()
    assert list(reference) == pytest.approx([13 / 19, 5 / 7, 13 / 19]), "the root of the sum of squares over the sum"
    (ranks,) = sync_figures.sync_rank_figure(history).axes
    assert [list(line.get_xdata()) for line in ranks.get_lines()] == [[4, 12], [4, 12], [4, 12]]
    sizes, *_ = sync_figures.sync_cost_figure(history).axes
    assert list(sizes.get_lines()[0].get_ydata()) == [1000, 1000, 1000]


@pytest.mark.parametrize(
    ("settings", "bounds"),
    [
        ({}, [3, 3]),
        ({"lte.outer": "nesterov"}, [3, 8]),
        ({"lte.reset": "factors"}, [3, 8]),
        ({"lte.reset": "factors", "lte.reset_every": 2}, [3, 6]),
        ({"lte.ranks": [1, 1, 2]}, [4, 4]),
        ({"lte.exchange": "shared"}, [1, 1]),
        ({"lora.rank_pattern.q": 2}, []),
    ],
)
def test_the_rank_is_bounded_by_the_factors_of_all_heads(run, settings, bounds):
    history = read_history(run)
    history.config |= settings
    assert figures.rank_bound(history, history.layers()["a.0.q"]) == bounds


def test_a_report_of_heads_has_their_figures(run):
    assert {"heads.png", "sync_rank.png", "sync_cost.png"} <= {file.name for file in report([run])}


def test_heads_without_any_change_are_drawn(run):
    history = read_history(run)
    for record in history.syncs():
        record.update(delta_norms=[0.0] * len(record["members"]), shrinkage=1.0)
        record.update(cosine_mean=None, cosine_min=None, cosine_max=None)
    *_, shrinkage = sync_figures.agreement_figure(history).axes
    assert not any(math.isnan(value) for line in shrinkage.get_lines() for value in line.get_ydata())
