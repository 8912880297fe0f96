"""Models that were saved, read without running any code, and the base that each was finetuned from."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from torch import nn
from torch.optim import Optimizer

from lightning_goldy.analysis.basin import adam_curvature_from_state
from lightning_goldy.analysis.heads import load_gates
from lightning_goldy.callbacks.engine.weights import FROZEN_FILE, Frozen, Weights
from lightning_goldy.core.architecture import HeadGates
from lightning_goldy.core.architecture.adapters import WeightSpace, changes_in, plain_below
from lightning_goldy.core.base import (
    ADAPTERS_FILE,
    BASE_FILE,
    BaseParameters,
    base_files,
    frozen_apart,
    read_base,
    read_checkpoint,
)
from lightning_goldy.core.files import StoreError, parents_of
from lightning_goldy.core.objective import CausalLMObjective, MaskedLMObjective, Objective, Seq2SeqObjective
from lightning_goldy.core.sharding import is_sharded, local, scatter_like
from lightning_goldy.core.space import ParameterSpace, SpaceError
from lightning_goldy.core.store import fingerprint, load_vectors, read_header
from lightning_goldy.core.vector import ParameterVector
from lightning_goldy.training.module import GoldyModule
from lightning_goldy.training.subject import find_model


@dataclass(frozen=True)
class SavedModel:
    """A saved model, of which nothing but the step has been read.

    Args:
        path: A ``.ckpt`` or a folder.
        step: Optimizer steps; None when nothing tells.
        epoch: Epoch in which it was saved; 0 when nothing tells.
    """

    path: Path
    step: int | None
    epoch: int

    def load_into(self, pl_module: L.LightningModule, model: nn.Module) -> None:
        """Puts the saved weights (and buffers, from a checkpoint) into the module.

        Args:
            pl_module: Takes a checkpoint's state.
            model: Takes a folder's weights; frozen parameters stay as they are, and so does what adapters lie on where
                the folder has adapters alone.

        Raises:
            StoreError: It does not fit the module.
        """
        if self.path.is_dir():
            space = ParameterSpace.of(model)
            if (self.path / ADAPTERS_FILE).is_file():
                # What adapters lie on is not saved with them, and compared where the base has it otherwise.
                space = space.subspace(name for name in space if ".base_layer." not in name)
            values = read_base(self.path, model, space)
            with torch.no_grad():
                for name, parameter in space.resolve(model).items():
                    local(parameter).copy_(local(values[name]))
            return
        checkpoint = read_checkpoint(self.path)
        self._close_heads(checkpoint, pl_module, model)
        pl_module.on_load_checkpoint(checkpoint)
        own = pl_module.state_dict()
        state = {
            name: scatter_like(own[name], value) if name in own and is_sharded(own[name]) else value
            for name, value in checkpoint["state_dict"].items()
        }
        try:
            pl_module.load_state_dict(state)
        except RuntimeError as error:
            raise StoreError(
                f"{self.path} does not fit the configuration's {type(pl_module).__name__}: {error}"
            ) from error

    @property
    def weights(self) -> Weights | None:
        """Whose weights it holds; None where nothing tells."""
        averaged = self.path.is_file() and "averaging_state" in read_checkpoint(self.path)
        return "averaged" if averaged else None

    def _close_heads(self, checkpoint: Mapping[str, Any], pl_module: L.LightningModule, model: nn.Module) -> None:
        """Closes the heads that were closed as the checkpoint was written, and no others: its weights do not tell."""
        states = [state for state in (checkpoint.get("callbacks") or {}).values() if isinstance(state, Mapping)]
        closing = []
        for state in states:
            if state.get("plasticity"):
                # Earlier versions did not say of which part.
                own = find_model(pl_module, state["model_attribute"]) if "model_attribute" in state else model
                closing.append((own, state["plasticity"]))
        for part in [model, *(own for own, _ in closing)]:
            gates = HeadGates.of(part)
            if gates is not None:
                gates.enable(gates.closed)
        for part, plasticity in closing:
            if any(order > 0 for layer in plasticity["closing"] for order in layer):
                load_gates(HeadGates.of(part) or HeadGates(part), plasticity)

    def callback_states(self) -> dict[str, Any]:
        """What the run's callbacks left in the checkpoint (of a folder: in the checkpoint beside it), by state key.

        Raises:
            StoreError: The checkpoint is not one.
        """
        checkpoint = self.path if self.path.is_file() else self.path.with_name(f"{self.path.name}.ckpt")
        states = read_checkpoint(checkpoint).get("callbacks") or {} if checkpoint.is_file() else {}
        if not isinstance(states, Mapping):
            raise StoreError(f"{checkpoint}: its 'callbacks' are no states by name, but {type(states).__name__}")
        return {str(key): state for key, state in states.items() if isinstance(state, Mapping)}

    def curvature(self, pl_module: L.LightningModule, model: nn.Module, space: ParameterSpace) -> ParameterVector:
        """The second moments of the optimizer in a checkpoint.

        Args:
            pl_module: Its ``configure_optimizers`` says which saved state belongs to which parameter.
            model: Whose parameters the space names.
            space: Which parameters.

        Raises:
            StoreError: No optimizer of the module holds all of these parameters.
            ValueError: The saved state does not fit the optimizer, or has no second moments.
        """
        wanted = {id(parameter) for parameter in space.resolve(model).values()}
        states = read_checkpoint(self.path).get("optimizer_states")
        if not isinstance(states, list):
            raise StoreError(f"{self.path}: its 'optimizer_states' are no list, but {type(states).__name__}")
        for optimizer, state in zip(_optimizers(pl_module.configure_optimizers()), states, strict=False):
            if wanted <= {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}:
                try:
                    return adam_curvature_from_state(state, optimizer, space=space, module=model)
                except (LookupError, TypeError, AttributeError) as error:
                    raise StoreError(f"{self.path}: not the state of an optimizer ({error!r})") from error
        raise StoreError(
            f"{self.path}: none of its {len(states)} optimizers holds all {len(space)} parameters; use "
            "--preconditioner none"
        )


def read_saved(path: str | Path, *, with_optimizer: bool = False) -> SavedModel:
    """Looks at a saved model, so that one that cannot work is refused before anything is measured.

    Args:
        path: A Lightning checkpoint or a folder of ``save_pretrained``.
        with_optimizer: Whether the state of an optimizer is needed.

    Raises:
        FileNotFoundError: There is nothing.
        StoreError: It is neither, or lacks the optimizer's state.

    Example:
        >>> read_saved("nowhere.ckpt")
        Traceback (most recent call last):
        FileNotFoundError: no checkpoint at nowhere.ckpt
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if path.is_dir():
        if (path / ".metadata").is_file():
            raise StoreError(
                f"{path} is a checkpoint in shards, whose index is code to run; make a file of it first with: "
                f"python -m lightning.pytorch.utilities.consolidate_checkpoint {path}"
            )
        if not any(path.glob("*.safetensors")):
            raise StoreError(f"{path}: a folder of save_pretrained holds .safetensors files; this one has none")
        if with_optimizer:
            raise StoreError(
                f"{path}: a folder of save_pretrained has no optimizer state; give the Lightning checkpoint, or use "
                "--preconditioner none"
            )
        named = re.search(r"step=(\d+)", path.name)
        return SavedModel(path, int(named[1]) if named else None, 0)
    checkpoint = read_checkpoint(path)
    if with_optimizer and not checkpoint.get("optimizer_states"):
        raise StoreError(f"{path} was saved without the optimizer's state; use --preconditioner none")
    counts = {name: checkpoint.get(name) for name in ("global_step", "epoch")}
    for name, value in counts.items():
        if value is not None and not (type(value) is int and 0 <= value < 2**53):
            raise StoreError(f"{path}: its {name!r} is no number of a training, but {value!r:.60}")
    return SavedModel(path, counts["global_step"], counts["epoch"] or 0)


