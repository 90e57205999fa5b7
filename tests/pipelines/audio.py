"""Models for sound: Stable Audio."""

import diffusers
from diffusers.pipelines.stable_audio import StableAudioProjectionModel

from pipelines.parts import NEGATIVE, TEXT, WIDTH, ones
from pipelines.records import Case, assemble, pipeline


def stable_audio(kind):
    vae = diffusers.AutoencoderOobleck(
        encoder_hidden_size=6,
        downsampling_ratios=[1, 2],
        decoder_channels=3,
        decoder_input_channels=3,
        audio_channels=2,
        channel_multiples=[2, 4],
        sampling_rate=4,
    )
    transformer = diffusers.StableAudioDiTModel(
        sample_size=4,
        in_channels=3,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        num_key_value_attention_heads=2,
        out_channels=3,
        cross_attention_dim=WIDTH,
        cross_attention_input_dim=WIDTH,
        global_states_input_dim=2 * WIDTH,
        time_proj_dim=8,
    )
    return assemble(
        kind,
        vae=vae,
        projection_model=StableAudioProjectionModel(
            text_encoder_dim=WIDTH, conditioning_dim=WIDTH, min_value=0, max_value=32
        ),
        transformer=transformer,
        scheduler=diffusers.EDMDPMSolverMultistepScheduler(
            solver_order=2, prediction_type="v_prediction", sigma_data=1.0, sigma_schedule="exponential"
        ),
    )


_CALL = TEXT | {"attention_mask": ones(1, 7), "audio_end_in_s": 2.0}
_ON = NEGATIVE | {"negative_attention_mask": ones(1, 7), "guidance_scale": 7.0}
pipeline(
    "StableAudioPipeline",
    stable_audio,
    plain=Case(_CALL | {"guidance_scale": 1.0}, 1),
    guided=Case(_CALL | _ON, 1),
)
