"""What `plan` says against what engines really allocate, hand to collectives and compute."""

import gc
import json
import warnings
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from continual.batches import Batch
from launch import cli, exits
from launch.config import Dtype, load
from launch.models.model import model_config
from launch.plan import main, parse
from launch.planning.estimate import Layout, cost, merge_bytes
from launch.planning.flops import count_step_flops
from launch.planning.microbatch import Ledger, run_microbatch
from launch.planning.skeleton import Skeletons
from launch.training.objective import summed_loss
from launch.training.phase import make_engine, make_phase
from launch.training.recomputation import Checkpointing, checkpoint_blocks_
from parallel.footprint import Held, Kind, Role
from parallel.runtime import start
from relora.convert import prepare_base_
from relora.errors import ConfigError
from relora.linear import LowRankLinear
from relora.merged import formed_weights
from relora.precision import MergePrecision
from relora.quantised import BaseFormat

LENGTH, VOCABULARY, SEQUENCES = 32, 523, 2
MODEL = [
    f"data.sequence_length={LENGTH}",
    f"model.config.vocab_size={VOCABULARY}",
    "model.config.hidden_size=64",
    "model.config.num_hidden_layers=4",
    "model.config.num_attention_heads=4",
    "model.config.intermediate_size=176",
    "training.steps=20",
    "training.global_batch_size=8",
    f"training.microbatch_size={SEQUENCES}",
    "schedule.warmup_steps=2",
    # A small model's parameters would all be small enough to stay whole.
    "++parallel.deepspeed={zero_optimization: {stage3_param_persistence_threshold: 2000}}",
]
LOW_RANK = [*MODEL, "lora.rank=8", "relora.every=5", "relora.warm_start_steps=0", "schedule.restart_warmup_steps=2"]
FULL_RANK = [*MODEL, "lora=none", "relora=none"]


def configured(words):
    config = load(words)
    return config, model_config(config.model, vocab_size=0, sequence_length=LENGTH)


