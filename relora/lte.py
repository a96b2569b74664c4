"""LTE's settings, and when which layers sync.

Heads train low-rank factors apart; a sync folds their mean change into the base weight that all of them share. The
algorithm is in relora/sync.py, what travels in relora/heads.py.
Source: LTE, Huh et al. 2024 (arXiv 2402.16828); docs/lte.md says what differs from its code and why.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from torch import nn

from relora.convert import low_rank_modules
from relora.errors import ConfigError
from relora.heads import Compression
from relora.precision import MergePrecision


class SyncReset(str, Enum):
    """What a sync does to the factors."""

    none = "none"
    """They stay; from then on only what they change further counts."""
    factors = "factors"
    """Each head draws a new `down`, and `up` is zero again."""


class FactorAdam(str, Enum):
    """What becomes of Adam's state of factors that are drawn anew."""

    keep = "keep"
    clear = "clear"
    scale = "scale"
    """Both moments are multiplied by lte.adam_scale."""


class Exchange(str, Enum):
    """What of a layer's change travels between heads; but for `shared`, all ways have the same result."""

    auto = "auto"
    """For each layer factors or dense, whichever is fewer bytes."""
    factors = "factors"
    """The factors, from every head to every other."""
    dense = "dense"
    """The change itself, averaged."""
    shared = "shared"
    """All heads have the same `down`, which does not train: the mean of `up` is the mean change's."""


class Transport(str, Enum):
    """What carries a sync."""

    torch = "torch"
    """torch.distributed: NCCL between GPUs, gloo between CPUs."""
    mpi = "mpi"
    """mpi4py, on processes that an MPI launcher started."""


class HeadWeight(str, Enum):
    """How much a head counts in a mean."""

    equal = "equal"
    tokens = "tokens"
    """By the tokens it has learned from since the last sync."""


class DenseSync(str, Enum):
    """How parameters that train at full rank keep together; lora.dense says which they are."""

    averaged = "averaged"
    """Each head trains them for itself, and a sync averages them."""
    all_reduced = "all_reduced"
    """Their gradients are averaged over heads in every step, so they are the same at all times."""


class OuterOptimizer(str, Enum):
    """What is done with the heads' mean change before it is merged."""

    none = "none"
    """It is merged as it is."""
    sgd = "sgd"
    """Times lte.outer_lr, with heavy-ball momentum if lte.outer_momentum is above 0."""
    nesterov = "nesterov"
    """The same with Nesterov's momentum, as in DiLoCo (Douillard et al. 2023, arXiv 2311.08105)."""


