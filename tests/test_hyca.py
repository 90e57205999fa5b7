"""HyCa: solvers per channel, how they are chosen, and that the cache weighs each channel by its own."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dpcache
from baselines.hyca import SOLVERS, HyCa, indicators, k_means, next_step_errors
from dpcache import calibrate
from dpcache.predictors import FoCa, Multistep
from dpcache.sampler import sample
from dpcache.session import History

T, CALL = 6, {"height": 64, "width": 64, "max_sequence_length": 12}
PUBLISHED = {  # weights of F_t-2, F_t-1, F_t
    "rk2": (-1 / 2, 0, 3 / 2),
    "ab2": (1 / 2, -2, 5 / 2),
    "taylor": (0, -1, 2),
    "bdf2": (0, -1 / 3, 4 / 3),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_solvers_at_unit_gaps(name):
    weights = Multistep(*SOLVERS[name]).weights([4, 5, 6], 7)
    if name == "am":  # predict with ab2, then 5/12 of the predicted step, 8/12 and -1/12 of the last two
        oldest, middle, newest = np.eye(3)
        predicted = np.array(PUBLISHED["ab2"])
        expected = newest + 5 / 12 * (predicted - newest) + 8 / 12 * (newest - middle) - 1 / 12 * (middle - oldest)
    else:
        expected = PUBLISHED[name]
    np.testing.assert_allclose(weights, expected, atol=1e-12)


channels = st.lists(st.sampled_from(list(SOLVERS.values())), min_size=1, max_size=6)


@given(channels, st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.integers(1, 4), st.integers(7, 12))
def test_every_channel_is_weighed_by_its_own(solvers, dtype, count, step):
    D, keys = len(solvers), [0, 2, 3, 6][:count]
    features = torch.randn(count, 2, 5, D, generator=torch.Generator().manual_seed(0)).to(dtype)
    together, alone = History(3), [History(3) for _ in solvers]
    for feature in features:
        together.push(feature)
        for d, history in enumerate(alone):
            history.push(feature[..., d : d + 1])
    predicted = together.combine(Multistep(*np.array(solvers).T).weights(keys, step))
    expected = [h.combine(Multistep(*solver).weights(keys, step)) for h, solver in zip(alone, solvers)]
    assert predicted.dtype == dtype
    torch.testing.assert_close(predicted, torch.cat(expected, -1))


def moving(shapes):
    """(12, 7, D) features whose channels move as `shapes` say, of different sizes from token to token."""
    t, size = torch.arange(12.0), 1 + torch.rand(7, 1, generator=torch.Generator().manual_seed(0))
    kinds = {"straight": 3 + t, "zigzag": 3 + (-1) ** t, "wave": torch.sin(0.7 * t)}
    return torch.stack([kinds[shape] for shape in shapes], 1)[:, None] * size


def test_channels_that_move_alike_share_a_cluster_and_get_the_solver_with_the_least_error():
    shapes = ["straight", "zigzag", "straight", "zigzag", "zigzag"]
    features = moving(shapes)
    cluster = k_means(indicators(features, chunk=3), 2)
    assert [shapes[d] for d in np.flatnonzero(cluster == cluster[0])] == ["straight"] * 2
    assert indicators(features).shape == (5, 6) and np.abs(indicators(features).mean(0)).max() < 1e-9
    errors = next_step_errors(features, chunk=3)
    np.testing.assert_allclose(errors, next_step_errors(features), rtol=1e-6, atol=1e-9)
    best = [list(SOLVERS)[i] for i in errors.argmin(0)]
    # All but bdf2 are exact on straight lines; of a zigzag only rk2 keeps the last value.
    assert best[0] != "bdf2" and errors[list(SOLVERS).index("bdf2"), 0] > 0.1 and best[1] == "rk2"


def test_next_step_errors_are_those_of_the_predictors():
    features = moving(["wave", "zigzag"])
    for error, solver in zip(next_step_errors(features), SOLVERS.values()):
        weights = Multistep(*solver).weights([0, 1, 2], 3)
        predicted = [sum(w * features[t + n] for n, w in enumerate(weights)) for t in range(9)]
        expected = (torch.stack(predicted) - features[3:]).square().mean((0, 1))
        np.testing.assert_allclose(error, expected, rtol=1e-4, atol=1e-9)


@given(st.integers(0, 99), st.integers(1, 30), st.integers(1, 5))
def test_k_means_assigns_every_row_to_its_nearest_center(seed, rows, clusters):
    data = np.random.default_rng(seed).normal(size=(rows, 3))
    cluster = k_means(data, clusters)
    count = cluster.max() + 1
    assert count == min(clusters, rows) and set(cluster) == set(range(count))
    centers = np.stack([data[cluster == c].mean(0) for c in range(count)])
    np.testing.assert_array_equal(np.square(data[:, None] - centers).sum(-1).argmin(1), cluster)
    assert (k_means(np.ones((rows, 3)), clusters) == 0).all()


def test_built_on_one_prompt(pipe):
    recipe = HyCa(4, T, clusters=3)
    with pytest.raises(ValueError, match=r"HyCa is not built yet: call its build\(pipe, calibration\)"):
        dpcache.enable(pipe, recipe)
    one, two = (calibrate(pipe, ["green apple", *more], T, recipe.statistics, **CALL) for more in ([], ["dog"]))
    for statistic in recipe.statistics:
        np.testing.assert_array_equal(one[statistic], two[statistic])
    method = recipe.build(pipe, two)
    solvers, sizes = method.decided["solvers"], method.decided["channels"]
    assert len(solvers) == len(sizes) <= 3 and set(solvers) <= set(SOLVERS) and sum(sizes) == 192
    assert sorted(set(zip(method.predictor.latest, method.predictor.before))) == sorted({SOLVERS[s] for s in solvers})
    result = sample(pipe, method, ["red apple"], [0], decode=False, **CALL)
    assert torch.isfinite(result.latents).all() and [*result.report.computed.values()] == [[0, 1, 2, 4]]
    assert repr(FoCa()) == "FoCa(latest=0.5, before=0.5)"
    with pytest.raises(ValueError, match="clusters=0"):
        HyCa(4, T, clusters=0)
