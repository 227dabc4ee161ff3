"""Where the cells of a sweep run: in processes of this machine, or as tasks of a Ray cluster.

No cell is ever tried twice by itself: what a cell that died had released stays released. The same command goes on.
"""

import logging
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any

from dpft.errors import DPFTError, RecipeError
from dpft.workflows.cell import run_cells
from dpft.workflows.grid import Planned

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
GIGABYTES = 2**30
PROCESS = 1.5 * GIGABYTES  # of libraries, data and activations of a small run
COPIES = 6  # of a model in memory: weights, what is compared with them, gradients, sums, optimizer

Group = Sequence[Planned]  # cells that one process runs, one after another


def groups(cells: Sequence[Planned]) -> list[Group]:
    """Each cell by itself, and all heads together, which share their features."""
    heads = [cell for cell in cells if cell.plan is not None and cell.recipe.learns_head]
    others: list[Group] = [[cell] for cell in cells if cell not in heads]
    return [heads, *others] if heads else others


def default_jobs(cells: Sequence[Planned]) -> int:
    """As many processes as cores and memory have room for; one where there is a GPU, which is one."""
    import psutil
    import torch

    if torch.cuda.is_available():
        return 1
    model = _size(cells[0].recipe.model.path)
    room = psutil.virtual_memory().available // int(PROCESS + COPIES * model)
    return max(1, min(len(groups(cells)), cores(), room))


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_processes(cells: Sequence[Planned], jobs: int) -> None:
    """Run the cells, ``jobs`` at a time, each group in a new process with its share of the cores.

    An error ends it: no further cell begins, and those under way run to their end.

    Raises:
        DPFTError: of a cell; or its process was killed.
    """
    threads = max(1, cores() // jobs)
    cells = [_with_memory(cell, jobs) for cell in cells]
    with ThreadPoolExecutor(jobs) as starters:
        started = [starters.submit(_in_own_process, group, threads) for group in groups(cells)]
        try:
            for one in as_completed(started):
                one.result()
        except BaseException:
            for one in started:
                one.cancel()
            raise


def _with_memory(cell: Planned, jobs: int) -> Planned:
    """The cell, whose micro-batches may take its share of what the machine has: a number that no data move."""
    import psutil
    import torch

    run = cell.recipe.run
    if run.memory is not None or torch.cuda.is_available():
        return cell
    run = run.model_copy(update=dict(memory=round(psutil.virtual_memory().total / GIGABYTES / 3 / jobs, 1)))
    return replace(cell, recipe=cell.recipe.model_copy(update=dict(run=run)))


def _in_own_process(group: Group, threads: int) -> None:
    log = group[0].files.log_file
    with ProcessPoolExecutor(1, get_context("spawn"), _begin, (threads, log)) as pool:
        try:
            pool.submit(run_cells, group, own_process=True).result()
        except BrokenProcessPool as error:
            raise DPFTError(_died(group)) from error


def _begin(threads: int, log: Path) -> None:
    """Prepare a cell's process: its threads, where its libraries' messages go, and that it ends with the sweep."""
    threading.Thread(target=_end_with, args=(parent_process(),), daemon=True).start()
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    _limit(threads)


def _end_with(parent: Any) -> None:
    connection.wait([parent.sentinel])
    os._exit(1)  # as if it were killed too: nobody would go on with the sweep's table


def _limit(threads: int) -> None:
    os.environ.update(dict.fromkeys(THREADS, str(threads)))
    import torch

    torch.set_num_threads(threads)


def on_ray(cells: Sequence[Planned], address: str, jobs: int | None) -> None:
    """Run the cells as tasks of the Ray cluster at ``address``, or of a new one on this machine (``local``).

    Every machine must see the recipe's data, the models and the sweep's folder under the same paths.

    Args:
        jobs: how many run at once; by default as many as the cluster has room for.

    Raises:
        RecipeError: Ray is not installed, or there is no such cluster.
        DPFTError: of a cell; or its worker died.
    """
    with _cluster(address, jobs) as ray:
        work = groups(cells)
        each = _share(ray, min(jobs or len(work), len(work)))
        # No retries: a task that is run again would release again what nobody counted as released twice.
        task = ray.remote(max_retries=0, max_calls=1, **each)(_on_worker)
        waiting = {task.remote(group, os.getcwd(), each["num_cpus"]): group for group in work}
        while waiting:
            (done,), _ = ray.wait(list(waiting))
            group = waiting.pop(done)
            try:
                ray.get(done)
            except ray.exceptions.RayTaskError as error:
                raise (error.cause if isinstance(error.cause, BaseException) else error) from None
            except ray.exceptions.RayError as error:
                raise DPFTError(_died(group)) from error


def _on_worker(group: Group, folder: str, threads: int) -> None:
    os.chdir(folder)
    _limit(threads)
    run_cells(group, own_process=True)


@contextmanager
def _cluster(address: str, jobs: int | None) -> Iterator[Any]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise RecipeError("--ray needs Ray, which is not installed: run `pip install dpft[ray]`.") from error
    facts: dict[str, Any] = dict(address=address, log_to_driver=False, logging_level=logging.ERROR)
    if address == "local":
        facts |= dict(num_cpus=jobs or cores(), include_dashboard=False)
    try:
        ray.init(**facts)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise RecipeError(
            f"There is no Ray cluster at {address} ({error}): name a running one, or `local` for this machine."
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _share(ray: Any, jobs: int) -> dict[str, int]:
    """What one of ``jobs`` tasks at once has of the cluster: whole cores of one machine, and a GPU where there are."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    all_cores = sum(int(machine.get("CPU", 0)) for machine in machines)
    most = max(int(machine.get("CPU", 0)) for machine in machines)
    has_gpu = any(machine.get("GPU") for machine in machines)
    return {"num_cpus": max(1, min(all_cores // jobs, most)), "num_gpus": int(has_gpu)}


def _died(group: Group) -> str:
    return (
        f"The process of {', '.join(cell.title for cell in group[:3])} was killed, perhaps because memory ran out "
        f"({group[0].files.log_file} has its last words): run the same command again, with fewer --jobs."
    )


def _size(path: str) -> int:
    """Bytes of a model's files; those of a small one where they lie on a hub."""
    from dpft.recipe import expand

    folder = Path(expand(path))
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) or GIGABYTES // 4
