"""The folder of a run: where it is, that one run alone writes there, and which of its files checkpoints still need."""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import uuid
import weakref
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.utilities import rank_zero_warn

from lightning_goldy.core.files import atomic_write, parents_of, require_local, without_scheme
from lightning_goldy.core.sharding import Replicas

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows
    fcntl = None  # type: ignore[assignment]

_UNLOGGED = "goldy_logs"
_LOCK = ".lock"
_NOTES = ".run.json"


def require_local_run(trainer: L.Trainer) -> None:
    """Refuses a run whose results would lie in another storage, before anything is loaded.

    Raises:
        ValueError: The first logger's folder or the default root is no local path.
    """
    for logger in trainer.loggers[:1]:
        # Not log_dir, whose number a logger chooses when it is first asked.
        if logger.save_dir:
            require_local(logger.save_dir, f"the folder of {type(logger).__name__}")
            return
    require_local(trainer.default_root_dir, "default_root_dir")


def run_root(trainer: L.Trainer) -> Path:
    """The local folder that the runs of the first logger, or of the default root, lie in."""
    return require_local((trainer.loggers[0].save_dir if trainer.loggers else None) or trainer.default_root_dir)


POOL = ".goldy_bases"
"""The folder beside the runs in which each base lies once; runs that begin with it have a hard link to it."""


def prune_bases(pool: Path) -> None:
    """Removes the bases that no run has any more."""
    for file in pool.glob("*.safetensors"):
        if file.stat().st_nlink == 1:
            file.unlink()


def run_directory(trainer: L.Trainer) -> Path:
    """The folder of this run: the first logger's, or a numbered one below the default root; the same on all ranks.

    A collective: every rank must call.
    """
    if trainer.loggers:
        logger = trainer.loggers[0]
        # Loggers of services share one save_dir between runs.
        own = getattr(logger, "log_dir", None) or os.path.join(
            logger.save_dir or trainer.default_root_dir, str(logger.name), str(logger.version)
        )
        return require_local(_of_rank_zero(str(own)), f"the folder of {type(logger).__name__}")
    known = getattr(trainer, "_goldy_run_directory", None)
    if known is None:
        root = require_local(trainer.default_root_dir, "default_root_dir") / _UNLOGGED
        known = Path(_of_rank_zero(str(_new_version(root)) if trainer.is_global_zero else ""))
        # All callbacks of a trainer share one folder.
        trainer._goldy_run_directory = known  # type: ignore[attr-defined]
    return known


def _of_rank_zero(value: str) -> str:
    return Replicas.world().gather_objects(value)[0]


def _new_version(root: Path) -> Path:
    """Makes the next numbered folder; another run that starts at this moment gets another one."""
    taken = [int(path.name[8:]) for path in root.glob("version_*") if path.name[8:].isdigit()]
    number = max(taken, default=-1) + 1
    while True:
        try:
            (root / f"version_{number}").mkdir(parents=True)
            return root / f"version_{number}"
        except FileExistsError:
            if not (root / f"version_{number}").exists():
                raise
            number += 1
        except OSError as error:
            raise PermissionError(f"results cannot be written to {root}: {error}") from error


_held: dict[str, tuple[int, weakref.ref[L.Trainer]]] = {}


def lock_folder(folder: Path, trainer: L.Trainer) -> None:
    """Keeps other runs out of a folder until this one ends, or its process does.

    The lock is the operating system's on a file, so a process that died holds none; a later run of this process takes
    over what an ended or failed one held. A file system without locks is told of and used without.

    Args:
        folder: Made when missing.
        trainer: Whose run it is; its callbacks share the lock.

    Raises:
        RuntimeError: Another run is writing there.
        PermissionError: The folder cannot be written.
    """
    key = str(folder.resolve())
    held = _held.get(key)
    if held is not None:
        holder = held[1]()
        if holder is not None and holder is not trainer and holder.state.status == "running":
            raise RuntimeError(_refusal(folder, "another trainer of this process"))
        _held[key] = held[0], weakref.ref(trainer)
        return
    if fcntl is None:  # pragma: no cover - Windows
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _locked(folder)
    except OSError as error:
        raise PermissionError(f"results cannot be written to {folder}: {error}") from error
    if descriptor is not None:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps({"process": os.getpid(), "host": socket.gethostname()}).encode())
        _held[key] = descriptor, weakref.ref(trainer)
        weakref.finalize(trainer, _release, key, descriptor)


