"""The order of a run: a keyed permutation that is computed, never stored.

A Feistel network permutes a power of four; walking its cycles until they come back below `count` restricts it
to [0, count). Any position of any epoch is known at once and in constant memory, so the state of a run's data
is one integer.
"""

from collections.abc import Iterator
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

ROUNDS = 8


def key_of(*parts: str | int) -> int:
    """A 64-bit key, different for different parts."""
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def permute(index: Indices, count: int, key: int) -> Indices:
    """The images of `index` under the key's permutation of [0, count)."""
    assert count > 0
    half_bits = max(1, ((count - 1).bit_length() + 1) // 2)
    round_keys = [np.uint64(key_of(key, number)) for number in range(ROUNDS)]
    value = _feistel(index.astype(np.uint64), half_bits, round_keys)
    while (outside := value >= np.uint64(count)).any():
        value[outside] = _feistel(value[outside], half_bits, round_keys)
    return value.astype(np.int64)


def shuffled(position: Indices, count: int, *, seed: int, epoch: int, stream: int = 0) -> Indices:
    """The samples at `position` (each in [0, count)) of one epoch; a stream is one source of a mixture."""
    return permute(position, count, key_of("sample", seed, stream, epoch))


def sample_at(position: Indices, count: int, *, seed: int, stream: int = 0) -> Indices:
    """The samples at `position` of an endless run over `count` samples, each epoch in its own order."""
    sample = np.empty_like(position)
    for epoch, chosen in groups(position // count):
        sample[chosen] = shuffled(position[chosen] % count, count, seed=seed, epoch=epoch, stream=stream)
    return sample


def groups(label: Indices) -> Iterator[tuple[int, npt.NDArray[np.bool_]]]:
    """Each label that occurs, with the mask of where it occurs."""
    for value in np.unique(label):
        yield int(value), label == value


def _feistel(value: Words, half_bits: int, round_keys: list[np.uint64]) -> Words:
    shift = np.uint64(half_bits)
    mask = np.uint64((1 << half_bits) - 1)
    left, right = value >> shift, value & mask
    for key in round_keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    permuted: Words = (left << shift) | right
    return permuted


def _mix(word: Words) -> Words:
    """The finaliser of splitmix64. Source: Steele, Lea and Flood 2014."""
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Words = word ^ (word >> np.uint64(31))
    return mixed
