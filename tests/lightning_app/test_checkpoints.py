"""Checkpoint files on disks that are full, and files that are damaged in every way."""
import contextlib
import os
import random
import signal
import stat
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from lightning_app import ImageClassifier
from lightning_app.callbacks import BestCheckpoint, LastCheckpoint, ResultLine
from lightning_app.checkpoints import CheckpointFiles, damage, load_checkpoint, newest_whole

CONTENT = {'state_dict': {'weight': torch.arange(5000.0)}, 'pytorch-lightning_version': '2.6', 'epoch': 3}


@pytest.fixture
def files():
    return CheckpointFiles()


def test_file_is_what_was_saved(files, tmp_path):
    path = tmp_path / 'new' / 'a.ckpt'
    files.save_checkpoint(CONTENT, path)
    assert [file.name for file in path.parent.iterdir()] == ['a.ckpt']
    for loaded in (files.load_checkpoint(path), load_checkpoint(path)):
        assert torch.equal(loaded['state_dict']['weight'], CONTENT['state_dict']['weight'])
        assert loaded['epoch'] == 3


def test_full_disk_costs_neither_the_old_file_nor_another(files, tmp_path, full_disk):
    for name in ('a', 'b'):
        files.save_checkpoint({**CONTENT, 'epoch': name}, tmp_path / f'{name}.ckpt')
    with full_disk(), pytest.warns(UserWarning, match=r'a.ckpt: not written .*older ones are kept'):
        files.save_checkpoint({**CONTENT, 'epoch': 'new'}, tmp_path / 'a.ckpt')
    assert files.failed == tmp_path / 'a.ckpt'
    files.remove_checkpoint(tmp_path / 'b.ckpt')
    assert sorted(file.name for file in tmp_path.iterdir()) == ['a.ckpt', 'b.ckpt']
    assert files.load_checkpoint(tmp_path / 'a.ckpt')['epoch'] == 'a'
    files.save_checkpoint({**CONTENT, 'epoch': 'new'}, tmp_path / 'a.ckpt')
    files.remove_checkpoint(tmp_path / 'b.ckpt')
    assert files.load_checkpoint(tmp_path / 'a.ckpt')['epoch'] == 'new'
    assert not (tmp_path / 'b.ckpt').exists()


def test_error_that_is_none_of_the_disk_is_raised(files, tmp_path):
    files.save_checkpoint(CONTENT, tmp_path / 'a.ckpt')
    with pytest.raises(Exception, match='pickle'):
        files.save_checkpoint({'state_dict': lambda: None}, tmp_path / 'a.ckpt')
    assert [file.name for file in tmp_path.iterdir()] == ['a.ckpt']
    assert damage(tmp_path / 'a.ckpt') is None


@pytest.mark.parametrize('seed', range(20))
def test_file_that_was_cut_off_is_not_whole(files, tmp_path, seed):
    path = tmp_path / 'a.ckpt'
    files.save_checkpoint(CONTENT, path)
    data = path.read_bytes()
    path.write_bytes(data[:random.Random(seed).randrange(len(data))])
    assert 'cut off or altered' in damage(path)


def test_file_of_another_kind_is_not_called_cut_off(tmp_path, refused):
    path = tmp_path / 'net.onnx'
    path.write_bytes(b'\x08\x0a\x12\x07pytorch')
    with refused(f'ckpt_path: {path}', 'a file of another kind, or altered', 'take another checkpoint'):
        load_checkpoint(path)


@pytest.mark.parametrize('seed', range(20))
def test_altered_value_is_found(files, tmp_path, seed, refused):
    path = tmp_path / 'a.ckpt'
    files.save_checkpoint(CONTENT, path)
    data = bytearray(path.read_bytes())
    values = CONTENT['state_dict']['weight'].numpy().tobytes()
    data[data.index(values) + random.Random(seed).randrange(len(values))] ^= 1 << seed % 8
    path.write_bytes(data)
    assert 'the checksum of' in damage(path)
    with refused(str(path), 'it was altered', 'none that is whole'):
        files.load_checkpoint(path)


