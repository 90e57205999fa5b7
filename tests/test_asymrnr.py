"""AsymRnR: matching, leaving out and bringing back, against plain loops; and what it spends, as PyTorch counts it."""

import numpy as np
import pytest
import torch

import dpcache
from baselines.asymrnr import CHUNK, Redundancy, ThinnedAttention, asymrnr, least, match, split, thinning
from baselines.full import full
from dpcache.errors import SettingError
from dpcache.method import Method
from dpcache.models.family import block_of
from dpcache.predictors import Reuse
from dpcache.schedules import Schedule
from dpcache.sites import transformer_blocks
from eval import timing
from helpers.by_hand import distance
from helpers.cases import K, T, case


@pytest.mark.parametrize("grid", [(12, 4, 6), (7, 5, 3), (1, 2, 2)])
def test_one_token_of_every_chunk_stays_whatever_the_seed(grid):
    seen = set()
    for seed in range(20):
        kept, others = split(grid, seed)
        assert sorted([*kept.tolist(), *others.tolist()]) == list(range(np.prod(grid)))
        frames, rows, columns = np.unravel_index(kept.numpy(), grid)
        chunks = [length // min(size, length) for size, length in zip(CHUNK, grid)]
        assert len(kept) == np.prod(chunks)
        seen |= set(zip(frames, rows, columns))
    assert len(seen) > len(kept) or np.prod(grid) == len(kept)
    if all(length % size == 0 for size, length in zip(CHUNK, grid)):
        assert len({(f // 6, r // 2, c // 2) for f, r, c in zip(frames, rows, columns)}) == len(kept)


def test_a_token_that_is_left_out_has_the_output_of_the_nearest_that_stays():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 3, 24, 4, generator=generator)
    kept, others = split((6, 2, 2), 0)
    kept, others = torch.cat([kept, others[:3]]), others[3:]
    distance, nearest = match(tokens, kept, others)
    found = thinning(distance, nearest, kept, others, 0.5)
    assert found.stay.shape == (2, 3, 12)
    back = found.restored(found.of(tokens))
    for sample in range(2):
        for head in range(3):
            own = tokens[sample, head]
            apart = {int(o): min((float((own[o] - own[k]).square().sum()), int(k)) for k in kept) for o in others}
            first = sorted(apart, key=lambda token: -apart[token][0])[: 12 - len(kept)]
            assert set(found.stay[sample, head].tolist()) == {*first, *kept.tolist()}
            for token in range(24):
                source = token if token in first or token in kept else apart[token][1]
                assert torch.equal(back[sample, head, token], own[source])
    mean = float(tokens[:, :, others].square().sum(-1).mean())
    assert float(distance[1, 2, 0]) == pytest.approx(
        min(float((tokens[1, 2, others[0]] - tokens[1, 2, k]).square().sum()) for k in kept) / mean, rel=1e-4
    )


def test_the_most_alike_blocks_and_steps_are_thinned():
    distances = np.array([[0.5, 0.1, 0.9], [0.2, 0.8, 0.3]])
    assert least(distances, 0.5) == {0: [1], 1: [0, 2]}
    assert least(distances, 0.0) == {} and least(distances, 1.5) == {0: [0, 1, 2], 1: [0, 1, 2]}


@pytest.mark.parametrize("kind", ["hunyuan_video", "wan21_t2v"])
def test_it_spends_what_pytorch_counts_and_changes_nothing_where_nothing_is_thinned(kind):
    one = case(kind)
    blocks = 3 if kind == "hunyuan_video" else 2
    places = {block: list(range(1, T)) for block in range(blocks)}
    thinned = Method(Schedule([0, 3, 6], T), ThinnedAttention(places, places, 0.8, 0.6), Reuse())
    nothing = Method(Schedule([0, 3, 6], T), ThinnedAttention(), Reuse())
    reference = one.latents(which=(0,))
    assert torch.equal(one.run(nothing, which=(0,))[0], reference)
    latents, report = one.run(thinned, which=(0,))
    assert not torch.equal(latents, reference) and torch.equal(one.run(thinned, which=(0,))[0], latents)
    assert torch.equal(one.latents(which=(0,)), reference)
    assert all(steps == [0, 3, 6] for steps in report.computed.values())

    def counted(method):
        models = [one.pipe.transformer]
        return sum(timing.flops(models, lambda: one.run(method, which=(0,)))[1])

    expected = T * counted(thinned) / counted(full(T))
    for (spent,) in report.spent.values():
        assert spent == pytest.approx(expected, rel=0.005) and spent < T - 0.1


@pytest.mark.parametrize("kind", ["hunyuan_video", "hunyuan_video15", "cogvideox"])
def test_queries_of_the_text_are_none_of_those_that_are_left_out(kind):
    one, step, found = case(kind), 1, []
    block = transformer_blocks(one.pipe.transformer)[0]
    attention = getattr(block, block_of(block).attention)
    handle = attention.register_forward_hook(lambda module, args, output: found.append([*map(torch.clone, output)]))
    one.run(Method(Schedule([0, 3, 6], T), ThinnedAttention(), Reuse()), which=(0,))
    calls = len(found) // T
    one.run(Method(Schedule([0, 3, 6], T), ThinnedAttention({0: [step]}, {}, 0.9), Reuse()), which=(0,))
    handle.remove()
    (video, text), (thinned, untouched) = found[step * calls], found[(T + step) * calls]
    assert distance(text, untouched) < 1e-6 and distance(video, thinned) > 1e-3


def test_the_redundancy_tells_the_blocks_and_steps_that_are_thinned():
    one = case("hunyuan_video")
    method = one.build(asymrnr(K, T, share=0.25))
    distances = one.calibration([Redundancy()])[Redundancy()]
    assert distances.shape == (2, 3, T) and (distances > 0).all()
    assert method.site.queries == least(distances[0], 0.25) and method.site.values == least(distances[1], 0.25)
    assert method.decided == {"share": 0.25}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: asymrnr(9, T), "budget=9 must be between"),
        (lambda: asymrnr(K, T, query_ratio=1.0), "query_ratio=1.0"),
        (lambda: asymrnr(K, T, reuse=0), "reuse=0"),
        (lambda: case("flux").build(asymrnr(K, T)), "AsymRnR thins the tokens of videos"),
    ],
)
def test_what_it_does_not_take_is_named(make, message):
    with pytest.raises(SettingError, match=message):
        make()


def test_a_saved_method_is_the_same(tmp_path):
    places = {1: [2, 3]}
    Method(Schedule([0, 3, 6], T), ThinnedAttention(places, {}), Reuse()).save(tmp_path / "method.safetensors")
    assert dpcache.Method.load(tmp_path / "method.safetensors").site == ThinnedAttention(places, {})
