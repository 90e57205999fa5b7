"""Right or refused on every pipeline of diffusers that has a transformer; `scripts/coverage.py` writes the table."""

import os
import time

import pytest

from pipelines import PIPELINES, UNBUILT, classes
from pipelines.oracle import outcomes
from pipelines.records import Case, Record
from scripts.coverage import examine_all, table

# Ways to call pipelines that differ in kind, for the normal run.
CORE = {
    "FluxPipeline": ["guided"],  # two branches that the pipeline names
    "FluxImg2ImgPipeline": ["guided", "strength"],  # two without a name; fewer steps than asked for
    "FluxControlNetPipeline": ["plain"],  # features of a ControlNet between the blocks
    "Flux2KleinKVPipeline": ["image"],  # a first step with more tokens than the others
    "StableDiffusion3Pipeline": ["skipped_layer"],  # a second call in some steps
    "WanPipeline, two transformers": ["guided"],
    "Ideogram4Pipeline": ["guided"],  # a transformer for each branch
    "ZImagePipeline": ["truncated"],  # lists in and out; the batch becomes smaller in mid-run
    "Lumina2Pipeline": ["truncated"],  # a branch ends in mid-run
    "LTX2Pipeline": ["all_guidance"],  # two outputs, two schedulers, three calls a step
    "SkyReelsV2DiffusionForcingPipeline": ["guided"],  # a copy of the scheduler for each frame
    "CosmosVideoToWorldPipeline": ["guided"],  # the scheduler steps twice in a step
    "DiTPipeline": ["guided"],  # both branches in one batch
}
WORK = ("FluxPipeline", "DiTPipeline")  # at every site


@pytest.mark.ci
@pytest.mark.parametrize("name", CORE)
def test_caching_is_right_or_refused(name):
    found = list(outcomes(PIPELINES[name], cases=CORE[name]))
    allowed = "right" if name in WORK else ("right", "refused")
    assert not [outcome for outcome in found if not outcome[2].startswith(allowed)]


@pytest.mark.slow
@pytest.mark.parametrize("name", PIPELINES)
def test_caching_is_right_or_refused_on_all_pipelines_however_called(name):
    if PIPELINES[name].kind not in classes():
        pytest.skip("not in this version of diffusers")
    assert not [outcome for outcome in outcomes(PIPELINES[name]) if not outcome[2].startswith(("right", "refused"))]


def test_every_pipeline_with_a_transformer_is_built_or_has_a_reason_not_to_be():
    known = {record.kind for record in PIPELINES.values()} | set(UNBUILT)
    assert not set(classes()) - known, "add a record to tests/pipelines, or say why it is not built"


def test_at_least_a_hundred_pipelines_are_built():
    assert len({record.kind for record in PIPELINES.values()} & set(classes())) >= 100


@pytest.mark.ci
def test_the_table_survives_a_pipeline_that_crashes_and_one_that_hangs(monkeypatch):
    builders = {"FluxPipeline, crash": lambda _: os._exit(3), "FluxPipeline, hang": lambda _: time.sleep(60)}
    for name, builder in builders.items():
        monkeypatch.setitem(PIPELINES, name, Record(name, builder, {"plain": Case({}, 1)}, {}))
    rows = examine_all(list(builders), ("stack",), workers=2, limit=5)
    assert rows["FluxPipeline, crash"] == [("", "", "broken: the process ended with status 3")]
    assert rows["FluxPipeline, hang"] == [("", "", "broken: took more than 5 s")]
    assert table(rows, ("stack",)).count("**broken") == 2
