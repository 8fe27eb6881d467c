"""The products that oneDNN computes instead of MKL are the same, for all layouts, and their gradients too.

So are those of weights that it has arranged, which are the old ones again at the end.
"""

import pytest
import torch
from torch import nn

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
    monkeypatch.setattr(products, "use_onednn", lambda: kernels)
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


class Tied(nn.Module):
    """A tied embedding and layers whose weights have no other user."""

    def __init__(self):
        super().__init__()
        self.embedding, self.large = nn.Embedding(600, 256), nn.Linear(256, 512)
        self.bare, self.small = nn.Linear(512, 256, bias=False), nn.Linear(256, 256 - 4)
        self.flat, self.wide = nn.Linear(256, 256), nn.Linear(256, 300).double()
        self.flat.weight.data = torch.randn(2 * 256 * 256)[: 256 * 256].view(256, 256)
        self.head = nn.Linear(256, 600, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        hidden = self.flat(self.bare(self.large(self.embedding(ids))))
        return self.head(hidden), self.small(hidden), self.wide(hidden.double())


def test_packed_layers_compute_the_same_and_are_the_old_ones_afterwards():
    torch.manual_seed(0)
    model, ids = Tied(), torch.arange(48).view(16, 3)
    before = {name: (weight.data_ptr(), weight.clone()) for name, weight in model.state_dict().items()}
    with torch.no_grad():
        expected = model(ids)
        with pytest.raises(KeyboardInterrupt), products.packed(model):
            assert {name for name, layer in model.named_modules() if "forward" in vars(layer)} == {"large", "bare"}
            assert model.large.weight.shape == (512, 256) and model.large.weight.untyped_storage().nbytes() == 4
            for given, found in zip(expected, model(ids), strict=True):
                torch.testing.assert_close(found, given, rtol=0, atol=2e-5)
            raise KeyboardInterrupt
    assert not any("forward" in vars(layer) for layer in model.modules())
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name][1])
        assert name in ("large.weight", "bare.weight") or weight.data_ptr() == before[name][0]
