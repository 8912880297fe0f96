"""A random projection of gradients that reads them from rows: tensor sketches."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_goldy.analysis.coupling_gram import Rows
from lightning_goldy.analysis.outer_products import exact_products

# Elements of a flat gradient that are hashed at a time.
_BLOCK = 1 << 20
# Elements of [rows, dimensions] that are worked on at a time.
_CHUNK = 1 << 22


class _Hash(NamedTuple):
    buckets: Tensor
    signs: Tensor


class Projection:
    r"""Maps the gradients over all tensors to a few numbers that keep their inner products on average.

    .. math::
        S(b \otimes a) = \mathcal F^{-1}\big(\mathcal F(C_1 b) \circ \mathcal F(C_2 a)\big), \qquad
        \mathbb E \langle S g, S h \rangle = \langle g, h \rangle, \qquad
        \mathrm{Var} \langle S g, S h \rangle \le \frac{8}{k} \lVert g \rVert^2 \lVert h \rVert^2

    with count sketches C of k buckets: every coordinate goes to a random bucket with a random sign. Tensors have hashes
    of their own and share the buckets. A gradient over nothing but vectors, such as biases, is count-sketched, with 2
    in the place of 8; most pairs of gradients come close to that anyway, at :math:`(1 + \cos^2) / k`.

    Args:
        dimensions: k.
        seed: Decides the hashes, on any device.

    Raises:
        ValueError: k is below 2.

    Source: Pham and Pagh, "Fast and scalable polynomial kernels via explicit feature maps" (2013); the variance over
        all of the tensor space as in Avron, Nguyen and Woodruff, "Subspace embeddings for the polynomial kernel"
        (2014), lemma 3.

    Example:
        >>> projection = Projection(4096)
        >>> rows = Rows(torch.ones(1, 1, 5), torch.ones(1, 1, 7))
        >>> sketch = projection({"weight": rows})
        >>> sketch.shape, abs(float(sketch.square().sum()) / 35 - 1) < 3 * projection.error()
        (torch.Size([1, 4096]), True)
    """

    def __init__(self, dimensions: int, *, seed: int = 0) -> None:
        if dimensions < 2:
            raise ValueError(f"projection is the number of dimensions to keep, at least 2; got {dimensions}")
        self.dimensions, self.seed = dimensions, seed
        self._hashes: dict[tuple[str, int, torch.device], _Hash] = {}

    def __call__(self, parts: Mapping[str, Rows]) -> Tensor:
        """The projected gradients.

        Args:
            parts: Rows of the same M pieces by the name of their tensor.

        Returns:
            Shape ``[M, k]``, float32, or float64 where the rows are.
        """
        first = next(iter(parts.values())).gradients
        dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
        total = torch.zeros(len(first), self.dimensions, dtype=dtype, device=first.device)
        with exact_products(first.device):
            for name, rows in parts.items():
                if rows.inputs is None:
                    self._add_flat(total, name, rows.gradients)
                elif rows.gradients.shape[1]:
                    sketch = self._tensor_sketch(name, rows.gradients.to(dtype), rows.inputs.to(dtype))
                    total += sketch.to(total.device)
        return total

    def error(self, *, vectors_only: bool = False) -> float:
        """Bound on the root mean square error of a cosine whose norms are known.

        Args:
            vectors_only: Whether every tensor's gradient comes as it is, none as rows.
        """
        return math.sqrt((2 if vectors_only else 8) / self.dimensions)

    def _tensor_sketch(self, name: str, gradients: Tensor, inputs: Tensor) -> Tensor:
        step = max(1, _CHUNK // (gradients.shape[1] * self.dimensions))
        sketches = []
        for b, a in zip(gradients.split(step), inputs.split(step), strict=True):
            spectra = [
                torch.fft.rfft(self._count_sketch(f"{name}\0{side}", each)) for side, each in (("out", b), ("in", a))
            ]  # [M, R, k / 2 + 1]
            sketches.append(torch.fft.irfft((spectra[0] * spectra[1]).sum(dim=1), n=self.dimensions))
        return torch.cat(sketches)

    def _count_sketch(self, key: str, values: Tensor) -> Tensor:
        hashed = self._hash(key, values.shape[-1], values.device)
        result = values.new_zeros(*values.shape[:-1], self.dimensions)
        return result.index_add_(-1, hashed.buckets, values * hashed.signs)

    def _add_flat(self, total: Tensor, name: str, gradients: Tensor) -> None:
        for number, start in enumerate(range(0, gradients.shape[1], _BLOCK)):
            part = gradients[:, start : start + _BLOCK].to(total.dtype)
            total += self._count_sketch(f"{name}\0{number}", part).to(total.device)

    def _hash(self, key: str, width: int, device: torch.device) -> _Hash:
        found = self._hashes.get((key, width, device))
        if found is None:
            digest = hashlib.blake2b(f"{self.seed}\0projection\0{key}".encode(), digest_size=8).digest()
            # 63 bits: torch reads a larger seed as negative. On the CPU, so that every device has the same.
            generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little") >> 1)
            buckets = torch.randint(self.dimensions, (width,), generator=generator, device="cpu")
            signs = torch.randint(2, (width,), generator=generator, dtype=torch.int8, device="cpu") * 2 - 1
            found = self._hashes[key, width, device] = _Hash(buckets.to(device), signs.to(device))
        return found
