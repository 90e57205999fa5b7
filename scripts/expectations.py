"""Writes `expectation.json` beside the weights of the embedded models: values that the model makes, which are checked
whenever it is loaded.

python scripts/expectations.py [NAME ...]     # after a training; in an environment that is known to be right
"""

import argparse

import torch
from diffusers import DiffusionPipeline

from dpcache.models.expectation import make, write
from dpcache.models.pretrained import EMBEDDED
from eval.metrics import clip

STEPS = {"seed": 0, "num_inference_steps": 2}
MODELS = {
    "tiny_flux": STEPS | {"prompt": "red apple", "call": {"height": 64, "width": 64, "max_sequence_length": 12}},
    "tiny_dit": STEPS | {"prompt": "ankle boot", "call": {"guidance_scale": 2.0}},
    "tiny_video": STEPS
    | {
        "prompt": "sunflower moving right",
        "call": {"height": 32, "width": 32, "num_frames": 9, "max_sequence_length": 8, "guidance_scale": 3.0},
    },
    "tiny_clip": {"prompt": "red apple"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    for name in parser.parse_args().names or MODELS:
        folder, settings = EMBEDDED / name, MODELS[name]
        if name == "tiny_clip":
            outputs = clip.embed(*clip.open_model(f"local-dir:{folder}"), settings)
        else:
            outputs = make(DiffusionPipeline.from_pretrained(folder, dtype=torch.float32), settings)
        write(folder, settings, outputs)


if __name__ == "__main__":
    main()
