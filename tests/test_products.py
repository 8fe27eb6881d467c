"""The products that oneDNN computes instead of MKL are the same, for all layouts, and their gradients too."""

import pytest
import torch

from common.models import products

# (rows, inner size, columns): below and above the size from which oneDNN computes, and empty.
SIZES = [(3, 5, 7), (0, 8, 8), (1, 512, 4096), (130, 96, 200)]
LAYOUTS = {
    "rows": lambda x: x,
    "columns": lambda x: x.t().contiguous().t(),
    "steps": lambda x: torch.stack((x, x), dim=-1)[..., 0],
    "expanded": lambda x: x[:1].expand(x.shape) if len(x) else x,
}


@pytest.fixture(autouse=True)
def on_onednn(monkeypatch):
    """On any CPU with AVX-512, and also where MKL is as fast."""
    monkeypatch.setattr(products, "is_intel", lambda: False)
    kernels = products.use_onednn.__wrapped__()
    if not kernels:
        pytest.skip("this CPU has no AVX-512")
    yield  # they are in use as long as ``kernels`` lives


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_products_and_gradients_are_those_of_float64(size, layout):
    rows, inner, columns = size
    torch.manual_seed(0)
    exact = [torch.randn(s, dtype=torch.float64) for s in ((columns,), (rows, inner), (inner, columns))]
    found = []
    for dtype in (torch.float64, torch.float32):
        bias, left, right = (x.to(dtype, copy=True).requires_grad_() for x in exact)
        arranged = LAYOUTS[layout](left), LAYOUTS[layout](right)
        results = [torch.mm(*arranged), *(torch.addmm(bias, *arranged, alpha=alpha) for alpha in (1, 2))]
        sum(result.square().sum() for result in results).backward()
        assert all(result.is_contiguous() for result in results)
        found.append([*results, bias.grad, left.grad, right.grad])
    for expected, result in zip(*found, strict=True):
        largest = expected.abs().max().item() if expected.numel() else 0.0
        torch.testing.assert_close(result.double(), expected, rtol=0, atol=1e-5 * largest)