def positions(saved: Sequence[SavedModel]) -> list[tuple[int, SavedModel]]:
    """Where each belongs on an axis of steps, ascending; numbered as given where steps are unknown or repeated.

    Example:
        >>> late, early = SavedModel(Path("b"), 20, 1), SavedModel(Path("a"), 10, 0)
        >>> [(step, each.path.name) for step, each in positions([late, early])]
        [(10, 'a'), (20, 'b')]
        >>> [step for step, _ in positions([late, late])]
        [0, 1]
    """
    steps = [each.step for each in saved]
    if None in steps or len(set(steps)) < len(steps):
        return list(enumerate(saved))
    return sorted(((int(each.step or 0), each) for each in saved), key=lambda pair: pair[0])


def _optimizers(configured: Any) -> list[Optimizer]:
    """The optimizers in what ``configure_optimizers`` returned, in any of the forms that Lightning takes."""
    if isinstance(configured, Optimizer):
        return [configured]
    if isinstance(configured, Mapping):
        return _optimizers(configured.get("optimizer"))
    if isinstance(configured, (list, tuple)):
        # A pair of lists holds optimizers and schedulers; anything else is one optimizer or mapping per element.
        pair = len(configured) == 2 and isinstance(configured[0], (list, tuple))
        return [each for part in (configured[0] if pair else configured) for each in _optimizers(part)]
    return []


