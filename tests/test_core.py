"""The library and the baselines work in an installation without what only evaluation and the command line need."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

CORE = """
import pkgutil
import sys
from importlib import import_module
from importlib.machinery import PathFinder


class Without:
    find_distributions = PathFinder.find_distributions

    @staticmethod
    def find_spec(name, path=None, target=None):
        return None if name.partition(".")[0] in refused else PathFinder.find_spec(name, path, target)


refused = set(sys.argv[1:])
sys.meta_path[sys.meta_path.index(PathFinder)] = Without

import baselines
import dpcache
from dpcache.models.pretrained import load

for package in (dpcache, baselines):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        import_module(module.name)
pipe = load("tiny_flux", dtype="float32", device="cpu")
with dpcache.cached(pipe, baselines.taylorseer.taylorseer(budget=2, num_inference_steps=3, warmup=1)):
    pipe("dog", num_inference_steps=3, output_type="latent", height=64, width=64)
    print(dpcache.report(pipe).computed)
assert not refused & sys.modules.keys()
"""


def names(requirements: list[str]) -> set[str]:
    """Of the packages, as an index writes them."""
    return {re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-") for requirement in requirements}


@pytest.mark.ci
def test_the_library_and_all_baselines_work_without_what_only_evaluation_needs():
    evaluation = names(PROJECT["optional-dependencies"]["eval"]) | {"hydra-core", "omegaconf", "wandb"}
    modules = {
        module
        for module, packages in packages_distributions().items()
        if any(package.lower().replace("_", "-") in evaluation for package in packages)
    }
    modules -= {"filelock"}  # which torch itself needs
    assert {"hydra", "omegaconf", "wandb", "torchmetrics", "open_clip", "pandas", "matplotlib"} <= modules
    done = subprocess.run([sys.executable, "-c", CORE, *modules], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "{'cond': [0, 1]}"


def test_the_readmes_installation_has_all_packages_that_the_project_names():
    extras, found = PROJECT["optional-dependencies"], names(PROJECT["dependencies"])
    (wanted,) = re.findall(r"pip install -e '\.\[(\w+)\]' && ", (ROOT / "README.md").read_text())
    nested = {
        extra
        for line in extras[wanted]
        for group in re.findall(r"^dpcache\[(.*)\]", line)
        for extra in group.split(",")
    }
    for extra in {wanted, *nested}:
        found |= names(extras[extra])
    assert {"torch", "diffusers", "hydra-core", "omegaconf", "wandb", "torchmetrics", "open-clip-torch"} <= found
