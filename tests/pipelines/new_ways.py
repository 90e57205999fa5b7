"""Pipelines with a loop of their own: a second transformer without the text, flow maps, video in chunks."""

from functools import partial

import diffusers

from helpers import families
from pipelines.parts import NEGATIVE, TEXT, WIDTH, flow, randn
from pipelines.records import Case, assemble, pipeline

_TOKENS = 7


def ideogram(kind):
    """A second transformer makes the unconditional prediction, without text. In place of the text encoder's layers
    come features of the same shape."""

    def transformer():
        return diffusers.Ideogram4Transformer2DModel(
            in_channels=16,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            intermediate_size=32,
            adaln_dim=16,
            llm_features_dim=WIDTH,
            mrope_section=(4, 2, 2),
        )

    pipe = assemble(
        kind,
        scheduler=flow(),
        vae=families.image_vae(),
        transformer=transformer(),
        unconditional_transformer=transformer(),
    )

    def encode_prompt(pipe, prompt, grid_h, grid_w, max_sequence_length, device):
        ids = pipe._prepare_ids([max_sequence_length], grid_h, grid_w, max_sequence_length, device)
        features = randn(1, max_sequence_length + grid_h * grid_w, WIDTH)
        features[:, max_sequence_length:] = 0
        return features, *ids

    pipe.encode_prompt = partial(encode_prompt, pipe)
    return pipe


def any_flow(kind):
    return assemble(
        kind,
        transformer=diffusers.AnyFlowTransformer3DModel(**families.WAN, rope_max_seq_len=32),
        vae=families.wan_vae(),
        scheduler=diffusers.FlowMapEulerDiscreteScheduler(),
    )


def helios(kind):
    return assemble(
        kind,
        transformer=diffusers.HeliosTransformer3DModel(**families.WAN, rope_dim=(4, 4, 4)),
        vae=families.wan_vae(),
        scheduler=diffusers.HeliosScheduler(stage_range=[0, 1], stages=1, use_dynamic_shifting=True),
    )


_OFF = {"guidance_scale": 1.0}
_ON = {"guidance_scale": 5.0}
_SCHEDULE = {"guidance_scale": 5.0, "guidance_schedule": None}

pipeline(
    "Ideogram4Pipeline",
    ideogram,
    guided=Case({"prompt": "two boats", "height": 32, "width": 32, "max_sequence_length": _TOKENS} | _SCHEDULE, 2),
)
_VIDEO = TEXT | {"height": 32, "width": 32, "num_frames": 9}
pipeline(
    "AnyFlowPipeline",
    any_flow,
    plain=Case(_VIDEO | _OFF, 1),
    guided=Case(_VIDEO | NEGATIVE | _ON, 1),
)
_CHUNKS = _VIDEO | {"num_latent_frames_per_chunk": 3, "history_sizes": [2, 1, 1]}
pipeline(
    "HeliosPipeline",
    helios,
    plain=Case(_CHUNKS | _OFF, 1),
    guided=Case(_CHUNKS | NEGATIVE | _ON, 2),
    chunks=Case(_CHUNKS | NEGATIVE | _ON | {"num_frames": 18}, 2),
)
