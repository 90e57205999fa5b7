"""Sana."""

import diffusers

from helpers.families import wan_vae
from pipelines.parts import MASKED, NEGATIVE_MASKED, WIDTH, flow, image
from pipelines.records import Case, assemble, pipeline

_SIZES = {
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 8,
    "cross_attention_dim": 16,
    "caption_channels": WIDTH,
    "sample_size": 32,
}


def vae():
    """Halves the resolution."""
    return diffusers.AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=[1, 1],
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.4,
    )


def sana(kind, scheduler=None, sizes=None, **parts):
    transformer = diffusers.SanaTransformer2DModel(patch_size=1, **_SIZES | (sizes or {}))
    return assemble(kind, vae=vae(), transformer=transformer, scheduler=scheduler or flow(shift=3.0), **parts)


def perturbed_attention(kind):
    return sana(kind, pag_applied_layers=["blocks.0"])


def controlnet(kind):
    return sana(kind, controlnet=diffusers.SanaControlNetModel(patch_size=1, **_SIZES | {"num_layers": 1}))


def sprint(kind):
    return sana(kind, diffusers.SCMScheduler(), {"qk_norm": "rms_norm_across_heads", "guidance_embeds": True})


def video(kind):
    sizes = {"in_channels": 16, "out_channels": 16, "attention_head_dim": 12, "cross_attention_head_dim": 12}
    transformer = diffusers.SanaVideoTransformer3DModel(
        **_SIZES | sizes | {"cross_attention_dim": 24}, patch_size=(1, 2, 2), rope_max_seq_len=32
    )
    scheduler = flow(shift=3.0) if "Image" in kind.__name__ else diffusers.DPMSolverMultistepScheduler()
    return assemble(kind, vae=wan_vae(), transformer=transformer, scheduler=scheduler)


_CALL = MASKED | {"height": 32, "width": 32, "use_resolution_binning": False}
_OFF = {"guidance_scale": 1.0}
_ON = NEGATIVE_MASKED | {"guidance_scale": 4.5, "negative_prompt": None}  # an empty one is the default


def _add(name, builder, more=None):
    call = _CALL | (more or {})
    pipeline(name, builder, plain=Case(call | _OFF, 1), guided=Case(call | _ON, 1))


_add("SanaPipeline", sana)
_add("SanaPAGPipeline", perturbed_attention)
_add("SanaControlNetPipeline", controlnet, {"control_image": image(32)})
_add("SanaVideoPipeline", video, {"frames": 9})
_add("SanaImageToVideoPipeline", video, {"frames": 9, "image": image(32)})
_SPRINT = _CALL | {"intermediate_timesteps": None}
pipeline("SanaSprintPipeline", sprint, plain=Case(_SPRINT, 1), few=Case(_CALL | {"num_inference_steps": 2}, 1))
pipeline("SanaSprintImg2ImgPipeline", sprint, plain=Case(_SPRINT | {"image": image(32), "strength": 1.0}, 1))
