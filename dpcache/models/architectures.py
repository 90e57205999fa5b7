"""Transformers without their weights, built from what is known before anything is downloaded.

They serve dry runs (`dry_run=true`) and measurements of speed, which does not depend on the weights' values.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from dpcache.errors import SettingError
from dpcache.models.family import Family, Request, families, family_named
from dpcache.models.pretrained import EMBEDDED


@dataclass(frozen=True)
class Architecture:
    """A transformer's configuration (with its `_class_name`), how many pixels and frames a latent stands for, and how
    many such transformers the pipeline has."""

    config: Mapping
    spatial: int = 8
    temporal: int = 4
    count: int = 1

    @property
    def family(self) -> Family:
        """The record of the transformer's class."""
        return family_named(self.config["_class_name"])

    def branches(self, call: Mapping) -> list[str]:
        """See `Family.branches`."""
        return self.family.branches(call, self.config)

    def build(self, device: str = "meta", dtype: torch.dtype = torch.bfloat16) -> torch.nn.Module:
        """The transformer, with random weights, or on the device "meta" without any, for shapes alone. Raises
        SettingError for a class that diffusers does not have."""
        transformer = self.family.transformer_class
        with torch.device(device):
            default, _ = torch.get_default_dtype(), torch.set_default_dtype(dtype)
            try:
                model = transformer.from_config(dict(self.config)).eval().requires_grad_(False)
            finally:
                torch.set_default_dtype(default)
        if device == "meta" and self.family.shapes_alone is not None:
            self.family.shapes_alone(model)
        return model

    def inputs(
        self,
        call: Mapping,
        batch_size: int = 1,
        device: torch.device | str = "meta",
        dtype: torch.dtype = torch.bfloat16,
        branch: str = "cond",
    ) -> dict:
        """Arguments of the transformer as its pipeline would give them, with random values, for one step of one branch.

        Args:
            call: the pipeline's arguments: height, width, num_frames, max_sequence_length, guidance_scale.
            branch: one of `branches`.

        Raises SettingError for a transformer whose arguments are not known.
        """
        if self.family.inputs is None:
            raise SettingError(f"the arguments of {self.config['_class_name']} are not known")
        request = Request(self.config, call, batch_size, self.spatial, self.temporal, device, dtype, branch)
        return self.family.inputs(request)


def published() -> dict[str, Architecture]:
    """Transformers on the hub that the families' records have, by path."""
    return {
        path: Architecture(
            {"_class_name": family.transformer, **config},
            family.coarser.get(path, family.spatial),
            family.temporal,
            family.experts.get(path, 1),
        )
        for family in families().values()
        for path, config in family.published.items()
    }


def architecture(path: str) -> Architecture:
    """The architecture of a folder in diffusers format, of an embedded model, or of a model on the hub that a family's
    record has. Raises SettingError for any other path."""
    folders = [EMBEDDED / path, Path(path).expanduser()]
    for folder in folders:
        if (folder / "transformer" / "config.json").is_file():
            config = json.loads((folder / "transformer" / "config.json").read_text())
            vae = json.loads((folder / "vae" / "config.json").read_text())
            spatial = vae.get("scale_factor_spatial") or vae.get("spatial_compression_ratio")
            spatial = spatial or 2 ** (len(vae.get("block_out_channels", [0] * 4)) - 1)
            temporal = vae.get("scale_factor_temporal") or vae.get("temporal_compression_ratio") or 4
            return Architecture(config, spatial, temporal, 1 + (folder / "transformer_2" / "config.json").is_file())
    known = published()
    if path not in known:
        raise SettingError(
            f"model.path={path}: neither a folder in diffusers format nor one of the known {', '.join(known)}"
        )
    return known[path]