def unlock_folder(folder: Path) -> None:
    """Lets other runs into a folder; nothing happens where this process holds no lock."""
    key = str(folder.resolve())
    if key in _held:
        _release(key, _held[key][0])


def _release(key: str, descriptor: int) -> None:
    if _held.get(key, (None,))[0] != descriptor:
        return
    del _held[key]
    # While it is held: whoever waits for this file sees that it is gone, and makes another.
    Path(key, _LOCK).unlink(missing_ok=True)
    os.close(descriptor)


def _locked(folder: Path) -> int | None:
    """The descriptor of the folder's locked file; None where the file system has no locks."""
    path = folder / _LOCK
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _same_file(path, descriptor):
                return descriptor
        except OSError as error:
            who = os.read(descriptor, 1000).decode("utf-8", "replace")
            os.close(descriptor)
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                rank_zero_warn(f"{folder} cannot be locked ({error}): see to it that no second run writes there")
                return None
            raise RuntimeError(_refusal(folder, _told_of(who))) from error
        os.close(descriptor)


def _same_file(path: Path, descriptor: int) -> bool:
    try:
        # Not opened: closing it would give the lock away.
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _told_of(text: str) -> str:
    try:
        known = json.loads(text)
        return f"process {int(known['process'])} on {known['host']}"
    except (ValueError, TypeError, KeyError):
        return "another process"


def _refusal(folder: Path, who: str) -> str:
    return (
        f"{who} is writing results to {folder}: give this run a folder of its own, such as another version= of its "
        "logger, or wait until the other one has ended"
    )


def find_previous(recorded: str, identity: str | None, checkpoint: Any) -> Path | None:
    """The folder of a callback of the run that is resumed, also when it was moved together with its checkpoint.

    Looked for where it was, and then beside the checkpoint: below each folder that the checkpoint lies in, as
    ``goldy/<name>`` and with more of its former path before that.

    Args:
        recorded: Where it was.
        identity: What its notes must say, if it has any; None accepts any folder, as of a checkpoint without it.
        checkpoint: Path of the checkpoint, if known.

    Returns:
        The folder; None when it is gone, or another run's is in its place.
    """
    former = Path(recorded)
    candidates = [former]
    if checkpoint is not None and "://" not in (checkpoint := without_scheme(checkpoint)):
        parts = former.parts[1:]
        for parent in parents_of(checkpoint, 5):
            candidates += [parent.joinpath(*parts[-count:]) for count in range(2, len(parts) + 1)]
    for folder in candidates:
        unknown = identity is None or not (folder / _NOTES).is_file()
        if folder.is_dir() and (unknown or FolderNotes.read(folder).identity == identity):
            return folder
    return None


