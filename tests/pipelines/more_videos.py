"""Other models for video: EasyAnimate, Motif, WanAnimate, ChronoEdit; and HunyuanVideo 1.5 from a picture."""

import diffusers
import torch

from helpers import families
from pipelines.parts import MASKED, NEGATIVE_MASKED, WIDTH, flow, image, video
from pipelines.records import Case, assemble, pipeline, unbuilt


def easy_animate(kind):
    """The inpainting model sees a mask and the masked video too."""
    more = {"EasyAnimatePipeline": 0, "EasyAnimateInpaintPipeline": 16 + 1}
    vae = diffusers.AutoencoderKLMagvit(
        in_channels=3,
        out_channels=3,
        down_block_types=("SpatialDownBlock3D", *("SpatialTemporalDownBlock3D",) * 3),
        up_block_types=("SpatialUpBlock3D", *("SpatialTemporalUpBlock3D",) * 3),
        block_out_channels=(8, 8, 8, 8),
        latent_channels=16,
        layers_per_block=1,
        norm_num_groups=2,
        spatial_group_norm=False,
    )
    transformer = diffusers.EasyAnimateTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=16 + more[kind.__name__],
        out_channels=16,
        patch_size=2,
        sample_width=4,
        sample_height=4,
        num_layers=2,
        mmdit_layers=2,
        time_embed_dim=8,
        text_embed_dim=WIDTH,
    )
    vae.register_to_config(cache_mag_vae=False)  # the inpainting pipeline reads it (diffusers 0.42.1)
    return assemble(kind, vae=vae, transformer=transformer, scheduler=flow())


def motif(kind):
    transformer = diffusers.MotifVideoTransformer3DModel(
        in_channels=33,
        out_channels=16,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        num_single_layers=2,
        patch_size=1,
        text_embed_dim=WIDTH,
        rope_axes_dim=(4, 4, 4),
    )
    guider = diffusers.AdaptiveProjectedGuidance()
    return assemble(kind, transformer=transformer, vae=families.wan_vae(), scheduler=flow(shift=7.0), guider=guider)


def chrono_edit(kind):
    sizes = {"in_channels": 36, "image_dim": 16, "added_kv_proj_dim": 24, "rope_max_seq_len": 32}
    transformer = diffusers.ChronoEditTransformer3DModel(**families.WAN | sizes)
    return assemble(kind, **families.wan21_i2v().components | {"transformer": transformer})


def wan_animate(kind):
    transformer = diffusers.WanAnimateTransformer3DModel(
        **families.WAN | {"in_channels": 36, "image_dim": 16, "rope_max_seq_len": 32},
        latent_channels=16,
        motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16},
        motion_encoder_size=16,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=16,
        face_encoder_hidden_dim=16,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    )
    return assemble(kind, **families.wan21_i2v().components | {"transformer": transformer})


_OFF = {"guidance_scale": 1.0}
_ON = {"guidance_scale": 5.0}
_TEXT = {"prompt": ["two boats"], "height": 32, "width": 32}
_NEGATIVE = {"negative_prompt": ["an old clock at night"]}

_EASY = MASKED | {"height": 32, "width": 32, "num_frames": 5}
_CLIP = torch.rand(1, 3, 5, 32, 32, generator=torch.Generator().manual_seed(0))
for _name, _more in {
    "EasyAnimatePipeline": {},
    "EasyAnimateInpaintPipeline": {"video": _CLIP, "mask_video": torch.ones(1, 1, 5, 32, 32), "strength": 1.0},
}.items():
    pipeline(
        _name,
        easy_animate,
        plain=Case(_EASY | _more | _OFF, 1),
        guided=Case(_EASY | _more | NEGATIVE_MASKED | _ON, 1),
    )

unbuilt("EasyAnimateControlPipeline", "calls its encode_prompt with arguments that it does not take")

_MOTIF = MASKED | {"height": 32, "width": 32, "num_frames": 5}
pipeline("MotifVideoPipeline", motif, guided=Case(_MOTIF | NEGATIVE_MASKED, 2))

_CHRONO = _TEXT | {"image": image(32), "num_frames": 5, "max_sequence_length": 512}
pipeline(
    "ChronoEditPipeline",
    chrono_edit,
    plain=Case(_CHRONO | _OFF, 1),
    guided=Case(_CHRONO | _NEGATIVE | _ON, 2),
    reasoning=Case(
        _CHRONO | _OFF | {"num_frames": 9, "enable_temporal_reasoning": True, "num_temporal_reasoning_steps": 2}, 1
    ),
)
_ANIMATE = _TEXT | {
    "image": image(32),
    "pose_video": video(5, 32),
    "face_video": video(5, 16),
    "segment_frame_length": 5,
    "max_sequence_length": 512,
}
pipeline(
    "WanAnimatePipeline",
    wan_animate,
    plain=Case(_ANIMATE | _OFF, 1),
    guided=Case(_ANIMATE | _NEGATIVE | _ON, 2),
)
