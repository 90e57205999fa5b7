"""Every file in `conf/` composes and makes its method, alone and with every value that a recorded sweep gives it."""

import ast
import re
from functools import cache

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, IntervalSweep, RangeSweep
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import OmegaConf

from dpcache.predictors import short_names
from eval import methods
from eval.metrics import METRICS
from eval.runs import read_prompts
from eval.schema import Group, config_hash
from helpers.commands import ROOT, run


def names(group: str) -> list[str]:
    return sorted(path.stem for path in (ROOT / "conf" / group).glob("*.yaml"))


@pytest.fixture(scope="module", autouse=True)
def session():
    """One session of Hydra for all."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        yield


@cache
def composed(*overrides: str):
    return compose("config", list(overrides))


def made(*overrides: str):
    """The composed settings, all references resolved, and their method."""
    config = composed(*overrides)
    OmegaConf.to_container(config, resolve=True)
    if "dbcache" in config.method._target_:
        pytest.importorskip("cache_dit")
    return config, instantiate(config.method)


@pytest.mark.parametrize(
    ("group", "name"), [(group, name) for group in ("model", "method", "eval", "logger") for name in names(group)]
)
def test_a_choice_composes_with_the_others_defaults(group, name):
    config, method = made(f"{group}={name}")
    assert method.num_inference_steps == (config.budget if config.about.own_grid else config.num_inference_steps)


@pytest.mark.parametrize("name", names("method"))
def test_a_method_has_a_record_that_says_what_it_is(name):
    about = composed(f"method={name}").about
    assert about.title and about.group is not Group.other
    assert OmegaConf.to_object(about) == methods.about(name)  # the board reads the file as the command does
    if about.paper and "arxiv" in about.paper:
        assert about.year == 2000 + int(about.paper.rpartition("/")[2][:2])


def test_a_record_that_is_wrong_is_refused():
    with pytest.raises(HydraException, match="caching"):
        compose("config", ["about.group=caching"])
    with pytest.raises(HydraException, match="yaer"):
        compose("config", ["about.yaer=2024"])


def test_a_record_does_not_count_for_the_name_of_a_run():
    """As in commands and run folders from before methods had records."""
    config = compose("config", ["method=fora", "about.title=other", "about.group=online"])
    assert config_hash(config) == config_hash(compose("config", ["method=fora"])) == "3ac04cd756e9"


def test_settings_of_later_versions_do_not_change_the_name_of_a_run_that_does_not_set_them():
    names = {
        config_hash(compose("config", more))
        for more in ([], ["quality=30"], ["quality=0.5", "quality_metric=ssim"], ["reference.num_inference_steps=99"])
    }
    assert len(names) == 4


def test_the_board_sweeps_every_method():
    assert compose("config", ["experiment=board"], return_hydra_config=True).hydra.sweeper.params.method == "glob(*)"


def values(key: str, swept: str) -> list[str]:
    """Overrides that give `key` every value of a sweep; of a range or an interval, the ends."""
    override = OverridesParser.create().parse_override(f"{key}={swept}")
    value = override.value()
    if not override.is_sweep_override():
        return [f"{key}={swept}"]
    if isinstance(value, IntervalSweep):
        return [f"{key}={end}" for end in (value.start, value.end)]
    if isinstance(value, Glob):
        return [f"{key}={name}" for name in names(key.lstrip("+"))]
    every = [f"{key}={one}" for one in override.sweep_string_iterator()]
    return [every[0], every[-1]] if isinstance(value, RangeSweep) else every


@pytest.mark.ci
@pytest.mark.parametrize("name", names("experiment"))
def test_a_recorded_setting_composes_with_every_value_that_it_sweeps(name):
    config = compose("config", [f"experiment={name}"], return_hydra_config=True)
    params = config.hydra.sweeper.get("params") or {}
    every = [values(key, str(swept)) for key, swept in params.items()]
    first = [options[0] for options in every]
    made(f"experiment={name}", *first)
    for index, options in enumerate(every):
        for option in options[1:]:
            made(f"experiment={name}", *first[:index], option, *first[index + 1 :])
    assert bool(params) == (config.hydra.sweep.dir == f"outputs/{name}")  # a sweep has a folder of its own


@pytest.mark.parametrize("name", [name for name in names("experiment") if name.startswith("paper_")])
def test_a_dry_run_of_a_papers_table_takes_no_prompts_from_the_hub(name):
    config = compose("config", [f"experiment={name}", "dry_run=true"])
    prompts, others = read_prompts(config, True)
    assert (len(prompts), len(others)) == (config.num_prompts, config.calibration.num_prompts)


@pytest.mark.ci
@pytest.mark.parametrize(
    ("experiment", "steps"),
    [
        ("flux_published", "[0, 1, 2, 4, 7, 10, 14, 19, 23, 28, 34, 40, 45]"),
        ("flux_planned", "[0, 1, 4, 8, 13, 18, 23, 28, 33, 38, 42, 45, 48]"),
    ],
)
def test_a_schedule_from_the_published_tensor_is_used_without_a_calibration(tmp_path, experiment, steps):
    code, out, err = run(f"experiment={experiment}", "+dry_run=true", folder=tmp_path)
    assert code == 0, err
    assert steps in out and "FLUX.1-dev" in out


def test_the_other_schedules_that_flux_planned_lists_can_be_put_in_its_place():
    text = (ROOT / "conf/experiment/flux_planned.yaml").read_text()
    lists = re.findall(r"^#   (\d+): +(\S+)$", text, re.MULTILINE)
    assert [budget for budget, _ in lists] == ["7", "9", "17"]
    for budget, steps in lists:
        _, method = made("experiment=flux_planned", f"budget={budget}", f"method.steps={steps}")
        assert len(method.schedule.steps) == int(budget) and str(list(method.schedule.steps)).replace(" ", "") == steps


def test_methods_and_metrics_are_named_in_their_own_files_alone():
    """Elsewhere they are read from the records, so that a new one is in no list."""
    own = {"dpcache", "full"}  # also the library's name, and a key of result.json
    own |= short_names().keys()  # FoCa's and ZEUS's predictors are called as the methods are
    words = ({*names("method")} - own) | METRICS.keys()
    paths = [ROOT / "run.py", *(ROOT / "dpcache").rglob("*.py"), *(ROOT / "eval").glob("*.py")]
    found = {
        (path.relative_to(ROOT).as_posix(), node.value)
        for path in paths
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value in words
    }
    assert len(words) > 40 and not found


def untyped(tree: ast.AST) -> list[str]:
    """The public functions and methods of which an argument or the result has no type; `*args` and `**kwargs` may."""
    found = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef) and (node.name == "__init__" or not node.name.startswith("_")):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            bare = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
            if bare or (node.returns is None and node.name != "__init__"):
                found.append(f"{node.lineno} {node.name}({', '.join(bare)})")
        elif isinstance(node, ast.ClassDef):
            found += untyped(node)
    return found


def test_public_functions_have_types():
    paths = [ROOT / "run.py"]
    for folder in ("dpcache", "baselines", "eval", "hydra_plugins", "scripts"):
        paths += (ROOT / folder).rglob("*.py")
    found = {path.relative_to(ROOT).as_posix(): untyped(ast.parse(path.read_text())) for path in paths}
    assert {path: functions for path, functions in found.items() if functions} == {}
