"""Trains `tiny_video`, the small text-to-video model that ships with the project.

    python scripts/train_tiny_video.py                # all stages, resumable: run it again after a kill
    python scripts/train_tiny_video.py --steps 20000  # go on with a longer schedule

The result is a diffusers `WanPipeline` on disk: a Wan transformer, an `AutoencoderKLWan`, a small UMT5 encoder with a
word-level tokenizer, and the flow-matching Euler scheduler with a fixed shift. The data are clips in which one of 48
Noto emoji (npm package `emoji-datasource-google`, Apache-2.0) moves over white as the prompt says.
"""

import argparse
import json
import math
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from torch.nn.attention import SDPBackend, sdpa_kernel
from training import DTYPE, load_emoji, train, word_tokenizer
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from dpcache.models import wan

# Emoji whose shapes and colours differ visibly at 20 pixels.
NAMES = (
    "red apple, banana, strawberry, watermelon, pineapple, lemon, grapes, carrot, hamburger, slice of pizza, doughnut, "
    "birthday cake, dog face, cat face, panda face, frog face, pig face, lion face, monkey face, fox face, penguin, "
    "octopus, butterfly, lady beetle, tropical fish, turtle, hatching chick, automobile, bus, fire engine, rocket, "
    "sailboat, tractor, bicycle, helicopter, soccer ball, balloon, umbrella, guitar, wrapped present, alarm clock, "
    "gem stone, crown, sunflower, rose, cactus, evergreen tree, snowman"
)
EMOJI = NAMES.split(", ")
MOTIONS = {  # direction down and to the right
    "moving left": (0, -1),
    "moving right": (0, 1),
    "moving up": (-1, 0),
    "moving down": (1, 0),
    "standing still": (0, 0),
}
PROMPTS = [f"{name} {motion}" for name in EMOJI for motion in MOTIONS]
FRAMES, SIZE, SPRITE = 9, 32, 20
FINE = 3  # clips are drawn this much larger and averaged, so that positions are thirds of a pixel
SPEEDS = (3, 4)  # fine pixels a frame: 8 or 10.7 pixels in all
CLIPS = 16  # of every prompt, to train the transformer on
CHANNELS = 8
TEXT_LENGTH = 8  # the longest prompt has 5 words; begin, end and some room
SHIFT = 3.0


def load_sprites(cache: Path) -> torch.Tensor:
    """The images of EMOJI (48, 3, 60, 60) in [-1, 1]."""
    _, images, names = load_emoji(cache)
    chosen = images[[names.index(name) for name in EMOJI]]
    return F.interpolate(chosen, (SPRITE * FINE,) * 2, mode="bilinear", antialias=True)


