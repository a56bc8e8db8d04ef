"""What is frozen stays what it is, to the bit, and trains in the other epochs."""
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lightning_app import ImageClassifier
from lightning_app.callbacks import FreezeBackbone, FreezeBatchNorm
from lightning_app.optim import Optim


class Changes(Callback):
    """Tells for each epoch which tensors of the network have changed in it."""

    def __init__(self):
        self.changed = []

    def on_train_epoch_start(self, trainer, pl_module):
        self.before = {name: value.clone() for name, value in pl_module.net.state_dict().items()}

    def on_train_epoch_end(self, trainer, pl_module):
        after = pl_module.net.state_dict()
        self.changed.append({name for name, value in self.before.items() if not torch.equal(value, after[name])})


@pytest.fixture
def changes(make_trainer, photo_data):
    """Return a function that trains three epochs, and returns what changed in each."""
    def run(callback, name='momentum', **arguments):
        seen = Changes()
        model = ImageClassifier(
            'test_resnet', num_classes=3, optim=Optim(name, lr=0.01, weight_decay=0.1, decay_bias_and_norm=True))
        make_trainer(max_epochs=3, callbacks=[callback, seen], val_check_interval=0.5, **arguments).fit(
            model, photo_data(batch_size=4))
        return seen.changed, set(seen.before)

    return run


def statistics(names):
    return {name for name in names if 'running' in name or 'num_batches' in name}


def norms(names):
    return {name for name in names if 'bn' in name or 'downsample.2' in name or name.startswith('conv1.1')
            or name.startswith('conv1.4')}


@pytest.mark.parametrize('name', ['momentum', 'adamw', 'rmsprop'])
def test_batch_norm_of_the_last_epochs(changes, name):
    changed, names = changes(FreezeBatchNorm(2), name)
    assert statistics(names)
    assert statistics(changed[0]) == statistics(names)
    assert changed[1] == changed[2] == names - statistics(names)


def test_weights_of_batch_norm_too(changes):
    changed, names = changes(FreezeBatchNorm(1, affine=True))
    assert changed[0] == changed[1] == names
    frozen = {name for name in names - changed[2] if name not in statistics(names)}
    assert frozen
    assert all(name.rpartition('.')[0] + '.running_mean' in names for name in frozen)
    assert {name.rpartition('.')[0] for name in frozen} == {name.rpartition('.')[0] for name in statistics(names)}


@pytest.mark.parametrize('accumulated', [1, 2])
def test_backbone_of_the_first_epochs(changes, accumulated):
    changed, names = changes(FreezeBackbone(1), accumulate_grad_batches=accumulated)
    assert changed[0] == {'fc.weight', 'fc.bias'}
    assert changed[1] == changed[2] == names


def test_backbone_of_all_epochs(changes):
    assert changes(FreezeBackbone())[0] == [{'fc.weight', 'fc.bias'}] * 3


def test_statistics_that_follow(changes):
    changed, names = changes(FreezeBackbone(train_batch_norm=True))
    assert changed == [{'fc.weight', 'fc.bias'} | statistics(names)] * 3


@pytest.mark.parametrize('make', [lambda: FreezeBatchNorm(0), lambda: FreezeBackbone(0)])
def test_nothing_to_freeze(refused, make):
    with refused('Freeze', 'nothing would be frozen', 'from 1'):
        make()
