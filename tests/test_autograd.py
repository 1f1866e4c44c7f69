"""Double backward, forward mode and torch.func, over shares and over processes; float64, against the whole batch."""

import functools

import batches
import pytest
import tolerance
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
import worlds
from batches import Case
from collectives_seen import CollectivesSeen
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import syncbn
from syncbn import equations

C = batches.CHANNELS
SHARES = {"unequal": (3, 1, 2, 4), "empty": (3, 0, 2, 0), "single": (1, 1, 1, 1)}


class Definition(nn.BatchNorm2d):
    """Batch norm written out, which autograd differentiates any number of times: torch's own is wrong from the third on."""

    def forward(self, x):
        centered = x - x.mean((0, 2, 3), keepdim=True)
        y = centered * (centered.square().mean((0, 2, 3), keepdim=True) + self.eps).rsqrt()
        return y * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)


assert_near = functools.partial(tolerance.assert_near, relative=tolerance.FAR)


def layer(group=None, **options):
    """A float64 layer with parameters that are not the identity; torch's own without a group."""
    torch.manual_seed(3)
    made = nn.BatchNorm2d(C, **{"track_running_stats": False, **options}).double()
    with torch.no_grad():
        if made.affine:
            made.weight.uniform_(0.5, 1.5)
            made.bias.normal_()
    if group is not None:
        syncbn.convert(made, group)
    return made


def forced(**options):
    made = syncbn.convert(layer(**options))
    made._force_sync = True
    return made


def inputs(world, shares, seed=0, requires_grad=True):
    generator = torch.Generator().manual_seed(seed)
    sizes = SHARES[shares][:world]
    x = torch.randn(sum(sizes), C, 2, 3, generator=generator, dtype=torch.float64) * 2 + 1
    return [s.clone().requires_grad_(requires_grad) for s in x.split(sizes)]


def over_shares(xs, weight, bias, eps=1e-3):
    """The layer in one process over shares: the reduce is a sum."""
    message = sum(equations.moments(x) for x in xs)
    stats = equations.statistics(message)
    return tuple(equations.normalize(x, stats, weight, bias, eps) for x in xs)


