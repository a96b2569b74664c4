"""Moments in 8 bits: what is stored, what edits leave alone, and updates beside those of torch's AdamW."""

import math

import pytest
import torch
from torch import nn

from relora.coded_moments import BLOCK, Coded, CodedAdamW, MomentFormat, bytes_of_moments
from relora.optimizer import Moments, clear_moments, prune_moments, scale_moments, step_sizes

ENTRIES = 5 * BLOCK + 33


@pytest.fixture(params=[False, True], ids=["first", "second"])
def second(request):
    return request.param


def drawn(second, seed=0, entries=ENTRIES):
    """Entries over eight decades, some of them zero."""
    dice = torch.Generator().manual_seed(seed)
    values = torch.randn(entries, generator=dice) * 10 ** (torch.rand(entries, generator=dice) * -8)
    values[torch.rand(entries, generator=dice) < 0.1] = 0.0
    return values.square() if second else values


def coded(values, second):
    moment = Coded(len(values), values.device, second=second)
    moment.store(0, values)
    return moment


def test_a_new_moment_is_zero(second):
    assert torch.equal(Coded(ENTRIES, torch.device("cpu"), second=second).values(0, ENTRIES), torch.zeros(ENTRIES))


def test_entries_are_near_zeros_stay_and_a_blocks_largest_is_exact(second):
    values = drawn(second)
    stored = coded(values, second).values(0, ENTRIES)
    assert torch.equal(stored == 0, values == 0) if second else bool((stored[values == 0] == 0).all())
    assert bool((stored.sign() * values.sign() >= 0).all())
    values, stored = (one.sqrt() if second else one for one in (values, stored))
    for exact, kept in zip(values.split(BLOCK), stored.split(BLOCK), strict=True):
        peak = exact.abs().max()
        assert kept.abs().max() == peak
        # Within a decade levels are 0.9 of its end apart, over 2^k levels, or twice as many without signs;
        # and codes are found by the leading bits of an entry, which leave a thousandth of it open.
        decade = (exact.abs() / peak).clamp(min=1e-30).log10().floor().clamp(min=-7)
        end, count = 10 ** (decade + 1), 2 ** ((decade + 7).clamp(min=0) + second)
        assert bool(((exact - kept).abs() <= peak * (0.45 * end / count + 1e-6) + exact.abs() / 1024).all())


def test_quantising_what_is_stored_changes_nothing(second):
    moment = coded(drawn(second), second)
    again = coded(moment.values(0, ENTRIES), second)
    assert torch.equal(again.codes, moment.codes)
    assert torch.equal(again.scales, moment.scales)


def test_a_second_moment_never_rounds_down_to_zero():
    values = torch.tensor([1.0, 1e-20, 1e-30, 0.0])
    kept = coded(values, True).values(0, 4)
    assert bool((kept[:3] > 0).all())
    assert kept[3] == 0


@pytest.mark.parametrize("tiny", [1e-44, 1e-39])
def test_what_is_too_small_for_squares_is_zero(second, tiny):
    stored = coded(torch.full((3,), tiny), second).values(0, 3)
    assert torch.equal(stored, torch.zeros(3))


