"""``goldy demo``: a small model learns an atlas, is finetuned on false facts, and every callback watches."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import PreTrainedTokenizerBase

import lightning_goldy
from lightning_goldy.callbacks import (
    ActivationDifferences,
    AttentionTracker,
    BasinVolume,
    ChangeAttribution,
    CircuitTracker,
    GoldenParameters,
    GoldenSnapshot,
    KnowledgeCoupling,
    ParameterDistribution,
    ReverseGoldenParameters,
    RunReport,
    TaylorDiff,
)
from lightning_goldy.core.batches import map_batch
from lightning_goldy.core.files import percentage, require_local
from lightning_goldy.core.isolation import preserved
from lightning_goldy.core.objective import CausalLMObjective
from lightning_goldy.core.pieces import PadCollator, encode_pairs
from lightning_goldy.data import AtlasDataModule, Edit, Question, country_facts, one_hop_questions, random_edits
from lightning_goldy.data.tokenization import padding_id
from lightning_goldy.optim import OptimizerOptions, ScheduleOptions
from lightning_goldy.training.module import GoldyModule
from lightning_goldy.training.quiet import progress_only, without_known_warnings


def run_demo(directory: str | Path = "runs/demo", *, fast: bool = False, seed: int = 0) -> Path:
    """Pretrains (or takes from the cache), finetunes on false facts with every callback, and writes the report.

    Args:
        directory: ``base`` (the pretrained model), ``pretrain`` and ``finetune`` (a folder per run) go there.
        fast: A reduced form: fewer facts, a smaller model, fewer steps.
        seed: Decides weights, edits and order.

    Returns:
        The report.

    Raises:
        RuntimeError: The pretraining ended without the facts known.
        ValueError: The directory is an address of another storage.
    """
    settings = DemoSettings.fast(seed) if fast else DemoSettings(seed=seed)
    directory = require_local(directory, "--directory")
    console = Console()
    start = time.monotonic()
    with without_known_warnings(), progress_only(), _one_thread():
        console.print("[bold]1/2[/bold] a model that knows the atlas")
        cached, from_cache = cached_base(settings, directory)
        base = copy_base(cached, directory / "base")
        console.print(f"{'from the cache' if from_cache else 'pretrained'}: {base}")
        console.print(f"[bold]2/2[/bold] finetuning on {settings.edits} false facts, watched by every callback")
        trainer, knowledge = _finetune(settings, base, directory)
    console.print(_table(knowledge))
    console.print(f"done in {time.monotonic() - start:.0f} s")
    report = Path(str(trainer.log_dir)) / "report.html"
    if not report.is_file():
        raise RuntimeError(f"no report was written to {report}")
    # Plain print: a long path must stay in one piece.
    print(f"report: {report}   TensorBoard: tensorboard --logdir {directory}")
    return report


def analysis_callbacks(
    every_n_steps: int, edited: Iterable[Any] | None = None, *, n_edited: int = 64
) -> list[L.Callback]:
    """Every callback of the package that watches a training, and the report.

    Args:
        every_n_steps: How often most of them look.
        edited: Batches of what the finetune is about, on which its effect is attributed; by default the probe.
        n_edited: How many samples they hold; at most 64 are taken.
    """
    return [
        GoldenSnapshot(every_n_steps=every_n_steps),
        GoldenParameters(every_n_steps=every_n_steps, at=("start", "end")),
        ReverseGoldenParameters(at=("start", "end")),
        ChangeAttribution(probe=edited, n_samples=min(n_edited, 64)),
        ActivationDifferences(),
        TaylorDiff(every_n_steps=every_n_steps, at=("end",)),
        ParameterDistribution(),
        AttentionTracker(every_n_steps=every_n_steps, at=("start", "end")),
        CircuitTracker("atlas", n_pairs=16, at=("start", "end")),
        KnowledgeCoupling(n_pieces=128, every_n_steps=2 * every_n_steps, at=("end",)),
        BasinVolume(splits=True, every_n_steps=every_n_steps, at=("start", "end")),
        RunReport(),
    ]


def _finetune(settings: DemoSettings, base: Path, directory: Path) -> tuple[L.Trainer, AtlasKnowledge]:
    L.seed_everything(settings.seed, verbose=False)
    data = settings.finetuning_data()
    knowledge = AtlasKnowledge(_groups(data), data.tokenizer)
    module = GoldyModule(
        str(base),
        optimizer=OptimizerOptions(learning_rate=settings.finetuning_rate),
        schedule=ScheduleOptions("linear", warmup_fraction=0.1),
    )
    checkpoint = ModelCheckpoint(filename="{step}", every_n_epochs=settings.finetuning_epochs)
    questions = list(one_hop_questions(data.edited_facts))
    edited = data.question_dataloader(questions)
    trainer = _trainer(
        TensorBoardLogger(directory, name="finetune"),
        [knowledge, *analysis_callbacks(settings.every_n_steps, edited, n_edited=len(questions)), checkpoint],
        max_epochs=settings.finetuning_epochs,
    )
    trainer.fit(module, data)
    return trainer, knowledge


@contextmanager
def _one_thread() -> Iterator[None]:
    # Matrices of this size gain nothing from a second thread, and lose much when another program wants the core.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _groups(data: AtlasDataModule) -> dict[str, list[Question]]:
    groups = {}
    for name, facts in (("edited", data.edited_facts), ("untouched", data.unedited_facts)):
        groups[name] = one_hop_questions(facts)
        groups[f"{name}_held_out"] = one_hop_questions(facts, "held_out")
    return groups


def _table(knowledge: AtlasKnowledge) -> Table:
    table = Table(title="Questions answered as the finetuning data has it", title_justify="left")
    for heading, justify in (("", "left"), ("questions", "right"), ("before", "right"), ("after", "right")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for name, questions in knowledge.groups.items():
        label = f"{name} facts".replace("_held_out facts", " facts, new phrasing")
        table.add_row(
            label,
            f"{len(questions):,}",
            f"{percentage(knowledge.before[name])}",
            f"{percentage(knowledge.after[name])}",
        )
    return table


@dataclass(frozen=True)
class DemoSettings:
    """Everything that decides the demo's result.

    Args:
        countries: How many of the table's countries, spread over the alphabet; None for all.
        n_layer: Blocks of the model.
        n_embd: Its width.
        pretraining_rate: Peak learning rate of the pretraining.
        max_epochs: The pretraining's limit.
        target: The share of one-hop facts that ends the pretraining.
        edits: Facts made false for the finetuning.
        finetuning_rate: Peak learning rate of the finetuning.
        rehearsal: Share of the true facts that the finetuning repeats.
        finetuning_epochs: Passes over the false and the repeated facts.
        every_n_steps: How often the callbacks look.
        seed: Decides weights, edits and order.
    """

    countries: int | None = None
    n_layer: int = 4
    n_embd: int = 128
    pretraining_rate: float = 1e-3
    max_epochs: int = 40
    target: float = 0.98
    edits: int = 20
    finetuning_rate: float = 3e-4
    rehearsal: float = 0.1
    finetuning_epochs: int = 10
    every_n_steps: int = 20
    seed: int = 0

    @classmethod
    def fast(cls, seed: int = 0) -> DemoSettings:
        """The reduced form."""
        size = cls(countries=16, n_layer=2, n_embd=64, pretraining_rate=3e-3, seed=seed)
        return replace(size, edits=5, rehearsal=0.5, finetuning_epochs=8)

    @property
    def model_config(self) -> dict[str, Any]:
        """The model's configuration; the tokenizer gives the rest."""
        # Without dropout: it would slow down what is meant to be learned by heart.
        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        size = {"n_layer": self.n_layer, "n_embd": self.n_embd, "n_head": 4, "n_positions": 64}
        return {"model_type": "gpt2", **size, **dropout}

    @property
    def pretraining_hash(self) -> str:
        """Differs between pretrained models that differ."""
        decisive = asdict(self)
        for name in ("edits", "finetuning_rate", "rehearsal", "finetuning_epochs", "every_n_steps"):
            del decisive[name]
        facts = [[fact.subject, fact.relation, fact.answer, *fact.prompts] for fact in country_facts()]
        text = json.dumps([lightning_goldy.__version__, decisive, self.model_config, facts], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def pretraining_data(self) -> AtlasDataModule:
        """All true facts."""
        return self._restricted(None)

    def finetuning_data(self) -> AtlasDataModule:
        """The false facts, and a share of the true ones as rehearsal."""
        facts = [fact for fact in country_facts() if fact.subject in self._chosen()]
        return self._restricted(random_edits(facts, self.edits, self.seed))

    def _restricted(self, edits: Sequence[Edit] | None) -> AtlasDataModule:
        data = AtlasDataModule(
            batch_size=64 if edits is None and self.countries is None else 32,
            edits=None if edits is None else list(edits),
            rehearsal=0.0 if edits is None else self.rehearsal,
            probe_size=32,
            seed=self.seed,
        )
        chosen = self._chosen()
        data.facts = tuple(fact for fact in data.facts if fact.subject in chosen)
        return data

    def _chosen(self) -> set[str]:
        names = list(dict.fromkeys(fact.subject for fact in country_facts()))
        step = 1 if self.countries is None else len(names) / self.countries
        return {names[int(index * step)] for index in range(self.countries or len(names))}


def cached_base(settings: DemoSettings, directory: Path) -> tuple[Path, bool]:
    """A folder with a model that knows the atlas, pretrained now when the cache holds none.

    Args:
        settings: Decide the model; other settings, other facts or another version have folders of their own.
        directory: Where the logs of a pretraining go.

    Returns:
        The folder, in Hugging Face format, and whether it came from the cache.

    Raises:
        RuntimeError: The pretraining ended without the facts known.
    """
    folder = cache_directory() / f"demo-{settings.pretraining_hash}"
    # The folder is renamed into place when it is whole.
    if folder.is_dir():
        return folder, True
    _pretrain(settings, directory).save_pretrained(folder)
    return folder, False


def cache_directory() -> Path:
    """``lightning_goldy`` in the user's cache, which ``XDG_CACHE_HOME`` moves.

    Example:
        >>> cache_directory().name
        'lightning_goldy'
    """
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root).expanduser() / "lightning_goldy"


