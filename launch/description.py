"""What stands beside a model's weights in a Hugging Face folder: its configuration and its tokenizer."""

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig

from continual.data import open_data
from continual.tokenizer import BYTES, bpe_vocabulary, byte_tokenizer, encoder_of, load_tokenizer
from launch.config import TrainConfig
from launch.model import model_config, name_special_tokens
from relora.errors import ConfigError


class Description:
    """A run's, from its start/ or final/; where there is neither, made again from its configuration."""

    hf_config: PretrainedConfig

    def __init__(self, run_dir: Path, config: TrainConfig) -> None:
        """Look for it.

        Raises: ConfigError
        """
        folders = [run_dir / "start", run_dir / "final"]
        self._folder = next((folder for folder in folders if (folder / "config.json").is_file()), None)
        if self._folder is None:
            self._tokenizer = _tokenizer(config)
            size = encoder_of(self._tokenizer, config.data.tokenizer).vocab_size
            self.hf_config = model_config(config.model, vocab_size=size, sequence_length=config.data.sequence_length)
            if config.model.name_or_path is None:
                name_special_tokens(self.hf_config, self._tokenizer)
            return
        try:
            self.hf_config = AutoConfig.from_pretrained(self._folder)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self._folder} is damaged: {error}. Restore its config.json, or remove it") from error

    def write(self, folder: Path, skeleton: Any, dtype: torch.dtype) -> None:
        """Write everything but weights.

        Args:
            skeleton: the model, on any device.
        """
        if self._folder is None:
            if skeleton.generation_config is not None:
                skeleton.generation_config.eos_token_id = self._tokenizer.eos_token_id
                skeleton.generation_config.save_pretrained(folder)
            self._tokenizer.save_pretrained(folder)
        else:
            for path in self._folder.iterdir():
                if path.is_file() and not path.name.endswith((".safetensors", ".safetensors.index.json")):
                    shutil.copy(path, folder)
        self.hf_config.architectures = [type(skeleton).__name__]
        self.hf_config.dtype = dtype
        self.hf_config.save_pretrained(folder)


def _tokenizer(config: TrainConfig) -> Any:
    """The run's tokenizer; the text itself is needed only where it was trained on it."""
    name = config.data.tokenizer
    if name == BYTES:
        return byte_tokenizer()
    if bpe_vocabulary(name) is not None:
        return open_data(config.data, seed=config.run.seed).tokenizer
    return load_tokenizer(name)
