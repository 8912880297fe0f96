"""``goldy analyze`` and ``goldy basin``: saved checkpoints analysed, each as the rows that callbacks would write."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import lightning.pytorch as L
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from lightning_goldy.analysis.activations import activation_differences
from lightning_goldy.analysis.activations.differences import check_texts, in_words, text_lengths
from lightning_goldy.analysis.attention import Prompt, track_attention
from lightning_goldy.analysis.attention.statistics import token_namer
from lightning_goldy.analysis.attribution import change_attribution
from lightning_goldy.analysis.attribution.units import rows_in_words
from lightning_goldy.analysis.basin import VolumeSurvey, diagonal_preconditioner
from lightning_goldy.analysis.basin.survey import ONLY_SPLIT, Make
from lightning_goldy.analysis.change import parameter_distribution
from lightning_goldy.analysis.circuits import TrackingOptions, track_circuit
from lightning_goldy.analysis.circuits.runs import check_tokens
from lightning_goldy.analysis.continuations import check_generation_arguments, continue_prompts, encode_prompts
from lightning_goldy.analysis.linearized import explain_change
from lightning_goldy.analysis.precision import with_precision
from lightning_goldy.analysis.result import AnalysisResult, Row
from lightning_goldy.analysis.taylor import taylor_diff
from lightning_goldy.callbacks.engine.store import ROWS, ResultStore, peak_memory_bytes
from lightning_goldy.commands.checkpoints import FoundBase, SavedModel, find_base, load_beside, positions, read_saved
from lightning_goldy.commands.fit import ConfiguredCallback, check_configs, run_configured
from lightning_goldy.commands.output import PATIENCE_SECONDS, joined_ranks, output_folder, print_report
from lightning_goldy.core.architecture import UnsupportedArchitectureError
from lightning_goldy.core.architecture.adapters import WeightSpace, check_space
from lightning_goldy.core.base import BaseParameters, base_of
from lightning_goldy.core.files import atomic_write, printable, read_rows, to_json_line
from lightning_goldy.core.isolation import undisturbed
from lightning_goldy.core.naming import require_at_least, require_choice
from lightning_goldy.core.objective import Objective
from lightning_goldy.core.pieces import PromptPairs
from lightning_goldy.core.sharding import RankError, Replicas, is_sharded
from lightning_goldy.core.space import trainable_parameters
from lightning_goldy.core.tasks import transformers_model
from lightning_goldy.core.vector import require_finite
from lightning_goldy.data import PairTask, split_of_task
from lightning_goldy.data.prompt_pairs import check_other_tasks, pairs_of_tasks
from lightning_goldy.report import continuations_table, explanation_table, summary_table
from lightning_goldy.report.figures import draw_figures
from lightning_goldy.report.formatting import format_number
from lightning_goldy.report.rendering import RenderError
from lightning_goldy.training.subject import (
    check_probe,
    find_collateral,
    find_model,
    find_objective,
    find_probe,
    find_prompts,
    find_splits,
    find_tokenizer,
)


@dataclass(frozen=True)
class Writing:
    """Prompts to continue, and how.

    Args:
        prompts: Texts.
        max_new_tokens: Longest continuation, tokens.
        temperature: Of the drawing; None takes the most probable token.
        seed: Decides the draws.

    Raises:
        ValueError: A value is out of range, or a prompt is empty.

    Example:
        >>> Writing(("To be",), max_new_tokens=0)
        Traceback (most recent call last):
        ValueError: max_new_tokens must be at least 1; got 0
    """

    prompts: tuple[str, ...] = ()
    max_new_tokens: int = 50
    temperature: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_generation_arguments(self.max_new_tokens, 1.0 if self.temperature is None else self.temperature)
        if "" in self.prompts:
            raise ValueError(f"prompt {self.prompts.index('') + 1} of {len(self.prompts)} is empty")

    def options(self) -> dict[str, Any]:
        """Arguments of ``continue_prompts``."""
        drawn = {} if self.temperature is None else {"do_sample": True, "temperature": self.temperature}
        return {"max_new_tokens": self.max_new_tokens, "seed": self.seed, **drawn}


@dataclass(frozen=True)
class CircuitTask:
    """Whose circuit is looked for.

    Args:
        task: ``induction``, or ``indirect_object``, ``greater_than`` or ``atlas``, which need the run's tokenizer.
        n_pairs: Pairs of prompts that choose its edges, and as many others that measure it.
        seed: Decides the prompts.
        noise: A finetune that differs in its training's seed alone (a checkpoint, a folder of ``save_pretrained`` or a
            vector file), whose circuit tells how much two seeds share.
        other_tasks: Tasks whose circuits stand beside it; each is searched like the own one.

    Raises:
        ValueError: There is no pair, or another task is unknown.

    Example:
        >>> CircuitTask("induction", 0)
        Traceback (most recent call last):
        ValueError: n_pairs must be at least 1; got 0
    """

    task: PairTask
    n_pairs: int = 32
    seed: int = 0
    noise: str | Path | None = None
    other_tasks: tuple[PairTask, ...] = ()

    def __post_init__(self) -> None:
        require_choice("task", self.task, get_args(PairTask))
        require_at_least("n_pairs", self.n_pairs, 1)
        check_other_tasks(self.other_tasks, self.task)

    def pairs(self, model: nn.Module, tokenizer: Any) -> tuple[PromptPairs, PromptPairs | None, dict[str, PromptPairs]]:
        """Prompts that the model can take: that choose, that measure (None where there are no more), of other tasks.

        Raises:
            ValueError: The task lacks a tokenizer, or a prompt does not fit; it is named.
        """
        config = getattr(transformers_model(model), "config", None)
        vocabulary = 0 if config is None else getattr(config.get_text_config(), "vocab_size", 0)
        shared: dict[str, Any] = {"tokenizer": tokenizer, "vocabulary": vocabulary, "seed": self.seed}
        found, held_out = split_of_task(self.task, self.n_pairs, **shared)
        others = pairs_of_tasks(self.other_tasks, self.n_pairs, **shared)
        for given in (found, *([] if held_out is None else [held_out]), *others.values()):
            check_tokens(model, given)
        return found, held_out, others


@dataclass(frozen=True, eq=False)
class Subject:
    """A checkpoint that is loaded.

    Args:
        model: The part that is analysed.
        objective: What it is trained for.
        probe: The samples that are used.
        base: theta_0; None where nothing tells.
        shown: Prompts whose attention is shown.
        writing: Prompts to continue.
        tokenizer: Of the run; None where it has none.
        progress: Called with (done, total).
        space: Of a model with adapters, where its change is looked at: ``merged`` or ``adapters``.
        texts: Texts that have nothing to do with the finetune; the probe where there are none.
        pairs: Prompts of a task whose circuit is looked for; None where none was asked for.
        held_out: Others that measure it; None where the task has no more.
        others: Prompts of other tasks by name, whose circuits stand beside it.
        noise: A finetune that differs in its seed alone, for the circuits' overlap.
    """

    model: nn.Module
    objective: Objective
    probe: Sequence[Any]
    base: BaseParameters | None
    shown: tuple[Prompt, ...]
    writing: Writing
    tokenizer: Any
    progress: Callable[[int, int], None]
    space: WeightSpace = "merged"
    texts: Sequence[Any] = ()
    pairs: PromptPairs | None = None
    held_out: PromptPairs | None = None
    others: Mapping[str, PromptPairs] = field(default_factory=dict)
    noise: BaseParameters | None = None


@dataclass(frozen=True)
class Part:
    """What one analysis found.

    Args:
        result: Of the pure function.
        row: What it says of itself, without its place; the result's own by default.
        more: Further results, by the name of their file.
        files: Further texts, by the whole name of their file.
    """

    result: AnalysisResult
    row: Row | None = None
    more: Mapping[str, AnalysisResult] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)


def _compared(analyze: Callable[..., AnalysisResult], subject: Subject) -> Part:
    options = {"space": subject.space, "progress": subject.progress}
    return Part(analyze(subject.model, subject.base, subject.probe, subject.objective, **options))


def _attributed(subject: Subject) -> Part:
    assert subject.base is not None
    part = _compared(change_attribution, subject)
    row = part.result.row()
    return Part(part.result, row if subject.tokenizer is None else rows_in_words(row, subject.tokenizer))


def _distributed(subject: Subject) -> Part:
    assert subject.base is not None
    return Part(parameter_distribution(subject.model, subject.base, space=subject.space, progress=subject.progress))


def _read(subject: Subject) -> Part:
    assert subject.base is not None
    texts = subject.texts or subject.probe
    positions = min(_POSITIONS, *text_lengths(texts))
    found = activation_differences(subject.model, subject.base, texts, positions=positions, progress=subject.progress)
    row = found.row()
    if not subject.texts:
        row = row.noted("the text is the probe, the finetune's own: the data has no collateral_dataloader()")
    return Part(found, row if subject.tokenizer is None else in_words(row, subject.tokenizer))


def _wired(subject: Subject) -> Part:
    assert subject.pairs is not None
    options = TrackingOptions()
    base, seed = (
        None if values is None else options.find_at_base(subject.model, values, subject.pairs, subject.progress)
        for values in (subject.base, subject.noise)
    )
    known: dict[str, Any] = {"base": base, "seed": seed, "held_out": subject.held_out, "others": subject.others}
    found = track_circuit(subject.model, subject.pairs, options, **known, progress=subject.progress)
    return Part(found, files={"circuit.graphml": found.circuit.to_graphml()})


def _attended(subject: Subject) -> Part:
    found = track_attention(
        subject.model,
        subject.probe,
        subject.objective,
        prompts=subject.shown,
        base=subject.base,
        name_tokens=token_namer(subject.tokenizer),
        progress=subject.progress,
    )
    maps: dict[str, AnalysisResult] = {f"maps-{prompt.name}": prompt.maps for prompt in found.prompts}
    maps |= {f"base_maps-{prompt.name}": prompt.base for prompt in found.prompts if prompt.base is not None}
    return Part(found.statistics, found.row(), maps)


def _continued(subject: Subject) -> Part:
    writing, options = subject.writing, subject.writing.options()
    found = continue_prompts(subject.model, subject.tokenizer, writing.prompts, base=subject.base, **options)
    return Part(found, found.row().extended(result=options))


PARTS: Mapping[str, Callable[[Subject], Part]] = {
    "change_attribution": _attributed,
    "taylor_diff": functools.partial(_compared, taylor_diff),
    "explain_change": functools.partial(_compared, explain_change),
    "parameter_distribution": _distributed,
    "activation_differences": _read,
    "attention_tracker": _attended,
    "circuit_tracker": _wired,
    "continuations": _continued,
}
"""The analyses by the name of the rows that they write, in the order in which they are made."""

NEEDS_BASE = frozenset(
    {"change_attribution", "taylor_diff", "explain_change", "parameter_distribution", "activation_differences"}
)
"""Those that there are not without a base; the others compare with it where there is one."""

BY_REQUEST = "circuit_tracker"
"""What is made only where a task is named, and else is not said to be left out."""


def left_out(subject: Subject, base_source: str) -> dict[str, str]:
    """Why an analysis cannot be made of this subject, by name; nothing for those that can.

    Args:
        subject: The checkpoint.
        base_source: Why there is no base.
    """
    reasons = {}
    if subject.base is None:
        reasons.update(dict.fromkeys(sorted(NEEDS_BASE), f"there is no base: {base_source}"))
    elif any(map(is_sharded, subject.model.parameters())):
        reasons["explain_change"] = "its variants need whole parameters, of which --shard leaves each process a part"
    if subject.base is not None:
        try:
            check_texts(subject.texts or subject.probe, 1)
        except ValueError as error:
            reasons["activation_differences"] = str(error)
    if not subject.writing.prompts:
        reasons["continuations"] = "no prompt was given (--prompt or --prompts)"
    elif not callable(getattr(subject.model, "generate", None)):
        reasons["continuations"] = f"{type(subject.model).__name__} cannot generate"
    return reasons


_SAMPLES = 16
_TEXTS, _POSITIONS = 64, 5
_SHOWN_TOKENS = 24
SUMMARY, FIGURES = "summary.json", "figures"


def analyze_checkpoint(
    checkpoint: str | Path,
    settings: Sequence[str],
    *,
    base: str | Path | None = None,
    writing: Writing = Writing(),
    n_samples: int | None = None,
    output: str | Path | None = None,
    shard: bool = False,
    space: WeightSpace = "merged",
    circuits: CircuitTask | None = None,
) -> Path:
    """Analyses a saved model, prints a summary and writes rows, whole results, figures and a report.

    Processes that torchrun started share out the samples, or each holds a part of the model.

    Args:
        checkpoint: A Lightning checkpoint or a folder of ``save_pretrained``.
        settings: The words that ``goldy fit`` would be given: ``--config FILE`` and changes to it.
        base: What the model was before its finetune; by default the run's golden snapshot or the pretrained model.
        writing: Prompts to continue.
        n_samples: Samples of the probe; by default at most 16.
        output: A folder without results; by default the next free ``runs/analyze/version_N``.
        shard: Whether the processes share the model (FSDP2), for one that is too large for one device.
        space: Of a model with adapters ``merged``, the change of the weights that they come to, or ``adapters``.
        circuits: The task whose circuit is looked for; none by default.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: There is no such checkpoint or base.
        ValueError: The checkpoint or the base is not one, does not fit the model, or the configuration names no data.
        FileExistsError: The folder holds results already.
        RuntimeError: An analysis failed; what the others found has been written. A process of several failed.
    """
    check_configs(settings)
    check_space(space)
    if n_samples is not None and n_samples < 1:
        raise ValueError(f"n_samples must be at least 1; got {n_samples}")
    saved = read_saved(checkpoint)
    if output is not None and (found := next(Path(output).expanduser().glob(f"goldy/*/{ROWS}"), None)) is not None:
        raise FileExistsError(f"{output} holds results already, {found}; give another --output")
    with joined_ranks("goldy analyze") as ranks:
        folder = output_folder(output, "attention_tracker", "analyze")
        walk = run_configured(
            lambda: CheckpointAnalysis(saved, base, writing, n_samples, folder, space, circuits),
            settings,
            folder,
            shard=shard,
        )
        if not ranks.rank:
            walk.show(Console())
            print_report(folder)
    if walk.failed:
        reasons = "; ".join(f"{name} failed: {reason}" for name, reason in walk.failed.items())
        raise RuntimeError(f"{reasons}. What the others found is in {folder}")
    return folder


@dataclass(eq=False)
class CheckpointAnalysis(ConfiguredCallback):
    """Loads and analyses once the trainer has set up model and data.

    Args:
        saved: The saved model.
        given: A base that was given.
        writing: Prompts to continue.
        n_samples: Samples of the probe.
        folder: Where everything goes.
        space: Where the change of a model with adapters is looked at.
        circuits: The task whose circuit is looked for; None for none.
    """

    saved: SavedModel
    given: str | Path | None
    writing: Writing
    n_samples: int | None
    folder: Path
    space: WeightSpace = "merged"
    circuits: CircuitTask | None = None
    rows: list[dict[str, Any]] = field(default_factory=list, init=False)
    left_out: dict[str, str] = field(default_factory=dict, init=False)
    failed: dict[str, str] = field(default_factory=dict, init=False)
    base_source: str = field(default="", init=False)
    _no_figures: str = field(default="", init=False)
    _notes: list[str] = field(default_factory=list, init=False)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Finds the base, loads the saved weights, and analyses."""
        with undisturbed(trainer, pl_module), Console().status("") as status:
            model = find_model(pl_module, None)
            probe = find_probe(trainer, pl_module, None, self.n_samples or _SAMPLES).batches
            objective = find_objective(pl_module, model, None, probe)
            # Before the weights are loaded: the model as it is built may be the base.
            base = find_base(self.given, self.saved, pl_module, model, objective, self.space)
            self._notes = load_beside(base, self.saved, pl_module, model, space=self.space, who="goldy analyze")
            subject = self._subject(trainer, pl_module, model, objective, base, status.update)
            self.base_source = base.source
            self.left_out = left_out(subject, base.source)
            self.keep_configuration()
            for name in PARTS:
                if name not in self.left_out and (name != BY_REQUEST or subject.pairs is not None):
                    status.update(name)
                    self._analyze(name, subject)
        if trainer.is_global_zero:
            self._write_summary()

    def show(self, console: Console) -> None:
        """Prints what was found and what was left out."""
        print(printable(f"base: {self.base_source}"))
        console.print(summary_table(self.rows))
        for row in self.rows:
            if row["name"] in ("change_attribution", "activation_differences"):
                # With interval and null, which the table has no room for.
                print(printable(f"{row['name']}: {row['headline']}"))
            if row["name"] == "explain_change":
                console.print(explanation_table(row))
            if row["name"] == "continuations":
                console.print(continuations_table(row["result"]["continuations"]))
        for name, reason in self.left_out.items():
            print(printable(f"left out: {name}, because {reason}"))
        figures = f"no figures: {self._no_figures}" if self._no_figures else f"figures: {self.folder / FIGURES}"
        for line in (figures, f"results: {self.folder / SUMMARY}"):
            print(printable(line))

    def _subject(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        model: nn.Module,
        objective: Objective,
        base: FoundBase,
        say: Any,
    ) -> Subject:
        require_finite(dict(trainable_parameters(model)), "weights")
        probe = find_probe(trainer, pl_module, None, self.n_samples or _SAMPLES).batches
        check_probe(model, objective, probe, self.n_samples, pl_module=pl_module)
        tokenizer = find_tokenizer(trainer)
        texts = {f"prompt-{number}": text for number, text in enumerate(self.writing.prompts, 1)}
        shown = find_prompts(trainer, model, texts or None, probe, _SHOWN_TOKENS)
        if self.writing.prompts and callable(getattr(model, "generate", None)):
            # What cannot be continued is refused before anything is computed.
            options = {"temperature": 1.0, **self.writing.options()}
            encode_prompts(model, tokenizer, self.writing.prompts, options["max_new_tokens"], options["temperature"])

        def tell(done: int, total: int) -> None:
            say(f"{done} of {total}")

        pairs, held_out, others = (None, None, {}) if self.circuits is None else self.circuits.pairs(model, tokenizer)
        noise = None if self.circuits is None else self.circuits.noise
        if noise is not None and base.values is None:
            raise ValueError(f"the circuit of {noise} is the noise of an overlap with the base's, and there is no base")
        return Subject(
            model=model,
            objective=objective,
            probe=probe,
            base=base.values,
            shown=shown,
            writing=self.writing,
            tokenizer=tokenizer,
            progress=tell,
            space=self.space,
            texts=find_collateral(trainer, None, _TEXTS),
            pairs=pairs,
            held_out=held_out,
            others=others,
            noise=None if noise is None or base.values is None else base_of(noise, model, base.values.space),
        )

    def _analyze(self, name: str, subject: Subject) -> None:
        start = time.perf_counter()
        try:
            with (
                peak_memory_bytes(next(subject.model.parameters()).device) as peak,
                Replicas.world().together(name, patience=PATIENCE_SECONDS),
            ):
                part = PARTS[name](subject)
        except UnsupportedArchitectureError as error:
            self.left_out[name] = str(error)
            return
        except (ValueError, RuntimeError) as error:
            # What the others find is worth its time; the command tells at its end, and fails.
            if isinstance(error, RankError) and error.final:
                raise
            self.failed[name] = str(error)
            return
        store = ResultStore(self.folder / "goldy" / name, write=not Replicas.world().rank)
        for file, result in {"result": part.result, **part.more}.items() if store.write else ():
            atomic_write(store.folder / f"{file}.json", result.to_json())
        for file, text in part.files.items() if store.write else ():
            atomic_write(store.folder / file, text)
        row = with_precision(part.row or part.result.row(), subject.model)
        for note in self._notes:
            row = row.noted(note)
        row = row.extended(result={"checkpoint": str(self.saved.path), "base": self.base_source}).at(
            step=self.saved.step or 0,
            epoch=self.saved.epoch,
            trigger="checkpoint",
            weights=self.saved.weights,
            seconds=time.perf_counter() - start,
            peak_memory_bytes=peak(),
        )
        line = store.append(row)
        self.rows.append(line)
        if store.write:
            self._draw(line)

    def _draw(self, row: dict[str, Any]) -> None:
        def tell(name: str, error: Exception) -> None:
            self._no_figures = f"{row['name']}-{name}: {error}"

        try:
            figures = draw_figures(row, failed=tell)
        except ImportError as error:
            self._no_figures = str(error)
            return
        for name, figure in figures.items():
            try:
                atomic_write(self.folder / FIGURES / f"{row['name']}-{name}.png", figure.png())
            except RenderError as error:
                tell(name, error)

    def _write_summary(self) -> None:
        summary = {
            "format": 1,
            "checkpoint": str(self.saved.path),
            "step": self.saved.step,
            "epoch": self.saved.epoch,
            "base": self.base_source,
            "left_out": self.left_out,
            "failed": self.failed,
            "metrics": {row["name"]: row["metrics"] for row in self.rows},
        }
        # Through the line's rules: a number that is not finite becomes null.
        atomic_write(self.folder / SUMMARY, json.dumps(json.loads(to_json_line(summary)), indent=2) + "\n")


