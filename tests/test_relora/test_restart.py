"""The restart against a slow twin, the numerics it must hold, and the defects it must not have."""

import dataclasses
import json
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from relora.convert import LoraConfig, prepare_base_, to_low_rank
from relora.errors import ConfigError
from relora.initialize import draw_down
from relora.linear import LowRankLinear
from relora.optimizer import OptimizerConfig, Reset, parameter_groups
from relora.precision import MergePrecision
from relora.restart import PlainStore, ReloraConfig, cycle_of, restart, restart_due

Build = Callable[..., nn.Module]
Train = Callable[..., list[float]]
RESETS = {
    Reset.zero: ReloraConfig(),
    Reset.magnitude: ReloraConfig(reset=Reset.magnitude, prune_ratio=0.9),
    Reset.random: ReloraConfig(reset=Reset.random, prune_ratio=0.9),
    Reset.none: ReloraConfig(reset=Reset.none),
}


class MasterStore(PlainStore):
    """Float32 masters beside live parameters, as a mixed-precision engine keeps them."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(optimizer)
        self.masters = {id(p): p.detach().float().clone() for p in model.parameters() if p.requires_grad}

    def factors(self, layer: LowRankLinear) -> tuple[Tensor, Tensor]:
        return self.masters[id(layer.down)], self.masters[id(layer.up)]

    def write(self, parameter: nn.Parameter, whole: Tensor) -> None:
        self.masters[id(parameter)].copy_(whole)
        super().write(parameter, whole)


@dataclasses.dataclass
class Setup:
    """A converted model and its optimizer."""

    model: nn.Module
    layers: dict[str, LowRankLinear]
    optimizer: torch.optim.Optimizer
    store: PlainStore


def _setup(model: nn.Module, dtype: torch.dtype = torch.float32, lr: float = 0.01) -> Setup:
    conversion = to_low_rank(model, LoraConfig(rank=2, alpha=4.0), seed=3)
    prepare_base_(model, dtype, MergePrecision.split)
    optimizer = torch.optim.AdamW(parameter_groups(model, OptimizerConfig(lr=lr, betas=[0.9, 0.999])))
    return Setup(model, conversion.low_rank, optimizer, PlainStore(optimizer))


def _factors(layers: dict[str, LowRankLinear]) -> list[nn.Parameter]:
    return [factor for layer in layers.values() for factor in (layer.down, layer.up)]


# ---- the function and the slow twin


def test_restart_leaves_the_function_unchanged(family: str, build: Build, train: Train, tokens: Tensor) -> None:
    setup = _setup(build(family))
    train(setup.model, setup.optimizer, 5)
    before = setup.model(input_ids=tokens).logits
    report = restart(setup.model, ReloraConfig(), setup.store, seed=3, restart_index=1)
    after = setup.model(input_ids=tokens).logits
    assert (after - before).abs().max() < 1e-5 * before.abs().max()
    assert report.update_ratio > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_restart_equals_a_slow_one(family: str, dtype: torch.dtype, build: Build, train: Train) -> None:
    setup = _setup(build(family), dtype)
    train(setup.model, setup.optimizer, 4)
    wanted, squares = {}, np.zeros(2)
    for name, layer in setup.layers.items():
        base, up, down = (part.detach().double().numpy() for part in (layer.base(), layer.up, layer.down))
        update = layer.scaling * up @ down
        wanted[name] = base + update
        squares += [(update**2).sum(), (base**2).sum()]
    dense = {
        name: (parameter.detach().clone(), setup.optimizer.state[parameter]["exp_avg"].clone())
        for name, parameter in setup.model.named_parameters()
        if parameter.requires_grad and not name.endswith((".down", ".up"))
    }
    report = restart(setup.model, ReloraConfig(), setup.store, seed=3, restart_index=1)

    for name, layer in setup.layers.items():
        assert np.allclose(layer.base().double().numpy(), wanted[name], rtol=2e-7, atol=1e-8)
        assert not layer.up.any()
        fresh = draw_down(name, tuple(layer.down.shape), seed=3, restart_index=1)
        assert torch.equal(layer.down, fresh.to(dtype))
    for factor in _factors(setup.layers):
        state = setup.optimizer.state[factor]
        assert not state["exp_avg"].any()
        assert not state["exp_avg_sq"].any()
        assert state["step"] == 0
    parameters = dict(setup.model.named_parameters())
    for name, (value, exp_avg) in dense.items():
        state = setup.optimizer.state[parameters[name]]
        assert torch.equal(parameters[name], value)
        assert torch.equal(state["exp_avg"], exp_avg)
        assert state["step"] == 4
    # bfloat16 live weights stand for their exact bases within the rounding of one in 256
    assert report.update_ratio == pytest.approx((squares[0] / squares[1]) ** 0.5, rel=1e-3)


def test_masters_are_merged_and_rewritten(build: Build, train: Train) -> None:
    setup = _setup(build(), torch.bfloat16)
    train(setup.model, setup.optimizer, 3)
    store = MasterStore(setup.model, setup.optimizer)
    for master in store.masters.values():
        master.add_(1e-4)  # less than bfloat16 would show
    layer = next(iter(setup.layers.values()))
    down, up = store.factors(layer)
    wanted = layer.base() + layer.scaling * up @ down
    restart(setup.model, ReloraConfig(), store, seed=3, restart_index=1)
    assert torch.allclose(layer.base(), wanted, atol=1e-7)
    fresh = draw_down(next(iter(setup.layers)), tuple(layer.down.shape), seed=3, restart_index=1)
    assert torch.equal(store.factors(layer)[0], fresh)
    assert not store.factors(layer)[1].any()


def test_factors_get_gradients_within_two_steps_after_each_restart(build: Build, tokens: Tensor) -> None:
    setup = _setup(build())
    factors = _factors(setup.layers)
    for index in (1, 2, 3):
        silent = set(range(len(factors)))
        for _ in range(2):
            setup.model(input_ids=tokens, labels=tokens).loss.backward()
            silent -= {i for i, factor in enumerate(factors) if factor.grad.abs().max() > 0}
            setup.optimizer.step()
            setup.optimizer.zero_grad()
        assert not silent
        restart(setup.model, ReloraConfig(), setup.store, seed=3, restart_index=index)


def test_training_goes_on_falling_over_restarts(build: Build, train: Train) -> None:
    setup = _setup(build(), lr=3e-3)
    best = []
    for index in (1, 2, 3):
        best.append(train(setup.model, setup.optimizer, 15)[-1])
        restart(setup.model, ReloraConfig(), setup.store, seed=3, restart_index=index)
    assert best[0] > best[1] > best[2]


# ---- randomness


@pytest.mark.parametrize("config", [RESETS[Reset.zero], RESETS[Reset.random]], ids=["zero", "random"])
def test_restart_is_a_function_of_its_key(config: ReloraConfig, build: Build, train: Train) -> None:
    """Equal on every rank: no use of the global generator, which ranks may have advanced differently."""
    states = []
    for noise in (0, 1):
        setup = _setup(build())
        train(setup.model, setup.optimizer, 2)
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        restart(setup.model, config, setup.store, seed=3, restart_index=1)
        assert torch.equal(torch.get_rng_state(), before)
        moments = [setup.optimizer.state[factor]["exp_avg"] for factor in _factors(setup.layers)]
        states.append([*setup.model.state_dict().values(), *moments])
    assert all(torch.equal(first, second) for first, second in zip(*states, strict=True))


def test_every_restart_and_head_draws_anew(build: Build) -> None:
    drawn = []
    for index, head in [(1, 0), (2, 0), (1, 1)]:
        setup = _setup(build())
        restart(setup.model, ReloraConfig(), setup.store, seed=3, restart_index=index, heads=[head])
        drawn.append(next(iter(setup.layers.values())).down.detach())
    start = next(iter(_setup(build()).layers.values())).down.detach()
    assert len({tuple(down.flatten().tolist()) for down in [*drawn, start]}) == 4


def test_every_restart_layer_and_factor_has_its_own_random_mask(build: Build, train: Train) -> None:
    config = ReloraConfig(reset=Reset.random, prune_ratio=0.5)
    masks = set()
    for index in (1, 2):
        setup = _setup(build())
        train(setup.model, setup.optimizer, 2)
        restart(setup.model, config, setup.store, seed=3, restart_index=index)
        squares = [f for layer in setup.layers.values() for f in (layer.down, layer.up) if f.numel() == 32]
        masks |= {tuple(setup.optimizer.state[factor]["exp_avg"].ne(0).flatten().tolist()) for factor in squares}
    assert len(masks) == 2 * len(squares) > 8


# ---- resets


@pytest.mark.parametrize("reset", [Reset.magnitude, Reset.random])
def test_pruning_reset_reports_its_exact_share(reset: Reset, build: Build, train: Train) -> None:
    setup = _setup(build())
    train(setup.model, setup.optimizer, 3)
    report = restart(setup.model, RESETS[reset], setup.store, seed=3, restart_index=1)
    sizes = [factor.numel() for factor in _factors(setup.layers)]
    assert report.pruned_count == sum(round(0.9 * size) for size in sizes)
    assert report.pruned_share == report.pruned_count / sum(sizes)
    zeros = sum(int((setup.optimizer.state[f]["exp_avg"] == 0).sum()) for f in _factors(setup.layers))
    assert zeros == report.pruned_count


@pytest.mark.parametrize("reset", list(Reset))
def test_first_step_after_a_reset_does_not_explode(reset: Reset, build: Build, train: Train, tokens: Tensor) -> None:
    """`down` has no gradient then, so only stale state moves it: in the reference by thousands of lr."""
    lr = 0.01
    setup = _setup(build(), lr=lr)
    train(setup.model, setup.optimizer, 20)
    restart(setup.model, RESETS[reset], setup.store, seed=3, restart_index=1)
    before = [factor.detach().clone() for factor in _factors(setup.layers)]
    train(setup.model, setup.optimizer, 1)
    moves = [(f - b).abs().max().item() for f, b in zip(_factors(setup.layers), before, strict=True)]
    downs, ups = moves[::2], moves[1::2]
    if reset == Reset.zero:
        assert max(downs) == 0.0
        assert max(ups) <= 1.01 * lr
    else:
        assert max(moves) <= 5 * lr


def test_a_prune_that_removes_nothing_is_an_error(build: Build, train: Train) -> None:
    setup = _setup(build())
    train(setup.model, setup.optimizer, 1)
    config = ReloraConfig(reset=Reset.magnitude, prune_ratio=0.001)
    with pytest.raises(ConfigError, match=r"relora\.prune_ratio=0\.001 removed none of the \d+ entries"):
        restart(setup.model, config, setup.store, seed=3, restart_index=1)


@pytest.mark.parametrize("reset", list(Reset))
def test_without_a_state_there_is_nothing_to_reset_and_none_is_made(reset: Reset, build: Build, train: Train) -> None:
    """The reference indexed the state, made empty entries, and could not save the optimizer any more."""
    setup = _setup(build())
    report = restart(setup.model, RESETS[reset], setup.store, seed=3, restart_index=1)
    assert (report.pruned_count, report.pruned_share) == (0, 0.0)
    assert not setup.optimizer.state
    train(setup.model, setup.optimizer, 1)
    setup.optimizer.load_state_dict(setup.optimizer.state_dict())


# ---- the report


def test_report_is_json_with_plain_numbers(build: Build, train: Train) -> None:
    setup = _setup(build())
    train(setup.model, setup.optimizer, 2)
    report = restart(setup.model, ReloraConfig(), setup.store, seed=3, restart_index=4)
    assert (report.restart, report.layers, report.pruned_share) == (4, 14, 1.0)
    assert report.changed_share > 0.99
    assert report.seconds > 0
    assert json.loads(json.dumps(dataclasses.asdict(report))) == dataclasses.asdict(report)


def test_changed_share_shows_what_nearest_loses(build: Build, train: Train) -> None:
    shares = {}
    for precision in (MergePrecision.split, MergePrecision.nearest):
        model = build()
        layers = to_low_rank(model, LoraConfig(rank=2, alpha=4.0), seed=3).low_rank
        prepare_base_(model, torch.bfloat16, precision)
        for layer in layers.values():
            nn.init.constant_(layer.up, 1e-5)
        store = PlainStore(torch.optim.AdamW(parameter_groups(model, OptimizerConfig())))
        config = ReloraConfig(merge_precision=precision)
        shares[precision] = restart(model, config, store, seed=3, restart_index=1).changed_share
    assert shares[MergePrecision.split] > 0.9
    assert shares[MergePrecision.nearest] < 0.2


# ---- when


def test_restarts_are_due_at_multiples_but_not_at_the_ends() -> None:
    config = ReloraConfig(every=10)
    assert [step for step in range(41) if restart_due(config, step, total_steps=40)] == [10, 20, 30]


def test_restarts_count_from_the_warm_start() -> None:
    config = ReloraConfig(every=10, warm_start_steps=15)
    assert [step for step in range(46) if restart_due(config, step, total_steps=45)] == [25, 35]
    assert [cycle_of(config, step) for step in (0, 14, 15, 24, 25, 44)] == [0, 0, 0, 0, 1, 2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": 0}, "relora.every must be at least 1 step, got 0"),
        ({"warm_start_steps": -1}, "relora.warm_start_steps must not be negative, got -1"),
        ({"reset": Reset.magnitude}, "relora.reset=magnitude needs relora.prune_ratio"),
        ({"reset": Reset.random, "prune_ratio": 0.0}, "relora.prune_ratio must be in (0, 1], got 0.0"),
        ({"reset": Reset.random, "prune_ratio": 1.1}, "relora.prune_ratio must be in (0, 1], got 1.1"),
        ({"prune_ratio": 0.9}, "relora.prune_ratio=0.9 has no effect with relora.reset=zero"),
        ({"reset": Reset.none, "prune_ratio": 0.9}, "has no effect with relora.reset=none"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        ReloraConfig(**settings)


# ---- rank


def _rank_after(restarts: int, cycle_steps: int) -> list[int]:
    """Fit a full-rank map with rank 4; return the rank of W - W_start after each cycle."""
    torch.manual_seed(0)
    target, x = torch.randn(20, 24), torch.randn(256, 24)
    model = nn.Sequential(nn.Linear(24, 20, bias=False))
    layer = to_low_rank(model, LoraConfig(rank=4, alpha=4.0), seed=0).low_rank["0"]
    start = layer.base().clone()
    optimizer = torch.optim.AdamW(parameter_groups(model, OptimizerConfig(lr=0.02)))
    ranks = []
    for index in range(restarts + 1):
        for _ in range(cycle_steps):
            loss = (model(x) - x @ target.t()).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        ranks.append(int(torch.linalg.matrix_rank(layer.base() + layer.delta() - start, rtol=1e-4)))
        if index < restarts:
            restart(model, ReloraConfig(), PlainStore(optimizer), seed=0, restart_index=index + 1)
    return ranks


def test_every_restart_adds_its_rank_up_to_the_layers() -> None:
    assert _rank_after(restarts=5, cycle_steps=60) == [4, 8, 12, 16, 20, 20]


def test_without_restarts_the_rank_stays() -> None:
    assert _rank_after(restarts=0, cycle_steps=360) == [4]