def copy_base(folder: Path, target: Path) -> Path:
    """Puts the base model into the demo's own directory, where recipes look for it; replaces an older one."""
    if target.exists():
        shutil.rmtree(target)
    return Path(shutil.copytree(folder, target))


def _pretrain(settings: DemoSettings, directory: Path) -> GoldyModule:
    L.seed_everything(settings.seed, verbose=False)
    data = settings.pretraining_data()
    module = GoldyModule(
        settings.model_config,
        tokenizer=data.tokenizer,
        optimizer=OptimizerOptions(learning_rate=settings.pretraining_rate, betas=(0.9, 0.99)),
        schedule=ScheduleOptions("constant", warmup_steps=50),
    )
    groups = {"one_hop": data.one_hop_questions(), "one_hop_held_out": data.one_hop_questions("held_out")}
    knowledge = AtlasKnowledge(groups, data.tokenizer, every_n_epochs=2, stop=("one_hop", settings.target))
    trainer = _trainer(
        TensorBoardLogger(directory, name="pretrain"),
        [knowledge],
        max_epochs=settings.max_epochs,
        gradient_clip_val=1.0,
        limit_val_batches=0,
        enable_checkpointing=False,
        log_every_n_steps=5 if settings.countries is None else 1,
    )
    trainer.fit(module, data)
    if not knowledge.reached:
        share = knowledge.after.get("one_hop", 0.0)
        raise RuntimeError(
            f"after {trainer.global_step} steps the model knows {percentage(share, 1)} of the one-hop facts, "
            f"not {percentage(settings.target)}"
        )
    return module