@pytest.mark.parametrize("sizes", [(3, 2), (2, 0, 3), (1, 1, 1)])
def test_gradcheck_and_gradgradcheck_over_shares(sizes):
    """The equations by autograd."""
    torch.manual_seed(1)
    xs = [torch.randn(n, 2, 2, dtype=torch.float64, requires_grad=True) for n in sizes]
    weight, bias = (torch.randn(2, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def f(weight, bias, *xs):
        return tuple(y for y in over_shares(xs, weight, bias) if y.numel())

    assert torch.autograd.gradcheck(f, (weight, bias, *xs), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, (weight, bias, *xs))


@pytest.mark.parametrize("sizes", [(3, 2), (2, 0, 3)])
def test_gradcheck_of_the_written_backward_over_shares(sizes):
    """input_gradient and gradient_sums, which double backward differentiates: autograd's derivative of them is right."""
    torch.manual_seed(2)
    xs = [torch.randn(n, 2, 2, dtype=torch.float64, requires_grad=True) for n in sizes]
    dys = [torch.randn(n, 2, 2, dtype=torch.float64, requires_grad=True) for n in sizes]
    weight = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def backward(weight, *tensors):
        xs, dys = tensors[: len(sizes)], tensors[len(sizes) :]
        stats = equations.statistics(sum(equations.moments(x) for x in xs))
        sums = [equations.gradient_sums(dy, x, stats.mean) for dy, x in zip(dys, xs, strict=True)]
        dxs = [equations.input_gradient(dy, x, stats, weight, 1e-3, sum(sums)) for dy, x in zip(dys, xs, strict=True)]
        return (*(dx for dx in dxs if dx.numel()), *sums)

    assert torch.autograd.gradcheck(backward, (weight, *xs, *dys))


@pytest.mark.parametrize("options", [{}, {"affine": False}])
def test_gradgradcheck_of_the_layer(options):
    made = forced(eps=1e-3, **options)
    x = torch.randn(3, C, 2, 1, dtype=torch.float64, requires_grad=True)
    parameters = tuple(made.parameters())

    def f(x, *parameters):
        named = dict(zip(dict(made.named_parameters()), parameters, strict=True))
        return functional_call(made, named, (x,))

    assert torch.autograd.gradcheck(f, (x, *parameters))
    assert torch.autograd.gradgradcheck(f, (x, *parameters))


def penalty(made, x):
    """A gradient penalty: the gradient's square, differentiated by input and parameters, and a Hessian-vector product."""
    y = made(x)
    loss = (y.pow(3) + y.square()).sum()
    first = torch.autograd.grad(loss, [x, *made.parameters()], create_graph=True)
    return first, (first[0].square().sum() + sum(g.pow(2).sum() for g in first[1:]) * 0)


def _penalty(world, shares):
    made, x = layer(world.group), inputs(world.size, shares)[world.rank]
    made._force_sync = True
    first, loss = penalty(made, x)
    second = torch.autograd.grad(loss, [x, *made.parameters()], create_graph=True)
    third = torch.autograd.grad(second[0].square().sum(), [x, *made.parameters()])
    return [[g.detach() for g in level] for level in (first, second, third)]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("shares", SHARES)
def test_gradients_of_gradients_equal_the_single_process(world, shares):
    """Three orders: inputs by share, parameters as sums over the ranks."""
    made, x = layer(), torch.cat(inputs(world, shares)).detach().requires_grad_()
    made.__class__ = Definition
    first, loss = penalty(made, x)
    second = torch.autograd.grad(loss, [x, *made.parameters()], create_graph=True)
    third = torch.autograd.grad(second[0].square().sum(), [x, *made.parameters()])
    results = worlds.run(world, _penalty, shares)
    for order, expected in enumerate((first, second, third)):
        assert_near(torch.cat([levels[order][0] for levels in results]), expected[0], f"order {order + 1}, x")
        for number in (1, 2):
            total = sum(levels[order][number] for levels in results)
            assert_near(total, expected[number], f"order {order + 1}, parameter {number}", relative=1e-10)


def _local_parameter_gradients(world):
    """dγ itself differentiated: p_k of theory 1.4."""
    made, x = layer(world.group), inputs(world.size, "unequal")[world.rank]
    dweight, dbias = torch.autograd.grad(made(x).pow(3).sum(), list(made.parameters()), create_graph=True)
    value = dweight.square().sum() + dbias.pow(3).sum()
    return dweight.detach(), dbias.detach(), torch.autograd.grad(value, x)[0]


def test_the_local_parameter_gradients_can_be_differentiated():
    world = 3
    made, xs = layer(), inputs(world, "unequal")
    gammas = [made.weight.detach().clone().requires_grad_() for _ in xs]
    betas = [made.bias.detach().clone().requires_grad_() for _ in xs]
    whole = F.batch_norm(torch.cat(xs), None, None, None, None, True, 0.1, made.eps)
    ys = [
        y * g.view(1, -1, 1, 1) + b.view(1, -1, 1, 1)
        for y, g, b in zip(whole.split([len(x) for x in xs]), gammas, betas, strict=True)
    ]
    local = torch.autograd.grad(sum(y.pow(3).sum() for y in ys), gammas + betas, create_graph=True)
    value = sum(g.square().sum() for g in local[:world]) + sum(g.pow(3).sum() for g in local[world:])
    expected = torch.autograd.grad(value, xs)
    for rank, (dweight, dbias, dx) in enumerate(worlds.run(world, _local_parameter_gradients)):
        assert_near(dweight, local[rank], "dweight")
        assert_near(dbias, local[world + rank], "dbias")
        assert_near(dx, expected[rank], "dx")


def _counted(world, shares):
    made, x = layer(world.group), inputs(world.size, shares)[world.rank]
    sizes = []
    with CollectivesSeen() as log:
        y = made(x)
        sizes.append(len(log.seen))
        (dx,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        sizes.append(len(log.seen))
        torch.autograd.grad(dx.square().sum(), x)
    return sizes, [count for _, _, count in log.seen]


@pytest.mark.parametrize("shares", SHARES)
def test_the_collectives_of_a_double_backward_are_counted(shares):
    """1 forward, 2 in the backward that builds a graph, 3 in the backward of it; the same on every rank, also an empty one.

    The last are the adjoints of the two, and the layer's own first backward, since the loss's gradient depends on its output.
    """
    for sizes, values in worlds.run(4, _counted, shares):
        assert sizes == [1, 3]
        assert values == [2 * C + 1, 2 * C + 1, 2 * C, 2 * C, 2 * C, 2 * C]


def critic(group=None):
    torch.manual_seed(5)
    model = nn.Sequential(
        nn.Conv2d(C, 6, 1), nn.BatchNorm2d(6), nn.Tanh(), nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 1, 1)
    ).double()
    return model if group is None else syncbn.convert(model, group)


def train_critic(model, take, steps=3, reduce=lambda g: g):
    """Wasserstein critic with a gradient penalty on (|dD/dx| − 1)², sums over samples."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(steps):
        x = take(step).requires_grad_()
        score = model(x).mean((1, 2, 3))
        (g,) = torch.autograd.grad(score.sum(), x, create_graph=True)
        norm = (g.square().sum((1, 2, 3)) + 1e-6).sqrt()
        loss = (score + 10 * (norm - 1).square()).sum() / 10
        optimizer.zero_grad()
        loss.backward()
        for p in model.parameters():
            p.grad = reduce(p.grad)
        optimizer.step()
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def _critic(world):
    def reduce(g):
        g = g.clone()
        torch.distributed.all_reduce(g, group=world.group)
        return g

    def take(step):
        return inputs(world.size, "unequal", step, False)[world.rank]

    return train_critic(critic(world.group), take, reduce=reduce)


@pytest.mark.parametrize("world", [2, 3])
def test_training_with_a_gradient_penalty_equals_the_single_process(world):
    expected = train_critic(critic(), lambda step: torch.cat(inputs(world, "unequal", step, False)))
    for state in worlds.run(world, _critic):
        for name, value in expected.items():
            assert_near(state[name].double(), value.double(), name, relative=1e-9)


def _cube(made, z):
    return made(z).pow(3).sum()


TRANSFORMS = {
    "jvp": lambda made, x, t: jvp(made, (x,), (t,))[1],
    "grad": lambda made, x, t: grad(functools.partial(_cube, made))(x),
    "jacrev": lambda made, x, t: jacrev(made)(x),
    "jacfwd": lambda made, x, t: jacfwd(made)(x),
    "hessian": lambda made, x, t: hessian(functools.partial(_cube, made))(x),
    "grad of parameters": lambda made, x, t: grad(lambda p: functional_call(made, p, (x,)).pow(3).sum())(
        dict(made.named_parameters())
    )["weight"],
    "jvp of grad": lambda made, x, t: jvp(grad(functools.partial(_cube, made)), (x,), (t,))[1],
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_in_training_in_one_process(name):
    x, t = (torch.randn(3, C, 2, 1, dtype=torch.float64) for _ in range(2))
    assert_near(TRANSFORMS[name](forced(), x, t), TRANSFORMS[name](layer(), x, t), name)


def test_what_a_transform_has_left_behind_is_an_input_as_any_other():
    left = []

    def twice(x):
        left.append(2 * x)
        return left[0].sum()

    torch.func.grad(twice)(torch.randn(3, C, 2, 1, dtype=torch.float64))
    assert torch._C._functorch.is_functorch_wrapped_tensor(left[0])
    assert_near(forced()(left[0]), layer()(left[0]), "y")
    x = torch.randn(3, C, 2, 1, dtype=torch.float64)
    added = syncbn.SyncBatchNormReLU(C, dtype=torch.float64)
    added._force_sync = True
    assert_near(added(x, left[0]), F.relu(nn.BatchNorm2d(C).double()(x) + left[0]), "with a residual")
    weighed = functools.partial(syncbn.sync_batch_norm, x, None, None, left[0][0, :, 0, 0], training=True)
    assert_near(weighed(_force_sync=True), weighed(), "with a weight")


def _transforms(world, name):
    """Cotangents and tangents of all ranks together are those of the whole batch; jacobians of this rank's y by its own x."""
    x, t = (inputs(world.size, "unequal", seed, False)[world.rank] for seed in (0, 1))
    return TRANSFORMS[name](layer(world.group), x, t).detach()


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("name", ["jvp", "grad", "grad of parameters", "jvp of grad"])
def test_transforms_over_processes_equal_the_whole_batch(world, name):
    x, t = (torch.cat(inputs(world, "unequal", seed, False)) for seed in (0, 1))
    expected = TRANSFORMS[name](layer(), x, t)
    results = worlds.run(world, _transforms, name)
    assert_near(sum(results) if name == "grad of parameters" else torch.cat(results), expected, name)


def _jacobians(world, name):
    """Every rank of equal shares takes the same rows in the same order: the calls of a batched jacobian are one collective."""
    x = inputs(world.size, "single", 0, False)[world.rank]
    with CollectivesSeen() as log:
        result = TRANSFORMS[name](layer(world.group), x, x)
    return result.detach(), [count for _, _, count in log.seen]


def test_forward_jacobians_over_processes():
    """jacfwd pushes the tangents of all ranks at once: row k of every rank is the derivative along all ranks' k-th values."""
    world, count = 2, C * 6
    results = worlds.run(world, _jacobians, "jacfwd")
    whole = torch.cat(inputs(world, "single", 0, False))
    expected = jacrev(layer())(whole)
    for rank, (result, sizes) in enumerate(results):
        blocks = [expected[rank : rank + 1, :, :, :, other : other + 1] for other in range(world)]
        assert_near(result, sum(blocks), f"rank {rank}")
        assert sizes == [2 * C + 1, count * (2 * C + 1)], "one batched collective for all tangents"


def test_forward_mode_does_not_drop_the_tangent():
    made, x, t = forced(), *(torch.randn(3, C, 2, 2, dtype=torch.float64) for _ in range(2))
    with forward_ad.dual_level():
        mine = forward_ad.unpack_dual(made(forward_ad.make_dual(x, t))).tangent
        theirs = forward_ad.unpack_dual(layer()(forward_ad.make_dual(x, t))).tangent
    assert mine.abs().max() > 0.1
    assert_near(mine, theirs)


def _tangent_of_a_gradient(module, x, dy, t):
    y = module(x)
    with forward_ad.dual_level():
        (dx,) = torch.autograd.grad(y, x, forward_ad.make_dual(dy, t))
        return forward_ad.unpack_dual(dx).tangent


def _backward_in_forward_mode(world):
    x, dy, t = (inputs(world.size, "unequal", seed, seed == 0)[world.rank] for seed in range(3))
    return _tangent_of_a_gradient(layer(world.group), x, dy, t)


def test_a_backward_in_forward_mode_does_not_drop_the_tangent():
    x, dy, t = (torch.cat(inputs(3, "unequal", seed, seed == 0)) for seed in range(3))
    expected = _tangent_of_a_gradient(layer(), x.detach().requires_grad_(), dy, t)
    assert expected.abs().max() > 0.1
    assert_near(torch.cat(worlds.run(3, _backward_in_forward_mode)), expected)


def _traced(world):
    made, x = layer(world.group), inputs(world.size, "unequal", 0, False)[world.rank]
    told = []
    for trace in (torch.func.linearize, lambda module, x: make_fx(module)(x)):
        with (
            CollectivesSeen() as log,
            pytest.raises(ValueError, match=r"given a trace, .*; expected eager code, torch.func.jvp"),
        ):
            trace(made, x)
        told.append(len(log.seen))
    return told, jvp(made, (x,), (x,))[1].detach()


def test_a_trace_that_would_not_wait_for_its_collectives_is_refused():
    whole = torch.cat(inputs(2, "unequal", 0, False))
    results = worlds.run(2, _traced)
    assert [told for told, _ in results] == [[1, 0]] * 2, "of the values, which linearize takes before it traces"
    assert_near(torch.cat([tangent for _, tangent in results]), jvp(layer(), (whole,), (whole,))[1])


def test_forward_mode_leaves_no_tangent_in_the_buffers():
    made, theirs = forced(track_running_stats=True), layer(track_running_stats=True)
    x = torch.randn(3, C, 2, 2, dtype=torch.float64)
    with forward_ad.dual_level():
        made(forward_ad.make_dual(x, x))
        assert forward_ad.unpack_dual(made.running_mean).tangent is None
    theirs(x)
    assert_near(made.running_mean, theirs.running_mean)
    assert_near(made.running_var, theirs.running_var)


@pytest.mark.parametrize("transform", [lambda f, x: grad(lambda z: f(z).sum())(x), lambda f, x: jvp(f, (x,), (x,))])
def test_buffers_that_a_transform_would_have_to_change_are_torchs_error(transform):
    x = torch.randn(3, C, 2, 2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="mutate a captured Tensor"):
        transform(forced(track_running_stats=True), x)


def test_buffers_given_to_the_transform_are_changed_there():
    made = forced(track_running_stats=True)
    theirs = layer(track_running_stats=True)
    x = torch.randn(3, C, 2, 2, dtype=torch.float64)

    def f(module, parameters, buffers):
        buffers = {k: v.clone() for k, v in buffers.items()}
        y = functional_call(module, (parameters, buffers), (x,))
        return y.pow(3).sum(), buffers

    results = [
        grad(functools.partial(f, m), has_aux=True)(dict(m.named_parameters()), dict(m.named_buffers())) for m in (made, theirs)
    ]
    for mine, expected in zip(*results, strict=True):
        for name, value in expected.items():
            assert_near(mine[name].double(), value.double(), name)


def test_vmap_over_the_layer():
    x = torch.randn(4, 3, C, 2, 2, dtype=torch.float64)
    assert_near(vmap(forced().eval())(x), vmap(layer().eval())(x), "eval without running statistics")
    made = forced(track_running_stats=True).eval()
    assert_near(vmap(made)(x), torch.stack([made(part) for part in x]), "eval")
    assert_near(vmap(forced())(x), torch.stack([layer()(part) for part in x]), "training, each its own batch")
    with pytest.raises(ValueError, match=r"batched by vmap and running statistics .* expected eval mode, or"):
        vmap(forced(track_running_stats=True))(x)


def _vmapped(world):
    x = torch.stack([inputs(world.size, "unequal", seed, False)[world.rank] for seed in range(3)])
    with CollectivesSeen() as log:
        return vmap(layer(world.group))(x).detach(), [count for _, _, count in log.seen]


def test_vmap_over_processes_is_one_collective_for_all_batches():
    whole = [torch.cat(inputs(2, "unequal", seed, False)) for seed in range(3)]
    expected = [layer()(x).split(SHARES["unequal"][:2]) for x in whole]
    for rank, (y, sizes) in enumerate(worlds.run(2, _vmapped)):
        assert_near(y, torch.stack([parts[rank] for parts in expected]).detach())
        assert sizes == [3 * (2 * C + 1)]


def _batched(world):
    """The Jacobian of y (2, C, 1, 1) by x, all rows at once, and one by one."""
    made, x = layer(world.group), inputs(world.size, "single")[world.rank]
    rows = torch.eye(x.numel(), dtype=torch.float64).view(-1, *x.shape)
    y = made(x)
    with CollectivesSeen() as log:
        (together,) = torch.autograd.grad(y, x, rows, is_grads_batched=True, retain_graph=True)
    one_by_one = torch.stack([torch.autograd.grad(y, x, row, retain_graph=True)[0] for row in rows])
    return together, one_by_one, [count for _, _, count in log.seen]


def test_a_backward_of_many_gradients_at_once():
    rows = C * 6
    for together, one_by_one, sizes in worlds.run(2, _batched):
        assert_near(together, one_by_one)
        assert sizes == [2 * C + 1, rows * 2 * C], "the statistics anew, and one collective for all gradients"
    made, x = forced(), torch.randn(3, C, 2, 1, dtype=torch.float64)
    vectorized = functools.partial(torch.autograd.functional.hessian, functools.partial(_cube, made), vectorize=True)
    assert_near(vectorized(x), TRANSFORMS["hessian"](layer(), x, x), "hessian")
    assert torch.autograd.gradcheck(made, x.requires_grad_(), check_batched_grad=True)


def test_vmap_of_gradients_names_statistics_that_many_batches_would_move():
    made, x = forced(track_running_stats=True), torch.randn(4, 3, C, 2, 1, dtype=torch.float64)
    state = dict(made.named_parameters()), dict(made.named_buffers())

    def slope(state, x):
        def loss(parameters):
            buffers = {name: value.clone() for name, value in state[1].items()}
            return functional_call(made, (parameters, buffers), (x,)).pow(3).sum()

        return grad(loss)(state[0])

    for derivative in (slope, lambda state, x: grad(lambda z: slope(state, z)["weight"].sum())(x)):
        with CollectivesSeen() as log, pytest.raises(ValueError, match="batched by vmap and running statistics that are not"):
            vmap(derivative, (None, 0))(state, x)
        assert log.seen == []
    copies = tuple({name: torch.stack([value.detach()] * 4) for name, value in part.items()} for part in state)
    theirs = layer()
    theirs.load_state_dict(state[0], strict=False)
    expected = [torch.autograd.grad(theirs(part).pow(3).sum(), theirs.weight)[0] for part in x]
    assert_near(vmap(slope)(copies, x)["weight"], torch.stack(expected))


def test_the_private_torch_names_of_this_path_are_there():
    assert torch._C._functorch.peek_interpreter_stack() is None
    assert torch._C._are_functorch_transforms_active() is False
    assert torch._C._functorch.is_functorch_wrapped_tensor(torch.ones(1)) is False
    assert forward_ad._current_level == -1
    assert torch._C._current_graph_task_id() == -1
    assert torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is None


@pytest.mark.parametrize(
    ("dtype", "param_dtype"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, None)], ids=str
)
def test_double_backward_in_mixed_dtypes(dtype, param_dtype):
    """Values near those of float64 from the same rounded input."""
    case = Case(1, dtype=dtype, param_dtype=param_dtype)
    (x,), _ = batches.make(case)
    made = syncbn.convert(nn.BatchNorm2d(C, dtype=param_dtype or dtype))
    made._force_sync = True
    exact = nn.BatchNorm2d(C).double()
    grads = []
    for module, value in ((made, x), (exact, x.double())):
        leaf = value.clone().requires_grad_()
        _, loss = penalty(module, leaf)
        grads.append(torch.autograd.grad(loss, [leaf, module.weight]))
    for mine, expected, own in zip(*grads, (dtype, param_dtype or dtype), strict=True):
        assert mine.dtype == own
        assert_near(mine.double(), expected, relative=64 * torch.finfo(torch.bfloat16 if param_dtype else dtype).eps)
