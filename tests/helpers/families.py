"""Every model family as a whole pipeline of diffusers: the real classes, tiny, with random weights.

Nothing can be downloaded for tests, so text and image encoders, VAEs and transformers are made from small configs and
the tokenizers from a list of words. Pipelines are imported where they are made, so that one which the installed
transformers is too old for fails alone. What a family's config in `conf/model` sets (guidance, scheduler, learned
variance, starting image) is the same here.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import diffusers
import torch
from diffusers.utils import load_image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModel,
    Gemma2Config,
    Gemma2Model,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

PROMPTS = ("a red fox in the snow", "two boats", "a city at night", "an old clock")  # of different lengths
IMAGE = load_image(str(Path(__file__).parents[2] / "dpcache/models/tiny_flux/grid.png"))
CHAT_OF_PARTS = "{% for message in messages %}{{ message.content[0].text }} {% endfor %}"
CHAT = "{% for message in messages %}{{ message.content }} {% endfor %}"
TEMPLATE = "describe this picture : {}"
MASK = IMAGE.convert("L").point(lambda value: 255 * (value > 128))
TEMPLATE_TOKENS = 5  # of the tokens before the prompt: <s> and four words
WIDTH = 16


def tokenizer(length: int, **options) -> PreTrainedTokenizerFast:
    """One token per word, between begin and end."""
    words = ["<pad>", "<unk>", "<s>", "</s>", *sorted({w for text in [*PROMPTS, TEMPLATE] for w in text.split()})]
    vocabulary = {word: index for index, word in enumerate(words)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[(name, vocabulary[name]) for name in ("<s>", "</s>")]
    )
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=length, **special, **options)


_VOCABULARY = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}


def clip_text(kind=CLIPTextModel, length: int = 12):
    config = CLIPTextConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=length,
        **_VOCABULARY,
    )
    return kind(config)


def t5(kind=T5EncoderModel, config=T5Config, width: int = WIDTH):
    return kind(
        config(d_model=width, d_kv=8, d_ff=2 * width, num_layers=1, num_heads=2, dropout_rate=0.0, **_VOCABULARY)
    )


def image_vae(channels: int = 4) -> diffusers.AutoencoderKL:
    """Halves the resolution."""
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        norm_num_groups=2,
        latent_channels=channels,
        sample_size=16,
        shift_factor=0.1,
        scaling_factor=0.5,
    )


def wan_vae() -> diffusers.AutoencoderKLWan:
    return diffusers.AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)


def flux(
    kind: str = "FluxPipeline", guidance_embeds: bool = True, in_channels: int = 16
) -> diffusers.DiffusionPipeline:
    return getattr(diffusers, kind)(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=image_vae(),
        text_encoder=clip_text(),
        tokenizer=tokenizer(12),
        text_encoder_2=t5(),
        tokenizer_2=tokenizer(12),
        transformer=diffusers.FluxTransformer2DModel(
            in_channels=in_channels,
            out_channels=16,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=(4, 6, 6),
        ),
    )


def qwen3() -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(
        Qwen3Config(
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
            **_VOCABULARY,
        )
    )


def flux2(kind: str = "Flux2KleinPipeline", **sizes) -> diffusers.DiffusionPipeline:
    """FLUX.2-dev's text encoder is another one, which is not needed for its transformer."""
    return getattr(diffusers, kind)(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=diffusers.AutoencoderKLFlux2(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(4, 4),
            norm_num_groups=2,
            latent_channels=4,
            sample_size=16,
        ),
        text_encoder=qwen3(),
        tokenizer=tokenizer(12, chat_template=CHAT if kind == "Flux2KleinPipeline" else CHAT_OF_PARTS),
        transformer=diffusers.Flux2Transformer2DModel(
            **{
                "in_channels": 16,
                "num_layers": 1,
                "num_single_layers": 2,
                "attention_head_dim": 16,
                "num_attention_heads": 2,
                "joint_attention_dim": 2 * WIDTH,
                "timestep_guidance_channels": 32,
                "axes_dims_rope": (4, 4, 4, 4),
                "guidance_embeds": kind == "Flux2Pipeline",
            }
            | sizes
        ),
    )


