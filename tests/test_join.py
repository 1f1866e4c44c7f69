"""torch's Join over ranks with different numbers of batches: the layers' statistics are those of the ranks that have data."""

import functools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import worlds
from tolerance import FAR, assert_same_state
from torch import nn
from torch.distributed.algorithms.join import Join, Joinable
from torch.nn.parallel import DistributedDataParallel
from uneven import LOADERS, network, one_process, share, whole

import syncbn
from syncbn.join import SyncBatchNormJoin


class Net(nn.Sequential):
    """A network with a parameter that no forward uses."""

    def __init__(self):
        super().__init__(*network(torch.float64))
        self.unused = nn.Parameter(torch.zeros(2).double())


def samples(loaders, step):
    return sum(sizes[step] for sizes in loaders if step < len(sizes))


def train(world, name, accumulate=1, buffers=True, unused=False):
    """As Join has it: each rank over its own loader; the number of samples of all is known to the test."""
    loaders = LOADERS[name][: world.size]
    model = syncbn.convert(Net() if unused else network(torch.float64)).to(world.device)
    ddp = DistributedDataParallel(model, find_unused_parameters=unused)
    ddp.broadcast_buffers = buffers
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05, momentum=0.9)
    joined = SyncBatchNormJoin(ddp)
    losses = []
    with Join([joined, ddp]):
        for step, size in enumerate(loaders[world.rank]):
            x, target = (t.to(world.device) for t in share(world.rank, step, size))
            last = (step + 1) % accumulate == 0
            ddp.require_backward_grad_sync = last
            loss = F.cross_entropy(ddp(x), target, reduction="sum") * world.size / samples(loaders, step)
            loss.backward()
            losses.append(loss.item() / world.size)
            if last:
                optimizer.step()
                optimizer.zero_grad(set_to_none=False)
    return losses, {k: v.clone().cpu() for k, v in ddp.module.state_dict().items()}


CASES = {
    "uneven": {"name": "uneven"},
    "none": {"name": "none"},
    "without broadcast": {"name": "uneven", "buffers": False},
    "none without broadcast": {"name": "none", "buffers": False},
    "unused": {"name": "none", "unused": True},
    "no_sync": {"name": "none", "accumulate": 2},
    "no_sync without broadcast": {"name": "none", "accumulate": 2, "buffers": False},
}


TRAINED = {
    2: ["uneven", "none without broadcast"],
    3: ["none", "no_sync", "without broadcast"],
    4: ["uneven", "none without broadcast", "unused", "no_sync without broadcast"],
}


@functools.cache
def results(world):
    """What every rank returns for every case of a world size, which is the job: every rank makes the layers' group."""
    return worlds.run(4, _all_cases) if world == 4 else worlds.run_fresh(world, _all_cases)


def _all_cases(world):
    done = {case: train(world, **CASES[case]) for case in TRAINED[world.size]}
    return done | {case.__name__: case(world) for case in OTHER_CASES[world.size]}


@pytest.mark.parametrize(("world", "case"), [(world, case) for world, cases in TRAINED.items() for case in cases])
def test_training_equals_one_process(world, case):
    check_training(world, case, [result[case] for result in results(world)])


def check_training(world, case, found):
    """`found` is what `train` returned on each rank."""
    options = CASES[case]
    loaders = LOADERS[options["name"]][:world]
    model, losses = one_process(loaders, options.get("accumulate", 1), Net() if options.get("unused") else None)
    for step, expected in enumerate(losses):
        total = sum(losses[step] for losses, _ in found if step < len(losses))
        assert total == pytest.approx(expected, rel=1e-11), f"step {step}"
    for rank, (_, state) in enumerate(found):
        assert_same_state(state, model.state_dict(), FAR, f"of rank {rank}")


EPOCHS = [[3, 2, 2], [4], []]  # samples of each batch by rank, in each of two epochs of unequal ranks


def of_epoch(epoch):
    return EPOCHS[epoch:] + EPOCHS[:epoch]  # in the second, rank 1 has no batch and rank 2 has most


