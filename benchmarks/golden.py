"""Golden parameters against forward + backward alone, and the cost of isolation, at 30 M parameters.

    python benchmarks/golden.py
    python benchmarks/golden.py --whole --width 304 --tokens 32 --threads 1
    python benchmarks/golden.py --tasks atlas
    python benchmarks/golden.py --tasks MODEL TEXT QUESTIONS MORE_QUESTIONS --parts 3 --part-size 3 --blocks

Prints ratios of medians over alternating repetitions in one run; absolute times depend on the machine. With
``--whole`` it prints only how many times its forward and backward passes the whole analysis takes, with its null and
intervals, without and with its control of random tokens, by processor time. With ``--tasks`` it prints instead, for
several settings, whether golden sets of parts of one task overlap more than those of two: of the atlas model after a
finetune on false facts (it needs the model that ``goldy demo`` keeps in the cache), on questions of two relations, or
of a folder of ``save_pretrained``, on two or more files, each a text or a JSON list of questions.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_goldy.analysis import golden_parameters
from lightning_goldy.analysis.golden import random_tokens, vocabulary_of
from lightning_goldy.analysis.golden.golden import SCORES
from lightning_goldy.core.isolation import preserved
from lightning_goldy.core.objective import CausalLMObjective
from lightning_goldy.core.selection import select_largest


def subject(width: int = 512) -> torch.nn.Module:
    config = GPT2Config(
        n_layer=8, n_head=8, n_embd=width, vocab_size=8192, n_positions=256, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config).eval()


def forward_backward(model: torch.nn.Module, ids: torch.Tensor) -> None:
    for sample in ids.split(1):
        model.zero_grad(set_to_none=True)
        model(input_ids=sample, labels=sample, use_cache=False).loss.backward()
    model.zero_grad(set_to_none=True)


def paired(first, second, repetitions: int, clock=time.perf_counter) -> tuple[float, float, float]:
    """Median seconds of both, and the median ratio pair by pair."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repetitions + 1):
        for function, into in zip((first, second), times, strict=True):
            start = clock()
            function()
            into.append(clock() - start)
    ratios = [a / b for a, b in zip(times[0][1:], times[1][1:], strict=True)]
    return statistics.median(times[0][1:]), statistics.median(times[1][1:]), statistics.median(ratios)


def peak_growth(work: str) -> int:
    """Growth of the largest resident size, bytes, in a process of its own: a used heap hides what is allocated."""
    command = [sys.executable, __file__, "--peak", work]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def peak_resident() -> int:
    # Linux only. Not getrusage: its maximum is handed down from the parent, whose own size then hides the child's.
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def atlas_tasks(parts: int, size: int) -> tuple[torch.nn.Module, list[list[list[dict[str, torch.Tensor]]]]]:
    """The finetuned model of the demo, and samples by task and part: questions of two relations."""
    import random

    from transformers import AutoModelForCausalLM

    from lightning_goldy.commands.demo import DemoSettings, cached_base
    from lightning_goldy.core.pieces import PadCollator, encode_pairs
    from lightning_goldy.data import one_hop_questions
    from lightning_goldy.data.tokenization import padding_id

    settings = DemoSettings()
    folder, _ = cached_base(settings, Path("runs/demo"))
    data, model = settings.finetuning_data(), AutoModelForCausalLM.from_pretrained(folder)
    collate = PadCollator(padding_id(data.tokenizer))
    edited = encode_pairs(data.tokenizer, [(each.prompt, each.answer) for each in one_hop_questions(data.edited_facts)])
    optimizer, draw = torch.optim.AdamW(model.parameters(), settings.finetuning_rate), random.Random(0)
    for _ in range(60):
        optimizer.zero_grad()
        model(**collate(draw.sample(edited, min(16, len(edited))))).loss.backward()
        optimizer.step()
    questions: dict[str, list[tuple[str, str]]] = {}
    for each in one_hop_questions(data.facts):
        questions.setdefault(each.fact.relation, []).append((each.prompt, each.answer))
    tasks = []
    for name in ("capital", "currency"):
        chosen = random.Random(1).sample(questions[name], parts * size)
        samples = [collate([one]) for one in encode_pairs(data.tokenizer, chosen)]
        tasks.append([samples[part::parts] for part in range(parts)])
    return model.eval(), tasks


