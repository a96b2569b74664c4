"""The sync of LTE: the heads' mean change goes into the base weight that all of them share.

Between syncs a head computes with W + s (up down - up' down'), primes being its factors when W last took them up. A
sync adds the weighted mean over heads of that change to W. Products are averaged, never factors. A delayed sync sends
what a head had when it began, and the primes become that at its end, so what was learned meanwhile is kept, exactly.
It knows no processes: `Heads` reaches the other heads, a ParameterStore what this process holds.
Source: LTE, Huh et al. 2024 (arXiv 2402.16828); docs/lte.md derives the delayed form.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from relora.convert import low_rank_modules
from relora.dense import DENSE, DenseParameters
from relora.heads import Compression, Delivery, Heads, Parcel, Way
from relora.initialize import draw_down, key_of
from relora.linear import BasePart, LowRankLinear, squared
from relora.lte import DenseSync, Exchange, FactorAdam, LteConfig
from relora.optimizer import clear_moments, scale_moments
from relora.outer import Outer
from relora.restart import ParameterStore
from relora.sync_report import SyncReport, Tally, inner_products

Pair = tuple[Tensor, Tensor]
"""down and up of one head."""


@dataclass(slots=True)
class _Luggage:
    """A low-rank layer on its way."""

    name: str
    layer: LowRankLinear
    part: BasePart
    way: Way
    shapes: tuple[torch.Size, torch.Size]
    """Of one head's down and up here."""
    own: list[Pair] | None = None
    """Factors of the hosted heads, as they were when the sync began."""
    changes: list[Pair] | None = None
    """Factors of their changes."""


@dataclass(slots=True)
class _Flight:
    """A sync between its beginning and its end."""

    index: int
    step: int
    """Steps after which it ends."""
    fragment: int | None
    luggage: list[_Luggage]
    delivery: Delivery
    resets: bool
    delayed: bool
    dense: bool
    """Whether dense parameters sync along; they do not travel ahead."""
    words: Sequence[Sequence[float]]
    seconds: float


