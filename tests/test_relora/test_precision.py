"""A merge keeps what it was given."""

import pytest
import torch
from torch import Tensor, nn

from relora.initialize import key_of
from relora.linear import LowRankLinear
from relora.precision import MergePrecision, _noise, add_, join, split, stochastic_round


def _every_kind_of_float() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (1 << 18,), generator=generator).to(torch.int32)
    values = bits.view(torch.float32)
    special = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1.0, -1.0, 3.0e38, float("inf"), -float("inf")])
    ties = torch.tensor([1 + 2**-8, -1 - 2**-8, 1 + 3 * 2**-8, 2**-126 + 2**-134])
    return torch.cat([values[values.isfinite()], special, ties])


def test_split_and_join_are_exact_for_every_float() -> None:
    value = _every_kind_of_float()
    joined = join(*split(value))
    assert torch.equal(joined.view(torch.int32), value.view(torch.int32))


def test_split_leaves_a_nearest_bfloat16() -> None:
    value = _every_kind_of_float()
    value = value[value.abs() < 3.3e38]
    high, _ = split(value)
    distance = (high.double() - value.double()).abs()
    nearest = (value.to(torch.bfloat16).double() - value.double()).abs()
    assert torch.equal(distance, nearest)


def test_split_rounds_ties_away_from_zero_so_that_the_rest_fits_16_bits() -> None:
    value = torch.tensor([1 + 2**-8, -1 - 2**-8, 1 + 3 * 2**-8])
    high, low = split(value)
    assert high.tolist() == [1 + 2**-7, -1 - 2**-7, 1 + 2**-6]
    assert low.tolist() == [-0x8000, -0x8000, -0x8000]


def test_split_keeps_nan() -> None:
    high, low = split(torch.tensor([float("nan")]))
    assert high.isnan().all()
    assert join(high, low).isnan().all()


def test_stochastic_rounding_takes_a_neighbour_and_is_right_on_average() -> None:
    value = torch.tensor([1 + 0.3 * 2**-7, -0.02 - 0.8 * 2**-13])
    draws = torch.stack([stochastic_round(value, key_of(0, draw)).float() for draw in range(4000)])
    assert set(draws[:, 0].tolist()) == {1.0, 1 + 2**-7}
    assert len(set(draws[:, 1].tolist())) == 2
    gap = draws.max(0).values - draws.min(0).values
    assert ((draws.mean(0) - value).abs() < 0.03 * gap).all()


def test_stochastic_rounding_leaves_what_bfloat16_can_hold() -> None:
    value = torch.tensor([0.0, 1.0, -1.5, 2**-100, float("inf")])
    assert torch.equal(stochastic_round(value, key_of(0)).float(), value)


def test_stochastic_rounding_repeats_with_its_key_and_differs_with_another() -> None:
    value = torch.randn(100)
    assert torch.equal(stochastic_round(value, key_of(1, "a")), stochastic_round(value, key_of(1, "a")))
    assert not torch.equal(stochastic_round(value, key_of(1, "a")), stochastic_round(value, key_of(1, "b")))


def test_a_part_rounds_as_it_does_within_the_whole() -> None:
    value = torch.randn(1000)
    whole = stochastic_round(value, key_of(2))
    for start, stop in ((300, 450), (301, 303), (302, 453), (303, 304)):
        assert torch.equal(whole[start:stop], stochastic_round(value[start:stop], key_of(2), start=start))


def test_the_chances_of_places_are_uniform_and_independent() -> None:
    noise = _noise(key_of(3), 0, 1 << 16, torch.device("cpu")).double() / (1 << 16)
    assert abs(float(noise.mean()) - 0.5) < 0.005
    assert abs(float(noise.var()) - 1 / 12) < 0.002
    for apart in (1, 2, 3, 4):
        assert abs(float(torch.corrcoef(torch.stack([noise[:-apart], noise[apart:]]))[0, 1])) < 0.02
    other = _noise(key_of(4), 0, 1 << 16, torch.device("cpu")).double()
    assert abs(float(torch.corrcoef(torch.stack([noise, other]))[0, 1])) < 0.02


@pytest.mark.parametrize("precision", MergePrecision)
def test_float32_weights_take_a_plain_sum(precision: MergePrecision) -> None:
    weight, delta = torch.randn(3, 4), torch.randn(3, 4) * 1e-4
    delta[0] = 0
    wanted = weight + delta
    changed = add_(weight, None, delta, precision)
    assert torch.equal(weight, wanted)
    assert changed == 8


def test_split_adds_like_float32() -> None:
    exact = torch.randn(50, 20)
    weight, bits = split(exact)
    delta = torch.randn(50, 20) * 1e-4
    changed = add_(weight, bits, delta, MergePrecision.split)
    assert torch.equal(join(weight, bits), exact + delta)
    assert changed == torch.count_nonzero(exact + delta != exact)


def test_nearest_adds_like_a_cast() -> None:
    weight = torch.randn(50, 20).to(torch.bfloat16)
    delta = torch.randn(50, 20) * 1e-2
    wanted = (weight.float() + delta).to(torch.bfloat16)
    changed = add_(weight.clone(), None, delta, MergePrecision.nearest)
    assert 0 < changed == torch.count_nonzero(wanted != weight)


def test_split_without_its_bits_is_refused() -> None:
    with pytest.raises(AssertionError, match="extra bits"):
        add_(torch.zeros(2, dtype=torch.bfloat16), None, torch.zeros(2), MergePrecision.split)


def _kept_share(precision: MergePrecision) -> tuple[float, float]:
    """Merge 20 updates that sum to 0.1 % of |W|; return the share W took up, and the relative error."""
    torch.manual_seed(0)
    linear = nn.Linear(192, 256, bias=False)
    layer = LowRankLinear.from_module(linear, adapter_rank=4, scaling=1.0)
    factors = [(torch.randn(4, 192), torch.randn(256, 4)) for _ in range(20)]
    total = sum((up @ down for down, up in factors), torch.zeros(256, 192))
    shrink = 1e-3 * layer.weight.norm() / total.norm()
    if precision == MergePrecision.split:
        layer.split_base_()
    layer.to(torch.bfloat16)
    start = layer.base().double()
    for index, (down, up) in enumerate(factors):
        layer.merge_(precision, down, up * shrink, key_of(0, index))
    wanted = (total * shrink).double()
    moved = layer.base().double() - start
    share = ((moved * wanted).sum() / wanted.norm() ** 2).item()
    return share, ((moved - wanted).norm() / wanted.norm()).item()


def test_twenty_merges_of_a_thousandth_of_the_weight_are_kept_whole_by_split() -> None:
    share, error = _kept_share(MergePrecision.split)
    assert share == pytest.approx(1, abs=1e-4)
    assert error < 1e-3


def test_twenty_merges_of_a_thousandth_of_the_weight_are_mostly_lost_by_nearest() -> None:
    share, error = _kept_share(MergePrecision.nearest)
    assert share < 0.5
    assert error > 0.5


def test_twenty_merges_of_a_thousandth_are_kept_on_average_by_stochastic() -> None:
    share, error = _kept_share(MergePrecision.stochastic)
    assert share == pytest.approx(1, abs=0.1)
    assert error > 0.5
