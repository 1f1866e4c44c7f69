"""The model of the collectives: what it is fitted to, and what it projects."""

import itertools

import pytest

from syncbn.bench import alpha_beta, messages, projection, published

pytestmark = pytest.mark.usefixtures("heap_as_it_is")
MODELS = [(3e-4, 2e-5, 1e-9), (0.0, 2e-5, 1e-9), (3e-4, 0.0, 1e-9), (3e-4, 2e-5, 0.0), (5e-6, 0.0, 0.0)]


@pytest.mark.parametrize("known", MODELS)
@pytest.mark.parametrize("operation", messages.OPERATIONS)
def test_the_fit_recovers_the_model_that_made_the_latencies(known, operation):
    model = alpha_beta.Model(*known)
    terms = [alpha_beta.ring(operation, ranks, size) for ranks in range(2, 9) for size in (1000, 100_000, 10_000_000)]
    found = alpha_beta.fitted(terms, [model.seconds(one) for one in terms])
    assert found.model == pytest.approx(model, rel=1e-6, abs=1e-13)
    assert found.deviation < 1e-6
    assert found.points == 21


def test_no_part_of_a_fit_is_negative():
    terms = [alpha_beta.Terms(rounds, 0) for rounds in (1, 2, 3)]
    found = alpha_beta.fit(terms, [3.0, 2.0, 1.0])
    assert min(found) >= 0
    with pytest.raises(ValueError, match="given no measurement"):
        alpha_beta.fit([], [])


def test_rounds_and_bytes():
    assert alpha_beta.ring("all_reduce", 4, 1000) == (6, 1500)
    assert alpha_beta.ring("all_gather", 4, 1000) == (3, 3000)
    assert alpha_beta.ring("all_reduce", 4, 1000, turns=2) == (12, 1500)
    assert alpha_beta.tree(64, 8, 1000) == (6, 2000)
    assert alpha_beta.tree(4, 8, 1000) == (0, 2000)


def test_the_projection():
    """53 layers; near what was published; an all_gather grows with the ranks, an all_reduce with their logarithm."""
    assert len(projection.RESNET50) == 53
    operations = projection.nccl(8, 0.0)
    off = projection.published_model().deviation
    for one in published.ALL_REDUCE:
        assert operations["all_reduce"](one.ranks, 0) == pytest.approx(one.seconds, rel=off + 1e-9)
    assert operations["all_gather"](16384, 0) > 100 * operations["all_reduce"](8, 0)
    doubling = [operations["all_reduce"](2 * ranks, 0) - operations["all_reduce"](ranks, 0) for ranks in (16, 256, 4096)]
    assert max(doubling) == pytest.approx(min(doubling))
    node = projection.schemes(operations)["all_reduce in a node"]
    assert projection.step_communication(node, 16384) == pytest.approx(projection.step_communication(node, 8))
    sent = {}
    for name, scheme in projection.schemes(dict.fromkeys(operations, lambda ranks, size: size)).items():
        sent[name] = projection.step_communication(scheme, 8) / sum(4 * c + 1 for c in projection.RESNET50)
    assert sent == {"all_reduce": 8, "all_gather forward": 4, "all_reduce in a node": 8}, "float64, torch's float32"
    assumed = projection.Assumed(32, 32768, 4e-4, 8e-3)
    for kind, scheme in itertools.product(("weak", "strong"), projection.schemes(operations).values()):
        parts = [projection.efficiency(kind, scheme, ranks, assumed)[1] for ranks in (1, *projection.RANKS)]
        assert parts[0] == 1
        assert all(one >= other > 0 for one, other in itertools.pairwise(parts))
