"""Fitted code books against cases with a known answer, and NF4 beside them."""

import numpy as np
import pytest
import torch

from helpers import quantization
from helpers.quantization import Scaled, optimal

BLOCKS = 3_000


@pytest.fixture(scope="module")
def gaussian() -> Scaled:
    return quantization.scaled(quantization.draw("Gaussian", 64 * BLOCKS, seed=0))


def with_weights(values: list[float], absmax: list[float]) -> Scaled:
    return Scaled(torch.tensor(values).double(), torch.tensor(absmax).double())


def test_a_fit_on_sixteen_points_finds_the_points() -> None:
    points = torch.linspace(-1, 1, 16).double()
    data = Scaled(points.repeat_interleave(50), torch.ones(800).double())
    for measure in optimal.POWER:
        assert torch.allclose(quantization.fit(data, measure), points.float(), atol=1e-6)


def test_means_and_medians_weighted_by_hand() -> None:
    # All three values lie nearest to the last level, which starts at 1. Squared error weighs by
    # absmax squared: (0.95 * 4 + 1 * 1 + 1 * 1) / 6; absolute error weighs by absmax, so that 0.95
    # holds half of all weight.
    data = with_weights([0.95, 1.0, 1.0], [2.0, 1.0, 1.0])
    assert quantization.fit(data, "squared")[-1] == pytest.approx(5.8 / 6)
    assert quantization.fit(data, "absolute")[-1] == pytest.approx(0.95)


def test_error_by_hand() -> None:
    data = with_weights([-0.9, 1.0], [1.0, 3.0])
    book = torch.tensor([-1.0, 0.9])
    assert quantization.error(data, book, "squared") == pytest.approx((0.01 + 0.09) / 2)
    assert quantization.error(data, book, "absolute") == pytest.approx((0.1 + 0.3) / 2)


@pytest.mark.parametrize("measure", optimal.POWER)
def test_error_is_that_of_quantised_weights(measure: optimal.Measure) -> None:
    weights = quantization.draw("Gaussian", 6400, seed=1)
    again = quantization.dequantize(quantization.quantize(weights))
    direct = ((again - weights).abs() ** optimal.POWER[measure]).mean().item()
    found = quantization.error(quantization.scaled(weights), quantization.normal_float(), measure)
    assert found == pytest.approx(direct, rel=1e-5)


@pytest.mark.parametrize("measure", optimal.POWER)
def test_no_neighbour_of_the_fit_is_better(gaussian: Scaled, measure: optimal.Measure) -> None:
    best = quantization.fit(gaussian, measure)
    least = quantization.error(gaussian, best, measure)
    for level in range(16):
        for step in (-0.02, 0.02):
            moved = best.clone()
            moved[level] += step
            assert quantization.error(gaussian, moved, measure) > least


def test_fixed_levels_stay(gaussian: Scaled) -> None:
    kept = quantization.fit(gaussian, "squared", fixed=(-1.0, 0.0, 1.0))
    assert {-1.0, 0.0, 1.0} <= set(kept.tolist())
    free = quantization.fit(gaussian, "squared")
    assert not {-1.0, 0.0, 1.0} & set(free.tolist())
    errors = [quantization.error(gaussian, book, "squared") for book in (free, kept)]
    assert errors[0] < errors[1]


def test_entropy_by_hand() -> None:
    book = quantization.normal_float()
    even = Scaled(book.double(), torch.ones(16).double())
    assert quantization.code_entropy(even, book) == pytest.approx(4)
    halves = with_weights([-1.0, 1.0], [1.0, 1.0])
    assert quantization.code_entropy(halves, book) == pytest.approx(1)


def test_scaled_leaves_an_unfinished_block_out_and_refuses_zeros() -> None:
    data = quantization.scaled(torch.tensor([1.0, -2.0, 3.0]), block_size=2)
    assert data.values.tolist() == [-1.0, 0.5] and data.absmax.tolist() == [2.0, 2.0]
    with pytest.raises(ValueError, match="block of zeros"):
        quantization.scaled(torch.zeros(64))
    with pytest.raises(ValueError, match="at least one value"):
        quantization.scaled(torch.ones(63))


@pytest.mark.parametrize(
    ("distribution", "kurtosis", "tolerance"),
    [("Gaussian", 0, 0.1), ("Laplace", 3, 0.5), ("uniform", -1.2, 0.05), ("Student-t", 6, 4)],
)
def test_draws_have_the_tails_of_their_names(
    distribution: str, kurtosis: float, tolerance: float
) -> None:
    values = quantization.draw(distribution, 200_000, seed=0).double()
    z = (values - values.mean()) / values.std()
    assert (z**4).mean().item() - 3 == pytest.approx(kurtosis, abs=tolerance)


def test_a_draw_depends_on_its_seed_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one = quantization.draw("Laplace", 10, seed=3)
    assert torch.equal(torch.rand(1), expected)  # the caller's random state is left alone
    assert torch.equal(one, quantization.draw("Laplace", 10, seed=3))
    assert not torch.equal(one, quantization.draw("Laplace", 10, seed=4))


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match="Unknown distribution 'Gauss'; did you mean 'Gaussian'"):
        quantization.draw("Gauss", 1, seed=0)
    with pytest.raises(ValueError, match="did you mean 'minilm'"):
        quantization.linear_weights("minilm-l6")


def test_comparison_of_the_books() -> None:
    samples = {
        ("Gaussian", seed): quantization.draw("Gaussian", 640_000, seed) for seed in range(2)
    }
    table = quantization.compare(samples, quantization.draw("Gaussian", 640_000, seed=9))
    assert len(table) == 2 * 2 * 6
    assert np.allclose(table.loc[table.book == "fitted", "relative"], 1)
    assert (table.relative >= 1).all()
    mean = table.groupby(["measure", "book"])["relative"].mean()
    # NF4 has least absolute error among the books with -1, 0 and 1, and not least squared error
    assert mean["absolute", "nf4"] < 1.001 * mean["absolute", "fitted, -1 0 1 kept"]
    assert mean["squared", "nf4"] > 1.03 * mean["squared", "fitted, -1 0 1 kept"]
    assert mean["squared", "fp4"] > mean["squared", "int4"] > mean["squared", "nf4"]


def test_real_weights_are_matrices_of_every_layer() -> None:
    weights = quantization.linear_weights("minilm")
    assert len(weights) == 6 * 6 + 1  # query, key, value, three dense ones a layer; the pooler
    assert weights["encoder.layer.0.intermediate.dense"].shape == (1536, 384)
