"""Trains `tiny_flux`, the small text-to-image model that ships with the project.

    python scripts/train_tiny_flux.py                 # all stages, resumable: run it again after a kill
    python scripts/train_tiny_flux.py --steps 20000   # go on with a longer schedule

The result is a diffusers `FluxPipeline` on disk: a FLUX transformer, an `AutoencoderKL`, small CLIP and T5 text
encoders with word-level tokenizers, and the flow-matching Euler scheduler with FLUX's resolution shift. The data are
the 64 x 64 Noto emoji of the npm package `emoji-datasource-google` (Apache-2.0) with their Unicode names as prompts.
"""

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
from torch.nn.attention import SDPBackend, sdpa_kernel
from training import DTYPE, load_emoji, train, word_tokenizer
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from dpcache.models import flux

TEXT_LENGTH = 12  # the longest name has 9 words; begin, end and some room


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=64,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def build_denoiser(tokenizer: PreTrainedTokenizerFast) -> torch.nn.ModuleDict:
    """The transformer and the two text encoders, trained together."""
    width = 192
    special = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    clip = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=TEXT_LENGTH,
        **special,
    )
    t5 = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=64,
        d_ff=2 * width,
        num_layers=2,
        num_heads=3,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        **special,
    )
    transformer = flux.FAMILY.transformer_class(
        in_channels=16,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=64,
        num_attention_heads=3,
        joint_attention_dim=width,
        pooled_projection_dim=width,
        guidance_embeds=False,
        axes_dims_rope=(16, 24, 24),
    )
    return torch.nn.ModuleDict(
        {"transformer": transformer, "text_encoder": CLIPTextModel(clip), "text_encoder_2": T5EncoderModel(t5)}
    )


def train_vae(vae: AutoencoderKL, images: torch.Tensor, steps: int, out: Path, device: str) -> dict:
    def loss_of(index, generator):
        target = images[index]
        posterior = vae.encode(target).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
        decoded = vae.decode(posterior.mean + posterior.std * noise).sample.float()
        return (
            F.l1_loss(decoded, target) + F.mse_loss(decoded, target) + 1e-3 * posterior.kl().mean() / noise[0].numel()
        )

    report = train("vae", vae, loss_of, steps, 2e-3, 16, len(images), out, device)
    vae.eval()
    measured = out / "vae.json"  # takes a minute on a CPU, so it is kept for the next start
    if not measured.exists() or (statistics := json.loads(measured.read_text()))["steps"] != steps:
        with torch.no_grad():
            latents = torch.cat([vae.encode(chunk).latent_dist.mean for chunk in images.split(64)])
            error = torch.cat([vae.decode(z).sample.clip(-1, 1) for z in latents.split(64)]) - images
        statistics = report | {
            "psnr": (10 * torch.log10(4 / error.pow(2).mean((1, 2, 3)))).mean().item(),
            "shift_factor": latents.mean().item(),
            "scaling_factor": 1 / latents.std().item(),
        }
        measured.write_text(json.dumps(statistics))
    vae.register_to_config(**{name: statistics[name] for name in ("shift_factor", "scaling_factor")})
    return statistics


@torch.no_grad()
def encode(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Packed, normalised latents (N, 64, 16) as the pipeline sees them."""
    mean = torch.cat([vae.encode(chunk).latent_dist.mean for chunk in images.split(64)])
    latents = (mean - vae.config.shift_factor) * vae.config.scaling_factor
    return FluxPipeline._pack_latents(latents, len(latents), 4, 16, 16)


def train_denoiser(
    denoiser: torch.nn.ModuleDict,
    vae: AutoencoderKL,
    tokenizer: PreTrainedTokenizerFast,
    images: torch.Tensor,
    names: Sequence[str],
    steps: int,
    out: Path,
    device: str,
) -> dict:
    latents = encode(vae, images)
    tokens = tokenizer([*names, ""], padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt").input_ids.to(
        device
    )
    image_ids = FluxPipeline._prepare_latent_image_ids(1, 8, 8, device, torch.float32)
    text_ids = torch.zeros(TEXT_LENGTH, 3, device=device)

    def loss_of(index, generator):
        clean, batch = latents[index], len(index)
        noise = torch.randn(clean.shape, generator=generator).to(device)
        # Logit-normal noise levels, centred where the sampler's resolution shift puts its middle step.
        sigma = torch.sigmoid(0.467 + torch.randn(batch, generator=generator)).to(device)
        drop = (torch.rand(batch, generator=generator) < 0.05).to(device)
        ids = tokens[torch.where(drop, len(names), index)]
        mix = sigma[:, None, None]
        velocity = denoiser["transformer"](
            hidden_states=(1 - mix) * clean + mix * noise,
            timestep=sigma,
            pooled_projections=denoiser["text_encoder"](ids).pooler_output,
            encoder_hidden_states=denoiser["text_encoder_2"](ids).last_hidden_state,
            img_ids=image_ids,
            txt_ids=text_ids,
        ).sample
        return F.mse_loss(velocity.float(), noise - clean)

    for block in [*denoiser["transformer"].transformer_blocks, *denoiser["transformer"].single_transformer_blocks]:
        block.compile()
    # At 76 tokens the plain attention is several times as fast on a CPU as the fused one's backward pass.
    with sdpa_kernel([SDPBackend.MATH] if device == "cpu" else list(SDPBackend.__members__.values())):
        return train("denoiser", denoiser, loss_of, steps, 1e-3, 64, len(images), out, device)


def build_pipeline(
    denoiser: torch.nn.ModuleDict, vae: AutoencoderKL, tokenizer: PreTrainedTokenizerFast
) -> FluxPipeline:
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15),
        vae=vae.eval(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        **{name: module.eval() for name, module in denoiser.items()},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=9000, help="of the transformer and text encoders, batch 64")
    parser.add_argument("--vae-steps", type=int, default=1500, help="of the autoencoder, batch 16")
    parser.add_argument("--work", type=Path, default=Path("outputs/train_tiny_flux"), help="data and checkpoints")
    parser.add_argument("--out", type=Path, default=Path("dpcache/models/tiny_flux"), help="the finished pipeline")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--snapshot", action="store_true", help="export the latest checkpoint's EMA and stop")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)

    every, images, names = load_emoji(args.work / "data")
    every, images = every.to(args.device), images.to(args.device)
    tokenizer = word_tokenizer(names, TEXT_LENGTH)
    vae, denoiser = build_vae().to(args.device), build_denoiser(tokenizer).to(args.device)
    report = {"images": len(names)}
    report["vae"] = train_vae(vae, every, args.vae_steps, args.work, args.device)
    print(json.dumps(report), f"{sum(p.numel() for p in denoiser.parameters()):,} parameters to train")
    if args.snapshot:
        state = torch.load(args.work / "denoiser.pt", map_location=args.device, weights_only=True)
        denoiser.load_state_dict(state["ema"])
        report["denoiser"] = {"steps": state["step"], "loss": state["log"][-1][1]}
    else:
        report["denoiser"] = train_denoiser(denoiser, vae, tokenizer, images, names, args.steps, args.work, args.device)
    build_pipeline(denoiser, vae, tokenizer).to(dtype=DTYPE).save_pretrained(args.out)
    random.Random(0).shuffle(names)  # so that both ends of the list have prompts of every kind
    (args.out / "prompts.txt").write_text("\n".join(names) + "\n")
    (args.work / "report.json").write_text(json.dumps(report, indent=1))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
