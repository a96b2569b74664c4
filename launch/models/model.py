"""From `model.*` to a transformers model, and from a trained model to a Hugging Face folder."""

import difflib
import inspect
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from parallel.files import share
from relora.convert import merged_state_dict
from relora.errors import ConfigError
from relora.initialize import keyed_generator
from relora.targets import output_layer

transformers_logging.disable_progress_bar()

CLASSIFIER = "single_label_classification"
"""What a classifier's configuration says of itself, in transformers' words."""

# Accepted by transformers' configuration classes and turned into `rope_parameters`, but not listed by them.
_ALSO_ACCEPTED = {"model_type", "rope_theta", "rope_scaling", "attn_implementation"}


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """Which model is trained: exactly one of a pre-trained one or a configuration with random weights."""

    name_or_path: str | None = None
    """A local folder or hub name with weights: continued pre-training."""
    config: Any = None
    """A transformers configuration (mapping with model_type, or a config.json): random initial weights."""
    attention: str = "sdpa"
    """transformers' attention implementation: sdpa, eager, flash_attention_2, ..."""

    def __post_init__(self) -> None:
        if (self.name_or_path is None) == (self.config is None):
            given = "neither" if self.config is None else "both"
            raise ConfigError(
                f"model needs exactly one of model.name_or_path and model.config, got {given}: choose an option "
                "such as model=llama_tiny, or model=pretrained model.name_or_path=PATH"
            )
        if self.config is not None and not isinstance(self.config, (str, dict)):
            raise ConfigError(f"model.config must be a mapping or a path to a config.json, got {self.config!r}")


def model_config(config: ModelConfig, *, vocab_size: int, sequence_length: int) -> PretrainedConfig:
    """The transformers configuration of a run's model, checked against its data.

    Raises:
        ConfigError: unknown family or key, unreadable folder, a tokenizer larger than the vocabulary, sequences
            longer than the model's positions.
    """
    if config.name_or_path is not None:
        hf_config = _pretrained_config(config.name_or_path)
    else:
        values = _values(config.config)
        if values.get("vocab_size") is None:
            values["vocab_size"] = vocab_size
        hf_config = _from_values(values)
    if hf_config.vocab_size < vocab_size:
        raise ConfigError(
            f"the tokenizer has {vocab_size} tokens, but the model's vocabulary only {hf_config.vocab_size}: set "
            "model.config.vocab_size to null (as large as the tokenizer) or choose another data.tokenizer"
        )
    positions = getattr(hf_config, "max_position_embeddings", None)
    if positions is not None and sequence_length > positions:
        raise ConfigError(
            f"data.sequence_length must be at most the model's max_position_embeddings={positions}, got "
            f"{sequence_length}: shorten it, or raise model.config.max_position_embeddings"
        )
    return hf_config


def classifier_config(
    config: ModelConfig,
    class_names: Sequence[str],
    *,
    image: tuple[int, int] | None,
    vocab_size: int | None = None,
    pad_token_id: int | None = None,
) -> PretrainedConfig:
    """The transformers configuration of a classifier with an output for each class.

    Args:
        image: size and channels of its images; None: it reads text.
        pad_token_id: of the tokenizer of a text classifier.

    Raises:
        ConfigError: unknown family or key, unreadable folder, a family without classifiers, images of another size.
    """
    named = dict(enumerate(class_names))
    if config.name_or_path is not None:
        hf_config = _pretrained_config(config.name_or_path)
    else:
        values = _values(config.config)
        sizes = [("vocab_size", vocab_size)] if image is None else list(_image_sizes(image).items())
        values |= {key: value for key, value in sizes if values.get(key) is None}
        hf_config = _from_values(values)
        hf_config.pad_token_id = pad_token_id
    hf_config.id2label, hf_config.label2id = named, {name: number for number, name in named.items()}
    hf_config.problem_type = CLASSIFIER
    if model_class(hf_config) is not AutoModelForImageClassification and image is not None:
        raise ConfigError(
            f"model.config.model_type={hf_config.model_type} reads no images: choose another model, such as "
            "model=vit_digits"
        )
    for key, value in ({} if image is None else _image_sizes(image)).items():
        wanted = getattr(hf_config, key, value)
        if wanted != value:
            raise ConfigError(
                f"model.config.{key}={wanted}, but the images have {value}: set image_size and channels of the "
                f"tasks' data, or model.config.{key} to null (as the data)"
            )
    return hf_config


def _image_sizes(image: tuple[int, int]) -> dict[str, int]:
    return {"image_size": image[0], "num_channels": image[1]}


def model_class(hf_config: PretrainedConfig) -> Any:
    """The class of transformers that builds and loads the model of a configuration: a causal one, or a classifier.

    Raises:
        ConfigError: the family has no classifier.
    """
    if getattr(hf_config, "problem_type", None) != CLASSIFIER:
        return AutoModelForCausalLM
    kinds = (AutoModelForImageClassification, AutoModelForSequenceClassification)
    for kind in kinds:
        if type(hf_config) in kind._model_mapping:
            return kind
    raise ConfigError(
        f"model.config.model_type={hf_config.model_type} has no classifier in transformers: choose another family, "
        "such as vit"
    )