def _two_epochs(world):
    ddp = DistributedDataParallel(syncbn.convert(network(torch.float64)))
    joined = SyncBatchNormJoin(ddp)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05)
    for epoch in range(2):
        with Join([joined, ddp]):
            for step, size in enumerate(of_epoch(epoch)[world.rank]):
                x, target = share(world.rank, step, size)
                optimizer.zero_grad()
                (F.cross_entropy(ddp(x), target, reduction="sum") * world.size / samples(of_epoch(epoch), step)).backward()
                optimizer.step()
    return ddp.module.state_dict()


def test_a_second_epoch_in_which_other_ranks_are_short():
    """Without momentum: Join sends the model of the last rank to the others, and not the state of its optimizer."""
    model = network(torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for epoch in range(2):
        for step in range(3):
            x, target = whole(of_epoch(epoch), step)
            optimizer.zero_grad()
            F.cross_entropy(model(x), target).backward()
            optimizer.step()
    for rank, state in enumerate(result["_two_epochs"] for result in results(3)):
        assert_same_state(state, model.state_dict(), FAR, f"of rank {rank}")


def _by_ranks_with_data(world):
    """Equal batches, mean losses, divided by the ranks that have data: the mean of all samples."""
    loaders = [[2, 2, 2, 2], [2], []]
    ddp = DistributedDataParallel(syncbn.convert(network(torch.float64)))
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05, momentum=0.9)
    with Join([SyncBatchNormJoin(ddp), ddp], divide_by_initial_world_size=False):
        for step, size in enumerate(loaders[world.rank]):
            x, target = share(world.rank, step, size)
            optimizer.zero_grad(set_to_none=False)
            F.cross_entropy(ddp(x), target).backward()
            optimizer.step()
    return ddp.module.state_dict()


def test_gradients_divided_by_the_ranks_that_have_data():
    model, _ = one_process([[2, 2, 2, 2], [2], []])
    for rank, state in enumerate(result["_by_ranks_with_data"] for result in results(3)):
        assert_same_state(state, model.state_dict(), FAR, f"of rank {rank}")


def _two_groups(world):
    """Two wrappers over two ranks each, side by side."""
    pairs = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    mine = pairs[world.rank // 2]
    loaders = [[3, 2, 2], [4]] if world.rank < 2 else [[2], [1, 5, 3]]
    ddp = DistributedDataParallel(syncbn.convert(network(torch.float64), mine), process_group=mine)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05)
    joined = SyncBatchNormJoin(ddp)
    with Join([joined, ddp]):
        for step, size in enumerate(loaders[world.rank % 2]):
            x, target = share(world.rank % 2, step, size)
            optimizer.zero_grad()
            (F.cross_entropy(ddp(x), target, reduction="sum") * 2 / samples(loaders, step)).backward()
            optimizer.step()
    return loaders, ddp.module.state_dict()


def test_wrappers_over_groups_side_by_side():
    for rank, (loaders, state) in enumerate(result["_two_groups"] for result in results(4)):
        model = network(torch.float64)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for step in range(3):
            x, target = whole(loaders, step)
            optimizer.zero_grad()
            F.cross_entropy(model(x), target).backward()
            optimizer.step()
        assert_same_state(state, model.state_dict(), FAR, f"of rank {rank}")


