"""Other models for images: Ovis, LongCat, Krea 2, JoyImage, Nucleus, Bria, VisualCloze, Qwen-Image 2.1."""

import diffusers

from helpers import families
from helpers.families import clip_text, image_vae, t5, tokenizer
from pipelines.parts import NEGATIVE, TEXT, WIDTH, flow, image, ones, randn
from pipelines.records import Case, assemble, pipeline

_JOINT = {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": WIDTH,
    "axes_dims_rope": (4, 6, 6),
}


def ovis(kind):
    transformer = diffusers.OvisImageTransformer2DModel(**_JOINT, out_channels=16)
    return assemble(kind, scheduler=flow(use_dynamic_shifting=True), vae=image_vae(), transformer=transformer)


def longcat(kind):
    """The pipeline takes 16 latent channels for granted."""
    transformer = diffusers.LongCatImageTransformer2DModel(**_JOINT | {"in_channels": 64}, pooled_projection_dim=WIDTH)
    text = families.qwen_image().components
    parts = {name: text[name] for name in ("text_encoder", "tokenizer")}
    return assemble(
        kind, scheduler=flow(use_dynamic_shifting=True), vae=image_vae(16), transformer=transformer, **parts
    )


def krea2(kind):
    transformer = diffusers.Krea2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        timestep_embed_dim=8,
        text_hidden_dim=WIDTH,
        num_text_layers=3,
        text_num_attention_heads=2,
        text_num_key_value_heads=1,
        text_intermediate_size=16,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 2, 2),
    )
    vae = families.qwen_image().vae
    return assemble(kind, scheduler=flow(use_dynamic_shifting=True), vae=vae, transformer=transformer)


def joy_image(kind):
    transformer = diffusers.JoyImageEditTransformer3DModel(
        in_channels=16,
        hidden_size=32,
        num_attention_heads=2,
        text_dim=WIDTH,
        num_layers=2,
        rope_dim_list=[4, 6, 6],
    )
    return assemble(kind, scheduler=flow(), vae=families.wan_vae(), transformer=transformer)


def nucleus(kind):
    """Its first three blocks and its last have no experts."""
    transformer = diffusers.NucleusMoEImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=5,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(8, 4, 4),
        num_experts=2,
        moe_intermediate_dim=16,
        capacity_factors=[2.0] * 5,
    )
    vae = families.qwen_image().vae
    return assemble(kind, scheduler=flow(use_dynamic_shifting=True), vae=vae, transformer=transformer)


def bria(kind):
    transformer = diffusers.BriaTransformer2DModel(**_JOINT | {"axes_dims_rope": [4, 6, 6]})
    return assemble(
        kind,
        transformer=transformer,
        scheduler=flow(),
        vae=image_vae(),
        text_encoder=t5(),
        tokenizer=tokenizer(12),
    )


def visual_cloze(kind):
    """Fills the missing image of a grid; the combined pipeline then refines it by image to image."""
    transformer = diffusers.FluxTransformer2DModel(
        **_JOINT | {"in_channels": 16 + 16 + 16}, out_channels=16, guidance_embeds=True, pooled_projection_dim=WIDTH
    )
    return assemble(
        kind,
        scheduler=flow(use_dynamic_shifting=True),
        vae=image_vae(),
        text_encoder=clip_text(),
        tokenizer=tokenizer(12),
        text_encoder_2=t5(),
        tokenizer_2=tokenizer(12),
        transformer=transformer,
        resolution=32,
    )


_SIZE = {"height": 16, "width": 16}
_MASK = {"prompt_embeds_mask": ones(1, 7)}
_NEGATIVE_MASK = {"negative_prompt_embeds_mask": ones(1, 7)}
_OFF = {"guidance_scale": 1.0}
_ON = {"guidance_scale": 4.0}


def _add(name, builder, call, negative, calls=2, off=_OFF):
    pipeline(name, builder, plain=Case(call | off, 1), guided=Case(call | negative | _ON, calls))


_add("OvisImagePipeline", ovis, TEXT | _SIZE, NEGATIVE | {"negative_prompt": None})
_LONGCAT = _SIZE | {"prompt": "two boats", "enable_prompt_rewrite": False}
_add("LongCatImagePipeline", longcat, _LONGCAT, {"negative_prompt": "an old clock at night"})
_LAYERS = {"prompt_embeds": randn(1, 7, 3, WIDTH), "prompt_embeds_mask": ones(1, 7).bool()} | _SIZE
_LAYERS_NEGATIVE = {"negative_prompt_embeds": randn(1, 7, 3, WIDTH, seed=6)}
_LAYERS_NEGATIVE |= {"negative_prompt_embeds_mask": ones(1, 7).bool()}
_add("Krea2Pipeline", krea2, _LAYERS, _LAYERS_NEGATIVE, off={"guidance_scale": 0.0})
_add("JoyImageEditPipeline", joy_image, TEXT | _MASK | {"height": 32, "width": 32}, NEGATIVE | _NEGATIVE_MASK)
_add("NucleusMoEImagePipeline", nucleus, TEXT | _MASK | _SIZE, NEGATIVE | _NEGATIVE_MASK)
_add("BriaPipeline", bria, TEXT | _SIZE, NEGATIVE, calls=1)
_GRID = [[image(32, seed=2 * row + column) if row + column < 2 else None for column in (0, 1)] for row in (0, 1)]
_CLOZE = {"task_prompt": "two boats", "content_prompt": "a city at night", "image": _GRID}
pipeline("VisualClozeGenerationPipeline", visual_cloze, plain=Case(_CLOZE, 1))
