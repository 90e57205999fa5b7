"""LTX-2, which denoises a video and its sound together."""

from dpcache.models.family import Block, Family, Streams

FAMILY = Family(
    "LTX2VideoTransformer3DModel",
    blocks=(
        Block(
            "LTX2VideoTransformerBlock",
            streams=Streams(other="audio_hidden_states", other_index=1, both=True),
            kept=(
                "attn1",
                "attn2",
                "ff",
                "audio_attn1",
                "audio_attn2",
                "audio_ff",
                "audio_to_video_attn",
                "video_to_audio_attn",
            ),
            attention="attn1",
        ),
    ),
)
