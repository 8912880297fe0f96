from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from torch import Tensor, nn

from lightning_goldy.analysis import change as change_module
from lightning_goldy.analysis.change import parameter_distribution, resemblances, weight_change
from lightning_goldy.analysis.divergence import histogram_drift
from lightning_goldy.core import ParameterVector
from lightning_goldy.core.base import BaseParameters
from lightning_goldy.core.vector import leading_directions
from tests.references.models import build


def changed(shape: tuple[int, int], delta: Tensor, base: Tensor | None = None) -> tuple[nn.Module, BaseParameters]:
    layer = nn.Linear(shape[1], shape[0], bias=False).double()
    if base is not None:
        layer.weight.data = base.clone()
    start = BaseParameters(ParameterVector.of(layer))
    layer.weight.data += delta
    return layer, start


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (16, 16)])
@pytest.mark.parametrize("exact_below", [1024, 4])
def test_singular_values_and_ranks_equal_a_full_decomposition(shape: tuple[int, int], exact_below: int) -> None:
    torch.manual_seed(0)
    spectrum = 2.0 ** -torch.arange(12.0, dtype=torch.float64)
    left = torch.linalg.qr(torch.randn(shape[0], 12, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(shape[1], 12, dtype=torch.float64)).Q
    delta = left @ torch.diag(spectrum) @ right.t()
    layer, base = changed(shape, delta)
    row = parameter_distribution(layer, base, top=4, exact_below=exact_below).rows[0]
    assert row["singular_values"] == pytest.approx(spectrum[:4].tolist(), rel=1e-6)
    assert row["stable_rank"] == pytest.approx(float(spectrum.square().sum()), rel=1e-6)
    assert row["exact"] == (exact_below == 1024)
    if row["exact"]:
        shares = spectrum / spectrum.sum()
        assert row["effective_rank"] == pytest.approx(math.exp(-float((shares * shares.log()).sum())), rel=1e-5)
    else:
        assert row["effective_rank"] is None


def test_effective_and_stable_rank_of_equal_singular_values_are_their_number() -> None:
    layer, base = changed((8, 8), 0.1 * torch.eye(8, dtype=torch.float64))
    row = parameter_distribution(layer, base).rows[0]
    assert row["stable_rank"] == pytest.approx(8, rel=1e-9)
    assert row["effective_rank"] == pytest.approx(8, rel=1e-9)


@pytest.mark.parametrize("exact_below", [1024, 4])
def test_alignment_is_one_inside_the_base_s_directions_and_chance_for_a_random_change(exact_below: int) -> None:
    torch.manual_seed(0)
    left = torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(60, 40, dtype=torch.float64)).Q
    base = left @ torch.diag(torch.linspace(10, 0.1, 40, dtype=torch.float64) ** 2) @ right.t()
    inside = left[:, :3] @ torch.randn(3, 3, dtype=torch.float64) @ right[:, :3].t()
    options = {"top": 3, "exact_below": exact_below}
    row = parameter_distribution(*changed((40, 60), 0.01 * inside, base), **options).rows[0]
    assert row["alignment"] == pytest.approx(1, abs=1e-3)
    outside = left[:, 10:] @ torch.randn(30, 30, dtype=torch.float64) @ right[:, 10:].t()
    row = parameter_distribution(*changed((40, 60), 0.01 * outside, base), **options).rows[0]
    assert row["alignment"] < 1e-3
    shares = []
    for seed in range(60):
        noise = torch.randn(40, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        shares.append(parameter_distribution(*changed((40, 60), noise, base), **options).rows[0]["alignment"])
    assert row["alignment_chance"] == pytest.approx(9 / 2400)
    assert np.mean(shares) == pytest.approx(9 / 2400, abs=4 * np.std(shares) / math.sqrt(60))


def test_histogram_drift_is_the_jensen_shannon_divergence() -> None:
    torch.manual_seed(0)
    first, second = torch.randn(5000), 1.3 * torch.randn(4000) + 0.2
    edges = np.linspace(float(min(first.min(), second.min())), float(max(first.max(), second.max())), 257)
    counts = [np.histogram(each.numpy(), edges)[0] / len(each) for each in (first, second)]
    # scipy gives the square root of it; a value on the edge of a bin may fall to either side.
    assert histogram_drift(first, second) == pytest.approx(jensenshannon(*counts) ** 2, rel=1e-2)
    assert histogram_drift(first, first) == pytest.approx(0, abs=1e-12)
    assert histogram_drift(first, first + 100) == pytest.approx(math.log(2), rel=1e-9)
    assert histogram_drift(first, second) == pytest.approx(histogram_drift(second, first), rel=1e-9)


def test_a_model_gives_one_row_per_tensor_and_unchanged_ones_have_no_spectrum() -> None:
    model = build("gpt2")
    base = BaseParameters(ParameterVector.of(model))
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight.add_(0.01 * torch.randn(16, 64))
    random = torch.get_rng_state()
    found = parameter_distribution(model, base, exact_below=4)
    assert torch.equal(random, torch.get_rng_state())
    assert [row["name"] for row in found.rows] == list(base.space.names)
    spectra = [row["name"] for row in found.rows if "singular_values" in row]
    assert spectra == ["transformer.h.1.mlp.c_fc.weight"]
    assert set(found.by_block("stable_rank")) == {"transformer.h.1"}
    assert set(found.by_block("histogram_drift")) >= {"embeddings", "final", "transformer.h.0"}
    assert type(found).from_json(found.to_json()) == found


def test_bad_arguments_are_refused() -> None:
    model = nn.Linear(2, 2)
    base = BaseParameters(ParameterVector.of(model))
    for name in ("top", "exact_below"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1; got 0"):
            parameter_distribution(model, base, **{name: 0})


@pytest.mark.parametrize("function", [weight_change, parameter_distribution])
def test_a_base_is_given_in_any_form(function, tmp_path) -> None:
    model, before = build("gpt2"), build("gpt2", seed=7)
    before.save_pretrained(tmp_path / "before")
    expected = function(model, BaseParameters(ParameterVector.of(before)))
    for base in (before, ParameterVector.of(before), tmp_path / "before"):
        assert function(model, base) == expected
    with pytest.raises(TypeError, match=r"a base is a module, .*; got NoneType"):
        function(model, None)


@pytest.mark.parametrize("shape", [(300, 120), (120, 300)])
@pytest.mark.parametrize("spectrum", ["flat", "decaying"])
def test_a_randomised_spectrum_is_as_near_to_the_exact_one_as_it_says(shape: tuple[int, int], spectrum: str) -> None:
    """Noise, whose spectrum is flat, is hardest; every value has one of the matrix's within the stated error."""
    generator = torch.Generator().manual_seed(2)
    delta = torch.randn(shape, generator=generator)
    if spectrum == "decaying":
        delta *= torch.logspace(0, -2, shape[1])
    layer = nn.Linear(shape[1], shape[0], bias=False)
    base = BaseParameters(ParameterVector.of(layer))
    layer.weight.data += delta
    row = parameter_distribution(layer, base, exact_below=64).rows[0]
    forced = parameter_distribution(layer, base, exact_below=None).rows[0]
    exact = np.linalg.svd((layer.weight.detach() - base.vector(layer)["weight"]).double().numpy(), compute_uv=False)
    assert not row["exact"]
    assert forced["exact"]
    assert forced["singular_values"] == pytest.approx(exact[:8].tolist(), rel=1e-9)
    assert forced["singular_value_error"] == 0.0
    values = np.array(row["singular_values"])
    assert values[0] == pytest.approx(exact[0], rel=1e-2)
    assert values == pytest.approx(exact[:8], rel=2e-2)
    assert (values <= exact[:8] * (1 + 1e-6)).all()
    assert 0 < row["singular_value_error"] < 0.1
    nearest = np.abs(values[:, None] - exact[None]).min(axis=1)
    assert (nearest <= (row["singular_value_error"] + 1e-6) * values).all()
    assert row["stable_rank"] == pytest.approx(forced["stable_rank"], rel=2e-2)


def test_a_randomised_spectrum_is_a_function_of_seed_and_name_alone() -> None:
    delta = torch.randn(40, 60, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    layer, base = changed((40, 60), delta)
    random = torch.get_rng_state()
    found = [parameter_distribution(layer, base, exact_below=4, seed=seed).rows[0] for seed in (0, 0, 1)]
    assert torch.equal(random, torch.get_rng_state())
    assert found[0] == found[1]
    assert found[0]["singular_values"] != found[2]["singular_values"]


def test_the_histogram_of_a_range_that_overflows_its_width_is_finite() -> None:
    largest = torch.finfo(torch.float32).max
    assert histogram_drift(torch.tensor([-largest, largest]), torch.tensor([0.0, largest])) == pytest.approx(
        jensenshannon([0.5, 0.0, 0.5], [0.0, 0.5, 0.5]) ** 2
    )


def test_the_base_s_directions_are_found_once_and_give_the_same_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, base = build("gpt2"), BaseParameters(ParameterVector.of(build("gpt2", seed=7)))
    held: change_module.Directions = {}
    first = parameter_distribution(model, base, exact_below=4, directions=held)
    decomposed: list[str] = []
    leading = change_module.leading_directions
    monkeypatch.setattr(
        change_module,
        "leading_directions",
        lambda *args, **options: decomposed.append(args[2]) or leading(*args, **options),
    )
    assert parameter_distribution(model, base, exact_below=4, directions=held) == first
    assert decomposed
    assert not {name for name in decomposed if not name.endswith(("/delta", "/present"))}
    assert parameter_distribution(model, base, exact_below=4) == first


def slow_resemblances(base: Tensor, present: Tensor, top: int) -> list[float]:
    """Whole decompositions of both, and every cosine."""
    before, after = (np.linalg.svd(matrix.double().numpy())[0] for matrix in (base, present))
    return [max(abs(float(before[:, own] @ after[:, j])) for own in range(min(base.shape))) for j in range(top)]


def with_spectrum(rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(torch.randn(side, 20, generator=generator, dtype=torch.float64)).Q for side in (rows, columns)
    )
    return left @ torch.diag(1.3 ** -torch.arange(20.0, dtype=torch.float64)) @ right.t()


@pytest.mark.parametrize("shape", [(30, 50), (50, 30)])
@pytest.mark.parametrize("exact_below", [1024, 4])
def test_planted_intruders_are_found_and_what_the_base_had_is_none(shape: tuple[int, int], exact_below: int) -> None:
    base = with_spectrum(*shape, seed=0)
    generator = torch.Generator().manual_seed(1)
    sides = [torch.linalg.qr(torch.randn(side, 2, generator=generator, dtype=torch.float64)).Q for side in shape]
    planted = 0.9 * sides[0] @ sides[1].t()
    options = {"top": 6, "exact_below": exact_below}
    row = parameter_distribution(*changed(shape, planted, base), **options).rows[0]
    expected = slow_resemblances(base, base + planted, 6)
    assert row["resemblances"] == pytest.approx(expected, abs=1e-6 if exact_below == 1024 else 1e-2)
    assert row["intruders"] == sum(value < 0.5 for value in expected) > 0
    assert row["intruder_share"] == row["intruders"] / 6
    amplified = parameter_distribution(*changed(shape, 0.5 * base, base), **options).rows[0]
    assert amplified["intruders"] == 0
    assert min(amplified["resemblances"]) > 1 - 1e-6
    small = parameter_distribution(*changed(shape, 1e-3 * torch.randn(shape, dtype=torch.float64), base), **options)
    assert (small.rows[0]["intruders"], small.rows[0]["intruder_share_null"]) == (0, 0.0)
    assert small.metrics()["intruder_share"] == 0.0
    other = parameter_distribution(*changed(shape, planted, base), top=6, intruders_below=None).rows[0]
    assert "resemblances" not in other


def test_the_null_of_intruders_is_a_random_change_of_equal_norm_and_rank() -> None:
    base = with_spectrum(30, 50, seed=0)
    seen = {}
    for rank in (None, 2):
        null = change_module._random_change(base, "w", 0, rank)
        assert float(null.norm()) == pytest.approx(1.0, rel=1e-6)
        assert int(torch.linalg.matrix_rank(null)) == (rank or 30)
        seen[rank] = slow_resemblances(base, base + 3.0 * null.double(), 8)
    generator = torch.Generator().manual_seed(2)
    delta = torch.randn(30, 50, generator=generator, dtype=torch.float64)
    layer, start = changed((30, 50), 3.0 * delta / delta.norm(), base)
    null = change_module._random_change(base, "weight", 0, None)
    expected = slow_resemblances(base, base + 3.0 * null.double(), 8)
    row = parameter_distribution(layer, start).rows[0]
    assert row["intruder_share_null"] == sum(value < 0.5 for value in expected) / 8 > 0
    assert min(seen[2][:2]) < 0.5
    assert (row["change_rank"], row["intruder_share_null_rank"]) == (None, None)
    # A change of two directions, given as full weights, stands beside random ones of full rank and of two directions.
    sides = [torch.linalg.qr(torch.randn(side, 2, generator=generator, dtype=torch.float64)).Q for side in (30, 50)]
    noise = 1e-4 * torch.randn(30, 50, generator=generator, dtype=torch.float64)
    for exact_below, noise_of in ((256, noise), (4, 0 * noise)):
        few = 3.0 * sides[0] @ torch.diag(torch.tensor([0.8, 0.6], dtype=torch.float64)) @ sides[1].t() + noise_of
        row = parameter_distribution(*changed((30, 50), few, base), exact_below=exact_below).rows[0]
        assert row["change_rank"] == 2
    null = change_module._random_change(base, "weight", 0, 2)
    expected = slow_resemblances(base, base + row["delta_norm"] * null.double(), 8)
    assert row["intruder_share_null_rank"] == sum(value < 0.5 for value in expected) / 8
    null = change_module._random_change(base, "weight", 0, None)
    expected = slow_resemblances(base, base + row["delta_norm"] * null.double(), 8)
    assert row["intruder_share_null"] == sum(value < 0.5 for value in expected) / 8 != row["intruder_share_null_rank"]
    with pytest.raises(ValueError, match=r"intruders_below is a cosine in \(0, 1\), or None; got 1.5"):
        parameter_distribution(layer, start, intruders_below=1.5)


@pytest.mark.parametrize("shape", [(300, 420), (420, 300)])
@pytest.mark.parametrize(
    ("kind", "strength"),
    [("noise", 1e-5), ("noise", 0.01), ("few", 1e-3), ("few", 0.1), ("few", 1.0), ("drawn in", 0.1), ("drawn in", 1.0)],
)
def test_resemblances_of_large_matrices_are_those_of_whole_decompositions(shape, kind, strength) -> None:
    """Of noise, of three new directions, and of what changes the base's own, each from gentle to overwhelming."""
    generator = torch.Generator().manual_seed(4)
    sides = [torch.linalg.qr(torch.randn(side, 290, generator=generator, dtype=torch.float64)).Q for side in shape]
    base = sides[0] @ torch.diag(1.04 ** -torch.arange(290.0, dtype=torch.float64)) @ sides[1].t()
    noise = torch.randn(shape, generator=generator, dtype=torch.float64) / 17
    new = [torch.randn(side, 3, generator=generator, dtype=torch.float64) for side in shape]
    delta = {"noise": noise, "few": new[0] @ new[1].t() / 300, "drawn in": sides[0][:, :3] @ sides[1][:, 5:8].t()}[kind]
    layer, start = changed(shape, strength * delta, base)
    held: change_module.Directions = {}
    row = parameter_distribution(layer, start, directions=held).rows[0]
    assert not row["exact"]
    present = layer.weight.detach().double()
    before = start.vector(layer)["weight"].double()
    assert row["resemblances"] == pytest.approx(slow_resemblances(before, present, 8), abs=0.03)
    null = change_module._random_change(before, "weight", 0, None).double()
    expected = slow_resemblances(before, before + row["delta_norm"] * null, 8)
    sought = change_module._Sought("weight", before, held, change_module._Settings(8, 256, 0, 0.5), exact=False)
    assert sought.by_chance(row["delta_norm"], None) == pytest.approx(expected, abs=0.03)
    assert ("weight/null" in held) is (row["delta_norm"] < 0.21)
    assert row["intruder_share_null"] == sum(value < 0.5 for value in expected) / 8


def test_the_products_that_a_null_is_told_from_are_those_of_random_changes() -> None:
    """Over many draws what each product is on average is what it is of whole matrices of independent normals."""
    generator = torch.Generator().manual_seed(5)
    rows, columns, start, draws = 24, 40, 4, 400
    base = torch.randn(rows, columns, generator=generator)
    compared = torch.linalg.svd(base, full_matrices=False).U[:, :6]
    seen: dict[str, list[Tensor]] = {"drawn": [], "whole": []}
    for draw in range(draws):
        _, mixed, chance, _, moved = change_module._null_products(base, "w", draw, compared, start)
        seen["drawn"].append(torch.stack([chance.trace(), mixed.trace().abs(), moved[:start].norm(), moved[4:].norm()]))
        change = torch.randn(base.shape, generator=generator)
        change /= change.norm()
        basis = torch.linalg.qr(torch.cat([base.t() @ compared[:, :start], change.t() @ compared[:, :start]], dim=1)).Q
        held, by_change = base @ basis, change @ basis
        wide = compared.t() @ by_change
        each = [by_change.square().sum(), 2 * (held * by_change).sum().abs(), wide[:start].norm(), wide[4:].norm()]
        seen["whole"].append(torch.stack(each).double())
    drawn, whole = (torch.stack(values) for values in seen.values())
    error = ((drawn.var(dim=0) + whole.var(dim=0)) / draws).sqrt()
    assert ((drawn.mean(dim=0) - whole.mean(dim=0)).abs() < 4 * error).all()
    assert drawn.std(dim=0).tolist() == pytest.approx(whole.std(dim=0).tolist(), rel=0.2)


@pytest.mark.parametrize("shape", [(300, 420), (420, 300)])
def test_many_directions_come_nearer_than_few_powers_of_a_wide_block_did(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(3)
    matrix = torch.randn(shape, generator=generator)
    values = leading_directions(matrix, 32, "w", 0, exact=False)[0]
    expected = torch.linalg.svdvals(matrix.double())[:32]
    errors = 1 - values / expected
    # 1.3e-5 and 4.4e-5 of the largest eight with four powers of forty columns.
    assert -1e-6 < float(errors[:8].max()) < 1.2e-5
    assert float(errors.max()) < 0.01


@pytest.mark.parametrize("shape", [(300, 420), (420, 300)])
@pytest.mark.parametrize("kind", ["two directions", "all alike", "forty alike", "alike to 1e-5"])
@pytest.mark.parametrize("top", [8, 32])
def test_no_value_is_above_the_true_one_where_few_directions_hold_all_or_many_are_alike(shape, kind, top) -> None:
    """A power of what was found is rounding alone there, which must not be taken for a direction beside it."""
    generator = torch.Generator().manual_seed(6)
    sides = [torch.linalg.qr(torch.randn(side, 290, generator=generator, dtype=torch.float64)).Q for side in shape]
    values = {
        "two directions": torch.tensor([4.0, 3.0] + 288 * [0.0]),
        "all alike": torch.ones(290),
        "forty alike": torch.tensor(40 * [1.0] + 250 * [0.1]),
        "alike to 1e-5": torch.cat([1 - 1e-5 * torch.rand(30, generator=generator), torch.full((260,), 0.1)]),
    }[kind].double()
    matrix = (sides[0] @ torch.diag(values) @ sides[1].t()).float()
    expected = torch.linalg.svdvals(matrix.double())[:top]
    found, left, right, _ = leading_directions(matrix, top, "w", 0, exact=False)
    assert (found <= expected * (1 + 1e-6) + 1e-6).all()
    held = 2 if kind == "two directions" else 30
    assert found[:held].tolist() == pytest.approx(expected[:held].tolist(), rel=2e-5)
    for own in (left, right):
        strong = own[:, : min(held, top)].double()
        assert (strong.t() @ strong - torch.eye(strong.shape[1])).abs().max() < 1e-4
    moved = matrix.double() @ right[:, :held].double()
    assert (moved - left[:, :held].double() * found[:held]).norm(dim=0).max() < 1e-2 * found[0]


def test_the_precision_of_a_training_is_not_that_of_its_decompositions() -> None:
    """Under autocast the products of large matrices were rounded to bfloat16: their values were off by 4e-4."""
    generator = torch.Generator().manual_seed(8)
    layer = nn.Linear(400, 300, bias=False)
    base = BaseParameters(ParameterVector.of(layer))
    layer.weight.data += torch.randn(300, 400, generator=generator) * torch.logspace(0, -3, 400)
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found.append(parameter_distribution(layer, base, intruders_below=0.5))
    assert found[0] == found[1]


def test_resemblances_of_a_tall_matrix_are_those_of_the_whole() -> None:
    """An embedding has more rows than are worked on at a time."""
    generator = torch.Generator().manual_seed(3)
    base, directions = (
        torch.linalg.qr(torch.randn(9001, n, generator=generator, dtype=torch.float64)).Q.float() for n in (7, 3)
    )
    expected = (base.double().t() @ directions.double()).abs().amax(dim=0)
    assert resemblances(directions, base) == pytest.approx(expected.tolist(), rel=1e-12)


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("kind", ["product", "few rows"])
def test_the_error_of_singular_values_is_of_those_that_are_not_rounding(kind: str, rank: int) -> None:
    """A change of two directions has two singular values; the error of the six zeros beside them was told as 1e12."""
    generator = torch.Generator().manual_seed(rank)
    delta = torch.randn(300, rank, generator=generator) @ torch.randn(rank, 420, generator=generator)
    if kind == "few rows":
        delta = torch.zeros(300, 420)
        delta[:rank] = torch.randn(rank, 420, generator=generator)
    layer = nn.Linear(420, 300, bias=False)
    layer.weight.data.zero_()
    base = BaseParameters(ParameterVector.of(layer))
    layer.weight.data += delta
    row = parameter_distribution(layer, base).rows[0]
    values, exact = np.array(row["singular_values"]), torch.linalg.svdvals(delta.double()).numpy()
    assert values[:rank] == pytest.approx(exact[:rank], rel=1e-5)
    assert (values[rank:] < 1e-6 * values[0]).all()
    assert 0 < row["singular_value_error"] < 1e-5
    # What is small but no rounding counts.
    layer.weight.data += 1e-4 * torch.randn(300, 420, generator=generator)
    small = parameter_distribution(layer, base).rows[0]
    exact = torch.linalg.svdvals(layer.weight.detach().double()).numpy()
    nearest = np.abs(np.array(small["singular_values"])[:, None] - exact[None]).min(axis=1)
    assert 1e-4 < small["singular_value_error"] < 0.1
    assert (nearest <= (small["singular_value_error"] + 1e-6) * np.array(small["singular_values"])).all()


def test_directions_that_nothing_near_them_leads_to_are_found_from_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """What starts from the base's would miss a ninth strong direction of the change; the other way does not."""
    generator = torch.Generator().manual_seed(4)
    shape = (300, 420)
    left, right = (
        torch.linalg.qr(torch.randn(side, 290, generator=generator, dtype=torch.float64)).Q for side in shape
    )
    base = left @ torch.diag(1.04 ** -torch.arange(290.0, dtype=torch.float64)) @ right.t()
    delta = 3.0 * left[:, 100:120] @ right[:, 150:170].t()
    whole: list[str] = []
    leading = change_module.leading_directions
    monkeypatch.setattr(
        change_module, "leading_directions", lambda *args, **options: whole.append(args[2]) or leading(*args, **options)
    )
    row = parameter_distribution(*changed(shape, delta, base)).rows[0]
    assert "weight/present" in whole
    assert row["intruders"] == 8
    whole.clear()
    parameter_distribution(*changed(shape, 1e-3 * delta, base))
    assert whole == ["weight", "weight/delta"]
