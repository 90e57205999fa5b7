"""What a cache must do on a pipeline, judged without the cache's own report: by torch's hooks on the linear layers of
the transformer's blocks, and by the scheduler's `step`."""

import re
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import diffusers
import numpy as np
import torch

import dpcache
from dpcache.predictors import Reuse
from dpcache.schedules import EvenlySpaced, Schedule
from pipelines.records import Record

SITES = ("stack", "residual", "modules", "output")
KEYS = (0, 2, 3)  # computed steps
TRANSFORMERS = ("transformer", "transformer_2", "unconditional_transformer")
_SKIPPED_WHOLE = ("stack", "residual", "blocks", "output", "output_residual")  # all blocks of a skipped step
_SUMS = ("residual", "blocks", "output_residual")  # a difference is added to what it was taken from: rounding
_NO_BLOCKS = re.compile(
    "refiner|adapter|embed|norm|context|text|vace|control|caption|proj|out|approximator|connector|cond"
)
_NO_BRANCH = re.compile("norm|mod|ada|scale_shift")


class Wrong(Exception):
    """The cache did something else than it must."""


class Broken(Exception):
    """The record does not describe the pipeline."""


@dataclass
class Call:
    """One call of a transformer: the `number`-th of its `step` in its `generation` (all from 0).

    Attributes:
        part: which of the pipeline's transformers.
        arguments, output: copies.
        ran: which linear layers of its blocks ran, by name.
    """

    generation: int
    step: int
    number: int
    part: int = 0
    arguments: tuple = ()
    output: object = None
    ran: set[str] = field(default_factory=set)

    def __str__(self):
        return f"call {self.number} of step {self.step}" + (f", run {self.generation}" if self.generation else "")


def tensors(value) -> list[torch.Tensor]:
    """All tensors in nested containers, arrays and pictures included."""
    if torch.is_tensor(value):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [tensor for each in value for tensor in tensors(each)]
    if hasattr(value, "__array__") or hasattr(value, "__array_interface__"):
        return [torch.as_tensor(np.array(value))]
    if hasattr(value, "__dataclass_fields__"):
        return tensors([getattr(value, name) for name in value.__dataclass_fields__])
    return []


def copied(value):
    """The same with every tensor copied."""
    if torch.is_tensor(value):
        return value.clone()
    if type(value) in (list, tuple):
        return type(value)(copied(each) for each in value)
    if type(value) is dict:
        return {name: copied(each) for name, each in value.items()}
    return value


def difference(one, other) -> float:
    """Relative distance of two nested containers of tensors, 0 only where they are equal to the bit."""
    one, other = tensors(one), tensors(other)
    if [tensor.shape for tensor in one] != [tensor.shape for tensor in other]:
        return float("inf")
    if all(torch.equal(a, b) for a, b in zip(one, other)):
        return 0.0
    squared = sum((a.double() - b.double()).square().sum().item() for a, b in zip(one, other))
    scale = sum(b.double().square().sum().item() for b in other)
    return max((squared / scale) ** 0.5 if scale else float("inf"), 1e-12)


