"""Where a command writes its results, and the report that it ends with."""

from __future__ import annotations

from pathlib import Path

from lightning_goldy.callbacks.engine.store import ROWS
from lightning_goldy.core.files import printable
from lightning_goldy.core.sharding import Replicas


def output_folder(output: str | Path | None, analysis: str, runs: str) -> Path:
    """The folder that was asked for, or a numbered one of its own, the same on all processes.

    Args:
        output: What was asked for; None for ``runs/<runs>/version_<n>``.
        analysis: The analysis whose rows will lie below ``goldy/``.
        runs: Folder of the numbered ones.

    Raises:
        FileExistsError: The folder holds such rows already.
    """
    if output is not None:
        folder = Path(output).expanduser()
        if (folder / "goldy" / analysis / ROWS).exists():
            raise FileExistsError(f"{folder} holds rows of {analysis} already; give another --output")
        # Before any process writes there.
        Replicas.world().meet("the folder of the results")
        return folder
    return next_version(Path("runs") / runs)


def next_version(folder: Path) -> Path:
    """The next free ``version_<n>`` below a folder, as the first process sees it.

    Example:
        >>> next_version(Path("nowhere"))
        PosixPath('nowhere/version_0')
    """
    number = 0
    while (folder / f"version_{number}").exists():
        number += 1
    return folder / f"version_{Replicas.world().gather_objects(number)[0]}"


def print_report(folder: Path) -> None:
    """Writes the report of a folder and prints where it is, or why there is none."""
    from lightning_goldy.report.page import write_report

    try:
        print(printable(f"report: {write_report(folder)}"))
    except ImportError as error:
        print(printable(f"no report: {error}"))
