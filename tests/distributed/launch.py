"""Runs a function in several processes joined by gloo, and brings failures and results back."""

from __future__ import annotations

import datetime
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_processes(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 240) -> list[Any]:
    """Calls ``function(*args)`` in ``world_size`` processes of one process group.

    Args:
        function: Top-level, so that spawned processes find it.
        world_size: Number of processes.
        args: Picklable arguments.
        timeout: Seconds until the processes are ended.

    Returns:
        What each rank returned, in the order of ranks; picklable.

    Raises:
        AssertionError: A rank failed or hung; the first failure in time is shown, for the others only follow from it.
    """
    with tempfile.TemporaryDirectory() as folder:
        # Forked from a server that has no threads and no process group, only the imports, which take seconds.
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["tests.distributed.preload"])
        processes = [
            context.Process(target=_run, args=(rank, world_size, folder, function, args), daemon=True)
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        failure = _wait(processes, Path(folder), time.monotonic() + timeout)
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()
        if failure:
            raise AssertionError(failure)
        return [torch.load(Path(folder) / f"result-{rank}", weights_only=False) for rank in range(world_size)]


def _wait(processes: list, folder: Path, deadline: float) -> str | None:
    """Waits for all; the text of the first failure, or None."""
    while any(process.is_alive() for process in processes):
        if any(process.exitcode for process in processes):
            break
        if time.monotonic() > deadline:
            alive = [rank for rank, process in enumerate(processes) if process.is_alive()]
            return f"ranks {alive} were still running"
        time.sleep(0.05)
    if not any(process.exitcode for process in processes):
        return None
    # A failing rank tears down the connections of the others, whose errors come moments later.
    time.sleep(0.5)
    reports = sorted(folder.glob("failure-*"), key=lambda path: path.stat().st_mtime_ns)
    if reports:
        return f"{reports[0].name}:\n{reports[0].read_text()}"
    return f"exit codes {[process.exitcode for process in processes]}"


def _run(rank: int, world_size: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=60),
        )
        torch.save(function(*args), f"{folder}/result-{rank}")
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:  # noqa: BLE001  whatever it is, the report goes to the parent
        report = Path(folder) / f"failure-{rank}"
        report.with_suffix(".part").write_text(traceback.format_exc())
        report.with_suffix(".part").rename(report)
        os._exit(1)  # without waiting for threads that wait for other ranks