def linears(transformer: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """The linear layers of the transformer's main blocks, by name, without embedders in them: DiT's output layer uses
    that of the first block."""
    return {
        f"{name}.{inner}": module
        for name, blocks in transformer.named_children()
        if isinstance(blocks, torch.nn.ModuleList) and not _NO_BLOCKS.search(name)
        for inner, module in blocks.named_modules()
        if isinstance(module, torch.nn.Linear) and "embedder" not in inner
    }


def first_of(calls: list[Call]) -> dict[tuple[int, int, int], Call]:
    """The first call of each generation, transformer and number."""
    first = {}
    for call in calls:
        first.setdefault((call.generation, call.part, call.number), call)
    return first


class Watch:
    """Sees every call of a pipeline's transformers.

    Args:
        replay: calls. What a transformer is called with is replaced by what the first of these of the same number and
            generation got.
        name: give every call a cache context of its own, by its number.
    """

    def __init__(self, pipe, replay: list[Call] | None = None, name: bool = False):
        self.pipe, self.name = pipe, name
        self.replay = None if replay is None else first_of(replay)
        self.calls: list[Call] = []
        self.current: Call | None = None
        self.generation, self.step, self.number, self.stepped = 0, 0, 0, 0
        self.transformers = [getattr(pipe, n) for n in TRANSFORMERS if getattr(pipe, n, None) is not None]

    @contextmanager
    def __call__(self) -> Iterator["Watch"]:
        with ExitStack() as stack:
            for kind in {type(scheduler) for scheduler in self.schedulers()}:
                for method in ("step", "set_timesteps"):
                    stack.enter_context(self._patched(kind, method))
            for transformer in self.transformers:
                handles = [transformer.register_forward_pre_hook(self._before, with_kwargs=True)]
                handles.append(transformer.register_forward_hook(self._after, with_kwargs=True))
                handles += [
                    module.register_forward_pre_hook(lambda *_, name=name: self._ran(name))
                    for name, module in linears(transformer).items()
                ]
                for handle in handles:
                    stack.callback(handle.remove)
            yield self

    def schedulers(self) -> list:
        return [part for part in self.pipe.components.values() if hasattr(part, "set_timesteps")]

    def _patched(self, kind: type, method: str):
        """On the class, so that copies of a scheduler, which some pipelines make, are seen too. Several may step at the
        end of one step, and several be set at a run's start."""
        original = getattr(kind, method)

        def counted(scheduler, *args, **kwargs):
            if method == "set_timesteps" and (self.number or self.step):
                self.generation, self.step, self.number = self.generation + 1, 0, 0
            if method == "step" and self.number:
                self.step, self.number, self.stepped = self.step + 1, 0, self.stepped + 1
            return original(scheduler, *args, **kwargs)

        counted.__wrapped__ = original  # pipelines look at the signature
        return mock.patch.object(kind, method, counted)

    def _ran(self, name: str) -> None:
        if self.current is not None:
            self.current.ran.add(name)

    def _before(self, module, args, kwargs):
        call = self.current = Call(self.generation, self.step, self.number, self.transformers.index(module))
        if self.replay is not None:
            args, kwargs = copied(self.replay[call.generation, call.part, call.number].arguments)
        call.arguments = copied((args, kwargs))
        if self.name and hasattr(module, "cache_context"):
            self.context = module.cache_context(f"call {call.number}")
            self.context.__enter__()
        return args, kwargs

    def _after(self, module, args, kwargs, output):
        if self.name and hasattr(module, "cache_context"):
            self.context.__exit__(None, None, None)
        self.current.output = copied(tensors(output))
        self.calls.append(self.current)
        self.current, self.number = None, self.number + 1


def attributes(pipe) -> dict:
    """The names of all that stands on each module of the pipeline's transformers, on its scheduler and on itself."""
    modules = [m for n in TRANSFORMERS if getattr(pipe, n, None) is not None for m in getattr(pipe, n).modules()]
    found = {f"{type(m).__name__} {i}": (type(m), set(vars(m))) for i, m in enumerate(modules)}
    for index, module in enumerate(modules):
        hooks = [name for name, value in vars(module).items() if name.endswith("hooks") and value]
        found[f"hooks of {type(module).__name__} {index}"] = (type(module), set(hooks))
    for part in (pipe, getattr(pipe, "scheduler", None)):
        found[type(part).__name__] = (type(part), set(vars(part)) if part is not None else set())
    return found


def inside(frame: traceback.FrameSummary, package) -> bool:
    return Path(package.__file__).parent in Path(frame.filename).parents


def ours(error: ValueError) -> bool:
    """Whether it was raised in dpcache."""
    return inside(traceback.extract_tb(error.__traceback__)[-1], dpcache)


def where(error: BaseException) -> str:
    """The last place in dpcache, else in diffusers, that an error came through."""
    frames = traceback.extract_tb(error.__traceback__)
    for package in (dpcache, diffusers):
        if found := [frame for frame in frames if inside(frame, package)]:
            return f"{Path(found[-1].filename).name}:{found[-1].lineno}"
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}"


