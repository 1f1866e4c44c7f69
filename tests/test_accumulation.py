"""Accumulated statistics: one move for all micro-batches of a step, by the values of all of them."""

import contextlib
import copy
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
import worlds
from collectives_seen import CollectivesSeen
from oracle import flat
from tolerance import FAR, assert_same_state
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import syncbn
from syncbn.accumulation import accumulate_statistics, eagerly
from syncbn.population import update_bn_stats

STEPS = 3
# Samples of each of up to four ranks in each micro-batch of a step.
MICRO = {
    "equal": [(2, 2, 2, 2)] * 3,
    "unequal": [(1, 4, 2, 3), (5, 2, 1, 1), (1, 1, 3, 1)],
    "empty": [(3, 0, 1, 2), (0, 4, 0, 1), (2, 0, 0, 0)],
    "one": [(2, 3, 1, 4)],
}


def network():
    """A layer in the cumulative average, one called twice in a forward, which counts no batches, one frozen, one untracked."""
    torch.manual_seed(0)
    model = Network()
    model.frozen.eval()
    return model.double()


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, momentum=None), nn.ReLU())
        self.frozen = nn.BatchNorm2d(4)
        self.twice = nn.BatchNorm2d(4, momentum=0.3)
        self.twice.num_batches_tracked = None
        self.untracked = nn.BatchNorm2d(4, track_running_stats=False)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))

    def forward(self, x):
        x = self.frozen(self.first(x))
        return self.head(self.untracked(self.twice(self.twice(x).tanh() + 1)))


def data(step, part, sizes):
    generator = torch.Generator().manual_seed(10 * step + part)
    x = torch.randn(sum(sizes), 2, 6, 6, generator=generator).double() * (part + 1) + part
    return x, torch.randint(3, (sum(sizes),), generator=generator)


def train(model, micro, context, rank=None, world=1, between=lambda model, step: None):
    """The loss of a step is the sum over the samples of all micro-batches × W / N."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    samples = sum(map(sum, micro))
    for step in range(STEPS):
        optimizer.zero_grad()
        with context(model):
            for part, sizes in enumerate(micro):
                x, target = data(step, part, sizes)
                if rank is not None:
                    x, target = x.split(sizes)[rank], target.split(sizes)[rank]
                last = part == len(micro) - 1
                with model.no_sync() if hasattr(model, "no_sync") and not last else contextlib.nullcontext():
                    (F.cross_entropy(model(x), target, reduction="sum") * world / samples).backward()
        between(model, step)
        optimizer.step()


def expected(micro):
    """The state of one process whose statistics are moved by hand, from the inputs of each step."""
    model = network()
    layers = {name: model.get_submodule(name) for name in ("first.1", "twice", "head.3")}
    running = {
        name: (torch.zeros(layer.num_features).double(), torch.ones(layer.num_features).double())
        for name, layer in layers.items()
    }
    seen = {name: [] for name in layers}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda layer, args, y, name=name: seen[name].append(flat(args[0].detach())))

    def move(model, step):
        for name, layer in layers.items():
            values = torch.cat(seen[name])
            momentum = 1 / (step + 1) if layer.momentum is None else layer.momentum
            mean, var = running[name]
            running[name] = mean + momentum * (values.mean(0) - mean), var + momentum * (values.var(0) - var)
            seen[name].clear()

    train(model, micro, lambda model: contextlib.nullcontext(), between=move)
    state = model.state_dict()
    for name, (mean, var) in running.items():
        state |= {f"{name}.running_mean": mean, f"{name}.running_var": var}
        if layers[name].num_batches_tracked is not None:
            state[f"{name}.num_batches_tracked"] = torch.tensor(STEPS)
    return state


def _trained(world, micro, wrapped):
    model = syncbn.convert(network(), world.group)
    outer = DistributedDataParallel(model, process_group=world.group) if wrapped else model
    train(outer, micro, accumulate_statistics, world.rank, world.size)
    return model.state_dict()


@pytest.mark.parametrize("name", MICRO)
@pytest.mark.parametrize("world", [2, 3, 4])
def test_micro_batches_under_no_sync_move_statistics_as_one_batch(world, name):
    micro = [sizes[:world] for sizes in MICRO[name]]
    want = expected(micro)
    for state in worlds.run(world, _trained, micro, True):
        assert_same_state(state, want, FAR)


@pytest.mark.parametrize("distributed", [False, True])
def test_one_process(distributed):
    micro = [(3,), (2,), (6,)]
    if distributed:
        state = worlds.run(1, _trained, micro, False)[0]
    else:
        model = syncbn.convert(network())
        train(model, micro, accumulate_statistics)
        state = model.state_dict()
    assert_same_state(state, expected(micro), FAR)


def test_without_the_context_statistics_move_otherwise():
    """So that the tests above can fail."""
    micro = [(3,), (2,), (6,)]
    model = syncbn.convert(network())
    train(model, micro, lambda model: contextlib.nullcontext())
    with pytest.raises(AssertionError, match=r"running_mean: off by"):
        assert_same_state(model.state_dict(), expected(micro), FAR)


def _collectives(world):
    """With what DistributedDataParallel does not add."""
    model = syncbn.convert(network(), world.group)
    x = data(0, 0, (4,))[0]
    with CollectivesSeen() as seen, accumulate_statistics(model):
        model(x)
        model(x).sum().backward()
    return [numel for _, _, numel in seen.seen]


def test_nothing_more_is_communicated_and_frozen_layers_have_no_part():
    forward, backward = [9, 9, 9, 9, 11], [10, 8, 8, 8, 8]
    assert worlds.run(2, _collectives) == [forward + forward + backward] * 2


class Counting(nn.BatchNorm1d):
    """A user's class whose forward normalizes and counts by itself."""

    def forward(self, input):
        self.num_batches_tracked = self.num_batches_tracked + 1
        return F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )


