"""The base of a saved model: what it was before the finetune, found or named."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as L
from torch import nn

from lightning_goldy.callbacks.golden_snapshot import BASE_FILE
from lightning_goldy.core.base import BaseParameters, read_base
from lightning_goldy.core.objective import CausalLMObjective, Objective
from lightning_goldy.core.space import ParameterSpace
from lightning_goldy.core.store import StoreError, fingerprint, load_vectors, read_header
from lightning_goldy.core.vector import ParameterVector
from lightning_goldy.module import GoldyModule
from lightning_goldy.saved import SavedModel

_SNAPSHOT = "golden_snapshot"
# A checkpoint lies in its run's folder or a little below.
_LEVELS = 3


@dataclass(frozen=True)
class FoundBase:
    """The base, or why there is none.

    Args:
        values: Its parameters; None where nothing tells what they were.
        source: Where they come from, or why there are none, in words for a reader.
    """

    values: BaseParameters | None
    source: str


@dataclass(frozen=True)
class _Snapshot:
    """What a checkpoint tells of its run's snapshot; the hash is None where it tells nothing."""

    name: str
    folder: Path | None
    base_hash: str | None


def find_base(
    given: str | Path | None, saved: SavedModel, pl_module: L.LightningModule, model: nn.Module, objective: Objective
) -> FoundBase:
    """The base of a saved model: what was given, the run's golden snapshot, or the pretrained model.

    A snapshot that the checkpoint knows by its hash must have that hash. The model as the configuration builds it
    serves where it has that hash, too, or where all of its weights are pretrained ones.

    Args:
        given: A vector file, a folder of ``save_pretrained``, a Lightning checkpoint, a snapshot's folder or that of a
            run; None to look for one.
        saved: The saved model.
        pl_module: As the configuration builds it, before any saved weights are loaded.
        model: The part that is analysed, likewise.
        objective: What the model is trained for.

    Raises:
        FileNotFoundError: Nothing is at the place given.
        StoreError: What was found is no base of this model.
    """
    space = ParameterSpace.of(model)
    if given is not None:
        path = _file_of(Path(given).expanduser())
        prefix = next((f"{name}." for name, child in pl_module.named_modules() if child is model and name), "")
        return FoundBase(BaseParameters(read_base(path, model, space, prefix=prefix)), str(path))
    known = _told(saved)
    found = _of_the_run(saved, known, model, space)
    if found is not None:
        return found
    return _as_built(known, pl_module, model, space, objective)


def _file_of(path: Path) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"no base at {path}")
    # A snapshot's folder also holds vector files that are no base.
    places = (path / BASE_FILE, path / "goldy" / _SNAPSHOT / BASE_FILE)
    return next((place for place in places if place.is_file()), path)


def _told(saved: SavedModel) -> _Snapshot:
    for key, state in saved.callback_states().items():
        if key.startswith("GoldenSnapshot[") and state.get("base_hash"):
            folder = state.get("folder")
            name = key.removeprefix("GoldenSnapshot[").removesuffix("]")
            return _Snapshot(name, None if folder is None else Path(folder), state["base_hash"])
    return _Snapshot(_SNAPSHOT, None, None)


def _of_the_run(saved: SavedModel, known: _Snapshot, model: nn.Module, space: ParameterSpace) -> FoundBase | None:
    places = [parent / "goldy" / known.name for parent in list(saved.path.absolute().parents)[:_LEVELS]]
    places += [known.folder] if known.folder is not None else []
    files = [place / BASE_FILE for place in dict.fromkeys(places) if (place / BASE_FILE).is_file()]
    for file in files:
        header = read_header(file)
        if known.base_hash is not None and header.base_hash != known.base_hash:
            continue
        vector, _ = load_vectors(file, model)
        if set(vector.space) != set(space):
            different = sorted(set(space) ^ set(vector.space))
            raise StoreError(f"{file} is no base of this model, which differs in {different[0]!r}; give --base")
        if fingerprint(vector) != header.base_hash:
            raise StoreError(f"{file} does not have the hash that it was written with; give --base")
        # The model may have been built in another dtype than it was trained in.
        values = {name: vector[name].to(parameter.dtype) for name, parameter in space.resolve(model).items()}
        return FoundBase(BaseParameters(ParameterVector(space, values)), f"the run's golden snapshot, {file}")
    if files:
        raise StoreError(f"{files[0]} is not the snapshot that {saved.path} was trained with; give --base")
    return None


def _as_built(
    known: _Snapshot, pl_module: L.LightningModule, model: nn.Module, space: ParameterSpace, objective: Objective
) -> FoundBase:
    vector = ParameterVector.of(model, space)
    if known.base_hash is not None:
        if fingerprint(vector) == known.base_hash:
            return FoundBase(
                BaseParameters(vector), "the model as the configuration builds it, which has the snapshot's hash"
            )
        return FoundBase(
            None,
            "the run's golden snapshot is gone, and what the configuration builds has another hash; give --base",
        )
    alone = "no golden snapshot lies beside the checkpoint"
    random = _random_part(pl_module, objective)
    if random:
        return FoundBase(None, f"{alone}, and {random}; give --base")
    name = pl_module.hparams["model"]
    return FoundBase(BaseParameters(vector), f"the pretrained model {name} as the configuration builds it, for {alone}")


def _random_part(pl_module: L.LightningModule, objective: Objective) -> str:
    """Why the model as it is built cannot be the base; nothing where all of its weights are pretrained ones."""
    if not isinstance(pl_module, GoldyModule):
        return f"nothing tells whether {type(pl_module).__name__} begins with pretrained weights"
    if not isinstance(pl_module.hparams.get("model"), str):
        return "the configuration names no pretrained model"
    if pl_module.lora_options is not None:
        return "new adapters begin at random"
    if not isinstance(objective, CausalLMObjective):
        return "a new head begins at random"
    return ""