_SNAPSHOT = "golden_snapshot"
# A checkpoint lies in its run's folder or a little below.
_LEVELS = 3


@dataclass(frozen=True)
class FoundBase:
    """The base, or why there is none.

    Args:
        values: Its parameters; None where nothing tells what they were.
        source: Where they come from, or why there are none, in words for a reader.
        prefix: Of a base that was given, what a checkpoint there puts before the model's names; None of others.
    """

    values: BaseParameters | None
    source: str
    prefix: str | None = None


@dataclass(frozen=True)
class _Snapshot:
    """What a checkpoint tells of its run's snapshot; the hash is None where it tells nothing.

    ``added`` are the hashes of the files of what had become trainable by then, by name; ``frozen`` is how what was not
    trained was as the base was taken.
    """

    name: str
    folder: Path | None
    base_hash: str | None
    added: Mapping[str, str] = field(default_factory=dict)
    frozen: Mapping[str, Any] = field(default_factory=dict)


def find_base(
    given: str | Path | None,
    saved: SavedModel,
    pl_module: L.LightningModule,
    model: nn.Module,
    objective: Objective,
    space_of_change: WeightSpace = "adapters",
) -> FoundBase:
    """The base of a saved model: what was given, the run's golden snapshot, or the pretrained model.

    A snapshot that the checkpoint knows by its hash must have that hash; it is of what had been trained by then, which
    may be less than the configuration's model would train, or more. The model as the configuration builds it serves
    where it has that hash, too, or where all of its weights are pretrained ones; new adapters, which add nothing to the
    pretrained weights, leave it the base in merged weights alone.

    Args:
        given: A vector file, a folder of ``save_pretrained``, a Lightning checkpoint, a snapshot's folder or that of a
            run; None to look for one.
        saved: The saved model.
        pl_module: As the configuration builds it, before any saved weights are loaded.
        model: The part that is analysed, likewise.
        objective: What the model is trained for.
        space_of_change: Where the change of a model with adapters is looked at, ``merged`` or ``adapters``.

    Raises:
        FileNotFoundError: Nothing is at the place given.
        StoreError: What was found is no base of this model.
    """
    space = ParameterSpace.of(model)
    if given is not None:
        path = Path(given).expanduser()
        if not path.exists():
            raise FileNotFoundError(f"no base at {path}")
        # A snapshot's folder also holds vector files that are no base.
        places = (path / BASE_FILE, path / "goldy" / _SNAPSHOT / BASE_FILE)
        path = next((place for place in places if place.is_file()), path)
        if path.name == BASE_FILE:
            space = _space_of(base_files(path), model)
        elif space_of_change == "merged" and (plain := plain_below(path, model)) is not None:
            return _as_plain(plain, path, model, space)
        prefix = next((f"{name}." for name, child in pl_module.named_modules() if child is model and name), "")
        return FoundBase(BaseParameters(read_base(path, model, space, prefix=prefix)), str(path), prefix)
    known = _told(saved)
    found = _of_the_run(saved, known, model, space)
    return found or _as_built(known, pl_module, model, space, objective, space_of_change)


