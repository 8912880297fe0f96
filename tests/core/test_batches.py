from __future__ import annotations

from collections import OrderedDict, defaultdict, deque, namedtuple
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BatchEncoding
from transformers.modeling_outputs import BaseModelOutput

from lightning_goldy.core.batches import batch_length, batch_tensors, map_batch, sample_count, split_batch, take_samples

Pair = namedtuple("Pair", ["x", "y"])


def test_splitting_keeps_the_structure() -> None:
    batch = {"a": torch.arange(6).view(2, 3), "rest": [Pair(torch.tensor([1, 2]), "text"), (torch.ones(2, 1), None)]}
    parts = list(split_batch(batch))
    assert len(parts) == 2
    assert parts[1]["a"].tolist() == [[3, 4, 5]]
    assert isinstance(parts[1]["rest"][0], Pair)
    assert parts[1]["rest"][0].x.tolist() == [2]
    assert parts[1]["rest"][0].y == "text"
    assert parts[1]["rest"][1] == (torch.ones(1, 1), None)
    assert len(list(batch_tensors(batch))) == 3
    encoding = BatchEncoding({"input_ids": torch.arange(4).view(2, 2)})
    assert [part["input_ids"].tolist() for part in split_batch(encoding)] == [[[0, 1]], [[2, 3]]]
    assert [part.tolist() for part in split_batch(torch.arange(2))] == [[0], [1]]


@pytest.mark.parametrize(
    "batch",
    [{"text": "no tensor"}, {}, (torch.zeros(2), torch.zeros(3)), torch.tensor(1.0), (torch.zeros(2), torch.tensor(0))],
)
def test_batches_that_cannot_be_split(batch: Any) -> None:
    with pytest.raises(ValueError, match="must share their first dimension; found shapes"):
        list(split_batch(batch))


def test_mapping_leaves_other_values() -> None:
    found = map_batch({"x": torch.ones(2), "n": 3, "s": ["a", torch.zeros(1)]}, lambda tensor: tensor + 1)
    assert found["x"].tolist() == [2, 2]
    assert found["n"] == 3
    assert found["s"][0] == "a"
    assert found["s"][1].item() == 1


@dataclass(frozen=True)
class Record:
    ids: torch.Tensor
    inner: dict[str, torch.Tensor]
    text: list[str]
    total: torch.Tensor = field(init=False, default=None)

    def __post_init__(self):
        object.__setattr__(self, "total", self.ids.sum(dim=-1))


class Movable:
    """A batch of a class of its own, as Lightning moves it."""

    def __init__(self, x: torch.Tensor, names: tuple[str, ...]) -> None:
        self.x, self.names, self.scale = x, names, 2.0

    def to(self, device: torch.device) -> Movable:
        return Movable(self.x.to(device), self.names)


class Closed:
    __slots__ = ("x",)

    def to(self, device: torch.device) -> Closed:
        return self


def test_dataclasses_and_movable_objects_are_mapped_and_cut() -> None:
    record = Record(torch.ones(3, 2), {"x": torch.arange(3)}, ["a", "b", "c"])
    doubled = map_batch(record, lambda tensor: tensor * 2)
    assert isinstance(doubled, Record)
    assert (doubled.ids.sum().item(), doubled.inner["x"].tolist(), doubled.total.tolist()) == (12, [0, 2, 4], [4] * 3)
    assert record.ids.sum().item() == 6
    last = list(split_batch(record))[2]
    assert (last.ids.shape, last.inner["x"].tolist(), last.text) == ((1, 2), [2], ["c"])
    movable = Movable(torch.arange(3), ("a", "b", "c"))
    part = take_samples((movable, None), torch.tensor([2, 0]))[0]
    assert (part.x.tolist(), part.names, part.scale) == ([2, 0], ("c", "a"), 2.0)
    assert movable.x.tolist() == [0, 1, 2]


def test_an_object_out_of_reach_is_refused_by_its_class() -> None:
    for hidden in (Closed(), torch.nn.Linear(1, 1)):
        with pytest.raises(
            ValueError, match=f"a batch holds a {type(hidden).__name__}, whose tensors cannot be reached"
        ):
            map_batch({"x": torch.ones(2), "rest": [hidden]}, torch.clone)


@pytest.mark.parametrize(
    "batch",
    [
        OrderedDict(x=torch.arange(4)),
        defaultdict(list, x=torch.arange(4)),
        BatchEncoding({"x": torch.arange(4)}),
        BaseModelOutput(last_hidden_state=torch.arange(4)),
        deque([torch.arange(4)]),
    ],
    ids=lambda batch: type(batch).__name__,
)
def test_mappings_and_sequences_keep_their_type(batch: Any) -> None:
    part = take_samples(batch, slice(1, 3))
    assert type(part) is type(batch)
    assert [tensor.tolist() for tensor in batch_tensors(part)] == [[1, 2]]
    assert batch_length(batch) == 4
    if isinstance(batch, BatchEncoding):
        assert part.x.tolist() == [1, 2]
    if isinstance(batch, BaseModelOutput):
        assert part.last_hidden_state.tolist() == [1, 2]


