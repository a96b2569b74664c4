"""Greedy answers to prompts, on all processes together, and how right they are.

Prompts of a batch end in the same place, with padding before them that is masked and takes no positions, so that each
is continued as it would be alone. Every process runs as many forwards as every other: a partitioned model needs all.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from continual.answers import SCORES, AnswerMetric
from continual.instruction import AnswerHeldOut
from continual.order import Indices
from parallel.collectives import sum_over
from parallel.runtime import Axis
from parallel.vocabulary import likeliest

Agree = Callable[[int], int]
"""The sum of a number over all processes that run the model together with other samples."""


@torch.no_grad()
def answer_score(
    model: nn.Module,
    held_out: AnswerHeldOut,
    metric: AnswerMetric,
    tokenizer: Any,
    *,
    axis: Axis,
    device: torch.device,
    size: int,
    samples: int | None,
) -> float:
    """The mean score of the answers that a model writes to held-out prompts.

    Args:
        size: prompts of a process at a time.
        samples: the first so many prompts; None: all.
    """

    def agree(count: int) -> int:
        return int(sum_over(axis, torch.tensor(count, device=device)))

    total = torch.zeros(2, dtype=torch.float64, device=device)  # score, prompts
    end = len(held_out) if samples is None else min(samples, len(held_out))
    was_training = model.training
    model.eval()
    for start, count, counts in _turns(end, size, axis):
        written = continued(
            model,
            held_out.prompts(start, count),
            eos=tokenizer.eos_token_id,
            most=held_out.answers.longest,
            length=held_out.answers.length,
            device=device,
            agree=agree,
        )
        texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in written]
        pairs = zip(texts, held_out.items(start, count), strict=True)
        score = sum(SCORES[metric](text, item.answer) for text, item in pairs)
        if counts:
            total += torch.tensor([score, count], dtype=torch.float64, device=device)
    model.train(was_training)
    score_sum, prompts = sum_over(axis, total).tolist()
    return float(score_sum / prompts)


@torch.no_grad()
def continued(
    model: nn.Module,
    prompts: Sequence[Indices],
    *,
    eos: int,
    most: int,
    length: int,
    device: torch.device,
    agree: Agree = int,
) -> list[list[int]]:
    """The likeliest next tokens of each prompt up to its end, which is left out.

    Args:
        most: tokens that are written, at most, with the end.
        length: tokens of a prompt and what is written, at most.
    """
    ids, mask = (part.to(device) for part in _padded(prompts, eos))
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    room = torch.tensor([min(most, length - len(prompt)) for prompt in prompts], device=device)
    done = room <= 0
    tokens: list[Tensor] = []
    cache: Any = None
    while agree(int((~done).sum())):
        wanted = _known_to(model, position_ids=positions, logits_to_keep=1)
        output = model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **wanted)
        cache = output.past_key_values
        tokens.append(likeliest(model, output.logits[:, -1]).masked_fill(done, eos))
        done = done | (tokens[-1] == eos) | (len(tokens) >= room)
        ids, mask = tokens[-1][:, None], torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        positions = (positions[:, -1:] + 1).clamp(max=length - 1)  # of who is done, no more than the model has
    rows = torch.stack(tokens, dim=1).tolist() if tokens else [[] for _ in prompts]
    return [row[: row.index(eos)] if eos in row else row for row in rows]


def _padded(prompts: Sequence[Indices], eos: int) -> tuple[Tensor, Tensor]:
    """Prompts that end in the same place, and which tokens are theirs. Shapes: (B, T), (B, T)."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), eos, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.from_numpy(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids, mask


def _known_to(model: nn.Module, **arguments: Any) -> dict[str, Any]:
    """Those that the model's forward takes: some models count positions by the mask themselves."""
    names = inspect.signature(model.forward).parameters
    return {name: value for name, value in arguments.items() if name in names}


def _turns(end: int, size: int, axis: Axis) -> Iterator[tuple[int, int, bool]]:
    """This process's share in each turn: first and number of prompts, and whether they count."""
    for first in range(0, end, size * axis.size):
        own = first + axis.index * size
        start = own if own < end else first
        yield start, min(size, end - start), own < end
