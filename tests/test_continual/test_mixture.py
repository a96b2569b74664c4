import numpy as np
import pytest

from continual.mixture import BLOCK, Mixture, quotas_of
from relora.errors import ConfigError


def test_every_block_holds_each_source_in_its_share():
    quotas = quotas_of([0.5, 0.3, 0.2], ["a", "b", "c"])
    assert quotas == [512, 307, 205]
    source, _ = Mixture(quotas=quotas, seed=1).locate(np.arange(4 * BLOCK))
    for block in source.reshape(4, BLOCK):
        assert np.bincount(block).tolist() == quotas


def test_quotas_are_whole_and_fill_the_block():
    generator = np.random.default_rng(0)
    for _ in range(50):
        weights = generator.uniform(0.05, 1, size=int(generator.integers(1, 8))).tolist()
        quotas = quotas_of(weights, ["x"] * len(weights))
        assert sum(quotas) == BLOCK
        assert np.abs(np.array(quotas) - np.array(weights) / sum(weights) * BLOCK).max() < 1


def test_each_source_serves_its_samples_in_turn_and_none_twice():
    mixture = Mixture(quotas=quotas_of([5, 1], ["a", "b"]), seed=0)
    source, served = mixture.locate(np.arange(3 * BLOCK))
    for number, quota in enumerate(mixture.quotas):
        assert served[source == number].tolist() == list(range(3 * quota))


def test_any_split_of_positions_gives_the_same_samples():
    mixture = Mixture(quotas=[1000, 24], seed=3)
    whole = np.stack(mixture.locate(np.arange(900, 2500)))
    pieces = [np.stack(mixture.locate(np.arange(start, start + 100))) for start in range(900, 2500, 100)]
    assert (np.concatenate(pieces, axis=1) == whole).all()


def test_blocks_and_seeds_differ_in_their_order():
    first, second = Mixture(quotas=[512, 512], seed=0), Mixture(quotas=[512, 512], seed=1)
    blocks, _ = first.locate(np.arange(2 * BLOCK))
    others, _ = second.locate(np.arange(BLOCK))
    assert 0.4 < (blocks[:BLOCK] == blocks[BLOCK:]).mean() < 0.6
    assert 0.4 < (blocks[:BLOCK] == others).mean() < 0.6


def test_weight_too_small_for_one_sequence_in_a_block_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"the weight of tiny must give it at least 1 of 1024"):
        quotas_of([1.0, 1e-5], ["large", "tiny"])


def test_order_is_the_order_of_earlier_versions():
    source, served = Mixture(quotas=[700, 324], seed=0).locate(np.arange(5000, 5012))
    assert source.tolist() == GOLDEN_SOURCE
    assert served.tolist() == GOLDEN_SERVED


# A change here changes the data of every run: raise ORDER in continual/data.py with it.
GOLDEN_SOURCE = [0, 1, 0, 1, 1, 0, 1, 0, 1, 0, 0, 0]
GOLDEN_SERVED = [3407, 1593, 3408, 1594, 1595, 3409, 1596, 3410, 1597, 3411, 3412, 3413]