def _trainer(logger: TensorBoardLogger, callbacks: list[L.Callback], **options: Any) -> L.Trainer:
    options = {"accelerator": "auto", "devices": 1, "enable_model_summary": False, "log_every_n_steps": 1, **options}
    return L.Trainer(logger=logger, callbacks=callbacks, **options)


class AtlasKnowledge(L.Callback):
    """Logs the share of questions answered exactly, by group, and may end the training when enough are.

    Args:
        groups: Questions by the name of their group.
        tokenizer: The model's.
        every_n_epochs: Looks after so many epochs; 0 for the start and the end of the training only.
        stop: The name of a group and the share of it that ends the training.

    Raises:
        ValueError: ``stop`` names no group.
    """

    def __init__(
        self,
        groups: Mapping[str, Sequence[Question]],
        tokenizer: PreTrainedTokenizerBase,
        *,
        every_n_epochs: int = 0,
        stop: tuple[str, float] | None = None,
    ) -> None:
        if stop is not None and stop[0] not in groups:
            raise ValueError(f"stop names the group {stop[0]!r}; the groups are {', '.join(groups)}")
        self.groups = {name: [(each.prompt, each.answer) for each in questions] for name, questions in groups.items()}
        self.tokenizer = tokenizer
        self.every_n_epochs = every_n_epochs
        self.stop = stop
        self.before: dict[str, float] = {}
        self.after: dict[str, float] = {}

    @property
    def reached(self) -> bool:
        """Whether the share that ends the training has been reached."""
        return self.stop is not None and self.after.get(self.stop[0], 0.0) >= self.stop[1]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Looks before the first step."""
        self.before = self._look(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Looks, shows it in the progress bar, and ends the training when enough is known."""
        if not self.every_n_epochs or (trainer.current_epoch + 1) % self.every_n_epochs:
            return
        self.after = self._look(trainer, pl_module)
        if self.stop is not None:
            pl_module.log("known", self.after[self.stop[0]], prog_bar=True, logger=False)
        trainer.should_stop = trainer.should_stop or self.reached

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Looks after the last step."""
        self.after = self._look(trainer, pl_module)

    def _look(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, float]:
        model = pl_module.model
        shares = {
            name: share_known(model, self.tokenizer, questions)  # type: ignore[arg-type]
            for name, questions in self.groups.items()
        }
        scalars = {f"known/{name}": share for name, share in shares.items()}
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=trainer.global_step)
        return shares


def answers_known(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[tuple[str, str]],
    batch_size: int = 256,
) -> list[bool]:
    r"""Whether greedy decoding from each prompt gives the answer and then ends.

    .. math:: a_t = \arg\max_v \, p_\theta(v \mid q, a_{<t}) \quad \text{for every token } a_t
        \text{ of the answer and its end-of-text token}

    That is what greedy decoding does as long as it is right, so one forward pass per batch decides.

    Args:
        model: A causal language model; comes back as it was, in the mode that it was in.
        tokenizer: With an eos token.
        questions: Prompts and answers.
        batch_size: Questions per forward pass.

    Returns:
        One truth value per question.

    Raises:
        ValueError: There are no questions, an answer is empty or has words that the tokenizer does not know.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from lightning_goldy.data.tokenization import byte_tokenizer
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=4, vocab_size=258, n_positions=8))
        >>> answers_known(model, byte_tokenizer(), [("2+2=", "4")])
        [False]
    """
    if not questions:
        raise ValueError("there are no questions to answer")
    samples = encode_pairs(tokenizer, questions)
    collate = PadCollator(padding_id(tokenizer))
    device = next(model.parameters()).device
    objective = CausalLMObjective()
    known: list[bool] = []
    with preserved(model), torch.no_grad():
        for start in range(0, len(samples), batch_size):
            batch = map_batch(collate(samples[start : start + batch_size]), lambda tensor: tensor.to(device))
            target = objective.logits_and_targets(model, batch)
            wrong = (target.logits.argmax(dim=-1) != target.targets).long()
            errors = wrong.new_zeros(target.n_samples).index_add(0, target.sample, wrong)  # [B]
            known += (errors == 0).tolist()
    return known


def share_known(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[tuple[str, str]],
    batch_size: int = 256,
) -> float:
    """The share of questions that greedy decoding answers exactly, in [0, 1]; see :func:`answers_known`.

    Args:
        model: A causal language model.
        tokenizer: With an eos token.
        questions: Prompts and answers.
        batch_size: Questions per forward pass.

    Raises:
        ValueError: There are no questions, or an answer cannot be tokenised.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from lightning_goldy.data.tokenization import byte_tokenizer
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=4, vocab_size=258, n_positions=8))
        >>> share_known(model, byte_tokenizer(), [("2+2=", "4")])
        0.0
    """
    known = answers_known(model, tokenizer, questions, batch_size)
    return sum(known) / len(known)
