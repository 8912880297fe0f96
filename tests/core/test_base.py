from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_goldy.analysis import change_attribution
from lightning_goldy.core import ParameterSpace, ParameterVector, SpaceError, StoreError, base_of, save_vectors
from lightning_goldy.core.base import BaseParameters, frozen_apart, read_base
from tests.references.models import build


def same(first: ParameterVector, second: ParameterVector) -> bool:
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def base() -> nn.Module:
    return build("gpt2", seed=5)


@pytest.fixture
def now() -> nn.Module:
    return build("gpt2", seed=6)


# The change since the base


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_changes_tensor_by_tensor(base: nn.Module, now: nn.Module, dtype: torch.dtype) -> None:
    base, now = base.to(dtype), now.to(dtype)
    space = ParameterSpace.of(now, include=["*.mlp.*", "*wte*"])
    kept = BaseParameters(ParameterVector.of(base, space))
    before, after = (dict(module.named_parameters()) for module in (base, now))
    changes = list(kept.changes(now))
    assert [change.name for change in changes] == list(space)
    wide = torch.promote_types(dtype, torch.float32)
    for name, value, delta in changes:
        assert value.dtype == delta.dtype == wide
        assert torch.equal(value, before[name].detach().to(wide))
        assert torch.equal(delta, after[name].detach().to(wide) - before[name].detach().to(wide))
        assert not delta.requires_grad
    assert same(kept.vector(now), ParameterVector.of(base, space))


def test_the_base_is_a_copy_also_of_views(base: nn.Module) -> None:
    kept = BaseParameters(ParameterVector.of(base, clone=False))
    with torch.no_grad():
        base.transformer.wte.weight.add_(1)
    deltas = {change.name: change.delta for change in kept.changes(base)}
    assert torch.allclose(deltas.pop("transformer.wte.weight"), torch.ones(()), atol=1e-6)
    assert not any(delta.any() for delta in deltas.values())


# Where a base may be read from


def write_vector(model: nn.Module, folder: Path) -> Path:
    return save_vectors(folder / "base.safetensors", ParameterVector.of(model), kind="values", model=model)


def write_folder(model: nn.Module, folder: Path) -> Path:
    model.save_pretrained(folder / "hf")
    return folder / "hf"


def write_sharded_folder(model: nn.Module, folder: Path) -> Path:
    model.save_pretrained(folder / "hf", max_shard_size="10KB")
    assert len(list((folder / "hf").glob("*.safetensors"))) > 1
    return folder / "hf"


def write_one_file(model: nn.Module, folder: Path) -> Path:
    return write_folder(model, folder) / "model.safetensors"


def write_checkpoint(model: nn.Module, folder: Path) -> Path:
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    state["metric.total"] = torch.zeros(1)
    torch.save({"state_dict": state, "epoch": 1, "callbacks": {}}, folder / "last.ckpt")
    return folder / "last.ckpt"


def write_compiled_checkpoint(model: nn.Module, folder: Path) -> Path:
    state = {f"model._orig_mod.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": state}, folder / "last.ckpt")
    return folder / "last.ckpt"


SOURCES = [
    write_vector,
    write_folder,
    write_sharded_folder,
    write_one_file,
    write_checkpoint,
    write_compiled_checkpoint,
]


@pytest.mark.parametrize("write", SOURCES)
@pytest.mark.parametrize("include", [["*"], ["*.h.1.*"]])
def test_every_source_gives_the_values(
    base: nn.Module, now: nn.Module, tmp_path: Path, write: Callable[[nn.Module, Path], Path], include: list[str]
) -> None:
    source = write(base, tmp_path)
    space = ParameterSpace.of(now, include)
    before = ParameterVector.of(now)
    for given in (source, str(source)):
        found = read_base(given, now, space, prefix="model.")
        assert same(found, ParameterVector.of(base, space))
    assert same(ParameterVector.of(now), before)


