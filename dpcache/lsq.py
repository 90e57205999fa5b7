"""Beyond the paper: least-squares prediction, planned exactly over its whole history (`method=dpcache_lsq`)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from dpcache._diffusers import execution_device
from dpcache.calibration import Calibration, record
from dpcache.errors import SettingError
from dpcache.gram import gram, key_axes, path_costs
from dpcache.method import CalibratedRecipe, Method
from dpcache.planner import plan, through
from dpcache.predictors import LeastSquares, Predictor, Reuse, ridge_regression, short_names
from dpcache.schedules import EvenlySpaced, Schedule, check_budget, with_first
from dpcache.statistics import Gain, Gram, L1Cost, Statistic

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

SCREENED, FINALISTS = 3, 4  # of many candidates, the best ones on some calibration prompts are tried on all
LEAST_SQUARES = [f"lsq{keys}{seen}" for seen in ("", "x") for keys in range(1, 5)]


@dataclass(frozen=True)
class LeastSquaresPlan(CalibratedRecipe):
    """The recipe of a method whose schedule and predictor are chosen together, from the calibration's Gram matrix.

    The cost of a schedule is the exact squared error of its predictions on the full-step trajectories, weighted by
    gain^(2 alpha) of the step, and the planner's state holds every key that a prediction looks at (for a predictor of
    four keys, the last three; with more than a hundred steps, the last two). Predictor, planner, warm-up and alpha are
    chosen in closed loop: of the candidates, the recipe takes the one whose accelerated runs of the calibration prompts
    end closest to the full-step latents. How errors add up along a trajectory is more than a sum over steps can
    express. So even spacing is a candidate too; on guided models it is often the best.

    The least-squares weights are then fitted once more: from the features that the accelerated runs have at their keys
    to the full-step features. The new weights are kept if prompts that were left out of this fit end closer to the
    full-step latents.

    Prediction is linear and all guidance branches share its weights. So it makes no difference whether the branches are
    combined before or after the prediction.

    Args:
        site: `stack` or `output`.
        predictors: candidates: "lsq1" to "lsq4", least squares over so many keys; "lsq1x" to "lsq4x", over the current
            latents as well (site=output; left out where they differ in shape from the model's prediction, as with a
            learned variance); "taylor0" (reuse) to "taylor3", likewise "hermite" and "lagrange"; "ab1" to "ab4";
            "foca"; "zeus".
        planners: candidates: "gram", as above; "coherent", which sums the errors between two keys before it squares
            them, see `dpcache.gram.path_costs`; "l1", the paper's cost tensor and recurrence; "even" spacing.
        warmups, alphas: candidates. Only planners "gram" and "coherent" depend on alpha.
        refit: whether the weights may be fitted once more in closed loop.

    Raises SettingError for a budget out of range and for candidates that are not known.
    """

    budget: int
    num_inference_steps: int
    site: str = "stack"
    predictors: Sequence[str] = ("lsq3", "taylor2")
    planners: Sequence[str] = ("gram", "coherent", "even")
    warmups: Sequence[int] = (1, 2, 3)
    alphas: Sequence[float] = (0.5, 1.0)
    refit: bool = True

    def __post_init__(self):
        for name in ("predictors", "planners", "warmups", "alphas"):
            if not getattr(self, name):
                raise SettingError(f"{name}=[] must name at least one candidate")
        known = [*LEAST_SQUARES, *short_names()]
        if unknown := [name for name in self.predictors if name not in known]:
            raise SettingError(f"predictors={unknown}: choose from {', '.join(known)}")
        if unknown := set(self.planners) - {"gram", "coherent", "l1", "even"}:
            raise SettingError(f"planners={sorted(unknown)}: choose from gram, coherent, l1, even")
        if self.site not in ("stack", "output"):
            raise SettingError(f"site={self.site}: the calibration takes stack or output")
        if self.site == "stack" and any(name.endswith("x") for name in self.predictors):
            raise SettingError(
                f"predictors={list(self.predictors)}: those that see the current latents take site=output"
            )
        check_budget(self.budget, self.num_inference_steps, min(self.warmups))

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        paper = (L1Cost(self.site),) if "l1" in self.planners else ()
        return (Gram(self.site), Gain(self.site), *paper)

    @property
    def example(self) -> Method:
        T = self.num_inference_steps
        predictors = (_predictor(name, np.eye(T * (1 + name.endswith("x")))) for name in self.predictors)
        longest = max(predictors, key=lambda predictor: predictor.history)
        return Method(EvenlySpaced(self.budget, T, min(self.warmups)), self.site, longest)

    def fit(self, pipe: "DiffusionPipeline", calibration: Calibration) -> Method:
        predictors, trials = self._candidates(calibration)
        runs = list(dict.fromkeys((trial["predictor"], *trial["steps"]) for trial in trials))  # some coincide

        def errors(name, *steps, limit=None):
            return calibration.errors(pipe, self._method(steps, predictors[name]), limit)

        found = {}
        if len(runs) > FINALISTS and len(calibration.latents) > SCREENED:
            found = {run: errors(*run, limit=SCREENED) for run in runs}
            runs = sorted(runs, key=lambda run: found[run].mean())[:FINALISTS]
        found |= {run: errors(*run) for run in runs}
        for trial in trials:
            run = (trial["predictor"], *trial["steps"])
            trial |= {"error": float(found[run].mean()), "prompts": len(found[run])}
        best = min(runs, key=lambda run: found[run].mean())
        if not np.isfinite(found[best]).all():
            raise SettingError(f"budget={self.budget}: the runs of all candidates diverge, so raise it or name others")
        method = self._method(best[1:], predictors[best[0]])
        decided = {"steps": list(best[1:]), "predictor": repr(method.predictor), "trials": trials}
        if self.refit and isinstance(method.predictor, LeastSquares) and len(found[best]) > 1:
            method, decided["refit"] = _refit(pipe, calibration, method, found[best])
        return replace(method, decided=decided)

    def _method(self, steps: Sequence[int], predictor: Predictor) -> Method:
        return Method(Schedule(steps, self.num_inference_steps), self.site, predictor)

    def _candidates(self, calibration) -> tuple[dict[str, Predictor], list[dict]]:
        """The predictors by name, and of every candidate its predictor, planner, warm-up, alpha and steps."""
        T, everything, gain = self.num_inference_steps, calibration[Gram(self.site)], calibration[Gain(self.site)]
        features = everything[:T, :T]
        seen = len(everything) == 2 * T
        names = [name for name in self.predictors if seen or not name.endswith("x")]
        if not names:
            raise SettingError(
                f"predictors={list(self.predictors)}: this model's input has another shape than its prediction"
            )
        predictors, trials = {}, []
        warmups = [warmup for warmup in self.warmups if warmup <= self.budget]
        for name in names:
            G = everything if name.endswith("x") else features
            predictors[name] = predictor = _predictor(name, G)
            axes = key_axes(predictor, T)
            for planner in self.planners:
                by_error = planner in ("gram", "coherent")
                for alpha in self.alphas if by_error else (None,):
                    if by_error:
                        counted = gain ** (2 * alpha)
                        cost = path_costs(G, predictor, axes, counted, coherent=planner == "coherent")
                        cost = through(cost, calibration.switches)
                    for warmup in warmups:
                        if by_error:
                            steps = plan(cost, self.budget, warmup)
                        elif planner == "l1":
                            cost = through(calibration[L1Cost(self.site)], calibration.switches)
                            steps = plan(cost, self.budget, warmup, "paper")
                        else:
                            steps = EvenlySpaced(self.budget, T, warmup).steps
                            for first in calibration.switches:
                                steps = with_first(steps, first)
                        trial = {
                            "predictor": name,
                            "planner": planner,
                            "warmup": warmup,
                            "alpha": alpha,
                            "steps": steps,
                        }
                        trials.append(trial)
        return predictors, trials


def _predictor(name: str, gram: np.ndarray) -> Predictor:
    """The predictor of that short name; a least-squares predictor uses the Gram matrix."""
    if name in LEAST_SQUARES:
        return LeastSquares(gram, int(name[3]), sees_input=name.endswith("x"))
    return short_names()[name]()


def _refit(pipe, calibration, method: Method, errors: np.ndarray) -> tuple[Method, dict[str, float]]:
    """`method`, with weights fitted in closed loop if prompts that were left out of the fit end closer with them; and
    the errors of these prompts before and after. `errors`: of `method` on all calibration prompts."""
    split = max(1, int(0.7 * len(errors)))
    fitted, everything = fit_closed_loop(pipe, calibration, method, split)
    before = errors[split:].mean()
    after = calibration.errors(pipe, replace(method, predictor=fitted))[split:].mean()
    if after < before:
        method = replace(method, predictor=everything)
    return method, {"held_out_before": float(before), "held_out_after": float(after)}


@dataclass(frozen=True, eq=False)
class FittedWeights(Predictor):
    """Weights that were fitted for one schedule: `table[step]` holds the weights of the last keys, newest last,
    followed by the weight of the model's input if it is seen."""

    history: int
    table: dict[int, tuple[float, ...]]
    sees_input: bool = False

    def weights(self, keys: Sequence[int], step: int) -> tuple[float, ...]:
        if step not in self.table:
            raise SettingError(
                f"step {step} has no weights: they were fitted for other computed steps, so calibrate anew"
            )
        return self.table[step]


