"""Cross-entropy with its gradient made beside it, against torch's."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from moetrain.model import loss
from moetrain.model.loss import cross_entropy as ours

VALID = {"all": [True] * 7, "some": [True, False, True, True, False, False, True], "none": [False] * 7}


@pytest.mark.parametrize("part", [1, 30, 1 << 20])
@pytest.mark.parametrize("valid", VALID.values(), ids=list(VALID))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_loss_and_gradient_are_torchs(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tolerance: float, valid: list[bool], part: int
) -> None:
    monkeypatch.setattr(loss, "CPU_PART", part)
    generator = torch.Generator().manual_seed(1)
    logits = (5 * torch.randn(7, 11, generator=generator)).to(dtype).requires_grad_()
    label, mask = torch.randint(0, 11, (7,), generator=generator), torch.tensor(valid)
    scaled, mine = ours(logits.clone(), label, mask, 0.3)
    wide = logits if dtype == torch.float64 else logits.float()
    theirs = cross_entropy(wide, label.masked_fill(~mask, -100), ignore_index=-100, reduction="sum")
    assert mine.dtype == theirs.dtype and not mine.requires_grad
    torch.testing.assert_close(mine, theirs.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(scaled, 0.3 * theirs, rtol=1e-6, atol=0)
    (grad,), (expected,) = (torch.autograd.grad(0.7 * one, logits) for one in (scaled, 0.3 * theirs))
    assert grad.dtype == dtype
    torch.testing.assert_close(grad, expected, rtol=tolerance, atol=tolerance)


def test_a_gradient_in_low_precision_is_rounded_once() -> None:
    logits = torch.randn(64, 11).to(torch.bfloat16).requires_grad_()
    label, mask, scale = torch.arange(64) % 11, torch.ones(64, dtype=torch.bool), 1 / (3 << 14)
    grads = []
    for one in (ours(logits.clone(), label, mask, scale)[0], cross_entropy(logits.float(), label, reduction="sum") * scale):
        grads += torch.autograd.grad(one, logits)
    torch.testing.assert_close(grads[0], grads[1], rtol=2**-8, atol=0)
    assert (grads[0] != grads[1]).float().mean() < 0.02


def test_a_label_that_does_not_count_may_be_anything() -> None:
    logits = torch.randn(3, 5).requires_grad_()
    with torch.no_grad():
        logits[1] = float("nan")
    scaled, nats = ours(logits.clone(), torch.tensor([4, -1, 0]), torch.tensor([True, False, True]), 0.5)
    scaled.backward()
    assert torch.isfinite(nats) and logits.grad is not None and torch.isfinite(logits.grad).all() and not logits.grad[1].any()


def test_only_one_backward_pass_and_none_without_gradient() -> None:
    logits = torch.randn(3, 5).requires_grad_()
    arguments = torch.tensor([4, 1, 0]), torch.tensor([True, False, True]), 1.0
    scaled, _ = ours(logits.clone(), *arguments)
    scaled.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="second backward"):
        scaled.backward()
    with torch.no_grad():
        assert not ours(logits, *arguments)[0].requires_grad
    assert not ours(logits.detach(), *arguments)[0].requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_takes_the_place_of_the_logits_and_without_one_they_stay(dtype: torch.dtype) -> None:
    hidden, arguments = torch.randn(3, 5).to(dtype).requires_grad_(), (torch.tensor([4, 1, 0]), torch.tensor([True, False, True]), 0.5)
    logits = 2 * hidden
    before = logits.detach().clone()
    with torch.no_grad():
        ours(logits, *arguments)
    assert torch.equal(logits, before)
    scaled, _ = ours(logits, *arguments)
    (grad,) = torch.autograd.grad(scaled, logits)
    assert grad.data_ptr() == logits.data_ptr() and not grad.requires_grad
    kept = torch.sigmoid(hidden)  # an operator that needs its result again
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        ours(kept, *arguments)[0].backward()
