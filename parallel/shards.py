"""What this process holds of a model and its optimizer, and how restarts and checkpoints reach it.

Three things may cut a parameter: tensor parallelism (a region of the plain model's tensor), ZeRO's partition of
masters and moments (a flat range of that), and stage 3's partition of the weight itself. Restarts and
checkpoints address parameters by identity or name and never see the difference.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from parallel.collectives import sum_over
from parallel.places import Place, drop_whole, is_partitioned, piece, piece_range, state_of
from parallel.regions import Region
from parallel.regions import whole as whole_region
from parallel.runtime import Runtime
from relora.coded_moments import Coded, CodedAdamW, CodedPart, numbers
from relora.convert import low_rank_modules
from relora.linear import BasePart, LowRankLinear
from relora.optimizer import Moments
from relora.precision import MergePrecision, join

Held = dict[str, dict[str, tuple[Region, Tensor]]]
"""Kind of tensor -> name -> the part that this process holds; kinds are `model` and `optimizer`."""
Read = Callable[[str, str, Region], Tensor | None]
"""From a kind, a name and a region to the values there, or None where there are none."""


class Shards:
    """Access to weights, masters and moments of an engine.

    Implements `relora.restart.ParameterStore`.
    Collectives: methods that return whole values or sums, by all processes of a head.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        places: Mapping[nn.Parameter, Place],
        *,
        runtime: Runtime,
        regions: Mapping[str, Region],
        spread: bool,
    ) -> None:
        """Take hold of an engine's tensors; where stage 3 has cut a weight, its extra bits are cut alike.

        Args:
            regions: what tensor parallelism left of tensors, by name; the others are whole.
            spread: whether masters and moments are partitioned over the data axis.
        """
        self._model = model
        self._optimizer = optimizer
        self._places = places
        self._runtime = runtime
        self._spread = spread
        self.masters_alike = not spread
        """Whether all processes of the data axis hold the same masters."""
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        self._cut = set(regions)
        self._regions = {name: regions.get(name) or Region(_shape(one)) for one, name in self._names.items()}
        self._buffer_regions = {name: regions.get(name) or whole_region(one) for name, one in _buffers(model)}
        for name, layer in low_rank_modules(model).items():
            if layer.extra_bits is None:
                continue
            region = self._regions[f"{name}.weight"]
            if is_partitioned(layer.weight):
                start, count = piece_range(layer.weight)
                bits = layer.extra_bits.view(-1)[start : start + count]
                layer.extra_bits = bits.to(piece(layer.weight).device, copy=True)
                region = region.flat(start, count)
            self._buffer_regions[f"{name}.extra_bits"] = region

    # ---- for restarts

    def factors(self, layer: LowRankLinear) -> tuple[Tensor, Tensor]:
        """The masters of down and up, gathered over the data axis, in the shapes that the layer computes with."""
        pair = (layer.down, layer.up)
        if all(self._is_live(parameter) for parameter in pair):
            return layer.down.detach().float(), layer.up.detach().float()
        down, up = self._gathered(pair)
        return down.view(self._region(layer.down).cut_shape), up.view(self._region(layer.up).cut_shape)

    def factor_shapes(self, layer: LowRankLinear) -> tuple[Sequence[int], Sequence[int]]:
        """Their shapes."""
        return self._region(layer.down).cut_shape, self._region(layer.up).cut_shape

    def base(self, layer: LowRankLinear) -> BasePart:
        """This process's part of a layer's base weight."""
        data, tensor = self._runtime.data.size, self._runtime.tensor.size
        if layer.quantised is not None:
            return replace(layer.whole_base(), replicas=data, layer_replicas=data)
        copies = 1 if self._names[layer.weight] in self._cut else tensor
        if not is_partitioned(layer.weight):
            return replace(layer.whole_base(), replicas=data * copies, layer_replicas=data * copies)
        drop_whole([layer.weight])
        return BasePart(
            weight=piece(layer.weight),
            extra_bits=layer.extra_bits,
            start=piece_range(layer.weight)[0],
            replicas=copies,
            layer_replicas=data * copies,
        )

    def shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        """Shape in the plain model."""
        return self._region(parameter).shape

    @torch.no_grad()
    def write(self, parameter: nn.Parameter, whole: Tensor) -> None:
        """Set this process's parts of the master and of the copy that the next forward pass uses."""
        cut = self._region(parameter).cut(whole)
        if parameter.requires_grad and self.has_master(parameter):
            place = self._places[parameter]
            place.of(place.owner.detach()).copy_(cut.reshape(-1)[place.start : place.start + place.count])
        self._write_live(parameter, cut.reshape(-1))

    def moments(self, parameter: nn.Parameter) -> Moments | None:
        """Live views of this process's part of the Adam state, flat; None before the first update."""
        place = self._places[parameter]
        state = state_of(self._optimizer, place.owner)
        if state is None:
            return None
        exp_avg, exp_avg_sq = place.of_moment(state["exp_avg"]), place.of_moment(state["exp_avg_sq"])
        return Moments(exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, step=state["step"])

    def first_moment(self, parameter: nn.Parameter) -> Tensor:
        """The first moment in the plain model's shape, gathered over the data and tensor axes."""
        moments, place = self.moments(parameter), self._places[parameter]
        assert moments is not None
        region = self._region(parameter).flat(place.start, place.count)
        return self._whole(region, numbers(moments.exp_avg), parameter, spread=self._spread)

    def part(self, parameter: nn.Parameter, whole: Tensor) -> Tensor:
        """The entries of a whole tensor that `moments` holds, flat."""
        place = self._places[parameter]
        return self._region(parameter).flat(place.start, place.count).take(whole).to(place.owner.device)

    def total(self, sums: Tensor) -> Tensor:
        """Sums over all processes of the head."""
        return sum_over(self._runtime.model, sums.to(self._runtime.device)).cpu()

    def master(self, parameter: nn.Parameter) -> Tensor:
        """A live view of this process's part of the master, flat."""
        place = self._places[parameter]
        return place.of(place.owner.detach())

    @torch.no_grad()
    def publish(self, parameters: Sequence[nn.Parameter]) -> None:
        """Bring the copies that the next forward pass uses up to their edited masters."""
        edited = [parameter for parameter in parameters if self.has_master(parameter)]
        for parameter, flat in zip(edited, self._gathered(edited), strict=True):
            self._write_live(parameter, flat)

    @torch.no_grad()
    def assembled(self, parts: Mapping[nn.Parameter, Tensor]) -> dict[nn.Parameter, Tensor]:
        """Tensors like `master`, gathered over the data axis, in the shapes that modules compute with."""
        flats = list(parts.values())
        if self._spread:
            flats = self._joined(
                {parameter: (self._places[parameter].start, part) for parameter, part in parts.items()}
            )
        return {one: flat.view(self._region(one).cut_shape) for one, flat in zip(parts, flats, strict=True)}

    @contextmanager
    def swapped(self, values: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
        """Let forward passes use other values of parameters, shaped as `assembled` does; masters stay as they are."""
        own = {parameter: self._live(self._names[parameter], parameter)[1].clone() for parameter in values}
        with torch.no_grad():
            for parameter, value in values.items():
                self._write_live(parameter, value.reshape(-1))
        try:
            yield
        finally:
            for parameter, value in own.items():
                drop_whole([parameter] if is_partitioned(parameter) else [])
                self._live(self._names[parameter], parameter)[1].copy_(value)

    def _gathered(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """Masters gathered over the data axis, flat, as far as tensor parallelism leaves them here."""
        return self._joined({parameter: self._exact(parameter) for parameter in parameters})

    def _joined(self, pieces: Mapping[nn.Parameter, tuple[int, Tensor]]) -> list[Tensor]:
        """Flat pieces and where they begin, gathered over the data axis."""
        sizes = [math.prod(self._region(parameter).cut_shape) for parameter in pieces]
        flat = torch.zeros(sum(sizes), device=self._runtime.device)
        for (start, values), target in zip(pieces.values(), flat.split(sizes), strict=True):
            target[start : start + len(values)] = values
        if self._spread:
            sum_over(self._runtime.data, flat)
        return list(flat.split(sizes))

    def _exact(self, parameter: nn.Parameter) -> tuple[int, Tensor]:
        """Where this process's part of the master begins, and the part; of a frozen parameter, of what there is."""
        if parameter in self._places:
            place = self._places[parameter]
            return place.start, place.of(place.owner.detach())
        if is_partitioned(parameter):
            drop_whole([parameter])
            return piece_range(parameter)[0], piece(parameter)
        whole = parameter.detach().view(-1)
        return 0, whole if not self._spread or self._runtime.data.index == 0 else whole[:0]

    # ---- for measurements

    @property
    def trainable_entries(self) -> int:
        """Parameters that train, in the plain model's shapes."""
        return sum(math.prod(self._region(parameter).shape) for parameter in self._places)

    @torch.no_grad()
    def whole_weight(self, layer: LowRankLinear) -> Tensor:
        """A layer's exact weight in fp32 with its delta, gathered, in the plain model's shape."""
        down, up = self.factors(layer)
        if layer.quantised is not None:
            delta = layer.delta(down, up)
            return layer.quantised.exact() + (delta.t() if layer.transposed else delta)
        part = self.base(layer)
        exact = part.weight.to(torch.float32, copy=True)
        if part.extra_bits is not None:
            exact = join(part.weight, part.extra_bits)
        merged = BasePart(weight=exact, extra_bits=None, start=part.start)
        layer.merge_(MergePrecision.nearest, down, up, part=merged)
        region = self._regions[self._names[layer.weight]].flat(part.start, exact.numel())
        return self._whole(region, exact, layer.weight, spread=is_partitioned(layer.weight))

    @torch.no_grad()
    def whole(self, parameter: nn.Parameter) -> Tensor:
        """A parameter's exact value in fp32, gathered, in the plain model's shape."""
        start, values = self._exact(parameter)
        region = self._region(parameter).flat(start, len(values))
        return self._whole(region, values.float(), parameter, spread=self._spread or is_partitioned(parameter))

    def cut(self, parameter: nn.Parameter, whole: Tensor) -> Tensor:
        """What tensor parallelism leaves here of a whole tensor with a parameter's shape."""
        return self._region(parameter).cut(whole)

    def whole_inputs(self, module: nn.Module, inputs: Tensor) -> Tensor:
        """A linear layer's inputs with all features. Shapes: (..., part of in) -> (..., in)."""
        parameter = module.down if isinstance(module, LowRankLinear) else module.get_parameter("weight")
        region = self._region(parameter)
        features = region.shape[0 if isinstance(module, Conv1D) else -1]
        if inputs.shape[-1] == features:
            return inputs
        assert region.ranges is not None
        whole = inputs.new_zeros(*inputs.shape[:-1], features)
        Region(tuple(whole.shape), whole.ndim - 1, region.ranges).put(whole, inputs)
        return sum_over(self._runtime.tensor, whole)

    def as_held(self, parameter: nn.Parameter, part: Tensor) -> tuple[Region, Tensor]:
        """A tensor like `master` as a checkpoint keeps it."""
        region = self._optimizer_region(parameter)
        return region, part if region.is_flat else part.view(region.cut_shape)

    @torch.no_grad()
    def squared_norms(self, parameters: Sequence[nn.Parameter], parts: Sequence[Tensor] | None = None) -> Tensor:
        """Squared Frobenius norms of whole masters, or of tensors cut like them.

        Shapes: (len(parameters),), float64
        """
        axes = self._runtime
        sums = torch.zeros(len(parameters), dtype=torch.float64, device=axes.device)
        for number, parameter in enumerate(parameters):
            holders = 1 if self._spread else axes.data.size
            holders *= 1 if self._names[parameter] in self._cut else axes.tensor.size
            held = self.master(parameter) if parts is None else parts[number]
            sums[number] = held.double().square().sum() / holders
        return sum_over(axes.model, sums)

    # ---- for checkpoints

    def has_master(self, parameter: nn.Parameter) -> bool:
        """Whether the optimizer updates other memory than the parameter's own."""
        return self._places[parameter].owner is not parameter

    def held(self, hosted: int = 0) -> Held:
        """Everything that a checkpoint of the model and the optimizer must keep, as far as it is here.

        Args:
            hosted: which of the heads that this process hosts; here there is one.
        """
        assert hosted == 0
        model = {name: self._live(name, parameter) for name, parameter in self._model.named_parameters()}
        for name, buffer in _buffers(self._model):
            model[name] = (self._buffer_regions[name], buffer)
        optimizer: dict[str, tuple[Region, Tensor]] = {}
        for parameter, place in self._places.items():
            name, region = self._names[parameter], self._optimizer_region(parameter)
            parts: dict[str, Tensor] = {}
            if parameter.dtype != torch.float32:
                parts["master"] = place.of(place.owner.detach())
            moments = self.moments(parameter)
            if moments is not None:
                parts |= {"exp_avg": _kept(moments.exp_avg), "exp_avg_sq": _kept(moments.exp_avg_sq)}
                optimizer[f"{name}/step"] = (whole_region(moments.step), moments.step)
            for key, part in parts.items():
                optimizer[f"{name}/{key}"] = (region, part if region.is_flat else part.view(region.cut_shape))
        return {"model": model, "optimizer": optimizer}

    @torch.no_grad()
    def load(self, read: Read) -> None:
        """Take weights, masters and moments over, each where there is one."""
        for name, parameter in self._model.named_parameters():
            region, live = self._live(name, parameter)
            value = read("model", name, region)
            if value is not None:
                drop_whole([parameter] if is_partitioned(parameter) else [])
                live.copy_(value.view_as(live))
        for name, buffer in _buffers(self._model):
            value = read("model", name, self._buffer_regions[name])
            if value is not None:
                buffer.copy_(value.view_as(buffer))
        coded: dict[Tensor, dict[str, Tensor]] = {}
        for parameter in self._places:
            self._load_optimizer(parameter, read, coded)
        for owner, moments in coded.items():
            for key, values in moments.items():
                self._optimizer.state[owner][key].store(0, values.to(owner.device))

    def _load_optimizer(self, parameter: nn.Parameter, read: Read, coded: dict[Tensor, dict[str, Tensor]]) -> None:
        """Take one parameter's state over.

        Args:
            coded: where moments that are kept in codes are put as numbers, in host memory: parameters may share a
                block, which must be quantised once, when all of it is there.
        """
        name, place, region = self._names[parameter], self._places[parameter], self._optimizer_region(parameter)
        if self.has_master(parameter):
            master = read("optimizer", f"{name}/master", region)
            value = read("model", name, region) if master is None else master
            if value is not None:
                place.of(place.owner.detach()).copy_(value.reshape(-1))
        step = read("optimizer", f"{name}/step", Region(()))
        if step is None:
            return
        state = self._state(place.owner, step)
        for key in ("exp_avg", "exp_avg_sq"):
            value = read("optimizer", f"{name}/{key}", region)
            assert value is not None, f"a checkpoint with {name}'s step has its moments"
            whole = state[key]
            if isinstance(whole, Coded):
                owned = coded.setdefault(place.owner, {})
                whole = owned.setdefault(key, whole.values(0, whole.entries).cpu())
            place.of(whole).copy_(value.reshape(-1))
        state["step"].copy_(step)

    def _state(self, owner: Tensor, step: Tensor) -> dict[str, Any]:
        if isinstance(self._optimizer, CodedAdamW):
            return self._optimizer.begin(owner)
        if not self._optimizer.state.get(owner):
            self._optimizer.state[owner] = {
                "step": torch.zeros_like(step, device=owner.device),
                "exp_avg": torch.zeros_like(owner, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(owner, memory_format=torch.preserve_format),
            }
        state: dict[str, Any] = self._optimizer.state[owner]
        return state

    # ---- regions

    def name(self, parameter: nn.Parameter) -> str:
        """Name of a parameter."""
        return self._names[parameter]

    def region(self, name: str) -> Region:
        """What tensor parallelism leaves here of a parameter."""
        return self._regions[name]

    def base_region(self, layer: LowRankLinear) -> Region:
        """What `base` returns, of the whole weight."""
        return self._live(self._names[layer.weight], layer.weight)[0]

    def master_region(self, parameter: nn.Parameter) -> Region:
        """What `master` returns, of the whole parameter."""
        return self._optimizer_region(parameter)

    def _region(self, parameter: nn.Parameter) -> Region:
        return self._regions[self._names[parameter]]

    def _optimizer_region(self, parameter: nn.Parameter) -> Region:
        region, place = self._region(parameter), self._places[parameter]
        return region.flat(place.start, place.count) if self._spread else region

    def _live(self, name: str, parameter: nn.Parameter) -> tuple[Region, Tensor]:
        region = self._regions[name]
        if not is_partitioned(parameter):
            return region, parameter.detach()
        return region.flat(*piece_range(parameter)), piece(parameter)

    def _is_live(self, parameter: nn.Parameter) -> bool:
        return parameter.dtype == torch.float32 and not is_partitioned(parameter)

    def _write_live(self, parameter: nn.Parameter, flat: Tensor) -> None:
        if is_partitioned(parameter):
            drop_whole([parameter])
            start, count = piece_range(parameter)
            piece(parameter).copy_(flat[start : start + count])
        else:
            parameter.data.copy_(flat.view(parameter.shape))

    def _whole(self, region: Region, part: Tensor, parameter: nn.Parameter, *, spread: bool) -> Tensor:
        """A whole tensor from the parts of all processes of the head, each of which counts once."""
        axes = self._runtime
        whole = torch.zeros(region.shape, device=axes.device)
        cut = self._names[parameter] in self._cut
        if (spread or axes.data.index == 0) and (cut or axes.tensor.index == 0):
            region.put(whole, part.to(axes.device))
        return sum_over(axes.model, whole)


def _kept(moment: Tensor | CodedPart) -> Tensor:
    """A moment as a checkpoint keeps it; numbers made from codes go to host memory at once, where they fit."""
    return numbers(moment).cpu() if isinstance(moment, CodedPart) else moment


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Buffers that are state, extra bits among them; those that a model can compute are not."""
    persistent = model.state_dict().keys()
    return [(name, buffer) for name, buffer in model.named_buffers() if name in persistent]