@pytest.mark.parametrize(
    ("start", "count"), [(0, ENTRIES), (BLOCK, BLOCK), (100, 700), (3, 5), (5 * BLOCK, 33), (7, 0)]
)
def test_edits_change_their_range_alone(second, start, count):
    values = drawn(second)
    moment = coded(values, second)
    before = moment.values(0, ENTRIES)
    part = moment.part(start, count)
    assert torch.equal(part.numbers(), before[start : start + count])

    part.zero_()
    inside = slice(start, start + count)
    after = moment.values(0, ENTRIES)
    assert bool((after[inside] == 0).all())
    outer = torch.ones(ENTRIES, dtype=torch.bool)
    outer[start // BLOCK * BLOCK : math.ceil((start + count) / BLOCK) * BLOCK] = False
    assert torch.equal(after[outer], before[outer])
    beside = ~outer
    beside[inside] = False
    assert torch.allclose(after[beside], before[beside], rtol=0.5, atol=1e-6 * float(before.abs().max()))

    new = drawn(second, seed=1)[inside]
    part.copy_(new)
    assert torch.allclose(part.numbers(), new, rtol=0.5, atol=1e-5 * float(values.abs().max()))


def test_the_edits_of_restarts_work_on_codes():
    def moments():
        return Moments(
            exp_avg=coded(drawn(False), False).part(10, 900),
            exp_avg_sq=coded(drawn(True), True).part(10, 900),
            step=torch.tensor(7.0),
        )

    pruned, plain = moments(), moments()
    keep = torch.rand(900, generator=torch.Generator().manual_seed(2)) < 0.5
    prune_moments(pruned, keep)
    for one in (pruned.exp_avg, pruned.exp_avg_sq):
        assert bool((one.numbers()[~keep] == 0).all())
        assert bool((one.numbers()[keep] != 0).any())
    scaled = moments()
    scale_moments(scaled, 0.25)
    sums = [float(one.exp_avg.numbers().abs().sum()) for one in (scaled, plain)]
    assert sums[0] == pytest.approx(0.25 * sums[1], rel=0.02)
    sizes = step_sizes(plain, lr=0.1, beta=0.9, eps=1e-8)
    assert torch.equal(sizes, 0.1 / ((plain.exp_avg_sq.numbers() / (1 - 0.9**7)).sqrt() + 1e-8))
    clear_moments(plain)
    assert float(plain.exp_avg.numbers().abs().sum() + plain.exp_avg_sq.numbers().sum() + plain.step) == 0


def trained(make, steps=60, seed=0):
    """A least-squares problem whose features have scales from 0.01 to 1; losses and weights."""
    dice = torch.Generator().manual_seed(seed)
    inputs = torch.randn(256, 40, generator=dice) * torch.logspace(-2, 0, 40)
    targets = inputs @ torch.randn(40, 30, generator=dice)
    weight = nn.Parameter(torch.zeros(40, 30))
    bias = nn.Parameter(torch.zeros(30))
    optimizer = make([{"params": [weight], "weight_decay": 0.1}, {"params": [bias], "weight_decay": 0.0}])
    losses = []
    for _ in range(steps):
        loss = (inputs @ weight + bias - targets).square().mean()
        losses.append(float(loss))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses, weight.detach(), optimizer


def adam(groups):
    return torch.optim.AdamW(groups, lr=0.05, betas=(0.9, 0.95), eps=1e-8)


def coded_adam(groups):
    made = CodedAdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    for group in made.param_groups:
        group["lr"] = 0.05
    return made


def test_a_first_update_is_that_of_torch():
    assert torch.allclose(trained(coded_adam, steps=1)[1], trained(adam, steps=1)[1], rtol=1e-5, atol=1e-9)


def test_training_goes_as_with_whole_moments():
    (ours, weight, optimizer), (whole, exact, _) = trained(coded_adam), trained(adam)
    assert whole[-1] < 0.02 * whole[0]
    assert ours[-1] < 1.1 * whole[-1]
    assert float((weight - exact).norm() / exact.norm()) < 0.1
    assert optimizer.state[optimizer.param_groups[0]["params"][0]]["step"] == 60


def test_slabs_do_not_show(monkeypatch):
    whole = trained(coded_adam, steps=5)[1]
    monkeypatch.setattr("relora.coded_moments._SLAB", BLOCK)
    assert torch.equal(trained(coded_adam, steps=5)[1], whole)


def test_parameters_without_gradients_are_left_alone():
    weight = nn.Parameter(torch.ones(3))
    optimizer = coded_adam([{"params": [weight]}])
    optimizer.step()
    assert not optimizer.state
    assert torch.equal(weight.detach(), torch.ones(3))


def test_memory_is_a_quarter_and_a_scale():
    moments = [Coded(ENTRIES, torch.device("cpu"), second=second) for second in (False, True)]
    held = (
        sum(one.codes.nbytes + one.scales.nbytes for one in moments) + 2 * 4 * 255 + 2**18 + 2**17
    )  # and their tables
    assert held == bytes_of_moments([ENTRIES], MomentFormat.int8)
    assert bytes_of_moments([1 << 24], MomentFormat.int8) < 0.26 * bytes_of_moments([1 << 24], MomentFormat.full)
