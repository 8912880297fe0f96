from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
import time

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from lightning_goldy import GoldyModule
from lightning_goldy.analysis import apply_change, change_attribution, save_change
from lightning_goldy.analysis.attention.patterns import attention_maps
from lightning_goldy.analysis.attention.statistics import Prompt, attention_statistics, track_attention
from lightning_goldy.analysis.attribution import GraftCurve, GraftPoint, graft
from lightning_goldy.analysis.continuations import continue_prompts
from lightning_goldy.cli import main
from lightning_goldy.commands.checkpoints import find_base, follow_frozen, read_saved
from lightning_goldy.commands.graft import BEST, Wanted, _fraction, _unadapted, _untie, graft_checkpoint
from lightning_goldy.core import CausalLMObjective
from lightning_goldy.core.files import percentage
from lightning_goldy.core.mask import ParameterMask
from lightning_goldy.core.store import StoreError
from lightning_goldy.data import AtlasDataModule
from lightning_goldy.data.tokenization import byte_tokenizer
from lightning_goldy.report.formatting import format_seconds
from lightning_goldy.training.models import build_model, complete_config, write_pretrained

TINY = {"model_type": "gpt2", "n_layer": 2, "n_embd": 8, "n_head": 2, "n_positions": 64}
DATA = {"edits": 5, "batch_size": 8, "probe_size": 8}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finetune of a few steps as a folder of ``save_pretrained``, beside the base and a configuration."""
    folder = tmp_path_factory.mktemp("graft")
    torch.manual_seed(0)
    data = AtlasDataModule(**DATA)
    model = build_model(complete_config(TINY, data.tokenizer))
    write_pretrained(model, folder / "base", tokenizer=data.tokenizer)
    data.setup("fit")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for batch in list(data.train_dataloader())[:12]:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    write_pretrained(model, folder / "finetune", tokenizer=data.tokenizer)
    config = {
        "seed_everything": 0,
        "model": {"class_path": "lightning_goldy.GoldyModule", "init_args": {"model": str(folder / "base")}},
        "data": {"class_path": "lightning_goldy.data.AtlasDataModule", "init_args": DATA},
        "trainer": {"accelerator": "cpu"},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder


def run(trained, *options: str, output: str) -> int:
    words = ["graft", str(trained / "finetune"), "--config", str(trained / "run.yaml"), "--n-samples", "8"]
    return main([*words, "--base", str(trained / "base"), "--output", str(trained / output), *options])


def weights(folder) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_the_table_of_grafts_breaks_no_word_at_60_columns(trained, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    start = time.perf_counter()
    assert run(trained, "--recover", "0.3", "--method", "attribution", output="narrower") == 0
    took = time.perf_counter() - start
    told = capsys.readouterr().out
    lines = [line for line in told.splitlines() if line.startswith(("┃", "│"))]
    assert max(map(len, lines)) <= 60
    cells = [[cell.strip() for cell in line.strip("┃│").replace("┃", "│").split("│")] for line in lines]
    assert cells[0] == ["method", "elements", "times", "recovered", "harm"]
    # Every other line has the interval alone.
    for numbers, interval in zip(cells[1::2], cells[2::2], strict=True):
        assert numbers[0].split()[0] in BEST
        assert math.isfinite(float(numbers[3]))
        assert interval[:3] == ["", "", ""]
        assert interval[3].startswith("[")
        assert interval[3].endswith("]")
    # The time of all of it stands in the row and on the page.
    row = json.loads((trained / "narrower/goldy/change_attribution/results.jsonl").read_text())
    assert 0 < row["cost"]["seconds"] <= took
    assert format_seconds(row["cost"]["seconds"]) in (trained / "narrower" / "report.html").read_text()
    # What stands beside the graft on its card has intervals, too, and of random elements all draws.
    card = (trained / "narrower" / "model" / "README.md").read_text()
    share = r"-?[\d.]+ %"
    beside = rf"; as many random ones {share} \[{share}, {share}\] \({share} to {share} over 5 draws\)"
    assert re.search(rf"{beside}; those that changed most {share} \[{share}, {share}\]", card) or re.search(
        rf"; those that changed most {share} \[{share}, {share}\]{beside}", card
    )


def test_the_table_of_grafts_fits_80_columns(trained, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert run(trained, "--recover", "0.8", output="narrow") == 0
    told = capsys.readouterr().out
    lines = [line for line in told.splitlines() if line.startswith(("┃", "│"))]
    assert max(map(len, lines)) <= 80
    cells = [[cell.strip() for cell in line.strip("┃│").replace("┃", "│").split("│")] for line in lines]
    assert cells[0] == ["method", "elements", "times", "recovered", "harm"]
    assert all(
        row[0].split()[0] in (*BEST, "gradient") and row[1].endswith(" %") and "[" in row[3] for row in cells[1:]
    )
    assert any("+" in row[0].split() for row in cells[1:])
    assert sum("*" in row[0].split() for row in cells[1:]) == 1


@pytest.mark.parametrize(("value", "told"), [(0.8124, "0.812"), (-1.5, "-1.500"), (-1234.5, "-1.23e+03")])
def test_parts_of_the_effect_are_short_wherever_they_lie(value, told):
    assert _fraction(value) == told


def test_a_share_of_the_elements_is_written_as_a_model_and_as_a_sparse_change(trained, capsys):
    assert run(trained, "--keep", "0.1", output="model") == 0
    told = capsys.readouterr().out
    assert "Grafts on held-out samples" in told
    base, now, made = (weights(trained / name) for name in ("base", "finetune", "model/model"))
    moved = {name: (made[name] != base[name]) for name in base}
    kept = sum(int(flags.sum()) for name, flags in moved.items() if name != "lm_head.weight")
    numel = sum(value.numel() for name, value in base.items() if name != "lm_head.weight")
    assert kept == pytest.approx(0.1 * numel, rel=0.02)
    assert all(torch.equal(made[name][flags], now[name][flags]) for name, flags in moved.items())
    card = (trained / "model" / "model" / "README.md").read_text()
    summary = json.loads((trained / "model" / "summary.json").read_text())
    assert f"recovers: {percentage(summary['taken']['recovered'], 1)}" in card
    assert "nats of loss" in card
    assert summary["taken"]["share"] == 0.1
    assert (trained / "model" / "report.html").is_file()

    assert run(trained, "--keep", "0.1", "--sparse", output="sparse") == 0
    again = AutoModelForCausalLM.from_pretrained(trained / "base")
    apply_change(again, trained / "sparse" / "change.safetensors")
    assert all(torch.equal(value, made[name]) for name, value in again.state_dict().items())


def test_the_effect_wanted_is_recovered_with_the_least_harm(trained, capsys):
    assert run(trained, "--recover", "0.5", "--method", "interpolation", output="half") == 0
    summary = json.loads((trained / "half" / "summary.json").read_text())
    taken, reported = summary["taken"], summary["reported"]
    assert taken["method"] == "interpolation"
    assert taken["recovered"] >= 0.5
    # Of eight samples four score, two choose, and two tell.
    assert (reported["method"], reported["factor"]) == ("interpolation", taken["factor"])
    assert reported["recovered"] != taken["recovered"]
    assert summary["on"] == "2 samples that neither scored nor chose it"
    card = (trained / "half" / "model" / "README.md").read_text()
    assert f"recovers: {percentage(reported['recovered'], 1)}" in card
    assert "- measured on: samples that neither scored nor chose it\n" in card
    weak = "only 2 held-out samples, and below 6 not even their whole range is a 95 % interval"
    assert f"- WEAK: {weak}\n" in card
    assert summary["weak"] == [weak]
    chosen = percentage(taken["recovered"], 1)
    assert f"at least 50.0 % of the effect; where it was chosen it recovered {chosen}" in card
    told = capsys.readouterr().out
    assert f"on samples that neither scored nor chose it; WEAK: {weak}" in " ".join(told.split())
    page = (trained / "half" / "report.html").read_text()
    assert "WEAK: only 2 held-out samples" in page
    assert (trained / "half" / "config.yaml").is_file()
    base, now, made = (weights(trained / name) for name in ("base", "finetune", "half/model"))
    name = "transformer.h.0.mlp.c_fc.weight"
    torch.testing.assert_close(made[name], base[name] + taken["factor"] * (now[name] - base[name]))
    assert run(trained, "--recover", "0.99999", "--method", "interpolation", output="none") != 0
    assert "no graft tried recovers" in capsys.readouterr().err


def test_a_learned_mask_is_grafted_and_written_for_masked_training(trained, capsys):
    assert run(trained, "--keep", "0.2", "--method", "learned", output="learned") == 0
    taken = json.loads((trained / "learned" / "summary.json").read_text())["taken"]
    assert taken["method"] == "learned"
    mask = ParameterMask.load(trained / "learned" / "mask.safetensors")
    assert mask.density == pytest.approx(0.2, rel=1e-3)
    base, now, made = (weights(trained / name) for name in ("base", "finetune", "learned/model"))
    for name, flags in mask.items():
        assert torch.equal(made[name], torch.where(flags, now[name], base[name]))
    assert "those of a mask that was learned" in (trained / "learned" / "model" / "README.md").read_text()


def test_adapters_are_grafted_as_the_weights_that_they_come_to(trained, tmp_path, capsys):
    peft = pytest.importorskip("peft")
    config = yaml.safe_load((trained / "run.yaml").read_text())
    config["model"]["init_args"]["lora"] = {"rank": 2, "target_modules": ["c_attn", "c_fc"]}
    config["trainer"] |= {"max_epochs": 1, "limit_train_batches": 4, "logger": False, "enable_progress_bar": False}
    config["trainer"]["default_root_dir"] = str(tmp_path / "run")
    (tmp_path / "lora.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", str(tmp_path / "lora.yaml"), "--model.optimizer.learning_rate", "1e-2"]) == 0
    (checkpoint,) = tmp_path.glob("run/**/*.ckpt")
    words = ["graft", str(checkpoint), "--config", str(tmp_path / "lora.yaml"), "--n-samples", "8", "--keep", "0.1"]
    assert main([*words, "--output", str(tmp_path / "out")]) == 0
    made, base = weights(tmp_path / "out" / "model"), weights(trained / "base")
    adapter = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(trained / "base"), checkpoint.with_suffix("")
    )
    merged = adapter.merge_and_unload().state_dict()
    mask = ParameterMask.load(tmp_path / "out" / "mask.safetensors")
    assert "transformer.h.0.attn.c_attn.weight" in mask.space
    for name, value in made.items():
        if name in mask.space:
            torch.testing.assert_close(value, torch.where(mask[name], merged[name], base[name]))
        else:
            assert torch.equal(value, base[name])
    # The plain model below the adapters is a base that can be given.
    assert main([*words, "--base", str(trained / "base"), "--output", str(tmp_path / "given")]) == 0
    again = weights(tmp_path / "given" / "model")
    assert all(torch.equal(value, again[name]) for name, value in made.items())
    capsys.readouterr()
    words = [*words, "--base", str(trained / "base"), "--output", str(tmp_path / "refused"), "--space", "adapters"]
    assert main(words) == 2
    assert "has no adapters" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
def test_adapters_of_a_tied_embedding_leave_the_written_model_untied(tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    tied = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, n_positions=16, vocab_size=11, eos_token_id=0))
    model = peft.get_peft_model(tied.eval(), peft.LoraConfig(r=2, target_modules=["wte"])).eval()
    base, ids = copy.deepcopy(model), torch.arange(8)[None] % 11
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += parameter.requires_grad * torch.randn(parameter.shape)
    found = change_attribution(model, base, [{"input_ids": ids}], nodes=1, shares=[1.0])
    shell, state = _unadapted(model), graft(model, base, found.mask(1.0))
    _untie(shell, state)
    again = AutoModelForCausalLM.from_pretrained(write_pretrained(shell, tmp_path / "model", state=state)).eval()
    assert not again.config.tie_word_embeddings
    torch.testing.assert_close(again(input_ids=ids).logits, model(input_ids=ids).logits)
    # The sparse change belongs on a base that is untied, and says so to one that is not.
    whole = copy.deepcopy(base).merge_and_unload()
    before = {name: value.clone() for name, value in whole.state_dict().items()}
    path = save_change(tmp_path / "change.safetensors", model, base, found.mask(1.0))
    whole.lm_head.weight = whole.transformer.wte.weight
    told = "moves 'transformer.wte.weight' and leaves 'lm_head.weight' as it was, .* this GPT2LMHeadModel ties the two"
    with pytest.raises(StoreError, match=told):
        apply_change(whole, path)
    assert all(torch.equal(value, before[name]) for name, value in whole.state_dict().items())
    whole.lm_head.weight = torch.nn.Parameter(whole.transformer.wte.weight.detach().clone())
    apply_change(whole, path)
    torch.testing.assert_close(whole(input_ids=ids).logits, model(input_ids=ids).logits)
    plain = GPT2LMHeadModel(tied.config)
    _untie(plain, plain.state_dict())
    assert plain.lm_head.weight is plain.transformer.wte.weight


def test_what_is_wanted_is_one_thing_and_in_range():
    for options, message in (
        ({}, "give one of keep, recover and harm; got none of them"),
        ({"keep": 0.1, "harm": 0.0}, r"got keep=0.1, harm=0"),
        ({"harm": float("nan")}, "harm must be a finite number of nats; got nan"),
        ({"recover": 2.0}, r"recover must lie in \(0, 1\]; got 2"),
        ({"recover": 0.5, "method": "interpolation", "sparse": True}, "cannot be written sparse"),
        ({"keep": 0.5, "method": "interpolation"}, "choose by recover or harm"),
        ({"keep": 0.5, "method": "drop_and_rescale", "sparse": True}, "drop_and_rescale changes the values"),
    ):
        with pytest.raises(ValueError, match=message):
            Wanted(**options)
    with pytest.raises(ValueError, match="n_collateral must be at least 1; got 0"):
        graft_checkpoint("unread", [], Wanted(keep=0.1), n_collateral=0)


def test_a_share_below_one_element_is_refused(trained, capsys):
    assert run(trained, "--keep", "1e-9", output="speck") != 0
    assert "keep=1e-09 is less than one of the" in capsys.readouterr().err


def test_what_changed_most_is_grafted_where_that_serves_best(trained, capsys):
    assert run(trained, "--keep", "0.2", "--method", "magnitude", "--sparse", output="largest") == 0
    base, now = weights(trained / "base"), weights(trained / "finetune")
    mask = ParameterMask.load(trained / "largest" / "mask.safetensors")
    sizes = {name: (now[name] - base[name]).abs() for name in mask.space}
    inside = torch.cat([sizes[name][flags] for name, flags in mask.items()])
    outside = torch.cat([sizes[name][~flags] for name, flags in mask.items()])
    assert inside.min() >= outside.max()
    assert "those that changed most" in (trained / "largest" / "README.md").read_text()
    assert run(trained, "--recover", "0.4", "--sparse", output="gentlest") == 0
    summary = json.loads((trained / "gentlest" / "summary.json").read_text())
    fitting = [
        point
        for point in summary["points"]
        if point["method"] in ("attribution", "gradient", "magnitude", "random") and point["recovered"] >= 0.4
    ]
    assert summary["taken"]["harm"] == min(point["harm"] for point in fitting)
    taken, reported = summary["taken"], summary["reported"]
    assert (reported["method"], reported["share"]) == (taken["method"], taken["share"])


@pytest.mark.parametrize("sparse", [(), ("--sparse",)])
def test_elements_by_the_gradient_at_the_base_are_grafted(trained, capsys, sparse):
    folder = trained / f"gradient{len(sparse)}"
    assert run(trained, "--recover", "0.1", "--method", "gradient", *sparse, output=folder.name) == 0
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["taken"]["method"] == summary["reported"]["method"] == "gradient"
    base, now = weights(trained / "base"), weights(trained / "finetune")
    mask = ParameterMask.load(folder / "mask.safetensors")
    assert mask.density == pytest.approx(summary["taken"]["share"], rel=0.02)
    if sparse:
        model = AutoModelForCausalLM.from_pretrained(trained / "base")
        apply_change(model, folder / "change.safetensors")
        made, card = model.state_dict(), folder / "README.md"
    else:
        made, card = weights(folder / "model"), folder / "model" / "README.md"
    for name, flags in mask.items():
        assert torch.equal(made[name], torch.where(flags, now[name], base[name]))
    assert "those that carry it by their gradient at the base" in card.read_text()
    # The choice of that method alone is the best of it that serves.
    fitting = [p["harm"] for p in summary["points"] if p["method"] == "gradient" and p["recovered"] >= 0.1]
    assert summary["taken"]["harm"] == min(fitting)


def test_best_takes_the_gradient_where_no_other_harms_less():
    def point(method, recovered, harm):
        return vars(GraftPoint(method, 0.1, 1.0, 1.0, recovered, 0.0, 1.0, harm))

    others = [point(method, 0.5, 0.2) for method in BEST if method not in ("gradient", "finetune")]
    points = (*others, point("gradient", 0.6, 0.1), point("finetune", 1.0, 0.5))
    curve = GraftCurve(points, "loss", "elements", 2.0, 1.0, 3.0, 8, 8)
    assert Wanted(recover=0.4).of(curve).method == Wanted(harm=0.3, sparse=True).of(curve).method == "gradient"


def test_the_card_tells_the_harm_where_a_graft_was_chosen_and_a_rough_interval(trained, capsys):
    assert run(trained, "--harm", "9", output="allowed") == 0
    summary = json.loads((trained / "allowed" / "summary.json").read_text())
    card = (trained / "allowed" / "model" / "README.md").read_text()
    assert f", its harm {summary['taken']['harm']:+.4g} nats\n" in card
    point = GraftPoint("attribution", 0.1, 1.0, 1.0, 0.7, 0.4, 1.9, 0.1)
    curve = GraftCurve((), "loss", "elements", 2.0, 1.0, 3.0, 12, 8)
    assert curve.roughness(point) == "12 held-out samples tell the effect too roughly"
    assert curve.roughness(dataclasses.replace(point, high=0.8)) == ""


def test_with_one_sample_held_out_the_card_says_that_it_chose(trained, capsys):
    words = ["--n-samples", "2", "--harm", "9", "--method", "interpolation"]
    assert run(trained, *words, output="few") == 0
    card = (trained / "few" / "model" / "README.md").read_text()
    assert "- measured on: the samples that chose it, which flatters: there are too few to hold some out\n" in card
    assert "asked for: a harm of at most 9 nats" in card
    assert run(trained, "--n-samples", "2", "--keep", "0.2", output="given") == 0
    assert "none chose it, for its share was given" in (trained / "given" / "model" / "README.md").read_text()


@pytest.mark.parametrize("command", ["graft", "analyze"])
def test_what_is_refused_leaves_no_folder_behind(trained, capsys, tmp_path, command):
    words = [command, str(trained / "finetune"), "--config", str(trained / "run.yaml"), "--output", str(tmp_path / "a")]
    words += ["--keep", "0.1"] if command == "graft" else []
    other = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, n_positions=64, vocab_size=11))
    write_pretrained(other, tmp_path / "other")
    for base, told in ((tmp_path / "none", "no base at"), (tmp_path / "other", "other")):
        assert main([*words, "--base", str(base)]) != 0
        assert told in capsys.readouterr().err
        assert not (tmp_path / "a").exists()
    (tmp_path / "a").write_text("")
    assert main([*words, "--base", str(trained / "base")]) != 0
    assert "is a file; give a folder" in capsys.readouterr().err


def test_a_wish_that_no_graft_grants_leaves_no_folder_behind(trained, capsys):
    assert run(trained, "--recover", "1", "--method", "random", output="wish") != 0
    assert "no graft tried recovers" in capsys.readouterr().err
    assert not (trained / "wish").exists()


def test_frozen_parameters_that_differ_in_the_base_given_are_told(trained):
    module = GoldyModule(str(trained / "finetune"))
    module.model.transformer.wte.requires_grad_(False)
    module.model.transformer.ln_f.requires_grad_(False)
    saved = read_saved(trained / "finetune")
    found = find_base(trained / "base", saved, module, module.model, CausalLMObjective())
    saved.load_into(module, module.model)
    (told,) = follow_frozen(saved, found, module.model, "merged", "goldy graft")
    assert told.startswith(
        f"{trained / 'base'}: the base differs from GPT2LMHeadModel in 'transformer.wte.weight' and 2 "
    )
    assert "\n" not in told
    own = find_base(trained / "finetune", saved, module, module.model, CausalLMObjective())
    assert follow_frozen(saved, own, module.model, "merged", "goldy graft") == []


@pytest.mark.filterwarnings("ignore:the base differs from PeftModel", "ignore:.*the base differs from PeftModel")
def test_a_folder_of_adapters_leaves_what_they_lie_on_where_the_base_has_it_otherwise(trained, tmp_path, capsys):
    pytest.importorskip("peft")
    config = yaml.safe_load((trained / "run.yaml").read_text())
    config["model"]["init_args"]["lora"] = {"rank": 2, "target_modules": ["c_attn"]}
    (tmp_path / "lora.yaml").write_text(yaml.safe_dump(config))
    module = GoldyModule(str(trained / "base"), lora=config["model"]["init_args"]["lora"])
    with torch.no_grad():
        for parameter in module.model.parameters():
            parameter.add_(0.1 * parameter.requires_grad)
    module.model.save_pretrained(tmp_path / "adapters")
    words = ["graft", str(tmp_path / "adapters"), "--config", str(tmp_path / "lora.yaml"), "--n-samples", "8"]
    words += ["--keep", "0.5", "--base", str(trained / "finetune"), "--output", str(tmp_path / "out")]
    assert main(words) == 0, capsys.readouterr().err
    words = ["analyze", *words[1:4], "--n-samples", "4", "--base", str(trained / "finetune")]
    assert main([*words, "--output", str(tmp_path / "analyzed")]) == 0, capsys.readouterr().err
    merged = module.model.merge_and_unload().state_dict()
    mask = ParameterMask.load(tmp_path / "out" / "mask.safetensors")
    base, made = weights(trained / "finetune"), weights(tmp_path / "out" / "model")
    for name, flags in mask.items():
        torch.testing.assert_close(made[name], torch.where(flags, merged[name], base[name]))


@pytest.mark.filterwarnings("ignore:the base differs from PeftModel", "ignore:.*the base differs from PeftModel")
def test_attention_and_continuations_of_adapters_have_a_plain_base_that_differs_below_them(trained):
    pytest.importorskip("peft")
    module = GoldyModule(str(trained / "base"), lora={"rank": 2, "target_modules": ["c_attn"]})
    model, plain = module.model.eval(), AutoModelForCausalLM.from_pretrained(trained / "finetune").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * parameter.requires_grad)
        # What no adapter lies on is the present model's.
        present = {name: value.clone() for name, value in model.state_dict().items()}
        for name, value in plain.state_dict().items():
            value.copy_(value if ".c_attn." in name else present[f"base_model.model.{name}"])
    prompt, batch = Prompt.of("one", [3, 4, 5, 3], model, None, 24), {"input_ids": torch.tensor([[3, 4, 5, 3, 7]])}
    found = track_attention(model, [batch], prompts=[prompt], base=plain)
    assert torch.equal(found.prompts[0].base.patterns[1], attention_maps(plain, prompt.batch).patterns[1])
    assert not torch.equal(found.prompts[0].base.patterns[1], found.prompts[0].maps.patterns[1])
    alone = attention_statistics(model, [batch], base=GoldyModule(str(trained / "base")).model.eval())
    assert not torch.equal(found.statistics.drift, alone.drift)
    written = continue_prompts(model, byte_tokenizer(), ["2+2="], base=plain, max_new_tokens=4)
    assert written.base == continue_prompts(plain, byte_tokenizer(), ["2+2="], max_new_tokens=4).present
    assert all(torch.equal(value, present[name]) for name, value in model.state_dict().items())
    assert torch.equal(attention_maps(model, prompt.batch).patterns[1], found.prompts[0].maps.patterns[1])
