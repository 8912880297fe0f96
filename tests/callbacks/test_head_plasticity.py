"""The callback: what it cuts and regrows, what stays as it was, resume in every phase, what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lightning_goldy.analysis.heads import HeadFreeze, PruningSchedule, Recovery, Regrowth, Scoring, head_importance
from lightning_goldy.analysis.heads.importance import HeadProbe
from lightning_goldy.analysis.heads.optimizer import AttentionRate, CycleCopy
from lightning_goldy.callbacks import ExactResume, GoldenSnapshot, HeadPlasticity
from lightning_goldy.core import CausalLMObjective, StoreError
from lightning_goldy.core.architecture import HeadError, HeadGates
from lightning_goldy.core.isolation import preserved
from lightning_goldy.core.sharding import Replicas
from lightning_goldy.report.topics.heads import chart_plasticity_loss
from tests.callbacks.training import Finetune, TokenData, differences, fit
from tests.references.models import build, token_batch

RESUMING = pytest.mark.filterwarnings(
    "ignore:Be aware that when using", "ignore:.*exists and is not empty", "ignore:.*the last cycle ends at step"
)
SHORT = PruningSchedule(
    warmup_steps=3, steps_per_cycle=8, shape="linear", ramp_steps=4, cuts=4, regrow_at=6
)  # cuts at 4, 5, 6, 7; regrows at 9; ends at 11, and again 8 later
PROBE = Scoring(n_samples=4)


class Llama(Finetune):
    """Two layers of four heads in two groups."""

    def __init__(self) -> None:
        super().__init__("llama")


def rows(callback: HeadPlasticity) -> list[dict]:
    return [json.loads(line) for line in (callback.folder / "results.jsonl").read_text().splitlines()]


def events(callback: HeadPlasticity) -> list[tuple[int, str, int]]:
    return [
        (row["step"], event["kind"], event["closed"]) for row in rows(callback) for event in row["result"]["events"]
    ]


def plasticity(**options) -> HeadPlasticity:
    settings = {"pruning_level": 0.5, "schedule": SHORT, "scoring": PROBE, "at": ("end",), **options}
    return HeadPlasticity(settings.pop("strategy", "combined"), **settings)


def test_a_run_cuts_along_the_ramp_and_regrows(tmp_path):
    callback = plasticity(cycles=2)
    _, module, _ = fit(tmp_path, [callback], module=Llama, data=TokenData(40), max_epochs=1)
    assert events(callback) == [
        (3, "begin", 0),
        *[(4, "cut", 1), (5, "cut", 2), (6, "cut", 3), (7, "cut", 4)],
        *[(9, "regrow", 2), (11, "finish", 2), (11, "begin", 2)],
        *[(12, "cut", 3), (14, "cut", 4), (17, "regrow", 2), (19, "finish", 2)],
    ]
    last = rows(callback)[-1]
    assert (last["step"], last["trigger"]) == (20, "end")
    assert [list(head) for head in HeadGates.of(module.model).closed] == last["result"]["closed"]
    assert last["metrics"]["active_heads"] == 6
    assert last["metrics"]["closed_share"] == 0.25
    assert last["result"]["phase"] == "done"


def test_what_is_cut_and_regrown_is_what_the_functions_choose(tmp_path):
    """With a learning rate of zero the model stays the same, so that the functions can be asked afterwards."""

    class Still(Llama):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.0)

    schedule = PruningSchedule(warmup_steps=0, steps_per_cycle=6, shape="one_shot", regrow_at=4)
    callback = plasticity(strategy="taylor", schedule=schedule, min_heads_per_layer=2, pruning_level=0.5)
    fit(tmp_path, [callback], module=Still, max_epochs=1)
    cut, regrow = (next(row for row in rows(callback) if row["step"] == step) for step in (0, 4))
    cut_event, regrow_event = cut["result"]["events"][1], regrow["result"]["events"][0]
    assert [event["kind"] for event in cut["result"]["events"]] == ["begin", "cut"]

    model, batches = build("llama"), list(TokenData().probe_dataloader())
    scores = head_importance(model, batches, strategy="taylor")
    assert torch.equal(torch.tensor(cut["result"]["scores"]["values"], dtype=torch.float64), scores.scores)
    expected = scores.least_important(0.5, min_heads_per_layer=2)
    assert [tuple(head) for head in cut_event["heads"]] == list(expected)
    gates = HeadGates(model)

    def loss() -> float:
        with preserved(model):
            return HeadProbe(model, batches, CausalLMObjective(), gates=gates, replicas=Replicas()).loss()

    assert cut_event["loss_before"] == loss()
    gates.disable(expected)
    assert cut_event["loss_after"] == loss()
    magnitude = head_importance(model, batches, strategy="magnitude").scores
    wanted = sorted(gates.closed, key=lambda head: -float(magnitude[head]))[:2]
    assert [tuple(head) for head in regrow_event["heads"]] == wanted
    gates.enable(wanted)
    # The golden weights are those that are there already.
    assert regrow_event["loss_after"] == loss()
    assert regrow["metrics"]["regrow/loss_after"] == loss()


def test_the_costs_of_the_rows_are_what_ran(tmp_path):
    passes = []

    class Counting(HeadPlasticity):
        def compute(self, context):
            passes.append([0, 0])
            forwards = context.model.register_forward_hook(count, with_kwargs=True)
            # A backward hook of the module would hear nothing of an analysis.
            backwards = context.model.model.norm.register_forward_hook(watch)
            result = super().compute(context)
            forwards.remove()
            backwards.remove()
            return result

    # Functions, for what the object of a hook keeps is put back after an analysis.
    def count(module, args, options, output):
        passes[-1][0] += len(options["input_ids"])

    def watch(module, args, output):
        if output.requires_grad:
            output.register_hook(count_back)

    def count_back(gradient):
        passes[-1][1] += len(gradient)

    callback = Counting("combined", pruning_level=0.5, cycles=2, schedule=SHORT, scoring=PROBE, at=("end",))
    fit(tmp_path, [callback], module=Llama, data=TokenData(40), max_epochs=1)
    assert [[row["cost"]["forwards"], row["cost"]["backwards"]] for row in rows(callback)] == passes
    assert sum(backwards for _, backwards in passes) > 0
    # Where only the loss is measured: once, over the four samples of the probe.
    assert passes[-1] == [4, 0]


def test_closed_heads_do_not_move_and_golden_regrowth_brings_the_base_back(tmp_path):
    seen = {}

    class Watching(HeadPlasticity):
        def on_train_batch_end(self, trainer, pl_module, *args):
            super().on_train_batch_end(trainer, pl_module, *args)
            seen[trainer.global_step] = {
                name: value.detach().clone() for name, value in pl_module.model.named_parameters()
            }

    schedule = PruningSchedule(warmup_steps=2, steps_per_cycle=14, shape="one_shot", regrow_at=10)
    regrowth = Regrowth(fraction=1.0)
    callback = Watching("magnitude", pruning_level=0.25, schedule=schedule, scoring=PROBE, regrowth=regrowth)
    trainer, module, _ = fit(tmp_path, [callback], gradient_clip_val=0.5)
    start = build("gpt2")
    (layer, head) = next(event for row in rows(callback) for event in row["result"]["events"] if "heads" in event)[
        "heads"
    ][0]
    name = f"transformer.h.{layer}.attn.c_proj.weight"
    mine, others = slice(8 * head, 8 * head + 8), slice(8 * (1 - head), 8 * (1 - head) + 8)
    for step in range(3, 12):
        assert torch.equal(seen[step][name][mine], seen[2][name][mine])
        assert not torch.equal(seen[step][name][others], seen[2][name][others])
    assert not torch.equal(seen[2][name][mine], dict(start.named_parameters())[name][mine])
    assert torch.equal(seen[12][name][mine], dict(start.named_parameters())[name][mine])
    assert not torch.equal(seen[13][name][mine], seen[12][name][mine])
    assert HeadGates.of(module.model).closed == ()
    assert trainer.global_step == 16


@pytest.mark.filterwarnings("ignore:.*the last cycle ends at step")
def test_scoring_and_measuring_leave_no_trace(tmp_path):
    """Until something is cut the training is bit-identical to one without the callback."""
    _, _, plain = fit(tmp_path / "plain", module=Llama, max_epochs=1)
    late = PruningSchedule(warmup_steps=4, steps_per_cycle=100, ramp_steps=50, cuts=1, regrow_at=60)
    watcher = plasticity(schedule=late, every_n_steps=1, recovery=Recovery(tolerance=0.1))

    class Busy(HeadPlasticity):
        def compute(self, context):
            done = super().compute(context)
            for strategy in ("combined", "taylor", "ablation", "random"):
                self._subject.scores(strategy, 0)
            self._subject.maps([(0, 1)])
            return done

    watcher.__class__ = Busy
    _, _, found = fit(tmp_path / "watched", [watcher], module=Llama, max_epochs=1)
    assert differences(plain, found) == []
    assert len(rows(watcher)) == 8


def test_a_cycle_that_costs_too_much_is_undone(tmp_path):
    """Weights, optimizer state and gates are as the cycle began; the next one goes on from there."""
    seen = {}

    class Watching(HeadPlasticity):
        def on_train_batch_end(self, trainer, pl_module, *args):
            super().on_train_batch_end(trainer, pl_module, *args)
            copy = CycleCopy.take(pl_module, trainer.optimizers, step=0)
            seen[trainer.global_step] = (copy.parts, copy.small, HeadGates.of(pl_module.model).closed)

    schedule = PruningSchedule(warmup_steps=2, steps_per_cycle=5, ramp_steps=2, cuts=2, regrow_at=4)
    # Random tokens: training makes the loss of the probe worse.
    callback = Watching("random", pruning_level=0.5, cycles=2, schedule=schedule, scoring=PROBE,
                        recovery=Recovery(tolerance=0.0))  # fmt: skip
    fit(tmp_path, [callback])
    for first, last in ((2, 7), (2, 12)):
        for kind, parts in seen[first][0].items():
            assert all(torch.equal(value, seen[last][0][kind][name]) for name, value in parts.items()), kind
        assert seen[first][1].keys() == seen[last][1].keys()
        assert all(torch.equal(seen[first][1][name]["step"], seen[last][1][name]["step"]) for name in seen[first][1])
        assert seen[last][2] == ()
        moved = (seen[step][0]["values"]["model.transformer.wte.weight"] for step in (last - 1, last))
        assert not torch.equal(*moved)
    finishes = [event for row in rows(callback) for event in row["result"]["events"] if event["kind"] == "finish"]
    assert [event["verdict"] for event in finishes] == ["roll_back", "roll_back"]
    assert all(event["loss_after"] == event["loss_before"] for event in finishes)
    assert all(event["loss"] > event["loss_before"] for event in finishes)


def test_stop_keeps_what_is_closed_and_cuts_no_more(tmp_path):
    schedule = PruningSchedule(warmup_steps=2, steps_per_cycle=5, shape="one_shot", regrow_at=4)
    recovery = Recovery(tolerance=0.0, when_exceeded="stop")
    callback = plasticity(cycles=2, schedule=schedule, recovery=recovery)
    fit(tmp_path, [callback])
    assert [kind for _, kind, _ in events(callback)] == ["begin", "cut", "regrow", "finish"]
    assert rows(callback)[-1]["result"]["phase"] == "done"
    assert rows(callback)[-1]["metrics"]["active_heads"] == 3


CONFIGURATIONS = {
    "golden, rolled back": {"cycles": 2, "recovery": Recovery(tolerance=0.0, multiplier_decay_steps=6)},
    "noise, groups": {
        "strategy": "taylor",
        "cycles": 2,
        "regrowth": Regrowth(initialisation="noise", choice="random", moments="keep"),
        "scoring": Scoring(n_samples=3, unit="group"),
    },
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    cache = {}

    def run(name):
        if name not in cache:
            folder = tmp_path_factory.mktemp("whole")
            watchers = resumable(folder, name)
            trace = fit(folder, watchers, module=Llama, data=TokenData(4), max_epochs=10, enable_checkpointing=True)[2]
            cache[name] = trace, results(watchers[1])
        return cache[name]

    return run


# One configuration resumed early into the same folder, one late into a new one.
QUICK = {("noise, groups", 2), ("golden, rolled back", 12)}


def resumable(folder, name):
    saver = ModelCheckpoint(folder / "ckpt", filename="{step}", every_n_epochs=1, save_top_k=-1)
    return [ExactResume(), plasticity(**CONFIGURATIONS[name]), saver]


def results(callback) -> list[dict]:
    return [{**row, "cost": None} for row in rows(callback)]


@RESUMING
@pytest.mark.parametrize(
    ("name", "step"),
    [
        pytest.param(name, step, marks=() if (name, step) in QUICK else pytest.mark.slow)
        for name in CONFIGURATIONS
        for step in (2, 4, 6, 8, 10, 12, 14, 18)
    ],
)
def test_resumed_in_any_phase_equals_uninterrupted(uninterrupted, tmp_path, name, step):
    """Warm-up (2), along the ramp (4, 6), recovery (8), regrown (10), the second ramp (12, 14), regrown again (18)."""
    expected, expected_rows = uninterrupted(name)
    options = {"module": Llama, "data": TokenData(4), "max_epochs": 10, "enable_checkpointing": True}
    # Killed one step after the checkpoint, perhaps with something done that the checkpoint does not know.
    fit(tmp_path / "first", resumable(tmp_path, name), max_steps=step + 1, **options)
    again = resumable(tmp_path, name)
    folder = tmp_path / ("first" if step % 4 else "second")
    _, _, found = fit(folder, again, ckpt_path=tmp_path / "ckpt" / f"step={step}.ckpt", **options)
    assert found.pop("losses") == expected["losses"][step:]
    assert differences({key: value for key, value in expected.items() if key != "losses"}, found) == []
    assert results(again[1]) == expected_rows


@RESUMING
def test_files_for_rolling_back_go_with_their_checkpoints(tmp_path):
    saver = ModelCheckpoint(tmp_path / "ckpt", filename="{step}", every_n_train_steps=1, save_top_k=1, monitor="step")
    callback = plasticity(**CONFIGURATIONS["golden, rolled back"])
    fit(tmp_path, [callback, saver], module=Llama, data=TokenData(40), max_epochs=1, enable_checkpointing=True)
    assert {path.name for path in callback.folder.glob("cycle-values-*")} <= {
        "cycle-values-step=00000003.safetensors",
        "cycle-values-step=00000011.safetensors",
    }
    state = torch.load(next((tmp_path / "ckpt").glob("*.ckpt")), weights_only=True)["callbacks"]
    assert set(state) >= {"HeadPlasticity[head_plasticity]"}


@RESUMING
def test_validation_of_a_checkpoint_closes_its_heads(tmp_path):
    callback, saver = plasticity(), ModelCheckpoint(tmp_path / "ckpt", filename="{step}", every_n_epochs=1)
    _, module, _ = fit(tmp_path, [callback, saver], module=Llama, enable_checkpointing=True, max_epochs=1)
    closed = HeadGates.of(module.model).closed
    import lightning.pytorch as L

    alone, again = Llama(), plasticity()
    trainer = L.Trainer(accelerator="cpu", logger=False, callbacks=[again], enable_progress_bar=False,
                        default_root_dir=tmp_path, enable_checkpointing=False)  # fmt: skip
    trainer.validate(alone, TokenData(), ckpt_path=tmp_path / "ckpt" / "step=8.ckpt", verbose=False)
    assert closed
    assert HeadGates.of(alone.model).closed == closed


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
def test_the_multiplier_is_a_group_with_a_higher_rate(optimizer):
    """Against parameter groups of their own; weights of closed heads stay to the last bit."""
    # Where a gradient is 0 but for rounding (key biases) a tiny eps would make rounding the update.
    options = {"weight_decay": 0.1, **({"momentum": 0.9} if optimizer is torch.optim.SGD else {"eps": 1e-4})}
    ours, theirs = build("gpt2"), build("gpt2")
    for model in (ours, theirs):
        HeadGates(model).disable([(1, 0)])
        model.double().eval()  # both see the same without dropout
    trained = optimizer(ours.parameters(), lr=1e-2, **options)
    attention = {id(p) for p in theirs.transformer.h[1].attn.parameters()}
    groups = [
        {"params": [p for p in theirs.parameters() if id(p) not in attention]},
        {"params": [p for p in theirs.parameters() if id(p) in attention], "lr": 2.5e-2},
    ]
    reference = optimizer(groups, lr=1e-2, **options)
    rate = AttentionRate(ours, HeadGates.of(ours).architecture, [trained])
    rate.multiply({0: 1.0, 1: 2.5})
    before = ours.transformer.h[1].attn.c_proj.weight.detach().clone()
    with HeadFreeze(ours, trained), HeadFreeze(theirs, reference):
        for step in range(5):
            for model, each in ((ours, trained), (theirs, reference)):
                each.zero_grad()
                model(**token_batch(seed=step)).loss.backward()
                each.step()
    for (name, mine), wanted in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        # Rounding of 1e-16, which the adaptive ones divide by eps.
        assert torch.allclose(mine, wanted, rtol=1e-11, atol=1e-11), name
    after = ours.transformer.h[1].attn.c_proj.weight
    assert torch.equal(after[:8], before[:8])
    assert not torch.equal(after[8:], before[8:])
    assert len(trained.param_groups) == 1
    rate.remove()
    assert not trained._optimizer_step_pre_hooks


def test_bfloat16_updates_are_scaled_too():
    layer = build("gpt2").bfloat16()
    architecture = HeadGates(layer).architecture
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.25)
    rate = AttentionRate(layer, architecture, [optimizer])
    rate.multiply({0: 3.0})
    weight = layer.transformer.h[0].attn.c_proj.weight
    before = weight.detach().clone()
    weight.grad = torch.full_like(weight, 2.0)
    optimizer.step()
    # The optimizer's own rounding (half a unit in the last place of 0.5) counts three times, that of 1.5 once.
    assert torch.allclose(weight.float(), before.float() - 1.5, rtol=0.0, atol=3 * 2**-9 + 2**-8)


def test_logs_scalars_figures_and_the_course_of_the_loss(tmp_path):
    callback = plasticity(recovery=Recovery(measure_every_n_steps=1, within=10.0), log_scalars="all")
    logger = TensorBoardLogger(tmp_path, name=None, version="run")
    fit(tmp_path, [callback], module=Llama, max_epochs=2, logger=logger)
    logged = EventAccumulator(str(tmp_path / "run"), size_guidance={"scalars": 0, "images": 0}).Reload()
    tags = set(logged.Tags()["scalars"])
    for name in ("loss", "perplexity", "active_heads", "learning_rate_multiplier", "cut/loss_before",
                 "cut/loss_after", "regrow/loss_after", "finish/loss", "recovery_steps"):  # fmt: skip
        assert f"goldy/head_plasticity/{name}" in tags
    multiplier = {each.step: each.value for each in logged.Scalars("goldy/head_plasticity/learning_rate_multiplier")}
    # Decays over the two steps from the last cut to the regrowth.
    assert (multiplier[7], multiplier[8], multiplier[9]) == (3.0, 2.0, 1.0)
    images = set(logged.Tags()["images"])
    for name in ("timeline", "loss", "scores", "attention"):
        assert f"goldy/head_plasticity/figure/{name}" in images
    written = rows(callback)
    assert set(chart_plasticity_loss(written).data["points_0"]["x"]) == {*range(3, 12), 16}
    assert written[0]["result"]["timeline"][0] == {"step": 0, "closed": []}
    # Each row tells what came since the one before.
    told = [step for row in written for step in dict.fromkeys(row["result"]["curve"]["steps"])]
    assert told == sorted(set(told))
    assert [entry["step"] for row in written for entry in row["result"]["timeline"]] == [0, 4, 5, 6, 7, 9]
    shown = written[-1]["result"]["attention"]
    assert set(shown["maps"]) == {"before", "cut", "recovered"}
    assert all(len(maps) == len(shown["heads"]) for maps in shown["maps"].values())
    rows_of_attention = torch.tensor(shown["maps"]["before"]).sum(dim=-1)
    assert torch.allclose(rows_of_attention, torch.ones_like(rows_of_attention), atol=0.02)
    assert rows(callback)[-1]["metrics"]["recovery_steps"] == 0


def test_the_snapshots_base_is_used_where_there_is_one(tmp_path):
    fit(tmp_path, [GoldenSnapshot(at=("end",), every_n_steps=None), callback := plasticity()], module=Llama)
    assert not (callback.folder / "base.safetensors").exists()
    fit(tmp_path / "alone", [callback := plasticity()], module=Llama)
    assert (callback.folder / "base.safetensors").exists()


@pytest.mark.parametrize(
    "options",
    [{"precision": "bf16-mixed", "gradient_clip_val": 0.1}, {"accumulate_grad_batches": 2}, {"precision": "bf16-true"}],
    ids=str,
)
def test_precision_accumulation_and_clipping(tmp_path, options):
    """Every optimizer step counts once, whatever is accumulated; what happens is the plan's."""
    callback = plasticity(recovery=Recovery(tolerance=0.0))
    steps = 20 * options.get("accumulate_grad_batches", 1)
    trainer, module, _ = fit(tmp_path, [callback], module=Llama, data=TokenData(2 * steps), max_epochs=1, **options)
    assert trainer.global_step == 20
    assert [entry[:2] for entry in events(callback)] == [
        (3, "begin"), (4, "cut"), (5, "cut"), (6, "cut"), (7, "cut"), (9, "regrow"), (11, "finish"),
    ]  # fmt: skip
    (finish,) = (event for row in rows(callback) for event in row["result"]["events"] if event["kind"] == "finish")
    if finish["verdict"] == "roll_back":
        assert finish["loss_after"] == finish["loss_before"]
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())


