"""Join together with what else training does: recomputation, gradients of gradients, epochs cut short, observers, compilers.

Rank 0 has no batch in an epoch that counts, so that it has to be told every call; another runs out, and knows them."""

import contextlib
import functools
import io

import pytest
import torch
import torch.nn.functional as F
import worlds
from tolerance import FAR, assert_same_state
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint
from uneven import share, whole

import syncbn

WORLD = 3
UNEVEN = [[], [3, 2, 2, 4], [4, 1]]  # samples of each batch, by rank
EQUAL = [[2, 3], [3, 2], [1, 4]]
LATER = [[2], [3, 2, 2, 4], [4, 1]]  # torch's wrapper takes no empty rank after a first step without its backward


@functools.cache
def results():
    """What each rank returns for every case."""
    return worlds.run_fresh(WORLD, _all_cases, timeout=120.0)


def _all_cases(world):
    return {case.__name__: case(world) for case in CASES} | {use: _trained(world, use) for use in USES}


def block(channels):
    return [nn.Conv2d(2, channels, 3), nn.BatchNorm2d(channels), nn.Softplus(), nn.Conv2d(channels, 2, 1), nn.BatchNorm2d(2)]


class Net(nn.Module):
    """Its middle by a checkpoint, in one of torch's ways or in ours."""

    def __init__(self, use=None):
        super().__init__()
        torch.manual_seed(0)
        self.use = use
        self.first, self.middle = nn.Sequential(*block(4)), nn.Sequential(*block(5))
        self.last = nn.Sequential(nn.Flatten(), nn.Linear(50, 3), nn.BatchNorm1d(3))
        self.double()

    def forward(self, x):
        x = self.first(x)
        if self.use == "reentrant":
            x = checkpoint(self.middle, x, use_reentrant=True)
        elif self.use == "not reentrant":
            x = checkpoint(self.middle, x, use_reentrant=False)
        elif self.use == "with our context":
            x = checkpoint(self.middle, x, use_reentrant=False, context_fn=syncbn.checkpoint_context)
        else:
            x = self.middle(x)
        return self.last(x)


USES = ["reentrant", "not reentrant", "with our context", "gradient penalty"]


def loss_of(model, x, target, penalty):
    """The sum over the samples; the penalty is the gradient of all outputs, those of other ranks too."""
    if not penalty:
        return F.cross_entropy(model(x), target, reduction="sum")
    x.requires_grad_()
    y = model(x)
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    return F.cross_entropy(y, target, reduction="sum") + gradient.square().sum()


def samples(loaders, step):
    return sum(sizes[step] for sizes in loaders if step < len(sizes))


def wrapped(model, broadcast=True):
    ddp = DistributedDataParallel(syncbn.convert(model))
    ddp.broadcast_buffers = broadcast
    return ddp, syncbn.SyncBatchNormJoin(ddp), torch.optim.SGD(ddp.parameters(), lr=0.001)


def epoch(world, ddp, optimizer, loaders, penalty=False):
    """The steps of a rank, inside of a Join."""
    for step, size in enumerate(loaders[world.rank]):
        x, target = share(world.rank, step, size)
        optimizer.zero_grad()
        (loss_of(ddp, x, target, penalty) * world.size / samples(loaders, step)).backward()
        optimizer.step()


def one_process(model, optimizer, loaders, penalty=False):
    for step in range(max(map(len, loaders))):
        x, target = whole(loaders, step)
        optimizer.zero_grad()
        (loss_of(model, x, target, penalty) / len(x)).backward()
        optimizer.step()


def check(case, model):
    for rank, result in enumerate(results()):
        assert_same_state(result[case], model.state_dict(), FAR, f"of rank {rank}")


def _trained(world, use):
    ddp, joined, optimizer = wrapped(Net(use), broadcast=False)
    with Join([joined, ddp]):
        epoch(world, ddp, optimizer, UNEVEN, use == "gradient penalty")
    return ddp.module.state_dict()


@pytest.mark.parametrize("use", USES)
def test_calls_made_in_a_backward_are_followed(use):
    model = Net()
    one_process(model, torch.optim.SGD(model.parameters(), lr=0.001), UNEVEN, use == "gradient penalty")
    check(use, model)


