"""`hydra/launcher=ray`: the jobs of a sweep, shared out among workers of Ray, see conf/hydra/launcher/ray.yaml.

A worker is a process that keeps its GPU and what its jobs have loaded, and takes one job after the other. Unlike
Hydra's own launcher for Ray this one lets the other jobs finish when a worker is killed, and puts that on record.
"""

import logging
import os
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, configure_log, filter_overrides, run_job, setup_globals
from hydra.errors import CompactHydraException
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

log = logging.getLogger(__name__)


class RayLauncher(Launcher):
    """
    Args:
        init: arguments of `ray.init`.
        job: options of each worker, a Ray actor; `num_gpus: None` is 1 where the cluster has any, else 0.
    """

    def __init__(self, init: DictConfig, job: DictConfig):
        self.init, self.job = OmegaConf.to_container(init), OmegaConf.to_container(job)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        try:
            import ray  # here, because Hydra imports all launchers for every command
        except ImportError:
            raise CompactHydraException("hydra/launcher=ray needs ray: pip install -e '.[ray]'") from None

        from eval import failures

        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        Path(self.config.hydra.sweep.dir).mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(ignore_reinit_error=True, **self.init)
        if self.job.get("num_gpus") is None:  # with 0, Ray hides the GPUs from the job
            self.job["num_gpus"] = min(1, ray.cluster_resources().get("GPU", 0))
        context, queue = ray.put((self.hydra_context, self.task_function, self.config, Singleton.get_state())), deque()
        for index, overrides in enumerate(job_overrides, initial_job_idx):
            config = _job(self.hydra_context, self.config, overrides, index)
            log.info("\t#%d : %s", index, " ".join(filter_overrides(overrides)))
            queue.append((index, list(overrides), str(config.hydra.sweep.subdir), config.hydra.overrides.task))

        hire = ray.remote(_Worker).options(**self.job).remote
        results, at_work = {}, {}

        def start(worker: Any) -> None:
            index, overrides, name, task = queue.popleft()
            at_work[worker.run.options(name=name).remote(context, overrides, index)] = worker, index, name, task

        for _ in range(min(self._room(ray.cluster_resources()), len(queue))):
            start(hire())
        while at_work:
            (done,), _ = ray.wait(list(at_work), num_returns=1)
            worker, index, name, task = at_work.pop(done)
            try:
                results[index] = ray.get(done)
            except ray.exceptions.RayError as error:  # killed, or out of memory: on record like any failure
                said = f"{type(error).__name__}: {' '.join(str(error).split())}"
                failures.record(Path(self.config.hydra.sweep.dir, name), said)
                results[index], worker = JobReturn(overrides=task, status=JobStatus.COMPLETED), None
            if queue:
                start(worker or hire())
        return [results[index] for index in sorted(results)]

    def _room(self, cluster: Mapping[str, float]) -> int:
        """How many workers the cluster can hold, at least one."""
        asked = {"CPU": self.job.get("num_cpus") or 0, "GPU": self.job["num_gpus"], **(self.job.get("resources") or {})}
        return max(1, int(min((cluster.get(name, 0) / count for name, count in asked.items() if count), default=1)))


class _Worker:
    def run(self, context: tuple, overrides: Sequence[str], index: int) -> JobReturn:
        """A job. Its process is Ray's, and its own until it ends."""
        hydra_context, task_function, config, state = context
        setup_globals()
        Singleton.set_state(state)
        return run_job(
            hydra_context=hydra_context,
            task_function=task_function,
            config=_job(hydra_context, config, overrides, index),
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )


def _job(context: HydraContext, config: DictConfig, overrides: Sequence[str], index: int) -> DictConfig:
    """The configuration of one job of the sweep."""
    config = context.config_loader.load_sweep_config(config, list(overrides))
    with open_dict(config):
        config.hydra.job.num, config.hydra.job.id = index, f"{config.hydra.job.name}_{index}"
    HydraConfig.instance().set_config(config)  # which the names of run folders depend on
    return config