@dataclass(kw_only=True, slots=True)
class LteConfig:
    """How many heads train apart, and how they sync."""

    heads: int = 2
    """Models that train apart, each with factors, data and Adam state of its own; one may be a group of processes."""
    sync_every: int = 10
    """Steps between the syncs of a layer; the last step of the run ends with a sync of all, too."""
    reset: SyncReset = SyncReset.none
    """none (factors stay: the sum's rank is at most heads x lora.rank) or factors (drawn anew)."""
    reset_every: int = 1
    """Syncs of a layer from one draw to the next, with lte.reset=factors."""
    adam: FactorAdam = FactorAdam.keep
    """keep, clear or scale the Adam state of factors that lte.reset=factors draws anew."""
    adam_scale: float | None = None
    """What lte.adam=scale multiplies both moments by."""
    exchange: Exchange = Exchange.auto
    """What travels between heads: auto (the fewer bytes, layer by layer), factors, dense or shared."""
    compression: Compression = Compression.none
    """How it is rounded for the way: none (fp32), bf16, fp8 or int8."""
    transport: Transport = Transport.torch
    """torch (NCCL, gloo) or mpi."""
    weight: HeadWeight = HeadWeight.equal
    """equal, or by the tokens that a head has learned from since the last sync."""
    ranks: list[int] | None = None
    """Adapter rank of each head, in place of lora.rank; null: all have that."""
    dense: DenseSync = DenseSync.averaged
    """averaged (at syncs) or all_reduced (their gradients, in every step)."""
    outer: OuterOptimizer = OuterOptimizer.none
    """none, sgd or nesterov, on the mean change."""
    outer_lr: float | None = None
    """Learning rate of lte.outer; DiLoCo takes 0.7."""
    outer_momentum: float | None = None
    """Momentum of lte.outer; DiLoCo takes 0.9."""
    fragments: int = 1
    """Groups of layers that sync in turn, spread over lte.sync_every steps."""
    delay: int = 0
    """Steps that heads go on training while a sync is on its way; 0: they wait for it."""
    merge_precision: MergePrecision = MergePrecision.split
    """How a bfloat16 base weight takes up a sync: split, stochastic or nearest; no matter in float32."""
    meeting: str | None = None
    """HOST:PORT of the meeting point of heads that are jobs of their own, or its folder, as a path with a /; null: all
    heads are processes of this one."""
    quorum: int | None = None
    """Fewest heads that make a sync at a meeting point; null: more than half of lte.heads."""
    wait_seconds: float = 60.0
    """How long a sync there waits for the other heads after the first has come."""

    def __post_init__(self) -> None:
        """Check the values."""
        for key in ("heads", "sync_every", "reset_every", "fragments"):
            if getattr(self, key) < 1:
                raise ConfigError(f"lte.{key} must be at least 1, got {getattr(self, key)}")
        self._check_reset()
        self._check_outer()
        if self.fragments > self.sync_every:
            raise ConfigError(
                f"lte.fragments={self.fragments} must be at most lte.sync_every={self.sync_every}: one syncs at a time"
            )
        if not 0 <= self.delay < self.sync_every // self.fragments:
            raise ConfigError(
                f"lte.delay={self.delay} must be 0 or more, and below lte.sync_every / lte.fragments = "
                f"{self.sync_every // self.fragments} steps: one sync is on its way at a time"
            )
        if self.delay and self.dense == DenseSync.all_reduced:
            raise ConfigError(
                f"lte.delay={self.delay} has no effect with lte.dense=all_reduced, whose gradients take the way that a "
                "sync is on: choose lte.dense=averaged, or lte.delay=0"
            )
        if self.ranks is not None and (len(self.ranks) != self.heads or min(self.ranks) < 1):
            raise ConfigError(
                f"lte.ranks must be {self.heads} ranks of at least 1, one for each head, got {self.ranks}"
            )
        self._check_meeting()

    def _check_meeting(self) -> None:
        usual = LteConfig.__dataclass_fields__
        if self.meeting is None:
            for key in ("quorum", "wait_seconds"):
                if getattr(self, key) != usual[key].default:
                    raise ConfigError(
                        f"lte.{key}={getattr(self, key)} has no effect without lte.meeting: leave it out, or choose "
                        "lte=elastic"
                    )
            return
        for key in ("fragments", "delay", "ranks", "transport", "dense", "reset_every"):
            value = getattr(self, key)
            if value != usual[key].default:
                told = value.value if isinstance(value, Enum) else value
                raise ConfigError(
                    f"lte.{key}={told} cannot be with lte.meeting: elastic heads sync all layers at once, have one "
                    "rank, and talk to their meeting point alone. Leave it out, or choose lte=heads"
                )
        if self.exchange == Exchange.shared:
            raise ConfigError("lte.exchange=shared cannot be with lte.meeting, where a head may be late: choose auto")
        if self.quorum is not None and not 1 <= self.quorum <= self.heads:
            raise ConfigError(f"lte.quorum must be in 1 to lte.heads={self.heads} (or null), got {self.quorum}")
        if not self.wait_seconds > 0:
            raise ConfigError(f"lte.wait_seconds must be above 0, got {self.wait_seconds}")

    def _check_reset(self) -> None:
        if self.reset == SyncReset.none:
            for key, usual in (("adam", FactorAdam.keep), ("adam_scale", None), ("reset_every", 1)):
                value = getattr(self, key)
                if value != usual:
                    told = value.value if isinstance(value, Enum) else value
                    raise ConfigError(
                        f"lte.{key}={told} has no effect with lte.reset=none, which keeps the factors: leave it out, "
                        "or choose lte.reset=factors"
                    )
        if (self.adam == FactorAdam.scale) != (self.adam_scale is not None):
            raise ConfigError(
                f"lte.adam=scale and lte.adam_scale belong together, got lte.adam={FactorAdam(self.adam).value} and "
                f"lte.adam_scale={self.adam_scale}"
            )
        if self.adam_scale is not None and not 0 < self.adam_scale < 1:
            raise ConfigError(
                f"lte.adam_scale must be between 0 (lte.adam=clear) and 1 (lte.adam=keep), got {self.adam_scale}"
            )

    def _check_outer(self) -> None:
        settings = (self.outer_lr, self.outer_momentum)
        if self.outer == OuterOptimizer.none:
            if settings != (None, None):
                raise ConfigError(
                    "lte.outer_lr and lte.outer_momentum have no effect with lte.outer=none: leave them out"
                )
            return
        if self.outer_lr is None or not self.outer_lr > 0:
            raise ConfigError(f"lte.outer_lr must be above 0 with lte.outer, got {self.outer_lr}; DiLoCo takes 0.7")
        if self.outer_momentum is None or not 0 <= self.outer_momentum < 1:
            raise ConfigError(
                f"lte.outer_momentum must be in [0, 1) with lte.outer, got {self.outer_momentum}; DiLoCo takes 0.9"
            )
        if self.outer == OuterOptimizer.nesterov and not self.outer_momentum:
            raise ConfigError("lte.outer=nesterov needs lte.outer_momentum above 0; lte.outer=sgd does without")

    @property
    def keeps_synced(self) -> bool:
        """Whether factors outlive a sync, so that what the base weight has of them must be remembered."""
        return self.reset == SyncReset.none or self.reset_every > 1

    @property
    def least_members(self) -> int:
        """Heads that make a sync at a meeting point."""
        return self.heads // 2 + 1 if self.quorum is None else self.quorum

    def rank_of(self, head: int) -> int | None:
        """A head's own adapter rank; None where all heads have lora.rank."""
        return None if self.ranks is None else self.ranks[head]

    def resets_at(self, step: int) -> bool:
        """Whether the sync after so many steps ends with new factors."""
        return self.reset == SyncReset.factors and -(-step // self.sync_every) % self.reset_every == 0

    def beginning(self, step: int) -> int | None:
        """The fragment whose sync begins after so many steps."""
        return self.ending(step + self.delay) if step > 0 else None

    def ending(self, step: int) -> int | None:
        """The fragment whose sync ends after so many steps; the last one ends at multiples of `sync_every`."""
        ends = [
            (fragment + 1) * self.sync_every // self.fragments % self.sync_every for fragment in range(self.fragments)
        ]
        return ends.index(step % self.sync_every) if step > 0 and step % self.sync_every in ends else None


def keep_synced_(model: nn.Module, config: LteConfig) -> None:
    """Make room for the factors of the last sync, where they stay."""
    for layer in low_rank_modules(model).values() if config.keeps_synced else ():
        layer.keep_synced_()


def bounded_layers(model: nn.Module, config: LteConfig) -> list[str]:
    """Return the layers whose update can never reach full rank, however long the run; needs the whole layers."""
    if config.reset != SyncReset.none:
        return []
    bounded = []
    for name, layer in low_rank_modules(model).items():
        together = layer.adapter_rank if config.exchange == Exchange.shared else config.heads * layer.adapter_rank
        if config.ranks is not None:
            together = sum(config.ranks)
        if together < min(layer.in_features, layer.out_features):
            bounded.append(name)
    return bounded
