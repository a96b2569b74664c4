"""The plain twin of launch/training/trainee.py: one process, torch's AdamW, no engine; methods begin here."""

from contextlib import contextmanager

import torch
from torch.nn import functional as F

from continual.method import Method, Stage
from relora.convert import low_rank_modules
from relora.restart import PlainStore, ReloraConfig, restart
from relora.targets import find_targets


class PlainTrainee:
    """Implements continual.method.Trainee."""

    def __init__(self, model, stages, *, global_batch=8, lr=1e-2, seed=0):
        self.model, self.stages, self.global_batch, self.lr, self.seed = model, stages, global_batch, lr, seed
        self.layers = low_rank_modules(model)
        self.device, self.step, self.restarts = torch.device("cpu"), 0, 0
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
        self.store = PlainStore(self.optimizer)
        self.start = {name: value.clone() for name, value in model.state_dict().items()}

    def targets(self):
        return self.layers or find_targets(self.model, "all-linear")

    def trainable(self):
        return {name: one for name, one in self.model.named_parameters() if one.requires_grad}

    def mine(self, identities):
        return identities

    def turns(self, samples, count):
        for start in range(0, count, self.global_batch):
            yield samples.batch(start, min(self.global_batch, count - start)), True

    def row_losses(self, output, batch):
        logits = output.logits.float()
        if batch.labels.ndim == 1:
            if batch.classes is not None:
                logits = logits.masked_fill(~batch.classes, torch.finfo(logits.dtype).min)
            return F.cross_entropy(logits, batch.labels, reduction="none")
        losses = F.cross_entropy(
            logits[:, :-1].transpose(1, 2), batch.labels[:, 1:], reduction="none", ignore_index=-100
        )
        return losses.sum(1)

    def sum(self, tensor):
        return tensor

    def share_work(self, names, work):
        return {name: work(name) for name in names}

    def whole_inputs(self, layer, inputs):
        return inputs

    def whole(self, parameter):
        return parameter.detach().float()

    def assembled(self, parts):
        return {parameter: part.view(parameter.shape) for parameter, part in parts.items()}

    @contextmanager
    def swapped(self, values):
        own = {parameter: parameter.detach().clone() for parameter in values}
        for parameter, value in values.items():
            parameter.data.copy_(value)
        yield
        for parameter, value in own.items():
            parameter.data.copy_(value)

    def squared_norms(self, parameters, parts=None):
        return torch.stack([one.detach().double().square().sum() for one in (parts or parameters)])

    def step_sizes(self, parameter):
        group, state = self.optimizer.param_groups[0], self.optimizer.state[parameter]
        root = (state["exp_avg_sq"] / (1 - group["betas"][1] ** state["step"])).sqrt()
        return (self.lr / (root + group["eps"])).view(-1)

    def forward(self, batch, **wanted):
        return self.model(**batch.inputs, **wanted)

    def backward(self, terms):
        for term in terms:
            total = self.row_losses(self.forward(term.batch), term.batch).sum() if term.loss is None else None
            total = term.loss(self.forward, term.batch) if total is None else total
            (term.weight * total / term.batch.targets).backward()

    def gradients(self, terms):
        self.optimizer.zero_grad()
        self.backward(terms)
        found = {
            p: torch.zeros_like(p).view(-1) if p.grad is None else p.grad.view(-1).clone()
            for p in self.trainable().values()
        }
        self.optimizer.zero_grad()
        return found

    def add_gradients(self, gradients):
        for parameter, gradient in gradients.items():
            parameter.grad = gradient.clone() if parameter.grad is None else parameter.grad + gradient

    def return_to_start(self):
        self.model.load_state_dict(self.start)

    def train(self, method: Method, stage: Stage, *, steps: int | None = None):
        """Train a stage from its beginning to its end, or for some of its steps."""
        self.optimizer.state.clear()
        method.begin_stage(self, stage)
        for step in range(stage.steps if steps is None else steps):
            self.update(method, stage, step)
        if steps is None:
            method.end_stage(self, stage)
            if method.folds:
                self.fold(method)

    def update(self, method: Method, stage: Stage, step: int):
        """One update on the stage's batch at a step."""
        identities = stage.data.train.identities(step * self.global_batch, self.global_batch)
        self.optimizer.zero_grad()
        self.backward(method.terms(self, stage, stage.data.train.at(self.mine(identities))))
        method.after_backward(self, stage)
        self.optimizer.step()
        self.step += 1
        method.after_step(self, stage)

    def fold(self, method: Method):
        """Put the factors into the base weights and draw new ones."""
        self.restarts += 1
        restart(self.model, ReloraConfig(), self.store, seed=self.seed, restart_index=self.restarts, draw=method.draw)