def live_tensors():
    """One tensor for each memory that is in use."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some objects warn when they are looked at
        found = [one for one in gc.get_objects() if type(one) in (torch.Tensor, nn.Parameter)]
    found += [one.grad for one in found if one.is_leaf and one.grad is not None]
    return {one.untyped_storage().data_ptr(): one for one in found if not one.is_meta}


KINDS = {"allreduce_": "summed", "_reduce_scatter_base_": "scattered", "_allgather_base_": "gathered"}


class Spy(TorchDispatchMode):
    """Counts the bytes of what collectives are handed, whole, by what happens to them."""

    def __init__(self):
        super().__init__()
        self.bytes = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, name = func._overloadpacket._qualified_op_name.split("::")
        if namespace == "c10d":
            self.bytes[KINDS.get(name, name)] += max(one.nbytes for one in tree_leaves(args) if torch.is_tensor(one))
        return func(*args, **(kwargs or {}))


def measured(runtime, words, tensor):
    """Of an engine: bytes that it keeps, the most in a microbatch besides, and what a step hands over."""
    with start(tensor=tensor) as meshed:
        config, hf_config = configured(words)
        before = live_tensors()  # held, so that no address comes twice
        phase = make_phase(config, hf_config, step=0, fresh=True, tensor=tensor)
        engine = make_engine(phase, config, meshed)
        ids = torch.randint(0, VOCABULARY, (SEQUENCES, LENGTH))
        batch = Batch(inputs={"input_ids": ids}, labels=ids)
        before[ids.untyped_storage().data_ptr()] = ids
        microbatches = config.training.global_batch_size // meshed.data.size // SEQUENCES

        def accumulate(count):
            with formed_weights(engine.model, seed=0, step=0):
                for _ in range(count):
                    engine.backward(summed_loss(engine.model, batch, ids.device, engine) / 100)

        for _ in range(2):
            with Spy() as spy:
                accumulate(microbatches)
                engine.step(1e-3, lambda norm: None)
        accumulate(1)
        after = live_tensors()
        resident = sum(one.untyped_storage().nbytes() for place, one in after.items() if place not in before)
        with Ledger(list(after.values())) as ledger:
            accumulate(1)
        engine.close()
        return resident, ledger.peak, dict(spy.bytes)


def planned(words, layout):
    config, hf_config = configured(words)
    low_rank = config.lora is not None
    return cost(config, Skeletons(config, hf_config), layout, low_rank=low_rank, on_gpu=False)


LAYOUTS = [
    *((LOW_RANK, stage, 1, 2, dtype, "none") for stage in range(4) for dtype in ("fp32", "bf16")),
    *((LOW_RANK, stage, 2, 2, "bf16", "none") for stage in (0, 2, 3)),
    (LOW_RANK, 0, 1, 1, "bf16", "none"),
    (LOW_RANK, 2, 1, 4, "bf16", "none"),
    (LOW_RANK, 3, 1, 4, "bf16", "none"),
    (LOW_RANK, 1, 1, 2, "bf16", "optimizer"),
    (LOW_RANK, 2, 1, 2, "fp32", "optimizer"),
    (LOW_RANK, 3, 1, 2, "bf16", "all"),
    *((FULL_RANK, stage, 1, 2, "bf16", "none") for stage in (1, 3)),
    *(([*LOW_RANK, "lora.forward=merged"], 0, 1, 1, dtype, "none") for dtype in ("fp32", "bf16")),
    ([*LOW_RANK, "lora.forward=factored"], 0, 1, 1, "bf16", "none"),
    ([*LOW_RANK, "lora.base=int8", "relora.merge_precision=nearest"], 0, 1, 1, "fp32", "none"),
    ([*LOW_RANK, "lora.base=nf4"], 2, 1, 2, "bf16", "none"),
    ([*LOW_RANK, "optimizer.moments=int8"], 0, 1, 1, "fp32", "none"),
    ([*LOW_RANK, "optimizer.moments=int8"], 3, 1, 2, "bf16", "all"),
]


@pytest.mark.parametrize(("base", "stage", "tensor", "data", "dtype", "offload"), LAYOUTS)
def test_planned_memory_and_traffic_are_an_engines(on_processes, base, stage, tensor, data, dtype, offload):
    layout = Layout(zero_stage=stage, tensor=tensor, data=data)
    words = [*base, f"parallel.zero_stage={stage}", f"training.dtype={dtype}"]
    words += [f"parallel.tensor={tensor}", f"parallel.offload={offload}"]
    plan = planned(words, layout)
    answers = on_processes(measured, layout.processes, words, layout.tensor)
    resident, in_microbatch = (max(answer[index] for answer in answers) for index in (0, 1))
    total = plan.footprint.resident + plan.footprint.on_host  # a CPU engine has both in one memory
    assert total == pytest.approx(resident, rel=0.002)
    assert 0.99 * in_microbatch <= plan.in_microbatch <= 1.3 * in_microbatch
    if layout.tensor == 1:
        handed_over = answers[0][2]
        assert set(plan.data_step) <= set(handed_over)
        for key, size in handed_over.items():
            little = 100 + sum(handed_over.values()) / 100  # norms, and what stage 3 compares in its first steps
            assert size == pytest.approx(plan.data_step.get(key, 0), rel=0.05, abs=little), key


GATHER_LATE = [
    f"++parallel.deepspeed.zero_optimization.stage3_{key}=0"
    for key in ("param_persistence_threshold", "prefetch_bucket_size", "max_reuse_distance")
]
GPT2 = ["model.config.model_type=gpt2", "~model.config.intermediate_size", "~model.config.rms_norm_eps"]
GPT2 += ["++model.config.attn_pdrop=0.0"]


@pytest.mark.parametrize(("tensor", "family"), [(1, []), (2, []), (1, GPT2), (1, [*GPT2, "lora.forward=factored"])])
def test_gathered_weights_stay_as_long_as_the_plan_says(on_processes, tensor, family):
    words = [*LOW_RANK, "lora.rank=32", "model.config.num_hidden_layers=12", *family, f"parallel.tensor={tensor}"]
    words += ["parallel.zero_stage=3", "training.dtype=bf16", *GATHER_LATE]
    plan = planned(words, Layout(zero_stage=3, tensor=tensor, data=2))
    in_microbatch = max(answer[1] for answer in on_processes(measured, 2 * tensor, words, tensor))
    assert in_microbatch <= plan.in_microbatch <= 1.1 * in_microbatch
    plain = plan.microbatch.at_loss / in_microbatch
    assert (plain < 0.9) == (tensor > 1 or "lora.forward=factored" in family), (
        "only views of weights keep all layers' weights"
    )


def test_bytes_over_the_tensor_axis_are_those_that_layers_hand_over(on_processes):
    words = [*LOW_RANK, "parallel.zero_stage=0", "training.dtype=bf16", "parallel.tensor=2"]
    plan = planned(words, Layout(zero_stage=0, tensor=2, data=1))
    for _, _, handed_over in on_processes(measured, 2, words, 2):
        assert handed_over["summed"] == pytest.approx(plan.microbatches * plan.microbatch.all_reduced, rel=1e-3)
    whole_factors = 4 * 8 * (5 * 64 + 2 * 64)  # blocks, rank, inputs of column layers and outputs of row layers
    assert plan.sent_in_step["tensor axis: factor gradients"] == plan.microbatches * 2 * whole_factors


@pytest.mark.parametrize(
    "base",
    [LOW_RANK, [*LOW_RANK, "lora.forward=factored"], [*LOW_RANK, "lora.forward=merged"], FULL_RANK],
    ids=["addmm", "factored", "merged", "full_rank"],
)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", Checkpointing)
def test_a_microbatch_without_memory_takes_what_a_real_one_takes(base, dtype, checkpointing):
    words = [*base, f"training.dtype={dtype}"]
    config, hf_config = configured(words)
    low_rank = config.lora is not None
    skeletons = Skeletons(config, hf_config)
    plan = skeletons.get(low_rank=low_rank, tensor=1, sequences=SEQUENCES, checkpointing=checkpointing).microbatch
    model = make_phase(config, hf_config, step=0, fresh=True, tensor=1).model.train()
    prepare_base_(model, config.torch_dtype, MergePrecision.split)
    checkpoint_blocks_(model, checkpointing)
    real = run_microbatch(model, sequences=SEQUENCES, length=LENGTH)
    for part in ("saved", "at_loss", "in_backward"):
        assert getattr(plan, part) == pytest.approx(getattr(real, part), rel=0.01), part
    assert (plan.forward_flops, plan.backward_flops) == (real.forward_flops, real.backward_flops)
    ids = torch.zeros(SEQUENCES, LENGTH, dtype=torch.int64)
    batch = Batch(inputs={"input_ids": ids}, labels=ids)

    def update():
        with formed_weights(model, seed=0, step=0):
            summed_loss(model, batch, ids.device).backward()

    assert plan.update_flops(1) == count_step_flops(update)
    assert (plan.forming_flops > 0) == ("lora.forward=merged" in base)


def test_fused_kernels_are_planned_as_the_products_that_they_stand_for():
    found = []
    for forward in ("addmm", "fused"):
        config, hf_config = configured([*LOW_RANK, f"lora.forward={forward}"])
        skeleton = Skeletons(config, hf_config).get(low_rank=True, tensor=1, sequences=SEQUENCES, checkpointing=False)
        found.append(skeleton.microbatch)
    assert found[1] == found[0]


def test_checkpointing_keeps_less_and_computes_more():
    config, hf_config = configured(LOW_RANK)
    skeletons = Skeletons(config, hf_config)
    plain, again, some = (
        skeletons.get(low_rank=True, tensor=1, sequences=8, checkpointing=checkpointing).microbatch
        for checkpointing in Checkpointing
    )
    assert again.saved < plain.saved / 3
    assert again.forward_flops == plain.forward_flops
    assert again.backward_flops > plain.backward_flops + plain.forward_flops / 3
    assert again.saved < some.saved < 0.75 * plain.saved
    assert (some.forward_flops, some.backward_flops) == (plain.forward_flops, plain.backward_flops)


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("low_rank", [True, False])
@pytest.mark.parametrize("family", [[], ["++model.config.num_key_value_heads=2"], ["model.config.model_type=qwen2"]])
def test_a_model_of_repeated_blocks_equals_the_whole_model_built(tensor, low_rank, family):
    config, hf_config = configured([*LOW_RANK, "model.config.num_hidden_layers=5", *family])
    short, whole = Skeletons(config, hf_config), Skeletons(config, hf_config)
    assert short.alike
    whole.alike = False
    wanted = {"low_rank": low_rank, "tensor": tensor, "sequences": 2, "checkpointing": Checkpointing.full}
    assert short.get(**wanted) == whole.get(**wanted)


@pytest.mark.parametrize(
    "words",
    [
        ["lora.rank_pattern={model.layers.3.self_attn.q_proj: 2}"],
        [r"lora.target_modules='model\.layers\.[03]\..*_proj'"],
    ],
)
def test_blocks_that_differ_in_their_factors_are_all_built(words):
    config, hf_config = configured([*LOW_RANK, *words])
    skeletons = Skeletons(config, hf_config)
    assert not skeletons.alike
    held = skeletons.get(low_rank=True, tensor=1, sequences=2, checkpointing=Checkpointing.none).held
    conversion = make_phase(config, hf_config, step=0, fresh=True, tensor=1).conversion
    assert sum(one.entries for one in held if one.group) == conversion.trainable


@pytest.mark.parametrize("form", [BaseFormat.int8, BaseFormat.nf4])
def test_a_merge_into_codes_takes_the_planned_bytes_beside_them(form):
    layer = LowRankLinear.from_module(nn.Linear(2048, 1024, bias=False), adapter_rank=8, scaling=1.0)
    layer.quantise_base_(form, remainder=True)
    kept = [layer.down, layer.up, *layer.buffers()]
    with torch.no_grad(), Ledger(kept) as ledger:
        layer.requantise_(layer.down.detach(), layer.up.detach())
    held = [
        Held(name="weight", entries=2048 * 1024, role=Role.base, group=None, quantised=layer.quantised.codes.nbytes),
        Held(name="down", entries=layer.down.numel(), role=Role.factor, group="down"),
    ]
    plan = merge_bytes(held, MergePrecision.split, Dtype.bf16)
    assert ledger.peak <= plan <= 1.3 * ledger.peak


@pytest.mark.parametrize("precision", list(MergePrecision))
@pytest.mark.parametrize("adapter_rank", [8, 256])
def test_a_merge_takes_the_planned_bytes_beside_the_weights(precision, adapter_rank):
    layer = LowRankLinear.from_module(nn.Linear(4096, 2048, bias=False), adapter_rank=adapter_rank, scaling=1.0)
    if precision is MergePrecision.split:
        layer.split_base_()
    else:
        layer.weight.data = layer.weight.data.bfloat16()
    kept = [layer.weight, layer.weight.data, layer.down, layer.up, *layer.buffers()]
    with torch.no_grad(), Ledger(kept) as ledger:
        layer.merge_(precision, layer.down.clone(), layer.up.clone(), key=1)
    held = [
        Held(name="weight", entries=layer.weight.numel(), role=Role.base, group=None, adapter_rank=adapter_rank),
        Held(name="down", entries=layer.down.numel(), role=Role.factor, group="down"),
        Held(name="up", entries=layer.up.numel(), role=Role.factor, group="up"),
    ]
    plan = merge_bytes(held, precision, Dtype.bf16)
    assert ledger.peak <= plan <= 1.5 * ledger.peak


SEVEN = ["experiment=relora_llama_7b", "plan.processes=8", "plan.gpu_memory=80"]


def test_a_plan_of_seven_billion_parameters_is_printed_and_written(capsys, tmp_path):
    path = tmp_path / "plan.json"
    assert cli.main(["plan", *SEVEN, "parallel=zero2", "--json", str(path)]) == exits.DONE
    text = capsys.readouterr().out
    for part in ("6.74G parameters", "fp32 masters", "warm start: GiB", "stage 3", "fits into 80 GiB"):
        assert part in text
    figures = json.loads(path.read_text(encoding="utf-8"))
    low, warm = figures["low rank"], figures["warm start"]
    assert low["parameters"]["model"] == warm["parameters"]["model"] == 6_739_234_816
    assert low["parameters"]["added"] == 32 * 1024 * (4 * (4096 + 4096) + 3 * (4096 + 11008))
    assert low["restart_flops"] == 2 * 1024 * 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert low["device"]["extra bits"] == low["device"]["base weights"]
    assert warm["device"]["fp32 masters"] == pytest.approx(4 * 6_739_234_816 / 8, rel=1e-6)
    here = {"processes": 8, "data": 8, "tensor": 1, "zero_stage": 2}
    peaks = [entry["peak"] for entry in low["layouts"] if entry.items() >= here.items()]
    assert peaks == [low["peak"]]
    frozen = 6_739_234_816 - 2 * 32100 * 4096
    products = 4 * frozen + 6 * low["parameters"]["added"] + 6 * 32100 * 4096
    tokens = 512 * 256 / 8
    plain = low["step_flops"] - low["microbatches"] * low["recomputed_flops"]
    assert plain == pytest.approx(products * tokens, rel=0.05)  # attention is what the formula lacks


def test_the_verdict_says_what_fits_and_names_a_layout_that_does(capsys):
    assert main([*SEVEN[:2], "plan.gpu_memory=30", "parallel.zero_stage=0"]) == exits.DONE
    verdict = capsys.readouterr().out.splitlines()[-1]
    assert verdict.startswith("does not fit into 30 GiB: 114.2")
    assert "in the warm start phase" in verdict
    assert "parallel.zero_stage=" in verdict


def test_full_rank_training_stands_beside_a_run_that_has_none_of_it(capsys):
    assert main([*LOW_RANK, "plan.processes=2"]) == exits.DONE
    text = capsys.readouterr().out
    assert "full rank, for comparison" in text
    assert "full rank: GiB" not in text
    assert main([*FULL_RANK, "plan.processes=2"]) == exits.DONE
    text = capsys.readouterr().out
    assert "for comparison" not in text
    assert "full rank: GiB" in text


def test_offload_moves_masters_and_moments_to_the_host():
    words = [*LOW_RANK, "parallel.zero_stage=2", "training.dtype=bf16"]
    layout = Layout(zero_stage=2, tensor=1, data=2)
    here, there = planned(words, layout).footprint, planned([*words, "parallel.offload=optimizer"], layout).footprint
    for kind in (Kind.masters, Kind.moments):
        assert kind not in there.device
        assert there.host[kind] == here.device[kind]
    assert there.resident < here.resident


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["plan.procesess=2"], "did you mean plan.processes"),
        (["plan.processes=two"], "plan.processes must be a whole number"),
        (["plan.processes="], "plan.processes needs a value"),
        (["plan.processes=0"], "plan.processes must be at least 1"),
        (["plan.gpu_memory=-1"], "plan.gpu_memory must be above 0"),
        (["plan.gpu_memory=nan"], "plan.gpu_memory must be above 0"),
        (["--json"], "plan.json needs a value"),
        (["plan.json=/nowhere/plan.json"], "plan.json=/nowhere/plan.json cannot be written"),
        (["plan.processes=3", "parallel.tensor=2"], "parallel.tensor=2 must divide"),
        (["plan.processes=3"], "training.global_batch_size must be a multiple of the 3 processes"),
        (["plan.processes=8", "parallel.tensor=8"], "num_attention_heads=4"),
        (["lora.rnak=4"], "lora.rnak"),
    ],
)
def test_words_that_mean_nothing_are_one_message(capsys, words, told):
    assert main([*LOW_RANK, *words]) == exits.REFUSED
    captured = capsys.readouterr()
    assert told in captured.err
    assert len(captured.err.splitlines()) == 1


def test_the_commands_own_words_are_told_from_those_of_train():
    own, others = parse(["plan.processes=4", "lora.rank=8", "--json=here", "plan.gpu_memory=0.5"])
    assert (own.processes, own.gpu_memory, str(own.json), others) == (4, 0.5, "here", ["lora.rank=8"])
    with pytest.raises(ConfigError, match=r"plan\.gpu_memory must be a number"):
        parse(["plan.gpu_memory=big"])


def test_help_tells_every_word(capsys):
    assert main(["--help"]) == exits.DONE
    text = capsys.readouterr().out
    assert all(word in text for word in ("plan.processes", "plan.gpu_memory", "plan.json"))