def _as_plain(plain: BaseParameters, path: Path, model: nn.Module, space: ParameterSpace) -> FoundBase:
    """The base that is the plain model below adapters; with new ones that add nothing to it, for so it can be run."""
    if any(bool(change.delta.any()) for change in changes_in(model, plain)):
        return FoundBase(plain, str(path))
    own = ParameterVector.of(model, space)
    held = plain.vector(model)
    vector = ParameterVector(space, {name: held[name] if name in plain.space else own[name] for name in space})
    return FoundBase(BaseParameters(vector), str(path), "")


def load_beside(
    base: FoundBase,
    saved: SavedModel,
    pl_module: L.LightningModule,
    model: nn.Module,
    *,
    space: WeightSpace,
    who: str,
) -> list[str]:
    """Loads the saved weights once the base has been found, and has all that the base tells of trainable.

    Args:
        base: As the model was built.
        saved: The checkpoint.
        pl_module: Into which its weights go.
        model: The part of it that is analysed.
        space: Of a model with adapters, what is compared.
        who: Asks, for messages.

    Returns:
        What is to be told of the base.
    """
    if base.values is not None:
        # What was trained in the run may be frozen in the model as it is built.
        for parameter in base.values.space.resolve(model).values():
            parameter.requires_grad_(True)
    saved.load_into(pl_module, model)
    return follow_frozen(saved, base, model, space, who)


def follow_frozen(saved: SavedModel, base: FoundBase, model: nn.Module, space: WeightSpace, who: str) -> list[str]:
    """Adds to the base what adapters lie on, where it moved in the run although frozen, as by ReLoRA.

    What else is frozen and differs in a base that was given stays as it is, which is said.

    Args:
        saved: Whose checkpoint tells what was frozen, and how it was as the base was taken.
        base: Grown in place.
        model: With the saved weights.
        space: In which weights it is compared with the base.
        who: Compares, for the message.

    Returns:
        What to say of it.

    Raises:
        AdapterError: It has moved, and its values at the start are not known.
    """
    known = _told(saved)
    if base.values is None:
        return []
    told = None
    if base.prefix is not None:
        told = frozen_apart(base.source, model, base.values.space, prefix=base.prefix)
    notes = [] if told is None else [f"{base.source}: {told}"]
    if not known.frozen:
        return notes
    sums = {name: (total, square) for name, (total, square) in known.frozen["sums"].items()}
    frozen = Frozen(sums, tuple(known.frozen["below"]))
    for place in _places(saved, known):
        file = place / FROZEN_FILE
        if file.is_file() and fingerprint(load_vectors(file)[0]) == known.frozen["hash"]:
            own = _space_of([file], model).resolve(model)
            values = {name: value.to(own[name].dtype) for name, value in load_vectors(file, model)[0].items()}
            frozen.kept = BaseParameters(ParameterVector(ParameterSpace.of_tensors(own), values), copy=False)
            break
    return notes + frozen.follow(model, base.values, base.values.grow, merged=space == "merged", who=who)


def _places(saved: SavedModel, known: _Snapshot) -> list[Path]:
    """Where the run's snapshot may lie: beside the checkpoint, or where it was."""
    places = [parent / "goldy" / known.name for parent in parents_of(saved.path, _LEVELS)]
    return list(dict.fromkeys([*places, *([] if known.folder is None else [known.folder])]))


def _told(saved: SavedModel) -> _Snapshot:
    for key, state in saved.callback_states().items():
        if key.startswith("GoldenSnapshot[") and state.get("base_hash"):
            folder = state.get("folder")
            name = key.removeprefix("GoldenSnapshot[").removesuffix("]")
            added, place = dict(state.get("base_added") or {}), None if folder is None else Path(folder)
            return _Snapshot(name, place, state["base_hash"], added, dict(state.get("frozen") or {}))
    return _Snapshot(_SNAPSHOT, None, None)


