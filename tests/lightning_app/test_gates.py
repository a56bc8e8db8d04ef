"""What the callback `Gates` logs is what the gates did over the validation images."""
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_app import ImageClassifier
from lightning_app.callbacks import Gates
from lightning_app.callbacks.gates import GateStatistics
from lightning_app.cli import main
from lightning_app.logger import CsvLogger, WandbLogger
from lightning_app.optim import Optim
from se_timm.gates import GateReader, find_se

BLOCKS = [f'layer{stage}_{block}' for stage in (1, 2, 3) for block in (0, 1, 2)]
NUMBERS = {'mean', 'std', 'near_zero', 'near_one', 'class_specific'}


def classifier(name='se_resnet20_cifar', **arguments):
    torch.manual_seed(0)
    return ImageClassifier(name, 3, optim=Optim(lr=0.01), **arguments)


def logged(metrics):
    """Return the metrics of the gates as numbers."""
    return {name: float(value) for name, value in metrics.items() if name.startswith('gates/')}


def by_hand(model, data):
    """Return mean, deviation over images and shares of the gates of each block, from the images one by one."""
    found = {}
    with torch.no_grad(), GateReader(model.net.eval()) as reader:
        for image, _ in data.validation:
            model.net(data.normalisation(image)[None])
            for name, gate in reader.gates.items():
                found.setdefault(name.replace('.', '_'), []).append(gate[0].double().numpy())
    numbers = {}
    for name, values in found.items():
        gates = np.stack(values)
        numbers |= {f'gates/{name}/mean': gates.mean(), f'gates/{name}/std': gates.std(0).mean(),
                    f'gates/{name}/near_zero': (abs(gates) < 0.1).mean(),
                    f'gates/{name}/near_one': (abs(gates - 1) < 0.1).mean()}
    return numbers


def test_numbers_are_those_of_the_images_one_by_one(make_trainer, photo_data, tmp_path, read_csv):
    model, data = classifier(), photo_data(eval_batch_size=3)  # seven images: the last batch is smaller
    trainer = make_trainer(callbacks=[Gates()], logger=CsvLogger(str(tmp_path / 'run')))
    trainer.fit(model, data)
    found = logged(trainer.callback_metrics)
    assert found.keys() == {f'gates/{block}/{number}' for block in BLOCKS for number in NUMBERS}
    expected = by_hand(model, data)
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-5)
    for name, value in found.items():
        assert read_csv(tmp_path / 'run', name) == [(2, value)]


@pytest.mark.parametrize('views', ['flip', 'ten'])
def test_views_of_an_image_are_one_image(views, make_trainer, photo_data):
    model, data = classifier(), photo_data(eval_views=views, crop_pct=0.875)
    trainer = make_trainer(callbacks=[Gates()])
    trainer.validate(model, data, verbose=False)
    found = logged(trainer.callback_metrics)
    gates = []
    with torch.no_grad(), GateReader(model.net.eval()) as reader:
        for image, _ in data.validation:
            model.net(data.normalisation(image))
            gates.append(reader.gates['layer3.2'].double().mean(0))
    assert found['gates/layer3_2/mean'] == pytest.approx(float(torch.stack(gates).mean()), abs=1e-5)
    assert found['gates/layer3_2/std'] == pytest.approx(
        float(torch.stack(gates).std(0, correction=0).mean()), abs=1e-5)


def test_gates_that_are_forced_to_one_read_as_such(make_trainer, photo_data):
    model = classifier()
    with torch.no_grad():
        for block in find_se(model.net):
            fc2 = model.net.get_submodule(block.module).fc2
            fc2.weight.zero_()
            fc2.bias.fill_(100)
    trainer = make_trainer(callbacks=[Gates()])
    trainer.validate(model, photo_data(), verbose=False)
    found = logged(trainer.callback_metrics)
    for block in BLOCKS:
        assert {number: found[f'gates/{block}/{number}'] for number in NUMBERS} == {
            'mean': 1, 'std': 0, 'near_zero': 0, 'near_one': 1, 'class_specific': 0}


