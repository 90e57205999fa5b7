"""CogView 3 and 4."""

import diffusers

from helpers.families import image_vae
from pipelines.parts import WIDTH, flow, image, randn
from pipelines.records import Case, assemble, pipeline


def cogview3(kind):
    transformer = diffusers.CogView3PlusTransformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=2,
        out_channels=4,
        text_embed_dim=WIDTH,
        time_embed_dim=8,
        condition_dim=2,
        pos_embed_max_size=8,
        sample_size=8,
    )
    return assemble(kind, vae=image_vae(), transformer=transformer, scheduler=diffusers.CogVideoXDDIMScheduler())


def cogview4(kind, channels=4):
    transformer = diffusers.CogView4Transformer2DModel(
        patch_size=2,
        in_channels=channels,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=WIDTH,
        time_embed_dim=8,
        condition_dim=4,
        pos_embed_max_size=16,
        sample_size=8,
        rope_axes_dim=(16, 16),
    )
    scheduler = flow(
        base_shift=0.25, max_shift=0.75, base_image_seq_len=256, use_dynamic_shifting=True, time_shift_type="linear"
    )
    return assemble(kind, vae=image_vae(), transformer=transformer, scheduler=scheduler)


def control(kind):
    return cogview4(kind, channels=8)


_CALL = {"prompt_embeds": randn(1, 16, WIDTH), "height": 16, "width": 16}
_OFF = {"guidance_scale": 1.0}
_ON = {"negative_prompt_embeds": randn(1, 16, WIDTH, seed=6), "guidance_scale": 5.0}
_CONTROL = {"control_image": image(16)}

pipeline("CogView3PlusPipeline", cogview3, plain=Case(_CALL | _OFF, 1), guided=Case(_CALL | _ON, 1))
pipeline("CogView4Pipeline", cogview4, plain=Case(_CALL | _OFF, 1), guided=Case(_CALL | _ON, 2))
pipeline(
    "CogView4ControlPipeline",
    control,
    plain=Case(_CALL | _CONTROL | _OFF, 1),
    guided=Case(_CALL | _CONTROL | _ON, 2),
)