_VOLUME = "basin_volume"


def measure_checkpoints(
    checkpoints: Sequence[str | Path],
    settings: Sequence[str],
    survey: VolumeSurvey,
    *,
    splits: bool = False,
    output: str | Path | None = None,
) -> Path:
    """Measures the volume around each checkpoint, prints a table and writes rows and a report.

    Processes that torchrun started share out the directions.

    Args:
        checkpoints: Lightning checkpoints or folders of ``save_pretrained``, in any order; rows are ordered by step.
        settings: The words that ``goldy fit`` would be given: ``--config FILE`` and changes to it.
        survey: What to measure; keeps the first checkpoint's sigma unless it was given one.
        splits: Whether to measure the data module's ``analysis_splits()`` rather than its probe.
        output: A folder without results; by default the next free ``runs/basin/version_N``.

    Returns:
        The folder.

    Raises:
        ValueError: A checkpoint is not one, does not fit the model or lacks the optimizer's state, or the configuration
            names no data.
        FileExistsError: The folder holds results already.
    """
    check_configs(settings)
    saved = [read_saved(path, with_optimizer=survey.needs_adam) for path in checkpoints]
    with joined_ranks("goldy basin") as ranks:
        folder = output_folder(output, _VOLUME, "basin")
        walk = run_configured(lambda: CheckpointVolumes(saved, survey, splits=splits, folder=folder), settings, folder)
        if not ranks.rank:
            Console().print(walk.table())
            print(printable(f"rows: {walk.store.rows}"))
            print_report(folder)
    return folder


