"""What only a CUDA device can show: `make gpu`."""

import pytest
import torch

from moesaic.lora.mix import mix
from tests import tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("backend", ["rank", "grouped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backends_agree_with_the_loop_on_cuda(backend: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, A, B = (torch.randn(s, device="cuda", dtype=dtype) for s in ((100, 64), (32, 64), (32, 48)))
    weights = torch.rand(100, 4, device="cuda")
    weights[weights < 0.4] = 0
    wanted = mix(x.float(), A.float(), B.float(), weights, backend="reference")
    got = mix(x, A, B, weights, backend=backend).float()
    assert (got - wanted).abs().max() < (1e-3 if dtype == torch.float32 else 2**-6) * wanted.abs().max()


def test_a_training_step_on_cuda_equals_the_cpus(method: str) -> None:
    gradients = []
    for device in ("cpu", "cuda"):
        model = tiny.wrap(tiny.llama(), tiny.small(method, lora_dropout=0.0), seed=0).to(device).train()
        inputs = {k: v.to(device) for k, v in tiny.batch(model, rows=3, tokens=9, seed=0, labels=True).items()}
        model(**inputs).loss.backward()
        gradients.append({n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, wanted in gradients[0].items():
        assert torch.allclose(gradients[1][name], wanted, rtol=1e-2, atol=1e-5), name
