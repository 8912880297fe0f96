"""Files that are not what they should be: each is refused by name, and none is unpickled."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_goldy.core import ParameterVector, StoreError, load_vectors, save_vectors
from tests.core.test_store import small


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    module = small()
    return save_vectors(tmp_path / "base.safetensors", ParameterVector.of(module), kind="values", model=module, step=7)


def rewritten(path: Path, change: Callable[[dict, dict[str, Tensor]], object]) -> Path:
    """The file with its header and tensors changed."""
    with safe_open(str(path), framework="pt") as file:
        fields = json.loads(file.metadata()["goldy"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    text = change(fields, tensors)
    save_file(tensors, str(path), metadata={"goldy": text if isinstance(text, str) else json.dumps(fields)})
    return path


def both_raise(path: Path, match: str) -> None:
    for module in (None, small()):
        with pytest.raises(StoreError, match=match) as error:
            load_vectors(path, module)
        assert str(error.value).startswith(f"{path}: ")


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    both_raise(tmp_path / "none.safetensors", "no such file")
    both_raise(tmp_path, "no such file")


def test_a_file_cut_anywhere(saved: Path) -> None:
    content = saved.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    assert header < len(content)
    for length in {*range(0, header, 37), *range(header - 3, len(content), 11), 0, 1, 7, 8, 9, len(content) - 1}:
        saved.write_bytes(content[:length])
        both_raise(saved, "not a whole safetensors file")
    saved.write_bytes(content + b"\0")
    both_raise(saved, "not a whole safetensors file")


def failure_of(path: Path, module: nn.Module) -> str | None:
    try:
        load_vectors(path, module)
    except StoreError as error:
        return str(error)
    return None


def test_a_damaged_header_is_a_store_error_or_harmless(saved: Path) -> None:
    module, content = small(), saved.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    failed = 0
    for position in range(0, header, 5):
        for value in (content[position] ^ 1, ord('"'), 0xFF):
            saved.write_bytes(content[:position] + bytes([value]) + content[position + 1 :])
            failure = failure_of(saved, module)
            assert failure is None or failure.startswith(f"{saved}: ")
            failed += failure is not None
    assert failed > header / 5


def test_a_safetensors_file_of_someone_else(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, str(tmp_path / "m.safetensors"))
    both_raise(tmp_path / "m.safetensors", "a safetensors file without the header that save_vectors writes")
    save_file({"weight": torch.zeros(2)}, str(tmp_path / "m.safetensors"), metadata={"format": "pt"})
    both_raise(tmp_path / "m.safetensors", "without the header")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda fields, tensors: fields.update(format_version=2), "format version 2; this release reads version 1"),
        (lambda fields, tensors: json.dumps({"format_version": 9}), "format version 9"),
        (lambda fields, tensors: "{", "malformed header"),
        (lambda fields, tensors: "[]", "malformed header"),
        (lambda fields, tensors: "{}", "malformed header"),
        (lambda fields, tensors: fields.pop("names"), r"malformed header.*names"),
        (lambda fields, tensors: fields.update(surprise=1), r"malformed header.*surprise"),
        (lambda fields, tensors: fields["shapes"].pop(), "lists of names, shapes, dtypes and encodings do not match"),
        (lambda fields, tensors: fields["names"].__setitem__(1, "0.weight"), "do not match"),
        (lambda fields, tensors: fields["names"].__setitem__(0, 3), "malformed header.*lists of strings"),
        (lambda fields, tensors: fields.update(names=7), "malformed header"),
        (lambda fields, tensors: fields["dtypes"].__setitem__(0, "float33"), "malformed header.*'float33' is no dtype"),
        (lambda fields, tensors: fields["dtypes"].__setitem__(0, "nn"), "malformed header.*'nn' is no dtype"),
        (lambda fields, tensors: fields["shapes"].__setitem__(0, [3, -5]), "malformed header.*lists of lengths"),
        (lambda fields, tensors: fields["shapes"].__setitem__(0, "35"), "malformed header.*lists of lengths"),
        (lambda fields, tensors: fields["shapes"].__setitem__(0, 15), "malformed header"),
        (lambda fields, tensors: fields.update(kind="picture"), "unknown kind 'picture'"),
        (
            lambda fields, tensors: fields["encodings"].__setitem__(0, "bits"),
            "0.weight is stored as bits, which no values is",
        ),
        (
            lambda fields, tensors: fields["names"].__setitem__(0, "other"),
            "name different parameters, first '0.weight'",
        ),
        (lambda fields, tensors: tensors.pop("2.weight"), "name different parameters, first '2.weight'"),
        (lambda fields, tensors: tensors.update(more=torch.zeros(1)), "name different parameters, first 'more'"),
    ],
)
def test_wrong_headers(saved: Path, change: Callable, match: str) -> None:
    both_raise(rewritten(saved, change), match)


def test_a_tensor_of_another_shape_than_its_header(saved: Path) -> None:
    rewritten(saved, lambda fields, tensors: tensors.update({"0.bias": torch.zeros(4)}))
    both_raise(saved, r"0\.bias is stored with shape \(4,\), its header says \(3,\)")


def test_a_mask_with_wrong_bytes(tmp_path: Path) -> None:
    module = small()
    everything = ParameterVector.of(module).map(lambda tensor: torch.ones_like(tensor, dtype=torch.bool))
    path = save_vectors(tmp_path / "m.safetensors", everything, kind="mask", model=module)
    rewritten(path, lambda fields, tensors: tensors.update({"0.bias": torch.zeros(9, dtype=torch.uint8)}))
    both_raise(path, r"0\.bias: 9 bytes of torch\.uint8 cannot hold 3 bits")
    rewritten(path, lambda fields, tensors: fields["encodings"].__setitem__(0, "dense"))
    both_raise(path, r"0\.weight is stored as dense, which no mask is")


@pytest.mark.parametrize(
    ("other", "match"),
    [
        (lambda: nn.ModuleList(small()), "written for Sequential, the model is ModuleList"),
        (lambda: small()[:2], r"Sequential has no parameter '2\.weight'"),
        (
            lambda: nn.Sequential(nn.Linear(5, 4), *small()[1:]),
            r"0\.weight: shape \(4, 5\) in the module, \(3, 5\) in the space",
        ),
    ],
)
def test_a_file_of_another_model_names_the_first_difference(saved: Path, other: Callable, match: str) -> None:
    with pytest.raises(StoreError, match=match) as error:
        load_vectors(saved, other())
    assert str(error.value).startswith(f"{saved}: ")


class SideEffect:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_nothing_is_ever_unpickled(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    pickled = pickle.dumps({"0.weight": SideEffect(trace)})
    files = {
        "plain.safetensors": pickled,
        "zip.safetensors": None,
        "behind a length.safetensors": len(pickled).to_bytes(8, "little") + pickled,
    }
    torch.save({"0.weight": SideEffect(trace)}, tmp_path / "zip.safetensors")
    for name, content in files.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        both_raise(tmp_path / name, "not a whole safetensors file.*pickled files are never read")
        assert not trace.exists()
    pickle.loads(pickled)["0.weight"].close()
    assert trace.exists(), "the trap itself must work"
