"""A model family is one record in one file: new ones are found, and what the records say is so."""

import sys
from dataclasses import replace
from operator import attrgetter

import pytest
import torch
from diffusers import FluxPipeline, QwenImagePipeline

import dpcache
from baselines.seacache import latents_of
from dpcache import models
from dpcache.models import family
from dpcache.models.architectures import Architecture, architecture, published
from dpcache.models.family import families, family_of, known_blocks
from dpcache.predictors import Reuse
from dpcache.schedules import Schedule
from dpcache.sites import transformer_blocks
from helpers.cases import case
from helpers.families import FAMILIES
from helpers.tracing import count_calls

NEW = """
from dpcache.models.family import Block, Family, Streams


def inputs(request):
    rows, columns = request.size()
    return {"hidden_states": request.random(request.batch, rows * columns, request.config["width"])}


FAMILY = Family(
    "NewTransformer",
    blocks=(
        Block(
            "NewBlock",
            streams=Streams(image="pixels", other=None),
            kept=("mix", "widen"),
            modulated_input=lambda block, args, kwargs: 2 * args[0],
        ),
    ),
    embedders=("embed",),
    published={"somebody/new": {"width": 4}},
    guidance=("guidance_scale", 3.0),
    inputs=inputs,
)
"""


class NewBlock(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.mix, self.widen = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

    def forward(self, pixels, time):
        pixels = pixels + time * self.mix(pixels)
        return pixels + time * self.widen(pixels)


class NewTransformer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.out = torch.nn.Sequential(torch.nn.Linear(4, 4)), torch.nn.Linear(4, 4)
        self.transformer_blocks = torch.nn.ModuleList([NewBlock(), NewBlock()])

    def forward(self, hidden_states, timestep):
        time, stream = timestep.view(-1, 1, 1) / 1000, self.embed(hidden_states)
        for block in self.transformer_blocks:
            stream = block(stream, time)
        return self.out(stream)


def by_hand(model: NewTransformer, x: torch.Tensor, times: list[float], computed: list[int], site: str):
    """Outputs at all times, with what the last computed step left in place of the stack's or the branches' own."""
    outputs, kept = [], {}

    def reused(name, step, module, stream):
        if step in computed:
            kept[name] = module(stream)
        return kept[name]

    for step, time in enumerate(times):
        stream, time = model.embed(x), time / 1000
        for index, block in enumerate(model.transformer_blocks):
            if site == "stack":
                stream = block(stream, time)
            else:
                stream = stream + time * reused((index, "mix"), step, block.mix, stream)
                stream = stream + time * reused((index, "widen"), step, block.widen, stream)
        outputs.append(model.out(reused("stack", step, lambda stream: stream, stream) if site == "stack" else stream))
    return torch.stack(outputs)


@pytest.fixture
def new_family(tmp_path, monkeypatch):
    """Puts the file of a new family into a folder where records are looked for."""

    def forget():
        families.cache_clear()
        known_blocks.cache_clear()
        sys.modules.pop("dpcache.models.new", None)
        vars(models).pop("new", None)

    def add(text=NEW):
        (tmp_path / "new.py").write_text(text)
        forget()

    monkeypatch.setattr(models, "__path__", [*models.__path__, str(tmp_path)])
    yield add
    monkeypatch.undo()
    forget()


@pytest.mark.parametrize("site", ["stack", "modules"])
@torch.no_grad()
def test_a_new_family_is_one_file(site, new_family):
    torch.manual_seed(0)
    model, x, times, computed = NewTransformer(), torch.randn(2, 3, 4), [900.0, 700.0, 500.0, 300.0], [0, 2]
    method, outputs = dpcache.Method(Schedule(computed, len(times)), site, Reuse()), []

    def run():
        outputs.append(torch.stack([model(hidden_states=x, timestep=torch.full((2,), time)) for time in times]))

    unknown = "streams of a NewBlock are not known" if site == "stack" else "site=modules does not know NewBlock; known"
    with pytest.raises(ValueError, match=unknown):
        dpcache.enable(model, method)
    new_family()
    with dpcache.cached(model, method):
        embedded = count_calls([model.embed[0]], run)
    torch.testing.assert_close(outputs[0], by_hand(model, x, times, computed, site))
    assert not torch.allclose(outputs[0], by_hand(model, x, times, [0, 1, 2, 3], site))
    assert embedded == [2 if site == "stack" else 4]  # the blocks alone read it


def test_all_of_a_new_family_is_known_from_its_file(new_family):
    with pytest.raises(ValueError, match=r"neither a folder in diffusers format nor one of the known .*FLUX\.1-dev"):
        architecture("somebody/new")
    with pytest.raises(ValueError, match="modulated input is not known for NewBlock"):
        family.modulated_input(NewBlock(), (torch.ones(1),), {})
    new_family()
    known = architecture("somebody/new")
    inputs = known.inputs({"height": 16, "width": 24}, batch_size=5, device="cpu", dtype=torch.float32)
    assert inputs["hidden_states"].shape == (5, 2 * 3, 4)
    assert known.branches({}) == ["cond", "uncond"] and known.branches({"guidance_scale": 1}) == ["cond"]
    assert family.modulated_input(NewBlock(), (torch.ones(1),), {}).tolist() == [2.0]
    with pytest.raises(ValueError, match="diffusers has no transformer NewTransformer"):
        known.build()


def test_a_class_has_one_record(new_family):
    new_family(NEW.replace("NewTransformer", "WanTransformer3DModel"))
    with pytest.raises(ValueError, match="more than one record in dpcache/models has WanTransformer3DModel"):
        families()
    new_family(NEW.replace("NewBlock", "WanTransformerBlock"))
    with pytest.raises(ValueError, match="more than one record in dpcache/models has WanTransformerBlock"):
        family.block_of(NewBlock())


def test_without_a_record_nothing_but_the_name_is_known():
    known = Architecture({"_class_name": "NewTransformer"})
    with pytest.raises(ValueError, match="the arguments of NewTransformer are not known"):
        known.inputs({})
    assert family_of(NewTransformer()) == known.family and known.family.embedders == ()
    assert family.block_of(NewBlock()) == family.Block("NewBlock")


@pytest.mark.parametrize("name", families())
def test_a_record_names_what_the_model_has(name):
    record = families()[name]
    if record.published:
        model = shallow(next(iter(record.published))).build()
    else:
        with torch.device("meta"):
            model = record.transformer_class()
    blocks = transformer_blocks(model)
    assert {type(block).__name__ for block in blocks} == {known.kind for known in record.blocks}
    for name in record.embedders:
        attrgetter(name)(model)
    for block in blocks:
        known, children = family.block_of(block), dict(block.named_children())
        assert {*known.feeders, known.attention} <= {*children}
        missing = {name for name in known.kept if getattr(block, name) is None}
        assert missing <= {"attn2", "ff_context"} and {*known.kept} - missing <= {*children}
        feed_forwards = {feed_forward for _, feed_forward in known.feed_forwards}
        assert {
            feed_forward for norm, feed_forward in known.feed_forwards if norm in children
        } >= feed_forwards - missing
        assert feed_forwards <= {*known.kept}


FEW = {
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "n_layers": 1,
    "n_refiner_layers": 1,
    "llama_layers": [0, 1],
}
CALL = {"height": 64, "width": 96, "num_frames": 5, "max_sequence_length": 16}


def shallow(path: str) -> Architecture:
    known = published()[path]
    return replace(known, config={name: FEW.get(name, value) for name, value in known.config.items()})


def in_one(tensors) -> torch.Tensor:
    return torch.stack(tensors).squeeze(2) if isinstance(tensors, list) else tensors


@pytest.mark.parametrize("path", published())
@torch.no_grad()
def test_example_inputs_go_through_the_published_transformer(path):
    known = shallow(path)
    inputs, transformer = known.inputs(CALL, batch_size=3), known.build()
    latents, output = in_one(next(iter(inputs.values()))), in_one(transformer(**inputs, return_dict=False)[0])
    if known.family.token_grid is not None:
        assert known.family.token_grid(known.inputs(CALL, device="cpu")) == (4, 6)
        assert latents.shape == (3, 4 * 6, known.config["in_channels"])
        assert output.shape == (3, 4 * 6, transformer.proj_out.out_features)
    else:
        channels = transformer.config.get("out_channels") or transformer.config.in_channels
        place = latents.shape.index(known.config.get("in_channels", 16), 1)  # of the channels
        assert output.shape == (*latents.shape[:place], channels, *latents.shape[place + 1 :])
        assert latents.shape[0] in (3, 6)


@pytest.mark.parametrize(
    "path", ["black-forest-labs/FLUX.1-Kontext-dev", "black-forest-labs/FLUX.2-dev", "Qwen/Qwen-Image-Edit-2511"]
)
def test_the_tokens_of_an_image_to_be_edited_stand_behind_those_of_the_image_that_is_made(path):
    known = shallow(path)
    made, edited, started = (
        known.inputs(CALL | more, device="cpu", dtype=torch.float32)
        for more in ({}, {"image": None}, {"image": None, "strength": 0.6})
    )
    assert made["hidden_states"].shape == started["hidden_states"].shape
    assert edited["hidden_states"].shape[1] == 2 * 4 * 6 and known.family.token_grid(edited) == (4, 6)
    edited["hidden_states"][:, 4 * 6 :] = torch.nan
    (latents,) = latents_of(known.build(), (), edited)
    assert latents.shape == (known.config["in_channels"] // 4, 1, 8, 12) and latents.isfinite().all()


def first_attention(transformer, run) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the first block's first call: its modulated input as the record has it, and what its attention was given."""
    block, seen = transformer_blocks(transformer)[0], {}

    def enter(module, args, kwargs):
        seen.setdefault("record", family.modulated_input(module, args, kwargs))

    def attend(module, args, kwargs):
        seen.setdefault("model", args[0] if args else kwargs["hidden_states"])

    attention = getattr(block, family.block_of(block).attention)
    handles = [
        module.register_forward_pre_hook(hook, with_kwargs=True)
        for module, hook in ((block, enter), (attention, attend))
    ]
    run()
    for handle in handles:
        handle.remove()
    return seen["record"], seen["model"]


@pytest.mark.parametrize("name", FAMILIES)
def test_teacache_compares_what_the_first_attention_is_given(name):
    one = case(name)
    known = family.block_of(transformer_blocks(one.pipe.transformer)[0])
    if known.modulated_input is None or known.kind == "WanTransformerBlock":
        pytest.skip("it is not known, or the time embedding")
    record, model = first_attention(one.pipe.transformer, lambda: one.latents(steps=2))
    assert torch.equal(record, model)


@torch.no_grad()
def test_teacache_knows_that_qwen_image_edit_tells_the_input_image_the_time_zero():
    sizes = {"in_channels": 16, "out_channels": 4, "num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
    config = (
        published()["Qwen/Qwen-Image-Edit-2511"].config
        | sizes
        | {"joint_attention_dim": 16, "axes_dims_rope": [4, 6, 6]}
    )
    known = Architecture(config)
    inputs, transformer = (
        known.inputs(CALL | {"image": None}, 2, "cpu", torch.float32),
        known.build("cpu", torch.float32),
    )
    record, model = first_attention(transformer, lambda: transformer(**inputs))
    assert torch.equal(record, model) and record.shape == (2, 2 * 4 * 6, 32)


@pytest.mark.parametrize("pipeline, position", [(FluxPipeline, "img_ids"), (QwenImagePipeline, "img_shapes")])
def test_packed_latents_are_unpacked_as_the_pipeline_packed_them(pipeline, position):
    latents = torch.randn(2, 4, 6, 10)
    packed = pipeline._pack_latents(latents, 2, 4, 6, 10)
    ids = FluxPipeline._prepare_latent_image_ids(2, 3, 5, "cpu", torch.float32)
    where = {"img_ids": ids, "img_shapes": [[(1, 3, 5)]] * 2}[position]
    transformer = case({"img_ids": "flux", "img_shapes": "qwen_image"}[position]).pipe.transformer
    unpacked = latents_of(transformer, (), {"hidden_states": packed, position: where})
    assert torch.equal(torch.stack(unpacked), latents[:, :, None])
    with pytest.raises(LookupError, match="how NewTransformer packs its latents is not known"):
        latents_of(NewTransformer(), (packed,), {})


@pytest.mark.parametrize("name", FAMILIES)
def test_guidance_branches_are_those_that_the_pipeline_calls(name):
    one = case(name)
    transformer = one.pipe.transformer
    assert len(family_of(transformer).branches(one.family.call, transformer.config)) == len(one.family.branches)
