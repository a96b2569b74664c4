"""Split models against their whole twins, on real processes: losses, all gradients, merges, and what is exchanged."""

import copy
from collections import Counter

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen3Config,
    ViTConfig,
    ViTForImageClassification,
)

from parallel.collectives import sum_over
from parallel.runtime import start
from parallel.tensor import split_model
from parallel.vocabulary import summed_cross_entropy
from relora.convert import LoraConfig, low_rank_modules, prepare_base_, to_low_rank
from relora.merged import formed_weights
from relora.paths import ForwardPath
from relora.precision import MergePrecision

TOKENS, HIDDEN, RANK = 2 * 10, 16, 3
_COMMON = {
    "vocab_size": 49,
    "hidden_size": HIDDEN,
    "intermediate_size": 25,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2, "pad_token_id": 47}
CONFIGS = {
    "llama": LlamaConfig(**_GROUPED, tie_word_embeddings=False),
    "llama_4": LlamaConfig(**{**_GROUPED, "num_key_value_heads": 4}, tie_word_embeddings=True, attention_bias=True),
    "llama_whole_ends": LlamaConfig(**_GROUPED, tie_word_embeddings=False),
    "llama_tied": LlamaConfig(**_GROUPED, tie_word_embeddings=True),
    "mistral": MistralConfig(**_GROUPED),
    "qwen2": Qwen2Config(**_GROUPED, tie_word_embeddings=False),
    "qwen3": Qwen3Config(**_GROUPED, head_dim=6, tie_word_embeddings=True),
    "gemma3": Gemma3TextConfig(**_GROUPED, head_dim=4, query_pre_attn_scalar=4),
    "gpt_neox": GPTNeoXConfig(**_COMMON, hidden_dropout=0.0, attention_dropout=0.0),
    "gpt2": GPT2Config(
        vocab_size=49,
        n_embd=HIDDEN,
        n_inner=25,
        n_layer=2,
        n_head=4,
        n_positions=32,
        bos_token_id=1,
        eos_token_id=1,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    ),
    "opt": OPTConfig(**_COMMON, ffn_dim=25, word_embed_proj_dim=HIDDEN, dropout=0.0),
    "vit": ViTConfig(
        hidden_size=HIDDEN,
        intermediate_size=25,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=8,
        patch_size=4,
        num_labels=5,
    ),
}
PATTERNS = {
    "llama_whole_ends": {"embed_tokens": "replicate", "lm_head": "replicate"},
    "opt": {
        "self_attn.q_proj": "column",
        "self_attn.k_proj": "column",
        "self_attn.v_proj": "column",
        "out_proj": "row",
        "layers.*.fc1": "column",
        "layers.*.fc2": "row",
        "layers.*.*_layer_norm": "replicate",
    },
}


