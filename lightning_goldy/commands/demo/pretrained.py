"""The demo's base model and what it knows."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import lightning.pytorch as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn
from transformers import PreTrainedTokenizerBase

from lightning_goldy.commands.demo.settings import DemoSettings
from lightning_goldy.core.batches import map_batch
from lightning_goldy.core.isolation import preserved
from lightning_goldy.core.objective import CausalLMObjective
from lightning_goldy.core.pieces import PadCollator, encode_pairs
from lightning_goldy.data import Question
from lightning_goldy.data.tokenization import padding_id
from lightning_goldy.optim import OptimizerOptions, ScheduleOptions
from lightning_goldy.training.module import GoldyModule


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
    trainer = L.Trainer(
        max_epochs=settings.max_epochs,
        accelerator="auto",
        devices=1,
        logger=TensorBoardLogger(directory, name="pretrain"),
        callbacks=[knowledge],
        gradient_clip_val=1.0,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=5 if settings.countries is None else 1,
    )
    trainer.fit(module, data)
    if not knowledge.reached:
        share = knowledge.after.get("one_hop", 0.0)
        raise RuntimeError(
            f"after {trainer.global_step} steps the model knows {share:.1%} of the one-hop facts, "
            f"not {settings.target:.0%}"
        )
    return module