class Subject:
    """A pipeline and one way to call it, with what it gives without a cache. Raises Broken where the record does not
    describe it."""

    def __init__(self, record: Record, case: str):
        self.record, self.case = record, case
        self.pipe = record.build()
        with Watch(self.pipe)() as watch:
            self.plain = copied(tensors(record.call(self.pipe, case)))
        self.calls = watch.calls
        if not self.calls or not watch.stepped:
            raise Broken(f"{len(self.calls)} transformer calls and {watch.stepped} scheduler steps were seen")
        self.steps = 1 + max(call.step for call in self.calls)
        self.generations = {call.generation for call in self.calls}
        self.latest: list[Call] = []
        self.clean = attributes(self.pipe)
        self.check()

    def check(self) -> None:
        if not all(tensor.isfinite().all() for tensor in self.plain if tensor.is_floating_point()):
            raise Broken("the result is not finite")
        if difference(self.record.call(self.pipe, self.case), self.plain):
            raise Broken("two runs differ")
        if not any(call.ran for call in self.calls):
            raise Broken("no linear layer of a block ran")
        expected = self.record.cases[self.case].calls
        if expected is None:
            return
        counts = {}
        for call in self.calls:
            counts[call.generation, call.step] = counts.get((call.generation, call.step), 0) + 1
        if any(count != expected for count in counts.values()) or len(counts) != self.steps * len(self.generations):
            raise Broken(f"calls in each (run, step), expected {expected}: {counts}")
        first = [call for call in self.calls if call.step == 0]
        for one in first:
            for other in first:
                same_step = one.generation == other.generation and one.number < other.number
                if same_step and not difference(one.output, other.output):
                    raise Broken(f"{one} and {other} return the same: a mixture of them could not be seen")

    def run(self, method, **options) -> tuple[list[torch.Tensor], list[Call]]:
        """The result with a method, and the transformer calls, which stay in `latest` if it is refused."""
        with Watch(self.pipe, **options)() as watch:
            self.latest = watch.calls
            dpcache.enable(self.pipe, method)
            try:
                result = copied(tensors(self.record.call(self.pipe, self.case)))
                computed = dpcache.report(self.pipe).computed
            finally:
                dpcache.disable(self.pipe)
        keys = list(method.schedule.steps)
        if any(steps != keys for steps in computed.values() if steps):
            raise Wrong(f"the report says {computed}")
        return result, watch.calls


def judge(subject: Subject, site: str) -> str:
    """What `site` does there: "right", "refused: WORDS" or "wrong: WHAT"."""
    try:
        all_steps_computed(subject, site)
        result = some_steps_computed(subject, site)
        same_input_every_step(subject, site)
        branches_named(subject, site, result)
        outcome = "right"
    except ValueError as error:
        words = " ".join(str(error).split())
        if not ours(error):
            outcome = f"wrong: {type(error).__name__} at {where(error)}: {words}"
        elif not names_something(words, subject.pipe):
            outcome = f"wrong: refused without naming the pipeline, the model or a setting: {words}"
        elif late := too_late(subject, site):
            outcome = f"wrong: {late}, then refused: {words}"
        else:
            outcome = f"refused: {words}"
    except Wrong as error:
        outcome = f"wrong: {error}"
    except Exception as error:
        outcome = f"wrong: {type(error).__name__} at {where(error)}: {' '.join(str(error).split())[:200]}"
    try:
        plain_again(subject)
    except Exception as error:
        subject.pipe = subject.record.build()
        subject.record.call(subject.pipe, subject.case)
        if not outcome.startswith("wrong"):
            outcome = f"wrong: after disable: {error}"
    return outcome


def names_something(words: str, pipe) -> bool:
    """Whether a refusal names the pipeline, one of its parts, a module, or a setting (as `name=`)."""
    parts = [part for part in pipe.components.values() if part is not None]
    modules = [module for name in TRANSFORMERS if getattr(pipe, name, None) for module in getattr(pipe, name).modules()]
    names = {type(thing).__name__ for thing in (pipe, *parts, *modules)}
    return bool(re.search(r"\b[a-z_]+=", words)) or any(name in words for name in names)


def keys(steps: int) -> list[int]:
    return [key for key in KEYS if key < steps - 1] or [0]


def all_steps_computed(subject: Subject, site: str) -> None:
    """With every step computed the result is the uncached one, bit for bit."""
    result, _ = subject.run(dpcache.Method(EvenlySpaced(subject.steps, subject.steps), site, Reuse()))
    if off := difference(result, subject.plain):
        raise Wrong(f"with every step computed the result is off by {off:.1e}")


