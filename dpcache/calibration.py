"""Full-step trajectories of a few prompts -> statistics, in one safetensors file that knows what it was made for."""

import json
from ast import literal_eval
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm import tqdm

from dpcache import storage
from dpcache._diffusers import execution_device
from dpcache.circumstances import check_use, describe, told_guidance
from dpcache.errors import SettingError
from dpcache.method import Method, Runnable, cached
from dpcache.models.family import modulated_input
from dpcache.predictors import Reuse
from dpcache.prompts import from_json, to_json
from dpcache.sampler import Batch, generate, sample
from dpcache.schedules import EvenlySpaced, OnlineSchedule, Schedule
from dpcache.session import Branch, Report
from dpcache.statistics import Folded, L1Cost, Rerun, Statistic, Trajectories, of_one_pass, relative_change

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


_KIND = "calibration 4"


@dataclass
class Calibration:
    """A few prompts, and what was measured on their n full-step trajectories of T steps: `calibration[statistic]`.

    Attributes:
        made_for: what `describe` said of the pipeline.
        made_from: prompts, seeds, batch_size and call (the pipeline's arguments), so that `rerun` can repeat them; and
            once something was run, `input`, the shape of the model's input for one sample, and `branches`.
        arrays: by name of the statistic.
        latents: the final latents of the trajectories, float32 (n, ...); empty (0,) while no statistic has needed them.
        trajectories: the cost of each statistic, by its name, in full-step trajectories of one sample.
        reran: full-step trajectories that methods have taken for runs on these prompts since this object was made; not
            kept in files.
    """

    made_for: dict[str, str]
    made_from: dict
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    latents: np.ndarray = field(default_factory=lambda: np.zeros(0))
    trajectories: dict[str, float] = field(default_factory=dict)
    reran: float = 0.0

    def __getitem__(self, statistic: Statistic) -> np.ndarray:
        """Raises SettingError if it was not measured."""
        if statistic.name not in self.arrays:
            raise SettingError(
                f"this calibration does not hold {statistic.name}, but {', '.join(self.arrays) or 'prompts alone'}"
            )
        return self.arrays[statistic.name]

    def missing(self, statistics: Sequence[Statistic]) -> list[Statistic]:
        """The statistics that were not measured yet, in an order in which each follows those that it needs."""
        found = []
        for statistic in statistics:
            found += [other for other in (*self.missing(statistic.needs), statistic) if other not in found]
        return [statistic for statistic in found if statistic.name not in self.arrays]

    def took(self, statistics: Sequence[Statistic]) -> float:
        """The cost of measuring these statistics and those that they need, in full-step trajectories of one sample.
        Statistics at the same site share their trajectories, which count once."""
        everything = {other for statistic in statistics for other in (statistic, *statistic.needs)}
        passes = {statistic.site: statistic for statistic in everything if isinstance(statistic, Folded)}
        reruns = [statistic for statistic in everything if isinstance(statistic, Rerun)]
        return sum(self.trajectories[statistic.name] for statistic in (*passes.values(), *reruns))

    @property
    def num_inference_steps(self) -> int:
        """T."""
        return int(self.made_for["num_inference_steps"])

    @property
    def cost(self) -> np.ndarray:
        """The paper's cost tensor at site=stack, see `dpcache.statistics.L1Cost`. Raises SettingError without one."""
        return self[L1Cost()]

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, atomically. Of the prompts' images it holds the paths and digests of the content.
        Raises SettingError if an argument of the call is an object, such as an image."""
        facts = {"made_for": self.made_for, "trajectories": self.trajectories}
        facts["made_from"] = self.made_from | {"prompts": [to_json(prompt) for prompt in self.made_from["prompts"]]}
        try:
            facts = {name: json.dumps(fact) for name, fact in facts.items()}
        except TypeError as error:
            raise SettingError(
                f"a file cannot hold what this calibration's pipeline was called with: {error}; an image is given with "
                "its prompt, dpcache.Prompt(text, image=FILE)"
            ) from None
        storage.write(path, self.arrays | {"latents": self.latents}, {"format": f"dpcache {_KIND}", **facts})

    @classmethod
    def load(cls, path: str | Path) -> "Calibration":
        """Raises SettingError if the file is not a calibration, FileNotFoundError if there is none."""
        try:
            arrays, metadata = storage.read(path, _KIND)
            facts = (json.loads(metadata[name]) for name in ("made_for", "made_from", "trajectories"))
            made_for, made_from, trajectories = facts
            made_from["prompts"] = [from_json(prompt) for prompt in made_from["prompts"]]
            return cls(made_for, made_from, arrays, arrays.pop("latents"), trajectories)
        except FileNotFoundError:
            raise
        except Exception as error:
            raise SettingError(f"{path} is not a calibration file: {error}") from None

    def batches(self, limit: int | None = None, start: int = 0) -> list[tuple[list[str], list[int]]]:
        """The prompts (from `start` to before `limit`) and their seeds, in batches."""
        prompts, seeds, size = (self.made_from[name] for name in ("prompts", "seeds", "batch_size"))
        prompts, seeds = prompts[start:limit], seeds[start:limit]
        return [(prompts[i : i + size], seeds[i : i + size]) for i in range(0, len(prompts), size)]

    def rerun(
        self,
        pipe: "DiffusionPipeline",
        method: Runnable,
        limit: int | None = None,
        observe: Callable | None = None,
        start: int = 0,
    ) -> tuple[np.ndarray, Report]:
        """Run the calibration's prompts (from `start` to before `limit`) with `method`. Returns their final latents,
        (n, ...), and the session's report. `observe`: see `Session`."""
        steps, call = method.num_inference_steps, self.made_from["call"]
        with cached(pipe, method, observe) as session:
            batches = self.batches(limit, start)
            bar = tqdm(batches, desc="trying on the calibration prompts", unit="batch", leave=False)
            latents = [generate(pipe, *batch, steps, decode=False, **call).latents for batch in bar]
        report = session.report()
        self.count(report, [len(prompts) for prompts, _ in batches])
        if report.timesteps and steps == self.num_inference_steps:
            self._note(pipe, report)
        return torch.cat(latents).numpy(), report

    def errors(
        self, pipe: "DiffusionPipeline", method: Runnable, limit: int | None = None, start: int = 0
    ) -> np.ndarray:
        """Relative distances of the prompts' final latents with `method` to the full-step ones, (n,); infinite if
        they are not finite. A statistic that keeps the full-step latents must have been measured before."""
        reference = self.latents[start:limit]
        reference = reference.reshape(len(reference), -1)
        moved = self.rerun(pipe, method, limit, start=start)[0].reshape(reference.shape) - reference
        return finite_or_worst(np.linalg.norm(moved, axis=1) / np.linalg.norm(reference, axis=1))

    def count(self, report: Report, prompts: list[int]) -> None:
        """Add to `reran` what a method has computed in batches of these sizes, mean over the guidance branches."""
        spent = np.mean([generations[-len(prompts) :] for generations in report.spent.values()], axis=0)
        self.reran += float(np.dot(spent, prompts)) / self.num_inference_steps

    def measure(self, pipe: "DiffusionPipeline", statistics: Sequence[Statistic]) -> None:
        """Measure the statistics that are missing. Statistics at the same site share the trajectories. The T features
        of one batch, of every guidance branch, are held in memory at a time."""
        missing = self.missing(statistics)
        if missing and self.arrays:  # these have to be of the same model
            self.check_use(pipe, self.num_inference_steps)
        folded = [statistic for statistic in missing if isinstance(statistic, Folded)]
        for site in dict.fromkeys(statistic.site for statistic in folded):
            self._fold(pipe, site, [statistic for statistic in folded if statistic.site == site])
        for statistic in missing:
            if isinstance(statistic, Rerun):
                before, self.reran = self.reran, 0.0
                self.arrays[statistic.name] = statistic.measure(pipe, self)
                self.trajectories[statistic.name], self.reran = self.reran, before

    def _fold(self, pipe, site: str, statistics: list[Folded]) -> None:
        totals, latents, T = dict.fromkeys(statistics), [], self.num_inference_steps
        batches = self.batches()
        count = sum(len(prompts) for prompts, _ in batches)
        for index, (prompts, seeds) in enumerate(tqdm(batches, desc="calibrating", unit="batch", leave=False)):
            schedule = _InputChanges(T) if site == "stack" else EvenlySpaced(T, T)
            batch, kept = record(pipe, Method(schedule, site, Reuse()), prompts, seeds, **self.made_from["call"])
            latents.append(batch.latents)
            inputs = {branch: tensors.pop("input") for branch, tensors in kept.items() if "input" in tensors}
            seen = Trajectories(
                {branch: feature for branch, tensors in kept.items() for feature in tensors.values()},
                inputs,
                schedule.changes if site == "stack" else {},
                len(prompts),
                len(prompts) / count,
                index == 0,
                execution_device(pipe),
            )
            for statistic in statistics:
                totals[statistic] = statistic.fold(totals[statistic], seen)
            self._note(pipe, batch.report)
            if batch.report.switches:
                self.made_from["switches"] = batch.report.switches
        self.arrays |= {statistic.name: total for statistic, total in totals.items()}
        self.latents = torch.cat(latents).numpy()
        self.trajectories |= {statistic.name: float(count) for statistic in statistics}

    def _note(self, pipe, report: Report) -> None:
        """Keep what a run of all T steps tells of the circumstances beside what `describe` knows without running."""
        guidance = literal_eval(self.made_for["guidance"]) | told_guidance(pipe)
        seen = {"input": list(report.input_shape), "branches": list(report.computed), "guidance": guidance}
        self.made_from |= seen | {"timesteps": [round(time, 4) for time in report.timesteps]}

    def sign(self, method: Runnable) -> Runnable:
        """A copy of `method`, which was built on this calibration, with its `made_for` filled in."""
        names = ("input", "branches", "guidance", "timesteps")
        seen = {name: str(self.made_from[name]) for name in names if name in self.made_from}
        return replace(method, made_for=self.made_for | seen)

    @property
    def switches(self) -> list[int]:
        """Steps at which the pipeline's second model took over, if it has one."""
        return self.made_from.get("switches", [])

    def check_use(self, pipe: "DiffusionPipeline | None", num_inference_steps: int) -> None:
        """Warns and raises SettingError as `dpcache.circumstances.check_use` does for a method. Raises SettingError for
        another number of steps, too. `pipe`: None if the model will not run."""
        if num_inference_steps != self.num_inference_steps:
            raise SettingError(
                f"num_inference_steps={num_inference_steps}: this calibration was made for {self.num_inference_steps}"
            )
        if pipe is not None:
            check_use(pipe, self.made_for, "calibration")

    def check(self, expected: dict[str, str]) -> "Calibration":
        """Itself, if `made_for` agrees with `expected`. Raises SettingError that names the fields that differ."""
        differing = [
            f"{name}: made for {self.made_for.get(name)}, this run has {value}"
            for name, value in expected.items()
            if self.made_for.get(name) != value
        ]
        if differing:
            raise SettingError("this calibration was made for something else: " + "; ".join(differing))
        return self


