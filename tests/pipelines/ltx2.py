"""LTX-2: video and sound, two outputs and two schedulers."""

from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition
from diffusers.pipelines.ltx2.pipeline_ltx2_hdr_lora import LTX2HDRReferenceCondition
from diffusers.pipelines.ltx2.pipeline_ltx2_ic_lora import LTX2ReferenceCondition

from helpers import families
from pipelines.parts import MASKED, NEGATIVE_MASKED, image, video
from pipelines.records import Case, assemble, pipeline, unbuilt


def ltx2(kind, **sizes):
    return assemble(kind, **families.ltx2(text_layers=0, **sizes).components)


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
