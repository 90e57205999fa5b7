"""When the transformer is really run: lists of computed steps, and the base of schedules that decide online.

Steps are indices 0..T-1 in sampling order, T = `num_inference_steps`, K = `budget` computed steps, M = `warmup`
steps that are always computed first.
"""

from collections.abc import Sequence

from dpcache.errors import SettingError
from dpcache.gram import key_axes, path_costs
from dpcache.planner import plan, through
from dpcache.predictors import Taylor


class Schedule:
    """A fixed list of computed steps.

    Args:
        steps: computed steps, strictly increasing from 0. None while `prepare` has yet to find them.
        num_inference_steps: T.
    """

    needs_calibration = False
    partial = False  # also computes parts of steps: the budget is then spent in full-step equivalents, by FLOPs

    def __init__(self, steps: Sequence[int] | None, num_inference_steps: int):
        self.num_inference_steps = num_inference_steps
        self.calibration_options: dict = {}  # arguments of `calibrate` that the calibration has to be made with
        self.steps = None if steps is None else list(steps)
        if self.steps is not None:
            legal = self.steps and self.steps[0] == 0 and self.steps[-1] < num_inference_steps
            if not legal or any(b <= a for a, b in zip(self.steps, self.steps[1:])):
                raise SettingError(
                    f"steps={self.steps} must increase strictly from 0 and end below "
                    f"num_inference_steps={num_inference_steps}"
                )

    @property
    def ready(self) -> bool:
        """False while `prepare` has yet to settle something."""
        return self.steps is not None

    def prepare(self, calibration) -> None:
        """Settle what depends on a `Calibration`; a fixed list has nothing to settle."""

    def select(self, context, name: str, block: str, layer: int, received):
        """At site=tokens: the tokens for which a skipped step computes the feed-forward `name` anew, (B, k) of N.

        Args:
            block, layer: the block's class, and which of its class it is.
            received: the attention that each token received at the last computed step, (B, N), float32, of mean 1 / N
                over the whole of the self-attention.
        """
        return received[:, :0].long()  # none


def check_budget(budget: int, num_inference_steps: int, warmup: int) -> None:
    """Raises SettingError unless 1 <= warmup <= budget <= num_inference_steps."""
    if not 1 <= warmup <= budget <= num_inference_steps:
        raise SettingError(
            f"budget={budget} must be between warmup={warmup} (at least 1) and "
            f"num_inference_steps={num_inference_steps}"
        )


class EvenlySpaced(Schedule):
    """M warm-up steps, then the other K - M spread evenly over the rest."""

    def __init__(self, budget: int, num_inference_steps: int, warmup: int = 1):
        check_budget(budget, num_inference_steps, warmup)
        length, count = num_inference_steps - warmup + 1, budget - warmup + 1
        spread = [warmup - 1 + i * length // count for i in range(count)]
        super().__init__([*range(warmup - 1), *spread], num_inference_steps)


class Interval(Schedule):
    """M warm-up steps, then every N-th: the papers' own rules, before budgets.

    The budget follows from N; a `budget` that differs is an error, so that tables stay at equal compute.

    Args:
        from_end: count the N-th steps back from the last step (FORA) instead of on from the last warm-up step
            (TaylorSeer).
    """

    def __init__(self, interval: int, budget: int, num_inference_steps: int, warmup: int = 1, from_end: bool = False):
        if interval < 1:
            raise SettingError(f"interval={interval} must be at least 1")
        last = num_inference_steps - 1
        every = range(last, warmup - 1, -interval) if from_end else range(warmup - 1, last + 1, interval)
        steps = sorted({*range(warmup), *every})
        if len(steps) != budget:
            raise SettingError(
                f"interval={interval} computes {len(steps)} steps: set budget={len(steps)}, not {budget}"
            )
        super().__init__(steps, num_inference_steps)


class Planned(Schedule):
    """K steps chosen by dynamic programming over a path-aware cost of a Taylor predictor (arXiv 2602.22654, 3.3).

    Args:
        predictor: `Taylor`, whose errors the cost holds.
        solver: "paper" or "exact", see `dpcache.planner`.
        max_jump: largest distance between computed steps; None: any.
        cost: "l1", the paper's tensor over two keys, where the steps just before them stand in for earlier keys; or
            "gram", the squared error over all the keys that the predictor looks at (takes solver="exact").
        path_aware, cumulative: of the L1 tensor, see `dpcache.pact.l1_cost`.
    """

    needs_calibration = True

    def __init__(
        self,
        predictor,
        budget,
        num_inference_steps,
        warmup=3,
        solver="exact",
        max_jump=None,
        cost="l1",
        path_aware=True,
        cumulative=True,
    ):
        check_budget(budget, num_inference_steps, warmup)
        if cost not in ("l1", "gram"):
            raise SettingError(f"cost={cost} is not one of l1, gram")
        if cost == "gram" and solver == "paper":
            raise SettingError("cost=gram depends on more keys than solver=paper looks at: set solver=exact")
        super().__init__(None, num_inference_steps)
        self.predictor, self.budget, self.warmup, self.solver = predictor, budget, warmup, solver
        self.max_jump, self.cost = max_jump, cost
        # The authors' tensor knows nothing of the warm-up.
        self.calibration_options = {
            "predictor": Taylor(predictor.order),
            "path_aware": path_aware,
            "cumulative": cumulative,
        }

    def prepare(self, calibration):
        self.tensor = calibration.cost
        if self.cost == "gram":
            axes = key_axes(self.predictor, self.num_inference_steps)
            self.tensor = path_costs(calibration.gram, self.predictor, axes)
        self.tensor = through(self.tensor, calibration.switches)
        self.steps = plan(self.tensor, self.budget, self.warmup, self.solver, self.max_jump)


class OnlineSchedule(Schedule):
    """Decides at every step, from what its probe sees there. One state, `context.online`, per guidance branch.

    `probe` blocks always run, and it decides at the block after them; with site=output from the model's own arguments.
    """

    probe = 0
    threshold: float | None = 0.0  # None while `prepare` has yet to find it

    def __init__(self, num_inference_steps: int):
        super().__init__(None, num_inference_steps)

    @property
    def ready(self):
        return self.threshold is not None

    def start(self) -> dict:
        """The state of a new generation."""
        return {}

    def decide(self, context, block, args: tuple, kwargs: dict) -> bool:
        """True if `context.step` is to be computed, as it always is where `context.keys` is empty. `args` and `kwargs`
        are those of the block's call; with blocks probed, `context.stack_input` is what the first one was given,
        (B, N, D)."""
        raise TypeError(f"{type(self).__name__} does not say how it decides")

    def learn(self, context, name: str, feature) -> None:
        """Told of every feature that a computed step keeps, under its name, and at the sites `stack` and `residual`
        of every block's image stream, under the block's index."""

    def verifies(self, context) -> bool:
        """At site=modules: True to have the last block run in earnest as well on this skipped step."""
        return False

    def verify(self, context, draft, real) -> None:
        """Told of the image stream that the block made of predicted outputs, and in earnest, (B, N, D)."""

    def scale(self, context, weights: tuple[float, ...]) -> tuple[float, ...]:
        """The predictor's weights at a skipped step, corrected by what the probe has seen."""
        return weights
