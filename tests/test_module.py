"""The layers as modules, in one process: torch's to the bit when alone, torch's constructor, checkpoints and flags."""

import copy
import inspect
import io
import itertools
import pickle

import batches
import oracle
import pytest
import tolerance
import torch
from batches import Case, Result
from test_layer import layer_for
from torch import nn

import syncbn

PAIRS = [
    (syncbn.SyncBatchNorm, nn.SyncBatchNorm),
    (syncbn.SyncBatchNorm1d, nn.BatchNorm1d),
    (syncbn.SyncBatchNorm2d, nn.BatchNorm2d),
    (syncbn.SyncBatchNorm3d, nn.BatchNorm3d),
]
TWINS = [
    (syncbn.SyncBatchNorm1d, nn.BatchNorm1d, (6, 3)),
    (syncbn.SyncBatchNorm1d, nn.BatchNorm1d, (6, 3, 5)),
    (syncbn.SyncBatchNorm2d, nn.BatchNorm2d, (4, 3, 5, 2)),
    (syncbn.SyncBatchNorm3d, nn.BatchNorm3d, (2, 3, 2, 3, 2)),
]


@pytest.mark.parametrize(("ours", "torchs"), PAIRS)
def test_constructors_take_torchs_arguments_at_torchs_places(ours, torchs):
    mine = inspect.signature(ours.__init__).parameters
    expected = inspect.signature(torchs.__init__).parameters
    positional = [n for n, p in expected.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [n for n, p in mine.items() if p.kind is p.POSITIONAL_OR_KEYWORD] == positional
    assert [mine[n].default for n in positional] == [expected[n].default for n in positional]
    extra = {"group_size", "bias"} if ours is syncbn.SyncBatchNorm else {"group_size", "bias", "process_group"}
    assert set(mine) - set(positional) == extra
    layer = ours(4, 0.25, None, True, False, *([None] if ours is syncbn.SyncBatchNorm else []), "cpu", torch.float64)
    assert (layer.eps, layer.momentum, layer.running_mean, layer.weight.dtype) == (0.25, None, None, torch.float64)
    if "bias" in expected:
        assert ours(4, bias=False).bias is None


@pytest.mark.parametrize(("ours", "torchs"), PAIRS)
def test_classes_are_torchs_batch_norms_but_not_the_one_that_ddp_refuses(ours, torchs):
    layer = ours(3)
    assert isinstance(layer, nn.modules.batchnorm._BatchNorm)
    assert isinstance(layer, torchs) == (torchs is not nn.SyncBatchNorm)
    assert not isinstance(layer, nn.SyncBatchNorm)


@pytest.mark.parametrize(("ours", "torchs"), PAIRS)
@pytest.mark.parametrize("kept", [True, False])
def test_state_dicts_go_both_ways(ours, torchs, kept):
    mine, theirs = ours(3, track_running_stats=kept), torchs(3, track_running_stats=kept)
    with torch.no_grad():
        for number, tensor in enumerate(theirs.state_dict().values()):
            tensor.fill_(number + 2)
    assert list(mine.state_dict()) == list(theirs.state_dict())
    mine.load_state_dict(theirs.state_dict())
    back = torchs(3, track_running_stats=kept)
    back.load_state_dict(mine.state_dict())
    for name, value in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name


def test_a_checkpoint_from_before_batches_were_counted_loads():
    state = nn.BatchNorm2d(3).state_dict()
    del state["num_batches_tracked"]
    state._metadata[""]["version"] = 1
    layer = syncbn.SyncBatchNorm2d(3)
    layer.load_state_dict(state)
    assert layer.num_batches_tracked.item() == 0


def bits(layer, y, x):
    values = [y, x.grad, *(p.grad for p in layer.parameters()), *layer.buffers()]
    return [v.detach().clone() for v in values]


@pytest.mark.parametrize(("ours", "torchs", "shape"), TWINS)
@pytest.mark.parametrize("dtype", batches.DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}, {"momentum": None}], ids=str)
def test_alone_it_is_torchs_layer_to_the_bit(ours, torchs, shape, dtype, options):
    """Three training steps and an evaluation; momentum=None moves the buffers to rounding: its factor stays on the device."""
    mine, theirs = ours(3, dtype=dtype, **options), torchs(3, dtype=dtype, **options)
    for step, training in enumerate((True, True, True, False)):
        x = (torch.randn(shape, generator=torch.Generator().manual_seed(step)) * 2 + 1).to(dtype)
        seen = []
        for layer in (mine.train(training), theirs.train(training)):
            leaf = x.clone().requires_grad_()
            y = layer(leaf)
            y.backward(torch.sin(torch.arange(y.numel()).reshape(shape)).to(dtype))
            seen.append(bits(layer, y, leaf))
        for number, (a, b) in enumerate(zip(*seen, strict=True)):
            if options.get("momentum", 0) is None and (a.shape == (3,) or not training):
                torch.testing.assert_close(a, b, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)
            else:
                assert torch.equal(a, b), (step, number)


