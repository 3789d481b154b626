"""The closed form against the definition, in float64 and by another route."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_polarize.compensation import LayerLoss, compensate, damped, leading_path


def problem(out_features, in_features, seed, tokens=200):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator, dtype=torch.float64)
    error = 0.1 * torch.randn(out_features, in_features, generator=generator, dtype=torch.float64)
    mixing = torch.randn(in_features, in_features, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, in_features, generator=generator, dtype=torch.float64) @ mixing
    return weight, error, x.T @ x / tokens, x


def qera_exact(error, covariance, rank):
    """QERA-exact as the paper writes it: truncated SVD of E H^(1/2), times H^(-1/2)."""
    values, vectors = torch.linalg.eigh(covariance)
    root, inverse = vectors * values.sqrt() @ vectors.T, vectors / values.sqrt() @ vectors.T
    u, s, v = torch.linalg.svd(error @ root, full_matrices=False)
    return u[:, :rank] * s[:rank] @ v[:rank] @ inverse


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 24), st.integers(2, 24), st.integers(1, 8), st.integers(0, 10**6))
def test_is_the_truncated_svd_of_the_whitened_error(out_features, in_features, rank, seed):
    rank = min(rank, out_features, in_features)
    weight, error, covariance, _ = problem(out_features, in_features, seed)
    h = damped(covariance)
    result = compensate(weight, error, h, rank)
    product = result.b.double() @ result.a.double()
    expected = qera_exact(error, h, rank)
    # the factors are rounded to float32
    torch.testing.assert_close(product, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("shape", [(16, 40), (40, 16)])
def test_reported_errors_are_those_of_the_data(shape):
    weight, error, covariance, x = problem(*shape, seed=3)
    result = compensate(weight, error, covariance, rank=4)
    left = error - result.b.double() @ result.a.double()
    scale = (x @ weight.T).square().sum()
    assert result.errors[0] == pytest.approx(float(((x @ error.T).square().sum() / scale).sqrt()), rel=1e-6)
    assert result.errors[-1] == pytest.approx(float(((x @ left.T).square().sum() / scale).sqrt()), rel=1e-4)


def test_no_other_path_of_the_same_rank_is_better():
    weight, error, covariance, _ = problem(20, 30, seed=5)
    result = compensate(weight, error, covariance, rank=3)
    a, b = result.a.double(), result.b.double()

    def cost(a, b):
        left = error - b @ a
        return float(((left @ covariance) * left).sum())

    best = cost(a, b)
    for seed in range(20):
        torch.manual_seed(seed)
        assert cost(a + 1e-3 * torch.randn_like(a), b + 1e-3 * torch.randn_like(b)) > best


def test_full_rank_takes_back_the_whole_error():
    weight, error, covariance, _ = problem(8, 12, seed=7)
    result = compensate(weight, error, covariance, rank=8)
    torch.testing.assert_close(result.b.double() @ result.a.double(), error, rtol=1e-4, atol=1e-6)
    assert result.errors[-1] < 1e-6


def test_is_deterministic():
    weight, error, covariance, _ = problem(12, 18, seed=9)
    first, second = (compensate(weight, error, covariance, rank=4) for _ in range(2))
    assert torch.equal(first.a, second.a) and torch.equal(first.b, second.b)


def test_a_layer_without_error_gets_a_zero_path():
    weight, error, covariance, _ = problem(8, 8, seed=1)
    result = compensate(weight, torch.zeros_like(error), covariance, rank=2)
    assert float((result.b @ result.a).abs().max()) == 0
    assert result.errors[0] == result.errors[-1] == 0


@pytest.mark.parametrize("rank", [0, 9, -1])
def test_a_rank_out_of_range_is_refused(rank):
    weight, error, covariance, _ = problem(8, 12, seed=1)
    with pytest.raises(ValueError, match=r"1\.\.min\(in, out\) = 1\.\.8"):
        compensate(weight, error, covariance, rank)


def test_values_that_are_not_finite_are_refused():
    weight, error, covariance, _ = problem(8, 12, seed=1)
    error[0, 0] = float("nan")
    with pytest.raises(ValueError, match="error of a layer holds NaN"):
        compensate(weight, error, covariance, 2)


def output_covariance(size, seed=11):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return mixing @ mixing.T / size + 0.1 * torch.eye(size, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(16, 40), (40, 16)])
def test_two_sided_is_the_truncated_svd_of_the_error_whitened_on_both_sides(shape):
    weight, error, covariance, _ = problem(*shape, seed=2)
    h, g = damped(covariance), output_covariance(shape[0])
    result = compensate(weight, error, h, 4, g, two_sided=True)

    def roots(matrix):
        values, vectors = torch.linalg.eigh(matrix)
        return vectors * values.sqrt() @ vectors.T, vectors / values.sqrt() @ vectors.T

    (g_root, g_inverse), (h_root, h_inverse) = roots(g), roots(h)
    u, s, v = torch.linalg.svd(g_root @ error @ h_root, full_matrices=False)
    expected = g_inverse @ (u[:, :4] * s[:4] @ v[:4]) @ h_inverse
    torch.testing.assert_close(
        result.b.double() @ result.a.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())
    )
    assert result.loss_before == pytest.approx(0.5 * float(s.square().sum()))
    assert result.gains == pytest.approx((0.5 * s[:4].square()).tolist(), rel=1e-6)


@pytest.mark.parametrize("two_sided", [False, True])
def test_predicted_losses_are_those_of_the_factors(two_sided):
    weight, error, covariance, _ = problem(16, 24, seed=4)
    h, g = damped(covariance), output_covariance(16)
    result = compensate(weight, error, h, 6, g, two_sided)
    loss = LayerLoss(error, h, g)
    for rank in (1, 3, 6):
        a, b = result.a[:rank], result.b[:, :rank]
        left = error - b.double() @ a.double()
        expected = 0.5 * float((g @ left @ h * left).sum())
        relative = float(((left @ h * left).sum() / (weight.double() @ h * weight.double()).sum()).sqrt())
        assert result.errors[rank] == pytest.approx(relative, rel=1e-5)
        assert result.loss_before - sum(result.gains[:rank]) == pytest.approx(expected, rel=1e-5)
        assert float(loss(a, b)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("shape", [(96, 160), (160, 96)])
def test_the_path_alone_is_nearly_that_of_the_compensation(shape, two_sided):
    weight, error, covariance, _ = problem(*shape, seed=6)
    h, g = damped(covariance), output_covariance(shape[0]) if two_sided else torch.eye(shape[0], dtype=torch.float64)
    root, output_root = (torch.linalg.cholesky(m).float() for m in (h, g))
    before = torch.random.get_rng_state()
    path = leading_path(error.float(), root, 4, output_root if two_sided else None)
    assert torch.equal(torch.random.get_rng_state(), before)
    result = compensate(weight, error, h, 4, g, two_sided)

    def remaining(product):
        return float((g @ (error - product) @ h * (error - product)).sum())

    least = remaining(result.b.double() @ result.a.double())
    assert least * (1 - 1e-6) <= remaining(path.product.double()) <= 1.001 * least
    assert path.squared_error == pytest.approx(remaining(path.product.double()), rel=1e-4)
    seen = output_root.T @ path.product @ root  # what the path does, of which left and right are the singular vectors
    u, _, v = torch.linalg.svd(seen)
    for vectors, expected in ((path.left, u[:, :4]), (path.right, v[:4].T)):
        torch.testing.assert_close(vectors.T @ vectors, torch.eye(4), rtol=0, atol=1e-5)
        torch.testing.assert_close((vectors * expected).sum(0).abs(), torch.ones(4), rtol=0, atol=1e-3)
