"""Method = Schedule x Site x Predictor, and how one is put on a pipeline."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dpcache._diffusers import hook_on
from dpcache.errors import SettingError
from dpcache.predictors import Predictor, Taylor
from dpcache.schedules import Planned, Schedule
from dpcache.session import Report, Session, denoisers
from dpcache.sites import Site, as_site


class Method:
    """A caching method, composed of its three parts.

    The board knows methods by `num_inference_steps`, `needs_calibration`, `calibration_options`, `prepare`, `settled`
    and `session` alone, so a library's own cache can stand beside them by offering these.

    Args:
        schedule: which steps are computed.
        site: what is kept of them: one of `dpcache.sites`, or its short name.
        predictor: how a skipped step is filled in.
    """

    def __init__(self, schedule: Schedule, site: Site | str, predictor: Predictor):
        self.schedule, self.site, self.predictor = schedule, as_site(site), predictor
        if predictor.sees_input and not self.site.sees_input:
            raise SettingError(f"site={self.site.name}: a predictor that sees the model's input takes site=output")
        self.settled: dict = {}  # what `prepare` decided, for the record

    @property
    def num_inference_steps(self) -> int:
        """Steps of the scheduler's grid that the sampler has to ask for."""
        return self.schedule.num_inference_steps

    @property
    def history(self) -> int:
        """How many computed features are kept of everything that the site keeps."""
        return self.predictor.history

    @property
    def needs_calibration(self) -> bool:
        return self.schedule.needs_calibration

    @property
    def partial(self) -> bool:
        """Whether parts of steps are computed as well, so that the budget counts full-step equivalents."""
        return self.schedule.partial or self.site.partial

    @property
    def calibration_options(self) -> dict:
        """Arguments of `calibrate` that this method's calibration has to be made with."""
        return self.schedule.calibration_options

    def prepare(self, pipe, calibration=None) -> None:
        """Settle the schedule. `calibration`: a `Calibration`, where `needs_calibration`."""
        self.schedule.prepare(calibration)

    def session(self, pipe, observe: Callable | None = None) -> Session:
        """Start caching on a pipeline, or on its transformer alone. Raises SettingError where the model does not offer
        the site. `observe`: see `Session`."""
        if not self.schedule.ready:
            raise SettingError("the schedule is not settled yet: call method.prepare(pipe, calibration) first")
        return Session(pipe, self, observe)


def dpcache(
    budget: int,
    num_inference_steps: int,
    warmup: int = 3,
    order: int = 2,
    solver: str = "paper",
    max_jump: int | None = None,
    cost: str = "l1",
    path_aware: bool = True,
    cumulative: bool = True,
    steps: list[int] | None = None,
) -> Method:
    """DPCache (Denoising as Path Planning, arXiv 2602.22654): planned steps, the last block's output, Taylor.

    Args:
        solver, cost, path_aware, cumulative: see `dpcache.schedules.Planned`.
        max_jump: largest distance between computed steps; the authors' code uses `int(0.3 * num_inference_steps)`.
        steps: a schedule to use as it is, without calibration (for one, a published schedule).
    """
    predictor = Taylor(order, since=max(warmup - 2, 0))
    if steps is None:
        schedule = Planned(
            predictor, budget, num_inference_steps, warmup, solver, max_jump, cost, path_aware, cumulative
        )
    elif len(steps) != budget:
        raise SettingError(f"steps has {len(steps)} entries: set budget={len(steps)}, not {budget}")
    elif list(steps[:warmup]) != list(range(warmup)):
        raise SettingError(f"steps={list(steps)} does not begin with the warmup={warmup} steps 0..{warmup - 1}")
    else:
        schedule = Schedule(steps, num_inference_steps)
    return Method(schedule, "stack", predictor)


_sessions: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # pipeline, or model alone -> its session


def session_of(pipe) -> Session | None:
    """The session on a pipeline, if there is one: its own, or that of another pipeline with the same transformer."""
    if pipe in _sessions:
        return _sessions[pipe]
    hooks = (hook_on(module) for module in denoisers(pipe).values())
    return next((hook.session for hook in hooks if hook is not None), None)


def enable(pipe, method, observe: Callable | None = None) -> None:
    """Cache with `method` from now on.

    Args:
        pipe: a diffusers pipeline, whose scheduler then tells the steps; or a transformer alone, whose timestep
            argument does.
        observe: see `dpcache.session.Session`.

    Raises SettingError if a method is already enabled, or where the model does not offer the method's site.
    """
    if session_of(pipe) is not None:
        raise SettingError("a method is already enabled on this pipeline: call dpcache.disable(pipe) first")
    _sessions[pipe] = method.session(pipe, observe)


def disable(pipe) -> Report:
    """Undo `enable`: the transformer is as it was before. Returns what the method did.

    Raises SettingError if nothing is enabled.
    """
    session = _known(pipe)
    for key in [key for key, value in _sessions.items() if value is session]:
        del _sessions[key]
    session.detach()
    return session.report()


@contextmanager
def cached(pipe, method, observe: Callable | None = None) -> Iterator[Session]:
    """`enable` within a `with` block, `disable` at its end. Gives the session, whose `report()` stays."""
    enable(pipe, method, observe)
    session = session_of(pipe)
    try:
        yield session
    finally:
        disable(pipe)


def report(pipe) -> Report:
    """What the method that is enabled on `pipe` has done so far. Raises SettingError if none is."""
    return _known(pipe).report()


def _known(pipe) -> Session:
    session = session_of(pipe)
    if session is None:
        raise SettingError("no method is enabled on this pipeline")
    return session