@pytest.mark.parametrize("empty", [(0, 3, 2, 2), (4, 3, 0, 2)], ids=str)
def test_alone_an_empty_batch_leaves_the_statistics_of_a_cumulative_average(empty):
    """As torch's layer, which counts it."""
    mine, theirs = syncbn.SyncBatchNorm2d(3, momentum=None), nn.BatchNorm2d(3, momentum=None)
    for x in (torch.zeros(empty), torch.randn(4, 3, 2, 2) * 3 + 1, torch.zeros(empty), torch.randn(4, 3, 2, 2)):
        mine(x)
        theirs(x)
        for name, buffer in theirs.named_buffers():
            torch.testing.assert_close(mine.get_buffer(name), buffer)


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("forced", [False, True])
def test_a_layer_that_counts_no_batches_moves_by_its_momentum_and_without_one_not_at_all(forced, momentum):
    """As torch's layer does."""
    mine, theirs = (kind(3, momentum=momentum) for kind in (syncbn.SyncBatchNorm2d, nn.BatchNorm2d))
    mine._force_sync = forced
    for layer in (mine, theirs):
        layer.num_batches_tracked = None
        for _ in range(2):
            layer(torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0)) * 3 + 1)
    assert mine.num_batches_tracked is None
    for got, expected in ((mine.running_mean, theirs.running_mean), (mine.running_var, theirs.running_var)):
        torch.testing.assert_close(got, expected, rtol=1e-6 if forced else 0, atol=0)


def test_what_is_made_in_inference_mode_is_taken_where_nothing_trains():
    layer = syncbn.SyncBatchNorm2d(3)
    layer._force_sync = True
    with torch.inference_mode():
        x = torch.randn(4, 3, 2, 2)
        inside = layer(x)
    with torch.no_grad():
        assert torch.equal(layer(x), inside)
    assert torch.equal(layer.requires_grad_(False)(x), inside)


@pytest.mark.parametrize(("ours", "torchs", "shape"), TWINS)
@pytest.mark.parametrize("bad", ["one value", "dimensions", "channels", "integers"])
def test_alone_its_errors_are_torchs(ours, torchs, shape, bad):
    x = {
        "one value": torch.zeros(1, 3, *[1] * (len(shape) - 2)),
        "dimensions": torch.zeros(2, 3, 1, 1, 1, 1),
        "channels": torch.zeros(shape)[:, :2],
        "integers": torch.zeros(shape, dtype=torch.int64),
    }[bad]
    with pytest.raises(Exception) as theirs:  # noqa: PT011 whatever torch raises
        torchs(3)(x)
    with pytest.raises(theirs.type) as mine:
        ours(3)(x)
    assert str(theirs.value) in str(mine.value)


@pytest.mark.parametrize("forced", [False, True])
def test_eval_without_running_statistics_takes_the_local_batch(forced):
    layer = syncbn.SyncBatchNorm2d(3, track_running_stats=False).eval()
    layer._force_sync = forced
    x = torch.randn(4, 3, 5, 5)
    assert torch.equal(layer(x), nn.BatchNorm2d(3, track_running_stats=False).eval()(x))


