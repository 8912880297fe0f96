"""``goldy analyze``: what a checkpoint's finetune changed, after the fact."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_analyze(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to those of ``goldy``.

    Args:
        commands: The sub-commands.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> add_analyze(parser.add_subparsers())
        >>> parser.parse_args(["analyze", "a.ckpt", "--config", "run.yaml", "--prompt", "1+1="]).prompt
        ['1+1=']
    """
    parser = commands.add_parser(
        "analyze",
        help="analyse a checkpoint against its base: goldy analyze CHECKPOINT --config FILE",
        description="Attention, Taylor expansion, shape of the change and generations of one checkpoint against its "
        "base. Further options change the configuration, as in --data.source=text.txt.",
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a Lightning .ckpt, or a folder of save_pretrained")
    parser.add_argument(
        "--config", metavar="FILE", action="append", required=True, help="as for goldy fit; may be repeated"
    )
    parser.add_argument(
        "--base",
        metavar="PATH",
        help="what the model was before: a .ckpt, a folder of save_pretrained, a vector file, a run with a snapshot "
        "(default: the snapshot of the checkpoint's run, else the pretrained model of the configuration)",
    )
    parser.add_argument("--prompt", metavar="TEXT", action="append", default=[], help="to continue; may be repeated")
    parser.add_argument("--prompts", metavar="FILE", help="more of them, one per line; empty lines are passed over")
    parser.add_argument(
        "--max-new-tokens", type=int, default=50, help="longest continuation, tokens (default: %(default)s)"
    )
    parser.add_argument(
        "--temperature", type=float, help="draw tokens at this temperature (default: take the most probable token)"
    )
    parser.add_argument("--seed", type=int, default=0, help="decides the draws (default: %(default)s)")
    parser.add_argument("--n-samples", type=int, help="samples of the probe (default: at most 16)")
    parser.add_argument(
        "--output", metavar="DIR", help="where everything goes (default: runs/analyze/version_N, the next free one)"
    )
    parser.set_defaults(run=_analyze, configured=parser)


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
        raise ValueError(f"{path} is no UTF-8 text: {error}") from error
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{path} holds no prompt; one per line")
    return prompts


def _analyze(options: argparse.Namespace) -> int:
    # Brings torch and Lightning, which other commands need not wait for.
    from lightning_goldy.checkpoint_analysis import analyze_checkpoint
    from lightning_goldy.checkpoint_parts import Writing

    prompts = [*options.prompt, *(read_prompts(options.prompts) if options.prompts else ())]
    analyze_checkpoint(
        options.checkpoint,
        [word for path in options.config for word in ("--config", path)] + options.more,
        base=options.base,
        writing=Writing(tuple(prompts), options.max_new_tokens, options.temperature, options.seed),
        n_samples=options.n_samples,
        output=options.output,
    )
    return 0
