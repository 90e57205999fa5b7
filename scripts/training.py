"""What the training scripts share: the training loop with its checkpoints, the data, a word-level tokenizer."""

import copy
import gzip
import json
import math
import os
import subprocess
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

VERSION = "16.0.0"  # of the npm packages emoji-datasource-*
GROUPS = ("Smileys & Emotion", "Animals & Nature", "Food & Drink", "Activities", "Objects", "Travel & Places")
DTYPE = torch.bfloat16  # of the shipped weights and of autocast


def load_emoji(cache: Path, artist: str = "google") -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Images (N, 3, 64, 64) in [-1, 1] on white: of every base emoji, and of GROUPS only, with their N names.

    `cache` holds the download of one `artist`, a suffix of the npm packages emoji-datasource-*.
    """
    folder = cache / "package"
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", f"emoji-datasource-{artist}@{VERSION}"]
        name = subprocess.run(command, cwd=cache, check=True, capture_output=True, text=True)
        with tarfile.open(cache / name.stdout.split()[-1]) as archive:
            members = [m for m in archive if f"/img/{artist}/64/" in m.name or m.name.endswith("/emoji.json")]
            archive.extractall(cache, members, filter="data")
    every, images, names = [], [], []
    for emoji in json.loads((folder / "emoji.json").read_text()):
        if not emoji[f"has_img_{artist}"]:
            continue
        sprite = Image.open(folder / "img" / artist / "64" / emoji["image"]).convert("RGBA").resize((64, 64))
        image = Image.alpha_composite(Image.new("RGBA", sprite.size, "white"), sprite).convert("RGB")
        every.append(torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1)
        if emoji["category"] in GROUPS:
            images.append(every[-1])
            names.append(emoji["name"].lower().replace("’", "'"))
    return torch.stack(every), torch.stack(images), names


def load_fashion(folder: Path, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Fashion-MNIST's uint8 images (N, 3, 32, 32), grey on black with a margin of 2, and their labels (N,), 0 to 9.

    `folder` holds its .gz files, `split` is train (60,000) or t10k (10,000), the test set.
    """
    if not (folder / f"{split}-images-idx3-ubyte.gz").exists():
        raise SystemExit(f"{folder} has no Fashion-MNIST: apt-get install dataset-fashion-mnist, or --data FOLDER")
    with gzip.open(folder / f"{split}-images-idx3-ubyte.gz") as file:
        grey = torch.frombuffer(bytearray(file.read()), dtype=torch.uint8, offset=16).view(-1, 1, 28, 28)
    with gzip.open(folder / f"{split}-labels-idx1-ubyte.gz") as file:
        labels = torch.frombuffer(bytearray(file.read()), dtype=torch.uint8, offset=8).long()
    return F.pad(grey, (2, 2, 2, 2)).repeat(1, 3, 1, 1), labels


def word_tokenizer(names: list[str], length: int) -> PreTrainedTokenizerFast:
    """One token per word of the names, between begin and end; at most `length` of them."""
    special = ["<pad>", "<unk>", "<s>", "</s>"]
    words = sorted({word for name in names for word in name.split()})
    vocabulary = {word: index for index, word in enumerate(special + words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace("’", "'")])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", vocabulary["<s>"]), ("</s>", vocabulary["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=length,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    )


def save(state: dict, path: Path) -> None:
    """Writes a checkpoint atomically: after a kill the last complete one is there."""
    torch.save(state, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


def train(
    name: str,
    model: torch.nn.Module,
    loss_of: Callable[[torch.Tensor, torch.Generator], torch.Tensor],
    steps: int,
    learning_rate: float,
    batch: int,
    size: int,
    out: Path,
    device: str,
    checkpoint_every: int = 250,
) -> dict:
    """AdamW with warm-up and a linear decay over the last third, EMA and checkpoints. At the end `model` has the EMA
    weights. Returns the number of steps and the last mean loss."""
    path = out / f"{name}.pt"
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    start, log = 0, []
    if path.exists():
        state = torch.load(path, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        start, log = state["step"], state["log"]
    model.train()
    losses, began = [], time.time()
    for step in (bar := tqdm(range(start, steps), desc=name, initial=start, total=steps, mininterval=2)):
        generator = torch.Generator().manual_seed(step)  # a resumed run then sees the same batches
        index = torch.randperm(size, generator=generator)[:batch]
        with torch.autocast(device, DTYPE):
            loss = loss_of(index.to(device), generator)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1, (step + 1) / 200, max(0.02, 3 * (1 - step / steps)))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(0.999, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
        losses.append(loss.item())
        if (step + 1) % checkpoint_every == 0 or step + 1 == steps:
            log.append([step + 1, sum(losses) / len(losses), time.time() - began])
            losses.clear()
            bar.set_postfix(loss=f"{log[-1][1]:.4f}")
            state = {"model": model.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict()}
            save(state | {"step": step + 1, "log": log}, path)
    model.load_state_dict(ema.state_dict())
    return {"steps": steps, "loss": log[-1][1] if log else math.nan}