def test_newest_that_is_whole(files, tmp_path):
    paths = [tmp_path / f'{name}.ckpt' for name in 'abc']
    for path in paths:
        files.save_checkpoint(CONTENT, path)
    paths[2].write_bytes(b'')
    with pytest.warns(UserWarning, match=r'c.ckpt: passed over'):
        assert newest_whole(paths) == paths[1]
    assert newest_whole([]) is None


@pytest.mark.filterwarnings('error')
def test_checkpoints_that_a_training_removes_meanwhile_are_none(files, tmp_path):
    paths = [tmp_path / f'checkpoints/last-step={step:08d}.ckpt' for step in (1, 2, 3)]
    files.save_checkpoint(CONTENT, paths[1])
    assert newest_whole(paths) == paths[1]
    assert newest_whole([paths[0], paths[2]]) is None


def test_best_is_of_weights_that_were_validated(make_trainer, photo_data, capsys, caplog):
    """The last two of five steps, three an epoch, were not."""
    def run(steps, **options):
        best = BestCheckpoint('val/loss', keep=9)
        trainer = make_trainer(max_epochs=3, max_steps=steps, enable_checkpointing=True, callbacks=[best, ResultLine()],
                               **options)
        trainer.fit(ImageClassifier('test_resnet', num_classes=3), photo_data())
        return sorted(Path(path).name for path in best.best_k_models)

    assert run(5) == ['best-epoch=0-step=3.ckpt']
    assert 'trainer.max_steps: 5 ends the training before the 9 steps of trainer.max_epochs: 3' in caplog.text
    assert 'epoch 0' in capsys.readouterr().out
    caplog.clear()
    assert run(2) == []
    assert 'best: none, as the training ended before a validation' in capsys.readouterr().out
    assert 'could not find the monitored key' not in caplog.text
    caplog.clear()
    assert len(run(6)) == 2
    assert 'before the 9 steps' in caplog.text
    assert 'is not evaluated' not in caplog.text  # the end of an epoch
    caplog.clear()
    assert len(run(6, check_val_every_n_epoch=4)) == 0
    assert 'is not evaluated' in caplog.text
    for steps, every, validated in ((4, 2, True), (5, 2, False), (6, 4, False)):  # over the epochs
        caplog.clear()
        run(steps, check_val_every_n_epoch=None, val_check_interval=every)
        assert ('is not evaluated' in caplog.text) is not validated
    for steps, validated in ((5, True), (4, False), (6, False)):  # after two of the three steps of each epoch
        caplog.clear()
        run(steps, val_check_interval=2)
        assert ('is not evaluated' in caplog.text) is not validated
    caplog.clear()
    assert len(run(9)) == 3
    assert 'max_steps' not in caplog.text.replace('`max_steps=9` reached', '')


def test_best_by_what_no_validation_gives_is_that_of_each_epoch(make_trainer, photo_data, capsys):
    class Own(ImageClassifier):
        def on_train_epoch_end(self):
            super().on_train_epoch_end()
            self.log('mine', float(self.global_step))

    for steps, kept in ((9, 3), (7, 3)):
        best = BestCheckpoint('mine', keep=9)
        trainer = make_trainer(max_epochs=3, max_steps=steps, enable_checkpointing=True, callbacks=[best])
        trainer.fit(Own('test_resnet', num_classes=3), photo_data())
        assert sorted(map(float, best.best_k_models.values())) == [3, 6, steps][:kept]


def test_training_that_is_validated_by_other_metrics_is_validated(make_trainer, photo_data, capsys, refused):
    class Own(ImageClassifier):
        def validation_step(self, batch, batch_idx):
            self.log('val/own', 0.5, batch_size=len(batch[1]))

    best = None
    for _ in range(2):  # the second is at its end already
        callbacks = [BestCheckpoint('val/own'), ResultLine()]
        make_trainer(enable_checkpointing=True, num_sanity_val_steps=1, callbacks=callbacks).fit(
            Own('test_resnet', num_classes=3), photo_data(), ckpt_path=best)
        assert 'best: none' not in capsys.readouterr().out
        best = callbacks[0].best_model_path
    with refused('val/top1', '', 'val/own') as error:
        make_trainer(enable_checkpointing=True, num_sanity_val_steps=1, callbacks=[BestCheckpoint()]).fit(
            Own('test_resnet', num_classes=3), photo_data())
    assert 'val/top1_best' not in str(error)


