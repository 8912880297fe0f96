"""A Taylor comparison does not depend on how many processes made it."""

from __future__ import annotations

import pytest

from lightning_goldy.analysis import TaylorDiffResult
from tests.distributed.launch import run_processes
from tests.distributed.taylor_checks import compare, compared


@pytest.mark.slow
def test_replicas_share_batches_and_find_the_same() -> None:
    expected = [compare("replicas", 0.01, space) for space in (True, False)]
    for texts in run_processes(compared, 2, "replicas"):
        for text, alone in zip(texts, expected, strict=True):
            found = TaylorDiffResult.from_json(text)
            for name in ("loss", "base_loss", "first_order", "second_order", "gradient_norm", "n_targets"):
                assert getattr(found, name) == pytest.approx(getattr(alone, name), rel=1e-5)
            assert found.loss_shares == pytest.approx(alone.loss_shares, rel=1e-4, abs=1e-7)
            assert found.function_shares == pytest.approx(alone.function_shares, rel=1e-4, abs=1e-6)
            assert found.regime == alone.regime


def test_shards_go_by_differences_and_say_how_far_off_they_are() -> None:
    both = [compare("replicas", 0.01, space) for space in (True, False)]
    for texts in run_processes(compared, 2, "shards"):
        for text, exact in zip(texts, both, strict=True):
            found = TaylorDiffResult.from_json(text)
            assert found.route == "differences"
            assert found.metrics().keys() == exact.metrics().keys()
            assert found.nonlinearity == pytest.approx(exact.nonlinearity, rel=1e-3)
            assert found.regime == exact.regime
            assert found.function_shares == pytest.approx(exact.function_shares, rel=1e-3, abs=1e-4)
            for mine, wanted in zip(found.orders, exact.orders, strict=True):
                if wanted.relative_error is None:
                    assert mine.relative_error is None
                    continue
                assert mine.relative_error == pytest.approx(wanted.relative_error, rel=1e-2, abs=1e-4)
                assert mine.kl_divergence == pytest.approx(wanted.kl_divergence, rel=1e-2, abs=1e-7)
                assert mine.top1_agreement == wanted.top1_agreement
            for name in ("loss", "base_loss", "first_order", "gradient_norm", "step_norm"):
                assert getattr(found, name) == pytest.approx(getattr(exact, name), rel=1e-5)
            assert found.loss_shares == pytest.approx(exact.loss_shares, rel=1e-4, abs=1e-7)
            assert abs(found.second_order - exact.second_order) <= found.error + 1e-4 * abs(exact.second_order)
            assert found.error < 0.05 * abs(exact.second_order)
