"""Trains `tiny_clip`, the small CLIP that scores the images of `tiny_flux`, and prints how well it finds their names.

    python scripts/train_tiny_clip.py                        # resumable: run it again after a kill
    python scripts/train_tiny_clip.py --hold-out-every 11    # leaves out 94 names and images, and tests with these

The result is a folder that open_clip loads as `local-dir:FOLDER`: its configuration, its weights and a byte-level BPE
tokenizer. The data are those of `tiny_flux`: 1,026 Noto emoji and their names. It is tested on drawings that it has not
seen: Twitter's emoji of the same names, which are downloaded for this only.
"""

import argparse
import json
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch.nn.attention import SDPBackend, sdpa_kernel
from training import DTYPE, load_emoji, train
from transformers import PreTrainedTokenizerFast

CONTEXT = 24  # tokens; the longest name takes 15
WORDS = 1000  # tokens of the vocabulary


def subword_tokenizer(names: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE learned from the names, so that any text has tokens. The end token has the highest index, because
    open_clip's text encoder takes its summary at the token of the highest index."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace("’", "'")])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=WORDS - 1,
        special_tokens=["<pad>", "<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(names, trainer)
    tokenizer.add_special_tokens(["</s>"])
    end = tokenizer.token_to_id("</s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", tokenizer.token_to_id("<s>")), ("</s>", end)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=CONTEXT,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
    )


def configuration(vocabulary: int) -> dict:
    """open_clip's own format."""
    vision = {"image_size": 64, "patch_size": 8, "width": 128, "layers": 3, "head_width": 32}
    text = {"context_length": CONTEXT, "vocab_size": vocabulary, "width": 128, "heads": 4, "layers": 2}
    return {
        "model_cfg": {
            "embed_dim": 128,
            "vision_cfg": vision,
            "text_cfg": text | {"hf_tokenizer_name": "tiny_clip"},  # read from the folder, under any name
        },
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"},
    }


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Turned, scaled, moved, recoloured and blurred copies of images (B, 3, 64, 64) in [-1, 1] on white. Never
    mirrored: some names tell left from right."""

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return (low + (high - low) * torch.rand(len(images), *shape, generator=generator)).to(images.device)

    angle, scale = uniform(-0.3, 0.3), uniform(0.8, 1.35)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    rows = [torch.stack([cos, -sin, uniform(-0.2, 0.2)], 1), torch.stack([sin, cos, uniform(-0.2, 0.2)], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), images.shape, align_corners=False)
    moved = F.grid_sample(images - 1, grid, align_corners=False) + 1  # white outside
    small = F.interpolate(F.interpolate(moved, 32, mode="area"), 64, mode="bilinear")
    moved = torch.lerp(moved, small, uniform(0, 1, 1, 1, 1))
    grey = moved.mean(1, keepdim=True)
    coloured = torch.lerp(grey, moved, uniform(0.4, 1.4, 1, 1, 1))
    tint = uniform(0.8, 1.2, 3, 1, 1) * uniform(0.7, 1.1, 1, 1, 1)
    noise = torch.randn(moved.shape, generator=generator).to(images.device)
    return (1 - tint * (1 - coloured) + 0.05 * noise).clamp(-1, 1)


@torch.no_grad()
def retrieval(model: open_clip.CLIP, images: torch.Tensor, tokens: torch.Tensor, own: torch.Tensor) -> dict:
    """Share of images whose own name, `tokens[own[i]]`, is the nearest of all, and among the five nearest."""
    found = torch.cat([model.encode_image(chunk, normalize=True) for chunk in images.split(128)])
    similarity = found @ model.encode_text(tokens, normalize=True).T
    rank = (similarity > similarity.gather(1, own[:, None])).sum(1)
    top = {f"top{k}": (rank < k).float().mean().item() for k in (1, 5)}
    return {"images": len(images), "names": len(tokens)} | top


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1600, help="batch 128")
    parser.add_argument("--hold-out-every", type=int, metavar="N", help="do not train on the names 0, N, 2 N ...")
    parser.add_argument("--work", type=Path, default=Path("outputs/train_tiny_clip"), help="data and checkpoints")
    parser.add_argument(
        "--out", type=Path, help="the finished model; default: the one that ships, or with names held out one in --work"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    out = args.out or (args.work / "held_out" if args.hold_out_every else Path("dpcache/models/tiny_clip"))
    torch.manual_seed(0)

    _, images, names = load_emoji(args.work / "google")
    _, drawings, drawn = load_emoji(args.work / "twitter", "twitter")
    tokenizer = subword_tokenizer(names)
    config = configuration(len(tokenizer))
    model = open_clip.CLIP(**config["model_cfg"]).to(args.device)
    ids = tokenizer(names, padding="max_length", max_length=CONTEXT, return_tensors="pt").input_ids.to(args.device)
    images = images.to(args.device)
    held = set(range(0, len(names), args.hold_out_every)) if args.hold_out_every else set()
    kept = torch.tensor([index for index in range(len(names)) if index not in held])

    def loss_of(index, generator):
        chosen = kept.to(args.device)[index]
        found = model.encode_image(augment(images[chosen], generator), normalize=True)
        logits = model.logit_scale.exp().clamp(max=100) * found @ model.encode_text(ids[chosen], normalize=True).T
        target = torch.arange(len(index), device=args.device)
        return (F.cross_entropy(logits.float(), target) + F.cross_entropy(logits.float().T, target)) / 2

    name = f"clip_without_{len(held)}" if held else "clip"
    # At 65 tokens the plain attention is several times as fast on a CPU as the fused one's backward pass.
    with sdpa_kernel([SDPBackend.MATH] if args.device == "cpu" else list(SDPBackend.__members__.values())):
        report = train(name, model, loss_of, args.steps, 1e-3, 128, len(kept), args.work, args.device)

    out.mkdir(parents=True, exist_ok=True)
    (out / "open_clip_config.json").write_text(json.dumps(config, indent=1) + "\n")
    tokenizer.save_pretrained(out)
    weights = {key: value.to(DTYPE).contiguous() for key, value in model.state_dict().items()}
    save_file(weights, out / "open_clip_model.safetensors", {"format": "pt"})

    finished = open_clip.create_model_from_pretrained(f"local-dir:{out}", return_transform=False).eval().to(args.device)
    known = [(index, names.index(name)) for index, name in enumerate(drawn) if name in names]
    theirs, own = (torch.tensor(column, device=args.device) for column in zip(*known))
    report["trained_images"] = retrieval(finished, images[kept], ids, kept.to(args.device))
    report["other_drawings"] = retrieval(finished, drawings.to(args.device)[theirs], ids, own)
    if held:
        rest = torch.tensor(sorted(held), device=args.device)
        report["held_out_names_among_themselves"] = retrieval(
            finished, images[rest], ids[rest], torch.arange(len(rest), device=args.device)
        )
        report["held_out_names_among_all"] = retrieval(finished, images[rest], ids, rest)
    (args.work / f"{name}.json").write_text(json.dumps(report, indent=1))
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
