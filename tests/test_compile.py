"""torch.compile(fullgraph=True) with inductor, over two processes: values of eager, collectives in the graphs.

Slow: every case compiles for real. Ranks have shares of their own, also of other sizes at each step.
"""

import copy
import functools
import shutil

import oracle
import pytest
import tolerance
import torch
import torch._dynamo
import torch._inductor.config
import worlds
from test_subclass import Activated, ByHand, Scaled, Twice
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import syncbn

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler"),
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated"),  # what tracing does to an autograd.Function
]
TIMEOUT = 240.0  # of a case: two ranks compile at once on two cores
SIZES = [(8, 6), (6, 3), (5, 9), (11, 4)]


class Graphs:
    """Runs functions under inductor and keeps, of each graph it compiled, the number of all_reduces."""

    def __init__(self):
        self.collectives = []

    def __call__(self, graph):
        seen = [node for node in graph.nodes if "all_reduce" in str(node.target)]
        self.collectives.append(len(seen))

    def watched(self):
        return torch._inductor.config.patch(post_grad_custom_post_pass=self, fx_graph_cache=False)


def model(name):
    torch.manual_seed(0)
    return {
        "layers": lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, momentum=None, affine=False)
        ),
        "subclasses": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), Activated(4), nn.Conv2d(4, 4, 1), Scaled(4)),
    }[name]()


def batch(rank, step):
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(SIZES[step][rank], 3, 8, 8, generator=generator) * 2 + 3


def step(module, x):
    """Values that must agree: y, dx, parameter gradients, buffers."""
    x = x.clone().requires_grad_()
    module.zero_grad()
    y = module(x)
    y.pow(2).mul(torch.sin(torch.arange(y.numel()).view_as(y))).sum().backward()
    named = {"y": y, "dx": x.grad} | {f"d {k}": p.grad for k, p in module.named_parameters()} | dict(module.named_buffers())
    return {k.replace("_orig_mod.", "").replace("module.", ""): v.detach().clone() for k, v in named.items()}


def assert_same(got, expected, tolerance=3e-5):
    """float32 through two layers, fused and not: relative to the largest value of each tensor, or of any gradient."""
    assert list(got) == list(expected)
    largest = max(v.abs().max().item() for k, v in expected.items() if k.startswith("d"))
    for name, value in expected.items():
        top = largest if name.startswith("d") else value.double().abs().max().item()
        off = (got[name].double() - value.double()).abs().max().item()
        assert off <= tolerance * max(1.0, top), f"{name} off by {off:.2g} of {top:.2g}"


def _compiled(world, name, wrap):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    eager = syncbn.convert(model(name), world.group)
    graphs, module = Graphs(), copy.deepcopy(eager)
    with graphs.watched():
        compiled = torch.compile(module, fullgraph=True)
        if wrap:
            compiled = DistributedDataParallel(compiled, process_group=world.group)
            eager = DistributedDataParallel(eager, process_group=world.group)
        pairs = [[step(m, batch(world.rank, n)) for m in (compiled, eager)] for n in range(len(SIZES))]
    return pairs, graphs.collectives, torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(("name", "wrap"), [("layers", False), ("layers", True), ("subclasses", False)])
def test_training_compiled_equals_eager(name, wrap):
    for pairs, collectives, graphs in worlds.run(2, _compiled, name, wrap, timeout=TIMEOUT):
        for compiled, eager in pairs:
            assert_same(compiled, eager)
        assert set(collectives) == {2}, "one for each layer, in each graph, forward and backward"
        assert len(collectives) == 2 * graphs
        assert graphs <= 2, "one for the first size, one for all others"


def _masked(world):
    """Padded sequences, other lengths on each rank and step; NaN in the padding."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    eager = syncbn.convert(nn.BatchNorm1d(4, momentum=0.5), world.group)
    module, graphs, pairs = copy.deepcopy(eager), Graphs(), []
    with graphs.watched():
        compiled = torch.compile(module, fullgraph=True)
        for n in range(len(SIZES)):
            generator = torch.Generator().manual_seed(10 * n + world.rank)
            length = SIZES[n][world.rank] + 1
            mask = torch.arange(length) < torch.randint(length, (3, 1), generator=generator)
            x = torch.randn(3, 4, length, generator=generator) * 2 + 3
            x = torch.where(mask.unsqueeze(1), x, torch.nan)
            pairs.append([step(Masked(m, mask), x) for m in (compiled, eager)])
    return pairs, graphs.collectives


class Masked(nn.Module):
    """A layer with the mask of a batch."""

    def __init__(self, layer, mask):
        super().__init__()
        self.layer, self.mask = layer, mask

    def forward(self, x):
        return self.layer(x, self.mask)


def test_training_with_a_mask_compiled_equals_eager():
    for pairs, collectives in worlds.run(2, _masked, timeout=TIMEOUT):
        for compiled, eager in pairs:
            assert all(value.isfinite().all() for value in eager.values())
            assert_same(compiled, eager)
        assert set(collectives) == {1}, "one forward, one backward"


def _grouped(world, kind):
    """Compiled before any eager forward: the groups of a size are made while tracing."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    if "function" in kind:
        group = {"mesh": init_device_mesh("cpu", (world.size,)), "group": world.group}[kind.split()[-1]]
        module = nn.Sequential(nn.Linear(3, 4), Functional(group))
    else:
        module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    if kind == "mesh":
        syncbn.convert(module, init_device_mesh("cpu", (world.size,)))
    else:
        syncbn.convert(module, group_size={"size": 2}.get(kind))
    eager = copy.deepcopy(module)
    x = torch.randn(3 + world.rank, 3, generator=torch.Generator().manual_seed(world.rank)) + world.rank
    backend = "aot_eager" if "function" in kind else "inductor"
    return [step(m, x) for m in (torch.compile(module, fullgraph=True, backend=backend), eager)]


