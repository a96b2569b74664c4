"""Every definition against a matrix of three tasks, worked out by hand."""

import math

import pytest

from continual import metrics
from continual.metrics import ScoreMatrix, h_mean, summary

ROWS = [
    [0.90, 0.20, 0.30],
    [0.70, 0.80, 0.40],
    [0.75, 0.60, 0.95],
]
MATRIX = ScoreMatrix(rows=ROWS, baseline=[0.10, 0.15, 0.25], samples=[100, 300, 600])
LOSSES = ScoreMatrix(
    rows=[[1.0, 4.0, 5.0], [1.5, 2.0, 4.5], [1.2, 2.6, 1.0]],
    baseline=[6.0, 5.0, 5.5],
    samples=[1, 1, 2],
    higher_is_better=False,
)
HELPED = ScoreMatrix(rows=[[0.6, 0.1, 0.1], [0.5, 0.7, 0.1], [0.8, 0.75, 0.9]])


@pytest.mark.parametrize(
    ("formula", "of_accuracies", "of_losses"),
    [
        (metrics.last_score, (0.75 + 0.60 + 0.95) / 3, (1.2 + 2.6 + 1.0) / 3),
        (metrics.last_score_by_samples, 0.075 + 0.18 + 0.57, (1.2 + 2.6 + 2 * 1.0) / 4),
        (metrics.average_score, (0.90 + 0.75 + 2.30 / 3) / 3, (1.0 + 1.75 + 1.6) / 3),
        (metrics.average_score_by_samples, (0.90 + 0.775 + 0.825) / 3, (1.0 + 1.75 + 1.45) / 3),
        (metrics.learning_score, (0.90 + 0.80 + 0.95) / 3, (1.0 + 2.0 + 1.0) / 3),
        (metrics.forgetting_max, (0.15 + 0.20) / 2, (0.2 + 0.6) / 2),
        (metrics.forgetting_chaudhry, (0.15 + 0.20) / 2, (0.2 + 0.6) / 2),
        (metrics.forgetting_first, (0.15 + 0.20) / 2, (0.2 + 0.6) / 2),
        (metrics.bwt, -(0.15 + 0.20) / 2, -(0.2 + 0.6) / 2),
        (metrics.bwt_clipped, -(0.15 + 0.20) / 3, -(0.2 + 0.6) / 3),
        (metrics.fwt, ((0.20 - 0.15) + (0.40 - 0.25)) / 2, ((5.0 - 4.0) + (5.5 - 4.5)) / 2),
    ],
)
def test_each_definition_gives_what_it_gives_by_hand(formula, of_accuracies, of_losses):
    assert formula(MATRIX) == pytest.approx(of_accuracies)
    assert formula(LOSSES) == pytest.approx(of_losses)


def test_the_definitions_part_where_the_last_stage_helped_or_a_middle_one_did():
    assert metrics.forgetting_max(HELPED) == 0.0
    assert metrics.forgetting_chaudhry(HELPED) == pytest.approx((-0.2 - 0.05) / 2)
    assert metrics.bwt(HELPED) == pytest.approx((0.2 + 0.05) / 2)
    assert metrics.bwt_clipped(HELPED) == 0.0
    middle = ScoreMatrix(rows=[[0.5], [0.9, 0.7], [0.6, 0.6, 0.8]])
    assert metrics.forgetting_max(middle) == pytest.approx((0.3 + 0.1) / 2)
    assert metrics.forgetting_first(middle) == pytest.approx((-0.1 + 0.1) / 2)
    assert metrics.bwt_clipped(middle) == pytest.approx(-0.1 / 3)


def test_rows_without_later_tasks_give_all_but_forward_transfer():
    triangle = ScoreMatrix(rows=[row[: number + 1] for number, row in enumerate(ROWS)], baseline=[0.1, 0.1, 0.1])
    for formula in (metrics.average_score, metrics.forgetting_max, metrics.forgetting_chaudhry, metrics.bwt):
        assert formula(triangle) == formula(MATRIX)
    assert metrics.fwt(triangle) is None
    assert metrics.last_score_by_samples(triangle) is None, "no counts of samples"


def test_what_a_diverged_task_makes_unknown_is_none_and_not_a_mean_of_the_rest():
    torn = ScoreMatrix(rows=[[0.9], [None, 0.8], [0.75, 0.6, 0.95]])
    assert metrics.average_score(torn) is None
    assert metrics.forgetting_max(torn) is None
    assert metrics.last_score(torn) == metrics.last_score(MATRIX)
    assert metrics.bwt(torn) == metrics.bwt(MATRIX)


def test_one_stage_has_levels_and_no_transfer():
    told = summary(ScoreMatrix(rows=[[0.5, 0.1]], baseline=[0.1, 0.1]))
    assert told["average_accuracy"] == told["last_accuracy"] == told["learning_accuracy"] == 0.5
    assert all(told[name] is None for name in ("forgetting", *metrics.TRANSFERS))
    assert summary(ScoreMatrix(rows=[]))["last_accuracy"] is None


def test_a_stage_may_learn_all_tasks_at_once_or_none():
    joint = ScoreMatrix(rows=[[0.9, 0.7, 0.8]], learned=[0, 0, 0])
    assert metrics.last_score(joint) == metrics.average_score(joint) == pytest.approx(0.8)
    assert metrics.bwt(joint) is None
    forgets = ScoreMatrix(rows=[[0.9, 0.9], [0.85, 0.0]], learned=[0, None])
    assert metrics.last_score(forgets) == 0.85
    assert metrics.forgetting_max(forgets) == pytest.approx(0.05)


def test_a_matrix_while_the_stream_goes_on_tells_of_the_stages_so_far():
    so_far = ScoreMatrix(rows=ROWS[:2], baseline=MATRIX.baseline)
    assert metrics.last_score(so_far) == pytest.approx(0.75)
    assert metrics.forgetting_max(so_far) == pytest.approx(0.2)
    assert metrics.fwt(so_far) == pytest.approx(0.05)


def test_the_summary_has_the_names_of_the_run_folder_and_leaves_the_matrix_alone():
    told = summary(ScoreMatrix(rows=[(0.9,), (0.7, 0.8)], baseline=(0.1,), samples=(2, 2)))
    assert told["matrix"] == [[0.9, None], [0.7, 0.8]]
    assert told["baseline"] == [0.1, None]
    assert {"matrix", "average_accuracy", "forgetting", "bwt", "fwt"} <= set(told)
    assert told["forgetting"] == told["forgetting_max"] == pytest.approx(0.2)


def test_perplexities_are_exponentials_of_mean_losses_so_their_ratio_is_the_forgetting():
    told = summary(LOSSES, score="loss")
    assert told["last_perplexity"] == pytest.approx(math.exp(1.6))
    assert "average_accuracy" not in told
    one = summary(ScoreMatrix(rows=[[1.0], [1.3, 2.0]], higher_is_better=False), score="loss")
    assert math.exp(one["forgetting"]) == pytest.approx(math.exp(1.3) / math.exp(1.0))


@pytest.mark.parametrize(
    ("drop", "retained", "mean"), [(0.9, 0.6, 0.72), (1.0, 1.0, 1.0), (0.0, 0.9, 0.0), (-0.1, 0.9, 0.0)]
)
def test_the_harmonic_mean_needs_both_forgetting_and_keeping(drop, retained, mean):
    assert h_mean(drop, retained) == pytest.approx(mean)
