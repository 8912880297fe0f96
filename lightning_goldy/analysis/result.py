"""Results: frozen dataclasses that go to JSON and come back whole."""

from __future__ import annotations

import base64
import dataclasses
import json
import math
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_goldy.core.space import ParameterSpace
from lightning_goldy.core.store import pack_mask, unpack_mask
from lightning_goldy.core.vector import ParameterVector

Self = TypeVar("Self", bound="AnalysisResult")


@dataclasses.dataclass(frozen=True)
class AnalysisResult:
    """Base of all results: scalars, strings, tuples, dicts, tensors and parameter vectors, on the CPU."""

    def to_json(self) -> str:
        """Everything as one line of strict JSON, tensors in base64, masks packed."""
        return json.dumps({name: _encode(value) for name, value in vars(self).items()}, allow_nan=False)

    @classmethod
    def from_json(cls: type[Self], text: str) -> Self:
        """The result that ``to_json`` wrote.

        Raises:
            ValueError: The text is not such a result; the first wrong field is named.
        """
        fields = json.loads(text)
        known = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(fields, dict) or set(fields) != known:
            wrong = sorted(set(fields) ^ known)[0] if isinstance(fields, dict) else type(fields).__name__
            raise ValueError(
                f"not a {cls.__name__}: unexpected or missing field {wrong!r}; its fields are {sorted(known)}"
            )
        return cls(**{name: _decode(value) for name, value in fields.items()})


def _encode(value: Any) -> Any:
    if isinstance(value, ParameterVector):
        space = value.space
        dtypes = [str(dtype).removeprefix("torch.") for dtype in space.dtypes]
        columns = zip(space.names, space.shapes, dtypes, value.values(), strict=True)
        return {"__vector__": [[*map(_encode, each)] for each in columns]}
    if isinstance(value, Tensor):
        if value.dtype == torch.bool:
            packed, encoding = pack_mask(value)
            return {"__mask__": [encoding, list(value.shape), _encode(packed)]}
        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        dtype = str(value.dtype).removeprefix("torch.")
        return {"__tensor__": [dtype, list(value.shape), base64.b64encode(data).decode()]}
    if isinstance(value, float) and not math.isfinite(value):
        return {"__float__": str(value)}
    if isinstance(value, dict):
        return {"__dict__": [[key, _encode(item)] for key, item in value.items()]}
    if isinstance(value, (tuple, list)):
        return [_encode(item) for item in value]
    return value


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_decode(item) for item in value)
    if not isinstance(value, dict):
        return value
    ((tag, content),) = value.items()
    if tag == "__vector__":
        names, shapes, dtypes, tensors = zip(*content, strict=True)
        space = ParameterSpace(
            tuple(names), tuple(torch.Size(shape) for shape in shapes), tuple(getattr(torch, dtype) for dtype in dtypes)
        )
        return ParameterVector(space, dict(zip(names, map(_decode, tensors), strict=True)))
    if tag == "__mask__":
        encoding, shape, packed = content
        return unpack_mask(_decode(packed), torch.Size(shape), encoding)
    if tag == "__tensor__":
        dtype, shape, data = content
        raw = bytearray(base64.b64decode(data))
        if not raw:
            return torch.empty(shape, dtype=getattr(torch, dtype))
        return torch.frombuffer(raw, dtype=torch.uint8).view(getattr(torch, dtype)).view(shape)
    if tag == "__float__":
        return float(content)
    return {key: _decode(item) for key, item in content}