def finite_or_worst(errors: np.ndarray) -> np.ndarray:
    """The errors, with infinity in place of NaN. NaN is the error of a run that has diverged. Every comparison with NaN
    is false, so that such a run could pass for the best."""
    return np.where(np.isnan(errors), np.inf, errors)


class _Recorder:
    """An observer: `kept[branch][name]` holds, in order, the features at the computed steps (K, B, ...) and the
    model's inputs at all steps (T, B, ...)."""

    def __init__(self, schedule: Schedule | OnlineSchedule):
        self.every = list(range(schedule.num_inference_steps))
        self.computed = self.every if isinstance(schedule, OnlineSchedule) else schedule.steps
        self.kept: dict[str, dict[str, torch.Tensor]] = {}
        self.filled: dict[tuple[str, str], list[int]] = {}

    def __call__(self, branch, step, name, tensor):
        if isinstance(tensor, tuple):
            raise SettingError(f"calibration takes features of one tensor, but {name!r} has {len(tensor)}")
        steps, kept = self._steps(name), self.kept.setdefault(branch, {})
        if name not in kept:
            kept[name] = _room(tensor, len(steps))
        kept[name][steps.index(step)] = tensor
        self.filled.setdefault((branch, name), []).append(step)

    def _steps(self, name: str) -> list[int]:
        return self.every if name == "input" else self.computed

    def check(self) -> None:
        """Raises SettingError where a branch was not there at every step: what is kept of the others is undefined."""
        for (branch, name), steps in self.filled.items():
            if steps != self._steps(name):
                raise SettingError(
                    f"calibration: the guidance branch {branch!r} passed {name!r} at the steps {steps}, not at "
                    f"{self._steps(name)}"
                )