class Functional(nn.Module):
    """Given its group at each call."""

    def __init__(self, group):
        super().__init__()
        self.group = Shared(group)
        self.register_buffer("running_mean", torch.zeros(4))
        self.register_buffer("running_var", torch.ones(4))

    def forward(self, x):
        group = self.group.value
        return syncbn.sync_batch_norm(x, self.running_mean, self.running_var, training=True, process_group=group)


class Shared:
    """What deepcopy leaves as it is."""

    def __init__(self, value):
        self.value = value

    def __deepcopy__(self, memo):
        return self


@pytest.mark.parametrize("kind", ["all ranks", "size", "mesh", "function, group", "function, mesh"])
def test_groups_of_every_kind_compile(kind):
    results = worlds.run(4, _grouped, kind, timeout=TIMEOUT)
    for compiled, eager in results:
        assert_same(compiled, eager)
    apart = (results[0][0]["1.running_mean"] - results[3][0]["1.running_mean"]).abs().max().item()
    assert (apart > 1e-3) == (kind == "size")


class Checkpointed(nn.Module):
    def __init__(self, kept):
        super().__init__()
        torch.manual_seed(0)
        self.block = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh())
        self.kept = kept

    def forward(self, x):
        options = {}
        if self.kept:
            ops = [torch.ops._c10d_functional.all_reduce.default, torch.ops._c10d_functional.wait_tensor.default]
            options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, ops)
        return checkpoint(self.block, x, use_reentrant=False, **options)


def _checkpointed(world, kept):
    torch._dynamo.reset()
    eager = syncbn.convert(Checkpointed(kept), world.group)
    graphs, module = Graphs(), copy.deepcopy(eager)
    plain = copy.deepcopy(eager.block)
    with graphs.watched():
        compiled = torch.compile(module, fullgraph=True)
        results = [step(m, batch(world.rank, 0)) for m in (compiled, eager, plain)]
    return [{k.replace("block.", ""): v for k, v in r.items()} for r in results], graphs.collectives


@pytest.mark.parametrize(("kept", "most"), [(False, 2), (True, 1)])
def test_checkpointing_inside_a_compiled_model(kept, most):
    """Statistics move once, values are right; the policy in `checkpoint_context`'s docstring keeps the collective.

    Without it the compiler may repeat the collective: torch 2.13 does, 2.11 does not.
    """
    for (compiled, eager, plain), collectives in worlds.run(2, _checkpointed, kept, timeout=TIMEOUT):
        assert_same(compiled, plain)
        assert_same(eager, plain)
        forward, backward = collectives
        assert forward == 1
        assert 1 <= backward <= most


UNEQUAL = [torch.randn(n, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) + n for n in (5, 2)]


def layer_with_a_zero(fused, group=None):
    """A zero in the weight is what the last layer of a residual branch begins with."""
    torch.manual_seed(2)
    layer = (syncbn.SyncBatchNormReLU if fused else syncbn.SyncBatchNorm)(4, dtype=torch.float64, process_group=group)
    nn.init.uniform_(layer.weight, 0.5, 1.5)
    nn.init.normal_(layer.bias)
    layer.weight.data[1] = 0
    return layer


def _on_some_ranks(world, fused, compiled, wanted):
    """One step, compiled on some ranks and with a gradient of x wanted on some."""
    torch._dynamo.reset()
    layer = layer_with_a_zero(fused, world.group)
    run = torch.compile(layer, backend="aot_eager", fullgraph=True) if world.rank in compiled else layer
    x = UNEQUAL[world.rank].clone().requires_grad_(world.rank in wanted)
    residual = (UNEQUAL[world.rank].cos(),) if fused else ()
    run(x, *residual).pow(3).sum().backward()
    next_collective = torch.ones(1)
    torch.distributed.all_reduce(next_collective, group=world.group)
    return x.grad, layer.weight.grad, layer.bias.grad, next_collective.item()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("compiled", "wanted"), [([0], [0, 1]), ([0], [1]), ([1], []), ([0, 1], [0])])