def pair(*classes):
    torch.manual_seed(3)
    return syncbn.convert(nn.Sequential(*[cls(3) for cls in classes]).double())


def copied(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_equal(model, state):
    torch.testing.assert_close(dict(model.state_dict()), state, rtol=0, atol=0)


def test_inside_statistics_stay():
    model = pair(nn.BatchNorm1d)
    before = copied(model)
    with accumulate_statistics(model):
        model(torch.randn(5, 3).double())
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model[0].num_batches_tracked == 1


def test_a_users_class_that_counts_by_itself():
    model = pair(Counting)
    x = torch.randn(9, 3).double() + 2
    with accumulate_statistics(model):
        model(x[:2])
        model(x[2:])
    assert model[0].num_batches_tracked == 1
    torch.testing.assert_close(model[0].running_mean, 0.1 * x.mean(0))
    torch.testing.assert_close(model[0].running_var, 0.9 + 0.1 * x.var(0))


class TroubleError(Exception):
    pass


@pytest.mark.parametrize("inside", [False, True])
def test_an_exception_leaves_all_as_it_was(inside):
    """Raised between forwards, or in one and caught outside."""
    model = pair(Counting, nn.BatchNorm1d)
    before = copied(model)
    x = torch.randn(5, 3).double()
    if inside:
        model[1].register_forward_pre_hook(lambda layer, args: trouble() if len(args[0]) == 4 else None)
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    with pytest.raises(TroubleError), accumulate_statistics(model):  # noqa: PT012
        model(x)
        model(x[:4])
        trouble()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks
    with accumulate_statistics(model):
        model(x)
    torch.testing.assert_close(model[0].running_mean, 0.1 * x.mean(0))


def trouble():
    raise TroubleError


def test_a_forward_that_fails_inside_does_not_count():
    """Its exception caught by the user: later calls still belong to their own layers."""
    model, other = pair(nn.BatchNorm1d, nn.BatchNorm1d), syncbn.SyncBatchNorm1d(3).double()
    x = torch.randn(5, 3).double() + 1
    with accumulate_statistics(model):
        with pytest.raises(ValueError, match="one value per channel"):
            model[0](x[:, :2])
        other(x)
        model[1](x)
    assert other.num_batches_tracked == 1
    assert model[0].num_batches_tracked == 0
    assert torch.equal(model[0].running_mean, torch.zeros(3).double())
    torch.testing.assert_close(model[1].running_mean, 0.1 * x.mean(0))


def test_a_users_class_that_counts_and_fails_before_its_collective_has_not_counted():
    model = pair(Counting)
    with accumulate_statistics(model), pytest.raises(ValueError, match="one value per channel"):
        model(torch.randn(5, 2).double())
    assert model[0].num_batches_tracked == 0


def test_only_layers_that_are_called_move_and_only_those_of_the_model():
    model, other = pair(nn.BatchNorm1d, nn.BatchNorm1d), pair(nn.BatchNorm1d)
    model[0].eval()
    x = torch.randn(5, 3).double() + 1
    with accumulate_statistics(model):
        model[0](x)
        other(x)
        assert other[0].num_batches_tracked == 1
        with accumulate_statistics(other):
            other(x)
            other(x)
            model[1](x)
            model[1](x)
    assert [layer.num_batches_tracked.item() for layer in (*model, *other)] == [0, 1, 2]
    torch.testing.assert_close(model[1].running_mean, 0.1 * x.mean(0))
    torch.testing.assert_close(other[0].running_mean, 0.19 * x.mean(0))
    with accumulate_statistics(model):
        pass
    assert model[1].num_batches_tracked == 1


def test_a_call_of_forward_counts_as_one_of_the_module():
    model = pair(nn.BatchNorm1d)
    x = torch.randn(5, 3).double() + 1
    with accumulate_statistics(model):
        model[0].forward(x)
        model[0](3 * x)
    torch.testing.assert_close(model[0].running_mean, 0.1 * 2 * x.mean(0))
    assert model[0].num_batches_tracked == 1


def test_a_layer_that_counts_itself_counts_once_called_by_forward_too():
    layer = syncbn.convert(Counting(3).double())
    x = torch.randn(5, 3).double() + 1
    with accumulate_statistics(layer):
        layer.forward(x)
        layer.forward(3 * x)
    assert layer.num_batches_tracked == 1
    torch.testing.assert_close(layer.running_mean, 0.1 * 2 * x.mean(0))


def compiled_by(kind):
    """A network that is compiled, though no module says so."""

    class Compiled(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)

        def forward(self, x):
            return self.norm(self.first(x))

    if kind == "a decorated forward":
        Compiled.forward = torch.compile(Compiled.forward, backend="eager")
    torch.manual_seed(0)
    model = syncbn.convert(Compiled().double())
    if kind == "a method":
        model.forward = torch.compile(model.forward, backend="eager")
    if kind == "a function":
        model.forward = torch.compile(lambda x: model.norm(model.first(x)), backend="eager")
    return model


def test_contexts_that_run_eagerly_may_be_left_in_any_order():
    """As those of threads are; the stance is the process's."""
    compiled = torch.compile(lambda x: x + 1 if torch.compiler.is_compiling() else x - 1, backend="eager")
    zero, first, second = torch.zeros(()), contextlib.ExitStack(), contextlib.ExitStack()
    assert compiled(zero) == 1
    first.enter_context(eagerly())
    second.enter_context(eagerly())
    assert compiled(zero) == -1
    first.close()
    assert compiled(zero) == -1, "the other is still inside"
    second.close()
    assert compiled(zero) == 1


def test_statistics_are_not_estimated_inside_of_compiled_code():
    """Where nothing can be made to run eagerly."""
    model, x = pair(nn.BatchNorm1d), torch.randn(5, 3).double() + 1
    before = copied(model)

    @torch.compile(backend="eager")
    def estimate(x):
        update_bn_stats(model, [x], progress=False)
        return x + 1

    with pytest.raises(RuntimeError, match=r"given a call inside of code that torch\.compile has compiled; expected it"):
        estimate(x)
    assert_equal(model, before)
    update_bn_stats(model, [x], progress=False)
    torch.testing.assert_close(model[0].running_mean, x.mean(0))


def _broadcast(world):
    """Buffers that DistributedDataParallel overwrites inside, by those of rank 0."""
    model = nn.Sequential(syncbn.SyncBatchNorm1d(3, group_size=1))
    ddp = DistributedDataParallel(model, process_group=world.group)
    model[0].running_mean.fill_(world.rank)
    x = torch.full((4, 3), 2.0 * world.rank) + torch.arange(4.0).view(-1, 1)
    with accumulate_statistics(model):
        ddp(x)
        ddp(x + 1)
    return model[0].running_mean


def test_buffers_that_are_broadcast_are_not_taken_for_compiled_code():
    for rank, mean in enumerate(worlds.run(2, _broadcast)):
        torch.testing.assert_close(mean, torch.full((3,), 0.1 * (2.0 * rank + 2)))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own, in a trace
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("kind", ["a decorated forward", "a method", "a function"])
def test_compiled_code_that_no_module_tells_of_runs_eagerly(kind, warm):
    model, eager = compiled_by(kind), compiled_by("nothing")
    batches = [torch.randn(5, 3, dtype=torch.float64) + 1 for _ in range(3)]
    if warm:
        for one in (model, eager):
            one(batches[0])
    for one in (model, eager):
        with accumulate_statistics(one):
            for x in batches:
                one(x)
            one.norm(one.first(batches[0]))  # eager code beside the compiled
    assert_equal(model, copied(eager))
    assert model.norm.num_batches_tracked == 1 + warm
    update_bn_stats(model, batches, progress=False)
    update_bn_stats(eager, batches, progress=False)
    assert_equal(model, copied(eager))
    assert model.norm.num_batches_tracked == 3


def test_a_frozen_layers_forward_can_still_be_differentiated_afterwards():
    """Its buffers are saved for backward: they must not be written to, not even by their own values."""
    model = pair(nn.BatchNorm1d, nn.BatchNorm1d)
    model[1].eval()
    x = torch.randn(5, 3).double()
    gradients = []
    for context in (contextlib.nullcontext(), accumulate_statistics(model)):
        model.zero_grad()
        with context:
            y = model(x)
        y.square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*gradients)