def _room(like: torch.Tensor, steps: int) -> torch.Tensor:
    """An empty tensor for `steps` of `like`, on its device if that leaves half of the free memory, else on the CPU."""
    fits = like.device.type != "cuda" or steps * like.nbytes < torch.cuda.mem_get_info(like.device)[0] / 2
    return torch.empty((steps, *like.shape), dtype=like.dtype, device=like.device if fits else "cpu")


def record(
    pipe: "DiffusionPipeline", method: Method, prompts: Sequence[str], seeds: Sequence[int], **call
) -> tuple[Batch, dict[str, dict[str, torch.Tensor]]]:
    """Sample with `method` and record everything that its site keeps.

    Returns:
        The batch, and for every guidance branch the features of the computed steps (K, B, ...) under the
        site's name, with site=output also the model's inputs at all steps (T, B, ...) under "input".
    """
    recorder = _Recorder(method.schedule)
    batch = sample(pipe, method, prompts, seeds, decode=False, observe=recorder, **call)
    recorder.check()
    return batch, recorder.kept


@dataclass
class _LastInput:
    modulated: torch.Tensor | None = None


@dataclass(frozen=True)
class _InputChanges(OnlineSchedule):
    """Computes every step of one generation and records the changes of the modulated input, branch by branch."""

    changes: dict[str, list[float]] = field(default_factory=dict)

    def start(self) -> _LastInput:
        return _LastInput()

    def decide(self, context: Branch, block: torch.nn.Module, args: tuple, kwargs: dict) -> bool:
        try:
            current = modulated_input(block, args, kwargs)
        except ValueError:  # not known for this model: a calibration without it
            return True
        previous, context.state.modulated = context.state.modulated, current
        change = 0.0 if previous is None else relative_change(current, previous).item()
        self.changes.setdefault(context.name, []).append(change)
        return True