def name_special_tokens(hf_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a configuration without weights its tokenizer's special tokens, in place of its family's."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(hf_config, name, getattr(tokenizer, name))


def build_model(config: ModelConfig, hf_config: PretrainedConfig, *, seed: int, weights: bool = True) -> nn.Module:
    """The model in fp32 on the CPU.

    Args:
        seed: of random weights.
        weights: load the pre-trained ones, if the model has any; False when a checkpoint brings its own.

    Raises:
        ConfigError: transformers refuses: no such attention for this family, missing weights, an impossible shape.
    """
    options = {"dtype": torch.float32, "attn_implementation": config.attention}
    kind = model_class(hf_config)
    try:
        if config.name_or_path is not None and weights:
            if kind is not AutoModelForCausalLM:  # its outputs may be for other classes
                options |= {"config": hf_config, "ignore_mismatched_sizes": True}
            model = kind.from_pretrained(config.name_or_path, **options)
        else:
            torch.manual_seed(seed)
            model = kind.from_config(hf_config, **options)
    except (ImportError, OSError, ValueError) as error:
        raise ConfigError(
            f"transformers cannot build this model with model.attention={config.attention}: {error} Correct the model, "
            "or choose another implementation, such as model.attention=eager"
        ) from error
    assert isinstance(model, nn.Module)
    if kind is AutoModelForCausalLM:
        model.config.use_cache = False  # type: ignore[union-attr]
    elif config.name_or_path is None or not weights or not _has_outputs(config.name_or_path, hf_config):
        _draw_outputs(model, hf_config, seed)
    return model


def _has_outputs(name_or_path: str, hf_config: PretrainedConfig) -> bool:
    """Whether a pre-trained model is a classifier with these very classes."""
    theirs = _pretrained_config(name_or_path)
    return dict(theirs.id2label) == dict(hf_config.id2label)


@torch.no_grad()
def _draw_outputs(model: nn.Module, hf_config: PretrainedConfig, seed: int) -> None:
    """Draw a classifier's outputs class by class, so that classes that come later change nothing of the others."""
    output = output_layer(model)
    assert isinstance(output, nn.Linear)
    for number, name in hf_config.id2label.items():
        generator = keyed_generator(seed, "class", name)
        output.weight[number] = torch.randn(output.in_features, generator=generator) * hf_config.initializer_range
    if output.bias is not None:
        output.bias.zero_()


def drawn_outputs(model: nn.Module) -> dict[str, Tensor]:
    """Copies of a classifier's output parameters, by name; none for a language model."""
    output = output_layer(model) if getattr(model.config, "problem_type", None) == CLASSIFIER else None
    if output is None:
        return {}
    own = set(output.parameters())
    return {name: one.detach().clone() for name, one in model.named_parameters() if one in own}


@contextmanager
def in_place_of(folder: Path) -> Iterator[Path]:
    """A new folder to write to, which takes the place of another one when it is complete.

    Raises:
        OSError: it cannot be written; what was there before is untouched.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)
    try:
        partial.mkdir(parents=True)
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    share(partial)
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)


def save_model(model: Any, folder: Path, tokenizer: PreTrainedTokenizerBase | None, *, dtype: torch.dtype) -> None:
    """Write the dense model that a whole `model` computes now: factors folded in, Hugging Face names, tokenizer beside.

    Raises:
        OSError: the folder cannot be written; what was there before is untouched.
    """
    use_cache = getattr(model.config, "use_cache", None)
    if use_cache is not None:
        model.config.use_cache = True
    if tokenizer is not None and getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id = tokenizer.eos_token_id
    try:
        with in_place_of(folder) as partial:
            weights = merged_state_dict(model, dtype=dtype)
            # Under the model's own names, as in final/; transformers would write those of its former versions.
            model.save_pretrained(partial, state_dict=weights, save_original_format=False)
            model.config.dtype = dtype  # the model's own was written, and loading would cast to it
            model.config.save_pretrained(partial)
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
    finally:
        if use_cache is not None:
            model.config.use_cache = use_cache


def _pretrained_config(name_or_path: str) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.name_or_path {name_or_path!r} cannot be loaded: {error}. Give a folder with a "
            "config.json and weights, or a name that this machine can download"
        ) from error


def _values(config: Any) -> dict[str, Any]:
    if isinstance(config, dict):
        return dict(config)
    try:
        values = json.loads(Path(config).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.config {config!r} cannot be read as a transformers config.json: {error}") from error
    return {key: value for key, value in values.items() if key not in ("architectures", "transformers_version")}


def _from_values(values: dict[str, Any]) -> PretrainedConfig:
    family = values.pop("model_type", None)
    if family is None:
        raise ConfigError("model.config needs model_type, the transformers family: llama, gpt_neox, qwen2, ...")
    try:
        default = AutoConfig.for_model(family)
    except ValueError as error:
        raise ConfigError(f"model.config.model_type {family!r} is not a family that transformers knows") from error
    known = set(default.to_dict()) | set(default.attribute_map) | _ALSO_ACCEPTED
    known |= set(inspect.signature(type(default).__init__).parameters) - {"self", "kwargs"}
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"{family} has {', '.join(sorted(known))}"
            raise ConfigError(f"model.config.{key} is not a setting of {family}: {hint}")
    try:
        return AutoConfig.for_model(family, **values)
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise ConfigError(f"model.config is refused by transformers: {error}") from error
