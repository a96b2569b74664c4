"""What LTE's syncs leave behind for the next one, in checkpoints: outer momentum, residuals, all heads' primes.

Momenta are equal on all heads and kept once, cut as the weights are; residuals are each head's own. The primes are the
heads' `synced_down` and `synced_up` in the model's part of the checkpoint, which every head reads of every other.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import replace

from torch import Tensor

from launch.models.snapshot import is_shared, of_head
from launch.training.run import Run
from parallel.checkpoint import Checkpoint
from parallel.regions import Region
from relora.dense import DENSE

KIND = "lte"

Read = Callable[[str, Region], Tensor]


def held_of_syncs(run: Run) -> dict[str, tuple[Region, Tensor]]:
    """What this process holds of it, under the names of checkpoints."""
    held = {name: (region, part) for name, region, part in _parts(run)}
    return held if run.elastic is None else held | _primes(run)


def load_syncs(run: Run, checkpoint: Checkpoint) -> None:
    """Take it over from a checkpoint, for as many heads as it has; the others begin with none."""
    sync, store = run.sync, run.engine.store
    assert sync is not None
    sync.dense.settle()
    sync.make_room()
    stored = set(checkpoint.names(KIND))
    for name, region, part in _parts(run):
        if name in stored:
            part.copy_(checkpoint.part(KIND, name, region).reshape(part.shape))
    if run.elastic is not None:
        take_primes(run, stored, lambda name, region: checkpoint.part(KIND, name, region))
        return
    primes = set(checkpoint.names("model"))
    for name in sync.layers:
        names = [f"{name}.synced_down", f"{name}.synced_up"]
        for head in range(sync.count) if sync.gathers(name) else ():
            theirs = [of_head(head, one) for one in names]
            if not primes.issuperset(theirs):
                continue
            regions = [_of_one_head(run, store.region(one)) for one in (f"{name}.down", f"{name}.up")]
            down, up = (
                checkpoint.part("model", one, replace(region, shape=checkpoint.shape("model", one)))
                for one, region in zip(theirs, regions, strict=True)
            )
            sync.peers.setdefault(name, {})[head] = (down.clone(), up.clone())


def take_momenta(run: Run, stored: Collection[str], read: Read) -> None:
    """Take over what heads have in common; their residuals are each one's own."""
    for name, region, part in _parts(run):
        if name in stored and is_shared(name):
            part.copy_(read(name, region).reshape(part.shape))


def take_primes(run: Run, stored: Collection[str], read: Read) -> None:
    """Take over what an elastic head remembers of the others, whose models it has not got."""
    sync, store = run.sync, run.engine.store
    assert sync is not None
    sync.peers.clear()
    for name in sync.layers:
        for head in range(sync.count):
            theirs = {leaf: of_head(head, f"{name}.{leaf}/prime") for leaf in ("down", "up")}
            if theirs["down"] in stored:
                down, up = (read(one, store.region(f"{name}.{leaf}")) for leaf, one in theirs.items())
                sync.peers.setdefault(name, {})[head] = (down.clone(), up.clone())


def _primes(run: Run) -> dict[str, tuple[Region, Tensor]]:
    sync, store = run.sync, run.engine.store
    assert sync is not None
    return {
        of_head(head, f"{name}.{leaf}/prime"): (store.region(f"{name}.{leaf}"), factor)
        for name, heads in sync.peers.items()
        for head, pair in heads.items()
        for leaf, factor in zip(("down", "up"), pair, strict=True)
    }


def _parts(run: Run) -> Iterator[tuple[str, Region, Tensor]]:
    """Name, region and memory of every part of momenta and residuals that there is."""
    sync, store = run.sync, run.engine.store
    assert sync is not None
    for name, layer in sync.layers.items():
        region = store.base_region(layer)
        if name in sync.outer.momenta:
            yield f"{name}.weight/momentum", region, sync.outer.momenta[name]
        leaf = "up" if sync.shares_down else "weight"
        if sync.shares_down:
            region = _of_one_head(run, store.region(f"{name}.up"))
        for head, residual in zip(sync.hosted, sync.residuals.get(name, ()), strict=False):
            yield of_head(head, f"{name}.{leaf}/residual"), region, residual.view(region.part_shape)
    yield from _dense_parts(run)


def _dense_parts(run: Run) -> Iterator[tuple[str, Region, Tensor]]:
    sync, store = run.sync, run.engine.store
    assert sync is not None
    start = 0
    for parameter in sync.dense.parameters:
        name, region = store.name(parameter), _of_one_head(run, store.master_region(parameter))
        inside = slice(start, start + region.numel)
        start = inside.stop
        if DENSE in sync.outer.momenta:
            yield f"{name}/momentum", region, sync.outer.momenta[DENSE][inside].view(region.part_shape)
        for head, residual in zip(sync.hosted, sync.residuals.get(DENSE, ()), strict=False):
            yield of_head(head, f"{name}/residual"), region, residual[inside].view(region.part_shape)


def _of_one_head(run: Run, region: Region) -> Region:
    """Where one head's part of a tensor lies, of which this process may hold several heads' stacked."""
    assert run.sync is not None
    return region if len(run.sync.hosted) == 1 else replace(region, shape=region.shape[1:])
