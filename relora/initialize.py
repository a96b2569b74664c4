"""Random draws that depend on what they are for, and on nothing else.

Each draw has its own generator, keyed by (seed, purpose, module, head, restart), on the CPU: every process,
on any device and at any world size, gets the same numbers without talking to the others.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def key_of(seed: int, *parts: str | int) -> int:
    """Return 64 bits that are a pure function of the seed and the parts."""
    words = "\x1f".join([str(seed), *map(str, parts)]).encode()
    return int.from_bytes(hashlib.blake2b(words, digest_size=8).digest(), "little")


def keyed_generator(seed: int, *parts: str | int) -> torch.Generator:
    """Return a CPU generator whose stream is a pure function of the seed and the parts."""
    return torch.Generator().manual_seed(key_of(seed, *parts))


def draw_down(module_name: str, shape: tuple[int, int], *, seed: int, head: int = 0, restart_index: int = 0) -> Tensor:
    """Draw a fresh `down` in float32 on the CPU; restart_index 0 is the draw at conversion.

    Shapes: (adapter_rank, in_features)
    Source: Kaiming uniform with a = sqrt(5), which is U(-1/sqrt(in), 1/sqrt(in)): He et al. 2015, as in LoRA.
    """
    bound = shape[1] ** -0.5
    generator = keyed_generator(seed, "down", module_name, head, restart_index)
    return torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