def test_best_so_far_of_a_top1_of_the_user_is_not_to_be_had(make_trainer, photo_data, refused):
    class Own(ImageClassifier):
        def validation_step(self, batch, batch_idx):
            self.log('val/top1', 50.0, batch_size=len(batch[1]))

    for monitor in ('val/top1_best', 'val/top1'):
        run = make_trainer(enable_checkpointing=True, num_sanity_val_steps=1, callbacks=[BestCheckpoint(monitor)])
        with refused('val/top1_best', '', 'val/top1') if monitor == 'val/top1_best' else contextlib.nullcontext():
            run.fit(Own('test_resnet', num_classes=3), photo_data())


def test_foreign_file_is_refused(tmp_path, refused):
    torch.save({'state_dict': {}}, tmp_path / 'weights.ckpt')
    with refused('weights.ckpt', 'no checkpoint of a training', 'model.network.checkpoint_path'):
        load_checkpoint(tmp_path / 'weights.ckpt')


def test_file_and_its_name_are_on_the_disk(files, tmp_path, monkeypatch):
    """Else a file that is renamed may be empty after the power has failed, and the older one gone."""
    synced, sync = [], os.fsync

    def fsync(descriptor):
        sync(descriptor)
        status = os.fstat(descriptor)
        synced.append(([file.name for file in tmp_path.iterdir()],
                       'folder' if stat.S_ISDIR(status.st_mode) else status.st_size))

    monkeypatch.setattr(os, 'fsync', fsync)
    files.save_checkpoint(CONTENT, tmp_path / 'a.ckpt')
    assert synced == [(['.unfinished'], (tmp_path / 'a.ckpt').stat().st_size), (['a.ckpt'], 'folder')]


def test_last_moment_of_a_run_comes_before_its_best(files, tmp_path):
    """The best, of a later step, may be of a training that was abandoned for this one."""
    for name, step in (('hpc_ckpt_1', 3), ('hpc_ckpt_2', 6), ('checkpoints/best', 9)):
        files.save_checkpoint({**CONTENT, 'global_step': step}, tmp_path / f'{name}.ckpt')
    assert newest_whole(tmp_path.rglob('*.ckpt')) == tmp_path / 'hpc_ckpt_2.ckpt'


class Asked(Callback):
    """Sends this process SIGINT in its second step."""

    def on_before_backward(self, trainer, *_):
        if trainer.global_step == 1:
            os.kill(os.getpid(), signal.SIGINT)


class Fails(Callback):
    """Fails in the validation after two steps."""

    def on_validation_batch_start(self, trainer, *_):
        if trainer.global_step == 2:
            raise RuntimeError('fails')


@pytest.mark.parametrize(('callback', 'end'), [
    (Callback(), contextlib.nullcontext()), (Asked(), pytest.raises(SystemExit)),
    (Fails(), pytest.raises(RuntimeError))], ids=['ended', 'asked to stop', 'failed'])
def test_evaluation_after_a_training_is_none_of_its_steps(callback, end, make_trainer, photo_data, tmp_path):
    """It writes no checkpoint, and is not stopped."""
    model, data = ImageClassifier('test_resnet', num_classes=3), photo_data(batch_size=4)
    trainer = make_trainer(
        enable_checkpointing=True, val_check_interval=2, callbacks=[callback, LastCheckpoint(every_n_steps=2)])
    with end:
        trainer.fit(model, data)
    before = {path: path.read_bytes() for path in tmp_path.rglob('*.ckpt')}
    trainer.callbacks.remove(callback)
    trainer.validate(model, data, verbose=False)
    assert {path: path.read_bytes() for path in tmp_path.rglob('*.ckpt')} == before


@pytest.mark.parametrize(('plugins', 'most'), [([], 2), ([AsyncCheckpointIO()], 9)], ids=['at once', 'meanwhile'])
def test_older_checkpoints_are_removed(make_trainer, photo_data, tmp_path, plugins, most):
    """Also where they are written meanwhile, by another thread: then those stay that came after the last removal."""
    trainer = make_trainer(
        max_epochs=3, enable_checkpointing=True, plugins=plugins, callbacks=[LastCheckpoint(every_n_steps=1)])
    trainer.fit(ImageClassifier('test_resnet', num_classes=3), photo_data(batch_size=4))
    names = sorted(path.name for path in tmp_path.rglob('last-step=*.ckpt'))
    assert 2 <= len(names) <= most < trainer.global_step == 18
    assert names[-1] == f'last-step={trainer.global_step:08}.ckpt'


