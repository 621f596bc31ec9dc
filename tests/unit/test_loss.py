"""Cross-entropy with its gradient made beside it, against torch's."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from moetrain.model import loss
from moetrain.model.loss import cross_entropy_sum

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
    mine = cross_entropy_sum(logits, label, mask)
    wide = logits if dtype == torch.float64 else logits.float()
    theirs = cross_entropy(wide, label.masked_fill(~mask, -100), ignore_index=-100, reduction="sum")
    assert mine.dtype == theirs.dtype
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=0)
    (grad,), (expected,) = (torch.autograd.grad(0.3 * one, logits) for one in (mine, theirs))
    assert grad.dtype == dtype
    torch.testing.assert_close(grad, expected, rtol=tolerance, atol=tolerance)


def test_a_label_that_does_not_count_may_be_anything() -> None:
    logits = torch.randn(3, 5).requires_grad_()
    with torch.no_grad():
        logits[1] = float("nan")
    nats = cross_entropy_sum(logits, torch.tensor([4, -1, 0]), torch.tensor([True, False, True]))
    assert torch.isfinite(nats)


def test_only_one_backward_pass_and_none_without_gradient() -> None:
    logits = torch.randn(3, 5).requires_grad_()
    arguments = torch.tensor([4, 1, 0]), torch.tensor([True, False, True])
    nats = cross_entropy_sum(logits, *arguments)
    nats.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="second backward"):
        nats.backward()
    with torch.no_grad():
        assert not cross_entropy_sum(logits, *arguments).requires_grad
    assert not cross_entropy_sum(logits.detach(), *arguments).requires_grad
