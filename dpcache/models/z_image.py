"""Z-Image."""

from dpcache.models.family import Block, Family

FAMILY = Family(
    "ZImageTransformer2DModel",
    blocks=(Block("ZImageTransformerBlock", kept=("attention", "feed_forward"), attention="attention"),),
)
