"""Models that see text and picture together: Mochi, HiDream, PRX, Kandinsky 5."""

import diffusers
import torch

from helpers import families
from helpers.families import image_vae
from pipelines.parts import NEGATIVE, TEXT, WIDTH, flow, image, ones, randn
from pipelines.records import Case, assemble, pipeline


def mochi(kind):
    return assemble(kind, **families.mochi().components)


def hidream(kind):
    own = families.hidream(text_emb_dim=WIDTH)
    return assemble(kind, scheduler=flow(), vae=own.vae, transformer=own.transformer)


def prx(kind):
    transformer = diffusers.PRXTransformer2DModel(
        in_channels=3 if "Pixel" in kind.__name__ else 4,
        patch_size=2,
        context_in_dim=WIDTH,
        hidden_size=16,
        num_heads=2,
        depth=2,
        axes_dim=[4, 4],
    )
    return assemble(kind, transformer=transformer, scheduler=flow(), vae=image_vae(), default_sample_size=16)


def kandinsky5(kind):
    video, start = "2V" in kind.__name__, "I2" in kind.__name__
    if video:
        vae = diffusers.AutoencoderKLHunyuanVideo(
            latent_channels=4, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2
        )
    else:  # the pipelines count on a factor of 8
        vae = diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(4, 4, 4, 4),
            norm_num_groups=2,
        )
    transformer = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        in_text_dim=WIDTH,
        in_text_dim2=WIDTH,
        time_dim=16,
        out_visual_dim=4,
        patch_size=(1, 2, 2),
        model_dim=16,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 2, 2),
        visual_cond=video or start,
        attention_type="regular",
    )
    pipe = assemble(kind, transformer=transformer, vae=vae, scheduler=flow())
    if not video:
        pipe.resolutions = [(32, 32)]
    return pipe


_OFF = {"guidance_scale": 1.0}
_ON = {"guidance_scale": 4.5}

_MOCHI = {"prompt_embeds": randn(1, 16, WIDTH), "prompt_attention_mask": ones(1, 16).bool()}
_MOCHI_NEGATIVE = {
    "negative_prompt_embeds": randn(1, 16, WIDTH, seed=6),
    "negative_prompt_attention_mask": ones(1, 16).bool(),
}
_MOCHI |= {"height": 32, "width": 32, "num_frames": 7}
pipeline("MochiPipeline", mochi, plain=Case(_MOCHI | _OFF, 1), guided=Case(_MOCHI | _MOCHI_NEGATIVE | _ON, 1))

_HIDREAM = {
    "prompt_embeds_t5": randn(1, 7, WIDTH),
    "prompt_embeds_llama3": randn(2, 1, 7, WIDTH),
    "pooled_prompt_embeds": randn(1, WIDTH),
    "height": 32,
    "width": 32,
}
_HIDREAM_NEGATIVE = {
    "negative_prompt_embeds_t5": randn(1, 7, WIDTH, seed=6),
    "negative_prompt_embeds_llama3": randn(2, 1, 7, WIDTH, seed=6),
    "negative_pooled_prompt_embeds": randn(1, WIDTH, seed=6),
}
pipeline(
    "HiDreamImagePipeline", hidream, plain=Case(_HIDREAM | _OFF, 1), guided=Case(_HIDREAM | _HIDREAM_NEGATIVE | _ON, 1)
)

_PRX = TEXT | {"prompt_attention_mask": ones(1, 7).bool(), "height": 16, "width": 16, "use_resolution_binning": False}
_PRX_NEGATIVE = NEGATIVE | {"negative_prompt_attention_mask": ones(1, 7).bool()}
for _name in ("PRXPipeline", "PRXPixelPipeline"):
    _output = {"output_type": "pt"} if "Pixel" in _name else {}
    pipeline(_name, prx, plain=Case(_PRX | _output | _OFF, 1), guided=Case(_PRX | _output | _PRX_NEGATIVE | _ON, 1))

_KANDINSKY = {
    "prompt_embeds_qwen": randn(1, 7, WIDTH),
    "prompt_embeds_clip": randn(1, WIDTH),
    "prompt_cu_seqlens": torch.tensor([0, 7], dtype=torch.int32),
    "height": 32,
    "width": 32,
}
_KANDINSKY_NEGATIVE = {
    "negative_prompt_embeds_qwen": randn(1, 5, WIDTH, seed=6),
    "negative_prompt_embeds_clip": randn(1, WIDTH, seed=7),
    "negative_prompt_cu_seqlens": torch.tensor([0, 5], dtype=torch.int32),
}
for _name, _more in {
    "Kandinsky5T2IPipeline": {},
    "Kandinsky5I2IPipeline": {"image": image(32)},
    "Kandinsky5T2VPipeline": {"num_frames": 5},
    "Kandinsky5I2VPipeline": {"num_frames": 21, "image": image(32)},  # it levels the first four of six
}.items():
    _call = _KANDINSKY | _more
    pipeline(_name, kandinsky5, plain=Case(_call | _OFF, 1), guided=Case(_call | _KANDINSKY_NEGATIVE | _ON, 2))
