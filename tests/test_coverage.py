"""Right or refused on every pipeline of diffusers that has a transformer; `scripts/coverage.py` writes the table."""

import pytest

from pipelines import PIPELINES, UNBUILT, classes
from pipelines.oracle import outcomes

# Pipelines that differ in kind, for the normal run.
CORE = (
    "FluxPipeline",  # named branches
    "FluxImg2ImgPipeline",  # branches without a name, fewer steps than asked for
    "FluxControlNetPipeline",  # features of a ControlNet between the blocks
    "Flux2KleinKVPipeline",  # a step with more tokens than the others
    "StableDiffusion3Pipeline",  # one batch of two branches, a second call in some steps
    "WanPipeline, two transformers",
    "WanVideoToVideoPipeline",
    "ZImagePipeline",  # lists in and out
    "Lumina2Pipeline",  # guidance ends in mid-run
    "LTX2Pipeline",  # two outputs, two schedulers, three calls a step
    "SkyReelsV2DiffusionForcingPipeline",  # a copy of the scheduler for each frame
    "CosmosVideoToWorldPipeline",  # two scheduler steps in each
    "DiTPipeline",
)


def check(name: str) -> None:
    found = list(outcomes(PIPELINES[name]))
    assert not [outcome for outcome in found if outcome[2].startswith(("wrong", "broken"))]
    assert any(outcome == "right" for _, _, outcome in found), f"nothing works: {found}"


@pytest.mark.parametrize("name", CORE)
def test_caching_is_right_or_refused(name):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PIPELINES if name not in CORE])
def test_caching_is_right_or_refused_on_the_others(name):
    if PIPELINES[name].kind not in classes():
        pytest.skip("not in this version of diffusers")
    check(name)


def test_every_pipeline_with_a_transformer_is_built_or_has_a_reason_not_to_be():
    known = {record.kind for record in PIPELINES.values()} | set(UNBUILT)
    assert not set(classes()) - known, "add a record to tests/pipelines, or say why it is not built"


def test_at_least_a_hundred_pipelines_are_built():
    assert len({record.kind for record in PIPELINES.values()} & set(classes())) >= 100
