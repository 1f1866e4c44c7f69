"""Autograd's node in C++, by `python -m syncbn build`: to the bit what Python's gives, and seen as it by who looks at it."""

import gc
import itertools
import os
import subprocess
import sys
import threading
import warnings
import weakref
from pathlib import Path

import batches
import pytest
import test_fused
import tolerance
import torch
import torch.autograd.forward_ad as forward_ad
from gpus import needs_cxx
from test_triton import INTERPRETED, the_interpreter_lacks
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode

import syncbn
from syncbn import collectives, eager, kernels
from syncbn.arguments import problem_of
from syncbn.kernels import Affine, Running, extension, in_triton

pytestmark = needs_cxx
TESTS = Path(__file__).parent
BOTH = ("python", "c++")
interpreted = pytest.mark.skipif(not INTERPRETED, reason="run by test_layers_by_it_and_its_launches")


def run_by_the_library(library, *files, **environment):
    """What pytest prints of tests in a process, and in the processes of worlds.py, that have the library."""
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", "-p", "by_library", *files]
    there = os.environ | {"PYTHONPATH": str(TESTS), "BY_LIBRARY": str(library)} | environment
    done = subprocess.run(command, cwd=TESTS.parent, env=there, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.timeout(300)
def test_layers_by_it(host_library):
    """Derivatives of every order, transforms, checkpoints: as by Python's node."""
    said = run_by_the_library(host_library, "tests/test_autograd.py", "tests/test_checkpoint.py")
    *_, calls = (line for line in said.splitlines() if line.startswith("by the library: "))
    assert int(calls.split()[3]) > 400, calls


@pytest.mark.skipif(bool(the_interpreter_lacks()) or in_triton() is None, reason=the_interpreter_lacks() or "needs triton")
@pytest.mark.timeout(300)
def test_layers_by_it_and_its_launches(host_library):
    """Of what it does without Python: values over ranks and of one, and what is said of wrong arguments."""
    files = ["tests/test_node.py", "tests/test_errors.py", "tests/test_fused.py", "tests/test_layer.py"]
    chosen = "interpreted or (test_errors and (names or momentum)) or (every_pair and (2 or 3))"
    said = run_by_the_library(host_library, *files, "-k", chosen, TRITON_INTERPRET="1")
    assert "skipped" not in said, said


@interpreted
def test_interpreted_values_are_those_of_the_whole_batch():
    """Forward and backward go to Python where they have to, and nowhere else."""
    import by_library

    seen = {"eager": 0, "create_graph": 0}
    for (case, _), form in itertools.product(test_fused.pairs(1), seen):
        before = dict(by_library.calls)
        batches.check(case, [test_fused.on_a_rank(0, case, form)])
        called = [by_library.calls[name] - before[name] for name in before]
        (x,), _ = batches.make(case)
        in_place = kernels.pick(x) is in_triton() and case.momentum is not None
        assert called == [1, not in_place, not in_place or form == "create_graph"], case
        seen[form] += in_place
    assert min(seen.values()) > 8


class Watching(TorchDispatchMode):
    """Sees every operator."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def elsewhere(value):
    """The same values, in memory that the programs cannot read."""
    return torch.stack([value, value + 1], -1)[..., 0]


def dual(y, x, dy):
    with forward_ad.dual_level():
        dx = torch.autograd.grad(y, x, forward_ad.make_dual(dy, dy))[0]
        return torch.stack(forward_ad.unpack_dual(dx)).detach()


def watched(y, x, dy):
    with Watching():
        return torch.autograd.grad(y, x, dy)[0]


def batched(y, x, dy):
    return torch.autograd.grad(y, x, torch.stack([dy, 2 * dy]), is_grads_batched=True)[0]


def mapped(y, x, dy):
    return torch.func.vmap(lambda each: torch.autograd.grad(y, x, each, retain_graph=True)[0])(torch.stack([dy, 2 * dy]))


def inside(y, x, dy):
    """Of a transform, with nothing that it batches."""
    one = torch.func.vmap(lambda factor: torch.autograd.grad(y, x, dy, retain_graph=True)[0] * factor)
    return one(torch.tensor([1.0, 2.0]))


BACKWARDS = {
    "plain": (lambda y, x, dy: torch.autograd.grad(y, x, dy)[0], False),
    "of a view": (lambda y, x, dy: torch.autograd.grad(y, x, torch._neg_view(-dy))[0], True),
    "watched": (watched, True),
    "batched": (batched, True),
    "mapped": (mapped, True),
    "inside": (inside, True),
    "dual": (dual, True),
    "moved": (lambda y, x, dy: torch.autograd.grad(y, x, dy)[0], True),
    "weight moved": (lambda y, x, dy: torch.autograd.grad(y, x, dy)[0], True),
    "statistics moved": (lambda y, x, dy: torch.autograd.grad(y, x, dy)[0], True),
}


@interpreted
@pytest.mark.parametrize("kind", BACKWARDS)
@pytest.mark.parametrize("cls", [syncbn.SyncBatchNorm, syncbn.SyncBatchNormReLU])
def test_interpreted_backwards_that_need_python_go_there(kind, cls, monkeypatch):
    import by_library

    found, packed, (run, rare) = [], [], BACKWARDS[kind]
    moved = {"moved": (4, 3, 5), "weight moved": (3,), "statistics moved": (7,)}

    def pack(value):
        packed[-1].append(value.shape)
        return elsewhere(value) if value.shape == moved.get(kind) else value

    for library in (extension.library, None):
        monkeypatch.setattr(extension, "library", library)
        torch.manual_seed(3)
        x, dy = torch.randn(2, 4, 3, 5).unbind()
        before = dict(by_library.calls)
        packed.append([])
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            y = forced(cls=cls)(x.requires_grad_())
        found.append(run(y, x, dy))
        called = [by_library.calls[name] - before[name] for name in before]
        assert called == ([0, 0, 0] if library is None else [1, 0, int(rare)])
    assert torch.equal(*found)
    assert packed[0] == packed[1]
    if kind.endswith("moved"):
        y = forced(cls=cls)(x)
        tolerance.assert_near(found[0], torch.autograd.grad(y, x, dy)[0].double(), relative=1e-5)


@interpreted
def test_interpreted_forwards_that_need_python_go_there(monkeypatch):
    import by_library

    x, apart = torch.randn(4, 3, 5), torch.rand(3, 2)[:, 0]
    mask, layer = torch.ones(4, 5, dtype=torch.bool), forced()
    layers = {name: forced() for name in ("weight", "bias", "running_mean", "running_var")}
    for name, one in layers.items():
        setattr(one, name, nn.Parameter(apart) if name in ("weight", "bias") else apart)
    for rare, run in (
        (False, lambda: layer(x)),
        (False, lambda: forced(affine=False, track_running_stats=False)(x)),
        (True, lambda: layer(x, mask=mask)),
        (True, lambda: forced(momentum=None)(x)),
        *((True, lambda one=one: one(x)) for one in layers.values()),
    ):
        before = by_library.calls["forward"]
        run()
        assert by_library.calls["forward"] - before == rare
    moved, (forward, backward, _) = layer.running_mean.clone(), eager.FUNCTIONS
    monkeypatch.setattr(eager, "FUNCTIONS", (forward, backward, lambda message, *_: (message, True)))
    before = by_library.calls["forward"]
    layer(x)
    assert by_library.calls["forward"] == before
    assert torch.equal(layer.running_mean, moved), "held, by an observer that came in between"


@pytest.fixture(params=BOTH)
def node(request, monkeypatch):
    """What Python's node does, C++'s does too."""
    library = extension.load(request.getfixturevalue("host_library")) if request.param == "c++" else None
    monkeypatch.setattr(extension, "library", library)
    return request.param


def forced(channels=3, cls=syncbn.SyncBatchNorm, **options):
    layer = cls(channels, **options)
    layer._force_sync = True
    return layer


def test_its_results_have_the_bits_of_pythons(host_library, monkeypatch):
    library = extension.load(host_library)

    def step(fused, dtype, wanted, masked):
        torch.manual_seed(3)
        x, residual, dy = torch.randn(3, 4, 3, 5).to(dtype)
        layer = forced(cls=syncbn.SyncBatchNorm if fused == "none" else syncbn.SyncBatchNormReLU)
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
        more = {"residual": residual} if fused == "add relu" else {}
        leaves = {"x": x, "weight": layer.weight, "bias": layer.bias} | more
        for name, leaf in leaves.items():
            leaf.requires_grad_(name in wanted)
        y = layer(x, **more, mask=torch.arange(20).view(4, 5) % 3 > 0 if masked else None)
        assert y.requires_grad == any(name in leaves for name in wanted)
        if y.requires_grad:
            y.backward(dy)
        return [y, layer.running_mean, layer.running_var, *(leaf.grad for leaf in leaves.values())]

    wanted = ["x", "weight", "bias", "residual"]
    for fused, dtype, masked in itertools.product(batches.FUSED, batches.DTYPES, [False, True]):
        for chosen in ([], wanted, *([name] for name in wanted)):
            found = []
            for by in (None, library):
                monkeypatch.setattr(extension, "library", by)
                found.append(step(fused, dtype, chosen, masked))
            assert all(one is other or torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_its_names(node):
    y = forced()(torch.randn(4, 3).requires_grad_())
    assert (y.grad_fn.name(), type(y.grad_fn).__name__) == ("_SyncBatchNormBackward",) * 2
    assert isinstance(y.grad_fn, torch.autograd.graph.Node)
    with torch.profiler.profile(acc_events=True) as profile:
        forced()(torch.randn(4, 3)).sum().backward()
    events = [(event.name, event.sequence_nr) for event in profile.events() if event.name.startswith("_SyncBatchNorm")]
    (forward, number), (backward, same) = events
    assert (forward, backward) == ("_SyncBatchNorm", "_SyncBatchNormBackward")
    assert number == same
    assert forced()(torch.randn(4, 3)).requires_grad
    with torch.no_grad():
        assert not forced()(torch.randn(4, 3)).requires_grad


def test_a_graph_is_kept_or_gone(node):
    x = torch.randn(4, 3).requires_grad_()
    y = forced()(x).square().sum()
    first, again = (torch.autograd.grad(y, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, again)
    y.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.backward()


@pytest.mark.parametrize(
    ("options", "added", "inputs"), [({}, 0, 3), ({"affine": False}, 0, 1), ({"affine": False}, 1, 2), ({}, 1, 4)]
)
def test_hooks_are_given_what_are_inputs(options, added, inputs, node):
    x, dx = torch.randn(2, 4, 3).unbind()
    y = forced(cls=syncbn.SyncBatchNormReLU, **options)(x.requires_grad_(), *[torch.randn(4, 3)] * added)
    y.grad_fn.register_hook(lambda made, given: seen.append(len(made)) or (dx, *made[1:]))
    seen: list[int] = []
    y.sum().backward()
    assert seen == [inputs]
    assert torch.equal(x.grad, dx)
    if node == "c++":  # of Python's, torch 2.11 does not tell
        assert len(y.grad_fn.next_functions) == inputs


@pytest.mark.parametrize("what", ["x", "weight", "y"])
def test_what_is_changed_in_place_is_seen(what, node):
    x, residual = torch.randn(2, 4, 3).unbind()
    layer = forced(cls=syncbn.SyncBatchNormReLU)
    y = layer(x, residual)
    with torch.no_grad():
        {"x": x, "weight": layer.weight, "y": y}[what].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_hooks_see_what_is_saved_and_what_passes(node):
    packed, unpacked, passed = [], [], []
    x, residual = torch.randn(2, 4, 3).unbind()
    layer = forced(cls=syncbn.SyncBatchNormReLU)
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda value: packed.append(value.shape) or value.clone(), lambda value: unpacked.append(value.shape) or value
    )
    with hooks:
        y = layer(x.requires_grad_(), residual)
    y.grad_fn.register_prehook(lambda given: passed.append([value.shape for value in given]))
    y.grad_fn.register_hook(lambda made, given: passed.append([value is None or tuple(value.shape) for value in made]))
    y.sum().backward()
    assert packed == unpacked == [(4, 3), (7,), (3,), (4, 3)]
    assert passed == [[(4, 3)], [(4, 3), (3,), (3,), True]]


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("form", batches.FUSED)
def test_hooks_may_lay_out_what_is_saved_otherwise(form, compiled, node, monkeypatch):
    if not compiled:
        monkeypatch.setattr(kernels, "compiled", lambda: None)
    torch.manual_seed(3)
    x, residual, dy = torch.randn(3, 4, 3, 5).unbind()
    layer = forced(cls=syncbn.SyncBatchNorm if form == "none" else syncbn.SyncBatchNormReLU)
    leaves = [x.requires_grad_(), layer.weight, layer.bias]
    found = []
    for pack in (lambda value: value, elsewhere, lambda value: elsewhere(value) if value.dim() == 1 else value):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            y = layer(x, residual) if form == "add relu" else layer(x)
        found.append(torch.autograd.grad(y, leaves, dy))
    for name, one, *others in zip(("dx", "dweight", "dbias"), *found, strict=True):
        for other in others:
            tolerance.assert_near(other, one, name, relative=1e-5)


@pytest.mark.parametrize("which", ["pack", "unpack"])
def test_what_hooks_raise_is_raised(which, node):
    def fails(value):
        raise BrokenError(which)

    def passes(value):
        return value

    layer, x = forced(), torch.randn(4, 3).requires_grad_()
    hooks = (fails, passes) if which == "pack" else (passes, fails)
    with pytest.raises(BrokenError, match=which), torch.autograd.graph.saved_tensors_hooks(*hooks):
        layer(x).sum().backward()


def test_a_gradient_that_is_none_is_zero(node):
    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            return None

    x = torch.randn(4, 3).requires_grad_()
    layer = forced()
    Stop.apply(layer(x)).sum().backward()
    assert torch.equal(x.grad, torch.zeros(4, 3))
    assert torch.equal(layer.bias.grad, torch.zeros(3))


class BrokenError(Exception):
    """Of a collective."""


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_what_a_collective_raises_is_raised(phase, node, monkeypatch):
    def fails(message, call, observers):
        if call.phase == phase:
            raise BrokenError(call.phase)
        return message, False

    forward, backward, _ = eager.FUNCTIONS
    monkeypatch.setattr(eager, "FUNCTIONS", (forward, backward, fails))
    monkeypatch.setattr(collectives, "all_reduce", fails)
    layer, x = forced(), torch.randn(4, 3).requires_grad_()
    with pytest.raises(BrokenError, match=phase):
        layer(x).sum().backward()


class Holds:
    """An observer that holds the running statistics."""

    def before(self, call, local):
        return True

    def after(self, call, local, reduced):
        """Nothing."""


def test_an_observed_layer_that_keeps_its_result_goes(node):
    layer = forced()
    with syncbn.observing.observe(Holds()):
        layer.kept = layer(torch.randn(4, 3))
    assert torch.equal(layer.running_mean, torch.zeros(3))
    gone = weakref.ref(layer)
    del layer
    gc.collect()
    assert gone() is None


def test_what_is_raised_in_another_thread_is_raised(node, monkeypatch):
    """Of backwards in backwards, torch runs those beyond its 60th in threads of its own."""
    layer = forced()

    class Nested(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, depth):
            ctx.depth = depth
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            seen.add(threading.get_ident())
            with torch.enable_grad():
                x = dy.detach().requires_grad_()
                y = Nested.apply(x, ctx.depth - 1) if ctx.depth else layer(x)
            y.backward(torch.ones_like(y))
            return dy, None

    def fails(*given):
        raise BrokenError("deep")

    seen: set[int] = set()

    monkeypatch.setattr(kernels.composed(), "gradient_sums", fails)
    monkeypatch.setattr(kernels, "compiled", lambda: None)
    with pytest.raises(BrokenError, match="deep"):
        Nested.apply(torch.randn(4, 3).requires_grad_(), 70).sum().backward()
    assert len(seen) > 1


def test_nothing_outlives_a_step(node):
    layer, x = forced(cls=syncbn.SyncBatchNormReLU), torch.randn(4, 3).requires_grad_()
    counts = []
    for _ in range(3):
        for _ in range(200):
            layer(x * 1, x).sum().backward()
            layer(x * 1, x)  # a graph that is dropped
        gc.collect()
        counts.append([sys.getrefcount(None), sys.getrefcount(eager.FUNCTIONS), sys.getallocatedblocks()])
    assert all(abs(late - early) < 100 for early, late in zip(*counts[-2:], strict=True)), counts
    inner = x * 1
    y = layer(inner)
    gone = [weakref.ref(inner), weakref.ref(y)]
    del inner
    assert gone[0]() is not None, "which the graph holds"
    y.sum().backward()
    assert gone[0]() is None
    del y
    assert gone[1]() is None


def test_a_deep_graph_goes(node):
    layer = forced()
    y = layer(torch.randn(4, 3).requires_grad_())
    gone = weakref.ref(y)
    for _ in range(20_000):
        y = layer(y)
    assert gone() is not None
    del y
    assert gone() is None


def test_several_threads(node):
    xs = torch.randn(4, 6, 3)
    layers = [forced() for _ in xs]
    expected = [
        torch.autograd.grad(layer(leaf := x.clone().requires_grad_()).square().sum(), leaf)[0]
        for x, layer in zip(xs, layers, strict=True)
    ]
    wrong = []

    def work(x, layer, dx):
        for _ in range(200):
            leaf = x.clone().requires_grad_()
            layer(leaf).square().sum().backward()
            if not torch.equal(leaf.grad, dx):
                wrong.append(leaf.grad)

    threads = [threading.Thread(target=work, args=given) for given in zip(xs, layers, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
    assert not any(thread.is_alive() for thread in threads)


def test_a_gradient_that_is_not_asked_for_is_not_computed(node, monkeypatch):
    asked = []
    for name in ("input_gradient", "gradient_sums"):
        call = getattr(kernels.composed(), name)
        monkeypatch.setattr(kernels.composed(), name, lambda *given, name=name, call=call: asked.append(name) or call(*given))
    monkeypatch.setattr(kernels, "compiled", lambda: None)
    layer, x = forced(), torch.randn(4, 3)
    layer(x).sum().backward()
    assert asked == ["gradient_sums"]
    asked.clear()
    torch.autograd.grad(layer(x.requires_grad_()).sum(), layer.weight)
    assert asked == ["gradient_sums"] + ["input_gradient"] * (node == "python")  # which knows what requires a gradient


@pytest.mark.parametrize("form", ["relu", "masked", "masked in eval mode"])
def test_a_trace_has_what_is_computed(form, node):
    """torch.jit.trace, alone: of C++'s node it would have the empty results."""
    x, mask = torch.randn(4, 3, 5), torch.ones(4, 5, dtype=torch.bool)
    layer = syncbn.SyncBatchNormReLU(3) if form == "relu" else syncbn.SyncBatchNorm(3, track_running_stats=False)
    layer.train(form != "masked in eval mode")
    given = (x,) if form == "relu" else (x, mask)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(layer, given, check_trace=False)
    except (RuntimeError, IndexError) as error:
        assert "unordered_map::at" in str(error), "torch's own, of a function that is given None"  # noqa: PT017
    else:
        torch.testing.assert_close(traced(*given), layer(*given))


def test_compiled_autograd_is_told_what_to_do(host_library, monkeypatch):
    from torch._dynamo import compiled_autograd

    monkeypatch.setattr(extension, "library", extension.load(host_library))
    y = forced()(torch.randn(4, 3).requires_grad_()).square().sum()
    said = r"syncbn\.kernels\.extension\.library = None before the forward"
    with compiled_autograd._enable(lambda graph: graph), pytest.raises(NotImplementedError, match=said):
        y.backward()


def test_what_is_in_order_is_in_order(host_library):
    """Where C++ finds nothing wrong Python finds nothing wrong, and where nothing is rare it does."""
    is_in_order = extension.load(host_library).is_in_order
    x = torch.randn(4, 3, 2)
    fits = torch.zeros(3)
    others = [None, torch.zeros(2), torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64), torch.zeros(3, device="meta"), 1.5]
    counted, elsewhere = torch.tensor(0), torch.zeros((), device="meta", dtype=torch.int64)
    runnings = [
        None,
        *(
            Running(*(fits,) * 2, tracked, momentum)
            for tracked in (None, counted, elsewhere, 3)
            for momentum in (0.1, None, 1, "0.1")
        ),
    ]
    runnings += [Running(fits, value, counted, 0.1) for value in others] + [
        Running(value, fits, counted, 0.1) for value in others
    ]
    inputs = [
        x,
        x.double(),
        x.half(),
        x.bfloat16(),
        x.long(),
        x[0, 0],
        x[:, :2],
        x[:0],
        x.to("meta"),
        x.to_sparse(),
        x.tolist(),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nested = [torch.nested.nested_tensor([x[0], x[1]], layout=layout) for layout in (torch.strided, torch.jagged)]
    inputs += [*nested, torch.randn(4, 3, dtype=torch.complex64)]
    found = set()
    for value, one, other in itertools.product(inputs, [fits, *others], [fits, *others]):
        for running, eps, channels in itertools.product(runnings, [1e-5, -1.0, 1, float("nan")], [3, 5, None, 3.0, 2**70]):
            affine = Affine(one, other, eps)
            known = is_in_order(value, affine, running, channels)
            if not known:
                continue
            found.add((value.dtype, value.shape))
            assert problem_of(value, affine, running, channels) is None
    assert len(found) == 6
    for running in (None, Running(fits, fits, counted, 0.1), Running(fits, fits, None, None)):
        for affine in (Affine(fits, fits, 1e-5), Affine(None, None, 0.0, True), Affine(nn.Parameter(fits), None, 1e-5)):
            for value in (x, x.half(), x[:0], x[:, :, :0], x.flatten(1)[:, :3], x.transpose(0, 2)):
                assert is_in_order(value, affine, running, 3)
                assert not is_in_order(value, affine, running, 4) or running or affine.weight is not None
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    fake, sizes = mode.from_tensor(x, static_shapes=True), mode.from_tensor(fits, static_shapes=False)
    assert not is_in_order(fake, Affine(sizes, None, 1e-5), None, 3)