def z_image(channels: int = 4) -> diffusers.DiffusionPipeline:
    return diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=image_vae(channels),
        text_encoder=qwen3(),
        tokenizer=tokenizer(12, chat_template=CHAT),
        transformer=diffusers.ZImageTransformer2DModel(
            in_channels=channels,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=WIDTH,
            axes_dims=[8, 4, 4],
            axes_lens=[256, 32, 32],
        ),
    )


def pixart_sigma() -> diffusers.DiffusionPipeline:
    return diffusers.PixArtSigmaPipeline(
        tokenizer=tokenizer(300),
        text_encoder=t5(),
        vae=image_vae(),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
        transformer=diffusers.PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            sample_size=8,
            cross_attention_dim=32,
            caption_channels=WIDTH,
            use_additional_conditions=False,
        ),
    )


def chroma() -> diffusers.DiffusionPipeline:
    return diffusers.ChromaPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=image_vae(),
        text_encoder=t5(),
        tokenizer=tokenizer(12),
        transformer=diffusers.ChromaTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            axes_dims_rope=(4, 6, 6),
            approximator_num_channels=16,
            approximator_hidden_dim=32,
            approximator_layers=1,
        ),
    )


def hunyuan_image() -> diffusers.DiffusionPipeline:
    pipe = diffusers.HunyuanImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
        vae=diffusers.AutoencoderKLHunyuanImage(
            in_channels=3,
            out_channels=3,
            latent_channels=4,
            block_out_channels=(32, 64),
            layers_per_block=1,
            scaling_factor=0.5,
            spatial_compression_ratio=2,
            sample_size=16,
        ),
        text_encoder=qwen2_vl(),
        tokenizer=tokenizer(64),
        text_encoder_2=t5(),
        tokenizer_2=tokenizer(12),
        transformer=diffusers.HunyuanImageTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=1,
            num_single_layers=2,
            num_refiner_layers=1,
            text_embed_dim=WIDTH,
            text_embed_2_dim=WIDTH,
            rope_axes_dim=(8, 8),
        ),
        guider=diffusers.AdaptiveProjectedMixGuidance(),
    )
    pipe.prompt_template_encode, pipe.prompt_template_encode_start_idx = TEMPLATE, TEMPLATE_TOKENS
    pipe.tokenizer_max_length, pipe.tokenizer_2_max_length = 12, 4
    return pipe


def lumina2() -> diffusers.DiffusionPipeline:
    text = Gemma2Config(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        **_VOCABULARY,
    )
    return diffusers.Lumina2Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=image_vae(),
        text_encoder=Gemma2Model(text),
        tokenizer=tokenizer(64),
        transformer=diffusers.Lumina2Transformer2DModel(
            sample_size=4,
            in_channels=4,
            hidden_size=24,
            num_layers=2,
            num_refiner_layers=1,
            num_attention_heads=3,
            num_kv_heads=1,
            multiple_of=16,
            axes_dim_rope=(4, 2, 2),
            axes_lens=(64, 32, 32),
            cap_feat_dim=WIDTH,
        ),
    )


def hidream(text_emb_dim: int = 2 * WIDTH) -> diffusers.DiffusionPipeline:
    """Every token goes to both experts."""
    llama = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        attn_implementation="eager",
        **_VOCABULARY,
    )
    pipe = diffusers.HiDreamImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=image_vae(),
        text_encoder=clip_text(CLIPTextModelWithProjection),
        tokenizer=tokenizer(12),
        text_encoder_2=clip_text(CLIPTextModelWithProjection),
        tokenizer_2=tokenizer(12),
        text_encoder_3=t5(),
        tokenizer_3=tokenizer(12),
        text_encoder_4=LlamaForCausalLM(llama),
        tokenizer_4=tokenizer(12),
        transformer=diffusers.HiDreamImageTransformer2DModel(
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=4,
            caption_channels=[WIDTH, WIDTH],
            text_emb_dim=text_emb_dim,
            num_routed_experts=2,
            num_activated_experts=2,
            axes_dims_rope=(4, 2, 2),
            max_resolution=(32, 32),
            llama_layers=(0, 1),
        ),
    )
    pipe.default_sample_size = 8  # all pictures are enlarged to about this many latents
    return pipe


