"""The training loss against its formula."""
import pytest
import torch
from torch.nn import functional as F

from lightning_app.loss import Loss, build_loss


@pytest.mark.parametrize('smoothing', [0.0, 0.1])
def test_cross_entropy(smoothing):
    logits, labels = torch.randn(8, 5, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 5
    expected = F.cross_entropy(logits, labels, label_smoothing=smoothing)
    torch.testing.assert_close(build_loss(Loss('ce', smoothing))(logits, labels), expected)


@pytest.mark.parametrize('smoothing', [0.0, 0.1])
def test_binary_cross_entropy(smoothing):
    logits, labels = torch.randn(8, 5, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 5
    targets = F.one_hot(labels, 5) * (1 - smoothing) + smoothing / 5
    expected = F.binary_cross_entropy_with_logits(logits, targets)
    torch.testing.assert_close(build_loss(Loss('bce', smoothing))(logits, labels), expected)


@pytest.mark.parametrize('name', ['ce', 'bce'])
@pytest.mark.parametrize('smoothing', [1.0, 1.5, -0.1])
def test_smoothing_that_is_no_share(refused, name, smoothing):
    with refused(f'model.loss.smoothing: {smoothing}', 'share', '0.1'):
        build_loss(Loss(name, smoothing))
