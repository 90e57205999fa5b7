"""Measures how well `tiny_video` does what its prompts say.

    python scripts/evaluate_tiny_video.py

It samples clips of the first prompts of the model's list in 50 steps. On these, and on as many training clips, it
measures two things:

* motion: how far the centroid of all pixels that are not white moves from the first frame to the last. Below 4 pixels
  the clip counts as standing still, else as moving along the axis of the larger component.
* emoji: which of the 48 is nearest, by the squared distance to each frame at the best whole-pixel place, summed over
  the frames.

With --grid PATH it also draws the first 16 clips, every second frame.
"""

import argparse
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import WanPipeline
from PIL import Image, ImageDraw
from tqdm import tqdm
from train_tiny_video import EMOJI, FINE, FRAMES, MOTIONS, PROMPTS, SIZE, TEXT_LENGTH, draw, load_sprites

from dpcache.models.pretrained import EMBEDDED

STILL = 4  # pixels; the slowest motion of the training clips makes 8


def centroids(clips: torch.Tensor) -> torch.Tensor:
    """Centroids of all pixels that are not white, (B, frames, 2), as (down, right)."""
    mass = (1 - clips).mean(1)
    at = torch.arange(SIZE, dtype=mass.dtype)
    down, right = (mass.sum(axis) @ at for axis in (3, 2))
    return torch.stack([down, right], -1) / mass.sum((2, 3))[..., None].clamp(min=1e-6)


def motion_of(way: torch.Tensor) -> str:
    if way.abs().max() < STILL:
        return "standing still"
    axis = int(way.abs().argmax())
    direction = [0, 0]
    direction[axis] = int(way[axis].sign())
    return next(name for name, value in MOTIONS.items() if value == tuple(direction))


def nearest(clips: torch.Tensor, sprites: torch.Tensor) -> torch.Tensor:
    """The index of EMOJI for each clip."""
    ink = 1 - F.avg_pool2d(sprites, FINE)  # white is 0, and so what is outside of a sprite or a frame
    frames = (1 - clips).transpose(1, 2)
    fit = F.conv2d(frames.flatten(0, 1), ink).amax((2, 3)).view(*frames.shape[:2], -1)
    return (ink.square().sum((1, 2, 3)) - 2 * fit).sum(1).argmin(1)


def report(what: str, clips: torch.Tensor, prompts: list[str], sprites: torch.Tensor) -> None:
    path = centroids(clips)
    ways = path[:, -1] - path[:, 0]
    found = [(EMOJI[emoji], motion_of(way)) for emoji, way in zip(nearest(clips, sprites), ways)]
    asked = [(EMOJI[i // len(MOTIONS)], list(MOTIONS)[i % len(MOTIONS)]) for i in map(PROMPTS.index, prompts)]
    emoji, motion = (sum(f[i] == a[i] for f, a in zip(found, asked)) / len(asked) for i in (0, 1))
    print(f"{what}, {len(asked)} clips: motion right {motion:.1%}, emoji right {emoji:.1%}, length of the way", end=" ")
    lengths = {name: [way.norm().item() for way, a in zip(ways, asked) if a[1] == name] for name in MOTIONS}
    print(", ".join(f"{name} {statistics.mean(length):.1f} px" for name, length in lengths.items() if length))
    for prompt, f, a, (down, right) in zip(prompts, found, asked, ways.tolist()):
        if f != a:
            print(f"  {prompt}: {' '.join(f)} ({right:+.1f} right, {down:+.1f} down)")


def draw_grid(clips: torch.Tensor, prompts: list[str], path: Path, columns: int = 2, scale: int = 3) -> None:
    """Every second frame of each clip, over its prompt."""
    frames = range(0, FRAMES, 2)
    cell = (SIZE * scale + 2) * len(frames) + 14, SIZE * scale + 18
    page = Image.new("RGB", (columns * cell[0], -(-len(clips) // columns) * cell[1]), "lightgrey")
    pen = ImageDraw.Draw(page)
    for i, (clip, prompt) in enumerate(zip(clips, prompts)):
        left, top = i % columns * cell[0] + 8, i // columns * cell[1] + 2
        for n, frame in enumerate(frames):
            pixels = ((clip[:, frame] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
            image = Image.fromarray(pixels).resize((SIZE * scale,) * 2, Image.Resampling.NEAREST)
            page.paste(image, (left + n * (SIZE * scale + 2), top))
        pen.text((left, top + SIZE * scale + 1), prompt, "black")
    page.save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=EMBEDDED / "tiny_video")
    parser.add_argument("--data", type=Path, default=Path("outputs/train_tiny_video/data"), help="of the training")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--batch", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--grid", type=Path)
    args = parser.parse_args()

    prompts = (args.model / "prompts.txt").read_text().splitlines()[: args.prompts]
    sprites = load_sprites(args.data)
    pipe = WanPipeline.from_pretrained(args.model, dtype=torch.float32)
    pipe.set_progress_bar_config(leave=False)
    clips = []
    for start in tqdm(range(0, len(prompts), args.batch), desc="sampling"):
        chunk = prompts[start : start + args.batch]
        video = pipe(
            chunk,
            height=SIZE,
            width=SIZE,
            num_frames=FRAMES,
            num_inference_steps=50,
            guidance_scale=args.guidance,
            max_sequence_length=TEXT_LENGTH,
            generator=[torch.Generator().manual_seed(start + i) for i in range(len(chunk))],
            output_type="pt",
        ).frames
        clips.append(2 * video.float().transpose(1, 2) - 1)
    clips = torch.cat(clips)
    index = torch.tensor([PROMPTS.index(prompt) for prompt in prompts])
    report("generated", clips, prompts, sprites)
    report("drawn", draw(sprites, index, torch.Generator().manual_seed(0)), prompts, sprites)
    if args.grid:
        draw_grid(clips[:16], prompts, args.grid)


if __name__ == "__main__":
    main()