def _model(name, *, lora=None, checkpointing=False):
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS[name])
    model = ViTForImageClassification(config) if name == "vit" else AutoModelForCausalLM.from_config(config)
    if lora is not None:
        to_low_rank(model, lora, seed=0)
    for parameter in model.parameters():  # biases, norms and `up` start at 0 and 1, where mistakes hide
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def _loss(model, index=0):
    drawn = torch.Generator().manual_seed(index)
    if model.config.model_type == "vit":
        logits = model(torch.randn(3, 3, 8, 8, generator=drawn)).logits
        return summed_cross_entropy(model, logits, torch.tensor([0, 1, 1]))
    ids = torch.randint(49, (2, TOKENS // 2), generator=drawn)
    ids[0, 4] = 47  # the padding token, whose vector does not train
    labels = ids.roll(-1, 1).masked_fill(torch.rand(ids.shape, generator=drawn) < 0.2, -100)
    logits = model(input_ids=ids, use_cache=False).logits
    return summed_cross_entropy(model, logits.flatten(0, 1), labels.flatten()) / TOKENS


def _twins(axis, name, **options):
    whole, part = _model(name, **options), _model(name, **options)
    return whole, part, split_model(part, axis, PATTERNS.get(name))


def _whole(axis, region, part):
    """A tensor from all processes' parts."""
    result = torch.zeros(region.shape)
    region.put(result, part)
    return sum_over(axis, result)


def _largest_error(axis, name, seed=None, **options):
    """Of the loss, or of a gradient relative to its largest entry (or to what rounding leaves of a zero gradient)."""
    whole, part, regions = _twins(axis, name, **options)
    losses = []
    for model in (whole, part):
        if seed is not None:
            torch.manual_seed(seed)
        with formed_weights(model, seed=0, step=0):
            microbatches = [_loss(model, index) for index in range(2)]
            for loss in microbatches:
                loss.backward()
        losses.append(sum(microbatches).item())
    wanted, found = (dict(model.named_parameters()) for model in (whole, part))
    assert list(wanted) == list(found)
    errors = {"loss": abs(losses[0] - losses[1])}
    floor = 0.01 * max(float(parameter.grad.abs().max()) for parameter in whole.parameters() if parameter.requires_grad)
    for key, parameter in found.items():
        assert getattr(parameter, "tensor_model_parallel", False) == (key in regions)
        if wanted[key].grad is None:
            assert parameter.grad is None
            continue
        gradient = _whole(axis, regions[key], parameter.grad) if key in regions else parameter.grad
        difference = (gradient - wanted[key].grad).abs().max()
        errors[key] = float(difference / wanted[key].grad.abs().max().clamp_min(floor))
    return max(errors.items(), key=lambda item: item[1])


LOW_RANK = LoraConfig(rank=RANK, alpha=2.0)


def _all_errors(runtime, names):
    with start(tensor=runtime.world_size) as meshed:
        return {
            (name, lora is not None, checkpointing): _largest_error(
                meshed.tensor, name, lora=lora, checkpointing=checkpointing
            )
            for name in names
            for lora in (None, LOW_RANK)
            for checkpointing in (False, True)
        }


@pytest.mark.parametrize(("count", "names"), [(2, list(CONFIGS)), (4, ["llama_4", "gpt_neox", "gpt2"])])
def test_loss_and_all_gradients_are_those_of_the_whole_model(on_processes, count, names):
    for errors in on_processes(_all_errors, count, names):
        for case, (where, error) in errors.items():
            assert error < 1e-5, f"{case}: {where} is off by {error}"


SPECIAL = {
    "dropout before a column-split layer, from equal generators": (["q_proj", "up_proj"], {"dropout": 0.5}),
    "a low-rank output layer": (".*(q_proj|o_proj|lm_head)", {}),
    "only factors train": ("all-linear", {"dense": []}),
    "only norms train beside them": ("all-linear", {"dense": ["norms"]}),
    **{
        f"the {path.value} path": ("all-linear", {"forward": path})
        for path in ForwardPath
        if path is not ForwardPath.fused
    },
}


def _special_errors(runtime):
    with start(tensor=2) as meshed:
        loras = {
            case: LoraConfig(rank=RANK, alpha=2.0, target_modules=targets, **more)
            for case, (targets, more) in SPECIAL.items()
        }
        return {case: _largest_error(meshed.tensor, "llama", seed=1, lora=lora) for case, lora in loras.items()}


def test_special_low_rank_models_compute_what_their_whole_twins_do(on_processes):
    for errors in on_processes(_special_errors, 2):
        for case, (where, error) in errors.items():
            assert error < 1e-5, f"{case}: {where} is off by {error}"


def _bf16_losses(runtime):
    with start(tensor=2) as meshed:
        model = _model("llama")
        region = split_model(model, meshed.tensor)["lm_head.weight"]
        drawn = torch.Generator().manual_seed(0)
        whole = (20 * torch.randn(30, 49, generator=drawn)).bfloat16().requires_grad_()
        labels = torch.randint(49, (30,), generator=drawn).masked_fill(torch.arange(30) % 4 == 0, -100)
        part = region.take(whole.detach().t()).t().clone().requires_grad_()
        wanted = F.cross_entropy(whole.float(), labels, ignore_index=-100, reduction="sum")
        found = summed_cross_entropy(model, part, labels)
        wanted.backward()
        found.backward()
        return wanted.item(), found.item(), torch.equal(part.grad, region.take(whole.grad.t()).t())


def test_bf16_logits_lose_nothing_in_the_split_loss(on_processes):
    (wanted, found, same), other = on_processes(_bf16_losses, 2)
    assert found == pytest.approx(wanted, rel=1e-6)
    assert same
    assert other == (wanted, found, True)


class _Counting:
    """What all_reduce and all_gather are called for, by the number of entries."""

    def __enter__(self):
        self.calls, self._kept = Counter(), (dist.all_reduce, dist.all_gather)

        def all_reduce(tensor, *args, **kwargs):
            self.calls[tensor.numel()] += 1
            return self._kept[0](tensor, *args, **kwargs)

        def all_gather(result, tensor, *args, **kwargs):
            self.calls["gather", tensor.numel()] += 1
            return self._kept[1](result, tensor, *args, **kwargs)

        dist.all_reduce, dist.all_gather = all_reduce, all_gather
        return self.calls

    def __exit__(self, *error):
        dist.all_reduce, dist.all_gather = self._kept


def _exchanges(runtime):
    with start(tensor=2) as meshed:
        model = _model("llama", lora=LOW_RANK)
        split_model(model, meshed.tensor)
        with _Counting() as forward:
            loss = _loss(model)
        with _Counting() as backward:
            loss.backward()
        return forward, backward


def test_a_low_rank_branch_adds_no_collective_but_the_sum_of_its_whole_factors_gradient(on_processes):
    values, factor = TOKENS * HIDDEN, RANK * HIDDEN
    for forward, backward in on_processes(_exchanges, 2):
        rows, columns, layers, embedding, head = 2, 5, 2, 1, 1
        assert forward == {values: embedding + layers * rows, ("gather", 2 * TOKENS): 1}
        assert backward == {values: layers * columns + head, factor: layers * (rows + columns)}


def _merge_errors(runtime):
    with start(tensor=2) as meshed:
        errors = []
        for name in ("llama", "gpt2"):
            for dtype, precision in ((torch.float32, None), (torch.bfloat16, MergePrecision.split)):
                whole, part, regions = _twins(meshed.tensor, name, lora=LOW_RANK)
                for model in (whole, part):
                    prepare_base_(model, dtype, precision)
                layers, parts = low_rank_modules(whole), low_rank_modules(part)
                assert list(layers) == list(parts)
                for key, layer in layers.items():
                    local = parts[key]
                    assert (local.out_features, local.in_features) == local.base().shape == local.delta().shape
                    changed = local.merge_(precision or MergePrecision.split)
                    everywhere = float(sum_over(meshed.tensor, torch.tensor(float(changed))))
                    assert everywhere == layer.merge_(precision or MergePrecision.split)
                    region = regions[f"{key}.weight"]
                    if dtype == torch.bfloat16:
                        assert regions[f"{key}.extra_bits"] == region
                        assert local.extra_bits.shape == local.weight.shape
                    base = local.base().t() if local.transposed else local.base()
                    wanted = layer.base().t() if layer.transposed else layer.base()
                    errors.append(float((_whole(meshed.tensor, region, base) - wanted).abs().max()))
        return max(errors)


def test_merged_parts_are_the_parts_of_the_merged_whole(on_processes):
    assert max(on_processes(_merge_errors, 2)) < 1e-6


def _untouched(runtime):
    model = _model("llama")
    before = dict(model.named_parameters())
    regions = split_model(model, runtime.tensor)
    classes = {type(module) for module in model.modules()}
    return regions, nn.Linear in classes, all(before[name] is now for name, now in model.named_parameters())


def test_one_process_splits_nothing(runtime):
    assert _untouched(runtime) == ({}, True, True)
