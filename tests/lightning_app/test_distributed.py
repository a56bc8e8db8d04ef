"""Two processes on the CPU: the numbers of one process, one folder, one W&B run."""
import json
import os
import runpy
import sys
from pathlib import Path

import pytest
import torch

from lightning_app.cli import main

pytestmark = pytest.mark.usefixtures('in_tmp_path')

TWO = ['--trainer.accelerator=cpu', '--trainer.devices=2', '--trainer.strategy=ddp']

# Writes what one step of 8 photos does to a network whose batch norm is in evaluation mode, as numbers of this process.
STEP = '''
import sys
import torch
from lightning.pytorch import Callback, Trainer
from lightning_app import ImageClassifier, ImageNetDataModule
from lightning_app.optim import Optim

root, devices, out = sys.argv[1], int(sys.argv[2]), sys.argv[3]


class Gradients(Callback):
    def on_train_batch_start(self, trainer, model, batch, batch_idx):
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()

    def on_before_optimizer_step(self, trainer, model, optimizer):
        if trainer.is_global_zero:
            torch.save({name: value.grad for name, value in model.net.named_parameters()}, out)


if __name__ == '__main__':
    torch.manual_seed(0)
    model = ImageClassifier('se_resnet20_cifar', num_classes=3, optim=Optim(lr=1e-30))
    data = ImageNetDataModule(root=root, batch_size=8, image_size=32, num_workers=0)
    Trainer(accelerator='cpu', devices=devices, strategy='ddp' if devices > 1 else 'auto', max_epochs=1, max_steps=1,
            logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            limit_val_batches=0, callbacks=[Gradients()]).fit(model, data)
'''


def count(percent):
    """Return how many of seven images `percent` are."""
    images = percent * 7 / 100
    assert images == pytest.approx(round(images), abs=1e-9)
    return round(images)


@pytest.mark.slow
def test_gradients_are_those_of_the_double_batch(tmp_path, photos, program, monkeypatch):
    (tmp_path / 'step.py').write_text(STEP)
    program('step.py', photos, 2, '2.pt', module=None)
    monkeypatch.setattr(sys, 'argv', ['step.py', str(photos), '1', '1.pt'])
    runpy.run_path('step.py', run_name='__main__')
    one, two = torch.load('1.pt'), torch.load('2.pt')
    assert one.keys() == two.keys()
    assert any(value.abs().max() > 0.01 for value in one.values())
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_training_of_two_processes_is_that_of_one(
        on_photos, photos, program, read_csv, tmp_path, write_yaml, read_wandb):
    # a network without batch norm, whose statistics are those of each process's images; seven images to validate
    for index in range(0, 24, 6):
        (photos / 'train' / 'ant' / f'train_{index:02}.png').write_bytes(b'no image')
    loggers = write_yaml('loggers.yaml', {'trainer': {
        'logger': [{'class_path': f'lightning_app.logger.{name}'} for name in ('CsvLogger', 'WandbLogger')],
        'callbacks': [{'class_path': f'lightning_app.callbacks.{name}'} for name in ('NetworkSummary', 'ResultLine')]
        + [{'class_path': 'ModelCheckpoint', 'init_args': {'filename': 'best'}}]}})
    args = ['fit', *on_photos, '--config', loggers, '--model.name=test_convnext', '--model.optim.lr=0.02',
            '--data.eval_batch_size=4']
    done = program(*args, *TWO, '--trainer.default_root_dir=two')
    one = main([*args, '--trainer.default_root_dir=one']).trainer.callback_metrics

    # one folder, one run, one line of each kind
    assert os.listdir('two') == ['version_0']
    folder = tmp_path / 'two' / 'version_0'
    assert sorted(path.name for path in folder.iterdir() if path.name != 'wandb') == [
        'checkpoints', 'config.yaml', 'hparams.yaml', 'launch.txt', 'metrics.csv']
    assert [path.name for path in (folder / 'checkpoints').iterdir()] == ['best.ckpt']
    kinds = [record.WhichOneof('record_type') for record in read_wandb(folder)]
    assert kinds.count('run') == 1
    assert 'history' in kinds
    assert (done.stdout + done.stderr).count('best: top-1') == 1
    assert (done.stdout + done.stderr).count('test_convnext: ') == 1
    assert 'replaced, in all epochs: 4 (' in done.stdout  # by both processes
    assert 'all_gather is deprecated' not in done.stderr

    # the same training
    states = [torch.load(f'{name}/version_0/checkpoints/best.ckpt', weights_only=True)['state_dict']
              for name in ('one', 'two')]
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-4, atol=1e-6, msg=name)

    # the same validation: counts exactly, the loss but for the difference of the weights above
    two = {name: read_csv(folder, f'val/{name}')[-1][1] for name in ('loss', 'top1', 'top5')}
    for name in ('top1', 'top5'):
        assert count(two[name]) == count(float(one[f'val/{name}']))
    assert two['loss'] == pytest.approx(float(one['val/loss']), abs=1e-5)

    # the same weights in one process
    alone = main(['validate', '--ckpt_path', str(folder / 'checkpoints' / 'best.ckpt')]).trainer.callback_metrics
    assert two['loss'] == pytest.approx(float(alone['val/loss']), abs=1e-6)
    assert (two['top1'], two['top5']) == (float(alone['val/top1']), float(alone['val/top5']))


