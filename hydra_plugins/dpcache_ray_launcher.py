"""`hydra/launcher=ray`: every job of a sweep is a Ray task, see conf/hydra/launcher/ray.yaml.

Unlike Hydra's own launcher for Ray it lets the other jobs finish when a worker is killed, and puts that on record.
"""

import logging
import os
from collections.abc import Sequence
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
        job: options of each job's Ray task; `num_gpus: None` is 1 where the cluster has any, else 0.
    """

    def __init__(self, init: DictConfig, job: DictConfig):
        self.init, self.job = OmegaConf.to_container(init), OmegaConf.to_container(job)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        try:
            import ray  # here, because Hydra imports all launchers for every command
        except ImportError:
            raise CompactHydraException("hydra/launcher=ray needs ray: pip install 'dpcache[ray]'") from None

        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        Path(self.config.hydra.sweep.dir).mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(ignore_reinit_error=True, **self.init)
        if self.job.get("num_gpus") is None:  # with 0, Ray hides the GPUs from the job
            self.job["num_gpus"] = min(1, ray.cluster_resources().get("GPU", 0))
        task = ray.remote(_run)
        context, jobs = ray.put((self.hydra_context, self.task_function, self.config, Singleton.get_state())), []
        for index, overrides in enumerate(job_overrides, initial_job_idx):
            config = _job(self.hydra_context, self.config, overrides, index)
            log.info("\t#%d : %s", index, " ".join(filter_overrides(overrides)))
            name = str(config.hydra.sweep.subdir)
            # No retries: what killed one worker may kill the next.
            job = task.options(name=name, max_retries=0, **self.job).remote(context, list(overrides), index)
            jobs.append((config, name, job))
        return [self._wait(*job) for job in jobs]

    def _wait(self, config: DictConfig, name: str, job: Any) -> JobReturn:
        import ray

        from eval import failures

        try:
            return ray.get(job)
        except ray.exceptions.RayError as error:  # killed, or out of memory: on record like any failure
            failures.record(
                Path(config.hydra.sweep.dir, name), f"{type(error).__name__}: {' '.join(str(error).split())}"
            )
            return JobReturn(overrides=config.hydra.overrides.task, status=JobStatus.COMPLETED)


def _job(context: HydraContext, config: DictConfig, overrides: Sequence[str], index: int) -> DictConfig:
    """The configuration of one job of the sweep."""
    config = context.config_loader.load_sweep_config(config, list(overrides))
    with open_dict(config):
        config.hydra.job.num, config.hydra.job.id = index, f"{config.hydra.job.name}_{index}"
    HydraConfig.instance().set_config(config)  # which the names of run folders depend on
    return config


def _run(context: tuple, overrides: Sequence[str], index: int) -> JobReturn:
    """A job, in its worker."""
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
