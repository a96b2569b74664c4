"""Scores of answers that a model writes, from 0 to 1: exact match, first letter, ROUGE-L.

Definitions are those of TRACE (arXiv 2310.06762, metrics.py): C-STANCE, FOMC and NumGLUE count exact matches, ScienceQA
first letters, MeetingBank ROUGE-L by the package `rouge`. Space around an answer does not count here.
"""

from collections.abc import Callable, Sequence
from enum import Enum


class AnswerMetric(str, Enum):
    """What a task of prompts with answers is measured by."""

    loss = "loss"
    """The loss of the held-out answers."""
    exact = "exact"
    """Share of answers that are written letter for letter."""
    choice = "choice"
    """Share of answers whose first letter is right, as for multiple choice."""
    rouge_l = "rouge_l"
    """Mean ROUGE-L."""


def exact(written: str, answer: str) -> float:
    """1 if an answer is written letter for letter; nothing is never right."""
    written, answer = written.strip(), answer.strip()
    return float(bool(answer) and written == answer)


def choice(written: str, answer: str) -> float:
    """1 if the first letter is right."""
    return exact(written.strip()[:1], answer.strip()[:1])


def rouge_l(written: str, answer: str) -> float:
    """The F score of ROUGE-L between texts of sentences that end in a full stop.

    As the package `rouge` counts: the distinct words in the longest common subsequences of all pairs of sentences, over
    the distinct words of each text. Source: Lin 2004, section 3.2, for words that do not repeat.
    """
    mine, right = _sentences(written), _sentences(answer)
    common = {word for one in mine for other in right for word in _common_subsequence(one, other)}
    words, wanted = ({word for sentence in text for word in sentence} for text in (mine, right))
    return 2 * len(common) / (len(words) + len(wanted)) if common else 0.0


SCORES: dict[AnswerMetric, Callable[[str, str], float]] = {
    AnswerMetric.exact: exact,
    AnswerMetric.choice: choice,
    AnswerMetric.rouge_l: rouge_l,
}
"""Of what was written and the answer."""


def _sentences(text: str) -> list[list[str]]:
    return [words for sentence in text.split(".") if (words := sentence.split())]


def _common_subsequence(one: Sequence[str], other: Sequence[str]) -> list[str]:
    """A longest common subsequence; of several the one that a walk from the ends finds that leaves `other` first."""
    rows, columns = len(one), len(other)
    lengths = [[0] * (columns + 1) for _ in range(rows + 1)]
    for row in range(rows):
        for column in range(columns):
            same = one[row] == other[column]
            before = lengths[row][column] + 1, max(lengths[row][column + 1], lengths[row + 1][column])
            lengths[row + 1][column + 1] = before[0] if same else before[1]
    found: list[str] = []
    row, column = rows, columns
    while row and column:
        if one[row - 1] == other[column - 1]:
            row, column = row - 1, column - 1
            found.append(one[row])
        elif lengths[row - 1][column] > lengths[row][column - 1]:
            row -= 1
        else:
            column -= 1
    return found[::-1]