def test_single_values_make_a_batch_and_none_makes_nothing():
    """Micro-batches of one value have no variance of their own; together they have."""
    model = pair(nn.BatchNorm1d)
    x = torch.randn(3, 3).double()
    with accumulate_statistics(model):
        for sample in x.split(1):
            model(sample)
    torch.testing.assert_close(model[0].running_var, 0.9 + 0.1 * x.var(0))
    before = copied(model)
    with accumulate_statistics(model):
        model(x[:0])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("how", ["reentrant", "not reentrant", "with our context"])
def test_checkpointed_forwards_count_once(how):
    model = pair(nn.BatchNorm1d)
    x = torch.randn(6, 3).double().requires_grad_()
    options = {"context_fn": syncbn.checkpoint_context} if how == "with our context" else {}
    with accumulate_statistics(model):
        for part in x.split([2, 4]):
            checkpoint(model, part, use_reentrant=how == "reentrant", **options).square().sum().backward()
    torch.testing.assert_close(model[0].running_mean, 0.1 * x.detach().mean(0))
    torch.testing.assert_close(model[0].running_var, 0.9 + 0.1 * x.detach().var(0))
    assert model[0].num_batches_tracked == 1


def test_forward_mode_moves_once_too():
    """The tangents are reduced by a call of their own, which is not one of the layer's."""
    model = pair(nn.BatchNorm1d)
    x = torch.randn(6, 3).double()
    with accumulate_statistics(model):
        for part in x.split([2, 4]):
            torch.func.jvp(model, (part,), (torch.ones_like(part),))
    torch.testing.assert_close(model[0].running_mean, 0.1 * x.mean(0))
    torch.testing.assert_close(model[0].running_var, 0.9 + 0.1 * x.var(0))
    assert model[0].num_batches_tracked == 1


