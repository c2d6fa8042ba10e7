"""Products of several matrices with their own rows, on CPU."""

from __future__ import annotations

import pytest
import torch

from torchtitan_style.cpu.grouped import grouped_gradients, grouped_products, rounded_up


@pytest.mark.parametrize(
    "counts",
    [(5, 0, 40, 1, 130), (0, 0, 7), (16, 32, 128), (300,), (0, 0), (130, 1, 0)],
    ids=lambda counts: " ".join(map(str, counts)),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_and_gradients_are_those_of_each_matrix_by_itself(counts: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    rows, weight, grad = draw(sum(counts), 24), draw(len(counts), 40, 24), draw(sum(counts), 40)
    rows.requires_grad_()
    weight.requires_grad_()
    right = torch.cat([x @ w.mT for x, w in zip(rows.split(counts), weight, strict=True)])
    right.backward(grad)

    ends = torch.tensor(counts).cumsum(0).to(torch.int32)
    with torch.no_grad():
        found = grouped_products(rows, weight, ends)
        gradients = grouped_gradients(grad, rows, weight, ends)
    # Sums of up to 130 products of about 1, rounded to 24 or 8 bits.
    near = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-1}
    torch.testing.assert_close(found, right.detach(), **near)
    torch.testing.assert_close(gradients, (rows.grad, weight.grad), **near)


def test_a_row_that_is_not_finite_stays_with_its_own_matrix() -> None:
    rows = torch.ones(10, 4)
    rows[3] = torch.nan
    ends = torch.tensor([3, 10], dtype=torch.int32)
    weight = torch.ones(2, 6, 4)
    _, weight_grad = grouped_gradients(torch.ones(10, 6), rows, weight, ends)
    assert weight_grad[0].isfinite().all()
    assert grouped_products(rows, weight, ends).isfinite().all(-1).tolist() == [i != 3 for i in range(10)]


def test_numbers_of_rows_are_few_and_hardly_larger() -> None:
    counts = range(1, 10_000)
    sizes = [rounded_up(count) for count in counts]
    assert all(count <= size < count + max(16, count / 8) for count, size in zip(counts, sizes, strict=True))
    assert len(set(sizes)) < 64