class Adapted(Finetune):
    """Low-rank adapters of the attention."""

    def __init__(self) -> None:
        super().__init__()
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=2, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, init_lora_weights=True)
        self.model = get_peft_model(self.model, config)


def test_adapters_are_cut_and_regrown(tmp_path):
    callback = plasticity(strategy="magnitude", regrowth=Regrowth(fraction=1.0))
    _, module, _ = fit(tmp_path / "golden", [callback], module=Adapted)
    assert events(callback)[-2:] == [(9, "regrow", 0), (11, "finish", 0)]
    assert HeadGates.of(module.model).closed == ()
    callback = plasticity(strategy="magnitude", regrowth=Regrowth(initialisation="noise"))
    with pytest.raises(ValueError, match=r"gives regrown heads new weights, but .* is frozen"):
        fit(tmp_path / "noise", [callback], module=Adapted)


class Sized(Finetune):
    """A model of one's choice."""

    made: list[Finetune]

    def __init__(self, make) -> None:
        super().__init__()
        self.model = make()


def gpt2(n_head: int) -> nn.Module:
    config = GPT2Config(n_layer=2, n_head=n_head, n_embd=16, vocab_size=53, n_positions=32, bos_token_id=0)
    return GPT2LMHeadModel(config)


def multi_query() -> nn.Module:
    config = LlamaConfig(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=1, hidden_size=16,
                         intermediate_size=20, vocab_size=53)  # fmt: skip
    return LlamaForCausalLM(config)