def test_the_values_do_not_follow_a_file_that_is_overwritten(base: nn.Module, now: nn.Module, tmp_path: Path) -> None:
    source = write_checkpoint(base, tmp_path)
    found = read_base(source, now, ParameterSpace.of(now), prefix="model.")
    with source.open("r+b") as file:
        file.write(bytes(source.stat().st_size))
    assert same(found, ParameterVector.of(base))


def test_values_take_the_dtype_of_the_model(base: nn.Module, now: nn.Module, tmp_path: Path) -> None:
    now = now.bfloat16()
    for write in (write_vector, write_folder, write_checkpoint):
        found = read_base(write(base, tmp_path), now, ParameterSpace.of(now), prefix="model.")
        assert same(found, ParameterVector.of(base).to(torch.bfloat16))


# Errors


def raises(source: Path, model: nn.Module, match: str, prefix: str = "") -> None:
    with pytest.raises(StoreError, match=match) as error:
        read_base(source, model, ParameterSpace.of(model), prefix=prefix)
    assert str(source.name) in str(error.value)


def test_nothing_there(now: nn.Module, tmp_path: Path) -> None:
    message = r"neither a vector file, a \.ckpt, nor a folder with \.safetensors files; a hub name must be downloaded"
    raises(tmp_path / "no-such-model", now, message)
    raises(tmp_path / "last.ckpt", now, message)
    raises(tmp_path, now, message)


def test_a_parameter_that_is_missing(now: nn.Module, tmp_path: Path) -> None:
    save_file({"transformer.wte.weights": torch.zeros(2)}, str(tmp_path / "model.safetensors"))
    raises(
        tmp_path,
        now,
        r"has no parameter 'transformer\.wte\.weight'; did you mean 'transformer\.wte\.weights'\? Valid: transformer",
    )


@pytest.mark.parametrize("write", [write_vector, write_folder, write_checkpoint])
def test_a_parameter_of_another_shape(now: nn.Module, tmp_path: Path, write: Callable[[nn.Module, Path], Path]) -> None:
    now.transformer.wpe.weight = nn.Parameter(torch.zeros(9, 16))
    source = write(build("gpt2"), tmp_path)
    raises(source, now, r"transformer\.wpe\.weight has shape \(32, 16\), the model \(9, 16\)", prefix="model.")


@pytest.mark.parametrize("write", [write_vector, write_folder])
def test_another_model(tmp_path: Path, write: Callable[[nn.Module, Path], Path]) -> None:
    raises(write(build("llama"), tmp_path), build("gpt2"), r"has no parameter 'transformer\.wte\.weight'")


@pytest.mark.parametrize("kind", ["mask", "direction"])
def test_a_vector_file_of_something_else(now: nn.Module, tmp_path: Path, kind: str) -> None:
    vector = ParameterVector.of(now)
    vector = vector.top_k(5) if kind == "mask" else vector
    path = save_vectors(tmp_path / "m.safetensors", vector, kind=kind, model=now)
    raises(path, now, rf"a base is a file of values; this is a {kind}")