class WritesNothing(CheckpointFiles):
    """As on a full disk, of which it says so and goes on."""

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        pass


def test_nothing_is_removed_until_something_was_written(make_trainer, photo_data, tmp_path):
    """Also not what a training that was abandoned has, where one goes on from an earlier step."""
    for keep, plugins, start in ((9, [], None), (1, [WritesNothing()], 2)):
        trainer = make_trainer(max_epochs=2, enable_checkpointing=True, plugins=plugins,
                               callbacks=[LastCheckpoint(every_n_steps=1, keep=keep)])
        trainer.fit(ImageClassifier('test_resnet', num_classes=3), photo_data(), weights_only=True, ckpt_path=start and
                    next(tmp_path.rglob(f'last-step={start:08}.ckpt')))
        assert len(list(tmp_path.rglob('last-step=*.ckpt'))) == trainer.global_step == 6


def test_signals_are_given_back(make_trainer, photo_data):
    numbers = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1
    before = [signal.getsignal(number) for number in numbers]
    trainer = make_trainer(enable_checkpointing=True, callbacks=[LastCheckpoint()])
    trainer.fit(ImageClassifier('test_resnet', num_classes=3), photo_data())
    assert [signal.getsignal(number) for number in numbers] == before
    trainer.validate(ImageClassifier('test_resnet', num_classes=3), photo_data(), verbose=False)
    assert [signal.getsignal(number) for number in numbers] == before


class Fill(Callback):
    """Fills the disk from one epoch to another."""

    def __init__(self, full_disk, first, last):
        self.full_disk = full_disk
        self.full, self.first, self.last = contextlib.ExitStack(), first, last

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.first:
            self.full.enter_context(self.full_disk(100_000))
        if trainer.current_epoch == self.last:
            self.full.close()


class Rising(ImageClassifier):
    """Finds a better accuracy in each epoch."""

    def on_validation_epoch_end(self):
        self.log_dict({'val/top1': float(self.current_epoch), 'val/top5': 100.0, 'val/loss': 1.0})


@pytest.mark.filterwarnings('ignore:.*not written:UserWarning')
def test_training_goes_on_while_the_disk_is_full(make_trainer, photo_data, tmp_path, full_disk):
    best, fill = BestCheckpoint(), Fill(full_disk, 1, 3)
    seen = []

    class Look(Callback):
        def on_train_epoch_end(self, trainer, pl_module: LightningModule):
            kept = sorted(tmp_path.rglob('*.ckpt'))
            seen.append(([path.name for path in kept], Path(best.best_model_path).exists(),
                         [torch.load(path, weights_only=True)['global_step'] for path in kept]))

    best.dirpath = str(tmp_path / 'python' / 'checkpoints')
    make_trainer(
        max_epochs=4, enable_checkpointing=True, plugins=[CheckpointFiles()],
        callbacks=[fill, best, ResultLine(), Look(), LastCheckpoint()]).fit(
            Rising('test_resnet', num_classes=3), photo_data())
    # of the epochs before: what was written before the disk was full
    first = ['best.ckpt', 'last-step=00000002.ckpt', 'last-step=00000003.ckpt']
    assert seen[1:3] == [(first, True, [3, 2, 3])] * 2
    assert best.best_model_score == 3
    assert load_checkpoint(best.best_model_path)['global_step'] == 12
    assert sorted(path.name for path in tmp_path.rglob('*.ckpt')) == [
        'best.ckpt', 'last-step=00000011.ckpt', 'last-step=00000012.ckpt']


