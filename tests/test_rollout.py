"""GPT-2 writing the LOA step by step, with gradients: the same however much of it is computed again."""

import pytest
import torch
from torch import Tensor

from stages.translator.model import generate_loa
from stages.variants import resolve


def rollout(segment: int, tokens: int = 40, dropout: float = 0.1) -> tuple[Tensor, dict[str, Tensor], int]:
    """The LOA, its gradients, and the bytes that were kept for the way back."""
    from dataclasses import replace

    config = replace(resolve("audioldm2-full", tiny=True).translator, dropout=dropout)
    torch.manual_seed(0)
    model = config.build(tokens).train()
    states = torch.randn(2, 5, config.width, requires_grad=True)
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[1, 3:] = 0
    kept = dict[int, int]()

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loa = generate_loa(model, states, mask, tokens, segment)
    (loa**2).mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loa.detach(), gradients | {"states": states.grad}, sum(kept.values())


@pytest.mark.parametrize("segment", [1, 7, 16])
def test_segments_change_nothing(segment: int) -> None:
    """Neither the vectors nor a gradient, dropout included: its draws are repeated."""
    whole, expected, _ = rollout(1000)
    loa, gradients, _ = rollout(segment)
    assert torch.equal(loa, whole) and gradients.keys() == expected.keys() and len(gradients) > 20
    for name, gradient in gradients.items():
        # Sums over the steps are grouped otherwise: float32 rounding.
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-7)


def test_segments_keep_a_fraction() -> None:
    _, _, whole = rollout(1000, tokens=128, dropout=0.0)
    _, _, parts = rollout(16, tokens=128, dropout=0.0)
    assert parts < whole / 4, (parts, whole)


def test_without_gradients_nothing_is_computed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.translator.model.checkpoint", lambda *_, **__: pytest.fail("not without gradients"))
    with torch.no_grad():
        config = resolve("audioldm2-full", tiny=True).translator
        loa = generate_loa(config.build(20).eval(), torch.randn(1, 3, config.width), torch.ones(1, 3, dtype=torch.long), 20, 4)
    assert loa.shape == (1, 20, config.width)
