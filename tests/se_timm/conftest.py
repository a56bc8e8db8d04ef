"""What the tests of the networks share."""
import pytest
import torch
from torch import nn


@pytest.fixture
def randomise():
    """Return a function that gives batch norms random statistics and scales; their initial ones hide errors."""
    def randomise(net):
        generator = torch.Generator().manual_seed(0)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
                nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
                nn.init.normal_(module.bias, 0, 0.1, generator=generator)
        return net.eval()
    return randomise
