"""``goldy graft``: a smaller or gentler finetune, the part of a change that recovers its effect or does no harm."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from rich.console import Console
from rich.text import Text
from torch import nn

from lightning_goldy.analysis.attribution import (
    ChangeAttributionResult,
    GraftCurve,
    GraftPoint,
    baseline_mask,
    change_attribution,
    graft,
    graft_curve,
    interleaved,
    save_change,
)
from lightning_goldy.analysis.attribution.attribution import SHARES, check_attribution
from lightning_goldy.analysis.attribution.graft import share_of_elements
from lightning_goldy.analysis.attribution.learned import learn_mask
from lightning_goldy.analysis.attribution.units import rows_in_words
from lightning_goldy.callbacks.change_attribution import AttributedChange
from lightning_goldy.callbacks.engine.store import ResultStore
from lightning_goldy.commands.checkpoints import SavedModel, find_base, load_beside, read_saved
from lightning_goldy.commands.fit import ConfiguredCallback, check_configs, run_configured
from lightning_goldy.commands.output import output_folder, print_report
from lightning_goldy.core.architecture.adapters import WeightSpace, check_space
from lightning_goldy.core.base import BaseParameters
from lightning_goldy.core.batches import sample_count
from lightning_goldy.core.files import atomic_write, finite, percentage, printable
from lightning_goldy.core.isolation import undisturbed
from lightning_goldy.core.mask import ParameterMask
from lightning_goldy.core.naming import model_class, require_at_least
from lightning_goldy.core.objective import Objective
from lightning_goldy.core.sharding import is_sharded
from lightning_goldy.report.formatting import console_table, format_number, format_percent
from lightning_goldy.training.models import write_pretrained
from lightning_goldy.training.subject import find_collateral, find_model, find_objective, find_probe, find_tokenizer

Method = Literal[
    "best", "attribution", "gradient", "interpolation", "learned", "magnitude", "random", "drop_and_rescale"
]
# What `best` chooses from, and of it what keeps values as they are and so can be written sparse.
SPARSE = ("attribution", "gradient", "magnitude", "random")
BEST = (*SPARSE, "interpolation", "drop_and_rescale", "finetune")
_KEPT = {
    "attribution": "those that carry the effect by change attribution",
    "gradient": "those that carry it by their gradient at the base",
    "learned": "those of a mask that was learned",
    "magnitude": "those that changed most",
    "random": "drawn at random",
    "drop_and_rescale": "drawn at random, times {factor:g}",
}
# Columns of a console below which the table of grafts is laid out closer.
_NARROW = 76
MODEL, CHANGE, MASK = "model", "change.safetensors", "mask.safetensors"


@dataclass(frozen=True)
class Wanted:
    """What the graft is to be; one of the first three is given.

    Args:
        keep: Share of the elements that keep their change, a fraction.
        recover: Share of the effect that is to be recovered on held-out samples, a fraction, with the least harm.
        harm: Nats of loss on other text that are allowed, for the most effect.
        method: ``attribution`` keeps the strongest elements, ``gradient`` those of the first order at the base,
            ``learned`` those of a mask that is learned, ``magnitude`` those that changed most, ``random`` any,
            ``drop_and_rescale`` any times the inverse of their share, ``interpolation`` a part of the change
            everywhere. ``best`` takes the one of these, but for ``learned``, that serves best; of a share to ``keep``,
            ``attribution``.
        sparse: Whether the change is written as a mask with values, rather than as a model.

    Raises:
        ValueError: Not exactly one is given, it is out of range, or what changes other values is asked to be sparse.

    Example:
        >>> Wanted(keep=0.1, recover=0.9)
        Traceback (most recent call last):
        ValueError: give one of keep, recover and harm; got keep=0.1, recover=0.9
    """

    keep: float | None = None
    recover: float | None = None
    harm: float | None = None
    method: Method = "best"
    sparse: bool = False

    def __post_init__(self) -> None:
        named = {name: getattr(self, name) for name in ("keep", "recover", "harm")}
        given = {name: value for name, value in named.items() if value is not None}
        if len(given) != 1:
            told = ", ".join(f"{name}={value:g}" for name, value in given.items()) or "none of them"
            raise ValueError(f"give one of keep, recover and harm; got {told}")
        for name in ("keep", "recover"):
            if name in given and not 0 < given[name] <= 1:
                raise ValueError(f"{name} must lie in (0, 1]; got {given[name]:g}")
        if "harm" in given and not math.isfinite(given["harm"]):
            raise ValueError(f"harm must be a finite number of nats; got {given['harm']:g}")
        if self.sparse and self.method == "interpolation":
            raise ValueError("interpolation changes every element, so it cannot be written sparse")
        if self.sparse and self.method == "drop_and_rescale":
            raise ValueError("drop_and_rescale changes the values that it keeps, so it cannot be written sparse")
        if self.keep is not None and self.method == "interpolation":
            raise ValueError("keep is a share of elements, and interpolation changes all: choose by recover or harm")

    def of(self, curve: GraftCurve) -> GraftPoint:
        """The graft that is wanted."""
        if self.keep is not None:
            own = curve.of("attribution" if self.method == "best" else self.method)
            return min(own, key=lambda point: abs(point.share - float(self.keep or 0)))
        best = SPARSE if self.sparse else BEST
        return curve.choose(
            recover=self.recover, harm=self.harm, methods=best if self.method == "best" else (self.method,)
        )


def graft_checkpoint(
    checkpoint: str | Path,
    settings: Sequence[str],
    wanted: Wanted,
    *,
    base: str | Path | None = None,
    n_samples: int = 32,
    n_collateral: int = 16,
    output: str | Path | None = None,
    space: WeightSpace = "merged",
) -> Path:
    """Attributes a checkpoint's change, tries grafts of it on held-out samples, and writes the one that is wanted.

    Args:
        checkpoint: A Lightning checkpoint, or a folder of ``save_pretrained``.
        settings: The words that ``goldy fit`` would be given: ``--config FILE`` and changes to it.
        wanted: Which graft.
        base: What the model was before; looked for as by ``goldy analyze``.
        n_samples: Samples of the probe, half of them held out from scoring.
        n_collateral: Samples of the data module's ``collateral_dataloader()``, on which harm is measured.
        output: A folder without results; by default the next free ``runs/graft/version_N``.
        space: Of a model with adapters ``merged``, which grafts the weights that they come to and writes full ones, or
            ``adapters``.

    Returns:
        The folder, with ``model`` (or ``change.safetensors``), its card, the mask where elements were chosen
        (``mask.safetensors``, which ``MaskedAdamW`` takes), the row and the report.

    Raises:
        ValueError: The checkpoint or the base is not one or does not fit, there is no base, or no graft is as wanted.
        FileExistsError: The folder holds results already.
    """
    check_configs(settings)
    check_space(space)
    if n_samples < 2:
        raise ValueError(f"n_samples must be at least 2, half of which are held out; got {n_samples}")
    require_at_least("n_collateral", n_collateral, 1)
    saved = read_saved(checkpoint)
    folder = output_folder(output, "change_attribution", "graft")
    walk = run_configured(lambda: _Graft(saved, base, wanted, n_samples, n_collateral, folder, space), settings, folder)
    walk.show(Console())
    print_report(folder)
    return folder


@dataclass(eq=False)
class _Graft(ConfiguredCallback):
    """Loads, attributes, grafts and writes once the trainer has set up model and data."""

    saved: SavedModel
    given: str | Path | None
    wanted: Wanted
    n_samples: int
    n_collateral: int
    folder: Path
    space: WeightSpace = "merged"
    learned: list[ParameterMask] = field(default_factory=list, init=False)
    first_order: Callable[..., ChangeAttributionResult] | None = field(default=None, init=False)
    again: GraftCurve | None = field(default=None, init=False)
    found: AttributedChange | None = field(default=None, init=False)
    point: GraftPoint | None = field(default=None, init=False)
    base_source: str = field(default="", init=False)
    written: Path | None = field(default=None, init=False)
    _start: float = field(default=0.0, init=False)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Does all of it."""
        self._start = time.perf_counter()
        with undisturbed(trainer, pl_module), Console().status("") as status:
            model = find_model(pl_module, None)
            probe = find_probe(trainer, pl_module, None, self.n_samples).batches
            objective = find_objective(pl_module, model, None, probe)
            base = self._base(pl_module, model, objective)
            scored, held_out = interleaved(probe, self.n_samples)
            collateral = find_collateral(trainer, None, self.n_collateral)
            shares = sorted({*SHARES, *([self.wanted.keep] if self.wanted.keep else ()), 0.5})
            check_attribution("loss", "auto", 0.01, shares, None)

            def tell(done: int, total: int) -> None:
                status.update(f"{done} of {total}")

            learns = self.wanted.method == "learned"
            attribute = partial(change_attribution, model, base, scored, objective, space=self.space, progress=tell)
            attribution = attribute(shares=shares, keep_scores=learns)
            self.first_order = partial(attribute, nodes="base")
            if attribution.levels is None:
                raise ValueError(f"{self.saved.path}: nothing differs from the base ({self.base_source})")
            self._require_an_element(sum(attribution.numels))
            if learns:
                collateral, teaching = interleaved(collateral, self.n_collateral)
                wanted = shares if self.wanted.keep is None else [self.wanted.keep]
                learn = partial(learn_mask, model, base, attribution, scored, teaching or None, objective=objective)
                self.learned = [learn(share=share).mask for share in wanted]
            (chosen_on, told_on), (harmed, harmed_too) = map(self._halves, (held_out, collateral))
            grafting: dict[str, Any] = {"objective": objective, "progress": tell}
            masks = {"learned": self.learned} if learns else None
            curve = graft_curve(model, base, attribution, scored, chosen_on, harmed or None, masks=masks, **grafting)
            self.found, self.point = AttributedChange(attribution, curve), self.wanted.of(curve)
            if told_on:
                grafting |= self._alone(self.point, shares)
                self.again = graft_curve(model, base, attribution, scored, told_on, harmed_too or None, **grafting)
            self._write(model, base, find_tokenizer(trainer))

    def _require_an_element(self, numel: int) -> None:
        if self.wanted.keep is not None and self.wanted.keep * numel < 1:
            raise ValueError(f"keep={self.wanted.keep:g} is less than one of the {numel:,} elements")

    def _base(self, pl_module: L.LightningModule, model: nn.Module, objective: Objective) -> BaseParameters:
        """What is grafted on; the model gets the checkpoint's weights, and what they changed is differentiated."""
        base = find_base(self.given, self.saved, pl_module, model, objective, self.space)
        if base.values is None:
            raise ValueError(
                f"there is no base to graft on: {base.source.removesuffix('; give --base')}; give --base PATH"
            )
        if any(map(is_sharded, model.parameters())):
            raise ValueError("goldy graft works on whole models: run it in one process")
        for note in load_beside(base, self.saved, pl_module, model, space=self.space, who="goldy graft"):
            rank_zero_warn(note)
        self.base_source = base.source
        return base.values

    def _halves(self, samples: list[Any]) -> tuple[list[Any], list[Any]]:
        """What chooses the graft, and what then tells of it: all alike where its share is given or there is but one."""
        count = sum(map(sample_count, samples))
        return (samples, []) if self.wanted.keep is not None or count < 2 else interleaved(samples, count)

    def _alone(self, point: GraftPoint, shares: Sequence[float]) -> dict[str, Any]:
        """Options of a curve that has this graft, and as many random and largest elements beside it."""
        if point.method in ("interpolation", "finetune"):
            return {"shares": shares[:1], "baselines": ["interpolation"], "factors": [point.factor]}
        own = [point.method] if point.method in ("gradient", "drop_and_rescale") else []
        masks = {"learned": [held for held in self.learned if held.density == point.share]}
        return {
            "shares": [point.share],
            "baselines": ["magnitude", "random", *own],
            "masks": masks if point.method == "learned" else None,
        }

    @property
    def reported(self) -> tuple[GraftPoint, GraftCurve]:
        """The graft as the samples tell it that did not choose it, where there are any, and their curve."""
        assert self.found is not None
        assert self.found.curve is not None
        assert self.point is not None
        if self.again is None:
            return self.point, self.found.curve
        return self.again.of(self.point.method)[0], self.again

    def _doubts(self) -> list[str]:
        """Why the intervals that are told are none."""
        point, curve = self.reported
        return [doubt for doubt in (curve.weak or curve.roughness(point), curve.harm_weak) if doubt]

    def _source(self) -> str:
        """Which samples tell what the graft recovers."""
        if self.wanted.keep is not None:
            return "samples that did not score; none chose it, for its share was given"
        if self.again is None:
            return "the samples that chose it, which flatters: there are too few to hold some out"
        return "samples that neither scored nor chose it"

    def show(self, console: Console) -> None:
        """Prints the grafts, the one that was taken, and where it is."""
        assert self.found is not None
        assert self.found.curve is not None
        assert self.point is not None
        print(printable(f"base: {self.base_source}"))
        # In little room an interval has a line of its own, so that no word is broken.
        narrow = console.width < _NARROW
        rows = [
            (
                point.method + (" +" if point.on_frontier else "") + (" *" if point == self.point else ""),
                format_percent(point.share),
                f"{point.factor:g}",
                Text(
                    _fraction(point.recovered)
                    + _interval(point.low, point.high, _fraction).replace(" [", "\n[" if narrow else " [")
                ),
                "" if point.harm is None else f"{point.harm:+.4f}",
            )
            for point in self.found.curve.records
            if point.recovered is not None
        ]
        headings = ("method", "elements", "times", "recovered", "harm")
        title = "Grafts on held-out samples (harm in nats; + on the frontier, * written)"
        console.print(console_table(title, headings, rows, numbers=3, padding=(0, 0 if narrow else 1)))
        print(printable(self.found.headline()))
        told = self.reported[0]
        if told.recovered is not None:
            harm = (
                ""
                if told.harm is None
                else f", harm {told.harm:+.4f} nats{_interval(told.harm_low, told.harm_high, '{:+.4f}'.format)}"
            )
            span = _interval(told.low, told.high, partial(percentage, digits=1))
            weak = "".join(f"; WEAK: {doubt}" for doubt in self._doubts())
            recovered = percentage(told.recovered, 1)
            print(printable(f"the graft recovers {recovered}{span}{harm}, on {self._source()}{weak}"))
        print(printable(f"graft: {self.written}"))

    def _write(self, model: nn.Module, base: BaseParameters, tokenizer: Any) -> None:
        """Writes the mask, the graft with its card, the row, and the summary."""
        assert self.found is not None
        assert self.point is not None
        mask, told = self._chosen_mask(model, base), self.reported[0]
        merged = self.found.attribution.space == "merged" and not self.wanted.sparse
        shell = _unadapted(model) if merged else model
        self.keep_configuration()
        if self.point.method not in ("interpolation", "finetune"):
            mask.save(self.folder / MASK, model=model_class(shell), step=self.saved.step)
        card = self._card(*self.reported)
        if self.wanted.sparse:
            note = {key: finite(value) for key, value in vars(told).items()} | {"weak": self._doubts()}
            self.written = save_change(self.folder / CHANGE, model, base, mask, note=note)
            atomic_write(self.folder / "README.md", card)
        else:
            state = graft(model, base, mask, factor=self.point.factor)
            if merged:
                _untie(shell, state)
            self.written = write_pretrained(shell, self.folder / MODEL, state=state, tokenizer=tokenizer)
            atomic_write(self.written / "README.md", card)
        self._write_results(tokenizer)

    def _chosen_mask(self, model: nn.Module, base: BaseParameters) -> ParameterMask:
        """The elements that keep their change."""
        assert self.found is not None
        assert self.point is not None
        point, attribution = self.point, self.found.attribution
        if point.method == "attribution":
            return attribution.mask(point.share)
        if point.method == "learned":
            return next(held for held in self.learned if held.density == point.share)
        if point.method == "gradient":
            assert self.first_order is not None
            return self.first_order(shares=[point.share]).mask(point.share)
        if point.method in ("magnitude", "random", "drop_and_rescale"):
            return baseline_mask(model, base, attribution, point.method, point.share)
        assert attribution.levels is not None
        return ParameterMask.of_vector(attribution.levels.map(lambda level: torch.ones_like(level, dtype=torch.bool)))

    def _write_results(self, tokenizer: Any) -> None:
        """The row of the report, and the summary for other programs."""
        assert self.found is not None
        assert self.found.curve is not None
        assert self.point is not None
        told, curve = self.reported
        store = ResultStore(self.folder / "goldy" / "change_attribution", write=True)
        more = {"checkpoint": str(self.saved.path), "base": self.base_source}
        more["reported"] = finite(vars(told)) | {"weak": self._doubts()}
        row = self.found.row().extended(result=more)
        row = row if tokenizer is None else rows_in_words(row, tokenizer)
        seconds = time.perf_counter() - self._start
        store.append(
            row.at(name="change_attribution", step=self.saved.step or 0, trigger="checkpoint", seconds=seconds)
        )
        summary = {
            "base": self.base_source,
            "taken": vars(self.point),
            "reported": vars(told),
            "on": f"{curve.n_held_out} {self._source()}",
            "weak": self._doubts(),
            "points": list(self.found.curve.points),
        }
        atomic_write(self.folder / "summary.json", json.dumps(finite(summary), indent=2) + "\n")

    def _card(self, point: GraftPoint, curve: GraftCurve) -> str:
        """What was kept, what it recovers and what is lost, in words."""
        told = _KEPT.get(point.method, "").format(factor=point.factor)
        size = share_of_elements(point.share, digits=3)
        kept = f"{size}, {told}" if told else f"{point.factor:g} times the change, everywhere"
        harm, recovered = "was not measured: the data has no collateral text", "nothing: the finetune changed nothing"
        if point.harm is not None:
            whole = curve.of("finetune")[0].harm
            interval = _interval(point.harm_low, point.harm_high, "{:+.4g}".format)
            harm = f"{point.harm:+.4g} nats of loss{interval} against the base; the whole finetune has {whole:+.4g}"
        others = "".join(
            f"; {named} {percentage(other.recovered, 1)}"
            f"{_interval(other.low, other.high, partial(percentage, digits=1))}{_draws(other)}"
            for name, named in (("random", "as many random ones"), ("magnitude", "those that changed most"))
            for other in curve.of(name)
            if point.method in ("attribution", "gradient", "learned")
            and other.recovered is not None
            and _same_share(other, point)
        )
        if point.recovered is not None:
            interval = _interval(point.low, point.high, partial(percentage, digits=1))
            recovered = (
                f"{percentage(point.recovered, 1)}{interval} of the effect on {curve.n_held_out} held-out samples"
            )
            recovered += others
        asked, weak = "", "".join(f"- WEAK: {doubt}\n" for doubt in self._doubts())
        if self.wanted.keep is None:
            assert self.point is not None
            wish = f"at least {percentage(self.wanted.recover or 0, 1)} of the effect"
            wish = wish if self.wanted.harm is None else f"a harm of at most {self.wanted.harm:g} nats"
            chosen = percentage(self.point.recovered or 0, 1)
            chosen += "" if self.point.harm is None else f", its harm {self.point.harm:+.4g} nats"
            asked = f"- asked for: {wish}; where it was chosen it recovered {chosen}\n"
        return (
            "# A grafted finetune\n\n"
            f"The base with a part of a finetune's change: {kept}.\n\n"
            f"- finetune: `{printable(str(self.saved.path))}`\n- base: {printable(self.base_source)}\n"
            f"- recovers: {recovered} (loss {format_number(point.value)}; base {format_number(curve.base_value)}, "
            f"finetune {format_number(curve.value)} nats)\n"
            f"- harm to other text: {harm}\n"
            f"- measured on: {self._source()}\n{weak}{asked}"
        )