def dit(scheduler) -> diffusers.DiffusionPipeline:
    names = {index: f"class {index}, number {index}" for index in range(1000)}
    return diffusers.DiTPipeline(
        transformer=diffusers.DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=8,  # noise and variance
            num_layers=2,
            sample_size=8,
            num_embeds_ada_norm=1000,
        ),
        vae=image_vae(),
        scheduler=scheduler(clip_sample=False),
        id2label=names,
    )


def llama(layers: int) -> LlamaModel:
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=64,
        **_VOCABULARY,
    )
    return LlamaModel(config)


def hunyuan_video() -> diffusers.DiffusionPipeline:
    return diffusers.HunyuanVideoPipeline(
        text_encoder=llama(3),
        tokenizer=tokenizer(64),
        text_encoder_2=clip_text(length=77),
        tokenizer_2=tokenizer(77),
        transformer=diffusers.HunyuanVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=1,
            num_single_layers=2,
            num_refiner_layers=1,
            guidance_embeds=True,
            text_embed_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            rope_axes_dim=(4, 6, 6),
        ),
        vae=diffusers.AutoencoderKLHunyuanVideo(
            latent_channels=4,
            block_out_channels=(4, 4, 4, 4),
            layers_per_block=1,
            norm_num_groups=2,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
    )


def hunyuan_video15(**sizes) -> diffusers.DiffusionPipeline:
    words = tokenizer(12)
    words.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    pipe = diffusers.HunyuanVideo15Pipeline(
        text_encoder=llama(2),
        tokenizer=words,
        text_encoder_2=t5(),
        tokenizer_2=tokenizer(4),
        transformer=diffusers.HunyuanVideo15Transformer3DModel(
            **{
                "in_channels": 9,
                "out_channels": 4,
                "num_attention_heads": 2,
                "attention_head_dim": 8,
                "num_layers": 2,
                "num_refiner_layers": 1,
                "text_embed_dim": WIDTH,
                "text_embed_2_dim": WIDTH,
                "image_embed_dim": WIDTH,
                "rope_axes_dim": (2, 2, 4),
                "target_size": 16,
                "task_type": "t2v",
            }
            | sizes
        ),
        vae=diffusers.AutoencoderKLHunyuanVideo15(
            latent_channels=4,
            block_out_channels=(16, 16),
            layers_per_block=1,
            spatial_compression_ratio=4,
            temporal_compression_ratio=2,
            downsample_match_channel=False,
            upsample_match_channel=False,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=6.0),
    )
    pipe.vae.enable_slicing()  # its attention takes one video alone (diffusers 0.42.1)
    pipe.system_message, pipe.prompt_template_encode_start_idx = "describe :", 2
    pipe.tokenizer_max_length, pipe.tokenizer_2_max_length, pipe.vision_num_semantic_tokens = 12, 4, 3
    return pipe


def ltx2(text_layers: int = 1, **sizes) -> diffusers.DiffusionPipeline:
    """Its text is what the encoder's layers give, with what goes into the first one; 0: of one layer alone."""
    from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder

    connector = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "num_learnable_registers": None}
    vae = diffusers.AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        layers_per_block=(1,),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        down_block_types=("LTX2VideoDownBlock3D",),
        downsample_type=("spatial",),
        upsample_type=("spatial",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        patch_size=4,
        decoder_causal=False,
    )
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    return diffusers.LTX2Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        audio_vae=diffusers.AutoencoderKLLTX2Audio(
            base_channels=4, ch_mult=(1,), num_res_blocks=1, resolution=32, latent_channels=2, mel_bins=8
        ),
        text_encoder=llama(max(text_layers, 1)),
        tokenizer=tokenizer(12),
        connectors=LTX2TextConnectors(
            caption_channels=WIDTH,
            text_proj_in_factor=text_layers + 1,
            **{f"{part}_connector_{name}": value for part in ("video", "audio") for name, value in connector.items()},
            connector_rope_base_seq_len=32,
            rope_theta=10000.0,
            rope_double_precision=False,
            causal_temporal_positioning=False,
            rope_type="split",
        ),
        transformer=diffusers.LTX2VideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            audio_in_channels=4,
            audio_out_channels=4,
            audio_num_attention_heads=2,
            audio_attention_head_dim=4,
            audio_cross_attention_dim=8,
            num_layers=2,
            caption_channels=WIDTH,
            rope_double_precision=False,
            rope_type="split",
            **sizes,
        ),
        vocoder=LTX2Vocoder(
            in_channels=2 * 8,
            hidden_channels=32,
            upsample_kernel_sizes=[4, 4],
            upsample_factors=[2, 2],
            resnet_kernel_sizes=[3],
            resnet_dilations=[[1, 3, 5]],
        ),
    )