def test_media_of_wandb(make_trainer, photo_data, tmp_path, read_history):
    model, data = classifier(), photo_data()
    make_trainer(callbacks=[Gates(classes=['cat', 0])], logger=WandbLogger(save_dir=str(tmp_path / 'run'))).fit(
        model, data)
    rows = read_history(tmp_path / 'run')
    media = next(row for row in rows if 'gates/table' in row)
    numbers = next(row for row in rows if 'gates/layer1_0/mean' in row)
    assert media['trainer/global_step'] == numbers['trainer/global_step']
    shown = ['layer1_2', 'layer2_2', 'layer3_0', 'layer3_1', 'layer3_2']
    channels = {1: 16, 2: 32, 3: 64}
    for block in BLOCKS:
        histogram = media[f'gates_histogram/{block}']
        assert histogram['_type'] == 'histogram'
        assert sum(histogram['values']) == 7 * channels[int(block[5])]
        assert (histogram['bins'][0], histogram['bins'][-1], len(histogram['bins'])) == (0, 1, 21)
    assert sorted(key.partition('/')[2] for key in media if key.startswith('gates_map/')) == shown
    assert all(media[f'gates_map/{block}']['_type'] == 'image-file' for block in shown)
    assert all(media[f'gates_by_class/{block}_table']['_type'] == 'table-file' for block in shown)
    assert all(re.fullmatch('[A-Za-z0-9_/]+', key) for row in rows for key in row)

    files = tmp_path / 'run/wandb/latest-run/files'
    table = json.loads((files / media['gates/table']['path']).read_text())
    assert table['columns'][:3] == ['epoch', 'block', 'module']
    assert [row[2].replace('.', '_') for row in table['data']] == BLOCKS
    curves = json.loads((files / media['gates_by_class/layer3_2_table']['path']).read_text())
    assert sorted({row[1] for row in curves['data']}) == ['all', 'ant', 'cat']
    with torch.no_grad(), GateReader(model.net.eval()) as reader:
        model.net(torch.stack([data.normalisation(image) for image, _ in data.validation]))
        gates = reader.gates['layer3.2']
    drawn = {(row[1], row[0]): row[2] for row in curves['data']}
    labels = torch.tensor([label for _, label in data.validation])
    assert drawn['all', 4] == pytest.approx(float(gates[:, 4].mean()), abs=1e-5)
    assert drawn['cat', 4] == pytest.approx(float(gates[labels == 2, 4].mean()), abs=1e-5)
    assert {channel for _, channel in drawn} == set(range(0, 64, 2))


@pytest.mark.parametrize(('every', 'steps', 'epochs'), [
    (1, -1, [0, 1, 2, 3, 4]), (2, -1, [1, 3, 4]), (10, -1, [4]), (10, 6, [1])])
