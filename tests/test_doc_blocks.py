"""Every Python and shell block of the documentation runs, or says why not."""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_goldy.cli import COMMANDS, command_parser, main, option_strings
from tests.house import ROOT
from tests.references.doc_blocks import (
    BLOCKS,
    PIECES,
    SHELL,
    SMALLER,
    Block,
    blocks_of,
    commands_of,
    names_of,
    registered_for_a_while,
)

# Whole runs, which a slow test of their own makes.
ELSEWHERE = {"docs/classifiers.md": "tests/callbacks/test_classifiers.py"}
LONG = {"docs/basin_volume.md"}
PYTHON: dict[str, list[Block]] = {}
for _block in BLOCKS:
    if _block.language == "python" and not _block.reason:
        PYTHON.setdefault(str(_block.page.relative_to(ROOT)), []).append(_block)
COMMAND_LINES = [
    pytest.param(command, id=f"{block.place} {command[:40]}")
    for block in BLOCKS
    if block.language in SHELL and not block.reason
    for command in commands_of(block)
]


def test_blocks_are_found_with_their_reasons() -> None:
    text = "```python\na = 1\n```\n<!-- not run: needs a network -->\n```bash\nb\n```\n"
    first, second = blocks_of(text, ROOT / "README.md")
    assert (first.language, first.code, first.reason, first.line) == ("python", "a = 1\n", "", 1)
    assert (second.language, second.reason) == ("bash", "needs a network")


def test_what_looks_like_a_command_is_marked_as_one() -> None:
    for block in BLOCKS:
        if block.language in ("", "text"):
            assert not re.match(r"(goldy|python|make|pip|torchrun) ", block.code), block.place


def test_few_blocks_do_not_run() -> None:
    counted = Counter(block.language for block in BLOCKS if block.reason)
    assert set(counted) <= {"python", *SHELL}, counted
    assert counted["python"] == 0
    assert sum(counted[name] for name in SHELL) <= 5
    assert sum(len(blocks) for blocks in PYTHON.values()) >= 37


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[pytest.mark.slow] * (page in LONG)) for page in sorted(set(PYTHON) - set(ELSEWHERE))],
)
def test_python_blocks_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = names_of(page, tmp_path)
    with registered_for_a_while():
        for block in PYTHON[page]:
            code = block.code
            for large, small in SMALLER.get(page, ()):
                code = code.replace(large, small)
            # This module's own future import is not the page's.
            exec(compile("\n" * block.line + code, block.place, "exec", dont_inherit=True), names)


def test_pages_that_run_elsewhere_do() -> None:
    for page, test in ELSEWHERE.items():
        assert Path(page).name in (ROOT / test).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "block", [block for block in BLOCKS if block.language == "yaml"], ids=lambda block: block.place
)
def test_yaml_blocks_name_classes_and_their_options(block: Block) -> None:
    import inspect
    from pkgutil import resolve_name

    def check(node: Any) -> None:
        if isinstance(node, dict):
            if "class_path" in node:
                inspect.signature(resolve_name(node["class_path"])).bind_partial(**(node.get("init_args") or {}))
            for value in node.values():
                check(value)
        elif isinstance(node, list):
            for item in node:
                check(item)

    check(yaml.safe_load(block.code))


def parser_at(words: list[str]) -> tuple[argparse.ArgumentParser, list[str]]:
    """The parser of the deepest sub-command, and the words after it."""
    parser, rest = command_parser(), list(words)
    while rest:
        below = next((a for a in parser._actions if isinstance(a, argparse._SubParsersAction)), None)
        if below is None or rest[0] not in below.choices:
            break
        parser = below.choices[rest.pop(0)]
    return parser, rest


@pytest.mark.parametrize("command", COMMAND_LINES)
def test_shell_blocks_are_commands_that_there_are(command: str) -> None:
    """Sub-commands, options and files of the repository."""
    _check_goldy(goldy_words(command))


def goldy_words(command: str) -> list[str]:
    """After the program; of torchrun what each process runs."""
    words = shlex.split(command)
    if words[0] == "torchrun":
        return words[words.index("lightning_goldy.cli") + 1 :]
    assert words[0] == "goldy"
    return words[1:]


def _check_goldy(words: list[str]) -> None:
    assert words[0] in COMMANDS
    for name in re.findall(r"((?:recipes|callbacks)/[\w]+\.yaml)", " ".join(words)):
        assert (ROOT / name).is_file()
    if COMMANDS[words[0]].add is None:
        given = {word.partition("=")[0].split(".")[0] for word in words if word.startswith("--")}
        assert given <= {"--config", "--ckpt_path", "--data", "--model", "--trainer", "--callbacks"}
        return
    parser, rest = parser_at(words)
    synopsis = " ".join(rest)
    if re.search(r"[\[|]", synopsis):
        # A synopsis: its options are checked one by one.
        assert set(re.findall(r"--[\w-]+", synopsis)) <= set(option_strings(parser))
        return
    _, unknown = parser.parse_known_args([word.replace("FILE...", "FILE") for word in rest])
    assert [word for word in unknown if word.startswith("-")] == []