@pytest.mark.parametrize("form", ["layer", "function"])
def test_an_eps_of_zero_adds_nothing(form):
    x, dy = (torch.randn(6, 3, 2, generator=torch.Generator().manual_seed(seed)).double() / 100 for seed in (0, 1))
    layer = syncbn.SyncBatchNorm(3, eps=0.0, dtype=torch.float64)
    layer._force_sync = True
    leaf = x.clone().requires_grad_()
    y = layer(leaf) if form == "layer" else syncbn.sync_batch_norm(leaf, None, None, training=True, eps=0.0, _force_sync=True)
    y.backward(dy)
    expected = oracle.batch_norm([x], [dy], eps=0.0)
    torch.testing.assert_close(y, expected.y[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(leaf.grad, expected.dx[0], rtol=1e-12, atol=1e-12)


def test_any_number_of_dimensions_from_two():
    for shape in [(6, 3), (6, 3, 2), (2, 3, 2, 2), (2, 3, 1, 2, 2), (2, 3, 2, 1, 2, 2)]:
        layer = syncbn.SyncBatchNorm(3)
        layer._force_sync = True
        x = torch.randn(shape)
        expected = oracle.batch_norm([x], [x])
        tolerance.check("y", layer(x), expected.y[0])


def forced(case: Case, **flags) -> nn.Module:
    layer = layer_for(case, "module")
    layer._force_sync = True
    for name, value in flags.items():
        getattr(layer, name).requires_grad_(value)
    return layer


@pytest.mark.parametrize("frozen", [("weight",), ("bias",), ("weight", "bias")])
@pytest.mark.parametrize("needs_dx", [True, False])
def test_frozen_parameters_and_inputs_get_no_gradient_and_the_others_theirs(frozen, needs_dx):
    case = Case(1)
    layer = forced(case, **dict.fromkeys(frozen, False))
    (x,), (dy,) = batches.make(case)
    if not needs_dx and len(frozen) == 2:
        assert not layer(x).requires_grad
        return
    x.requires_grad_(needs_dx)
    layer(x).backward(dy)
    expected = oracle.batch_norm([x], [dy], *batches.parameters(case))
    for name, grad in (("weight", expected.dweight[0]), ("bias", expected.dbias[0])):
        got = getattr(layer, name).grad
        assert (got is None) == (name in frozen)
        if got is not None:
            tolerance.check(name, got, grad, scale=dy.abs().sum((0, 2, 3)).max().item())
    assert (x.grad is None) == (not needs_dx)
    if needs_dx:
        tolerance.check("dx", x.grad, expected.dx[0], scale=3 * dy.abs().max().item())


@pytest.mark.parametrize("momentum", [0.1, None])
def test_several_forwards_before_their_backwards(momentum):
    """What backward needs are copies: later forwards move the buffers, not the gradients."""
    case = Case(1, momentum=momentum)
    layer, weight, bias = forced(case), *batches.parameters(case)
    inputs = [batches.make(case, seed) for seed in range(3)]
    leaves = [x.requires_grad_() for (x,), _ in inputs]
    ys = [layer(x) for x in leaves]
    mean, var = batches.buffers(case)
    for number, (y, x, (_, (dy,))) in enumerate(reversed(list(zip(ys, leaves, inputs, strict=True)))):
        y.backward(dy)
        expected = oracle.batch_norm([x], [dy], weight, bias)
        tolerance.check(f"dx {number}", x.grad, expected.dx[0], scale=3 * dy.abs().max().item())
    for count, ((x,), (dy,)) in enumerate(inputs):
        factor = batches.momentum_of(case, count)
        expected = oracle.batch_norm([x], [dy], None, None, mean, var, factor)
        mean, var = expected.running_mean, expected.running_var
    tolerance.check("running_mean", layer.running_mean, mean)
    tolerance.check("running_var", layer.running_var, var)
    assert layer.num_batches_tracked.item() == 3


@pytest.mark.parametrize("expand", [True, False])
def test_output_gradients_of_any_layout(expand):
    case = Case(1, space="2d")
    layer, ((x,), _) = forced(case), batches.make(case)
    x.requires_grad_()
    y = layer(x)
    dy = torch.tensor(0.5).expand(y.shape) if expand else torch.randn(y.shape[::-1]).permute(3, 2, 1, 0)
    y.backward(dy)
    expected = oracle.batch_norm([x], [dy], *batches.parameters(case))
    tolerance.check("dx", x.grad, expected.dx[0], scale=3 * dy.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("buffers_too", [True, False])
def test_half_precision_input_and_modules_take_statistics_in_float32(dtype, buffers_too):
    """4096 values of 100 ± 1: sums or centred values in half precision would be off by far more than allowed."""
    layer = syncbn.SyncBatchNorm1d(2, momentum=1.0).to(dtype if buffers_too else torch.float32)
    layer._force_sync = True
    x = (torch.randn(4096, 2) + 100).to(dtype)
    expected = oracle.batch_norm([x], [x], running_mean=torch.zeros(2), running_var=torch.ones(2), momentum=1.0)
    y = layer(x)
    assert y.dtype == dtype
    assert layer.running_mean.dtype == (dtype if buffers_too else torch.float32)
    tolerance.check("y", y, expected.y[0])
    tolerance.check("running_mean", layer.running_mean, expected.running_mean)
    tolerance.check("running_var", layer.running_var, expected.running_var)


def test_autocast_leaves_the_statistics_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), syncbn.SyncBatchNorm2d(4, momentum=1.0))
    model[1]._force_sync = True
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model[0](torch.randn(8, 3, 6, 6) + 3)
        y = model[1](hidden)
    assert hidden.dtype == y.dtype == torch.bfloat16
    expected = oracle.batch_norm([hidden], [y], running_mean=torch.zeros(4), running_var=torch.ones(4), momentum=1.0)
    tolerance.check("y", y, expected.y[0])
    tolerance.check("running_var", model[1].running_var, expected.running_var)
    y.float().sum().backward()
    assert model[1].weight.grad.dtype == torch.float32
    tolerance.check("dbias", model[1].bias.grad, torch.full((4,), 8.0 * 16).double())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_step_under_autocast_with_a_scaled_loss(dtype):
    """Gradients unscaled are those of torch's layer in the same precision, to its rounding; parameters stay float32."""
    torch.manual_seed(0)
    theirs = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
    mine = syncbn.convert(copy.deepcopy(theirs))
    mine[1]._force_sync = True
    x = torch.randn(16, 3, 6, 6)
    for model in (theirs, mine):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        with torch.autocast("cpu", dtype):
            loss = model(x).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    for (name, a), b in zip(mine.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert a.dtype == b.dtype, name
        largest = max(0.1, b.double().abs().max().item())
        assert tolerance.error(a, b.double()) <= 2 * torch.finfo(dtype).eps * largest, name


def test_only_the_input_and_values_per_channel_are_kept_for_backward():
    layer = forced(Case(1))
    (x,), _ = batches.make(Case(1, "equal"))
    x.requires_grad_()
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    assert sum(t is x or t.data_ptr() == x.data_ptr() for t in kept) == 1
    assert all(t.numel() <= 2 * batches.CHANNELS + 1 for t in kept if t.data_ptr() != x.data_ptr())


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("converted", [True, False])
@pytest.mark.parametrize("group_size", [None, 2])
def test_copies_are_layers_of_their_own_with_the_same_group(way, converted, group_size):
    case = Case(1)
    layer = layer_for(case, "torch's class, converted" if converted else "module")
    layer = syncbn.convert(layer, group_size=group_size)
    if way == "deepcopy":
        twin = copy.deepcopy(layer)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(layer))
    else:
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert type(twin) is type(layer)
    assert twin._syncbn == layer._syncbn
    assert all(torch.equal(a, b) for a, b in zip(twin.state_dict().values(), layer.state_dict().values(), strict=True))
    results = []
    for one in (layer, twin):
        one._force_sync = True
        (x,), (dy,) = batches.make(case)
        x.requires_grad_()
        y = one(x)
        y.backward(dy)
        mean, var = one.running_mean, one.running_var
        results.append(Result(y.detach(), x.grad, one.weight.grad, one.bias.grad, mean, var))
    for result in results:
        batches.check(case, [result])
    assert twin.running_mean.data_ptr() != layer.running_mean.data_ptr()


def test_the_printed_layer_shows_its_group():
    assert repr(syncbn.SyncBatchNorm2d(3)) == repr(nn.BatchNorm2d(3)).replace("BatchNorm2d", "SyncBatchNorm2d")
    assert repr(syncbn.SyncBatchNorm2d(3, group_size=4)).endswith("group_size=4)")


def test_shares_of_all_variants_agree_when_forced_on_one_process():
    """The forced path on a group of one, as benchmarks take it, over the variants that change its code."""
    for dtype, layout, affine in itertools.product(batches.DTYPES, batches.LAYOUTS, ("both", "none")):
        case = Case(1, dtype=dtype, layout=layout, affine=affine)
        layer = forced(case)
        (x,), (dy,) = batches.make(case)
        x = x.detach().requires_grad_()
        y = layer(x)
        (dx,) = torch.autograd.grad(y, x, dy, retain_graph=True)
        y.backward(dy)
        grads = [None if p is None else p.grad for p in (layer.weight, layer.bias)]
        batches.check(case, [Result(y.detach(), dx, *grads, layer.running_mean, layer.running_var)])