class FolderNotes:
    """What a callback's folder says of itself: which one it is, and which files belong to which checkpoint.

    A checkpoint carries a token, by which it is found again as long as it lies where Lightning keeps checkpoints. What
    was never seen there (written later, or to a place of the user's own) is taken to exist for ever.

    Args:
        identity: Differs between folders, and stays when one is moved.
        claims: By token the names of ``files`` that a checkpoint needs, and the folder in which it was ``seen``.
        callback: Class of the callback whose folder it is, by which a page names what has not fired yet.

    Example:
        >>> notes = FolderNotes("a1", {})
        >>> token = notes.claim(["base-step=2.safetensors"])
        >>> notes.released([]), len(token)
        (set(), 44)
    """

    def __init__(self, identity: str, claims: dict[str, dict[str, Any]], callback: str = "") -> None:
        self.identity, self.claims, self.callback = identity, claims, callback
        self._tokens: dict[tuple[str, int, int], frozenset[str]] = {}

    @classmethod
    def read(cls, folder: Path) -> FolderNotes:
        """The notes of a folder; new ones where there are none, or they are broken (then no file ever goes)."""
        try:
            known = json.loads((folder / _NOTES).read_text())
            claims = {
                str(token): {"files": [str(name) for name in claim["files"]], "seen": claim["seen"]}
                for token, claim in known["claims"].items()
            }
            return cls(str(known["identity"]), claims, str(known.get("callback", "")))
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return cls(uuid.uuid4().hex, {})

    def write(self, folder: Path) -> None:
        """Writes them into a folder."""
        told = {"identity": self.identity, "callback": self.callback, "claims": self.claims}
        atomic_write(folder / _NOTES, json.dumps(told))

    def claim(self, files: Iterable[str]) -> str:
        """Notes that a checkpoint which is about to be written needs some files.

        Returns:
            The token that the checkpoint is to carry.
        """
        token = f"{_TOKEN}{uuid.uuid4().hex}"
        self.claims[token] = {"files": sorted(files), "seen": None}
        return token

    def released(self, folders: Iterable[Path]) -> set[str]:
        """The files that only checkpoints needed which have been removed since.

        Args:
            folders: Where Lightning keeps checkpoints.
        """
        places = {str(folder) for folder in folders} | {claim["seen"] for claim in self.claims.values()} - {None}
        present, listed = self._present(places)
        for token, place in present.items():
            if token in self.claims:
                self.claims[token]["seen"] = place
        gone = [token for token, claim in self.claims.items() if claim["seen"] in listed and token not in present]
        files = {name for token in gone for name in self.claims.pop(token)["files"]}
        return files - {name for claim in self.claims.values() for name in claim["files"]}

    def _present(self, places: Iterable[str]) -> tuple[dict[str, str], set[str]]:
        """Tokens of the checkpoints in some folders, with their folder, and the folders that could be read."""
        present: dict[str, str] = {}
        listed, known = set(), {}
        for place in places:
            try:
                for path, key in _checkpoints(Path(place)):
                    known[key] = self._tokens.get(key) or _tokens_in(path)
                    present.update(dict.fromkeys(known[key], place))
                listed.add(place)
            except OSError:
                continue
        self._tokens = known
        return present, listed


_TOKEN = "goldy-claim-"


def _checkpoints(folder: Path) -> Iterator[tuple[Path, tuple[str, int, int]]]:
    """The files of the checkpoints in a folder, each with what changes when it is written anew."""
    # Metric names with a slash make folders of their own, and sharded checkpoints are folders.
    os.listdir(folder)
    for pattern in ("*.ckpt", "*/*.ckpt", "*.ckpt/*.pt", "*/*.ckpt/*.pt"):
        for path in folder.glob(pattern):
            if path.is_file():
                facts = path.stat()
                yield path, (str(path), facts.st_mtime_ns, facts.st_size)


def _tokens_in(path: Path) -> frozenset[str]:
    """The tokens that a checkpoint carries; nothing is unpickled. None of one that is not whole."""
    try:
        with zipfile.ZipFile(path) as archive:
            name = next((name for name in archive.namelist() if name.endswith("data.pkl")), None)
            content = b"" if name is None else archive.read(name)
    except (zipfile.BadZipFile, EOFError):
        return frozenset()
    return frozenset(token.decode() for token in re.findall(_TOKEN.encode() + rb"[0-9a-f]{32}", content))


def file_names(state: Any) -> Iterator[str]:
    """The names of vector files anywhere in a checkpoint's state.

    Example:
        >>> list(file_names({"files": {"update": "update-step=2.safetensors"}, "last_step": 2}))
        ['update-step=2.safetensors']
    """
    if isinstance(state, str) and state.endswith(".safetensors") and Path(state).name == state:
        yield state
    elif isinstance(state, Mapping):
        for value in state.values():
            yield from file_names(value)
    elif isinstance(state, (list, tuple)):
        for value in state:
            yield from file_names(value)


def checkpoint_folders(trainer: L.Trainer) -> list[Path]:
    """The local folders in which Lightning keeps checkpoints of this trainer."""
    places = {getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks}
    local = [without_scheme(place) for place in places if place]
    return [Path(place).absolute() for place in local if "://" not in place]