def fit_closed_loop(
    pipe: "DiffusionPipeline", calibration: Calibration, method: Method, split: int, ridge: float = 1e-6
) -> tuple[FittedWeights, FittedWeights]:
    """Least-squares weights that map the features of `method`'s runs at their keys (and the inputs, if seen) to the
    full-step features.

    Returns the weights fitted on the first `split` prompts, and those fitted on all. The T + K features of one batch
    are held in memory at a time.
    """
    keys, T, site = method.schedule.steps, method.num_inference_steps, method.site.name
    history, sees_input = method.predictor.history, method.predictor.sees_input
    full, call, done = Method(EvenlySpaced(T, T), site, Reuse()), calibration.made_from["call"], 0
    grams = np.zeros((2, *[len(keys) + T * (1 + sees_input)] * 2))  # keys, inputs, targets
    for prompts, seeds in calibration.batches():
        runs = [record(pipe, which, prompts, seeds, **call) for which in (method, full)]
        for batch, _ in runs:
            calibration.count(batch.report, [len(prompts)])
        for branch in runs[1][1]:
            seen, truth = (kept[branch] for _, kept in runs)
            rows = [seen[site], *([seen["input"]] if sees_input else []), truth[site]]
            # Guided pipelines may stack their branches in the batch: one prompt after the other within each.
            rows = [part.unflatten(1, (-1, len(prompts))) for part in rows]
            limit = max(split - done, 0)
            for samples, fits in ((slice(limit), (0, 1)), (slice(limit, None), (1,))):
                some = [part[:, :, samples] for part in rows]
                if some[0].numel():
                    G = gram(some, device=execution_device(pipe)) * some[0].shape[2]
                    for fit in fits:
                        grams[fit] += G
        done += len(prompts)

    def solve(G):
        table = {}
        for step in sorted(set(range(T)) - set(keys)):
            begin = max((first for first in calibration.switches if first <= step), default=0)  # of the model's steps
            used = [a for a, key in enumerate(keys) if begin <= key < step][-history:]
            if sees_input:
                used.append(len(keys) + step)
            among, target = G[np.ix_(used, used)], G[used, step - T]
            table[step] = tuple(ridge_regression(among, target, ridge).tolist())
        return FittedWeights(history, table, sees_input)

    return tuple(map(solve, grams))