class CheckpointVolumes(ConfiguredCallback):
    """Measures once the trainer has set up model and data; what the trainer evaluates afterwards does not matter.

    Args:
        saved: The checkpoints.
        survey: What to measure.
        splits: Whether to measure the data module's splits.
        folder: Where the rows go.
    """

    def __init__(self, saved: Sequence[SavedModel], survey: VolumeSurvey, *, splits: bool, folder: Path) -> None:
        self.saved, self.survey, self.splits = positions(saved), survey, splits
        self._folder = folder / "goldy" / _VOLUME

    @functools.cached_property
    def store(self) -> ResultStore:
        """Where the rows go, made with the first of them."""
        return ResultStore(self._folder, write=not Replicas.world().rank)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Loads and measures one checkpoint after the other."""
        if trainer.max_epochs is None:
            # As fit() would have it; the optimizer's schedule may ask for the length of the run.
            trainer.fit_loop.max_epochs = 1000 if trainer.max_steps == -1 else -1
        with undisturbed(trainer, pl_module), Console().status("") as status:
            model = find_model(pl_module, None)
            batches = (
                find_splits(trainer, True, self.survey.n_samples)
                if self.splits
                else {ONLY_SPLIT: find_probe(trainer, pl_module, None, self.survey.n_samples).batches}
            )
            objective = find_objective(pl_module, model, None, next(iter(batches.values())))
            for number, (step, saved) in enumerate(self.saved, 1):
                status.update(f"{saved.path} ({number} of {len(self.saved)})")
                saved.load_into(pl_module, model)
                for split in batches.values():
                    check_probe(model, objective, split, self.survey.n_samples, pl_module=pl_module)
                adam = self._adam(saved, pl_module, model)
                if number == 1:
                    self.keep_configuration()
                start = time.perf_counter()
                with peak_memory_bytes(next(model.parameters()).device) as peak:
                    volumes = self.survey.measure(model, objective, batches, adam=adam)
                row = with_precision(volumes.row(), model).extended(result={"checkpoint": str(saved.path)})
                place = {"step": step, "epoch": saved.epoch, "trigger": "checkpoint", "weights": saved.weights}
                seconds = time.perf_counter() - start
                self.store.append(row.at(**place, seconds=seconds, peak_memory_bytes=peak()))

    def table(self) -> Table:
        """The volumes, one line per checkpoint, split and cutoff."""
        table = Table(title="Basin volume, nats: a lower bound along rays", title_justify="left", box=SIMPLE_HEAD)
        for heading in ("checkpoint", "samples"):
            table.add_column(heading, overflow="fold")
        for heading in ("log V\nat least", "by a bridge\n+- error", "bits per\nparameter", "rests on\ndirections"):
            table.add_column(heading, justify="right", no_wrap=True)
        for row in read_rows(self.store.rows):
            for volume in row["result"]["volumes"]:
                table.add_row(*map(Text, _cells(row, volume)))
        return table

    def _adam(self, saved: SavedModel, pl_module: L.LightningModule, model: nn.Module) -> Make | None:
        if not self.survey.needs_adam:
            return None
        curvature = saved.curvature(pl_module, model, self.survey.space(model))
        return lambda eps: diagonal_preconditioner(curvature, eps=eps, name="adam")


def _cells(row: dict[str, Any], volume: dict[str, Any]) -> list[str]:
    effective = f"{format_number(volume['effective_sample_size'])} of {len(volume['estimates'])}"
    unbounded = f"{volume['unbounded']} unbounded" if volume["unbounded"] else volume["preconditioner"]
    bridged = [
        f"{format_number(bridge['log_volume'])}\n+- {format_number(bridge['error'])}" + "; weak" * bool(bridge["weak"])
        for bridge in row["result"].get("bridges", ())
        if bridge["label"] == volume["label"]
    ]
    return [
        printable(Path(row["result"]["checkpoint"]).name),
        printable(volume["label"]),
        format_number(volume["log_volume"]),
        *(bridged or [""]),
        format_number(volume["bits_per_parameter"]),
        f"{effective}\n({unbounded})",
    ]


def read_prompts(path: str | Path) -> list[str]:
    r"""The prompts of a file, one per line.

    Args:
        path: UTF-8 text; empty lines are passed over.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is not text, or has no line.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "prompts.txt").write_text("To be\n\nor not\n")
        ...     read_prompts(Path(folder, "prompts.txt"))
        ['To be', 'or not']
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no file of prompts at {path}")
    try:
        # Only at line breaks: str.splitlines also cuts at characters that a prompt may hold.
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}") from error
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{path} holds no prompt; one per line")
    return prompts
