"""A small random transformer of each family in a plain Euler loop."""

import torch
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    HunyuanVideoTransformer3DModel,
    WanTransformer3DModel,
)

STEPS = [0, 1, 2, 5, 8]


def _flux():
    model = FluxTransformer2DModel(
        in_channels=8,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 6, 6),
    )
    fixed = {
        "encoder_hidden_states": torch.randn(2, 3, 16),
        "pooled_projections": torch.randn(2, 16),
        "img_ids": torch.randn(9, 3),
        "txt_ids": torch.zeros(3, 3),
    }
    return model, torch.randn(2, 9, 8), fixed, 1.0


def _dit():
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        sample_size=6,
        num_embeds_ada_norm=10,
    )
    return model, torch.randn(2, 4, 6, 6), {"class_labels": torch.tensor([1, 2])}, 1000.0


def _wan(**image_to_video):
    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=3,
        rope_max_seq_len=32,
        **image_to_video,
    )
    return model, torch.randn(2, 4, 1, 6, 6), {"encoder_hidden_states": torch.randn(2, 3, 16)}, 1000.0


def _wan_image_to_video():
    model, start, fixed, scale = _wan(image_dim=8, added_kv_proj_dim=32)
    return model, start, fixed | {"encoder_hidden_states_image": torch.randn(2, 257, 8)}, scale


def _hunyuan_video():
    model = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=False,
        text_embed_dim=16,
        pooled_projection_dim=16,
        rope_axes_dim=(4, 6, 6),
    )
    fixed = {
        "encoder_hidden_states": torch.randn(2, 3, 16),
        "encoder_attention_mask": torch.ones(2, 3, dtype=torch.bool),
        "pooled_projections": torch.randn(2, 16),
    }
    return model, torch.randn(2, 4, 1, 6, 6), fixed, 1000.0


MODELS = {
    "flux": _flux,
    "dit": _dit,
    "wan": _wan,
    "wan_image_to_video": _wan_image_to_video,
    "hunyuan_video": _hunyuan_video,
}


class Rollout:
    """A random transformer in a plain Euler loop of T steps: `rollout()` -> final sample."""

    def __init__(self, kind: str, steps: int = 10, dtype=torch.float32):
        torch.manual_seed(0)
        self.model, start, fixed, self.scale = MODELS[kind]()
        self.model = self.model.eval().to(dtype)
        self.start, self.steps = start.to(dtype), steps
        self.fixed = {k: v.to(dtype) if v.is_floating_point() else v for k, v in fixed.items()}

    @torch.no_grad()
    def __call__(self) -> torch.Tensor:
        sample = self.start
        for step in range(self.steps):
            time = torch.full((len(sample),), self.scale * (1 - step / self.steps)).to(
                torch.long if self.scale > 1 else sample.dtype
            )
            velocity = self.model(hidden_states=sample, timestep=time, return_dict=False, **self.fixed)[0]
            sample = sample - velocity / self.steps
        return sample

    @torch.no_grad()
    def branches(self, names, pooled: float = 1.0) -> dict[str, torch.Tensor]:
        """FLUX's final sample in each of the guidance branches "cond" and "uncond" that are named, side by side."""
        prompts = {"cond": self.fixed, "uncond": self.fixed | {"pooled_projections": torch.full((2, 16), pooled)}}
        samples = dict.fromkeys(names, self.start)
        for step in range(self.steps):
            for name in names:
                with self.model.cache_context(name):
                    time = torch.full((2,), 1 - step / self.steps)
                    velocity = self.model(samples[name], timestep=time, return_dict=False, **prompts[name])[0]
                samples[name] = samples[name] - velocity / self.steps
        return samples