def _same_share(first: GraftPoint, second: GraftPoint) -> bool:
    """Whether two grafts have as many elements, but for whole units."""
    return math.isclose(first.share, second.share, rel_tol=0.01)


def _draws(point: GraftPoint) -> str:
    """Between what all draws of random elements lie; nothing of one."""
    if len(point.draws) < 2:
        return ""
    low, high = (percentage(end(point.draws), 1) for end in (min, max))
    return f" ({low} to {high} over {len(point.draws)} draws)"


def _fraction(value: float) -> str:
    """A part of the effect; far outside, as where little is kept and rescaled, with as many digits as elsewhere."""
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.3g}"


def _interval(low: float | None, high: float | None, told: Callable[[float], str]) -> str:
    """An interval behind its number; nothing where there is none, as of a single sample."""
    return "" if low is None or high is None else f" [{told(low)}, {told(high)}]"


def _unadapted(model: nn.Module) -> nn.Module:
    """A copy of a model with adapters that has none, to be written with other weights."""
    made: Any = copy.deepcopy(model)
    if not callable(getattr(made, "merge_and_unload", None)):
        raise ValueError(
            f"{model_class(model)} has adapters but no merge_and_unload, so its merged weights cannot be written as a "
            "model; use --sparse, or --space adapters"
        )
    return made.merge_and_unload()


def _untie(shell: Any, state: Mapping[str, torch.Tensor]) -> None:
    """Gives the unembedding a weight of its own where adapters of a tied embedding left it with other values."""
    head = shell.get_output_embeddings() if hasattr(shell, "get_output_embeddings") else None
    weight = getattr(head, "weight", None)
    named = shell.named_parameters(remove_duplicate=False)
    values = [state[name] for name, parameter in named if parameter is weight and name in state]
    if head is not None and any(not torch.equal(values[0], value) for value in values[1:]):
        head.weight = nn.Parameter(head.weight.detach().clone())
        shell.config.tie_word_embeddings = False