def test_masked_micro_batches():
    layer = pair(nn.BatchNorm1d)[0]
    x = torch.randn(6, 3, 4).double() + 1
    mask = torch.rand(6, 4) > 0.4
    with accumulate_statistics(layer):
        for part, valid in zip(x.split([2, 4]), mask.split([2, 4]), strict=True):
            layer(part, valid)
    values = x.movedim(1, -1)[mask]
    torch.testing.assert_close(layer.running_mean, 0.1 * values.mean(0))
    torch.testing.assert_close(layer.running_var, 0.9 + 0.1 * values.var(0))
    assert layer.num_batches_tracked == 1


def test_another_threads_forward_is_not_taken_for_ours():
    """A thread that is inside of the second layer while the first normalizes here."""
    model = pair(nn.BatchNorm1d, nn.BatchNorm1d)
    x = torch.randn(6, 3).double() + 1
    entered, done = threading.Event(), threading.Event()

    def wait(layer, args):
        if threading.current_thread() is thread:
            entered.set()
            assert done.wait(20)

    def start(layer, args):
        thread.start()
        assert entered.wait(20)

    thread = threading.Thread(target=lambda: model[1](x))
    model[0].register_forward_pre_hook(start)
    model[1].register_forward_pre_hook(wait)
    with accumulate_statistics(model):
        model[0](x)
        done.set()
        thread.join()
    torch.testing.assert_close(model[0].running_mean, 0.1 * x.mean(0))
    assert model[0].num_batches_tracked == 1


def test_what_is_refused():
    model = pair(nn.BatchNorm1d)
    x = torch.randn(6, 3).double()
    with accumulate_statistics(model), pytest.raises(ValueError, match="accumulated already"), accumulate_statistics(model):
        pass
    with accumulate_statistics(model), pytest.raises(ValueError, match="accumulated already"):
        update_bn_stats(model, [x], progress=False)
    assert not model[0]._forward_hooks
    with (
        pytest.raises(ValueError, match="a Sequential with 1 batch norm layers, none of them"),
        accumulate_statistics(nn.Sequential(nn.BatchNorm1d(3))),
    ):
        pass
    with accumulate_statistics(nn.Linear(2, 3)):
        pass
    for compiled in (torch.compile(model), pair(nn.BatchNorm1d)):
        compiled.compile()
        with pytest.raises(ValueError, match="given a compiled"), accumulate_statistics(compiled):
            pass


@pytest.mark.parametrize("pickled", [False, True])
def test_a_copy_of_the_model_made_inside_is_not_seen_and_copies_no_more_than_the_model(pickled):
    """As an average of weights may be made, or a checkpoint: it has the hook, which knows no layers."""
    model, other = syncbn.convert(network()), syncbn.convert(network())
    x = data(0, 0, (4,))[0]
    with accumulate_statistics(model):
        twin = pickle.loads(pickle.dumps(model)) if pickled else copy.deepcopy(model)
        model(x)
        twin(x + 1)
    with accumulate_statistics(other):
        other(x)
    assert_same_state(model.state_dict(), other.state_dict())
    (hook,) = twin.twice._forward_pre_hooks.values()
    assert not hook.__self__.watched
