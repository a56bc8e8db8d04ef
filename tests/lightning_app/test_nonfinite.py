"""A step that is not finite leaves nothing behind but its count."""
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.utils.data import DataLoader, TensorDataset

from lightning_app import ImageClassifier
from lightning_app.optim import Optim, build_optimizer

FUSED = {'momentum', 'sgd', 'adam', 'adamw'}


class States(Callback):
    """Keeps weights, statistics and the optimiser's state after each step."""

    def __init__(self):
        self.states = []

    def on_train_start(self, trainer, pl_module):
        self.keep(trainer, pl_module)

    def on_train_batch_end(self, trainer, pl_module, *_):
        if (trainer.fit_loop.batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.keep(trainer, pl_module)

    def keep(self, trainer, pl_module):
        optimizer = [value.clone() for state in trainer.optimizers[0].state_dict()['state'].values()
                     for value in state.values() if isinstance(value, torch.Tensor)]
        self.states.append(([value.clone() for value in pl_module.net.state_dict().values()], optimizer))


def batches(broken, size=8, count=4):
    """Return a loader of images, of which those of one batch have a NaN."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(size * count, 3, 32, 32, generator=generator)
    images[broken * size, 0, 0, 0] = torch.nan
    return DataLoader(TensorDataset(images, torch.arange(size * count) % 3), batch_size=size)


def equal(first, second):
    return len(first) == len(second) and all(map(torch.equal, first, second))


@pytest.mark.parametrize('name', ['momentum', 'adamw', 'rmsprop', 'lamb'])
@pytest.mark.parametrize('broken', [0, 2])
@pytest.mark.parametrize('accumulated', [1, 2])
def test_step_is_left_out(make_trainer, name, broken, accumulated):
    states = States()
    model = ImageClassifier('test_resnet', num_classes=3, max_nonfinite_steps=1, optim=Optim(name, lr=0.01))
    make_trainer(callbacks=[states], accumulate_grad_batches=accumulated, limit_val_batches=0).fit(
        model, batches(broken))
    changed = [not equal(before[0], after[0]) for before, after in zip(states.states, states.states[1:], strict=False)]
    assert changed == [step != broken // accumulated for step in range(4 // accumulated)]
    before, after = states.states[broken // accumulated:][:2]
    assert equal(before[1], after[1]) or not before[1]  # some make their state at the first step
    assert all(value.isfinite().all() for value in states.states[-1][0])
    assert model.nonfinite.count == 1
    assert bool(model.trainer.optimizers[0].defaults.get('fused')) == (name in FUSED)


def test_momentum_after_a_first_step_that_was_left_out_is_that_of_a_first_step():
    torch.manual_seed(0)
    results = []
    for left_out in (False, True):
        layer = torch.nn.Linear(3, 2)
        torch.nn.init.ones_(layer.weight)
        torch.nn.init.ones_(layer.bias)
        optimizer = build_optimizer(layer, Optim('momentum', lr=0.1), 0.1)
        for found in [1.0] * left_out + [0.0, 0.0]:
            optimizer.zero_grad()
            layer(torch.ones(1, 3)).sum().backward()
            optimizer.found_inf = torch.tensor(found)
            optimizer.step()
        results.append(layer.weight.detach().clone())
    assert torch.equal(*results)


def test_step_that_a_gradient_scaler_leaves_out_is_counted_for_its_loss(make_trainer):
    scaled = MixedPrecision('16-mixed', 'cpu', torch.amp.GradScaler('cpu', init_scale=4.0))
    states = States()
    model = ImageClassifier('test_resnet', num_classes=3, max_nonfinite_steps=1, optim=Optim(lr=0.01))
    make_trainer(callbacks=[states], plugins=[scaled], limit_val_batches=0).fit(model, batches(1))
    assert equal(*(state[0] for state in states.states[1:3]))
    assert scaled.scaler.get_scale() == 2.0
    assert model.nonfinite.count == 1


def test_one_more_than_allowed_ends_the_training(make_trainer, refused):
    loader = batches(0)
    loader.dataset.tensors[0][8] = torch.nan
    model = ImageClassifier('test_resnet', num_classes=3, max_nonfinite_steps=1)
    with refused('not finite in 2 steps', 'max_nonfinite_steps is 1', 'lower model.optim.lr'):
        make_trainer(limit_val_batches=0).fit(model, loader)


def test_steps_before_an_interruption_count(make_trainer, tmp_path, refused):
    first = make_trainer(limit_val_batches=0)
    first.fit(ImageClassifier('test_resnet', num_classes=3, max_nonfinite_steps=1), batches(0))
    first.save_checkpoint(tmp_path / 'one.ckpt', weights_only=False)
    model = ImageClassifier('test_resnet', num_classes=3, max_nonfinite_steps=1)
    with refused('not finite in 2 steps', 'max_nonfinite_steps is 1', 'lower model.optim.lr'):
        make_trainer(max_epochs=2, limit_val_batches=0).fit(
            model, batches(0), ckpt_path=tmp_path / 'one.ckpt', weights_only=True)
    make_trainer(limit_val_batches=0).fit(model, batches(0))  # another training
    assert model.nonfinite.count == 1