def cogvideox(scheduler=diffusers.CogVideoXDPMScheduler, **sizes) -> diffusers.DiffusionPipeline:
    return diffusers.CogVideoXPipeline(
        tokenizer=tokenizer(8),
        text_encoder=t5(),
        vae=diffusers.AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
            temporal_compression_ratio=4,
        ),
        transformer=diffusers.CogVideoXTransformer3DModel(
            **{
                "num_attention_heads": 2,
                "attention_head_dim": 16,
                "in_channels": 4,
                "out_channels": 4,
                "time_embed_dim": 2,
                "text_embed_dim": WIDTH,
                "num_layers": 2,
                "sample_width": 4,
                "sample_height": 4,
                "sample_frames": 9,
                "patch_size": 2,
                "temporal_compression_ratio": 4,
                "max_text_seq_length": 8,
                "use_rotary_positional_embeddings": True,
            }
            | sizes
        ),
        scheduler=scheduler(),
    )


def mochi() -> diffusers.DiffusionPipeline:
    pipe = diffusers.MochiPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=diffusers.AutoencoderKLMochi(
            latent_channels=12,  # the pipeline takes no other
            out_channels=3,
            encoder_block_out_channels=(32, 32, 32, 32),
            decoder_block_out_channels=(32, 32, 32, 32),
            layers_per_block=(1, 1, 1, 1, 1),
        ),
        text_encoder=t5(),
        tokenizer=tokenizer(12),
        transformer=diffusers.MochiTransformer3DModel(
            patch_size=2,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            pooled_projection_dim=8,
            in_channels=12,
            text_embed_dim=WIDTH,
            time_embed_dim=4,
            max_sequence_length=16,
        ),
    )
    with torch.no_grad():
        for block in pipe.transformer.transformer_blocks:  # else what they add changes by less than rounding
            block.norm1.linear.weight.mul_(1.5)
    return pipe


WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": WIDTH,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 2,
}
"""Sizes of a small transformer of Wan's kind."""


def wan_transformer(**other) -> diffusers.WanTransformer3DModel:
    return diffusers.WanTransformer3DModel(**WAN | {"rope_max_seq_len": 32} | other)


def wan_scheduler() -> diffusers.UniPCMultistepScheduler:
    return diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)


def wan21_t2v(two: bool = False, token_times: bool = False) -> diffusers.DiffusionPipeline:
    """With `two` transformers as Wan2.2, the first of which runs the noisier steps; with `token_times` as Wan2.2's
    TI2V, which is told the time of every token."""
    return diffusers.WanPipeline(
        tokenizer=tokenizer(512),
        text_encoder=t5(UMT5EncoderModel, UMT5Config),
        vae=wan_vae(),
        scheduler=wan_scheduler(),
        transformer=wan_transformer(),
        transformer_2=wan_transformer() if two else None,
        boundary_ratio=0.875 if two else None,
        expand_timesteps=token_times,
    )


def wan21_i2v() -> diffusers.DiffusionPipeline:
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    return diffusers.WanImageToVideoPipeline(
        tokenizer=tokenizer(512),
        text_encoder=t5(UMT5EncoderModel, UMT5Config),
        image_encoder=CLIPVisionModel(vision),
        image_processor=CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}),
        vae=wan_vae(),
        scheduler=wan_scheduler(),
        transformer=wan_transformer(in_channels=36, image_dim=WIDTH, added_kv_proj_dim=24),
    )