def text_tasks(arguments: list[str], parts: int, size: int, block: int = 32):
    """A model, and samples by task and part: blocks of each text, or of questions with their answers."""
    import json

    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, *files = arguments
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tasks = []
    for file in map(Path, files):
        content = file.read_text()
        if file.suffix == ".json":
            content = " ".join(f"{row['Question']} {row['answer'][0]}" for row in json.loads(content))
        content = content[:200_000]
        ids = torch.tensor(tokenizer(content)["input_ids"])
        # Far apart, so that parts share no passage.
        starts = torch.linspace(0, len(ids) - block - 1, parts * size).long().tolist()
        samples = [{"input_ids": ids[start : start + block][None]} for start in starts]
        tasks.append([samples[part::parts] for part in range(parts)])
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), tasks


def golden_sets(model, samples, settings, quorums, *, blocks: bool = False) -> dict[tuple, torch.Tensor]:
    """Positions in all parameters of what a quorum of the samples marks, by score, percent and quorum.

    Args:
        model: The model.
        samples: Of one part.
        settings: Scores and percents.
        quorums: Shares of the samples.
        blocks: Whether embeddings are left out, whose rows are the words of a task.
    """
    words = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    parameters = {name: part for name, part in model.named_parameters() if not (blocks and id(part) in words)}
    votes = {key: [torch.zeros(p.shape, dtype=torch.uint8) for p in parameters.values()] for key in settings}
    for sample in samples:
        model.zero_grad(set_to_none=True)
        CausalLMObjective().log_probs(model, sample).mean().backward()
        for score in dict.fromkeys(score for score, _ in settings):
            for index, parameter in enumerate(parameters.values()):
                strength = SCORES[score](parameter.grad.clone(), parameter.detach())
                for key in settings:
                    if key[0] == score:
                        count = max(1, round(key[1] / 100 * parameter.numel()))
                        votes[key][index] += select_largest([strength], count)[0]
    found = {}
    for key, parts in votes.items():
        flat = torch.cat([part.flatten() for part in parts])
        for quorum in quorums:
            found[(*key, quorum)] = (flat >= math.ceil(quorum * len(samples))).nonzero().flatten()
    model.zero_grad(set_to_none=True)
    return found


def overlap(first: torch.Tensor, second: torch.Tensor) -> float:
    """Intersection over union of two ascending lists of positions."""
    if not len(first) or not len(second):
        return 0.0
    place = torch.searchsorted(second, first).clamp(max=len(second) - 1)
    shared = int((second[place] == first).sum())
    return shared / (len(first) + len(second) - shared)


def contrast(table: dict[frozenset, float], tasks: list[list[int]]) -> float:
    """Mean overlap of parts of one task over that of parts of two."""
    within = [table[frozenset(pair)] for task in tasks for pair in itertools.combinations(task, 2)]
    together = {frozenset(pair) for task in tasks for pair in itertools.combinations(task, 2)}
    between = [value for pair, value in table.items() if pair not in together]
    return statistics.mean(within) / max(statistics.mean(between), 1e-12)


def groupings(names: list[int], size: int) -> list[list[list[int]]]:
    """All ways to share names out over groups of equal size, whose order does not count."""
    if not names:
        return [[]]
    first, rest = names[0], names[1:]
    return [
        [[first, *others], *more]
        for others in itertools.combinations(rest, size - 1)
        for more in groupings([name for name in rest if name not in others], size)
    ]