def test_what_has_an_entry_for_each_sample_is_cut_and_the_rest_stays() -> None:
    batch = {
        "ids": torch.arange(6).view(3, 2),
        "position_ids": torch.arange(2)[None],
        "texts": ["a", "b", "c"],
        "columns": [["a", "b", "c"], ("d", "e", "f")],
        "array": np.arange(3),
        "names": ["red", "green"],
        "scale": 0.5,
        "none": None,
    }
    part = take_samples(batch, slice(1, None))
    assert part["ids"].tolist() == [[2, 3], [4, 5]]
    assert part["position_ids"].tolist() == [[0, 1]]
    assert (part["texts"], part["columns"]) == (["b", "c"], [["b", "c"], ("e", "f")])
    assert (part["array"].tolist(), part["names"], part["scale"], part["none"]) == ([1, 2], ["red", "green"], 0.5, None)


def test_samples_are_counted_also_where_tensors_disagree() -> None:
    assert sample_count({"position_ids": torch.zeros(1, 2), "ids": torch.zeros(3, 2)}) == 3
    assert sample_count({"ids": torch.zeros(3, 2), "total": torch.tensor(3)}) == 3
    assert sample_count("text") == 1


def image(height: int) -> torch.Tensor:
    return torch.full((3, height, 8), float(height))


def target(n_boxes: int) -> dict[str, torch.Tensor]:
    return {"boxes": torch.full((n_boxes, 4), float(n_boxes)), "labels": torch.arange(n_boxes)}


@pytest.mark.parametrize("boxes", [(3, 1), (1, 1), (3, 3), (2, 5), (0, 2)])
def test_lists_with_tensors_for_each_sample_are_cut(boxes: tuple[int, ...]) -> None:
    images, targets = [image(4), image(6)], [target(n) for n in boxes]
    collated = tuple(zip(*zip(images, targets, strict=True), strict=True))
    for batch in ((images, targets), collated, {"images": images, "targets": targets, "names": ["a", "b"]}):
        assert batch_length(batch) == sample_count(batch) == 2
        for index, part in enumerate(split_batch(batch)):
            inputs, labels = tuple(part.values())[:2] if isinstance(part, dict) else part
            assert torch.equal(inputs[0], images[index])
            assert labels[0]["boxes"].tolist() == targets[index]["boxes"].tolist()
            assert len(inputs) == len(labels) == 1
            assert not isinstance(part, dict) or part["names"] == ["ab"[index]]
            assert type(part) is type(batch)
            # A single sample is one sample still.
            assert batch_length(part) == 1
    picked = take_samples((images, targets), torch.tensor([1]))
    assert torch.equal(picked[0][0], images[1])


def test_a_list_beside_a_tensor_of_samples_goes_with_it() -> None:
    # As DETR is given it.
    batch = {
        "pixel_values": torch.arange(4).view(4, 1, 1, 1),
        "labels": [{"boxes": torch.ones(n, 4), "image_id": torch.tensor([n])} for n in (2, 1, 4, 2)],
    }
    part = take_samples(batch, slice(1, 3))
    assert part["pixel_values"].flatten().tolist() == [1, 2]
    assert [label["image_id"].item() for label in part["labels"]] == [1, 4]
    sequences = {"ids": [torch.arange(3), torch.arange(5)], "labels": torch.tensor([0, 1])}
    assert [part["ids"][0].tolist() for part in split_batch(sequences)] == [[0, 1, 2], [0, 1, 2, 3, 4]]
    detectron = [{"image": image(4), "boxes": torch.ones(2, 4)}, {"image": image(6), "boxes": torch.ones(1, 4)}]
    assert [part[0]["image"].shape[1] for part in split_batch(detectron)] == [4, 6]


def test_views_and_batches_of_several_loaders_are_no_samples() -> None:
    views = {"views": [{"x": torch.zeros(2, 3)}, {"x": torch.ones(2, 3)}], "y": torch.arange(2)}
    part = take_samples(views, slice(1))
    assert [view["x"].shape for view in part["views"]] == [(1, 3), (1, 3)]
    crops = [torch.zeros(4, 3), torch.zeros(4, 5), torch.arange(4)]
    assert [len(tensor) for tensor in take_samples(crops, slice(2))] == [2, 2, 2]
    for several in (
        [{"x": torch.zeros(4, 2), "y": torch.zeros(4)}, {"x": torch.zeros(3, 2), "y": torch.zeros(3)}],
        ([torch.zeros(4, 2), torch.zeros(4)], [torch.zeros(3, 2), torch.zeros(3)]),
    ):
        with pytest.raises(ValueError, match="must share their first dimension"):
            batch_length(several)
