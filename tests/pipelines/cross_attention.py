"""Models that read the text by cross-attention and predict the noise: PixArt, Latte, Allegro, Hunyuan-DiT; and DiT."""

import diffusers

from helpers import families
from helpers.families import image_vae
from pipelines.parts import MASKED, NEGATIVE, NEGATIVE_MASKED, TEXT, WIDTH, image, ones, randn
from pipelines.records import Case, assemble, pipeline

_SIZES = {"num_attention_heads": 2, "in_channels": 4, "num_layers": 2, "sample_size": 8, "patch_size": 2}


def pixart(kind, **parts):
    transformer = diffusers.PixArtTransformer2DModel(
        **_SIZES,
        attention_head_dim=8,
        out_channels=8,
        cross_attention_dim=16,
        caption_channels=WIDTH,
        use_additional_conditions=False,
    )
    return assemble(kind, vae=image_vae(), transformer=transformer, scheduler=diffusers.DDIMScheduler(), **parts)


def pixart_perturbed(kind):
    return pixart(kind, pag_applied_layers=["blocks.0"])


def latte(kind):
    transformer = diffusers.LatteTransformer3DModel(
        **_SIZES,
        attention_head_dim=8,
        out_channels=8,
        caption_channels=WIDTH,
        cross_attention_dim=16,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
    )
    return assemble(kind, vae=image_vae(), transformer=transformer, scheduler=diffusers.DDIMScheduler())


def allegro(kind):
    vae = diffusers.AutoencoderKLAllegro(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), norm_num_groups=2, layers_per_block=1
    )
    transformer = diffusers.AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=24,
        sample_width=8,
        sample_height=8,
        sample_frames=8,
        caption_channels=WIDTH,
    )
    return assemble(kind, vae=vae, transformer=transformer, scheduler=diffusers.EulerAncestralDiscreteScheduler())


_HUNYUAN = {
    "attention_head_dim": 8,
    "cross_attention_dim": WIDTH,
    "cross_attention_dim_t5": WIDTH,
    "pooled_projection_dim": 8,
    "hidden_size": 16,
    "activation_fn": "gelu-approximate",
    "text_len": 7,
    "text_len_t5": 7,
}


def hunyuan_dit(kind, layers=2, **parts):
    return assemble(
        kind,
        vae=image_vae(),
        transformer=diffusers.HunyuanDiT2DModel(**_SIZES | _HUNYUAN | {"num_layers": layers}),
        scheduler=diffusers.DDPMScheduler(),
        requires_safety_checker=False,
        **parts,
    )


def hunyuan_dit_perturbed(kind):
    return hunyuan_dit(kind, pag_applied_layers=["blocks.0"])


def hunyuan_dit_controlnet(kind):
    """The ControlNet has half of the transformer's blocks less one."""
    sizes = {name: size for name, size in (_SIZES | _HUNYUAN).items() if name != "num_layers"}
    net = diffusers.HunyuanDiT2DControlNetModel(**sizes, transformer_num_layers=4)
    return hunyuan_dit(kind, layers=4, controlnet=net)


def dit(kind):
    return families.dit(diffusers.DDIMScheduler)


_OFF = {"guidance_scale": 1.0}
_SIZE = {"height": 16, "width": 16}
_PIXART = MASKED | _SIZE | {"use_resolution_binning": False}
_ON = NEGATIVE_MASKED | {"guidance_scale": 4.5, "negative_prompt": None}  # an empty one is the default


def _add(name, builder, call, on):
    pipeline(name, builder, plain=Case(call | _OFF, 1), guided=Case(call | on, 1))


_add("PixArtAlphaPipeline", pixart, _PIXART, _ON)
_add("PixArtSigmaPipeline", pixart, _PIXART, _ON)
_add("PixArtSigmaPAGPipeline", pixart_perturbed, _PIXART, _ON)
_LATTE = TEXT | _SIZE | {"mask_feature": False, "video_length": 16}  # 16: of the temporal embedding
_add("LattePipeline", latte, _LATTE, NEGATIVE | {"guidance_scale": 4.5, "negative_prompt": None})
_add("AllegroPipeline", allegro, MASKED | {"height": 32, "width": 32, "num_frames": 8}, _ON)
_BOTH = {"prompt_embeds_2": randn(1, 7, WIDTH, seed=8), "prompt_attention_mask_2": ones(1, 7)}
_BOTH_NEGATIVE = {
    "negative_prompt_embeds_2": randn(1, 7, WIDTH, seed=9),
    "negative_prompt_attention_mask_2": ones(1, 7),
}
_DIT = MASKED | _BOTH | _SIZE | {"use_resolution_binning": False}
_add("HunyuanDiTPipeline", hunyuan_dit, _DIT, _ON | _BOTH_NEGATIVE)
_add(
    "HunyuanDiTPAGPipeline",
    hunyuan_dit_perturbed,
    _DIT | {"pag_scale": 0.0},  # without guidance it fails with more
    _ON | _BOTH_NEGATIVE | {"pag_scale": 2.0},
)
_add("HunyuanDiTControlNetPipeline", hunyuan_dit_controlnet, _DIT | {"control_image": image(16)}, _ON | _BOTH_NEGATIVE)
pipeline(
    "DiTPipeline",
    dit,
    plain=Case({"class_labels": [7], "output_type": "np"} | _OFF, 1),
    guided=Case({"class_labels": [7], "output_type": "np", "guidance_scale": 4.0}, 1),
)