def qwen2_vl() -> Qwen2_5_VLForConditionalGeneration:
    layers = {"intermediate_size": 2 * WIDTH, "hidden_size": WIDTH}
    text = layers | {
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
    }
    vision = layers | {"depth": 1, "num_heads": 2, "out_hidden_size": WIDTH}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text | _VOCABULARY, vision_config=vision))


def qwen_image() -> diffusers.DiffusionPipeline:
    pipe = diffusers.QwenImagePipeline(
        text_encoder=qwen2_vl(),
        tokenizer=tokenizer(64),
        transformer=diffusers.QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            axes_dims_rope=(4, 6, 6),
        ),
        vae=diffusers.AutoencoderKLQwenImage(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )
    pipe.prompt_template_encode, pipe.prompt_template_encode_start_idx = TEMPLATE, TEMPLATE_TOKENS
    return pipe


def sd3() -> diffusers.DiffusionPipeline:
    return diffusers.StableDiffusion3Pipeline(
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            caption_projection_dim=32,
            joint_attention_dim=2 * WIDTH,
            pooled_projection_dim=2 * WIDTH,
            out_channels=4,
            pos_embed_max_size=8,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=image_vae(),
        text_encoder=clip_text(CLIPTextModelWithProjection),
        tokenizer=tokenizer(12),
        text_encoder_2=clip_text(CLIPTextModelWithProjection),
        tokenizer_2=tokenizer(12),
        text_encoder_3=t5(width=2 * WIDTH),
        tokenizer_3=tokenizer(12),
    )


@dataclass(frozen=True)
class Family:
    """How to make a pipeline and call it.

    Attributes:
        branches: its guidance branches, in the order in which it calls the transformer; those of one batch are one.
        config: the family's file in conf/model.
        further: a family that has little of its own: what takes long is tried on a part of it.
    """

    build: Callable[[], diffusers.DiffusionPipeline]
    call: Mapping
    branches: tuple[str, ...] = ("cond",)
    prompts: tuple[str, ...] = PROMPTS
    config: str | None = None
    further: bool = False

    def make(self) -> diffusers.DiffusionPipeline:
        """The same weights each time."""
        torch.manual_seed(0)
        pipe = self.build()
        pipe.set_progress_bar_config(disable=True)
        for component in pipe.components.values():
            if isinstance(component, torch.nn.Module):
                component.eval()
        return pipe


