"""Whether a model computes the same after its factors have joined the base weights: on one held-out batch."""

import torch
from torch import Tensor

from continual.batches import Batch
from continual.method import Stage
from launch.training.objective import called
from launch.training.run import Run
from parallel.collectives import gather_objects

ALLOWED = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Difference over the largest output: well above the rounding errors of a deep model in each precision."""


class FoldCheck:
    """The outputs before a fold, to be compared with those after it; all processes see the same samples."""

    def __init__(self, run: Run, stage: Stage) -> None:
        held_out = stage.own_held_out
        self._batch = held_out.batch(0, min(run.microbatch, len(held_out)))
        self._before = _outputs(run, self._batch)

    def difference(self, run: Run) -> float:
        """The largest change of an output, over the largest output; one that rounding cannot explain is told of."""
        change = _outputs(run, self._batch) - self._before
        own = torch.stack([change.abs().max(), self._before.abs().max()]).tolist()
        largest = torch.tensor(gather_objects(run.runtime, own)).amax(0)  # each process may have a part of the outputs
        found, allowed = float(largest[0] / largest[1].clamp_min(1e-30)), ALLOWED[run.config.torch_dtype]
        if not found <= allowed:
            run.watch.event("fold_alarm", run.state.step, difference=found, allowed=allowed)
            run.watch.say(
                f"warning: folding changed the model's outputs by {found:.2g} of the largest one, where rounding "
                f"explains {allowed:g}: go back with continual.restart_from, and do not trust this task's model"
            )
        return found


@torch.no_grad()
def _outputs(run: Run, batch: Batch) -> Tensor:
    was_training = run.model.training
    run.model.eval()
    outputs: Tensor = called(run.model, batch.to(run.runtime.device)).logits.float()
    run.model.train(was_training)
    return outputs