def test_every_so_many_epochs_and_after_the_last(every, steps, epochs, make_trainer, photo_data, tmp_path, read_csv):
    logger = CsvLogger(str(tmp_path / 'run'))
    make_trainer(callbacks=[Gates(every)], logger=logger, max_epochs=5, max_steps=steps).fit(
        classifier(), photo_data())
    assert [step // 3 for step, _ in read_csv(tmp_path / 'run', 'gates/layer1_0/mean')] == epochs


def test_classes_can_be_left_together(make_trainer, photo_data, tmp_path, read_history):
    make_trainer(callbacks=[Gates(by_class=False)], logger=WandbLogger(save_dir=str(tmp_path / 'run'))).fit(
        classifier(), photo_data())
    keys = {key for row in read_history(tmp_path / 'run') for key in row}
    assert not [key for key in keys if 'class' in key or 'map' in key]
    assert 'gates_histogram/layer1_0' in keys


def test_nothing_is_left_in_the_network(make_trainer, photo_data):
    class Broken(ImageClassifier):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            if not self.trainer.sanity_checking:
                raise ZeroDivisionError

    model = Broken('se_resnet20_cifar', 3, optim=Optim(lr=0.01))
    with pytest.raises(ZeroDivisionError):
        make_trainer(callbacks=[Gates()]).fit(model, photo_data())
    assert not any(module._forward_hooks for module in model.net.modules())
    make_trainer(callbacks=[Gates()]).fit(model := classifier(), photo_data())
    assert not any(module._forward_hooks for module in model.net.modules())


@pytest.mark.slow  # compiles
def test_compiled_network(make_trainer, photo_data):
    found = []
    for compiled in (False, True):
        trainer = make_trainer(callbacks=[Gates()])
        trainer.fit(classifier(compile=compiled), photo_data(eval_batch_size=7))
        found.append(logged(trainer.callback_metrics))
    assert found[1] == pytest.approx(found[0], abs=0.02)  # after three steps, which differ in their rounding


@pytest.mark.slow  # two processes
def test_two_processes_log_what_one_does(on_photos, in_tmp_path, program, read_csv):
    gates = ['--trainer.callbacks=lightning_app.callbacks.Gates', '--trainer.logger=lightning_app.logger.CsvLogger']
    path = main(['fit', *on_photos, '--model.name=se_resnet20_cifar']).trainer.checkpoint_callback.best_model_path
    args = ['validate', '--ckpt_path', path, *gates, '--trainer.accelerator=cpu']
    program(*args)
    # seven images: the second process gets a padded one
    done = program(*args, '--trainer.devices=2', '--trainer.strategy=ddp')
    assert 'sync_dist' not in done.stderr  # they are summed over the processes
    folders = [Path('runs/se_resnet20_cifar/version_0', name) for name in ('validate_0', 'validate_1')]
    for block in BLOCKS:
        for number in NUMBERS:
            (alone,), (together,) = (read_csv(folder, f'gates/{block}/{number}') for folder in folders)
            assert together == pytest.approx(alone, abs=1e-5), (block, number)


# What cannot be used


def test_network_without_se_is_said_and_trains(make_trainer, photo_data, caplog):
    trainer = make_trainer(callbacks=[Gates()])
    trainer.fit(classifier('test_resnet'), photo_data())
    assert 'Gates: test_resnet has no SE block of a kind that is known' in caplog.text
    assert trainer.global_step == 3
    assert not logged(trainer.callback_metrics)


def test_block_that_does_not_run_is_said(make_trainer, photo_data, caplog):
    model = classifier()
    model.net.layer3[2].se.forward = lambda x: x
    trainer = make_trainer(callbacks=[Gates()])
    trainer.fit(model, photo_data())
    assert 'Gates: layer3.2 was not seen in the validation; gates are not logged' in caplog.text
    assert trainer.global_step == 3


@pytest.mark.parametrize(('options', 'given', 'do'), [
    (['--trainer.callbacks.blocks=[layer3.9]'], "Gates: block: 'layer3.9'", 'did you mean layer3.'),
    (['--trainer.callbacks.classes=[catt]'], "class: 'catt'", 'did you mean cat'),
    (['--trainer.callbacks.every_n_epochs=0'], 'Gates: every_n_epochs 0', 'take a number from 1'),
    (['--trainer.callbacks.by_class=false', '--trainer.callbacks.classes=[cat]'],
     "Gates: by_class false with classes ['cat']", 'leave out one of the two')])
@pytest.mark.usefixtures('in_tmp_path')
def test_what_is_not_there_is_refused_before_the_training(options, given, do, on_photos, cli_error, monkeypatch):
    monkeypatch.setattr(ImageClassifier, 'training_step', lambda *args: pytest.fail('it has begun'))
    error = cli_error(['fit', *on_photos, '--model.name=se_resnet20_cifar',
                       '--trainer.callbacks=lightning_app.callbacks.Gates', *options])
    assert given in error[0]
    assert do in error[2]


@pytest.mark.usefixtures('in_tmp_path')
def test_class_that_is_not_there_is_refused_before_a_validation(on_photos, cli_error, monkeypatch):
    path = main(['fit', *on_photos, '--model.name=se_resnet20_cifar']).trainer.checkpoint_callback.best_model_path
    monkeypatch.setattr(ImageClassifier, 'validation_step', lambda *args: pytest.fail('it has begun'))
    error = cli_error(['validate', f'--ckpt_path={path}', '--trainer.callbacks=lightning_app.callbacks.Gates',
                       '--trainer.callbacks.classes=[catt]'])
    assert "class: 'catt'" in error[0]
    assert 'did you mean cat' in error[2]


@pytest.mark.usefixtures('in_tmp_path')
def test_validation_of_a_checkpoint(on_photos):
    args = ['--trainer.callbacks=lightning_app.callbacks.Gates']
    fitted = main(['fit', *on_photos, '--model.name=se_resnet20_cifar', *args]).trainer
    path = fitted.checkpoint_callback.best_model_path
    alone = main(['validate', f'--ckpt_path={path}', *args]).trainer
    assert logged(alone.callback_metrics) == logged(fitted.callback_metrics)


def test_statistics_are_dropped_between_validations(make_trainer, photo_data):
    callback = Gates()
    make_trainer(callbacks=[callback]).fit(classifier(), photo_data())
    assert callback.statistics is None
    assert GateStatistics([], 1).results() == []