_BOTH = ("cond", "uncond")
_UNNAMED = ("default", "default #2")
_TOGETHER = ("cond_uncond",)  # in one batch
_CLASS = {"guidance_scale": 4.0}
_IMAGE = {"height": 16, "width": 16, "max_sequence_length": 12}
_VIDEO = {"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 12}
_NEGATIVE = {"negative_prompt": "an old clock at night"}
_TEMPLATE = {"prompt_template": {"template": TEMPLATE, "crop_start": TEMPLATE_TOKENS}}
_LAYERS = {"guidance_scale": 4.0, "text_encoder_out_layers": (1, 2)}
_CLASSES = ("7", "class 2", "999", "number 31")

FAMILIES = {
    "flux": Family(flux, _IMAGE | {"guidance_scale": 3.5}, config="flux"),
    "flux_true_cfg": Family(
        functools.partial(flux, guidance_embeds=False), _IMAGE | _NEGATIVE | {"true_cfg_scale": 3.0}, _BOTH
    ),
    "dit_ddim": Family(functools.partial(dit, diffusers.DDIMScheduler), _CLASS, ("default",), _CLASSES, "dit"),
    "dit_ddpm": Family(functools.partial(dit, diffusers.DDPMScheduler), _CLASS, ("default",), _CLASSES),
    "hunyuan_video": Family(hunyuan_video, _VIDEO | _TEMPLATE | {"guidance_scale": 6.0}, config="hunyuan_video"),
    "wan21_t2v": Family(wan21_t2v, _VIDEO | _NEGATIVE | {"guidance_scale": 6.0}, _BOTH, config="wan21_t2v"),
    # Its attention takes all but the last 512 tokens for the image's.
    "wan21_i2v": Family(
        wan21_i2v,
        _VIDEO | _NEGATIVE | {"guidance_scale": 5.0, "image": IMAGE, "max_sequence_length": 512},
        _BOTH,
        config="wan21_i2v",
    ),
    "hunyuan_video15": Family(
        hunyuan_video15,
        _NEGATIVE | {"height": 16, "width": 16, "num_frames": 5},
        ("pred_cond", "pred_uncond"),
        config="hunyuan_video15",
    ),
    "ltx2": Family(
        ltx2,
        _NEGATIVE
        | _VIDEO
        | {"frame_rate": 24.0, "guidance_scale": 4.0, "audio_guidance_scale": 4.0, "use_cross_timestep": False}
        | dict.fromkeys(("guidance_rescale", "audio_guidance_rescale", "stg_scale", "audio_stg_scale"), 0.0)
        | dict.fromkeys(("modality_scale", "audio_modality_scale"), 1.0),
        _TOGETHER,
        config="ltx2",
    ),
    "cogvideox": Family(
        cogvideox,
        _NEGATIVE | {"height": 32, "width": 32, "num_frames": 9, "guidance_scale": 6.0, "max_sequence_length": 8},
        _TOGETHER,
        config="cogvideox",
    ),
    "mochi": Family(
        mochi,
        _NEGATIVE | {"height": 32, "width": 32, "num_frames": 1, "guidance_scale": 4.5, "max_sequence_length": 12},
        _TOGETHER,
        config="mochi",
    ),
    "qwen_image": Family(qwen_image, _IMAGE | _NEGATIVE | {"true_cfg_scale": 4.0}, _BOTH, config="qwen_image"),
    "sd3": Family(sd3, _IMAGE | _NEGATIVE | {"guidance_scale": 5.0}, ("default",), config="sd35_medium"),
}
"""By name; those below have little of their own."""
FAMILIES |= {
    name: replace(family, further=True)
    for name, family in {
        "flux2": Family(functools.partial(flux2, "Flux2Pipeline"), _IMAGE | _LAYERS, ("default",), config="flux2"),
        "flux2_klein": Family(flux2, _IMAGE | _LAYERS, _BOTH, config="flux2_klein_base"),
        "flux_kontext": Family(
            functools.partial(flux, "FluxKontextPipeline"),
            _IMAGE | {"guidance_scale": 2.5, "image": IMAGE.resize((16, 16)), "max_area": 256, "_auto_resize": False},
            ("default",),
        ),
        "flux_fill": Family(
            functools.partial(flux, "FluxFillPipeline", in_channels=3 * 16),
            _IMAGE | {"guidance_scale": 30.0, "image": IMAGE, "mask_image": MASK},
            ("default",),
        ),
        "z_image": Family(z_image, _IMAGE | _NEGATIVE | {"guidance_scale": 4.0}, ("default",), config="z_image"),
        "pixart_sigma": Family(
            pixart_sigma,
            _IMAGE | {"guidance_scale": 4.5, "use_resolution_binning": False, "clean_caption": False},
            ("default",),
        ),
        "chroma": Family(chroma, _IMAGE | _NEGATIVE | {"guidance_scale": 3.0}, _UNNAMED, config="chroma"),
        "hunyuan_image": Family(
            hunyuan_image, _NEGATIVE | {"height": 16, "width": 16}, ("pred_cond", "pred_uncond"), config="hunyuan_image"
        ),
        "lumina2": Family(
            lumina2,
            _NEGATIVE
            | {
                "height": 32,
                "width": 32,
                "system_prompt": "describe",
                "guidance_scale": 4.0,
                "max_sequence_length": 16,
            },
            _UNNAMED,
            config="lumina2",
        ),
        "hidream": Family(hidream, _IMAGE | _NEGATIVE | {"guidance_scale": 5.0}, ("default",), config="hidream"),
    }.items()
}