def _of_the_run(saved: SavedModel, known: _Snapshot, model: nn.Module, space: ParameterSpace) -> FoundBase | None:
    files = [place / BASE_FILE for place in _places(saved, known) if (place / BASE_FILE).is_file()]
    for file in files:
        header = read_header(file)
        if known.base_hash is not None and header.base_hash != known.base_hash:
            continue
        kept = [file, *map(file.parent.joinpath, known.added)] if known.base_hash is not None else base_files(file)
        own = _space_of(kept, model)
        if known.base_hash is None and set(own) != set(space):
            different = sorted(set(space) ^ set(own))
            raise StoreError(f"{file} is no base of this model, which differs in {different[0]!r}; give --base")
        _check_hashes(kept, known)
        # The model may have been built in another dtype than it was trained in.
        values = {name: tensor for part in kept for name, tensor in load_vectors(part, model)[0].items()}
        found = {name: values[name].to(parameter.dtype) for name, parameter in own.resolve(model).items()}
        return FoundBase(BaseParameters(ParameterVector(own, found)), f"the run's golden snapshot, {file}")
    if files:
        raise StoreError(f"{files[0]} is not the snapshot that {saved.path} was trained with; give --base")
    return None


def _space_of(files: Iterable[Path], model: nn.Module) -> ParameterSpace:
    """The model's parameters that vector files hold, whether the model as it is built trains them or not.

    Raises:
        StoreError: A file is gone, or of another model.
    """
    names = {}
    for file in files:
        if not file.is_file():
            raise StoreError(f"{file}, a part of the run's golden snapshot, is gone; give --base")
        try:
            names.update(read_header(file).space().resolve(model))
        except SpaceError as error:
            raise StoreError(f"{file} is no base of this model: {error}; give --base") from error
    return ParameterSpace.of_tensors(names)


def _check_hashes(files: Iterable[Path], known: _Snapshot) -> None:
    for file in files:
        expected = known.added.get(file.name, read_header(file).base_hash)
        if fingerprint(load_vectors(file)[0]) != expected:
            raise StoreError(f"{file} does not have the hash that it was written with; give --base")


def _as_built(
    known: _Snapshot,
    pl_module: L.LightningModule,
    model: nn.Module,
    space: ParameterSpace,
    objective: Objective,
    space_of_change: WeightSpace,
) -> FoundBase:
    vector = ParameterVector.of(model, space)
    if known.base_hash is not None:
        if fingerprint(vector) == known.base_hash:
            source = "the model as the configuration builds it, which has the snapshot's hash"
            return FoundBase(BaseParameters(vector), source)
        gone = "the run's golden snapshot is gone, and what the configuration builds has another hash; give --base"
        return FoundBase(None, gone)
    alone = "no golden snapshot lies beside the checkpoint"
    random = _random_part(pl_module, objective, space_of_change)
    if random:
        return FoundBase(None, f"{alone}, and {random}; give --base")
    name = pl_module.hparams["model"]
    return FoundBase(BaseParameters(vector), f"the pretrained model {name} as the configuration builds it, for {alone}")


def _random_part(pl_module: L.LightningModule, objective: Objective, space: WeightSpace) -> str:
    """Why the model as it is built cannot be the base; nothing where all of its weights are pretrained ones."""
    if not isinstance(pl_module, GoldyModule):
        return f"nothing tells whether {type(pl_module).__name__} begins with pretrained weights"
    if not isinstance(pl_module.hparams.get("model"), str):
        return "the configuration names no pretrained model"
    if pl_module.lora_options is not None and space == "adapters":
        return "new adapters begin at random"
    if not isinstance(objective, (CausalLMObjective, Seq2SeqObjective, MaskedLMObjective)):
        return "a new head begins at random"
    return ""