def draw(sprites: torch.Tensor, prompts: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A clip (3, FRAMES, SIZE, SIZE) for each index of PROMPTS, from a random place that keeps the emoji in sight."""
    canvas = torch.ones(len(prompts), 3, FRAMES, SIZE * FINE, SIZE * FINE)
    room, side = (SIZE - SPRITE) * FINE, SPRITE * FINE
    for clip, prompt in zip(canvas, prompts.tolist()):
        emoji, motion = divmod(prompt, len(MOTIONS))
        speed = SPEEDS[torch.randint(len(SPEEDS), (), generator=generator)]
        steps = [speed * direction for direction in list(MOTIONS.values())[motion]]
        ways = [(FRAMES - 1) * step for step in steps]
        top, left = (max(0, -way) + int(torch.randint(room - abs(way) + 1, (), generator=generator)) for way in ways)
        for frame in range(FRAMES):
            y, x = top + frame * steps[0], left + frame * steps[1]
            clip[:, frame, y : y + side, x : x + side] = sprites[emoji]
    return F.avg_pool3d(canvas, (1, FINE, FINE))


def build_vae() -> AutoencoderKLWan:
    """Wan 2.2's kind of autoencoder: patches of 2 pixels, shortcuts around the blocks; 9 x 32 x 32 to 5 x 8 x 8."""
    return AutoencoderKLWan(
        base_dim=32,
        z_dim=CHANNELS,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[True],
        is_residual=True,
        patch_size=2,
        in_channels=12,
        out_channels=12,
        scale_factor_temporal=2,
        scale_factor_spatial=4,
        latents_mean=[0.0] * CHANNELS,  # until they are measured
        latents_std=[1.0] * CHANNELS,
    )


def build_denoiser(tokenizer: PreTrainedTokenizerFast) -> torch.nn.ModuleDict:
    """The transformer and the text encoder, trained together."""
    text = UMT5Config(
        vocab_size=len(tokenizer),
        d_model=128,
        d_kv=32,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    transformer = wan.FAMILY.transformer_class(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=6,
        num_attention_heads=5,
        attention_head_dim=32,
        ffn_dim=512,
        freq_dim=128,
        text_dim=text.d_model,
        rope_max_seq_len=32,
    )
    return torch.nn.ModuleDict({"transformer": transformer, "text_encoder": UMT5EncoderModel(text)})


@torch.no_grad()
def encode(vae: AutoencoderKLWan, sprites: torch.Tensor, prompts: torch.Tensor, seed: int) -> torch.Tensor:
    """Latents as the pipeline sees them, of a random clip for each index of PROMPTS."""
    generator = torch.Generator().manual_seed(seed)
    chunks = [draw(sprites, chunk, generator).to(vae.device) for chunk in prompts.split(32)]
    latents = torch.cat([vae.encode(chunk).latent_dist.mean for chunk in chunks])
    mean, std = (torch.tensor(c, device=vae.device) for c in (vae.config.latents_mean, vae.config.latents_std))
    return (latents - mean.view(-1, 1, 1, 1)) / std.view(-1, 1, 1, 1)


def decode(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """`vae.decode` without its clamp. With it, a pixel that is whiter than white, as most are at first, would get no
    gradient."""
    chunks = []  # the decoder is called with one latent frame at a time
    hook = vae.decoder.register_forward_hook(lambda module, inputs, output: chunks.append(output))
    vae.decode(latents)
    hook.remove()
    return unpatchify(torch.cat(chunks, 2), vae.config.patch_size).float()


def train_vae(vae: AutoencoderKLWan, sprites: torch.Tensor, steps: int, out: Path, device: str) -> dict:
    def loss_of(index, generator):
        target = draw(sprites, index, generator).to(device)
        posterior = vae.encode(target).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
        decoded = decode(vae, posterior.mean + posterior.std * noise)
        return (
            F.l1_loss(decoded, target) + F.mse_loss(decoded, target) + 1e-3 * posterior.kl().mean() / noise[0].numel()
        )

    report = train("vae", vae, loss_of, steps, 2e-3, 8, len(PROMPTS), out, device)
    vae.eval()
    measured = out / "vae.json"  # takes a minute on a CPU, so it is kept for the next start
    if not measured.exists() or (statistics := json.loads(measured.read_text()))["steps"] != steps:
        generator = torch.Generator().manual_seed(steps)  # clips that training has not seen
        with torch.no_grad():
            clips = draw(sprites, torch.arange(len(PROMPTS)), generator).to(device)
            latents = torch.cat([vae.encode(chunk).latent_dist.mean for chunk in clips.split(32)])
            error = torch.cat([vae.decode(z).sample for z in latents.split(32)]) - clips
        statistics = report | {
            "psnr": (10 * torch.log10(4 / error.pow(2).mean((1, 2, 3, 4)))).mean().item(),
            "latents_mean": latents.mean((0, 2, 3, 4)).tolist(),
            "latents_std": latents.std((0, 2, 3, 4)).tolist(),
        }
        measured.write_text(json.dumps(statistics))
    vae.register_to_config(**{name: statistics[name] for name in ("latents_mean", "latents_std")})
    return statistics


def train_denoiser(
    denoiser: torch.nn.ModuleDict,
    vae: AutoencoderKLWan,
    tokenizer: PreTrainedTokenizerFast,
    sprites: torch.Tensor,
    steps: int,
    out: Path,
    device: str,
) -> dict:
    latents = encode(vae, sprites, torch.arange(len(PROMPTS)).repeat_interleave(CLIPS), seed=0)
    text = tokenizer([*PROMPTS, ""], padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt").to(device)

    def loss_of(index, generator):
        clean, batch = latents[index], len(index)
        noise = torch.randn(clean.shape, generator=generator).to(device)
        # Logit-normal noise levels, centred on the sampler's middle step.
        sigma = torch.sigmoid(math.log(SHIFT) + 1.2 * torch.randn(batch, generator=generator)).to(device)
        drop = (torch.rand(batch, generator=generator) < 0.1).to(device)
        chosen = torch.where(drop, len(PROMPTS), index // CLIPS)
        ids, mask = text.input_ids[chosen], text.attention_mask[chosen]
        words = denoiser["text_encoder"](ids, mask).last_hidden_state * mask[:, :, None]  # zeros, as in the pipeline
        mix = sigma[:, None, None, None, None]
        velocity = denoiser["transformer"](
            hidden_states=(1 - mix) * clean + mix * noise, timestep=1000 * sigma, encoder_hidden_states=words
        ).sample
        return F.mse_loss(velocity.float(), noise - clean)

    for block in denoiser["transformer"].blocks:
        block.compile()
    # At 80 tokens the plain attention is several times as fast on a CPU as the fused one's backward pass.
    with sdpa_kernel([SDPBackend.MATH] if device == "cpu" else list(SDPBackend.__members__.values())):
        return train("denoiser", denoiser, loss_of, steps, 1e-3, 24, len(latents), out, device)


def build_pipeline(
    denoiser: torch.nn.ModuleDict, vae: AutoencoderKLWan, tokenizer: PreTrainedTokenizerFast
) -> WanPipeline:
    return WanPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=vae.eval(),
        tokenizer=tokenizer,
        **{name: module.eval() for name, module in denoiser.items()},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3900, help="of the transformer and text encoder, batch 24")
    parser.add_argument("--vae-steps", type=int, default=1500, help="of the autoencoder, batch 8")
    parser.add_argument("--work", type=Path, default=Path("outputs/train_tiny_video"), help="data and checkpoints")
    parser.add_argument("--out", type=Path, default=Path("dpcache/models/tiny_video"), help="the finished pipeline")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--snapshot", action="store_true", help="export the latest checkpoint's EMA and stop")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)

    sprites = load_sprites(args.work / "data")
    tokenizer = word_tokenizer(PROMPTS, TEXT_LENGTH)
    vae, denoiser = build_vae().to(args.device), build_denoiser(tokenizer).to(args.device)
    report = {"prompts": len(PROMPTS), "vae": train_vae(vae, sprites, args.vae_steps, args.work, args.device)}
    print(json.dumps(report), f"{sum(p.numel() for p in denoiser.parameters()):,} parameters to train", flush=True)
    if args.snapshot:
        state = torch.load(args.work / "denoiser.pt", map_location=args.device, weights_only=True)
        denoiser.load_state_dict(state["ema"])
        report["denoiser"] = {"steps": state["step"], "loss": state["log"][-1][1]}
    else:
        report["denoiser"] = train_denoiser(denoiser, vae, tokenizer, sprites, args.steps, args.work, args.device)
    build_pipeline(denoiser, vae, tokenizer).to(dtype=DTYPE).save_pretrained(args.out)
    prompts = random.Random(0).sample(PROMPTS, len(PROMPTS))  # so that both ends of the list have prompts of every kind
    (args.out / "prompts.txt").write_text("\n".join(prompts) + "\n")
    (args.work / "report.json").write_text(json.dumps(report, indent=1))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
