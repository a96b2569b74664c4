"""The model of a checkpoint, read from its files one tensor at a time: nothing is built, nothing is trained.

A skeleton without memory (the model on the meta device) tells what the names mean. Low-rank layers are put
together one by one from what the optimizer holds, so that their weights are those that the trainer computes.
"""

import json
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from launch.models.model import model_class
from launch.training.method_state import KIND, names_of_parts
from parallel.checkpoint import Checkpoint
from relora.convert import LoraConfig
from relora.errors import ConfigError
from relora.linear import LowRankLinear
from relora.quantised import weight_of

_HEADS = "heads/"
_PARTS = ("down", "up", "extra_bits", "quantised.codes", "quantised.scales", "quantised.remainder")

SHARD_BYTES = 2 << 30
"""Largest size of a file of weights, unless a single tensor is larger; twice as much memory is needed."""


def of_head(index: int, name: str) -> str:
    """Name of a tensor that each of LTE's heads has for itself."""
    return f"{_HEADS}{index}/{name}"


def is_shared(name: str) -> bool:
    """Whether a stored tensor is no single head's."""
    return not name.startswith(_HEADS)


class Snapshot:
    """A checkpoint's tensors under their Hugging Face names, with fp32 masters where there are any.

    Each is whole, however many processes wrote the checkpoint, and however they shared it.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        hf_config: PretrainedConfig,
        lora: LoraConfig | None,
        *,
        written: str | None = None,
    ) -> None:
        """Look at the names and shapes.

        Args:
            written: what in the method's memory takes the place of what trains: `Method.written`.

        Raises: ConfigError when the checkpoint is not of this model.
        """
        self._checkpoint = checkpoint
        self._lora = lora
        self._in_place = {} if written is None else names_of_parts(checkpoint, written)
        stored, optimized = (set(checkpoint.names(kind)) for kind in ("model", "optimizer"))
        self._stored, self._optimized = set(filter(is_shared, stored)), set(filter(is_shared, optimized))
        self._heads = self._stored != stored
        self._own = {name for name in optimized if name.startswith(of_head(0, ""))}
        with torch.device("meta"):
            self.skeleton: nn.Module = model_class(hf_config).from_config(hf_config)
        self._plain = self.skeleton.state_dict(keep_vars=True)
        first = {id(parameter): name for name, parameter in self.skeleton.named_parameters()}
        self._first_name = {name: first.get(id(tensor), name) for name, tensor in self._plain.items()}
        self.names = [name for name in self._plain if self._first_name[name] == name]
        """Every tensor once; of tied ones, the first."""
        owners = [name.removesuffix(".weight") for name in self.names]
        factors = {name: {self._factor(f"{name}.down"), self._factor(f"{name}.up")} for name in owners}
        self.layers = [name for name in owners if factors[name] <= stored]
        """Low-rank modules; none at full rank, as in a warm start."""
        self._check()

    @property
    def trained(self) -> list[str]:
        """Dense parameters that have been updated."""
        steps = self._optimized | {name.removeprefix(of_head(0, "")) for name in self._own}
        return [name for name in self.names if f"{name}/step" in steps]

    def tensor(self, name: str) -> Tensor:
        """A tensor of the plain model, or a factor, as it is stored: the master where there is one."""
        name = self._first_name.get(name, name)
        if f"{self._codes(name)}.codes" in self._stored:
            return self._dequantised(name)
        if name in self._in_place:
            return self._checkpoint.whole(KIND, self._in_place[name])
        master = f"{name}/master"
        kind, name = ("optimizer", master) if master in self._optimized else ("model", name)
        return self._checkpoint.whole(kind, name)

    def _dequantised(self, name: str) -> Tensor:
        """A quantised base weight as passes computed with it: without its remainder."""
        codes, scales = (self._checkpoint.whole("model", f"{self._codes(name)}.{leaf}") for leaf in ("codes", "scales"))
        return weight_of(codes, scales, self._plain[name].shape[-1])

    @staticmethod
    def _codes(name: str) -> str:
        return f"{name.removesuffix('.weight')}.quantised"

    def is_transposed(self, layer: str) -> bool:
        """Whether a layer's weight is (in, out)."""
        return isinstance(self.skeleton.get_submodule(layer), Conv1D)

    def largest_rank(self, layer: str) -> int:
        """The smaller dimension of a layer's weight."""
        return int(min(self._plain[f"{layer}.weight"].shape))

    def _factor(self, name: str) -> str:
        return of_head(0, name) if self._heads else name

    def factors(self, layer: str) -> tuple[Tensor, Tensor]:
        """`down` and `up`; after a sync of LTE, whose change W has taken up, the first head's `down` and no `up`."""
        if not self._heads:
            return self.tensor(f"{layer}.down"), self.tensor(f"{layer}.up")
        down, up = (self._checkpoint.whole("model", of_head(0, f"{layer}.{leaf}")) for leaf in ("down", "up"))
        return down, torch.zeros_like(up)

    def layer(self, name: str) -> LowRankLinear:
        """A low-rank layer, without its bias."""
        assert self._lora is not None
        down, up = self.factors(name)
        layer = LowRankLinear(
            nn.Parameter(self.tensor(f"{name}.weight"), requires_grad=False),
            None,
            adapter_rank=down.shape[0],
            scaling=self._lora.scale(down.shape[0]),
            transposed=self.is_transposed(name),
        )
        layer.down.data, layer.up.data = down, up
        if f"{name}.extra_bits" in self._stored:
            layer.extra_bits = self._checkpoint.whole("model", f"{name}.extra_bits")
        return layer

    def weight(self, name: str, *, merged: bool) -> Tensor:
        """A tensor of the plain model; low-rank weights exactly in fp32, with or without their delta."""
        owner, _, leaf = name.rpartition(".")
        if leaf != "weight" or owner not in self.layers:
            return self.tensor(name)
        layer = self.layer(owner)
        value = layer.base() + layer.delta() if merged else layer.base()
        return value.t() if layer.transposed else value

    def write_weights(self, folder: Path, dtype: torch.dtype, *, merged: bool) -> None:
        """Write all tensors as a Hugging Face folder holds them, file by file."""
        kinds = {
            name: dtype if self._plain[name].is_floating_point() else self._plain[name].dtype for name in self.names
        }
        empty = {name: torch.empty(self._plain[name].shape, dtype=kinds[name], device="meta") for name in self.names}
        shards = split_torch_state_dict_into_shards(
            empty, filename_pattern="model{suffix}.safetensors", max_shard_size=SHARD_BYTES
        )
        for file, names in shards.filename_to_tensors.items():
            save_file(  # the dictionary has no name: it would live on while the next file's is made
                {name: self.weight(name, merged=merged).to(kinds[name]).contiguous() for name in names},
                folder / file,
                metadata={"format": "pt"},
            )
        if shards.is_sharded:
            index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _check(self) -> None:
        wrong = f"{self._checkpoint.folder} is of another model than run.dir"
        parts = {f"{layer}.{part}" for layer in self.layers for part in _PARTS}
        coded = {name for name in self.names if f"{self._codes(name)}.codes" in self._stored}
        for name in sorted((self._stored - parts) ^ (set(self.names) - coded)):
            side = "only the checkpoint has" if name in self._stored else "the checkpoint lacks"
            raise ConfigError(f"{wrong}: {side} {name}")
        for name in set(self.names) - coded:
            here, there = tuple(self._plain[name].shape), self._checkpoint.shape("model", name)
            if here != there:
                raise ConfigError(f"{wrong}: {name} is {there} there and {here} here")
