"""A network with every kind of batch norm layer, loaders of ranks, and the statistics of a population by their definition."""

import torch
from oracle import flat
from torch import nn

# Samples of each of up to four ranks at each step; None: that rank has run out.
STEPS = {
    "equal": [(2, 2, 2, 2)] * 3,
    "unequal": [(2, 4, 1, 3), (3, 2, 5, 0), (2, 1, 2, 1)],
    "empty shares": [(3, 0, 2, 0), (0, 4, 0, 1), (2, 2, 0, 0)],
    "ranks run out": [(2, 3, 1, 2), (3, 1, None, 3), (4, None, None, 2), (2, None, None, None)],
    "the first runs out": [(2, 1, 1, 2), (None, 3, 2, 1), (None, 2, None, 1)],
}


class Network(nn.Module):
    """Nested, with a layer called twice in a forward, and a frozen part."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.BatchNorm2d(4, momentum=None), nn.ReLU()))
        self.twice = nn.BatchNorm2d(4, affine=False)
        self.untracked = nn.BatchNorm2d(4, track_running_stats=False)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.head = nn.Sequential(nn.Flatten(1), nn.Linear(16, 5), nn.BatchNorm1d(5, momentum=0.3), nn.Linear(5, 2))

    def forward(self, x):
        x = self.stem(self.frozen(x))
        x = self.twice(x * 2 + 1)
        return self.head(self.pool(self.untracked(torch.relu(self.twice(x.tanh() - 2)))))


def network(dtype=torch.float64, frozen=True):
    torch.manual_seed(0)
    model = Network()
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            buffer.copy_(torch.rand(buffer.shape) + 0.5)
        elif "frozen" in name:
            buffer.fill_(3)
    model.train()
    if frozen:
        model.frozen.eval()
    return model.to(dtype)


def batch(step, size, dtype=torch.float64):
    generator = torch.Generator().manual_seed(step)
    return (torch.randn(size, 2, 5, 5, generator=generator, dtype=torch.float64) * (1 + step) + 2 * step).to(dtype)


def whole_batches(steps, world, dtype=torch.float64):
    """The batches of one process, and of each rank, by step."""
    sizes = [[size or 0 for size in step[:world]] for step in steps]
    return [batch(number, sum(shares), dtype) for number, shares in enumerate(sizes)], sizes


def loader(steps, rank, world, dtype):
    """The batches of one rank."""
    wholes, sizes = whole_batches(steps, world, dtype)
    pairs = zip(wholes, sizes, steps, strict=True)
    return [whole.split(shares)[rank] for whole, shares, step in pairs if step[rank] is not None]


def inputs_of(model, batches):
    """What each batch norm layer of a model of torch's layers is called with: by name, (m, C) float64 for each call."""
    seen = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.training and layer.running_mean is not None:
            seen[name] = []
            layer.register_forward_hook(lambda layer, args, y, name=name: seen[name].append(flat(args[0].detach().double())))
    for x in batches:
        model(x)
    return seen


def population(calls, pooled):
    """Mean and variance from the definition, and the number of mini-batches."""
    calls = [values for values in calls if len(values)]
    every = torch.cat(calls)
    if pooled:
        return every.mean(0), every.var(0), len(calls)
    several = [values for values in calls if len(values) > 1]
    mean = sum(values.mean(0) * len(values) for values in calls) / len(every)
    return mean, sum(values.var(0) * len(values) for values in several) / sum(map(len, several)), len(calls)


def check(state, before, calls, pooled, tolerance):
    """The state of each layer that was called is that of its population, and all else is as it was."""
    expected = dict(before)
    for name, values in calls.items():
        mean, var, count = population(values, pooled)
        expected |= {f"{name}.running_mean": mean, f"{name}.running_var": var}
        expected[f"{name}.num_batches_tracked"] = torch.tensor(count)
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        if name.rpartition(".")[0] not in calls or "running" not in name:
            assert torch.equal(state[name].double(), value.double()), name
        else:
            off = ((state[name].double() - value).abs().max() / value.abs().max()).item()
            assert off <= tolerance, f"{name} off by {off:.2g}"