def no_attention() -> nn.Module:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(53, 53)

        def prepare_inputs_for_generation(self):
            return None

        def forward(self, input_ids, attention_mask=None, labels=None):
            from types import SimpleNamespace

            logits = self.table(input_ids)
            return SimpleNamespace(logits=logits, loss=logits.square().mean())

    return Bag()


REFUSED = {
    "one head": (lambda: gpt2(1), {}, "every layer has a single head, which must stay open"),
    "groups of one": (multi_query, {"scoring": Scoring(4, unit="group")}, "one key/value group .*take unit='head'"),
    "too much": (lambda: gpt2(2), {"pruning_level": 0.9}, "asks for 4 of 4 heads in 2 layers, but 2 can be cut"),
    "too little": (lambda: gpt2(2), {"pruning_level": 0.05}, "rounds to no head; the least is 0.25"),
    "least": (lambda: gpt2(4), {"min_heads_per_layer": 4}, "but 0 can be cut while min_heads_per_layer=4"),
    "no attention": (no_attention, {}, "cannot describe Bag.*there is no list of blocks"),
    "too short": (
        lambda: gpt2(2),
        {"schedule": PruningSchedule(warmup_steps=8)},
        "leave 0 for each of 1 cycles; a cycle needs at least 2",
    ),
    "late": (
        lambda: gpt2(2),
        {"schedule": PruningSchedule(ramp_steps=4, regrow_at=3)},
        "wanted ramp_steps < regrow_at <= steps_per_cycle",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_before_the_first_step(tmp_path, case):
    make, options, message = REFUSED[case]
    made = []

    def module():
        made.append(Sized(make))
        return made[-1]

    with pytest.raises(ValueError, match=message):
        fit(tmp_path, [plasticity(**{"pruning_level": 0.25, **options})], module=module, max_epochs=1)
    assert made[0].losses == []


def test_single_heads_of_one_group_can_be_cut(tmp_path):
    callback = plasticity(pruning_level=0.25)
    fit(tmp_path, [callback], module=lambda: Sized(multi_query))
    assert [closed for _, kind, closed in events(callback) if kind == "cut"] == [1, 2]


@RESUMING
def test_another_number_of_heads_or_other_settings_are_refused_on_resume(tmp_path):
    """Four heads of 4 have the weights' shapes of two heads of 8, so that nothing else would notice."""

    def run(name, heads, **options):
        saver = ModelCheckpoint(tmp_path / "ckpt", filename="{step}", every_n_epochs=1, save_top_k=-1)
        made = Sized(lambda: gpt2(heads))
        return made, lambda **more: fit(
            tmp_path / name, [plasticity(**options), saver], module=lambda: made, enable_checkpointing=True, **more
        )

    _, first = run("first", 2)
    first(max_epochs=1)
    checkpoint = tmp_path / "ckpt" / "step=8.ckpt"
    module, again = run("second", 4)
    with pytest.raises(HeadError, match="the saved gates are of 2 layers of 2 heads, the model has 2 layers of 4"):
        again(ckpt_path=checkpoint)
    assert module.losses == []
    module, again = run("third", 2, recovery=Recovery(tolerance=0.5))
    with pytest.raises(ValueError, match=r"recovery.tolerance=0.5, but the resumed run began with None"):
        again(ckpt_path=checkpoint)
    assert module.losses == []
    for path in (tmp_path / "first").rglob("base.safetensors"):
        path.unlink()
    _, again = run("fourth", 2)
    with pytest.raises(FileNotFoundError, match="which the resumed run needs, is gone"):
        again(ckpt_path=checkpoint)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pruning_level": 1.0}, "above 0 and below 1; got 1.0"),
        ({"pruning_level": 0.0}, "above 0 and below 1; got 0.0"),
        ({"strategy": "entropi"}, "entropi.*entropy"),
        ({"cycles": 0}, "cycles must be at least 1; got 0"),
        ({"min_heads_per_layer": 0}, "min_heads_per_layer must be at least 1; got 0"),
        ({"strategy": "taylor", "scoring": Scoring(weights={"entropy": 1.0})}, "weights belong to the strategy"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        plasticity(**arguments)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Scoring(unit="layer"), "unknown unit 'layer'"),
        (lambda: PruningSchedule(warmup_steps=1.5), r"warmup_steps is an int of optimizer steps or a float.*got 1.5"),
        (lambda: PruningSchedule(steps_per_cycle=0), "steps_per_cycle must be at least 1; got 0"),
        (lambda: PruningSchedule().resolved(float("inf"), 1), "no last step to take fractions of"),
        (lambda: Regrowth(fraction=2.0), r"in \[0, 1\]; got 2.0"),
        (lambda: Regrowth(initialisation="gold"), "unknown initialisation 'gold'.*golden"),
        (lambda: Regrowth(noise_scale=-1.0), "noise_scale must be finite and not negative; got -1.0"),
        (lambda: Recovery(learning_rate_multiplier=0.0), "must be positive and finite; got 0.0"),
        (lambda: Recovery(multiplier_decay_steps=0), "multiplier_decay_steps must be at least 1; got 0"),
    ],
)
def test_bad_groups_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_missing_file_of_the_cycle_is_an_error(tmp_path):
    layer = nn.Linear(2, 1)
    copy = CycleCopy.take(layer, [torch.optim.AdamW(layer.parameters())], step=3)
    saved = copy.save(tmp_path, layer, write=True)
    CycleCopy.load(tmp_path, layer, saved)
    (tmp_path / saved["files"]["values"]).unlink()
    with pytest.raises(StoreError, match="no such file"):
        CycleCopy.load(tmp_path, layer, saved)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_decide_alike(tmp_path, strategy):
    """Both ranks cut and regrow the same heads, the first ones those of one process, and a resume goes on likewise."""
    root = Path(__file__).parents[2]
    script = ["-m", "tests.callbacks.two_processes_plasticity", strategy, str(tmp_path)]
    command = [sys.executable, "-W", "ignore", *script]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert first["world_size"] == 2
    assert first["first_cut"] == first["first_cut_of_one_process"]
    assert first["verdicts"][0] == "roll_back"
    assert first["resumed"] == {"differences": [], "same_rows": True, "same_closed": True}
