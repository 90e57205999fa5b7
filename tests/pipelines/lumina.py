"""Lumina, Lumina 2 and AuraFlow."""

import diffusers

from helpers import families
from helpers.families import image_vae
from pipelines.parts import MASKED, NEGATIVE_MASKED, WIDTH, flow
from pipelines.records import Case, assemble, pipeline


def lumina(kind):
    transformer = diffusers.LuminaNextDiT2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        hidden_size=24,
        num_layers=2,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=16,
        norm_eps=1e-5,
        learn_sigma=True,
        qk_norm=True,
        cross_attention_dim=WIDTH,
        scaling_factor=1.0,
    )
    return assemble(kind, transformer=transformer, scheduler=flow(), vae=image_vae())


def lumina2(kind):
    own = families.lumina2()
    return assemble(kind, transformer=own.transformer, scheduler=flow(), vae=own.vae)


def aura_flow(kind):
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=WIDTH,
        out_channels=4,
        pos_embed_max_size=64,
    )
    return assemble(kind, transformer=transformer, scheduler=flow(), vae=image_vae())


_CALL = MASKED | {"height": 16, "width": 16}
_OFF = {"guidance_scale": 1.0}
_ON = NEGATIVE_MASKED | {"guidance_scale": 4.0}

pipeline("LuminaPipeline", lumina, plain=Case(_CALL | _OFF, 1), guided=Case(_CALL | _ON, 1))
_MASKS = {"prompt_attention_mask": MASKED["prompt_attention_mask"].bool()}
_NEGATIVE_MASKS = {"negative_prompt_attention_mask": NEGATIVE_MASKED["negative_prompt_attention_mask"].bool()}
pipeline(
    "Lumina2Pipeline",
    lumina2,
    plain=Case(_CALL | _MASKS | _OFF, 1),
    guided=Case(_CALL | _MASKS | _ON | _NEGATIVE_MASKS, 2),
    truncated=Case(_CALL | _MASKS | _ON | _NEGATIVE_MASKS | {"cfg_trunc_ratio": 0.5}, None),
)
pipeline("AuraFlowPipeline", aura_flow, plain=Case(_CALL | _OFF, 1), guided=Case(_CALL | _ON, 1))