def calibrate(
    pipe: "DiffusionPipeline",
    prompts: Sequence[str],
    num_inference_steps: int = 50,
    statistics: Sequence[Statistic] | None = None,
    site: str = "stack",
    seeds: Sequence[int] | None = None,
    batch_size: int = 1,
    **call,
) -> Calibration:
    """Run `prompts` with every step computed, and measure statistics from which methods are planned.

    Args:
        statistics: a recipe's `statistics`; empty: nothing is run yet; None: all statistics at `site` that one run per
            prompt yields, which are enough for `dpcache` and `teacache`.
        site: `stack`, or `output`, which works with any denoiser of diffusers, U-Nets too.
        prompts: strings, or `dpcache.Prompt` for prompts with images.
        seeds: one per prompt; default 0, 1, ...
        call: further arguments of the pipeline (height, width, guidance_scale, ...).

    Raises SettingError without prompts, and where the model does not offer the site.
    """
    if not prompts:
        raise SettingError("calibration needs at least one prompt")
    if isinstance(prompts, str):
        raise SettingError(f"prompts={prompts!r}: give a list of prompts")
    statistics = of_one_pass(site) if statistics is None else statistics
    calibration = Calibration(
        describe(pipe, num_inference_steps, **call),
        {
            "prompts": list(prompts),
            "seeds": list(range(len(prompts))) if seeds is None else list(seeds),
            "batch_size": batch_size,
            "call": call,
        },
    )
    calibration.measure(pipe, statistics)
    return calibration