def report_tasks(
    arguments: list[str], parts: int, size: int, percents: list[float], *, quorums: list[float], blocks: bool
) -> None:
    model, tasks = atlas_tasks(parts, size) if arguments == ["atlas"] else text_tasks(arguments, parts, size)
    settings = [(score, percent) for score in ("gradient", "taylor") for percent in percents]
    sets = [golden_sets(model, part, settings, quorums, blocks=blocks) for task in tasks for part in task]
    noise = [random_tokens(sample, vocabulary_of(model)) for sample in tasks[0][0]]
    control = golden_sets(model, noise, settings, quorums, blocks=blocks)
    names = list(range(len(tasks) * parts))
    ways = groupings(names, parts)
    print(f"{len(tasks)} tasks, {parts} parts of {size} samples each; p over all {len(ways)} ways to name the parts")
    print("| score | top % | quorum | golden | within | between | ratio | p | without random tokens' | p |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for key in sets[0]:
        cells = []
        for left_out in (control[key][:0], control[key]):
            own = [each[key][~torch.isin(each[key], left_out, assume_unique=True)] for each in sets]
            pairs = itertools.combinations(names, 2)
            table = {frozenset(pair): overlap(*(own[name] for name in pair)) for pair in pairs}
            ratios = [contrast(table, way) for way in ways]
            right = contrast(table, [names[start : start + parts] for start in names[::parts]])
            cells.append((table, right, sum(ratio >= right - 1e-12 for ratio in ratios) / len(ratios)))
        within = statistics.mean(
            cells[0][0][frozenset(pair)]
            for task in (names[start : start + parts] for start in names[::parts])
            for pair in itertools.combinations(task, 2)
        )
        between = within / cells[0][1] if cells[0][1] else 0.0
        count = statistics.mean(len(each[key]) for each in sets)
        print(
            f"| {key[0]} | {key[1]:g} | {key[2]:g} | {count:,.0f} | {within:.3f} | {between:.3f} | {cells[0][1]:.2f} | "
            f"{cells[0][2]:.3f} | {cells[1][1]:.2f} | {cells[1][2]:.3f} |",
            flush=True,
        )


def report_whole(model: torch.nn.Module, ids: torch.Tensor, repetitions: int) -> None:
    """Prints how many times the passes over the samples the whole analysis takes."""
    for control in (False, True):
        analysis, alone, ratio = paired(
            lambda control=control: golden_parameters(model, [{"input_ids": ids}], control=control),
            lambda: forward_backward(model, ids),
            repetitions,
            time.process_time,
        )
        print(
            f"golden_parameters {'with' if control else 'without'} its control {analysis:.2f} s, forward + backward "
            f"{alone:.2f} s: {ratio:.2f} times",
            flush=True,
        )


def print_peak(work: str) -> None:
    model, ids = subject(), torch.randint(0, 8192, (2, 256))
    with torch.no_grad():  # libraries allocate their workspaces on first use
        model(input_ids=ids[:1])
    before = peak_resident()
    if work == "forward_backward":
        forward_backward(model, ids)
    else:
        golden_parameters(model, [{"input_ids": ids}], scope=work, control=False)
    print(peak_resident() - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256, help="of a sample")
    parser.add_argument("--width", type=int, default=512, help="of the model; 512 has 30 M parameters, 304 has 11 M")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--whole", action="store_true", help="only the whole analysis against its passes")
    parser.add_argument("--peak", choices=("forward_backward", "tensor", "global"), help=argparse.SUPPRESS)
    parser.add_argument("--tasks", nargs="+", metavar="MODEL", help="atlas, or a model and files of texts or questions")
    parser.add_argument("--parts", type=int, default=4)
    parser.add_argument("--part-size", type=int, default=8)
    parser.add_argument("--percents", type=float, nargs="+", default=[0.1, 1.0, 5.0])
    parser.add_argument("--quorums", type=float, nargs="+", default=[0.25, 0.5, 0.75, 1.0])
    parser.add_argument("--blocks", action="store_true", help="leave embeddings out, whose rows are words")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.tasks:
        options = {"quorums": arguments.quorums, "blocks": arguments.blocks}
        report_tasks(arguments.tasks, arguments.parts, arguments.part_size, arguments.percents, **options)
        return
    torch.set_num_threads(arguments.threads)
    if arguments.peak:
        print_peak(arguments.peak)
        return
    model = subject(arguments.width)
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    ids = torch.randint(0, 8192, (arguments.samples, arguments.tokens))
    batch = {"input_ids": ids}
    print(
        f"{size / 4e6:.1f} M parameters, {arguments.samples} samples of {arguments.tokens} tokens, "
        f"{torch.get_num_threads()} threads"
    )
    if arguments.whole:
        report_whole(model, ids, arguments.repetitions)
        return

    for scope in ("tensor", "global"):
        analysis, alone, ratio = paired(
            lambda scope=scope: golden_parameters(model, [batch], scope=scope, control=False),
            lambda: forward_backward(model, ids),
            arguments.repetitions,
        )
        print(
            f"golden_parameters({scope}) {analysis:.2f} s, forward + backward {alone:.2f} s: ratio {ratio:.3f} (<= 1.2)"
        )

    plain = peak_growth("forward_backward")
    for scope in ("tensor", "global"):
        extra = (peak_growth(scope) - plain) / size
        print(f"memory({scope}): {extra:+.2f} x the parameters against forward + backward with its gradients (<= 1.3)")

    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def enter_and_leave() -> None:
        with preserved(model):
            pass

    def copy_gradients_and_buffers() -> None:
        copies = [parameter.grad.clone() for parameter in model.parameters()]
        copies += [buffer.clone() for buffer in model.buffers()]

    isolation, copy, ratio = paired(enter_and_leave, copy_gradients_and_buffers, 4 * arguments.repetitions)
    print(
        f"isolation {1e3 * isolation:.2f} ms, a copy of gradients and buffers {1e3 * copy:.2f} ms: {ratio:.3f} (<= 1)"
    )


if __name__ == "__main__":
    main()
