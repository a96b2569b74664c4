"""Tiny models and streams of tasks that methods are tested on."""

from dataclasses import dataclass

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, LlamaConfig, ViTConfig

from continual.batches import Batch
from continual.method import Stage, TaskData, TaskKind
from continual.order import sample_at
from relora.convert import LoraConfig, to_low_rank
from tests.plain_trainee import PlainTrainee

CLASSES = 6


@dataclass(frozen=True)
class Fixed:
    """Samples that are given once and for all."""

    whole: Batch
    seed: int = 0

    def __len__(self):
        return len(self.whole)

    def identities(self, position, count):
        return sample_at(np.arange(position, position + count), len(self), seed=self.seed)

    def at(self, identities):
        return self.whole.rows(torch.from_numpy(identities))

    def batch(self, position, count):
        return self.at(self.identities(position, count))


def images(task, count=16):
    draw = torch.Generator().manual_seed(task)
    labels = torch.randint(2 * task, 2 * task + 2, (count,), generator=draw)
    return Batch(inputs={"pixel_values": torch.randn(count, 1, 8, 8, generator=draw)}, labels=labels)


def texts(task, count=16):
    tokens = torch.randint(0, 32, (count, 8), generator=torch.Generator().manual_seed(task))
    labels = tokens.clone()
    labels[:, : 1 + task] = -100
    return Batch(inputs={"input_ids": tokens}, labels=labels)


def stages(make, steps=4, count=3):
    data = [TaskData(train=Fixed(make(task)), held_out={}, fingerprint="") for task in range(count)]
    kind = TaskKind.causal_lm if make is texts else TaskKind.classification
    return [
        Stage(index=i, name=f"t{i}", kind=kind, first=i * steps, steps=steps, data=one) for i, one in enumerate(data)
    ]


def model_of(make, *, rank=2):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    if make is texts:
        model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=32, **sizes))
    else:
        config = ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=CLASSES, **sizes)
        model = AutoModelForImageClassification.from_config(config)
    if rank:
        to_low_rank(model, LoraConfig(rank=rank, alpha=4.0), seed=0)
    return model


def trainee(make, *, rank=2, prepare=lambda model: None, **settings):
    model = model_of(make, rank=rank)
    prepare(model)
    return PlainTrainee(model, stages(make), global_batch=4, **settings)