def test_a_vector_file_of_a_newer_version(now: nn.Module, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, str(tmp_path / "m.safetensors"), metadata={"goldy": '{"format_version": 2}'})
    raises(tmp_path / "m.safetensors", now, "format version 2; this release reads version 1")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_file_that_is_cut_or_pickled(now: nn.Module, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(write_vector(now, tmp_path).read_bytes()[:1000])
    raises(path, now, "not a whole safetensors file")
    torch.save(now.state_dict(), path)
    raises(path, now, "not a whole safetensors file")


def test_a_folder_with_a_broken_file(now: nn.Module, tmp_path: Path) -> None:
    folder = write_folder(now, tmp_path)
    (folder / "model.safetensors").write_bytes(b"short")
    with pytest.raises(StoreError, match=r"model\.safetensors: not a whole safetensors file"):
        read_base(folder, now, ParameterSpace.of(now))


def test_a_checkpoint_without_weights_or_of_another_prefix(now: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    torch.save({"epoch": 1, "model": {}}, path)
    raises(path, now, r"a Lightning checkpoint has a 'state_dict'; this one has \['epoch', 'model'\]")
    torch.save([1], path)
    raises(path, now, "this one has list")
    write_checkpoint(now, tmp_path)
    raises(
        path, now, r"no parameter starts with 'net\.'; the names are like \['model\.transformer\.wte\.weight'", "net."
    )
    raises(path, now, r"has no parameter 'transformer\.wte\.weight'; did you mean")


class SideEffect:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("damage", ["code", "old format", "cut", "empty", "text"])
def test_a_checkpoint_that_cannot_be_read_without_running_it(now: nn.Module, tmp_path: Path, damage: str) -> None:
    path, trace = tmp_path / "last.ckpt", tmp_path / "trace"
    if damage == "code":
        torch.save({"state_dict": {}, "extra": SideEffect(trace)}, path)
    elif damage == "old format":
        path.write_bytes(pickle.dumps({"state_dict": SideEffect(trace)}))
    elif damage == "cut":
        content = write_checkpoint(now, tmp_path).read_bytes()
        path.write_bytes(content[: len(content) // 2])
    else:
        path.write_bytes(b"" if damage == "empty" else b"once upon a time")
    raises(path, now, "not a whole checkpoint of plain data; no code in it is run")
    assert not trace.exists()


# Anything that a base can be


@pytest.mark.parametrize("write", SOURCES)
def test_a_path_is_a_base_wherever_its_names_lie(
    base: nn.Module, now: nn.Module, tmp_path: Path, write: Callable[[nn.Module, Path], Path]
) -> None:
    source = write(base, tmp_path)
    for given in (source, str(source)):
        assert same(base_of(given, now).vector(now), ParameterVector.of(base))


def test_modules_vectors_and_base_parameters_are_bases(base: nn.Module, now: nn.Module) -> None:
    vector = ParameterVector.of(base)
    kept = BaseParameters(vector)
    for given in (base, base.requires_grad_(False), vector, kept):
        assert same(base_of(given, now).vector(now), vector)
    assert base_of(kept, now) is kept
    part = ParameterSpace.of(now, ["*.h.1.*"])
    for given in (base, vector, kept):
        assert same(base_of(given, now, part).vector(now), ParameterVector.of(base, part))


def test_a_vector_is_not_copied_and_a_module_is(base: nn.Module, now: nn.Module) -> None:
    vector = ParameterVector.of(base)
    found = base_of(vector, now).vector(now)
    assert all(found[name].data_ptr() == vector[name].data_ptr() for name in vector)
    taken = base_of(now, now)
    with torch.no_grad():
        now.transformer.wte.weight.add_(1)
    deltas = {change.name: change.delta for change in taken.changes(now)}
    assert deltas["transformer.wte.weight"].any()


def test_a_module_takes_the_dtype_of_the_model(base: nn.Module, now: nn.Module) -> None:
    found = base_of(base, now.bfloat16()).vector(now)
    assert same(found, ParameterVector.of(base).to(torch.bfloat16))


@pytest.mark.parametrize("given", [None, 3, {"transformer.wte.weight": torch.zeros(1)}, [nn.Linear(1, 1)]])
def test_what_no_base_is(now: nn.Module, given: object) -> None:
    with pytest.raises(TypeError, match=rf"a base is a module, a ParameterVector, .*; got {type(given).__name__}"):
        base_of(given, now)  # type: ignore[arg-type]


def test_a_base_of_another_model(now: nn.Module) -> None:
    other = build("llama", seed=5)
    for given in (other, ParameterVector.of(other), BaseParameters(ParameterVector.of(other))):
        with pytest.raises(SpaceError, match="has no parameter"):
            base_of(given, now)


def write_state(folder: Path, model: nn.Module, *prefixes: str) -> Path:
    state = {f"{prefix}{name}": value for prefix in prefixes for name, value in model.state_dict().items()}
    torch.save({"state_dict": state}, folder / "last.ckpt")
    return folder / "last.ckpt"


@pytest.mark.parametrize("write", [None, *SOURCES])
def test_a_base_with_more_blocks_is_refused(tmp_path: Path, write: Callable[[nn.Module, Path], Path] | None) -> None:
    def made(layers: int) -> nn.Module:
        return GPT2LMHeadModel(GPT2Config(n_layer=layers, n_head=1, n_embd=16, vocab_size=7, n_positions=4))

    model, deeper = made(2), made(3)
    given = deeper if write is None else write(deeper, tmp_path)
    for base in (given, *([ParameterVector.of(deeper)] if write is None else [])):
        with pytest.raises((SpaceError, StoreError), match=r"it has 3 of 'transformer\.h', GPT2LMHeadModel has 2"):
            base_of(base, model, ParameterSpace.of(model))
    assert base_of(made(2), model).space == ParameterSpace.of(model)


def test_several_models_in_a_checkpoint(base: nn.Module, now: nn.Module, tmp_path: Path) -> None:
    assert same(base_of(write_state(tmp_path, base, "inner.student."), now).vector(now), ParameterVector.of(base))
    assert same(base_of(write_state(tmp_path, base, "teacher.", "model."), now).vector(now), ParameterVector.of(base))
    both = write_state(tmp_path, base, "teacher.", "student.")
    with pytest.raises(StoreError, match=r"all parameters below each of \['teacher.', 'student.'\]; say which"):
        base_of(both, now)
    with pytest.raises(StoreError, match=r"last\.ckpt has no parameter .transformer\.wte\.weight."):
        base_of(write_state(tmp_path, nn.Linear(1, 1), "model."), now)
    with pytest.raises(StoreError, match="neither a vector file"):
        base_of("openai-community/gpt2", now)


# Tied weights and frozen ones


def untied(seed: int) -> GPT2LMHeadModel:
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 8, "vocab_size": 11, "n_positions": 8}
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(**sizes, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0))


def tied(seed: int) -> GPT2LMHeadModel:
    model = untied(seed)
    model.lm_head.weight = model.transformer.wte.weight
    return model


@pytest.mark.parametrize("where", ["module", "file"])
def test_a_base_with_two_values_of_what_the_model_ties_is_refused(tmp_path: Path, where: str) -> None:
    before = untied(0)
    given: nn.Module | Path = before
    if where == "file":
        given = tmp_path / "base.safetensors"
        save_file({name: value.contiguous() for name, value in before.state_dict().items()}, given)
    with pytest.raises((SpaceError, StoreError), match=r"of its own in 'lm_head.weight'.*ties to 'transformer.wte"):
        base_of(given, tied(1))
    with torch.no_grad():
        before.lm_head.weight.copy_(before.transformer.wte.weight)
    if where == "file":
        save_file(
            {name: value.contiguous() for name, value in before.state_dict().items()}, tmp_path / "two.safetensors"
        )
        given = tmp_path / "two.safetensors"
    assert "lm_head.weight" not in base_of(given, tied(1)).space


def test_weights_that_the_base_ties_are_both_compared_with_the_one() -> None:
    before, model = tied(0), untied(1)
    found = base_of(before, model).vector(model)
    assert list(found) == [name for name, _ in model.named_parameters()]
    assert torch.equal(found["lm_head.weight"], before.transformer.wte.weight)
    assert torch.equal(found["transformer.wte.weight"], before.transformer.wte.weight)


def test_frozen_parameters_that_the_base_has_otherwise_are_told(
    base: nn.Module, now: nn.Module, tmp_path: Path
) -> None:
    for name, parameter in now.named_parameters():
        parameter.requires_grad_(".mlp." in name)
    with pytest.warns(UserWarning, match=r"differs from .* in 'transformer.wte.weight' and \d+ more.*stay as they are"):
        kept = base_of(base, now)
    file = tmp_path / "base.safetensors"
    save_file({name: value.detach().contiguous() for name, value in base.named_parameters()}, file)
    with pytest.warns(UserWarning, match="which require no gradient"):
        base_of(file, now)
    asked = base_of(base, now, kept.space)
    assert asked.space.names == kept.space.names
    with torch.no_grad():
        for own, other in zip(now.parameters(), base.parameters(), strict=True):
            if not own.requires_grad:
                other.copy_(own)
    base_of(base, now)


# Weights that the base ties and the finetune does not


def with_own_head(tied: nn.Module) -> nn.Module:
    """The same model with a head of its own."""
    config = copy.deepcopy(tied.config)
    config.tie_word_embeddings = False
    model = type(tied)(config)
    model.load_state_dict(tied.state_dict())
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    return model


def tied_pair(family: str) -> tuple[nn.Module, nn.Module]:
    base = build(family, seed=5)
    if family == "llama":
        config = copy.deepcopy(base.config)
        config.tie_word_embeddings = True
        base = type(base)(config)
    now = with_own_head(base)
    with torch.no_grad():
        for parameter in now.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return base, now


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("write", [write_folder, write_sharded_folder, write_one_file, write_checkpoint])
def test_a_tied_base_stands_for_both_weights_of_an_untied_finetune(
    family: str, write: Callable[[nn.Module, Path], Path], tmp_path: Path
) -> None:
    base, now = tied_pair(family)
    source = write(base, tmp_path)
    dense, space = with_own_head(base), ParameterSpace.of(now)
    assert same(read_base(source, now, space, prefix="model."), ParameterVector.of(dense, space))
    batch = {"input_ids": torch.arange(16).view(2, 8)}
    given = source if source.suffix != ".ckpt" else ParameterVector(space, read_base(source, now, space, prefix=None))
    found = change_attribution(now, given, [batch], nodes=2)
    assert found == change_attribution(now, dense, [batch], nodes=2)
    assert found.by_tensor["lm_head.weight"] != 0.0


def test_a_file_that_lacks_an_untied_head_is_refused(tmp_path: Path) -> None:
    base, now = tied_pair("gpt2")
    folder = write_folder(base, tmp_path)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"tie_word_embeddings": true', '"tie_word_embeddings": false'))
    raises(folder, now, r"has no parameter 'lm_head\.weight'")
    # A vector file holds what was selected; what it lacks was not.
    raises(write_vector(base, tmp_path), now, r"has no parameter 'lm_head\.weight'")


def test_an_untied_base_of_a_tied_finetune_is_refused(tmp_path: Path) -> None:
    base, now = tied_pair("gpt2")
    raises(write_folder(now, tmp_path), base, r"values of its own in 'lm_head\.weight', which GPT2LMHeadModel ties to")


def test_a_base_without_a_config_may_be_tied(tmp_path: Path) -> None:
    base, now = tied_pair("gpt2")
    folder = write_folder(base, tmp_path)
    for text in ("{broken", "[]", "{}"):
        (folder / "config.json").write_text(text)
        assert read_base(folder, now, ParameterSpace.of(now))["lm_head.weight"].equal(base.lm_head.weight)


def test_what_is_frozen_and_differs_in_a_saved_base_is_told(base: nn.Module, now: nn.Module, tmp_path: Path) -> None:
    now.transformer.wte.requires_grad_(False)
    now.transformer.wpe.requires_grad_(False)
    for write in (write_folder, write_checkpoint):
        source = write(base, tmp_path)
        told = frozen_apart(source, now, ParameterSpace.of(now), prefix="model.")
        assert told is not None
        assert "differs from GPT2LMHeadModel in 'transformer.wte.weight' and 1 more, which require no gradient" in told
        assert "\n" not in told
    # A vector file holds only what was trained.
    values = ParameterVector.of(base, ParameterSpace.of(now))
    vector = save_vectors(tmp_path / "v.safetensors", values, kind="values", model=base)
    assert frozen_apart(vector, now, ParameterSpace.of(now)) is None
    assert frozen_apart(write_folder(now, tmp_path), now, ParameterSpace.of(now)) is None
