"""What is frozen stays what it is, to the bit, and trains in the other epochs."""
import contextlib

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lightning_app import ImageClassifier
from lightning_app.callbacks import FreezeBackbone, FreezeBatchNorm
from lightning_app.optim import Optim
from se_timm.fused import operators


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
    def run(*callbacks, name='momentum', network='test_resnet', options=None, fused='auto', **arguments):
        seen = Changes()
        model = ImageClassifier(
            network, num_classes=3, network=options, fused=fused,
            optim=Optim(name, lr=0.01, weight_decay=0.1, decay_bias_and_norm=True))
        make_trainer(max_epochs=3, callbacks=[*callbacks, seen], val_check_interval=0.5, **arguments).fit(
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
    changed, names = changes(FreezeBatchNorm(2), name=name)
    assert statistics(names)
    assert statistics(changed[0]) == statistics(names)
    assert changed[1] == changed[2] == names - statistics(names)


def test_batch_norm_from_an_epoch(changes):
    changed, names = changes(FreezeBatchNorm(from_epoch=2))
    assert [len(statistics(each)) for each in changed] == [len(statistics(names))] * 2 + [0]


@pytest.mark.parametrize('backend', ['reference', 'fused'])
def test_fused_tails_keep_to_the_statistics(changes, backend, monkeypatch):
    monkeypatch.setattr(operators, 'compiler_available', lambda: False)  # plain torch takes no time to compile
    changed, names = changes(FreezeBatchNorm(1, affine=True), network='se_resnet20_cifar', fused=backend)
    assert changed[0] == changed[1] == names
    assert statistics(changed[2]) == set()
    assert {name for name in names - changed[2] if '.bn' in name} == {name for name in names if '.bn' in name}


@pytest.mark.parametrize('reverse', [False, True])
def test_two_freeze_one_after_the_other_whatever_their_order(changes, reverse):
    callbacks = [FreezeBackbone(1), FreezeBatchNorm(1)]
    changed, names = changes(*(callbacks[::-1] if reverse else callbacks))
    assert changed[0] == {'fc.weight', 'fc.bias'}
    assert changed[1] == names
    assert changed[2] == names - statistics(names)


@pytest.mark.parametrize('reverse', [False, True])
def test_what_two_freeze_is_frozen_while_either_does(changes, reverse):
    callbacks = [FreezeBackbone(2), FreezeBatchNorm(2)]
    changed, names = changes(*(callbacks[::-1] if reverse else callbacks))
    assert changed[0] == changed[1] == {'fc.weight', 'fc.bias'}
    assert changed[2] == names - statistics(names)


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


def test_network_with_two_classifiers(changes):
    changed, _ = changes(FreezeBackbone(), network='deit_tiny_distilled_patch16_224',
                         options={'img_size': 32, 'depth': 1})
    assert changed == [{'head.weight', 'head.bias', 'head_dist.weight', 'head_dist.bias'}] * 3


@pytest.mark.parametrize('make', [FreezeBackbone, lambda: FreezeBackbone(1), lambda: FreezeBatchNorm(from_epoch=0)])
@pytest.mark.filterwarnings('ignore:FreezeBatchNorm:UserWarning')
@pytest.mark.parametrize('interrupted', [False, True])
def test_everything_trains_in_a_training_that_follows(make, interrupted, make_trainer, photo_data):
    class Fails(Callback):
        def on_train_batch_end(self, *_):
            raise RuntimeError('fails')

    model = ImageClassifier('test_resnet', num_classes=3, optim=Optim('momentum', lr=0.01))
    first = make_trainer(callbacks=[make(), *([Fails()] if interrupted else [])])
    with pytest.raises(RuntimeError, match='fails') if interrupted else contextlib.nullcontext():
        first.fit(model, photo_data())
    seen = Changes()
    make_trainer(callbacks=[seen]).fit(model, photo_data())
    assert seen.changed[0] >= statistics(seen.before) | {'conv1.0.weight', 'fc.weight'}
    assert all(parameter.requires_grad for parameter in model.net.parameters())


def test_batch_norm_that_never_sees_an_image_is_said(changes):
    with pytest.warns(UserWarning, match='statistics of batch norm stay those it was built with'):
        changes(FreezeBatchNorm(3))


@pytest.mark.parametrize('make', [
    lambda: FreezeBatchNorm(0), lambda: FreezeBatchNorm(from_epoch=-1), lambda: FreezeBackbone(0)])
def test_nothing_to_freeze(refused, make):
    with refused('Freeze', 'nothing would be frozen', 'from 1'):
        make()


@pytest.mark.parametrize('arguments', [{}, {'last_epochs': 1, 'from_epoch': 1}])
def test_epochs_that_are_not_clear(refused, arguments):
    with refused('FreezeBatchNorm: last_epochs', 'each says by itself', 'give one'):
        FreezeBatchNorm(**arguments)


def test_epoch_that_never_comes(changes, refused):
    with refused('from_epoch 3', 'the training has 3 epochs', 'up to 2'):
        changes(FreezeBatchNorm(from_epoch=3))


def test_backbone_without_a_classifier(make_trainer, photo_data, refused):
    model = ImageClassifier('test_resnet', num_classes=3)
    model.net.reset_classifier(0)
    with refused('FreezeBackbone with 0 classes', 'nothing would train', 'a classifier'):
        make_trainer(callbacks=[FreezeBackbone()]).fit(model, photo_data())


def test_parameters_that_were_frozen_by_hand_stay_so(make_trainer, photo_data):
    model = ImageClassifier('test_resnet', num_classes=3)
    model.net.conv1[0].weight.requires_grad_(False)
    make_trainer(callbacks=[FreezeBackbone()]).fit(model, photo_data())
    assert [name for name, each in model.net.named_parameters() if not each.requires_grad] == ['conv1.0.weight']