class Choosing(nn.Module):
    """Calls its layers in an order given."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

    def forward(self, x, order):
        for name in order:
            x = getattr(self, name)(x)
        return x


ORDERS = [
    (["ab", "ba"], 1, "given forward of layer 'b' with 7 values as call 1 of a step"),
    (["ab", "aba"], 1, "given forward of layer 'a' with 7 values as call 3 of a step"),
    (["ab"], 2, "given backward of layer 'b' with 6 values as call 3 of a step"),
]


def _another_order(world):
    errors = []
    for orders, forwards, _ in ORDERS:
        ddp = DistributedDataParallel(syncbn.convert(Choosing()))
        try:
            with Join([SyncBatchNormJoin(ddp), ddp]):
                for order in orders:
                    sum(ddp(torch.randn(4, 3), order).square().sum() for _ in range(forwards)).backward()
        except RuntimeError as error:
            errors.append((type(error).__name__, str(error)))
    return errors


def test_another_order_of_calls_is_an_error():
    for result in results(2):
        for (_, _, text), (kind, message) in zip(ORDERS, result["_another_order"], strict=True):
            assert kind == "CollectiveError"
            assert text in message
            assert "use syncbn.even_steps" in message


def _without_backward(world):
    """As where a loss that is not finite is skipped."""
    ddp = DistributedDataParallel(syncbn.convert(Choosing()))
    try:
        with Join([SyncBatchNormJoin(ddp), ddp]), ddp.no_sync():
            for step in range(3):
                loss = ddp(torch.randn(4, 3), "ab").square().sum()
                if step != 1:
                    loss.backward()
    except syncbn.CollectiveError as error:
        return str(error), step
    return None


def test_a_step_without_its_backward_is_an_error_in_the_next():
    for rank, result in enumerate(results(2)):
        message, step = result["_without_backward"]
        wanted = f"given a forward after 2 calls of a step on rank {rank} of 2; expected backward of layer 'b', 6 values, as"
        assert message.startswith(wanted)
        assert step == 2


def _misuse(world):
    errors = {}
    part = dist.new_group([0, 1])
    converted = DistributedDataParallel(syncbn.convert(Choosing()))
    plain = DistributedDataParallel(Choosing())
    elsewhere = DistributedDataParallel(syncbn.convert(Choosing(), part))
    for name, given in {"module": Choosing(), "no layer": plain, "group": elsewhere}.items():
        try:
            SyncBatchNormJoin(given)
        except (TypeError, ValueError) as error:
            errors[name] = f"{type(error).__name__}: {error}"
    joined = SyncBatchNormJoin(converted)
    try:
        with Join([converted, joined]):
            converted(torch.randn(4, 3), "ab")
    except ValueError as error:
        errors["second"] = str(error)
    with Join([joined, converted]):
        converted(torch.randn(4, 3), "ab").sum().backward()
    converted(torch.randn(4, 3), "ba")  # outside of the context any order
    return errors


def test_misuse():
    for errors in (result["_misuse"] for result in results(2)):
        assert errors["module"] == "TypeError: given a Choosing; expected a DistributedDataParallel"
        assert "ValueError: given a model without layers of syncbn" in errors["no layer"]
        assert "ValueError: given layer 'a' with process_group=" in errors["group"]
        assert "given a Join with others before this one; expected Join([joined, ddp_model]), of one model" in errors["second"]


def _early_termination(world):
    ddp = DistributedDataParallel(syncbn.convert(Choosing()))
    try:
        with Join([SyncBatchNormJoin(ddp), ddp], throw_on_early_termination=True):
            for _ in range(2 + world.rank):
                ddp(torch.randn(4, 3), "ab").sum().backward()
    except RuntimeError as error:
        return str(error)
    return None


OTHER_CASES = {
    2: [_another_order, _without_backward, _misuse, _early_termination],
    3: [_two_epochs, _by_ranks_with_data],
    4: [_two_groups],
}


def test_throw_on_early_termination():
    first, second = (result["_early_termination"] for result in results(2))
    assert first == "Rank 0 exhausted all inputs."
    assert "Detected at least one rank that exhausted inputs" in second


def test_the_private_torch_names_in_use_are_there():
    assert hasattr(dist.Reducer, "_set_forward_pass_work_handle")
    assert callable(dist.distributed_c10d._get_default_store)
    assert callable(dist.ProcessGroupGloo)
    assert "_divide_by_initial_world_size" in DistributedDataParallel._pre_forward.__code__.co_names
    assert "_join_config" in Joinable.__init__.__code__.co_names
