"""HarmoniCa: Harmonizing Training and Inference for Better Feature Caching in Diffusion Transformer Acceleration (Huang
et al., arXiv 2410.01723), as in the authors' code for DiT."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils._pytree import tree_map
from tqdm import tqdm

from baselines.search import spent, with_decided
from baselines.trajectory import answers, calling, recorded
from dpcache._diffusers import StepListener, watching, with_gradients
from dpcache.calibration import Calibration
from dpcache.denoisers import denoiser
from dpcache.errors import SettingError
from dpcache.method import CalibratedRecipe, Method
from dpcache.models.family import block_of
from dpcache.predictors import Reuse
from dpcache.sampler import generate
from dpcache.schedules import Staggered, check_budget
from dpcache.sites import Modules, kept_modules, transformer_blocks, unknown_block
from dpcache.statistics import Rerun

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin
    from diffusers.schedulers.scheduling_utils import SchedulerOutput

log = logging.getLogger(__name__)

BOUND = 5.0  # of the logits of the scores, on either side


@dataclass(frozen=True)
class HarmoniCa(CalibratedRecipe):
    """The recipe: a trained score for every attention and feed-forward output at every step says whether it is computed
    there, which is where the score is above a threshold, or reused.

    While a score r is trained, the output is r times the new one and 1 - r times the one that was kept, and what comes
    out is kept where r is above the threshold. The sampler goes its way with these outputs (step-wise denoising), and
    at each step its prediction is compared with what the model itself says at the same latents:

        lambda_t |prediction - model|^2 + beta sum r,

    both means over elements. lambda_t, the proxy of the image's error, is what the final latents move when step t is
    mixed in this way as well, after all steps before it: their mean squared change, measured anew every so often.

    The authors set the compute by beta (7e-8 for DiT-XL/2 with 10 steps) and have a threshold of 0.1. For a budget both
    follow from it: beta is at every update the gain that is exceeded by as many scores as there are outputs to compute,
    and in the end the outputs of the highest scores are computed, as many as spend the budget by FLOPs. They train
    20,000 steps at a rate of 0.01; here 40 trajectories at a rate of 0.1 move a score as far as theirs would at T = 50.
    That takes 200 trajectories in all, each of one batch, and T more of the first batch for each measurement of lambda,
    four times at T = 50. A score is updated once a trajectory, so all updates can wait for its end. Their first step
    mixes in what the trajectory before has left, 0.7 %: here it is computed.

    Args:
        threshold, beta: None: what spends the budget.
        updates, rate: of Adam; each update is one batch of calibration prompts, in turn.
        proxy_every: steps between two measurements of lambda.
        seed: of the first scores, which are random.
    """

    budget: int
    num_inference_steps: int
    threshold: float | None = None
    beta: float | None = None
    updates: int = 40
    rate: float = 0.1
    proxy_every: int = 500
    seed: int = 0

    def __post_init__(self):
        check_budget(self.budget, self.num_inference_steps)
        if self.threshold is not None and not 0 < self.threshold < 1:
            raise SettingError(f"threshold={self.threshold} must lie between 0 and 1")
        if self.updates < 1 or not self.rate > 0 or self.proxy_every < 1:
            raise SettingError(
                f"updates={self.updates}, rate={self.rate}, proxy_every={self.proxy_every}: must be at least 1, above "
                "0 and at least 1"
            )

    @property
    def statistics(self) -> "tuple[RouterScores]":
        settings = self.updates, self.rate, self.proxy_every, self.seed
        return (RouterScores(self.budget, self.threshold, self.beta, *settings),)

    @property
    def example(self) -> Method:
        return routed_method(self.num_inference_steps, {})

    def fit(self, pipe: "DiffusionPipeline", calibration: Calibration) -> Method:
        (trained,) = self.statistics
        T, names, scores = self.num_inference_steps, Modules.names(denoiser(pipe)), calibration[trained]

        def make(computed: np.ndarray) -> Method:
            lists = {name: np.flatnonzero(own).tolist() for name, own in zip(names, computed.T, strict=True)}
            return with_decided(routed_method(T, lists), {"lists": lists})

        if self.threshold is not None:
            return with_decided(make(scores > self.threshold), {"threshold": self.threshold})
        found, per_step = {}, len(names)
        count = per_step * self.budget
        while count not in found and len(found) < 8:
            found[count] = spent(make(highest(scores, count)), pipe, calibration, limit=1)  # the same for all prompts
            each = (T - found[count]) / max(T * per_step - count, 1)  # a further output costs so much, on average
            more = round((self.budget - found[count]) / each) if each > 0 else 0
            count = min(max(count + more, per_step), T * per_step)
        count = min(found, key=lambda count: abs(found[count] - self.budget))
        if abs(found[count] - self.budget) > 0.5:
            log.warning("HarmoniCa: budget=%s is out of reach: %.1f full steps are spent", self.budget, found[count])
        return with_decided(make(highest(scores, count)), {"spent": found[count]})


def harmonica(
    budget: int, num_inference_steps: int, steps: Mapping[str, Sequence[int]] | None = None, **settings
) -> HarmoniCa | Method:
    """Attention and feed-forward outputs are reused where a trained router says so, see `HarmoniCa` for the other
    settings.

    Args:
        steps: the computed steps of every output by its name ({"0.attn1": [0, 3], ...}), without training; one that is
            not there is computed at every step.
    """
    if steps is None:
        return HarmoniCa(budget, num_inference_steps, **settings)
    check_budget(budget, num_inference_steps)
    return routed_method(num_inference_steps, steps)


def routed_method(num_inference_steps: int, lists: Mapping[str, Sequence[int]]) -> Method:
    """With the computed steps of every output."""
    return Method(Staggered(num_inference_steps, lists), "modules", Reuse())


def highest(scores: np.ndarray, count: int) -> np.ndarray:
    """The `count` highest of the scores (T, M), bool; those of step 0 come first."""
    order = np.argsort(-np.vstack([np.full_like(scores[:1], np.inf), scores[1:]]), axis=None, kind="stable")
    chosen = np.zeros(scores.size, bool)
    chosen[order[:count]] = True
    return chosen.reshape(scores.shape)


def modules_of(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The modules whose outputs are kept, by the names of `Modules.names`. Raises SettingError where they are not
    known."""
    found = {}
    for index, block in enumerate(transformer_blocks(model)):
        known = block_of(block)
        if not known.kept:
            raise SettingError(unknown_block(Modules(), known, "kept"))
        found |= {f"{index}.{name}": module for name, module in kept_modules(block, known).items()}
    return found


