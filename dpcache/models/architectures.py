"""Transformers without their weights: what is known of them before anything is downloaded.

For plans made in advance (`+dry_run=true`) and for measuring speed, which does not depend on the weights' values.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch

from dpcache.models.pretrained import EMBEDDED

_FLUX = {
    "_class_name": "FluxTransformer2DModel",
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
}
_DIT = {
    "_class_name": "DiTTransformer2DModel",
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "sample_size": 32,
    "patch_size": 2,
}
_HUNYUAN_VIDEO = {
    "_class_name": "HunyuanVideoTransformer3DModel",
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "num_layers": 20,
    "num_single_layers": 40,
    "num_refiner_layers": 2,
    "guidance_embeds": True,
    "text_embed_dim": 4096,
    "pooled_projection_dim": 768,
}
_WAN = {
    "_class_name": "WanTransformer3DModel",
    "num_attention_heads": 40,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "ffn_dim": 13824,
    "num_layers": 40,
}
_QWEN_IMAGE = {
    "_class_name": "QwenImageTransformer2DModel",
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 60,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 3584,
}

PUBLISHED = {
    "black-forest-labs/FLUX.1-dev": _FLUX,
    "black-forest-labs/FLUX.1-schnell": _FLUX | {"guidance_embeds": False},
    "facebook/DiT-XL-2-256": _DIT,
    "facebook/DiT-XL-2-512": _DIT | {"sample_size": 64},
    "hunyuanvideo-community/HunyuanVideo": _HUNYUAN_VIDEO,
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": _WAN | {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": _WAN,
    "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": _WAN | {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120},
    "Qwen/Qwen-Image": _QWEN_IMAGE,
}
"""Configurations of transformers on the hub, as diffusers takes them."""

EXPERTS = {"Wan-AI/Wan2.2-T2V-A14B-Diffusers": (_WAN, 2)}
"""Of pipelines with so many transformers alike, for a range of steps each."""


@dataclass(frozen=True)
class Architecture:
    """A transformer's configuration (with its `_class_name`), how many pixels and frames a latent stands for, and how
    many such transformers the pipeline has."""

    config: Mapping
    spatial: int = 8
    temporal: int = 4
    count: int = 1

    def build(self, device: str = "meta", dtype: torch.dtype = torch.bfloat16) -> torch.nn.Module:
        """The transformer, with random weights, or on the device "meta" without any. Raises ValueError for a class
        that diffusers does not have."""
        kind = getattr(diffusers, self.config["_class_name"], None)
        if kind is None:
            raise ValueError(f"diffusers has no transformer {self.config['_class_name']}")
        with torch.device(device):
            default, _ = torch.get_default_dtype(), torch.set_default_dtype(dtype)
            try:
                return kind.from_config(dict(self.config)).eval().requires_grad_(False)
            finally:
                torch.set_default_dtype(default)

    def branches(self, call: Mapping) -> list[str]:
        """Guidance branches of a pipeline call, each with calls of the transformer and a history of its own; "default"
        where the pipeline names none."""
        kind = self.config["_class_name"]
        if kind == "DiTTransformer2DModel":
            return ["default"]
        wan = kind == "WanTransformer3DModel"
        guided = call.get("guidance_scale", 5.0) > 1 if wan else call.get("true_cfg_scale", 1.0) > 1
        return ["cond", "uncond"] if guided else ["cond"]

    def inputs(self, call: Mapping, batch_size: int = 1, device="meta", dtype=torch.bfloat16) -> dict:
        """Arguments of the transformer as its pipeline would give them, with random values, for one step of one branch.

        Args:
            call: the pipeline's arguments: height, width, num_frames, max_sequence_length, guidance_scale.

        Raises ValueError for a transformer whose arguments are not known.
        """
        kind, c, B = self.config["_class_name"], self.config, batch_size
        to = {"device": device, "dtype": dtype}
        time = torch.full((B,), 500, device=device)
        if kind == "DiTTransformer2DModel":
            B *= 2 if call.get("guidance_scale", 4.0) > 1 else 1
            latents = torch.randn(B, c["in_channels"], c["sample_size"], c["sample_size"], **to)
            labels = torch.zeros(B, dtype=torch.long, device=device)
            return {"hidden_states": latents, "timestep": time[:1].expand(B), "class_labels": labels}
        height, width = (call[side] // self.spatial for side in ("height", "width"))
        if kind in ("FluxTransformer2DModel", "QwenImageTransformer2DModel"):
            height, width = height // 2, width // 2  # the pipelines pack 2 x 2 latents into a token
            words = call.get("max_sequence_length", 512)
            inputs = {
                "hidden_states": torch.randn(B, height * width, c["in_channels"], **to),
                "timestep": (time / 1000).to(dtype),
                "encoder_hidden_states": torch.randn(B, words, c["joint_attention_dim"], **to),
            }
            if kind == "QwenImageTransformer2DModel":
                return inputs | {"img_shapes": [[(1, height, width)]] * B}
            axes = (torch.arange(size, device=device) for size in (1, height, width))
            positions = torch.cartesian_prod(*axes).to(dtype)
            return inputs | {
                "pooled_projections": torch.randn(B, c["pooled_projection_dim"], **to),
                "img_ids": positions,
                "txt_ids": torch.zeros(words, 3, **to),
                "guidance": torch.full((B,), 3.5, **to) if c.get("guidance_embeds") else None,
            }
        frames = (call.get("num_frames", 1) - 1) // self.temporal + 1
        inputs = {
            "hidden_states": torch.randn(B, c.get("in_channels", 16), frames, height, width, **to),
            "timestep": time,
        }
        if kind == "HunyuanVideoTransformer3DModel":
            words = call.get("max_sequence_length", 256)
            return inputs | {
                "encoder_hidden_states": torch.randn(B, words, c["text_embed_dim"], **to),
                "encoder_attention_mask": torch.ones(B, words, dtype=torch.bool, device=device),
                "pooled_projections": torch.randn(B, c["pooled_projection_dim"], **to),
                "guidance": torch.full((B,), 6000.0, **to) if c.get("guidance_embeds") else None,
            }
        if kind == "WanTransformer3DModel":
            words = call.get("max_sequence_length", 512)
            inputs["encoder_hidden_states"] = torch.randn(B, words, c["text_dim"], **to)
            if c.get("image_dim"):
                inputs["encoder_hidden_states_image"] = torch.randn(B, 257, c["image_dim"], **to)
            return inputs
        raise ValueError(f"the arguments of {kind} are not known")


def architecture(path: str) -> Architecture:
    """Of a folder in diffusers format, an embedded model, or one of `PUBLISHED`. Raises ValueError for any other."""
    folders = [EMBEDDED / path, Path(path).expanduser()]
    for folder in folders:
        if (folder / "transformer" / "config.json").is_file():
            config = json.loads((folder / "transformer" / "config.json").read_text())
            vae = json.loads((folder / "vae" / "config.json").read_text())
            spatial = vae.get("scale_factor_spatial") or vae.get("spatial_compression_ratio")
            spatial = spatial or 2 ** (len(vae.get("block_out_channels", [0] * 4)) - 1)
            temporal = vae.get("scale_factor_temporal") or vae.get("temporal_compression_ratio") or 4
            return Architecture(config, spatial, temporal, 1 + (folder / "transformer_2" / "config.json").is_file())
    if path in PUBLISHED:
        return Architecture(PUBLISHED[path])
    if path in EXPERTS:
        config, count = EXPERTS[path]
        return Architecture(config, count=count)
    known = ", ".join([*PUBLISHED, *EXPERTS])
    raise ValueError(f"model.path={path}: neither a folder in diffusers format nor one of the known {known}")
