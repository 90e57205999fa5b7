"""Trains `tiny_dit`, the small class-to-image model that ships with the project.

    python scripts/train_tiny_dit.py                 # all stages, resumable: run it again after a kill
    python scripts/train_tiny_dit.py --steps 20000   # go on with a longer schedule

The result is a diffusers `DiTPipeline` on disk: a DiT with classifier-free guidance in the latents of a small
`AutoencoderKL`, and the DDIM scheduler with DiT's linear betas. The data are the 60,000 training images of
Fashion-MNIST (MIT), which Debian packages as `dataset-fashion-mnist`.
"""

import argparse
import json
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from training import DTYPE, load_fashion, save, train

from dpcache.models import dit

LABELS = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
NULL = 1000  # the class of an unconditional prediction, which DiTPipeline takes for granted
DROPPED = 0.1  # share of the training labels replaced by it


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(24, 48),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def build_transformer() -> torch.nn.Module:
    transformer = dit.FAMILY.transformer_class(
        num_attention_heads=4,
        attention_head_dim=32,
        num_layers=8,
        in_channels=4,
        out_channels=4,  # given, because the pipeline halves it to find out whether the variance is learned
        sample_size=16,
        patch_size=2,
        num_embeds_ada_norm=NULL,
        norm_num_groups=4,
    )
    for block in transformer.transformer_blocks:
        torch.nn.init.zeros_(block.norm1.linear.weight)  # adaLN-Zero: every block starts as the identity
        embedder = block.norm1.emb.class_embedder
        embedder.dropout_prob = 0  # else every block would drop other labels; `loss_of` drops them for all blocks alike
        torch.nn.init.normal_(embedder.embedding_table.weight, std=0.02)
        embedder.embedding_table.weight.data[len(LABELS) : NULL] = 0  # never used, so they stay zero
    torch.nn.init.zeros_(transformer.proj_out_2.weight)
    return transformer


def pixels(images: torch.Tensor) -> torch.Tensor:
    return images / 127.5 - 1


def train_vae(vae: AutoencoderKL, images: torch.Tensor, steps: int, out: Path, device: str) -> dict:
    def loss_of(index, generator):
        target = pixels(images[index])
        posterior = vae.encode(target).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
        decoded = vae.decode(posterior.mean + posterior.std * noise).sample.float()
        return (
            F.l1_loss(decoded, target) + F.mse_loss(decoded, target) + 1e-2 * posterior.kl().mean() / noise[0].numel()
        )

    report = train("vae", vae, loss_of, steps, 2e-3, 32, len(images), out, device)
    vae.eval()
    return report


@torch.no_grad()
def encode(vae: AutoencoderKL, images: torch.Tensor, steps: int, out: Path, device: str) -> tuple[torch.Tensor, dict]:
    """Latents (N, 4, 16, 16) of unit standard deviation, as the pipeline sees them, and the measurements of the VAE.

    Sets the VAE's scaling factor. It takes minutes on a CPU, so the latents are kept for the next start.
    """
    kept = out / "latents.pt"
    if not kept.exists() or (state := torch.load(kept, map_location=device, weights_only=True))["steps"] != steps:
        with torch.autocast(device, DTYPE):
            chunks = [vae.encode(pixels(chunk)).latent_dist.mean for chunk in tqdm(images.split(256), desc="latents")]
        state = {"steps": steps, "latents": torch.cat(chunks).float()}
        save(state, kept)
    latents = state["latents"]
    decoded = torch.cat([vae.decode(chunk).sample.clip(-1, 1) for chunk in latents[:2000].split(100)])
    error = (decoded - pixels(images[:2000])).pow(2).mean((1, 2, 3))
    measured = {"psnr": (10 * torch.log10(4 / error)).mean().item(), "scaling_factor": 1 / latents.std().item()}
    vae.register_to_config(scaling_factor=measured["scaling_factor"])
    return latents * measured["scaling_factor"], measured


def train_transformer(
    transformer: torch.nn.Module, latents: torch.Tensor, labels: torch.Tensor, steps: int, out: Path, device: str
) -> dict:
    scheduler = build_scheduler()

    def loss_of(index, generator):
        clean, batch = latents[index], len(index)
        noise = torch.randn(clean.shape, generator=generator).to(device)
        timestep = torch.randint(scheduler.config.num_train_timesteps, (batch,), generator=generator).to(device)
        drop = (torch.rand(batch, generator=generator) < DROPPED).to(device)
        predicted = transformer(
            scheduler.add_noise(clean, noise, timestep),
            timestep=timestep,
            class_labels=torch.where(drop, NULL, labels[index]),
        ).sample
        return F.mse_loss(predicted.float(), noise)

    for block in transformer.transformer_blocks:
        block.compile()
    # At 64 tokens the plain attention is several times as fast on a CPU as the fused one's backward pass.
    with sdpa_kernel([SDPBackend.MATH] if device == "cpu" else list(SDPBackend.__members__.values())):
        return train("transformer", transformer, loss_of, steps, 1e-3, 64, len(latents), out, device)


def build_scheduler() -> DDIMScheduler:
    return DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False)


def build_pipeline(transformer: torch.nn.Module, vae: AutoencoderKL) -> DiTPipeline:
    names = {str(index): label for index, label in enumerate(LABELS)}
    pipe = DiTPipeline(transformer.eval(), vae.eval(), build_scheduler(), names)
    pipe.register_to_config(id2label=names)  # the pipeline reads it from model_index.json, but does not write it
    return pipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4800, help="of the transformer, batch 64")
    parser.add_argument("--vae-steps", type=int, default=1500, help="of the autoencoder, batch 32")
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--work", type=Path, default=Path("outputs/train_tiny_dit"), help="latents and checkpoints")
    parser.add_argument("--out", type=Path, default=Path("dpcache/models/tiny_dit"), help="the finished pipeline")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--snapshot", action="store_true", help="export the latest checkpoint's EMA and stop")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)

    images, labels = (tensor.to(args.device) for tensor in load_fashion(args.data, "train"))
    vae, transformer = build_vae().to(args.device), build_transformer().to(args.device)
    report = {"images": len(images), "vae": train_vae(vae, images, args.vae_steps, args.work, args.device)}
    latents, measured = encode(vae, images, args.vae_steps, args.work, args.device)
    report["vae"] |= measured
    sizes = [sum(p.numel() for p in module.parameters()) for module in (transformer, vae)]
    print(json.dumps(report), "parameters of transformer and VAE: {:,}, {:,}".format(*sizes))
    if args.snapshot:
        state = torch.load(args.work / "transformer.pt", map_location=args.device, weights_only=True)
        transformer.load_state_dict(state["ema"])
        report["transformer"] = {"steps": state["step"], "loss": state["log"][-1][1]}
    else:
        report["transformer"] = train_transformer(transformer, latents, labels, args.steps, args.work, args.device)
    build_pipeline(transformer, vae).to(dtype=DTYPE).save_pretrained(args.out)
    # With another noise a label gives another image, so the list has every label 50 times, in random order.
    prompts = list(LABELS) * 50
    random.Random(0).shuffle(prompts)
    (args.out / "prompts.txt").write_text("\n".join(prompts) + "\n")
    (args.work / "report.json").write_text(json.dumps(report, indent=1))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