class HeadSync:
    """The syncs of one process's heads, and what they leave behind for the next one."""

    def __init__(
        self,
        model: nn.Module,
        config: LteConfig,
        store: ParameterStore,
        heads: Heads,
        *,
        seed: int,
        scale: Callable[[int], float],
        anchored: bool = False,
        measured: Iterable[str] = (),
    ) -> None:
        """Take hold of a model.

        Args:
            scale: from an adapter rank to the factor on up @ down.
            anchored: remember dense parameters as they were after a sync, even if nothing of the settings asks for it.
            measured: layers of whose mean change the effective rank is told.
        """
        self._config, self._store, self._heads, self._seed, self._scale = config, store, heads, seed, scale
        self.layers = low_rank_modules(model)
        self._measured = frozenset(measured)
        self.outer = Outer(config)
        self.residuals: dict[str, list[Tensor]] = {}
        """What compressing a mean has kept back so far, by layer and hosted head."""
        factors = {id(factor) for layer in self.layers.values() for factor in (layer.down, layer.up)}
        full = [one for one in model.parameters() if one.requires_grad and id(one) not in factors]
        anchored = anchored or not self.outer.is_off or config.compression != Compression.none
        self.dense = DenseParameters(
            full if config.dense == DenseSync.averaged else [], store, heads, anchored=anchored
        )
        """Parameters that train at full rank and are averaged."""
        self._reported = heads.sent
        self.peers: dict[str, dict[int, Pair]] = {}
        """Of layers whose factors travel: every head's primes, in host memory; missing ones are zero."""
        self._flight: _Flight | None = None

    @property
    def hosted(self) -> Sequence[int]:
        """Heads of this process."""
        return self._heads.hosted

    @property
    def count(self) -> int:
        """How many heads there are."""
        return self._heads.count

    @property
    def shares_down(self) -> bool:
        """Whether all heads have the same `down`."""
        return self._config.exchange == Exchange.shared

    def gathers(self, name: str) -> bool:
        """Whether a layer's factors travel and are remembered."""
        return self._config.keeps_synced and self._pack(name, self.layers[name]).way is Way.gather

    def make_room(self) -> None:
        """Make all momenta and residuals that syncs will need, zero."""
        for name, layer in self.layers.items():
            item = self._pack(name, layer)
            self._parcel(item)
            self.outer.make_room(name, item.part.weight)
        if self.dense.parameters:
            self._dense_parcel()
            self.outer.make_room(DENSE, self.dense.masters()[0])

    def advance(
        self, step: int, index: int, words: Callable[[int | None], list[list[float]]], *, everything: bool
    ) -> list[tuple[SyncReport, list[list[float]]]]:
        """Do what is due after so many steps; returns the report of each sync that ended, and all heads' words.

        Args:
            index: of the next sync to end, from 1.
            words: what each hosted head tells the others when the sync of a fragment (None: of everything) begins;
                the first word is its weight.
            everything: sync all layers and wait, whatever else is due.
        """
        ended = []
        if self._flight is not None and (everything or self._config.ending(step) == self._flight.fragment):
            ended.append(self._end(self._flight))
        fragment = None if everything else self._config.beginning(step)
        if everything or fragment is not None:
            delayed = not everything and self._delay > 0
            flight = self._begin(fragment, step, index + len(ended), words(fragment), delayed=delayed)
            if flight.delayed:
                self._flight = flight
            else:
                ended.append(self._end(flight))
        return ended

    def take_up(self, delivery: Delivery, step: int, index: int) -> tuple[SyncReport, list[list[float]]]:
        """Merge a sync of everything that was made without this process's heads, whose own changes stay as they are."""
        flight = _Flight(
            index=index,
            step=step,
            fragment=None,
            luggage=[self._pack(name, layer) for name, layer in self.layers.items()],
            delivery=delivery,
            resets=self._config.resets_at(step),
            delayed=False,
            dense=bool(self.dense.parameters),
            words=(),
            seconds=0.0,
        )
        return self._end(flight)

    @property
    def _delay(self) -> int:
        return self._config.delay

    # ---- the beginning

    @torch.no_grad()
    def _begin(
        self, fragment: int | None, step: int, index: int, words: Sequence[Sequence[float]], *, delayed: bool
    ) -> _Flight:
        began = time.perf_counter()
        ends = step + self._delay if delayed else step
        luggage = [self._pack(name, self.layers[name]) for name in self._names(fragment)]
        dense = bool(self.dense.parameters) and fragment in (None, self._config.fragments - 1)
        parcels = [self._parcel(item) for item in luggage]
        if dense and not delayed:
            parcels.append(self._dense_parcel())
        resets = self._config.resets_at(ends)
        if delayed:
            for item in luggage:
                self._take(item, copy=True)
        delivery = self._heads.exchange(parcels, words, background=delayed)
        if delayed and resets:
            for item in luggage:
                self._set_aside(item, index)
        return _Flight(
            index=index,
            step=ends,
            fragment=fragment,
            luggage=luggage,
            delivery=delivery,
            resets=resets,
            delayed=delayed,
            dense=dense,
            words=words,
            seconds=time.perf_counter() - began,
        )

    def _names(self, fragment: int | None) -> list[str]:
        """A fragment's layers: every so many-th, so that each has some of all depths."""
        names = list(self.layers)
        return names if fragment is None else names[fragment :: self._config.fragments]

    def _pack(self, name: str, layer: LowRankLinear) -> _Luggage:
        down, up = (torch.Size(shape[-2:]) for shape in self._store.factor_shapes(layer))
        part = self._store.base(layer)
        pieces = part.layer_replicas // part.replicas  # the last of which may be shorter, but all must choose alike
        gathers = self._config.exchange == Exchange.factors or (
            self._config.exchange == Exchange.auto
            and self._heads.by_factors(
                self._largest(down.numel() + up.numel(), layer),
                -(-(up.numel() // up[1] * down[1]) // pieces),
                alike=pieces == 1,
            )
        )
        return _Luggage(name, layer, part, Way.gather if gathers else Way.mean, (down, up))

    def _largest(self, entries: int, layer: LowRankLinear) -> int:
        ranks = self._config.ranks
        return entries if ranks is None else entries // layer.adapter_rank * max(ranks)

    def _take(self, item: _Luggage, *, copy: bool = False) -> None:
        """Note the hosted heads' factors and changes as they are now."""
        if item.own is not None:
            return
        layer = item.layer
        pairs = _by_head(layer, self._store.factors(layer))
        item.own = [(down.clone(), up.clone()) for down, up in pairs] if copy else pairs
        primes = _primes(layer, len(pairs))
        item.changes = [layer.change_from(pair, prime) for pair, prime in zip(item.own, primes, strict=True)]

    def _parcel(self, item: _Luggage) -> Parcel:
        config, layer, part = self._config, item.layer, item.part
        alike = part.replicas == part.layer_replicas
        shared = config.exchange == Exchange.shared

        def own() -> list[Tensor]:
            self._take(item)
            assert item.own is not None
            assert item.changes is not None
            if item.way is Way.gather:
                return [torch.cat([down.flatten(), up.flatten()]) for down, up in item.own]
            if shared:
                return [up.flatten() * layer.scaling for _, up in item.changes]
            return [layer.product_part(down, up, part) for down, up in item.changes]

        down, up = (shape.numel() for shape in item.shapes)
        entries = up if shared else part.weight.numel()
        if item.way is Way.gather:
            entries = self._largest(down + up, layer)
        return Parcel(
            name=item.name,
            way=item.way,
            entries=entries,
            own=own,
            alike=alike or shared or item.way is Way.gather,
            compression=config.compression,
            residuals=self._residuals(item.name, entries, part.weight.device) if item.way is Way.mean else None,
            replicas=0 if item.way is Way.gather else (part.layer_replicas if shared else part.replicas),
        )

    def _residuals(self, name: str, entries: int, device: torch.device) -> list[Tensor] | None:
        if self._config.compression == Compression.none:
            return None
        if name not in self.residuals:
            self.residuals[name] = [torch.zeros(entries, device=device) for _ in self._heads.hosted]
        return self.residuals[name]

    def _set_aside(self, item: _Luggage, index: int) -> None:
        """Let new factors start while the old ones' change is on its way: until then it stays beside them."""
        assert item.changes is not None
        layer = item.layer
        down, up = (torch.stack(factors) for factors in zip(*item.changes, strict=True))
        layer.synced_down, layer.synced_up = (down, -up) if layer.hosted > 1 else (down[0], -up[0])
        self._redraw(item, index)

    # ---- the end

    @torch.no_grad()
    def _end(self, flight: _Flight) -> tuple[SyncReport, list[list[float]]]:
        began = time.perf_counter()
        self._flight = None
        delivery = flight.delivery
        tally = Tally(len(delivery.members))
        for item in flight.luggage:
            if flight.delayed:
                item.part = self._store.base(item.layer)  # training has used it meanwhile
            tally.weigh(item.part)
            self._merge(item, delivery, flight.index, tally)
            self._after(item, delivery, flight)
            item.own = item.changes = None  # of all layers together they are as large as the model's factors
        products = self._end_dense(flight)
        sent, self._reported = self._heads.sent - self._reported, self._heads.sent
        report = tally.report(
            self._store,
            delivery,
            products,
            index=flight.index,
            fragment=flight.fragment,
            layers=len(flight.luggage),
            sent=sent,
        )
        report.seconds = flight.seconds + time.perf_counter() - began
        return report, delivery.words

    def _merge(self, item: _Luggage, delivery: Delivery, index: int, tally: Tally) -> None:
        """Add the mean of the heads' changes to this process's part of a base weight."""
        result = delivery.result()
        layer, part = item.layer, item.part
        key = key_of(self._seed, "sync", item.name, index)
        precision = self._config.merge_precision
        if item.way is Way.mean and self._config.exchange != Exchange.shared:
            update = self.outer.step(item.name, result[0])
            tally.mean_squared += squared(result[0]) / part.replicas
            tally.changed += layer.add_part_(precision, update, key, part) / part.replicas
            return
        if item.way is Way.mean:
            self._take(item)
            assert item.own is not None
            downs, ups = item.own[0][0], result[0].view(item.shapes[1]).double()
        else:
            tally.by_factors += 1
            downs, ups = self._gathered(item, delivery, result, tally)
        tally.merged(downs, ups, part, measure=item.name in self._measured)
        if self.outer.is_off:
            changed = layer.add_product_(precision, downs, ups, key, part, scaling=1.0)
        else:
            update = self.outer.step(item.name, layer.product_part(downs, ups, part, scaling=1.0))
            changed = layer.add_part_(precision, update, key, part)
        tally.changed += changed / part.replicas

    def _gathered(self, item: _Luggage, delivery: Delivery, rows: list[Tensor], tally: Tally) -> Pair:
        """Factors of the mean change from all members' factors; they are remembered if they stay."""
        known = self.peers.get(item.name, {})
        downs, ups, widths, scales = [], [], [], []
        for member, row in zip(delivery.members, rows, strict=True):
            now = self._split(item, member, row)
            before = known.get(member)
            pairs = [now] if before is None else [now, (before[0].to(row.device), -before[1].to(row.device))]
            downs.append(torch.cat([down for down, _ in pairs]))
            ups.append(torch.cat([up for _, up in pairs], dim=1))
            widths.append(len(downs[-1]))
            rank = self._config.rank_of(member)
            scales.append(item.layer.scaling if rank is None else self._scale(rank))
            if self._config.keeps_synced:
                self.peers.setdefault(item.name, {})[member] = (now[0].cpu(), now[1].cpu())
        down, up = torch.cat(downs), torch.cat(ups, dim=1).double()
        owner = torch.repeat_interleave(torch.arange(len(widths)), torch.tensor(widths)).to(up.device)
        up *= torch.tensor(scales, dtype=torch.float64, device=up.device)[owner]
        tally.known += inner_products(down, up, owner, len(widths)) / item.part.layer_replicas
        return down, up * torch.tensor(delivery.weights, dtype=torch.float64, device=up.device)[owner]

    def _split(self, item: _Luggage, member: int, row: Tensor) -> Pair:
        (here, inputs), (outputs, _) = item.shapes
        rank = self._config.rank_of(member) or here
        down, up = row[: rank * (inputs + outputs)].split([rank * inputs, rank * outputs])
        return down.view(rank, inputs), up.view(outputs, rank)

    def _dense_parcel(self) -> Parcel:
        return self.dense.parcel(self._config.compression, self._residuals)

    def _end_dense(self, flight: _Flight) -> Tensor:
        """Average the dense parameters if it is their turn; returns the heads' products of what travelled as means."""
        delivery = flight.delivery
        products = delivery.products() if flight.delayed else None
        if flight.dense and flight.delayed:
            delivery = self._heads.exchange([self._dense_parcel()], flight.words)
        if flight.dense:
            self.dense.take_up(delivery.result()[0], delivery.members, self.outer)
        return delivery.products() if products is None else products

    def _after(self, item: _Luggage, delivery: Delivery, flight: _Flight) -> None:
        """Draw the hosted heads' factors anew, or remember what the base weight has of them now."""
        layer, keeps = item.layer, self._config.keeps_synced
        if flight.resets:
            self.peers.pop(item.name, None)
        if not set(self._heads.hosted) & set(delivery.members):  # the change is still their own
            return
        if flight.resets:
            if not flight.delayed:
                self._redraw(item, flight.index)
            self._set_primes_to_zero(item)
            return
        assert keeps, "factors stay only where the last sync's are kept"
        assert item.own is not None
        for place, head in enumerate(self._heads.hosted):
            if head not in delivery.members:
                continue
            down, up = item.own[place]
            if item.way is Way.gather:  # as all heads have them, rounding included: the rest is the next change's
                down, up = self.peers[item.name][head]
            for synced, value in ((layer.synced_down, down), (layer.synced_up, up)):
                if synced is not None:
                    (synced if layer.hosted == 1 else synced[place]).copy_(value)

    def _set_primes_to_zero(self, item: _Luggage) -> None:
        layer, device = item.layer, item.part.weight.device
        layer.synced_down = layer.synced_up = None
        if not self._config.keeps_synced:
            return
        hosted = (layer.hosted,) if layer.hosted > 1 else ()
        down, up = (torch.zeros((*hosted, *shape), device=device) for shape in item.shapes)
        layer.synced_up = up
        if self._config.exchange != Exchange.shared:
            layer.synced_down = down

    def _redraw(self, item: _Luggage, index: int) -> None:
        """Start the hosted heads' factors anew, as the conversion did."""
        layer, store = item.layer, self._store
        shared = self._config.exchange == Exchange.shared
        shape = store.shape(layer.down)
        rank, inputs = shape[-2:]
        drawn = [
            draw_down(item.name, (rank, inputs), seed=self._seed, head=0 if shared else head, restart_index=index)
            for head in self._heads.hosted
        ]
        store.write(layer.down, torch.stack(drawn).view(shape))
        store.write(layer.up, torch.zeros(()).expand(store.shape(layer.up)))
        for parameter in (layer.down, layer.up):
            moments = store.moments(parameter) if parameter.requires_grad else None
            if moments is None or self._config.adam == FactorAdam.keep:
                continue
            if self._config.adam == FactorAdam.clear:
                clear_moments(moments)
            else:
                assert self._config.adam_scale is not None
                scale_moments(moments, self._config.adam_scale)

    @torch.no_grad()
    def begin_anew(self, index: int) -> None:
        """Let the hosted heads begin after a sync as if they had never been there: new factors, nothing in Adam."""
        self.dense.drop_changes()
        for name, layer in self.layers.items():
            item = self._pack(name, layer)
            self._redraw(item, index)
            self._set_primes_to_zero(item)
        for residual in (one for several in self.residuals.values() for one in several):
            residual.zero_()
        factors = [factor for layer in self.layers.values() for factor in (layer.down, layer.up)]
        for parameter in [*self.dense.parameters, *factors]:
            moments = self._store.moments(parameter)
            if moments is not None:
                clear_moments(moments)

    def forget(self) -> None:
        """Start over with factors that a restart has drawn: the base weight has nothing of them."""
        self.peers.clear()
        for layer in self.layers.values():
            for synced in (layer.synced_down, layer.synced_up):
                if synced is not None:
                    synced.zero_()

    def forget_momenta(self) -> None:
        """Start the outer optimizer anew, as at the beginning of a task."""
        for momentum in self.outer.momenta.values():
            momentum.zero_()


def _by_head(layer: LowRankLinear, factors: Pair) -> list[Pair]:
    """Return the factors of each hosted head."""
    return [factors] if layer.hosted == 1 else list(zip(*(factor.unbind() for factor in factors), strict=True))


def _primes(layer: LowRankLinear, hosted: int) -> list[tuple[Tensor | None, Tensor | None]]:
    """Return what the base weight has of each hosted head's factors."""
    down, up = layer.synced_down, layer.synced_up
    if layer.hosted == 1:
        return [(down, up)]
    return [(None if down is None else down[place], None if up is None else up[place]) for place in range(hosted)]