@pytest.mark.parametrize('keep', [1, 2])
def test_best_by_two_metrics_are_two_files(make_trainer, photo_data, tmp_path, keep):
    class Overfitting(ImageClassifier):
        def on_validation_epoch_end(self):
            epoch = float(self.current_epoch)
            self.log_dict({'val/top1': epoch, 'val/top5': 100.0, 'val/loss': 1 + epoch, 'val/top1_error': 1 - epoch})

    best = [BestCheckpoint(monitor, keep=keep) for monitor in ('val/top1', 'val/loss', 'val/top1_error')]
    for each in best:
        each.dirpath = str(tmp_path / 'kept')
    make_trainer(max_epochs=4, enable_checkpointing=True, callbacks=best).fit(
        Overfitting('test_resnet', num_classes=3), photo_data())
    found = [load_checkpoint(each.best_model_path)['epoch'] for each in best]
    assert found == [3, 0, 3]
    assert len(list((tmp_path / 'kept').glob('*.ckpt'))) == 3 * keep
    if keep == 1:
        assert [Path(each.best_model_path).name for each in best] == [
            'best.ckpt', 'best-val-loss.ckpt', 'best-val-top1_error.ckpt']


def test_metric_of_a_subclass_is_looked_for_before_the_training(make_trainer, photo_data, refused):
    class Own(BestCheckpoint):
        pass

    with refused("Own: monitor: 'val/acc'", 'no such', 'val/top1'):
        make_trainer(enable_checkpointing=True, callbacks=[Own('val/acc')]).fit(
            ImageClassifier('test_resnet', num_classes=3), photo_data())


def test_names_of_several_best_are_all_others(make_trainer):
    best = [BestCheckpoint('val/loss'), BestCheckpoint(), BestCheckpoint(mode='min')]
    trainer = make_trainer(enable_checkpointing=True, callbacks=best)
    for each in best:
        each.setup(trainer, ImageClassifier('test_resnet', num_classes=3), 'fit')
    assert len({each.filename for each in best}) == 3
    assert best[0].filename == 'best'


def test_checkpoints_of_another_training_are_not_removed(make_trainer, photo_data, tmp_path, refused):
    kept = LastCheckpoint()
    trainer = make_trainer(max_epochs=2, enable_checkpointing=True, callbacks=[kept])
    trainer.fit(ImageClassifier('test_resnet', num_classes=3), photo_data())
    trainer.fit_loop.max_epochs = 3
    trainer.fit(trainer.model, photo_data())  # goes on with its own
    files = sorted((tmp_path / 'python' / 'checkpoints').glob('last-step=*.ckpt'))
    assert len(files) == 2
    (tmp_path / 'python' / 'config.yaml').write_text('mine: 1')  # does not make it a run of the command line
    another = make_trainer(enable_checkpointing=True, callbacks=[LastCheckpoint()])
    with refused('default_root_dir: ', 'of another training', 'by ckpt_path'):
        another.fit(ImageClassifier('test_resnet', num_classes=3), photo_data())
    assert sorted((tmp_path / 'python' / 'checkpoints').glob('last-step=*.ckpt')) == files
    again = make_trainer(max_epochs=4, enable_checkpointing=True, callbacks=[LastCheckpoint()])
    again.fit(ImageClassifier('test_resnet', num_classes=3), photo_data(), ckpt_path=str(files[-1]))
    assert again.global_step == 12


class Scores(ImageClassifier):
    """Finds these accuracies, one in each epoch."""

    scores = 1.0, 3.0, 2.0

    def on_validation_epoch_end(self):
        self.log_dict({'val/top1': self.scores[self.current_epoch], 'val/top5': 100.0, 'val/loss': 1.0})


@pytest.mark.filterwarnings('ignore:.*not written:UserWarning')
@pytest.mark.parametrize('keep', [1, 2])
def test_score_that_was_not_written_is_none_to_beat(keep, make_trainer, photo_data, full_disk):
    best = BestCheckpoint(keep=keep)
    make_trainer(
        max_epochs=3, enable_checkpointing=True, plugins=[CheckpointFiles()],
        callbacks=[Fill(full_disk, 1, 2), best]).fit(Scores('test_resnet', num_classes=3), photo_data())
    assert best.best_model_score == 2
    assert load_checkpoint(best.best_model_path)['epoch'] == 2
    assert {Path(path).name for path in best.best_k_models} == {path.name for path in Path(best.dirpath).iterdir()}
