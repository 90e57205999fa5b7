"""FLUX.2 of Black Forest Labs."""

from dpcache.models.family import Block, Family

FAMILY = Family(
    "Flux2Transformer2DModel",
    blocks=(
        Block("Flux2TransformerBlock", part="double", kept=("attn", "ff", "ff_context")),
        # Its attention holds the feed-forward as well.
        Block("Flux2SingleTransformerBlock", part="single", text_first=True, kept=("attn",)),
    ),
)
