"""The engine of a process that hosts several of LTE's heads: one stacked model, and an optimizer of its own for each.

Each head clips by its own gradient norm, refuses its own updates and counts its own steps, as in a process of its own:
torch's AdamW sees the heads' slices of stacked masters, moments and gradients as parameters apart. Nothing is
partitioned or exchanged here, so it needs no DeepSpeed.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from parallel.engine import Groups, SharedGradients, StepResult
from parallel.places import Place
from parallel.regions import whole as whole_region
from parallel.runtime import Runtime
from parallel.shards import Held, Read, Shards
from relora.convert import low_rank_modules
from relora.hosted import heads_in

Admit = Callable[[float], str | None]
"""From a gradient norm to a reason not to make the update."""


class HostedEngine:
    """Trains a model that hosts several heads; the same access as `Engine`."""

    def __init__(
        self,
        model: nn.Module,
        groups: Groups,
        *,
        runtime: Runtime,
        betas: tuple[float, float],
        eps: float,
        max_grad_norm: float,
    ) -> None:
        self.model = model
        self.heads = heads_in(model)
        """How many it hosts."""
        self._max_grad_norm = max_grad_norm
        self._trained = [parameter for group in groups for parameter in group["params"]]
        self._dense = [one for group in groups if group["name"].startswith("dense") for one in group["params"]]
        self._shared: SharedGradients | None = None
        self._masters = {one: _master(one) for one in self._trained}
        self._gradients: dict[nn.Parameter, Tensor] = {}
        self._hooks = [one.register_post_accumulate_grad_hook(self._keep) for one in self._trained]
        slices = {one: [nn.Parameter(own) for own in self._masters[one].detach().unbind()] for one in self._trained}
        self._slices = [{one: slices[one][place] for one in self._trained} for place in range(self.heads)]
        apart = [{**group, "params": [own for one in group["params"] for own in slices[one]]} for group in groups]
        self._optimizer = torch.optim.AdamW(apart, betas=betas, eps=eps, fused=True)
        self.store = HostedShards(model, self._masters, self._make_state(slices), runtime)

    def share_dense(self, shared: SharedGradients) -> None:
        """Average the gradients of dense parameters with the other heads', clipped, in each update."""
        self._shared = shared

    def __call__(self, **inputs: Any) -> Any:
        """The model's output for one microbatch, head after head."""
        return self.model(**inputs)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of the sum of the heads' losses, which is each head's own."""
        torch.autograd.backward(loss)

    def step(self, lr: float, admits: Sequence[Admit]) -> list[StepResult]:
        """Of each head: clip, ask its `admit` with its gradient norm, update unless it objects; clear gradients.

        Args:
            lr: every group's learning rate for this update.
            admits: called once each; returns a reason to refuse the update, or None.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        results = [self._prepare(place, admit) for place, admit in enumerate(admits)]
        if self._shared is not None:
            results = self._with_the_others(self._shared, results)
        for own, result in zip(self._slices, results, strict=True):
            for one in own.values() if result.refused is not None else ():
                one.grad = None  # the optimizer leaves it as it is
        self._optimizer.step()
        for parameter, master in self._masters.items():
            if parameter.dtype != master.dtype:
                parameter.data.copy_(master)
        self._gradients.clear()
        for own in self._slices:
            for one in own.values():
                one.grad = None
        return results

    def close(self) -> None:
        """Remove the hooks from the model."""
        for hook in self._hooks:
            hook.remove()

    def _prepare(self, place: int, admit: Admit) -> StepResult:
        """Give a head's slices their gradients, clipped if it may update."""
        own = self._slices[place]
        for parameter, gradient in self._gradients.items():
            own[parameter].grad = gradient[place]
        members = [one for one in own.values() if one.grad is not None]
        norm = nn.utils.get_total_norm([one.grad for one in members if one.grad is not None])
        value = float(norm)
        refused = admit(value)
        if refused is None and not math.isfinite(value):
            refused = "gradients are not finite"
        if refused is None and self._max_grad_norm > 0:
            nn.utils.clip_grads_with_norm_(members, self._max_grad_norm, norm)
        return StepResult(grad_norm=value, refused=refused)

    def _with_the_others(self, shared: SharedGradients, results: list[StepResult]) -> list[StepResult]:
        """Average the dense parameters' gradients over all heads, if all may update."""
        if not shared.agree(all(result.refused is None for result in results)):
            return [replace(result, refused=result.refused or "another head refused it") for result in results]
        for parameter in self._dense:  # every process must bring the same tensors
            if parameter not in self._gradients:
                self._gradients[parameter] = torch.zeros_like(self._masters[parameter])
                for own, gradient in zip(self._slices, self._gradients[parameter], strict=True):
                    own[parameter].grad = gradient
        shared.average([self._gradients[parameter] for parameter in self._dense])
        return results

    def _keep(self, parameter: Tensor) -> None:
        """Sum gradients over microbatches in fp32."""
        assert isinstance(parameter, nn.Parameter)
        assert parameter.grad is not None
        gradient = parameter.grad.float()
        parameter.grad = None
        if parameter in self._gradients:
            self._gradients[parameter] += gradient
        else:
            self._gradients[parameter] = gradient

    def _make_state(self, slices: Mapping[nn.Parameter, Sequence[nn.Parameter]]) -> dict[Tensor, dict[str, Tensor]]:
        """Adam's state, stacked as the masters are; the optimizer works on slices of it."""
        stacked: dict[Tensor, dict[str, Tensor]] = {}
        for parameter, master in self._masters.items():
            state = {
                "step": torch.zeros(self.heads, dtype=torch.float32, device=master.device),
                "exp_avg": torch.zeros_like(master),
                "exp_avg_sq": torch.zeros_like(master),
            }
            stacked[master] = state
            for place, own in enumerate(slices[parameter]):
                self._optimizer.state[own] = {key: value[place] for key, value in state.items()}
        return stacked


