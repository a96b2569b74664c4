"""Scores of written answers, on cases worked out by hand."""

import pytest

from continual.answers import choice, exact, rouge_l


@pytest.mark.parametrize(
    ("score", "written", "answer", "expected"),
    [
        (exact, " 42\n", "42", 1.0),
        (exact, "42.", "42", 0.0),
        (exact, "", "", 0.0),
        (exact, "Neutral", "neutral", 0.0),
        (choice, "B. the second", "B", 1.0),
        (choice, "\n C", "C: because", 1.0),
        (choice, "the answer is B", "B", 0.0),
        (choice, "", "B", 0.0),
        # Common subsequence a c d: 2 * 3 / (4 + 4).
        (rouge_l, "a b c d", "a c d e", 0.75),
        # In the other order only one word is common: 2 * 1 / (3 + 3).
        (rouge_l, "x y z", "z y x", 1 / 3),
        # Sentences match in any order, here "the cat" and "a dog" with "ran" and "sat" by the other pairs.
        (rouge_l, "a dog ran. the cat sat", "the cat sat. a dog ran.", 1.0),
        # A word that repeats counts once, as in the package that TRACE calls: 2 * 1 / (1 + 2).
        (rouge_l, "no no no", "no way", 2 / 3),
        (rouge_l, "...", "words", 0.0),
        (rouge_l, "Words", "words", 0.0),
    ],
)
def test_an_answer_gets_the_score_that_it_has_by_hand(score, written, answer, expected):
    assert score(written, answer) == pytest.approx(expected)