class StopError(Exception):
    """What a training loop catches."""


CUTS = [(0, False), (0, True), (1, False), (1, True)]  # the step, and whether by an exception


def _cut_short(world):
    """Epochs whose first or second step ends before its backward, by break or exception, and whole ones between them."""
    ddp, joined, optimizer = wrapped(Net())
    for cut, stop in CUTS:
        try:
            with Join([joined, ddp]):
                for step, sizes in enumerate(zip(*EQUAL, strict=True)):
                    x, target = share(world.rank, step, sizes[world.rank])
                    optimizer.zero_grad()
                    loss = loss_of(ddp, x, target, False) * world.size / samples(EQUAL, step)
                    if step == cut:
                        break
                    loss.backward()
                    optimizer.step()
                if stop:
                    raise StopError
        except StopError:
            ddp.eval()
            ddp(x)
            ddp.train()
            loss_of(ddp, x, target, False).backward()  # of no Join
        with Join([joined, ddp]):
            epoch(world, ddp, optimizer, LATER)
    return ddp.module.state_dict()


def test_contexts_after_a_step_cut_short():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
    for cut, stop in CUTS:
        one_process(model, optimizer, [sizes[:cut] for sizes in EQUAL])
        for _ in range(1 + stop):
            model(whole(EQUAL, cut)[0])
        one_process(model, optimizer, LATER)
    check("_cut_short", model)


def _other_layers_in_each_context(world):
    """Fine-tuning: the first layers are frozen after an epoch, the last thaw after another."""
    ddp, joined, optimizer = wrapped(Net())
    for frozen in [["first"], ["first", "middle", "last"], ["last"]]:
        for name in ["first", "middle", "last"]:
            getattr(ddp.module, name).train(name not in frozen)
        with Join([joined, ddp]):
            epoch(world, ddp, optimizer, UNEVEN)
    return ddp.module.state_dict()


def test_each_context_has_a_schedule_of_its_own():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
    for frozen in [["first"], ["first", "middle", "last"], ["last"]]:
        for name in ["first", "middle", "last"]:
            getattr(model, name).train(name not in frozen)
        one_process(model, optimizer, UNEVEN)
    check("_other_layers_in_each_context", model)


def _switched_off(world):
    ddp, joined, optimizer = wrapped(Net())
    with Join([joined, ddp], enable=False):  # as accelerate has it with even_batches
        epoch(world, ddp, optimizer, EQUAL)
    return ddp.module.state_dict()


def test_a_join_that_is_switched_off_does_nothing():
    model = Net()
    one_process(model, torch.optim.SGD(model.parameters(), lr=0.001), EQUAL)
    check("_switched_off", model)


def _copied(world):
    """An average of weights beside the wrapper, as torch makes it: by copies, which run no schedule of their own."""
    ddp, joined, optimizer = wrapped(Net())
    average = AveragedModel(ddp)
    with pytest.raises(TypeError, match=r"given a layer with process_group=.* cannot be pickled; expected no group"):
        torch.save(ddp, io.BytesIO())
    with Join([joined, ddp]):
        epoch(world, ddp, optimizer, UNEVEN)
    average.update_parameters(ddp)
    assert all(torch.equal(a, b) for a, b in zip(average.module.parameters(), ddp.parameters(), strict=True))
    assert average(torch.ones(4, 2, 9, 9, dtype=torch.float64)).isfinite().all()
    return ddp.module.state_dict()


def test_a_wrapper_can_be_copied():
    model = Net()
    one_process(model, torch.optim.SGD(model.parameters(), lr=0.001), UNEVEN)
    check("_copied", model)


def message_of(kind, function):
    try:
        function()
    except kind as error:
        return str(error)
    return None


