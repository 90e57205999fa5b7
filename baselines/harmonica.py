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
    """The recipe: every attention and feed-forward output has a trained score for every step. Where the score is above
    a threshold, the output is computed; elsewhere it is reused.

    In training, with a score r, the output is r times the new output plus 1 - r times the kept one, and this mixture is
    kept if r is above the threshold. The sampler runs with these outputs (step-wise denoising). At each step its
    prediction is compared with the model's own prediction at the same latents; the loss is

        lambda_t |prediction - model|^2 + beta sum r,

    both means over elements. lambda_t estimates the effect on the image's error: it is the mean squared change of the
    final latents when step t is mixed as well, in addition to all steps before it. It is measured again every
    `proxy_every` steps.

    The authors control the compute by beta (7e-8 for DiT-XL/2 with 10 steps), with a threshold of 0.1. Here both follow
    from the budget. At every update, beta is the gain that as many scores exceed as there are outputs to compute. In
    the end the outputs with the highest scores are computed, as many as spend the budget by FLOPs. The authors train
    for 20,000 steps at a learning rate of 0.01; here 40 trajectories at a rate of 0.1 move a score as far as theirs
    would at T = 50. This takes 200 trajectories in all, each of one batch, and T more of the first batch for each
    measurement of lambda, four times at T = 50. A score is updated once per trajectory, so all updates are made at its
    end. The authors' first step mixes in 0.7 % of what the trajectory before has left; here the first step is computed.

    Args:
        threshold, beta: None: chosen so that the budget is spent.
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
        steps: the computed steps of every output by its name ({"0.attn1": [0, 3], ...}), without training. An output
            that is not listed is computed at every step.
    """
    if steps is None:
        return HarmoniCa(budget, num_inference_steps, **settings)
    check_budget(budget, num_inference_steps)
    return routed_method(num_inference_steps, steps)


def routed_method(num_inference_steps: int, lists: Mapping[str, Sequence[int]]) -> Method:
    """The method with these computed steps of every output."""
    return Method(Staggered(num_inference_steps, lists), "modules", Reuse())


def highest(scores: np.ndarray, count: int) -> np.ndarray:
    """Which of the scores (T, M) are the `count` highest, bool (T, M). Scores of step 0 count as the highest."""
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
    """Mixes the outputs of modules with their kept outputs, within a `with` block of `at_work`.

    Args:
        model: its calls within a step are counted, because each guidance branch has its own kept outputs.
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
        """To be called at the end of each step of the sampler."""
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
        """A `with` block in which the modules' outputs are mixed."""
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
    """A tensor without its graph. Each step is trained separately; latents of sound, which LTX-2 makes beside the
    video, would connect it to the step before."""
    return value.detach() if torch.is_tensor(value) else value


def image_errors(
    pipe: "DiffusionPipeline", routed: Callable, scores: torch.Tensor, batch: tuple, call: Mapping
) -> torch.Tensor:
    """Lambda of every step, (T,): mean squared change of the final latents when that step is mixed in addition to those
    before it; 0 for step 0.

    Args:
        routed: makes the model's `Router` from scores.
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
    """The gradient of lambda_t |prediction - model|^2 with respect to the scores, (T, M), along the trajectory of these
    scores."""
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