def test_compiled_and_eager_ranks_exchange_the_same_sums(fused, compiled, wanted):
    """Whichever rank is compiled, and whichever needs a gradient of its input: a limit of recompilations is one rank's own."""
    layer = layer_with_a_zero(fused)
    added = [x.cos() for x in UNEQUAL] if fused else None
    forward = oracle.batch_norm(UNEQUAL, UNEQUAL, layer.weight, layer.bias, relu=fused, residuals=added)
    dys = [3 * y.square() for y in forward.y]
    expected = oracle.batch_norm(UNEQUAL, dys, layer.weight, layer.bias, relu=fused, residuals=added)
    results = worlds.run(2, _on_some_ranks, fused, compiled, wanted, timeout=TIMEOUT)
    for rank, (dx, dweight, dbias, after) in enumerate(results):
        assert after == 2, "no rank is a collective behind"
        top = max(value.abs().sum().item() for value in dys)
        tolerance.check("dweight", dweight, expected.dweight[rank], scale=top)
        tolerance.check("dbias", dbias, expected.dbias[rank], scale=top)
        assert (dx is not None) == (rank in wanted)
        if dx is not None:
            tolerance.check("dx", dx, expected.dx[rank], scale=top)


def _transformed(world):
    """Each transform inside of compiled code and not, of float64 shares."""
    torch.manual_seed(world.rank)
    layer = syncbn.SyncBatchNorm(4, track_running_stats=False, dtype=torch.float64, process_group=world.group)
    x = UNEQUAL[world.rank]

    def slope(z):
        return torch.func.grad(lambda u: layer(u).pow(3).sum())(z)

    transforms = [
        slope,
        lambda z: torch.func.jvp(layer, (z,), (z.cos(),))[1],
        torch.func.grad(lambda z: slope(z).square().sum()),
    ]
    if not torch.__version__.startswith("2.11."):  # whose compiler fails inside of vmap, with an error of its own
        transforms.append(lambda z: torch.func.vmap(layer)(torch.stack([z, z.cos()])))
    results = []
    for transform in transforms:
        torch._dynamo.reset()
        results.append((torch.compile(transform, backend="aot_eager")(x).detach(), transform(x).detach()))
    return results


def test_transforms_in_compiled_code_have_the_values_of_eager():
    """A trace would drop tangents and second derivatives: it breaks there."""
    for results in worlds.run(2, _transformed, timeout=TIMEOUT):
        for compiled, eager in results:
            tolerance.check("a transform", compiled, eager)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        return x + self.norm(self.conv(x)).relu()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("force", [False, True])
def test_blocks_compiled_one_by_one_share_a_graph(force):
    """The layers differ in their paths alone."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = syncbn.convert(nn.Sequential(*[Block() for _ in range(4)]))
    for block in model:
        block.norm._force_sync = force
        block.compile(backend="aot_eager")
    model(torch.randn(2, 4, 3, 3)).sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2, "the first x needs no gradient"


def test_compiled_classes_that_do_not_normalize_once_are_named():
    for cls, how in ((Twice, "more than once"), (ByHand, "without F.batch_norm")):
        torch._dynamo.reset()
        layer = syncbn.convert(nn.Sequential(cls(4)))
        layer[0]._force_sync = True
        with pytest.raises(Exception, match=how):
            torch.compile(layer, fullgraph=True, backend="eager")(torch.randn(2, 4, 3, 3))


def test_alone_a_compiled_layer_is_torchs():
    torch._dynamo.reset()
    module = syncbn.convert(model("layers"))
    assert_same(step(torch.compile(module, fullgraph=True), batch(0, 0)), step(model("layers"), batch(0, 0)))


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_statistics_far_from_zero(memory):
    """The promise of eager code: 1e-6 of the variance at a mean of 10 000 standard deviations."""
    torch._dynamo.reset()
    layer = syncbn.SyncBatchNorm2d(8, momentum=1.0)
    layer._force_sync = True
    x = (torch.randn(8, 8, 56, 56) + 1e4).contiguous(memory_format=memory)
    torch.compile(layer, fullgraph=True)(x)
    expected = x.double().var([0, 2, 3])
    assert ((layer.running_var - expected) / expected).abs().max() <= 1e-6


def test_double_backward_of_compiled_code_is_torchs_error():
    torch._dynamo.reset()
    layer = syncbn.SyncBatchNorm1d(3)
    layer._force_sync = True
    x = torch.randn(5, 3, requires_grad=True)
    y = torch.compile(layer, fullgraph=True)(x)
    (g,) = torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward|does not require grad"):
        g.sum().backward()
