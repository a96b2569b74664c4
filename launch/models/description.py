"""What stands beside a model's weights in a Hugging Face folder: configurations, tokenizer, how images are prepared."""

import copy
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig, GenerationConfig, PretrainedConfig

from continual.data import open_data
from continual.images import ImageForm
from continual.tokenizer import BYTES, bpe_vocabulary, byte_tokenizer, encoder_of, load_tokenizer
from launch.config import TrainConfig
from launch.models.model import ModelConfig, model_config, name_special_tokens
from launch.training.course import model_of_course, open_course
from relora.errors import ConfigError


@dataclass(kw_only=True, slots=True, frozen=True)
class Description:
    """A model's, either as it is in memory or as it is in a folder."""

    hf_config: PretrainedConfig
    tokenizer: Any = None
    """The tokenizer, unless there is a folder, or the model reads images."""
    generation: GenerationConfig | None = None
    """How a pre-trained model generates; None: as its family does."""
    form: ImageForm | None = None
    """How images become tensors; None: not known, or the model reads none."""
    folder: Path | None = None
    """A Hugging Face folder whose files are copied."""

    def write(self, folder: Path, skeleton: Any, dtype: torch.dtype) -> None:
        """Write everything but weights.

        Args:
            skeleton: the model, on any device.
        """
        if self.folder is None:
            if self.tokenizer is not None and getattr(skeleton, "generation_config", None) is not None:
                generation = self.generation or GenerationConfig.from_model_config(self.hf_config)
                generation.eos_token_id = self.tokenizer.eos_token_id
                generation.save_pretrained(folder)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(folder)
            if self.form is not None:
                values = json.dumps(image_processor(self.form), indent=2)
                (folder / "preprocessor_config.json").write_text(values + "\n", encoding="utf-8")
        else:
            for path in self.folder.iterdir():
                if path.is_file() and not path.name.endswith((".safetensors", ".safetensors.index.json")):
                    shutil.copy(path, folder)
        hf_config = copy.deepcopy(self.hf_config)
        hf_config.architectures = [type(skeleton).__name__]
        hf_config.dtype = dtype
        hf_config.save_pretrained(folder)


def image_processor(form: ImageForm) -> dict[str, Any]:
    """What AutoImageProcessor reads to prepare images as training did.

    CLIP's is the one whose steps are general. It resizes before it cuts, so images that are not square come out a
    little different.
    """
    assert form.size is not None, "the model has a size"
    assert form.channels is not None, "and channels"
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": form.channels == 3,
        "do_resize": True,
        "size": {"shortest_edge": form.size},
        "resample": int(Image.Resampling.BILINEAR),
        "do_center_crop": True,
        "crop_size": {"height": form.size, "width": form.size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [form.mean] * form.channels,
        "image_std": [form.std] * form.channels,
    }


def describe(
    config: ModelConfig, hf_config: PretrainedConfig, tokenizer: Any, form: ImageForm | None = None
) -> Description:
    """The description of a model in memory."""
    hf_config = copy.deepcopy(hf_config)
    if hasattr(hf_config, "use_cache"):
        hf_config.use_cache = True  # training goes without, generation does not
    generation = None
    if config.name_or_path is not None:
        try:
            generation = GenerationConfig.from_pretrained(config.name_or_path)
        except OSError:  # it has none of its own
            generation = None
    return Description(hf_config=hf_config, tokenizer=tokenizer, generation=generation, form=form)


def description_of(run_dir: Path, config: TrainConfig) -> Description:
    """That of a run, from its start/ or final/; where there is neither, made again from its configuration.

    Raises: ConfigError
    """
    folders = [run_dir / "start", run_dir / "final"]
    folder = next((folder for folder in folders if (folder / "config.json").is_file()), None)
    if folder is not None:
        try:
            return Description(hf_config=AutoConfig.from_pretrained(folder), folder=folder)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{folder} is damaged: {error}. Restore its config.json, or remove it") from error
    if config.continual is not None:
        course = open_course(config)
        return describe(config.model, model_of_course(config, course), course.tokenizer, course.form)
    tokenizer = _tokenizer(config)
    size = encoder_of(tokenizer, config.data.tokenizer).vocab_size
    hf_config = model_config(config.model, vocab_size=size, sequence_length=config.data.sequence_length)
    if config.model.name_or_path is None:
        name_special_tokens(hf_config, tokenizer)
    return describe(config.model, hf_config, tokenizer)


def _tokenizer(config: TrainConfig) -> Any:
    """The run's tokenizer; the text itself is needed only where it was trained on it."""
    name = config.data.tokenizer
    if name == BYTES:
        return byte_tokenizer()
    if bpe_vocabulary(name) is not None:
        return open_data(config.data, seed=config.run.seed).tokenizer
    return load_tokenizer(name)
