"""What a run writes for later: checkpoints, the model that low-rank training began from, the final model.

Checkpoints are written by all processes together, Hugging Face folders by the main one: start/ from the model in
memory before it is split, or like final/ from a checkpoint's files, so that no process needs the whole model.
"""

import shutil
from collections.abc import Callable

import torch
from torch import Tensor, nn

from launch.config import resolved
from launch.models.description import describe
from launch.models.forms import write_folder
from launch.models.model import in_place_of
from launch.models.snapshot import Snapshot, is_shared, of_head
from launch.training.head_state import KIND, held_of_syncs, load_syncs
from launch.training.method_state import KIND as METHOD
from launch.training.method_state import held_of_method, load_method
from launch.training.run import Run
from parallel.checkpoint import Checkpoint, open_checkpoint, step_name
from parallel.collectives import gather_objects, on_main
from parallel.regions import Region, whole
from parallel.runtime import Runtime
from parallel.shards import Held, Read
from relora.convert import low_rank_modules
from relora.errors import ConfigError
from relora.initialize import key_of
from relora.precision import split
from relora.quantised import QuantisedBase

_FACTORS = ("down", "up", "synced_down", "synced_up")
_QUANTISED = ("quantised.codes", "quantised.scales", "quantised.remainder")


def save_checkpoint(run: Run) -> None:
    """Write a checkpoint of the run as it is after its last step, or begin to, and drop old ones."""
    state, run.checkpoint_due = run.state, False
    state.note_best(step_name(state.step))
    held: Held = {**_held(run), "generators": _generators(run.runtime), METHOD: held_of_method(run)}
    if run.sync is not None:
        held[KIND] = held_of_syncs(run)
    plain = {
        "run": state.to_dict(),
        "config": resolved(run.config),
        "data": run.course.facts,
        "class_names": run.course.class_names,
        "data_processes": run.runtime.batch.size,
        METHOD: run.method.state().values,
    }
    if run.sync is not None:
        mine = {str(head): one.own() for head, one in zip(run.places, run.states, strict=True)}
        by_process = gather_objects(run.runtime, mine)
        plain["heads"] = {head: own for heads in reversed(by_process) for head, own in heads.items()}
    run.saver.save(state.step, held, plain, best=state.best_checkpoint, kept=state.boundaries)
    note_published(run)


def note_published(run: Run) -> None:
    """Record the checkpoints that have been published since the last call."""
    for name in run.saver.published():
        step = int(name.removeprefix("step_"))
        run.watch.event("checkpoint", step, path=name)
        run.watch.tracker.checkpoint(run.folder.checkpoints / name, step)


def last_checkpoint(run: Run) -> Checkpoint:
    """The one that was written after the last step, when it is all on disk."""
    run.saver.wait()
    note_published(run)
    return open_checkpoint(run.folder.checkpoints / step_name(run.state.step))


def load_checkpoint(run: Run, checkpoint: Checkpoint) -> bool:
    """Put a checkpoint's tensors and generators into a freshly built phase.

    A low-rank phase takes a full-rank checkpoint, too: its weights become base weights, the factors stay as drawn.
    Returns whether it was so.

    Raises:
        ConfigError: its tensors are not this model's.
    """
    store, wanted = run.engine.store, set(_held(run)["model"])
    names = checkpoint.names("model")
    stored = {name for name in names if is_shared(name) or name in wanted}
    begins = run.conversion is not None and not any(name.endswith(".down") for name in names)
    if begins:
        leaves = tuple(f".{leaf}" for leaf in (*_FACTORS, "extra_bits", *_QUANTISED))
        wanted = {name for name in wanted if not name.endswith(leaves)}
        wanted |= {f"{name}.weight" for name, layer in low_rank_modules(run.model).items() if layer.quantised}
    else:
        for head in run.places:
            if stored.isdisjoint(own := {name for name in wanted if name.startswith(of_head(head, ""))}):
                wanted -= own  # a head that was not there
    for name in sorted(wanted ^ stored):
        side = "the checkpoint lacks" if name in wanted else "only the checkpoint has"
        raise ConfigError(f"{checkpoint.folder} is of another model: {side} {name}")
    reads = [_reader(checkpoint, run, head) for head in run.places]
    store.load(*(_first_cycle(read, run.model) if begins else read for read in reads))
    _set_generators(checkpoint, run)
    load_method(run, checkpoint)
    if run.sync is not None:
        of_heads = checkpoint.state.get("heads", {})
        for head, state in zip(run.places, run.states, strict=True):
            state.take_own(of_heads.get(str(head), {}))
        load_syncs(run, checkpoint)
    return begins


def load_weights(run: Run, checkpoint: Checkpoint) -> None:
    """Take over the weights of a checkpoint of this run and nothing else."""
    reads = _reader(checkpoint, run, 0)
    begins = run.conversion is not None and not any(name.endswith(".down") for name in checkpoint.names("model"))
    read = _first_cycle(reads, run.model) if begins else reads

    def weights(kind: str, name: str, region: Region) -> Tensor | None:
        return read(kind, name, region) if kind == "model" or name.endswith("/master") else None

    run.engine.store.load(weights)