# What whole tests of their own run with small models: every recipe, the splits of the atlas, sweeps.
COVERED = (r"^fit ", r"^basin .*--splits", r"^plasticity ")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with recipes, pieces, and a small run under the names of the pages."""
    here = tmp_path_factory.mktemp("shell")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        for name in ("recipes", "callbacks"):
            shutil.copytree(ROOT / name, here / name)
        (here / "prompts.txt").write_text("to be\n")
        more = (
            PIECES.replace('{"id": "', f'{{"id": "{n} ').replace('"question": "', f'"question": "{n} ')
            for n in range(3)
        )
        (here / "pieces.jsonl").write_text("".join(more))
        (here / "text.txt").write_text("to be or not to be, that is the question. " * 60)
        recipe = yaml.safe_load((here / "recipes" / "text_from_scratch.yaml").read_text())
        recipe["trainer"] |= {"max_steps": 2, "val_check_interval": 2, "limit_val_batches": 1}
        recipe["data"]["init_args"] |= {"block_size": 16, "batch_size": 2, "probe_size": 16, "source": "text.txt"}
        (here / "run.yaml").write_text(yaml.safe_dump(recipe))
        overlays = ("golden_snapshot", "golden_parameters")
        words = [word for name in overlays for word in ("--config", f"callbacks/{name}.yaml")]
        small = ["--model.model.n_layer=1", "--model.model.n_embd=8", "--model.model.n_head=1"]
        quiet = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
        assert main(["fit", "--config", "run.yaml", *words, *small, *quiet]) == 0
        trained = here / "runs" / "text_from_scratch" / "version_0"
        for name in ("a", "b", "gpt2_finetune", "finetune", "NAME"):
            run = shutil.copytree(trained, here / "runs" / name / "version_0")
            for step in ("step=600", "step=64", "last"):
                shutil.copy(run / "checkpoints" / "step=2.ckpt", run / "checkpoints" / f"{step}.ckpt")
            shutil.copytree(run / "checkpoints" / "step=2", run / "checkpoints" / "step=1000")
        shutil.copy(trained / "config.yaml", here)
        shutil.copy(trained / "checkpoints" / "step=2.ckpt", here / "last.ckpt")
        for name in ("gpt2", "MODEL", "runs/demo/base"):
            shutil.copytree(trained / "checkpoints" / "step=2", here / name)
        shutil.copy(next(trained.rglob("base.safetensors")), here / "base.safetensors")
        yield here


def concrete(words: list[str], here: Path, number: int) -> list[str]:
    """The words with files that there are in the place of names in capitals."""
    mask = next((here / "runs" / "a").rglob("mask-*.safetensors"))
    names = {
        "BASE": "base.safetensors",
        "CHECKPOINT": "last.ckpt",
        "CHECKPOINT...": "last.ckpt",
        "FILE...": f"{mask} {next((here / 'runs' / 'b').rglob('mask-*.safetensors'))}",
        "FILE.jsonl": f"made-{number}.jsonl",
        "SOURCE": "pieces.jsonl",
        "RUN": "runs/a/version_0",
        "OTHER": "runs/b/version_0",
        "recipes/text_finetune.yaml": "config.yaml",
        "and|or|minus|not": "and",
    }
    files = {"--config": "config.yaml", "--data": "pieces.jsonl", "--output": f"made-{number}.safetensors"}
    filled: list[str] = []
    for before, word in zip(["", *words], words, strict=False):
        value = files.get(before, word) if word == "FILE" else names.get(word, word)
        filled += sorted(map(str, here.glob(value))) if "*" in value else value.split() if word in names else [value]
    return filled


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_shell_blocks_run(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran = 0
    for number, parameter in enumerate(COMMAND_LINES):
        # Of a synopsis what is not optional.
        words = goldy_words(re.sub(r"\[[^]]*\]", "", str(parameter.values[0])))
        if any(re.search(pattern, " ".join(words)) for pattern in COVERED):
            continue
        words = concrete(words, workplace, number)
        # Of several processes.
        words = [word for word in words if word != "--shard"]
        if "--meta" in words:
            # What a pretrained recipe needs is planned from the model alone.
            words = ["doctor", "MODEL", "--meta", "--steps", "100"]
        with capsys.disabled():
            print(" ".join(words))
        assert main(words) == 0, (words, capsys.readouterr().err)
        ran += 1
    assert ran >= 20
