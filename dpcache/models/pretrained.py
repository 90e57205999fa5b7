"""Any diffusers pipeline from a folder or the hub, the models that ship with the project among them."""

import functools
from collections.abc import Mapping
from pathlib import Path

import diffusers
import torch

from dpcache.errors import SettingError
from dpcache.models import expectation

EMBEDDED = Path(__file__).parent


def load(
    path: str,
    dtype: str = "bfloat16",
    device: str = "auto",
    offload: bool = False,
    vae_dtype: str | None = None,
    vae_tiling: bool = False,
    scheduler: Mapping | None = None,
) -> "diffusers.DiffusionPipeline":
    """A pipeline ready to sample, of the class that the model names in its `model_index.json`.

    Args:
        path: a folder in diffusers format, the name of an embedded model (`tiny_flux`), or a hub repository.
        dtype: float32, bfloat16 or float16.
        device: auto (cuda, else mps, else cpu) or a torch device.
        offload: keep only the running component on the GPU (diffusers' model offload).
        vae_dtype: of the VAE alone; None: `dtype`.
        vae_tiling: decode in tiles, for large images and videos, and one sample of a batch after the other.
        scheduler: `name` of a scheduler class of diffusers (None: the model's own), and settings that differ from the
            model's.

    Raises:
        FileNotFoundError: no such folder, and the hub has no such repository or cannot be reached.
        SettingError: an unknown dtype or scheduler; an embedded model does not make what it should, see
            `dpcache.models.expectation`.
    """
    dtypes = {"default": float_type("dtype", dtype), "vae": float_type("vae_dtype", vae_dtype or dtype)}
    source = folder_of(path)
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(source if source.exists() else path, dtype=dtypes)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"model.path={path}: no complete model in this folder, and not available from the hub ("
            f"{type(error).__name__}). Download it once with `hf download {path}` (gated models: `hf auth login` "
            "first), or set model.path to a local folder in diffusers format, or use model=tiny_flux, which is included"
        ) from error
    expectation.check(source, functools.partial(expectation.make, pipe))
    settings = dict(scheduler or {})
    name = settings.pop("name", None) or type(pipe.scheduler).__name__
    if settings or name != type(pipe.scheduler).__name__:
        if not hasattr(getattr(diffusers, name, None), "set_timesteps"):
            raise SettingError(f"model.scheduler.name={name} is not a scheduler of diffusers")
        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **settings)
    if vae_dtype not in (None, dtype):
        _cast_for(pipe.vae)
    if vae_tiling:
        pipe.vae.enable_tiling()
        if hasattr(pipe.vae, "use_slicing"):
            pipe.vae.enable_slicing()
    device = default_device() if device == "auto" else device
    if offload:
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.to(device)
    return pipe


def folder_of(path: str) -> Path:
    """Of an embedded model, or of the local one. A repository on the hub has none: nothing is there."""
    return EMBEDDED / path if (EMBEDDED / path / "model_index.json").exists() else Path(path).expanduser()


def float_type(setting: str, name: str) -> torch.dtype:
    """A dtype by its name in `model.{setting}`. Raises SettingError for any that models are not run in."""
    if name not in ("float32", "bfloat16", "float16"):
        raise SettingError(f"model.{setting}={name} is not one of float32, bfloat16, float16")
    return getattr(torch, name)


def _cast_for(vae) -> None:
    """Let a VAE decode latents of another dtype: the pipelines of DiT, FLUX and Stable Diffusion 3 do not cast them."""
    for module in (getattr(vae, "post_quant_conv", None), vae.decoder):
        if module is not None:
            module.register_forward_pre_hook(lambda module, args: (args[0].to(vae.dtype), *args[1:]))


def default_device() -> str:
    """cuda, else mps, else cpu."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