def save_folder(run: Run, name: str, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    """Write a Hugging Face folder into the run folder, from a checkpoint's files, on the main process."""
    description = describe(run.config.model, run.hf_config, run.course.tokenizer, run.course.form)

    def write() -> None:
        snapshot = Snapshot(checkpoint, run.hf_config, run.config.lora, written=run.method.written)
        write_folder(snapshot, description, run.folder.path / name, dtype)

    on_main(run.runtime, write)


def adopt_start(run: Run, checkpoint: Checkpoint) -> None:
    """Take over start/ from the run that a checkpoint came from, when this run branches off it."""
    source, target = checkpoint.folder.parent.parent / "start", run.folder.path / "start"

    def adopt() -> None:
        if source.is_dir() and not target.exists():
            with in_place_of(target) as partial:
                shutil.copytree(source, partial, dirs_exist_ok=True)

    on_main(run.runtime, adopt)


def shared_parts(run: Run) -> Held:
    """What this process holds of the model and the masters that is equal on all heads right after a sync."""
    return {kind: {name: part for name, part in named.items() if is_shared(name)} for kind, named in _held(run).items()}


def _held(run: Run) -> Held:
    """What this process holds of model and optimizer, under the names of checkpoints."""
    held: Held = {"model": {}, "optimizer": {}}
    for place, head in enumerate(run.places):
        for kind, named in run.engine.store.held(place).items():
            for name, part in named.items():
                held[kind].setdefault(_stored_name(run, kind, name, head), part)
    return held


def _stored_name(run: Run, kind: str, name: str, head: int) -> str:
    """Of LTE's heads each has factors and Adam state of its own; right after a sync the rest is equal on all."""
    parameter, _, key = name.partition("/")
    owner, _, leaf = parameter.rpartition(".")
    factor = leaf in _FACTORS and run.conversion is not None and owner in run.conversion.low_rank
    if run.sync is None or not (factor or (kind == "optimizer" and key != "master")):
        return name
    return of_head(head, name)


def _reader(checkpoint: Checkpoint, run: Run, head: int) -> Read:
    names = {kind: set(checkpoint.names(kind)) for kind in ("model", "optimizer")}

    def read(kind: str, name: str, region: Region) -> Tensor | None:
        own = _stored_name(run, kind, name, head)
        stored = own if own in names[kind] else name  # of a warm start, all heads take the same
        if stored not in names[kind]:
            return None
        grown = _grown(checkpoint, run, kind, stored, region)
        return checkpoint.part(kind, stored, region) if grown is None else grown

    return read


def _grown(checkpoint: Checkpoint, run: Run, kind: str, name: str, region: Region) -> Tensor | None:
    """A tensor of a classifier's outputs, when tasks with further classes have been added since; else None.

    The outputs of these classes are as drawn.
    """
    parameter, _, moment = name.partition("/")
    shape = checkpoint.shape(kind, name)
    before, now = len(checkpoint.state["class_names"]), len(run.course.class_names)
    if not (0 < before < now and parameter in run.outputs and shape and shape[0] == before and region.shape[0] == now):
        return None
    whole_tensor = torch.zeros(region.shape) if moment.startswith("exp_avg") else run.outputs[parameter].clone()
    whole_tensor[:before] = checkpoint.whole(kind, name)
    return region.take(whole_tensor)


def _first_cycle(read: Read, model: nn.Module) -> Read:
    """A full-rank checkpoint as the low-rank phase wants it: base weights exact, split or quantised as layers are."""
    layers = low_rank_modules(model)

    def exact(name: str, region: Region) -> Tensor | None:
        master = read("optimizer", f"{name}/master", region)
        return read("model", name, region) if master is None else master

    quantised: dict[str, dict[str, Tensor]] = {}  # the tensors of one layer, which are asked for one after the other

    def coded(owner: str, layer: QuantisedBase, leaf: str) -> Tensor:
        if owner not in quantised:
            value = exact(f"{owner}.weight", Region((layer.rows, layer.columns)))
            assert value is not None
            made = QuantisedBase(value.float(), layer.form, remainder=layer.remainder is not None)
            quantised.clear()
            quantised[owner] = dict(made.named_buffers())
        return quantised[owner][leaf]

    def converted(kind: str, name: str, region: Region) -> Tensor | None:
        owner, _, leaf = name.rpartition(".")
        of_layer = layers.get(owner.removesuffix(".quantised"))
        if kind == "model" and of_layer is not None and of_layer.quantised is not None and owner not in layers:
            return coded(owner.removesuffix(".quantised"), of_layer.quantised, leaf)
        layer = layers.get(owner)
        if kind != "model" or layer is None or leaf not in ("weight", "extra_bits"):
            return read(kind, name, region)
        value = exact(f"{owner}.weight", region)
        if value is None or layer.extra_bits is None:
            return value
        return split(value.float())[leaf == "extra_bits"]

    return converted


def _generators(runtime: Runtime) -> dict[str, tuple[Region, Tensor]]:
    """States by the process's place among those with different sequences; the tensor axis draws alike."""
    states = {"cpu": torch.get_rng_state()}
    if runtime.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(runtime.device)
    return {f"{runtime.batch.index}/{name}": (whole(state), state) for name, state in states.items()}


def _set_generators(checkpoint: Checkpoint, run: Run) -> None:
    """Go on with the draws of dropout; on another number of data processes, with new ones."""
    runtime = run.runtime
    if checkpoint.state["data_processes"] != runtime.batch.size:
        seed_dropout(run.config.run.seed, runtime, step=run.state.step)
        return
    setters: dict[str, Callable[[Tensor], None]] = {"cpu": torch.set_rng_state}
    if runtime.device.type == "cuda":
        setters["cuda"] = lambda state: torch.cuda.set_rng_state(state, runtime.device)
    stored = set(checkpoint.names("generators"))
    for name, set_state in setters.items():
        key = f"{runtime.batch.index}/{name}"
        if key in stored:
            set_state(checkpoint.whole("generators", key).clone())


def seed_dropout(seed: int, runtime: Runtime, *, step: int = 0) -> None:
    """Start the draws of dropout: the same on the tensor axis, others wherever the sequences are others."""
    first = step == 0 and runtime.batch.index == 0
    torch.manual_seed(seed if first else key_of(seed, "dropout", step, runtime.batch.index) >> 1)
