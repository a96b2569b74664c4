"""Draws depend on their key alone."""

import pytest
import torch

from relora.initialize import draw_down, keyed_generator


def test_draws_are_these_numbers_everywhere_and_for_ever() -> None:
    drawn = draw_down("model.layers.0.mlp.up_proj", (2, 4), seed=7, head=1, restart_index=3)
    golden = torch.tensor(
        [
            [0.17782509326934814, 0.19910019636154175, 0.4102723002433777, -0.46792328357696533],
            [-0.29696524143218994, 0.3292120695114136, 0.2651299238204956, 0.15018904209136963],
        ]
    )
    assert torch.equal(drawn, golden), drawn.tolist()


def test_same_key_gives_the_same_draw_and_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    first = draw_down("a", (3, 5), seed=1, restart_index=2)
    torch.rand(3)
    torch.set_rng_state(before)
    assert torch.equal(first, draw_down("a", (3, 5), seed=1, restart_index=2))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "other",
    [{"seed": 2}, {"head": 1}, {"restart_index": 1}, {"module_name": "b"}],
    ids=lambda key: next(iter(key)),
)
def test_every_part_of_the_key_changes_the_draw(other: dict[str, int | str]) -> None:
    key = {"module_name": "a", "shape": (3, 5), "seed": 1, "head": 0, "restart_index": 0}
    assert not torch.equal(draw_down(**key), draw_down(**{**key, **other}))


def test_parts_do_not_run_together() -> None:
    assert keyed_generator(1, "ab", "c").initial_seed() != keyed_generator(1, "a", "bc").initial_seed()
    assert keyed_generator(1, 11, 1).initial_seed() != keyed_generator(1, 1, 11).initial_seed()


def test_down_is_uniform_within_the_kaiming_bound() -> None:
    drawn = draw_down("a", (64, 400), seed=0)
    bound = 1 / 20
    assert drawn.abs().max() <= bound
    assert drawn.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert drawn.mean().item() == pytest.approx(0, abs=bound / 50)
