"""The kernels of `lora.forward=fused` as operators of torch: graphs hold each as one node, and FLOPs are counted.

What they compute is in products.py and factor_gradients.py; Triton is asked for when they run. On the meta device
they have shapes, as all operators have. They have no gradients: they are called in passes of relora/paths.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("accrete", "DEF")
_LIBRARY.define("two_products(Tensor a, Tensor b, Tensor p, Tensor q, Tensor? bias, float scaling) -> Tensor")
_LIBRARY.define("factor_gradients(Tensor outer, Tensor up, Tensor small, float scaling) -> (Tensor, Tensor)")
two_products = torch.ops.accrete.two_products
"""A B + s P Q + bias."""
factor_gradients = torch.ops.accrete.factor_gradients
"""dY up and s dY' S."""


def _two_products(a: Tensor, b: Tensor, p: Tensor, q: Tensor, bias: Tensor | None, scaling: float) -> Tensor:
    from relora.kernels.products import products

    return products(a, b, p, q, bias, scaling)


def _factor_gradients(outer: Tensor, up: Tensor, small: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    from relora.kernels.factor_gradients import factor_gradients

    return factor_gradients(outer, up, small, scaling)


def _shape_of_products(a: Tensor, b: Tensor, p: Tensor, q: Tensor, bias: Tensor | None, scaling: float) -> Tensor:
    return a.new_empty(*a.shape[:-1], b.shape[1])


def _shapes_of_gradients(outer: Tensor, up: Tensor, small: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    return outer.new_empty(small.shape), torch.empty_like(up, memory_format=torch.contiguous_format)


for name, plain, shapes in (
    ("two_products", _two_products, _shape_of_products),
    ("factor_gradients", _factor_gradients, _shapes_of_gradients),
):
    _LIBRARY.impl(name, plain, "CompositeExplicitAutograd")
    _LIBRARY.impl(name, shapes, "Meta")