def _compiled(world):
    """Before the wrapper, as a part, after the constructor of ours, and a training step as a whole."""
    part = Net()
    part.middle.compile(backend="aot_eager")
    later = wrapped(Net())[:2]
    later[0].compile(backend="aot_eager")
    ddp, joined, _ = wrapped(Net())
    train = torch.compile(lambda x: ddp(x).square().sum().backward(), backend="aot_eager")
    refused = [
        lambda: wrapped(torch.compile(Net(), backend="aot_eager")),
        lambda: wrapped(part),
        lambda: Join(later[::-1]),
        lambda: steps(world, [joined, ddp], train),
    ]
    return [message_of(ValueError, function) for function in refused]


class Hidden(nn.Module):
    """Its layer runs in a function that is compiled, which no module tells."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(2)
        self.run = torch.compile(lambda x: self.norm(x), backend="aot_eager")

    def forward(self, x):
        return self.run(x)


def _compiled_in_secret(world):
    ddp, joined, _ = wrapped(Hidden())

    def step():
        with Join([joined, ddp]):
            ddp(share(world.rank, 0, 2)[0].float())

    return message_of(ValueError, step)


def test_a_step_without_calls_is_refused():
    for rank, result in enumerate(results()):
        assert result["_compiled_in_secret"] is not None
        assert "in which no layer in training mode was seen" in result["_compiled_in_secret"]
        assert f"(rank {rank} of 3)" in result["_compiled_in_secret"]


def steps(world, joinables, train):
    """As many as the rank's number."""
    with Join(joinables):
        for step in range(world.rank):
            train(share(world.rank, step, 2)[0])


def test_a_compiled_model_is_refused_on_every_rank():
    for result in results():
        assert len(result["_compiled"]) == 4
        for message in result["_compiled"]:
            assert message is not None
            assert "given a compiled model or training step" in message


class First(nn.Sequential):
    """Statistics that are those of the input."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(162, 3))
        self.double()


def _accumulated(world, broadcast):
    """Steps of two micro-batches."""
    ddp, joined, _ = wrapped(First(), broadcast)
    with Join([joined, ddp]):
        for step in range(0, 2 * world.rank, 2):
            with syncbn.accumulate_statistics(ddp):
                with ddp.no_sync():
                    ddp(share(world.rank, step, 2)[0]).sum().backward()
                ddp(share(world.rank, step + 1, 3)[0]).sum().backward()
    return ddp.module.state_dict()


def _accumulated_with_broadcast(world):
    return _accumulated(world, True)


def _accumulated_without_broadcast(world):
    return message_of(ValueError, lambda: _accumulated(world, False))


def test_accumulated_statistics_with_broadcast_of_buffers():
    model = First()
    for step in (0, 2):
        model(torch.cat([share(rank, step + part, 2 + part)[0] for rank in (1, 2) if step < 2 * rank for part in (0, 1)]))
    check("_accumulated_with_broadcast", model)


def test_accumulated_statistics_without_broadcast_are_refused_on_every_rank():
    for result in results():
        message = result["_accumulated_without_broadcast"]
        assert message is not None
        assert "given accumulate_statistics or update_bn_stats in SyncBatchNormJoin, and no broadcast" in message
        assert message.endswith(("(rank 1 of 3)", "(rank 2 of 3)"))  # that of a rank with data


def _under_other_names(world):
    """Monitors of parts of the model name its layers by other paths, and others in the next step by the same ones."""
    ddp, joined, optimizer = wrapped(Net(), broadcast=False)
    parts = [ddp.module.middle, ddp.module.first, None, ddp.module.middle]
    with Join([joined, ddp]):
        for step, size in enumerate(UNEVEN[world.rank]):
            x, target = share(world.rank, step, size)
            with syncbn.monitor(parts[step]) if parts[step] else contextlib.nullcontext():
                optimizer.zero_grad()
                (loss_of(ddp, x, target, False) * world.size / samples(UNEVEN, step)).backward()
            optimizer.step()
    return ddp.module.state_dict()


def test_layers_are_known_by_themselves():
    model = Net()
    one_process(model, torch.optim.SGD(model.parameters(), lr=0.001), UNEVEN)
    check("_under_other_names", model)


CASES = [
    _compiled,
    _compiled_in_secret,
    _accumulated_with_broadcast,
    _accumulated_without_broadcast,
    _cut_short,
    _under_other_names,
    _switched_off,
    _copied,
    _other_layers_in_each_context,
]
