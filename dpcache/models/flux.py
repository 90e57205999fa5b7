"""FLUX.1 (Black Forest Labs) and models of its architecture, the embedded `tiny_flux` among them."""

import functools
from pathlib import Path

import torch
from diffusers import FluxPipeline

EMBEDDED = Path(__file__).parent


@functools.lru_cache(maxsize=1)  # a sweep's jobs share one pipeline
def load(path: str, dtype: str = "bfloat16", device: str = "auto", offload: bool = False) -> FluxPipeline:
    """A `FluxPipeline` ready to sample.

    Args:
        path: a folder in diffusers format, the name of an embedded model (`tiny_flux`), or a hub repository.
        dtype: float32, bfloat16 or float16.
        device: auto (cuda, else mps, else cpu) or a torch device.
        offload: keep only the running component on the GPU (diffusers' model offload).

    Raises:
        FileNotFoundError: no such folder, and the hub has no such repository or cannot be reached.
    """
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"model.dtype={dtype} is not one of float32, bfloat16, float16")
    source = EMBEDDED / path if (EMBEDDED / path / "model_index.json").exists() else Path(path).expanduser()
    try:
        pipe = FluxPipeline.from_pretrained(source if source.exists() else path, dtype=getattr(torch, dtype))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"model.path={path}: no complete model in this folder, and not available from the hub ("
            f"{type(error).__name__}). Download it once with `hf download {path}` (gated models: `hf auth login` "
            "first), or set model.path to a local folder in diffusers format, or use model=tiny_flux, which is included"
        ) from error
    device = default_device() if device == "auto" else device
    if offload:
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.to(device)
    return pipe


def default_device() -> str:
    """cuda, else mps, else cpu."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