# A loss that is not finite in the first of three steps, on the second process, which is looked for at the end.
NONFINITE = '''
import sys
from lightning.pytorch import Trainer
from lightning_app import ImageClassifier, ImageNetDataModule


class Broken(ImageClassifier):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.nonfinite.found += self.global_rank == 1 and batch_idx == 0
        return loss


if __name__ == '__main__':
    Trainer(accelerator='cpu', devices=2, strategy='ddp', max_epochs=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, log_every_n_steps=50,
    ).fit(Broken('test_resnet', num_classes=3),
          ImageNetDataModule(root=sys.argv[1], batch_size=8, image_size=32, num_workers=0))
'''


@pytest.mark.slow
def test_loss_that_is_not_finite_in_one_process_is_found_and_counted_once(tmp_path, photos, program):
    (tmp_path / 'broken.py').write_text(NONFINITE)
    done = program('broken.py', photos, module=None, check=False)
    assert done.returncode != 0
    assert 'train/loss: not finite in 1 steps up to step 3' in done.stderr


# Tells of each epoch which tensors changed in it, with a teacher, an average, and parts that are frozen for a time.
FROZEN = '''
import json
import sys
import torch
from lightning.pytorch import Callback, Trainer
from lightning_app import ImageClassifier, ImageNetDataModule
from lightning_app.callbacks import FreezeBackbone, FreezeBatchNorm, WeightEMA
from lightning_app.distillation import Distill
from lightning_app.optim import Optim


OPTIM = Optim(lr=0.01, weight_decay=0.1, decay_bias_and_norm=True)  # which moves all that is not frozen


class Changes(Callback):
    changed = []

    def on_train_epoch_start(self, trainer, model):
        self.before = {name: value.clone() for name, value in model.net.state_dict().items()}

    def on_train_epoch_end(self, trainer, model):
        after = model.net.state_dict()
        self.changed.append([name for name, value in self.before.items() if not torch.equal(value, after[name])])
        sums = trainer.strategy.all_gather(torch.stack([value.double().sum() for value in model.net.parameters()]))
        assert torch.equal(*sums)
        assert not any('teacher' in name for name, _ in trainer.model.named_parameters())
        if trainer.is_global_zero:
            with open('changed.json', 'w') as file:
                json.dump([self.changed, list(self.before)], file)


if __name__ == '__main__':
    distill = Distill('test_resnet', {'checkpoint_path': sys.argv[2], 'num_classes': 3})
    Trainer(accelerator='cpu', devices=2, strategy='ddp', max_epochs=3, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
            callbacks=[WeightEMA(), FreezeBackbone(1), FreezeBatchNorm(1), Changes()],
    ).fit(ImageClassifier('test_resnet', num_classes=3, optim=OPTIM, distill=distill),
          ImageNetDataModule(root=sys.argv[1], batch_size=8, image_size=32, num_workers=0))
'''


@pytest.mark.slow
def test_frozen_parts_and_a_teacher_in_two_processes(tmp_path, photos, program, weights):
    (tmp_path / 'frozen.py').write_text(FROZEN)
    program('frozen.py', photos, weights().partition('=')[2], module=None)
    changed, names = json.loads(Path('changed.json').read_text())
    statistics = {name for name in names if 'running' in name or 'num_batches' in name}
    assert set(changed[0]) == {'fc.weight', 'fc.bias'}
    assert set(changed[1]) == set(names)
    assert set(changed[2]) == set(names) - statistics


@pytest.mark.slow
def test_validation_of_two_processes_counts_each_image_once(on_photos, program, read_csv):
    # seven images, and batch norm
    cli = main(['fit', *on_photos, '--model.name=se_resnet20_cifar', '--trainer.max_epochs=2'])
    checkpoint = str(next(Path('runs').rglob('*.ckpt')))
    args = ['validate', '--ckpt_path', checkpoint, '--data.eval_batch_size=4',
            '--trainer.logger=lightning_app.logger.CsvLogger']
    program(*args, *TWO, '--trainer.logger.save_dir=two')
    one = {name: float(cli.trainer.callback_metrics[f'val/{name}']) for name in ('loss', 'top1', 'top5')}
    two = {name: read_csv('two', f'val/{name}')[-1][1] for name in one}
    assert count(two['top1']) == count(one['top1'])
    assert count(two['top5']) == count(one['top5']) == 7
    assert two['loss'] == pytest.approx(one['loss'], abs=1e-6)


@pytest.mark.slow
def test_error_of_one_process_ends_both(on_photos, program, photos):
    next((photos / 'val' / 'ant').iterdir()).write_bytes(b'no image')
    done = program('fit', *on_photos, *TWO, check=False, timeout=200)
    assert done.returncode != 0
    # the other process loses its peer, of which torch tells in its own way
    assert 'why: it cannot be read' in done.stderr
    assert 'do:  replace or remove it' in done.stderr


@pytest.mark.slow
def test_batch_that_two_processes_cannot_share_is_refused(on_photos, program):
    done = program('fit', *on_photos, '--data.batch_size=7', *TWO, check=False, timeout=200)
    assert done.returncode != 0
    assert 'data.batch_size: 7' in done.stderr
    assert 'take a multiple of 2' in done.stderr
    assert 'Traceback' not in done.stderr


@pytest.mark.slow
def test_validation_by_the_clock_of_each_process_is_refused(on_photos, program):
    """One would validate while the other trains, for ever."""
    done = program('fit', *on_photos, *TWO, '--trainer.val_check_interval=00:00:00:01', check=False)
    assert done.returncode != 0
    assert 'trainer.val_check_interval: 1 seconds, with 2 processes' in done.stderr
    assert 'count batches' in done.stderr