def some_steps_computed(subject: Subject, site: str) -> list[torch.Tensor]:
    """The blocks run in the schedule's steps, whole and in every branch, and in no others."""
    computed = keys(subject.steps)
    result, calls = subject.run(dpcache.Method(Schedule(computed, subject.steps), site, Reuse()))
    if [str(call) for call in calls] != [str(call) for call in subject.calls]:
        raise Wrong(f"{len(calls)} transformer calls instead of {len(subject.calls)}")
    for call, plain in zip(calls, subject.calls):
        if call.step in computed:
            if call.ran != plain.ran:
                raise Wrong(f"{call} computed {len(call.ran)} of {len(plain.ran)} linear layers: {pattern(calls)}")
            continue
        idle = {name for name in call.ran if ".emb." not in name}  # DiT's output layers use its first block's embedder
        if site not in _SKIPPED_WHOLE:  # norms and modulations run, and so may a layer that is a branch itself
            idle = {name for name in call.ran if name.count(".") > 2 and not _NO_BRANCH.search(name)}
        if idle:
            raise Wrong(f"{call} computed {len(idle)} linear layers of its blocks, {min(idle)} first: {pattern(calls)}")
    return result


def pattern(calls: list[Call]) -> str:
    """X for each call that computed something, . for the others, by steps."""
    text = ""
    for before, call in zip([None, *calls], calls):
        if before is not None and (before.generation, before.step) != (call.generation, call.step):
            text += " "
        text += "X" if call.ran else "."
    return text


def same_input_every_step(subject: Subject, site: str) -> None:
    """Where each call of a step gets the same at every step, and something else than its siblings, it returns the
    same at every step, computed or predicted: no branch is predicted from another one's history. So, too, before a
    refusal."""
    first = first_of(subject.calls)
    method = dpcache.Method(Schedule(keys(subject.steps), subject.steps), site, Reuse())
    try:
        subject.run(method, replay=subject.calls)
    finally:
        for call in subject.latest:
            off = difference(call.output, first[call.generation, call.part, call.number].output)
            if off > (1e-4 if site in _SUMS else 0):
                kind = "computed" if call.ran else "predicted"
                raise Wrong(f"with the same input at every step, {call} ({kind}) is off by {off:.1e}")


def too_late(subject: Subject, site: str) -> str | None:
    """What was wrong of the calls that had returned before a refusal."""
    if subject.latest:
        try:
            same_input_every_step(subject, site)
        except Wrong as error:
            return str(error)
        except Exception:  # the refusal itself, or a pipeline whose shapes change in mid-run, so that it cannot go on
            return None
    return None


def branches_named(subject: Subject, site: str, result: list[torch.Tensor]) -> None:
    """The result does not change where every call is told its number in the step as its cache context."""
    method = dpcache.Method(Schedule(keys(subject.steps), subject.steps), site, Reuse())
    named, _ = subject.run(method, name=True)
    if off := difference(result, named):
        raise Wrong(f"the result is off by {off:.1e} from the one with a named history for each call of a step")


def plain_again(subject: Subject) -> None:
    """Nothing of a method stays."""
    now = attributes(subject.pipe)
    for name, (kind, there) in subject.clean.items():
        if now.get(name) != (kind, there):
            raise Wrong(f"{name} has kept or lost {sorted(now[name][1] ^ there) if name in now else 'everything'}")
    if off := difference(subject.record.call(subject.pipe, subject.case), subject.plain):
        raise Wrong(f"the result is off by {off:.1e}")


def outcomes(
    record: Record, sites: Sequence[str] = SITES, cases: Sequence[str] | None = None
) -> Iterator[tuple[str, str, str]]:
    """(case, site, outcome) of a pipeline, for all its cases or these; "broken: WHY" where its record is not right."""
    for case in record.cases if cases is None else cases:
        try:
            subject = Subject(record, case)
        except Broken as error:
            yield case, "", f"broken: {error}"
            continue
        except Exception as error:
            yield case, "", f"broken: {type(error).__name__} at {where(error)}: {' '.join(str(error).split())[:200]}"
            continue
        for site in sites:
            yield case, site, judge(subject, site)
