"""LTX-2: video and sound, two outputs and two schedulers."""

import diffusers
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder
from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition
from diffusers.pipelines.ltx2.pipeline_ltx2_hdr_lora import LTX2HDRReferenceCondition
from diffusers.pipelines.ltx2.pipeline_ltx2_ic_lora import LTX2ReferenceCondition

from pipelines.parts import MASKED, NEGATIVE_MASKED, WIDTH, flow, image, video
from pipelines.records import Case, assemble, pipeline, unbuilt


def ltx2(kind, **sizes):
    transformer = diffusers.LTX2VideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        num_layers=2,
        caption_channels=WIDTH,
        rope_double_precision=False,
        rope_type="split",
        **sizes,
    )
    connectors = LTX2TextConnectors(
        caption_channels=WIDTH,
        text_proj_in_factor=1,
        video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=8,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=None,
        audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=8,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None,
        connector_rope_base_seq_len=32,
        rope_theta=10000.0,
        rope_double_precision=False,
        causal_temporal_positioning=False,
        rope_type="split",
    )
    vae = diffusers.AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        layers_per_block=(1,),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        down_block_types=("LTX2VideoDownBlock3D",),
        downsample_type=("spatial",),
        upsample_type=("spatial",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        patch_size=1,
        decoder_causal=False,
    )
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    audio_vae = diffusers.AutoencoderKLLTX2Audio(
        base_channels=4,
        ch_mult=(1,),
        num_res_blocks=1,
        resolution=32,
        latent_channels=2,
        mel_bins=8,
    )
    vocoder = LTX2Vocoder(
        in_channels=2 * 8,
        hidden_channels=32,
        upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3, 5]],
    )
    return assemble(
        kind,
        scheduler=flow(),
        vae=vae,
        audio_vae=audio_vae,
        connectors=connectors,
        transformer=transformer,
        vocoder=vocoder,
    )


def perturbed(kind):
    """With blocks whose self-attention can be left out, for guidance by that."""
    return ltx2(kind, perturbed_attn=True)


_NO_GUIDANCE = {
    "guidance_scale": 1.0,
    "audio_guidance_scale": 1.0,
    "stg_scale": 0.0,
    "audio_stg_scale": 0.0,
    "modality_scale": 1.0,
    "audio_modality_scale": 1.0,
    "guidance_rescale": 0.0,
    "audio_guidance_rescale": 0.0,
    "use_cross_timestep": False,
}
_VIDEO = MASKED | {"height": 32, "width": 32, "num_frames": 5, "frame_rate": 24.0}
_TEXT_GUIDANCE = NEGATIVE_MASKED | {"guidance_scale": 3.0, "audio_guidance_scale": 7.0}
_ALL_GUIDANCE = {
    "stg_scale": 1.0,
    "audio_stg_scale": 1.0,
    "spatio_temporal_guidance_blocks": [1],
    "modality_scale": 3.0,
    "audio_modality_scale": 3.0,
}


def _add(name, more=None):
    plain = _VIDEO | _NO_GUIDANCE | (more or {})
    guided = plain | _TEXT_GUIDANCE
    pipeline(
        name, perturbed, plain=Case(plain, 1), guided=Case(guided, 1), all_guidance=Case(guided | _ALL_GUIDANCE, 3)
    )


_add("LTX2Pipeline")
_add("LTX2ImageToVideoPipeline", {"image": image(32), "image_crf": 0})
_add("LTX2ConditionPipeline", {"conditions": LTX2VideoCondition(frames=image(32), index=0, strength=1.0, crf=0)})
_add("LTX2InContextPipeline", {"reference_conditions": LTX2ReferenceCondition(frames=video(5, 32), strength=1.0)})


def keyframes(kind):
    return ltx2(kind, use_keyframes_abs_pos_embedding=True)


pipeline(
    "LTX2DFRPipeline",
    keyframes,
    plain=Case(_VIDEO | {"use_cross_timestep": False, "sigmas": [1.0, 0.9, 0.7, 0.4, 0.2]}, 1),
)
_HDR = {name: value for name, value in (_VIDEO | _NO_GUIDANCE).items() if "audio" not in name}
_HDR |= {"reference_conditions": LTX2HDRReferenceCondition(frames=video(5, 32), strength=1.0)}
_HDR |= {"output_type": "latent"}
pipeline(
    "LTX2HDRPipeline",
    perturbed,
    plain=Case(_HDR, 1),
    guided=Case(_HDR | NEGATIVE_MASKED | {"guidance_scale": 3.0}, 1),
)
unbuilt("LTX2DFRTemporalRefinePipeline", "takes the layout of a video that LTX2DFRPipeline has made, and an upsampler")
