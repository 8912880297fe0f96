"""Files that lie or are damaged: each reader refuses them in one line, with path and reason, and allocates nothing."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from torch import Tensor, nn

from lightning_goldy.analysis.coupling.gram import FolderBlocks
from lightning_goldy.analysis.result import AnalysisResult
from lightning_goldy.callbacks.engine.store import ResultStore
from lightning_goldy.core import ParameterMask, ParameterSpace, ParameterVector, StoreError, files, load_vectors, store
from lightning_goldy.core.base import read_base, read_checkpoint
from lightning_goldy.core.files import PlainError, RowError, append_row, atomic_write, parse_json, read_rows
from lightning_goldy.core.store import read_header, save_vectors, unpack_mask, unpack_values
from lightning_goldy.data import load_pieces
from lightning_goldy.report.figures import ReportError
from lightning_goldy.report.run import read_run
from tests.core.test_store import small
from tests.core.test_store_errors import rewritten

ESCAPE = "\x1b[31m"
DEEP = "[" * 100_000
HOSTILE_NUMBERS = {
    "huge float": "1e999",
    "huge negative": "-1e400",
    "many digits and an exponent": "1" + "0" * 301 + "e9",
    "5000 digits": "1" * 5000,
    "400 digits": "1" * 400,
    "nan": "NaN",
    "infinity": "-Infinity",
    "deep": DEEP,
    "deep objects": '{"a":' * 101 + "1" + "}" * 101,
    "twice": '{"a": 1, "a": 2}',
}


@pytest.mark.parametrize("name", HOSTILE_NUMBERS)
def test_json_that_no_reader_can_follow_is_refused(name: str) -> None:
    for text in (HOSTILE_NUMBERS[name], f'{{"x": [{HOSTILE_NUMBERS[name]}]}}'):
        with pytest.raises(
            ValueError, match=r"larger than any float|no number of JSON|nested too deeply|twice"
        ) as error:
            parse_json(text)
        assert len(str(error.value)) < 200


@pytest.mark.parametrize(
    "value",
    [
        1e308,
        5e-324,
        10**300,
        -(2**64),
        ["1e999", "NaN", "9" * 5000],
        {"a": {"b": [[]]}},
        "",
        None,
        1e100,
        "e999 \\u0000",
    ],
)
def test_sound_json_is_what_the_standard_reader_gives(value: Any) -> None:
    text = json.dumps(value)
    assert parse_json(text) == json.loads(text)
    assert type(parse_json(text)) is type(json.loads(text))
    assert parse_json(text.encode()) == value


@pytest.mark.parametrize("at", [0, 1, 57, 99, 100, 150])
def test_a_number_of_many_digits_is_found_wherever_it_stands(at: int) -> None:
    with pytest.raises(ValueError, match="larger than any float"):
        parse_json(f'["{"x" * at}", {"1" * 310}]')
    assert parse_json(f'["{"x" * at}", {"1" * 300}]')[1] == int("1" * 300)


def test_a_row_of_megabytes_takes_little_longer_than_the_standard_reader() -> None:
    text = json.dumps([[1 / (place + 3) for place in range(200)] for _ in range(50)])

    def seconds(read: Callable[[str], Any]) -> float:
        taken = []
        for _ in range(5):
            begin = time.process_time()
            read(text)
            taken.append(time.process_time() - begin)
        return min(taken)

    # To look for long numbers digit by digit makes it eight times.
    assert seconds(parse_json) < 4 * seconds(json.loads)


def test_json_may_be_as_deep_as_what_walks_through_it() -> None:
    deepest = "[" * files.MOST_DEPTH + "]" * files.MOST_DEPTH
    assert files.finite({"a": parse_json(deepest)})
    with pytest.raises(ValueError, match="nested too deeply, beyond 100 levels"):
        parse_json(f"[{deepest}]")


def test_errors_are_one_line_that_steers_no_terminal() -> None:
    error = PlainError(f"a\n  b{ESCAPE}\r\u202e\ud800" + "x" * 10_000)
    assert str(error).startswith("a b\\x1b[31m\\r\\u202e\\ud800xx")
    assert str(error).isprintable()
    assert len(str(error)) < 4100
    with pytest.raises(KeyError) as unknown:
        ParameterSpace.of(nn.Linear(1, 1)).index(f"{ESCAPE}weight")
    assert str(unknown.value).isprintable()


# Vector files


def both_refuse(path: Path, match: str) -> None:
    for read in (load_vectors, lambda path: load_vectors(path, small())):
        with pytest.raises(StoreError, match=match) as error:
            read(path)
        assert str(error.value).startswith(str(path))
        assert str(error.value).isprintable()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    module = small()
    return save_vectors(tmp_path / "base.safetensors", ParameterVector.of(module), kind="values", model=module, step=7)


@pytest.fixture
def mask(tmp_path: Path) -> Path:
    module = small()
    chosen = ParameterVector.of(module).map(lambda tensor: torch.zeros_like(tensor, dtype=torch.bool))
    return save_vectors(tmp_path / "mask.safetensors", chosen, kind="mask", model=module)


def _put(field: str, value: Any, place: int | None = None) -> Callable[[dict, dict[str, Tensor]], object]:
    if place is None:
        return lambda fields, tensors: fields.update({field: value})
    return lambda fields, tensors: fields[field].__setitem__(place, value)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (_put("dtypes", "int64", 0), "0.weight is stored as float32, its header says int64"),
        (_put("dtypes", "float64", 0), "0.weight is stored as float32, its header says float64"),
        (_put("dtypes", "bool", 0), "its header says bool"),
        (lambda fields, tensors: tensors.update({"0.bias": tensors["0.bias"].int()}), "0.bias is stored as int32"),
        (lambda fields, tensors: tensors.update({"0.bias": tensors["0.bias"].half()}), "0.bias is stored as float16"),
        (_put("step", "7"), "step is a number of optimizer steps, not '7'"),
        (_put("step", -1), "step is a number"),
        (_put("step", 2.5), "step is a number"),
        (_put("step", True), "step is a number"),
        (_put("step", 10**200), "step is a number"),
        (_put("step", 10**400), "the number 10000000000000000000... of 401 digits is larger than any float"),
        (_put("step", math.nan), "NaN is no number of JSON"),
        (_put("base_hash", 7), "model_class and base_hash are texts"),
        (_put("model_class", ["Linear"]), "model_class and base_hash are texts"),
        (_put("kind", ["values"]), "unknown kind"),
        (_put("names", "0.weight"), "lists of strings"),
        (_put("shapes", [2**63], 0), "shapes are lists of lengths"),
        (_put("shapes", [2**62, 2**62, 2**62], 0), "larger than any tensor of a model"),
        (_put("shapes", [1] * 65, 0), "shapes are lists of lengths"),
        (_put("shapes", [5, 3], 0), r"is stored with shape \(3, 5\), its header says \(5, 3\)"),
        (_put("format_version", [1]), r"format version \[1\]"),
        (lambda fields, tensors: DEEP, "nested too deeply"),
        (lambda fields, tensors: json.dumps(fields)[:-1] + ', "step": 3}', "the key 'step' twice"),
        (_put("names", f"{ESCAPE}w", 0), r"name different parameters, first '\\x1b\[31mw'"),
        (_put("model_class", f"{ESCAPE}Net"), r"written for \\x1b\[31mNet"),
        (_put("dtypes", ESCAPE, 0), "is no dtype"),
    ],
)
def test_headers_that_contradict_their_tensors(saved: Path, change: Callable, match: str) -> None:
    rewritten(saved, change)
    if "written for" in match:
        with pytest.raises(StoreError, match=match):
            load_vectors(saved, small())
    else:
        both_refuse(saved, match)


def test_moments_of_a_low_precision_may_be_kept_in_a_higher_one_and_results_may_not(tmp_path: Path) -> None:
    layer = nn.Linear(2, 2).to(torch.bfloat16)
    vector = ParameterVector.of(layer).map(lambda tensor: tensor.float())
    for kind in ("values", "direction"):
        path = save_vectors(tmp_path / "v.safetensors", vector, kind=kind, model=layer)  # type: ignore[arg-type]
        assert load_vectors(path, layer)[0]["weight"].dtype == torch.float32
    with pytest.raises(
        ValueError, match=r"weight: result of a parameter in torch.bfloat16 cannot be saved in torch.fl"
    ):
        save_vectors(path, vector, kind="result", model=layer)


def test_values_narrower_than_their_parameters_are_kept_exactly(tmp_path: Path) -> None:
    layer = nn.Linear(2, 2).double()
    vector = ParameterVector.of(layer).map(lambda tensor: tensor.half())
    path = save_vectors(tmp_path / "v.safetensors", vector, kind="values", model=layer)
    loaded = load_vectors(path, layer)[0]["weight"]
    assert loaded.dtype == torch.float64
    assert torch.equal(loaded, vector["weight"].double())


@pytest.fixture
def _nothing_big(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    made = torch.zeros

    def zeros(*size: Any, **options: Any) -> Tensor:
        assert math.prod(size[0] if isinstance(size[0], (list, tuple)) else size) < 10_000, "a claim was allocated"
        return made(*size, **options)

    monkeypatch.setattr(torch, "zeros", zeros)
    start = time.process_time()
    yield
    assert time.process_time() - start < 2


@pytest.mark.usefixtures("_nothing_big")
@pytest.mark.parametrize("claim", [[10**12], [2**40, 2**40], [2**36 + 1], [2**36], [300_000, 200_000]])
def test_sparse_masks_of_sizes_that_no_model_has(mask: Path, claim: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "available_memory", lambda: 2**34)
    rewritten(mask, _put("shapes", claim, 0))
    with pytest.raises(StoreError, match=r"larger than any tensor of a model|do not fit into the .* bytes of free mem"):
        load_vectors(mask)
    with pytest.raises(StoreError, match=r"larger than any tensor|0.weight: shape \(3, 5\) in the module"):
        load_vectors(mask, small())
    with pytest.raises(StoreError, match=r"no tensor of a model has more|do not fit"):
        unpack_mask(torch.zeros(0, dtype=torch.int64), torch.Size(claim), "int64")


@pytest.mark.usefixtures("_nothing_big")
def test_sparse_masks_that_fit_one_by_one_but_not_together(mask: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "available_memory", lambda: 20_000)
    for place in range(3):
        rewritten(mask, _put("shapes", [9000], place))
    with pytest.raises(
        StoreError, match=r"masks of .* elements in all do not fit into the 20,000 bytes of free memory"
    ):
        load_vectors(mask)


def test_packed_masks_that_contradict_themselves() -> None:
    with pytest.raises(StoreError, match="here: bits are set beyond the 3 elements"):
        unpack_mask(torch.tensor([0b11110000], dtype=torch.uint8), torch.Size([3]), "bits", "here")
    for packed in ([5, 3], [3, 3]):
        with pytest.raises(StoreError, match="here: the indices do not ascend"):
            unpack_mask(torch.tensor(packed, dtype=torch.int32), torch.Size([99]), "int32", "here")
    with pytest.raises(StoreError, match="unknown encoding"):
        unpack_mask(torch.tensor([1]), torch.Size([99]), ["bits"], "here")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("encoding", "size", "fault"),
    [
        ("planes:", 0, "unknown encoding 'planes:' of float32"),
        ("planes:1,2,3", 6, "unknown encoding"),
        ("planes:-1,2,3,4", 8, "unknown encoding"),
        ("planes:0,0,0,99999999999999999999", 8, "unknown encoding"),
        ("planes:0,0,0,8", 9, "9 bytes of torch.uint8 are not 6 values"),
        ("planes:0,0,0,7", 7, "7 bytes of torch.uint8 are not 6 values"),
        ("planes:5,0,0,0", 5, "cannot be unpacked"),
    ],
)
def test_packed_values_that_contradict_themselves(encoding: str, size: int, fault: str) -> None:
    with pytest.raises(StoreError, match=fault):
        unpack_values(torch.zeros(size, dtype=torch.uint8), torch.Size([6]), torch.float32, encoding, "here")


@pytest.mark.parametrize("many", [999, 1001, 10**7])
def test_packed_values_that_unpack_to_more_or_less(many: int) -> None:
    """A few bytes that become many are given up at the first that is too many."""
    squeezed = torch.frombuffer(bytearray(zlib.compress(bytes(many))), dtype=torch.uint8)[:900]
    with pytest.raises(StoreError, match="do not unpack to 1000 values"):
        unpack_values(squeezed, torch.Size([1000]), torch.float32, f"planes:{len(squeezed)},0,0,0", "here")


def test_packed_values_of_sizes_that_memory_has_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space = ParameterSpace(("a",), (torch.Size([1 << 20]),), (torch.float32,))
    vector = ParameterVector(space, {"a": torch.zeros(1 << 20)})
    path = save_vectors(tmp_path / "v.safetensors", vector, kind="values", model="X", packed=True)
    assert path.stat().st_size < 1000
    monkeypatch.setattr(store, "available_memory", lambda: 1 << 20)
    with pytest.raises(StoreError, match="values of 4,194,304 bytes in all do not fit into the 1,048,576 bytes"):
        load_vectors(path)


def test_folders_and_links_in_place_of_files(tmp_path: Path) -> None:
    folder, dangling, link = tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "c.safetensors"
    folder.mkdir()
    dangling.symlink_to(tmp_path / "gone")
    link.symlink_to(link)
    for path in (folder, dangling, link):
        for read in (load_vectors, read_header, ParameterMask.load):
            with pytest.raises(StoreError, match="no such file"):
                read(path)
    for path in (folder, dangling, link):
        with pytest.raises(StoreError):
            read_checkpoint(path)
    with pytest.raises(RowError, match="rows are in a file; this is a folder"):
        read_rows(folder)
    with pytest.raises(RowError, match="this is a folder"):
        files.repair_rows(folder)
    with pytest.raises(StoreError, match="a folder is there"):
        read_base(tmp_path, small(), ParameterSpace.of(small()))


def test_checkpoints_of_nothing(tmp_path: Path) -> None:
    module, path = small(), tmp_path / "last.ckpt"
    path.write_bytes(b"")
    with pytest.raises(StoreError, match=r"last\.ckpt: not a whole checkpoint.*the file is empty, 0 bytes"):
        read_checkpoint(path)
    for state in ({}, {"0.weight": 3}, {3: torch.zeros(1)}):
        torch.save({"state_dict": state}, path)
        with pytest.raises(StoreError, match="its state_dict holds no tensor"):
            read_base(path, module, ParameterSpace.of(module))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn])
def test_a_quantised_base_is_no_base(tmp_path: Path, dtype: torch.dtype) -> None:
    module, path = small(), tmp_path / "last.ckpt"
    torch.save({"state_dict": {name: value.to(dtype) for name, value in module.state_dict().items()}}, path)
    with pytest.raises(
        StoreError, match=r"0\.weight is stored as \w+, a quantised form that means nothing without its"
    ):
        read_base(path, module, ParameterSpace.of(module))


# A full disk


def test_a_full_disk_is_told_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    module, path = small(), tmp_path / "rows.jsonl"
    append_row(path, {"step": 1})
    monkeypatch.setattr(os, "fsync", full)
    for write in (lambda: append_row(path, {"step": 2}), lambda: atomic_write(path, "text")):
        with pytest.raises(OSError, match=r"No space left on device: '.*rows\.jsonl'") as error:
            write()
        assert error.value.errno == errno.ENOSPC
    assert read_rows(path) == [{"step": 1}]

    def save(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(store, "save_file", save)
    with pytest.raises(OSError, match=r"No space left on device.*v\.safetensors") as error:
        save_vectors(tmp_path / "v.safetensors", ParameterVector.of(module), kind="values", model=module)
    assert error.value.errno == errno.ENOSPC
    assert [item.name for item in tmp_path.iterdir()] == ["rows.jsonl"]


# Rows


ROW = {
    "format": 2,
    "analysis": "tiny",
    "step": 3,
    "epoch": 0,
    "trigger": "end",
    "metrics": {"loss": 0.5},
    "result": {},
    "headline": "tiny: loss 0.5",
    "cost": {"seconds": 1.0, "forwards": 1, "backwards": 0, "model_evaluations": None, "peak_memory_bytes": 1},
}


@pytest.mark.parametrize(
    "line",
    [
        *(
            json.dumps(ROW).replace('"loss": 0.5', f'"loss": {number}')
            for number in HOSTILE_NUMBERS.values()
            if "N" not in number and "I" not in number
        ),
        json.dumps({**ROW, "step": 10**300}),
        json.dumps({**ROW, "step": "3"}),
        json.dumps({**ROW, "epoch": -(2**60)}),
        json.dumps({**ROW, "format": [2]}),
        json.dumps({**ROW, "analysis": ESCAPE, "metrics": []}),
        json.dumps(ROW).replace('"tiny"', f'"{ESCAPE}"'),
    ],
)
def test_hostile_rows_are_refused_by_file_and_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "goldy" / "tiny" / "results.jsonl"
    atomic_write(path, json.dumps(ROW) + "\n" + line + "\n")
    with pytest.raises(ReportError, match=r"results\.jsonl, line 2: ") as error:
        read_run(tmp_path)
    assert str(error.value).isprintable()


def test_a_folder_of_rows_and_a_table_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "goldy" / "tiny" / "results.jsonl"
    atomic_write(path, json.dumps(ROW) + "\n")
    for table in (b"step,loss\n1,\x00\n", b'step,loss\n1,"' + b"9" * 200_000, b"step,loss\n1e300,1\n1e999,2\nnan,3\n"):
        atomic_write(tmp_path / "metrics.csv", table)
        assert read_run(tmp_path).training.curves == {}
    path.unlink()
    path.mkdir()
    with pytest.raises(ReportError, match="rows are in a file; this is a folder"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"step": "3"}, "'step' must be int, got '3'"),
        ({"step": True}, "'step' must be int, got True"),
        ({"files": {"mask": "../secret"}}, r"'files' must hold names without a folder, got '\.\./secret'"),
        ({"files": {"mask": "/etc/passwd"}}, "'files' must hold names without a folder"),
        ({"files": {"mask": 3}}, "'files' must hold names without a folder"),
        ({"files": ["mask"]}, "'result' and 'files' must be objects"),
    ],
)
def test_a_resume_reads_rows_and_nothing_else(tmp_path: Path, change: dict[str, Any], match: str) -> None:
    atomic_write(tmp_path / "old" / "results.jsonl", json.dumps({**ROW, **change}) + "\n")
    results = ResultStore(tmp_path / "new", write=True)
    with pytest.raises(RowError, match=rf"results\.jsonl, line 1: {match}"):
        results.continue_from(tmp_path / "old", 9)
    with pytest.raises(RowError, match=match):
        ResultStore(tmp_path / "old", write=True).continue_from(tmp_path / "old", 9)


def test_a_history_of_other_rows(tmp_path: Path) -> None:
    atomic_write(tmp_path / "results.jsonl", '{"step": 1, "metrics": {}}\n')
    with pytest.raises(RowError, match="line 1: 'analysis' must be str, got None"):
        _ = ResultStore(tmp_path, write=True).history


# Results and blocks


@dataclasses.dataclass(frozen=True)
class Held(AnalysisResult):
    value: Any


@pytest.mark.parametrize(
    "content",
    [
        '{"__tensor__": ["float32", [1000000000000], ""]}',
        '{"__tensor__": ["float32", [-1], ""]}',
        '{"__tensor__": ["float32", [2], "AAAA"]}',
        '{"__tensor__": ["nn", [1], "AAAAAA=="]}',
        '{"__tensor__": 3}',
        '{"__mask__": ["int32", [1000000000000], {"__tensor__": ["int32", [0], ""]}]}',
        '{"__vector__": [["a", [1000000000000], "float32", {"__tensor__": ["float32", [0], ""]}]]}',
        '{"__cost__": [1, 2, 3]}',
        '{"__result__": ["Nothing", "{}"]}',
        '{"__float__": "x"}',
        '{"a": 1, "b": 2}',
        "{}",
        *HOSTILE_NUMBERS.values(),
    ],
)
def test_a_result_that_is_none(content: str) -> None:
    with pytest.raises(ValueError, match="not a Held: ") as error:
        Held.from_json(f'{{"value": {content}}}')
    assert str(error.value).isprintable()
    assert Held.from_json(Held((1.5, math.inf, {"a": torch.ones(2)})).to_json()).value[1] == math.inf


@pytest.mark.parametrize("content", [b"", b"[]", b"3", b"\xff", b'{"block_size": 1e999}', DEEP.encode(), b"null"])
def test_a_workspace_of_something_else(tmp_path: Path, content: bytes) -> None:
    device = torch.device("cpu")
    blocks = FolderBlocks(tmp_path, {"a": "b"}, block_size=2, compute=device)
    (tmp_path / "summary-00000.json").write_bytes(content)
    with pytest.raises(StoreError, match=r"summary-00000\.json: not the summary of a block"):
        blocks.summary(0)
    (tmp_path / "coupling.json").write_bytes(content)
    with pytest.raises(StoreError, match=r"coupling\.json: not the header of a coupling workspace"):
        FolderBlocks(tmp_path, {"a": "b"}, block_size=2, compute=device)


# Any damage


def _files() -> dict[str, tuple[bytes, Callable[[Path], Any]]]:
    """A whole file of each kind and its reader."""
    module = small()
    space = ParameterSpace.of(module)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = save_vectors(folder / "v", ParameterVector.of(module), kind="values", model=module).read_bytes()
        chosen = ParameterMask.random(space, 10.0)
        masked = save_vectors(folder / "m", chosen, kind="mask", model=module).read_bytes()
        torch.save({"state_dict": module.state_dict(), "global_step": 3}, folder / "c")
        checkpoint = (folder / "c").read_bytes()
    row = json.dumps(ROW).encode() + b"\n"
    piece = b'{"id": "1", "question": "Capital of Peru?", "answer": "Lima"}\n'
    result = Held((1.5, {"a": torch.ones(3), "m": torch.ones(9).bool()})).to_json().encode()

    def run(path: Path) -> Any:
        place = path.parent / "goldy" / "tiny" / "results.jsonl"
        atomic_write(place, path.read_bytes())
        return read_run(path.parent)

    return {
        "values.safetensors": (base, lambda path: load_vectors(path, module)),
        "mask.safetensors": (masked, load_vectors),
        "base.safetensors": (base, lambda path: read_base(path, module, space)),
        "last.ckpt": (checkpoint, lambda path: read_base(path, module, space)),
        "rows.jsonl": (row * 2, read_rows),
        "run.jsonl": (row * 2, run),
        "pieces.jsonl": (piece * 2, load_pieces),
        "pieces.json": (b"[" + piece.strip() + b"]", load_pieces),
        "result.json": (result, lambda path: Held.from_json(path.read_bytes().decode("utf-8", "replace"))),
    }


FILES = _files()
INSERTED = [
    b"1e999",
    b"9" * 500,
    b"NaN",
    b"[" * 2000,
    b'"',
    b"\x1b[2J",
    b"\xff",
    b"\x00",
    b"-1",
    b"{",
    b"",
    b"99999999999",
]


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """The bytes cut, overwritten or with something put in, once or twice."""
    for _ in range(draw(st.integers(1, 2))):
        # The beginning holds the lengths and headers of binary formats.
        at = draw(st.one_of(st.integers(0, min(len(content), 900)), st.integers(0, len(content))))
        kind = draw(st.sampled_from(["cut", "flip", "put", "overwrite"]))
        if kind == "cut":
            content = content[:at]
        elif kind == "flip" and at < len(content):
            content = content[:at] + bytes([content[at] ^ (1 << draw(st.integers(0, 7)))]) + content[at + 1 :]
        else:
            piece = draw(st.sampled_from(INSERTED))
            content = content[:at] + piece + content[at + (len(piece) if kind == "overwrite" else 0) :]
    return content


def fault_of(read: Callable[[Path], Any], path: Path) -> str:
    try:
        read(path)
    except PlainError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", FILES)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_damage_of_any_kind_is_an_error_of_one_plain_line_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    content, read = FILES[name]
    path = tmp_path_factory.getbasetemp() / "damaged" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data.draw(damaged(content)))
    fault = fault_of(read, path)
    assert not fault or fault.isprintable()
    assert not fault or name == "result.json" or path.name in fault or "goldy" in fault
