"""`evaluate`: the validation loss of a finished run's final/, or of any causal language model, as one JSON object.

With run.dir=RUN the run's own configuration decides about data and precision, and further overrides come on top.
"""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from continual.data import open_data
from launch import exits
from launch.config import TrainConfig, load, load_stored
from launch.models.model import model_class, model_config
from launch.training.course import model_of_course, open_course
from launch.training.objective import ALONE, mean_loss, validation_batches
from launch.training.scores import Measuring, scores_of
from launch.usage import asks_for_help
from relora.errors import ConfigError

_HELP = """\
usage: accrete evaluate run.dir=RUN [section.key=value ...]
   or: accrete evaluate model=pretrained model.name_or_path=FOLDER [data...=...]

Prints the validation loss (nats per token) and perplexity of RUN/final, or of any causal language model, on the
validation sequences of the run's data. evaluation.sequences=null takes all of them."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command `evaluate`; returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if asks_for_help(words) or not words:
        print(_HELP)
        return exits.DONE if words else exits.REFUSED
    return exits.run(lambda: _command(words))


def _command(words: Sequence[str]) -> int:
    run_dir = next((Path(word.partition("=")[2]) for word in words if word.startswith("run.dir=")), None)
    if run_dir is not None:
        config = load_stored(run_dir, words)
        folder = run_dir / "final"
        if not folder.is_dir():
            raise ConfigError(
                f"{folder} does not exist: the run is not done; `accrete export` writes a checkpoint's model"
            )
    else:
        config = load(words)
        if config.model.name_or_path is None:
            raise ConfigError("evaluate needs run.dir=RUN or model=pretrained model.name_or_path=FOLDER")
        folder = Path(config.model.name_or_path)
    print(json.dumps(evaluate_folder(config, str(folder))))
    return exits.DONE


def evaluate_folder(config: TrainConfig, name_or_path: str) -> dict[str, object]:
    """Validation loss of a saved model on a configuration's validation sequences.

    Raises:
        ConfigError: model and data do not fit.
    """
    if config.continual is not None:
        return _evaluate_stream(config, name_or_path)
    data = open_data(config.data, seed=config.run.seed)
    if data.validation is None:
        raise ConfigError("data.validation_fraction=0 without data.validation_path leaves nothing to evaluate on")
    config.model.name_or_path, config.model.config = name_or_path, None
    model_config(config.model, vocab_size=data.vocab_size, sequence_length=config.data.sequence_length)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForCausalLM.from_pretrained(
        name_or_path, dtype=config.torch_dtype, attn_implementation=config.model.attention
    ).to(device)
    sequences = config.evaluation.sequences
    batches = validation_batches(data.validation, sequences=sequences, size=config.validation_batch())
    loss = mean_loss(model, batches, device)
    return {
        "model": name_or_path,
        "val_loss": loss,
        "val_perplexity": math.exp(min(loss, 700.0)),
        "sequences": min(sequences or len(data.validation), len(data.validation)),
    }


def _evaluate_stream(config: TrainConfig, name_or_path: str) -> dict[str, object]:
    """The scores of a saved model on all tasks of a stream."""
    assert config.continual is not None
    course = open_course(config)
    config.model.name_or_path, config.model.config = name_or_path, None
    hf_config = model_of_course(config, course)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model_class(hf_config).from_pretrained(
        name_or_path, dtype=config.torch_dtype, attn_implementation=config.model.attention
    )
    measuring = Measuring(
        axis=ALONE,
        device=device,
        size=config.validation_batch(),
        sequences=config.evaluation.sequences,
        classes=len(course.class_names),
        scenario=config.continual.scenario,
        tokenizer=course.tokenizer,
    )
    return {"model": name_or_path, "scores": scores_of(model.to(device), course.tasks, course.stages[-1], measuring)}


if __name__ == "__main__":
    sys.exit(main())