class Router:
    """Mixes what modules return with what was kept of them, while it is `at_work`.

    Args:
        model: counts its calls within a step: each guidance branch has kept outputs of its own.
        modules: M of its modules by name, in the order of the scores.
        scores: (T, M), between 0 and 1.
        threshold: a mixed output is kept where the score is above it.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        modules: Mapping[str, torch.nn.Module],
        scores: torch.Tensor,
        threshold: float,
    ):
        self.model, self.modules, self.scores, self.threshold = model, modules, scores, threshold
        self.keeps = (scores.detach() > threshold).tolist()
        self.step, self.call, self.kept = 0, 0, {}

    def end_step(self) -> None:
        self.step, self.call = self.step + 1, 0

    def _model(self, forward: Callable, *args, **kwargs):
        self.call += 1
        args, kwargs = tree_map(_apart, (args, kwargs))
        return forward(*args, **kwargs)

    def _module(self, place: int, forward: Callable, *args, **kwargs):
        output, key = forward(*args, **kwargs), (self.call, place)
        if self.step:
            score = self.scores[self.step, place]
            output = tree_map(lambda new, old: score * new + (1 - score) * old, output, self.kept[key])
        if not self.step or self.keeps[self.step][place]:
            self.kept[key] = tree_map(torch.Tensor.detach, output)
        return output

    @contextmanager
    def at_work(self) -> Iterator[None]:
        runs = {module: partial(self._module, place) for place, module in enumerate(self.modules.values())}
        with calling({self.model: self._model} | runs):
            yield


@dataclass(frozen=True)
class RouterScores(Rerun):
    """The trained scores (T, M) of `Modules.names`, see `HarmoniCa`; those of step 0 are 1."""

    budget: int
    threshold: float | None
    beta: float | None
    updates: int
    rate: float
    proxy_every: int
    seed: int

    def measure(self, pipe: "DiffusionPipeline", calibration: Calibration) -> np.ndarray:
        model, T, call = denoiser(pipe), calibration.num_inference_steps, calibration.made_from["call"]
        modules, batches = modules_of(model), calibration.batches()
        share = (self.budget - 1) / (T - 1) if T > 1 else 1.0  # of the outputs after step 0 that are computed
        logits = torch.randn(T, len(modules), generator=torch.Generator().manual_seed(self.seed))
        optimizer = torch.optim.Adam([logits], self.rate)
        for update in tqdm(range(self.updates), desc="training", unit="update", leave=False):
            scores = logits.sigmoid()
            scores[0] = 1.0
            threshold = self.threshold
            if threshold is None:
                threshold = float(scores[1:].quantile(1 - share)) if T > 1 else 0.5
            routed = partial(Router, model, modules, threshold=threshold)
            if update * T // self.proxy_every != (update - 1) * T // self.proxy_every:
                proxies = image_errors(pipe, routed, scores, batches[0], call)
                calibration.reran += T * len(batches[0][0])
            prompts, seeds = batches[update % len(batches)]
            gains = -gradient(pipe, routed, scores, proxies, (prompts, seeds), call)
            calibration.reran += 5 * len(prompts)  # two ways there alone, and one there and back, which counts as two
            beta = self.beta
            if beta is None:
                beta = float(gains[1:].quantile(1 - share)) if T > 1 else 0.0
            logits.grad = (beta - gains) * scores * (1 - scores)
            optimizer.step()
            logits.clamp_(-BOUND, BOUND)
        scores = logits.sigmoid().double().numpy()
        scores[0] = 1.0
        return scores


def _apart(value: object) -> object:
    """A tensor without what led to it: each step is trained for itself, and latents of sound, which LTX-2 makes beside
    the video, would tie it to the step before."""
    return value.detach() if torch.is_tensor(value) else value


def image_errors(
    pipe: "DiffusionPipeline", routed: Callable, scores: torch.Tensor, batch: tuple, call: Mapping
) -> torch.Tensor:
    """Lambda of every step, (T,): mean squared change of the final latents when that step is mixed, too, after those
    before it. That of step 0 is 0.

    Args:
        routed: `Router` of the model, but for the scores.
    """
    T, proxies = len(scores), torch.zeros(len(scores))
    latents = generate(pipe, *batch, T, decode=False, **call).latents
    for step in range(1, T):
        before, some = latents, torch.cat([scores[: step + 1], torch.ones_like(scores[step + 1 :])])
        router = routed(scores=some)
        with router.at_work(), watching(pipe.scheduler, EndOfSteps(router.end_step)):
            latents = generate(pipe, *batch, T, decode=False, **call).latents
        proxies[step] = (latents - before).square().mean()
    return proxies


def gradient(
    pipe: "DiffusionPipeline",
    routed: Callable,
    scores: torch.Tensor,
    proxies: torch.Tensor,
    batch: tuple,
    call: Mapping,
) -> torch.Tensor:
    """Of lambda_t |prediction - model|^2 with respect to the scores, (T, M), along the trajectory that they lead to."""
    T, (prompts, seeds) = len(scores), batch
    router = routed(scores=scores)
    with router.at_work(), watching(pipe.scheduler, EndOfSteps(router.end_step)):
        states = recorded(pipe, prompts, seeds, T, **call).states
    wanted = answers(pipe, states[:-1], prompts, seeds, **call)
    leaf = scores.clone().requires_grad_()
    router = routed(scores=leaf)
    compare = _Compare(pipe, router, wanted, proxies)
    with with_gradients(pipe), router.at_work(), watching(pipe.scheduler, compare):
        generate(pipe, prompts, seeds, T, decode=False, **call)
    return leaf.grad


class EndOfSteps(StepListener):
    """Calls `end_step` at the end of each step."""

    def __init__(self, end_step: Callable[[], None]):
        self.end_step = end_step

    def after_step(self, scheduler: "SchedulerMixin", output: "SchedulerOutput | tuple") -> None:
        self.end_step()


class _Compare(EndOfSteps):
    """Differentiates every step's prediction by itself, and hands it to the scheduler without its graph."""

    def __init__(self, pipe: "DiffusionPipeline", router: Router, wanted: torch.Tensor, proxies: torch.Tensor):
        super().__init__(router.end_step)
        self.guider = getattr(pipe, "guider", None)
        self.router, self.wanted, self.proxies = router, wanted, proxies

    def given(self, scheduler: "SchedulerMixin", arguments: dict) -> None:
        step, prediction = self.router.step, arguments["model_output"]
        if step:
            wanted = self.wanted[step]
            own = prediction[: len(wanted), : arguments["sample"].shape[1]].float()
            error = (own - wanted.to(own.device)).square().mean()
            (self.proxies[step].item() * error).backward()
        arguments["model_output"] = prediction.detach()
        for part in () if self.guider is None else (self.guider, *vars(self.guider).values()):
            kept = getattr(part, "__dict__", {})  # HunyuanImage's adds a mean over the steps before
            kept.update({name: _apart(value) for name, value in kept.items() if torch.is_tensor(value)})
