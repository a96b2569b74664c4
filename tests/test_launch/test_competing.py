"""Which classes compete for a sample in training: the stage's own, its seen ones, or all seen so far."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from continual.batches import Batch
from continual.config import Competing
from continual.method import Stage, TaskData, TaskKind, Term
from continual.methods.replay import Replay, ReplayConfig
from launch.training.run import Run
from tests.continual_streams import images, trainee

BATCH = Batch(inputs={}, labels=torch.tensor([0, 3]))


def stage(index, own, seen):
    data = TaskData(train=None, held_out={}, fingerprint="", classes=own)
    return Stage(index=index, name="", kind=TaskKind.classification, first=0, steps=1, data=data, seen=seen)


FIRST, SECOND = stage(0, (0, 1), (0, 1)), stage(1, (2, 3), (0, 1, 2, 3))


@pytest.mark.parametrize(
    ("logits", "more", "classes"),
    [
        (Competing.task, {}, [2, 3]),
        (Competing.task, {"all_seen": True}, [0, 1, 2, 3]),
        (Competing.task, {"stage": FIRST}, [0, 1]),
        (Competing.seen, {}, [0, 1, 2, 3]),
        (Competing.seen, {"stage": FIRST}, [0, 1]),
    ],
)
def test_a_terms_samples_compete_among(logits, more, classes):
    config = SimpleNamespace(continual=SimpleNamespace(logits=logits))
    run = SimpleNamespace(course=SimpleNamespace(class_names=list("abcdef")), config=config, stage=SECOND)
    batch = Run.among(run, Term(name="", batch=BATCH, **more)).batch
    assert batch.classes.shape == (2, 6)
    assert [column for column in range(6) if batch.classes[:, column].all()] == classes
    assert int(batch.classes.sum()) == 2 * len(classes)
    given = replace(BATCH, classes=torch.ones(2, 6, dtype=torch.bool))
    assert Run.among(run, Term(name="", batch=given, **more)).batch is given


def test_replayed_samples_compete_among_all_seen_classes_and_new_ones_as_the_setting_says():
    on, method = trainee(images), Replay(ReplayConfig())
    on.train(method, on.stages[0])
    new, old = method.terms(on, on.stages[1], on.stages[1].data.train.batch(0, 4))
    assert (new.all_seen, old.all_seen) == (False, True)