class HostedShards(Shards):
    """Access to stacked weights, masters and moments; checkpoints see one head at a time."""

    def __init__(
        self,
        model: nn.Module,
        masters: Mapping[nn.Parameter, Tensor],
        state: Mapping[Tensor, dict[str, Tensor]],
        runtime: Runtime,
    ) -> None:
        places = {one: Place(master, 0, 0, one.numel()) for one, master in masters.items()}
        optimizer: Any = SimpleNamespace(state=state)
        super().__init__(model, optimizer, places, runtime=runtime, regions={}, spread=False)
        factors = {id(one) for layer in low_rank_modules(model).values() for one in (layer.down, layer.up)}
        self._own = {name for name, one in model.named_parameters() if one.requires_grad or id(one) in factors} | {
            f"{name}.{key}" for name in low_rank_modules(model) for key in ("synced_down", "synced_up")
        }

    def held(self, hosted: int = 0) -> Held:
        """Everything that a checkpoint of one of the heads must keep, in the shapes that a model for it alone has."""
        stacked = super().held()
        return {
            kind: {
                name: (whole_region(part[hosted]), part[hosted])
                if kind == "optimizer" or name in self._own
                else (region, part)
                for name, (region, part) in named.items()
            }
            for kind, named in stacked.items()
        }

    @torch.no_grad()
    def load(self, *reads: Read) -> None:
        """Take weights, masters and moments over, each where there is one; one way to read for each head."""
        for place, read in enumerate(reads):
            for kind, named in self.held(place).items():
                for name, (region, part) in named.items():
                    value = read(kind, name, region)
                    owner, _, key = name.rpartition("/")
                    if value is None and key == "master":
                        value = read("model", owner, region)
                    if value is not None:
                        part.copy_(value.view_as(part))


def _master(parameter: nn.Parameter) -> Tensor:
    """What is optimized in a parameter's place: in fp32 its own memory."""
    return parameter if parameter.dtype == torch.float32 else parameter.detach().float()
