"""LTE as plainly as it can be said: every head a model of its own with a private base weight, in one process."""

import torch

from relora.convert import low_rank_modules
from relora.initialize import draw_down
from relora.lte import Exchange, SyncReset


class SlowSyncs:
    """Syncs of whole dense products in float64; a head's effective weight is shared + product - merged."""

    def __init__(self, models, optimizers, config, *, steps, weights=None):
        self.models, self.optimizers, self.config, self.steps = models, optimizers, config, steps
        self.weights = weights or [1 / len(models)] * len(models)
        self.layers = [low_rank_modules(model) for model in models]
        self.shared = {name: layer.weight.detach().double() for name, layer in self.layers[0].items()}
        self.merged = [{name: torch.zeros_like(weight) for name, weight in self.shared.items()} for _ in models]
        self.flight, self.syncs, self.momenta = None, 0, {}
        factors = {id(factor) for one in self.layers for layer in one.values() for factor in (layer.down, layer.up)}
        trainable = zip(*(model.parameters() for model in models), strict=True)
        self.full_rank = [ps for ps in trainable if ps[0].requires_grad and id(ps[0]) not in factors]
        self.dense = self.full_rank if config.dense == "averaged" else []
        self.anchors = [parameters[0].detach().double() for parameters in self.dense]

    def advance(self, step):
        config, every = self.config, self.config.sync_every
        ends = [(f + 1) * every // config.fragments % every for f in range(config.fragments)]
        if self.flight is not None and (step == self.steps or step % every == ends[self.flight[0]]):
            self.end(*self.flight)
            self.flight = None
        names = list(self.shared)
        if step == self.steps:
            self.end(None, self.begin(names, step))
            self.average()
        elif (step + config.delay) % every in ends:
            fragment = ends.index((step + config.delay) % every)
            self.flight = fragment, self.begin(names[fragment :: config.fragments], step + config.delay)
            if not config.delay:
                self.end(*self.flight)
                self.flight = None
        if step % every == 0 and step != self.steps:
            self.average()

    @torch.no_grad()
    def begin(self, names, ends):
        resets = (
            self.config.reset == SyncReset.factors and -(-ends // self.config.sync_every) % self.config.reset_every == 0
        )
        self.syncs += 1
        taken = []
        for name in names:
            now = [one[name].scaling * one[name].up.double() @ one[name].down.double() for one in self.layers]
            changes = [product - merged[name] for product, merged in zip(now, self.merged, strict=True)]
            taken.append((name, now, changes, resets))
            if resets:
                for head, layers in enumerate(self.layers):
                    self.merged[head][name] = -changes[head]
                    layers[name].weight.copy_(self.shared[name] - self.merged[head][name])
                    self.redraw(name, layers[name], head)
        return taken

    def redraw(self, name, layer, head):
        state = self.optimizers[head].state
        shared = self.config.exchange == Exchange.shared
        drawn = draw_down(name, layer.down.shape, seed=3, head=0 if shared else head, restart_index=self.syncs)
        layer.down.copy_(drawn)
        layer.up.zero_()
        for parameter in (layer.down, layer.up):
            for key, value in state.get(parameter, {}).items():
                if self.config.adam == "clear":
                    value.zero_()
                elif self.config.adam == "scale" and key != "step":
                    value.mul_(self.config.adam_scale)

    @torch.no_grad()
    def end(self, _, taken):
        for name, now, changes, resets in taken:
            self.shared[name] += self.outer(name, self.mean(changes))
            for head, layers in enumerate(self.layers):
                self.merged[head][name] = torch.zeros_like(now[head]) if resets else now[head]
                layers[name].weight.copy_(self.shared[name] - self.merged[head][name])

    @torch.no_grad()
    def average(self):
        for number, parameters in enumerate(self.dense):
            mean = self.mean([p.detach().double() for p in parameters])
            self.anchors[number] = self.anchors[number] + self.outer(number, mean - self.anchors[number])
            for parameter in parameters:
                parameter.copy_(self.anchors[number])

    def mean(self, values):
        return sum(weight * value for weight, value in zip(self.weights, values, strict=True))

    def outer(self, key, change):
        if self.config.outer == "none":
            return change
        self.momenta[key] = self.config.outer_momentum * self.momenta.get(key, 0.0) + change
        ahead = self.config.outer_momentum * self.momenta[key]
        return self.config.outer_lr * (change + ahead if self.config.outer == "nesterov" else self.momenta[key])
