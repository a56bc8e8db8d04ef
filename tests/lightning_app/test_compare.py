"""Runs beside each other: what is printed and drawn is what their folders hold."""
import csv
import itertools
import re
import statistics
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
import yaml

from lightning_app.analysis import curves
from lightning_app.analysis.compare import compare
from lightning_app.analysis.printed import printed
from lightning_app.analysis.runs import Run, read_runs
from lightning_app.analysis.settings import labels, settings, stopped_early
from lightning_app.cli import main

LOGGER = ['--trainer.logger=lightning_app.logger.CsvLogger', '--trainer.callbacks+=lightning_app.callbacks.Throughput']


def row(step, **values):
    """A row of metrics.csv; `_` in names is `/`, and the epoch has ten steps."""
    return {'epoch': step // 10, 'step': step, **{name.replace('_', '/'): value for name, value in values.items()}}


def validated(*top1, first=0):
    """Rows of epochs with these accuracies."""
    return [each for epoch, value in enumerate(top1, first) for each in (
        row(10 * epoch + 4, train_loss=3.0 - 0.1 * epoch),
        row(10 * epoch + 9, val_loss=4 - value / 100, val_top1=value, val_top5=min(value + 20, 100)))]


@pytest.fixture
def write_run(tmp_path):
    """Return a function that writes the folder of a run; returns its path."""
    def write(folder, rows=(), config=None, hparams=None, **model):
        folder = tmp_path / folder
        folder.mkdir(parents=True)
        default = {
            'seed_everything': 0,
            'model': {'name': 'se_resnet50', 'network': None, 'plain': False, 'add_se': None, **model},
            'data': {'class_path': 'lightning_app.data.ImageNetDataModule', 'init_args': {'root': '/data/imagenet'}},
            'trainer': {'max_epochs': 2, 'max_steps': -1, 'default_root_dir': str(folder)}}
        (folder / 'config.yaml').write_text(yaml.safe_dump({**default, **(config or {})}))
        if hparams is not None:
            (folder / 'hparams.yaml').write_text(yaml.safe_dump(hparams))
        rows = list(rows)
        if rows:
            with open(folder / 'metrics.csv', 'w', newline='') as file:
                writer = csv.DictWriter(file, sorted(set().union(*rows)))
                writer.writeheader()
                writer.writerows(rows)
        return str(folder)

    return write


@pytest.fixture
def shown(capfd):
    """Return a function that compares runs, and returns the parts of what it printed, by their first word."""
    def run(*args):
        capfd.readouterr()
        main(['compare', *map(str, args)])
        parts = capfd.readouterr().out.rstrip().split('\n\n')
        return {part.partition(' ')[0].rstrip(':\n'): part for part in parts}

    return run


def cells(table, name):
    """Return a column of a table as text: columns are two or more spaces apart, and none before has an empty cell."""
    header, *lines = [re.split(r' {2,}', line.strip()) for line in table.splitlines()]
    return [line[header.index(name)] for line in lines]


# Real trainings


def test_numbers_are_those_of_the_trainings(on_photos, in_tmp_path, read_csv, shown):
    for more in (['--seed_everything=1'], ['--seed_everything=2'], ['--model.optim.lr=0.1']):
        main(['fit', *on_photos, *LOGGER, '--trainer.max_epochs=2', *more])
    parts = shown('runs/test_resnet', '--csv=table.csv', '--output=curves')
    with open('table.csv', newline='') as file:
        table = {line['run']: line for line in csv.DictReader(file)}
    assert sorted(table) == ['version_0', 'version_1', 'version_2']
    for name, line in table.items():
        folder = Path('runs/test_resnet', name)
        top1 = [value for _, value in read_csv(folder, 'val/top1')]
        top5 = [value for _, value in read_csv(folder, 'val/top5')]
        best = top1.index(max(top1))
        speed = [value for _, value in read_csv(folder, 'train/images_per_second')]
        assert line['network'] == 'test_resnet'
        assert line['epochs'] == '2/2'
        assert line['best val/top1'] == f'{max(top1):.2f}'
        assert line['at epoch'] == str(best)
        assert line['last val/top1'] == f'{top1[-1]:.2f}'
        assert line['top-1 error'] == f'{100 - max(top1):.2f}'
        assert line['top-5 error'] == f'{100 - top5[best]:.2f}'
        assert line['train/loss'] == f'{read_csv(folder, "train/loss")[-1][1]:#.4g}'
        assert line['images/s'] == f'{statistics.median(speed):.1f}'
        assert 'paper' not in line  # not a network of the paper's
    assert [table[name]['seed_everything'] for name in sorted(table)] == ['1', '2', '0']
    assert [table[name]['model.optim.lr'] for name in sorted(table)] == ['0.01', '0.01', '0.1']
    assert {'seed_everything', 'model.optim.lr'} == {name for name in table['version_0'] if '.' in name or '_' in name}
    best = sorted((float(line['best val/top1']) for line in table.values()), reverse=True)
    assert [float(value) for value in cells(parts['run'], 'best val/top1')] == best

    seeds = [max(value for _, value in read_csv(f'runs/test_resnet/version_{run}', 'val/top1')) for run in (0, 1)]
    assert f'{statistics.mean(seeds):#.4g} +- {statistics.stdev(seeds):#.2g}' in parts['mean']
    assert 'version_2' not in parts['mean']
    assert 'notes' not in parts
    assert matplotlib.image.imread('curves.png').shape[:2] > (500, 1500)
    assert Path('curves.svg').read_text().startswith('<?xml')

    run, = read_runs(['runs/test_resnet/version_2'])[0]
    assert run.classes == 3  # of its checkpoint
    assert run.name == str(Path('test_resnet/version_2'))


@pytest.mark.slow
def test_training_by_the_program_is_compared_by_the_program(on_photos, in_tmp_path, program):
    main(['fit', *on_photos, *LOGGER])
    done = program('compare', 'runs/test_resnet/version_0', '--output', 'curves.svg')
    assert done.stdout.startswith('run ')
    assert done.stdout.endswith('written: curves.svg\n')
    assert 'Warning' not in done.stderr


def test_interrupted_training_is_told(on_photos, in_tmp_path, shown):
    main(['fit', *on_photos, *LOGGER, '--trainer.max_epochs=3',
          '--trainer.callbacks+=lightning.pytorch.callbacks.EarlyStopping', '--trainer.callbacks.monitor=val/top1',
          '--trainer.callbacks.mode=max', '--trainer.callbacks.stopping_threshold=-1'])
    assert 'test_resnet/version_0: not finished, 1/3' in shown('runs/test_resnet')['notes']


# What is found


@pytest.mark.parametrize('given', [('paper/version_0', 'paper/version_2', 'paper/version_10'), ('paper',), ('.',),
                                   ('paper', 'paper/version_2/'), ('paper/version_10', 'paper')])
def test_runs_are_found_once(given, write_run, in_tmp_path):
    for name in ('version_10', 'version_2', 'version_0'):
        write_run(f'paper/{name}', validated(50, 60))
    (in_tmp_path / 'paper' / 'notes').mkdir()
    (in_tmp_path / 'paper' / 'notes.txt').touch()
    runs, problems = read_runs(given)
    assert sorted(run.name for run in runs) == ['version_0', 'version_10', 'version_2']
    assert problems == []


def test_runs_are_in_the_order_of_their_numbers(write_run, in_tmp_path):
    for name in ('version_10', 'version_2', 'version_0'):
        write_run(f'paper/{name}', validated(50, 60))
    assert [run.name for run in read_runs(['paper'])[0]] == ['version_0', 'version_2', 'version_10']


def test_names_tell_runs_of_two_folders_apart(write_run, in_tmp_path):
    for name in ('se/version_0', 'plain/version_0', 'plain/version_1'):
        write_run(name, validated(50, 60))
    assert [run.name for run in read_runs(['se', 'plain'])[0]] == ['se/version_0', 'plain/version_0', 'plain/version_1']


@pytest.mark.parametrize(('given', 'what', 'remedy'), [
    ('runs/papper', 'there is no such folder', 'runs/paper'),
    ('runs/paper/version_7', 'there is no such folder', 'runs/paper/version_0'),
    ('runs/paper/version_0/config.yaml', 'it is a file', 'did you mean runs/paper/version_0?'),
    ('runs/paper/version_0/checkpoints', 'neither it nor a folder in it', 'did you mean runs/paper/version_0?'),
    ('elsewhere', 'there is no such folder', 'runs/paper/version_0'),
])
def test_folder_that_is_no_run(given, what, remedy, write_run, in_tmp_path, cli_error):
    write_run('runs/paper/version_0/', validated(50, 60))
    (in_tmp_path / 'runs/paper/version_0/checkpoints').mkdir()
    first, why, do = cli_error(['compare', given])
    assert first == f'RUN: {given}'
    assert what in why
    assert remedy in do


@pytest.mark.parametrize(('content', 'what'), [
    (None, 'it has no metrics.csv'), ('', 'it is empty'), ('epoch,step,val/top1\n', 'it is empty'),
    ('epoch,step,val/top1\n0,9,best\n', "could not convert string to float: 'best'"),
    ('epoch,step\n0,9,50,60\n', 'no table of numbers'), (b'\xff\xfe\x00', 'no table of numbers'),
    ('epoch,val/top1\n0,50\n', 'it is empty'), ('epoch,step,val/top1\nnan,9,50\n', 'it is empty'),
])
def test_metrics_that_cannot_be_read(content, what, write_run, in_tmp_path, cli_error, shown):
    write_run('bad')
    write_run('good', validated(50, 60))
    if content is not None:
        Path('bad/metrics.csv').write_bytes(content if isinstance(content, bytes) else content.encode())
    given, why, _ = cli_error(['compare', 'bad'])
    assert given.startswith('RUN: bad')
    assert what in why
    parts = shown('good', 'bad')  # what can be shown is, and the rest named
    assert cells(parts['run'], 'run') == ['good']
    assert re.search(rf'^  bad\S*: not shown, .*{re.escape(what)}', parts['notes'], re.M)


def test_config_that_is_no_yaml(write_run, in_tmp_path, cli_error):
    write_run('bad', validated(50, 60))
    Path('bad/config.yaml').write_text('model: [')
    given, why, _ = cli_error(['compare', 'bad'])
    assert given == 'RUN: bad/config.yaml'
    assert 'it cannot be read' in why


@pytest.mark.parametrize(('file', 'content', 'named'), [
    ('config.yaml', 'a text', 'a text'), ('config.yaml', '[1, 2]', '[1, 2]'),
    ('config.yaml', '{model: se_resnet50}', 'model: se_resnet50'),
    ('config.yaml', '{model: {name: [se_resnet50]}}', "model.name: ['se_resnet50']"),
    ('config.yaml', '{model: {network: drop_rate}}', 'model.network: drop_rate'),
    ('config.yaml', '{data: {class_path: 3}}', 'data.class_path: 3'),
    ('hparams.yaml', '{network: hi}', 'network: hi'),
    ('hparams.yaml', '{provenance: {data: [1]}}', 'provenance.data: [1]'),
])
def test_settings_of_another_kind(file, content, named, write_run, in_tmp_path, cli_error, shown):
    write_run('good', validated(50, 60))
    write_run('bad', validated(50, 60))
    Path('bad', file).write_text(content)
    given, why, _ = cli_error(['compare', 'bad'])
    assert given == f'RUN: bad/{file}'
    assert why.endswith(f'something else than {named}')
    parts = shown('good', 'bad')
    assert cells(parts['run'], 'run') == ['good']
    assert f'bad/{file}: not shown, ' in parts['notes']


def test_lists_that_hold_a_class_and_something_else_are_settings(write_run, in_tmp_path, shown):
    for name, callbacks in (('one', ['Throughput', {'class_path': 'ResultLine'}]), ('other', [{'class_path': None}])):
        write_run(name, validated(50, 60), config={'trainer': {'max_epochs': 2, 'callbacks': callbacks}})
    assert 'trainer.callbacks' in shown('one', 'other')['settings']


def test_run_without_config(write_run, in_tmp_path, shown):
    write_run('bare', validated(50, 60))
    Path('bare/config.yaml').unlink()
    write_run('se', validated(50, 70))
    write_run('plain', validated(50, 65), plain=True)
    parts = shown('bare', 'se', 'plain')
    assert cells(parts['run'], 'run') == ['se', 'plain', 'bare']
    assert cells(parts['settings'].partition('\n')[2], 'model.plain') == ['false', 'true', '-']
    assert 'bare: no config.yaml' in parts['notes']


def test_file_that_a_glob_names_is_noted(write_run, in_tmp_path, shown):
    write_run('runs/version_0', validated(50, 60))
    Path('runs/curves.png').touch()
    assert '  runs/curves.png: not shown, it is a file' in shown('runs/version_0', 'runs/curves.png')['notes']


# Epochs and steps


@pytest.mark.parametrize(('rows', 'trainer', 'done', 'unfinished'), [
    (validated(50, 60), {'max_epochs': 2}, '2/2', False),
    (validated(50, 60), {'max_epochs': 3}, '2/3', True),
    ([*validated(50, 60), row(24, train_loss=1.0)], {'max_epochs': 3}, '2/3', True),
    ([row(4, train_loss=1.0)], {'max_epochs': 3}, '0/3', True),
    ([*validated(50), *validated(60), row(14, val_loss=1.0)], {'max_epochs': 2}, '1/2', True),  # twice an epoch
    (validated(50, 60), {'max_steps': 20}, '20/20 steps', False),
    (validated(50, 60), {'max_steps': 40, 'max_epochs': -1}, '20/40 steps', True),
    (validated(50, 60), {'max_steps': 20, 'max_epochs': 100}, '2/100', False),
    (validated(50, 60), {}, '2', False),
])
def test_what_is_done_of_what_was_planned(rows, trainer, done, unfinished, write_run, in_tmp_path, shown):
    write_run('run', rows, config={'trainer': trainer})
    metric = 'train/loss' if rows == [row(4, train_loss=1.0)] else 'val/loss'
    parts = shown('run', f'--metric={metric}')
    assert parts['run'].splitlines()[1].split('  ')[2].strip() == done or f'  {done}  ' in parts['run']
    assert (f'not finished, {done}' in parts.get('notes', '')) == unfinished


def test_a_validation_within_an_epoch_ends_none_where_a_checkpoint_tells(write_run, in_tmp_path, shown):
    """A training that was stopped by `trainer.max_time` validates before it ends."""
    folder = Path(write_run('run', [*validated(50), row(12, val_loss=1.0, val_top1=55, val_top5=60)]))
    (folder / 'checkpoints').mkdir()
    assert 'notes' not in shown('run')
    for step, epochs in ((9, 0), (13, 1)):
        torch.save({'position': {'epoch': epochs}}, folder / 'checkpoints' / f'last-step={step:08d}.ckpt')
        assert f'not finished, {epochs}/2' in shown('run')['notes']
    (folder / 'checkpoints' / 'last-step=00000014.ckpt').write_text('damaged')
    assert 'notes' not in shown('run')


# Metrics


@pytest.mark.parametrize(('metric', 'order'), [
    ('val/top1', ['b', 'a', 'c']), ('val/loss', ['c', 'a', 'b']), ('val/top1/error', ['c', 'b', 'a'])])
def test_runs_are_sorted_by_the_best_value(metric, order, write_run, in_tmp_path, shown):
    for name, top1, loss, error in (('a', 60, 1.5, 9), ('b', 70, 2.5, 8), ('c', 50, 0.5, 7)):
        write_run(name, [row(9, val_top1=top1, val_top5=90, val_loss=loss, val_top1_error=error)])
    parts = shown('a', 'b', 'c', f'--metric={metric}')
    assert cells(parts['run'], 'run') == order
    if metric == 'val/loss':
        assert cells(parts['run'], 'best val/loss') == ['0.5000', '1.500', '2.500']


def test_best_is_the_first_of_equal_ones_and_never_one_that_is_not_finite(write_run, in_tmp_path, shown):
    write_run('run', [*validated(50, 60, 60, 40), row(49, val_top1='nan', val_loss='nan', val_top5='inf')])
    table = shown('run')['run']
    assert (cells(table, 'best val/top1'), cells(table, 'at epoch')) == (['60.00'], ['1'])
    assert (cells(table, 'last val/top1'), cells(table, 'top-5 error')) == (['40.00'], ['20.00'])


def test_run_that_lacks_the_metric_is_last_and_noted(write_run, in_tmp_path, shown):
    write_run('a', [row(4, train_loss=1.0)])
    write_run('b', validated(50, 60))
    parts = shown('a', 'b', '--output=curves.png')
    assert cells(parts['run'], 'run') == ['b', 'a']
    assert 'a: no val/top1, it is sorted last and not drawn' in parts['notes']


def test_metric_that_no_run_has(write_run, in_tmp_path, cli_error):
    write_run('a', [*validated(50, 60), row(19, val_gone='nan')])
    given, _, do = cli_error(['compare', 'a', '--metric=val/top'])
    assert given == "metric: 'val/top'"
    assert do.startswith('did you mean val/top1')
    assert cli_error(['compare', 'a', '--metric=val/gone'])[1] == 'it has no finite value in any run'


def test_diverged_training_is_noted(write_run, in_tmp_path, shown):
    write_run('a', [*validated(50, 60), row(19, train_loss='nan')])
    write_run('b', [*validated(50, 60), row(19, val_loss='nan', val_top1=0.0, val_top5=0.0)])
    notes = shown('a', 'b')['notes']
    assert 'a: diverged, its last train/loss is not finite' in notes
    assert 'b: diverged, its last val/loss is not finite' in notes


# Settings


def test_settings_that_differ(write_run, in_tmp_path, shown):
    ema = [{'class_path': 'lightning_app.callbacks.WeightEMA', 'init_args': {'decay': 0.99}}]
    for name, lr, network, callbacks in (('a', 0.1, {}, []), ('b', 0.30000000000000004, {'stages': [2, 3]}, ema)):
        bar = {'class_path': 'lightning_app.callbacks.ProgressBar', 'init_args': {'refresh_rate': len(callbacks)}}
        logger = {'class_path': 'lightning_app.logger.CsvLogger', 'init_args': {'save_dir': name}}
        write_run(name, validated(50, 60), optim={'lr': lr, 'momentum': 0.9}, network=network, config={
            'data': {'class_path': 'lightning_app.data.ImageNetDataModule', 'init_args': {'root': f'/{name}/imagenet'}},
            'trainer': {'default_root_dir': name, 'callbacks': [bar, *callbacks], 'logger': [logger]}})
    table = shown('a', 'b')['settings'].partition('\n')[2]
    assert {line.split()[0] for line in table.splitlines()[1:]} == {
        'model.network.stages', 'model.optim.lr', 'trainer.callbacks.WeightEMA'}
    assert cells(table, 'a') == ['-', '0.1', '-']
    assert cells(table, 'b') == ['[2, 3]', '0.3', 'true']
    assert labels(read_runs(['a', 'b'])[0]) == ['a: lr 0.1', 'b: stages [2, 3], lr 0.3, WeightEMA true']


def test_other_data_are_another_setting_and_the_keys_are_those_of_the_command_line(write_run, in_tmp_path):
    write_run('a', validated(50), config={'data': {
        'class_path': 'lightning_app.data.ImageNetDataModule',
        'init_args': {'root': 'data/imagenette', 'batch_size': 64}}})
    found = settings(read_runs(['a'])[0][0])
    assert found['data'] == 'ImageNetDataModule'
    assert (found['data.root'], found['data.batch_size']) == ('imagenette', '64')
    assert 'model.add_se' not in found


@pytest.mark.parametrize(('models', 'expected'), [
    (({'name': 'resnet18'}, {'name': 'se_resnet18'}), ['a: resnet18', 'b: se_resnet18']),
    (({'optim': {'name': 'sgd'}}, {'optim': {'name': 'lamb'}}), ['a: name sgd', 'b: name lamb']),
    (({'optim': {'name': 'sgd'}, 'loss': {'name': 'ce'}}, {'optim': {'name': 'lamb'}, 'loss': {'name': 'bce'}}),
     ['a: model.loss.name ce, model.optim.name sgd', 'b: model.loss.name bce, model.optim.name lamb']),
    (({'loss': {str(n): 0 for n in range(6)}}, {'loss': {str(n): 1 for n in range(6)}}),
     ['a: 0 0, 1 0, 2 0, 3 0, ...', 'b: 0 1, 1 1, 2 1, 3 1, ...']),
    (({}, {}), ['a', 'b']),
])
def test_labels_name_what_differs(models, expected, write_run, in_tmp_path):
    for name, model in zip('ab', models, strict=True):
        write_run(name, validated(50), **model)
    assert labels(read_runs(['a', 'b'])[0]) == expected


def seeds(parts):
    """The line of the means over seeds: how many, their mean, and the runs; None where there is none."""
    lines = parts.get('mean', '').splitlines()[2:]
    return [re.split(r' {2,}', line)[1:] for line in lines] or None


def test_runs_on_other_data_are_no_seeds_of_one(write_run, in_tmp_path, shown):
    for seed, place, classes in ((0, 'cats', 37), (1, 'dogs', 120)):
        write_run(f'runs/{place}', validated(60.0, 61.0), {
            'seed_everything': seed, 'data': {'class_path': 'X', 'init_args': {'root': f'/{place}/images'}}},
            {'provenance': {'data': {'classes': classes}}})
    assert seeds(shown('runs')) is None


def test_interrupted_run_of_planned_steps_is_no_seed(write_run, in_tmp_path, shown):
    plan = {'trainer': {'max_epochs': -1, 'max_steps': 20}}
    for seed, rows in ((0, validated(60.0, 61.0)), (1, validated(62.0, 65.0)), (2, validated(20.0))):
        write_run(f'runs/{seed}', rows, {**plan, 'seed_everything': seed})
    assert seeds(shown('runs')) == [['2', '63.00 +- 2.8', '1, 0']]


@pytest.mark.parametrize(('settings', 'values'), [
    ({'patience': 1}, [(60.0, 61.0, 60.0), (63.0, 62.0), (20.0,)]),
    ({'patience': 2, 'min_delta': 0.5}, [(60.6, 61.0, 61.0), (62.6, 63.0, 62.9), (20.0, 20.6, 20.9)]),
    ({'stopping_threshold': 60.5}, [(60.0, 61.0), (63.0,), (20.0, 60.5)]),
    ({'divergence_threshold': 5.0}, [(61.0, 4.0), (63.0, 3.0), (20.0, 5.0)])])
def test_runs_that_stop_early_are_seeds_however_long_they_are(settings, values, write_run, in_tmp_path, shown):
    stop = {'class_path': 'lightning.pytorch.callbacks.EarlyStopping',
            'init_args': {'monitor': 'val/top1', 'mode': 'max', **settings}}
    plan = {'trainer': {'max_epochs': 9, 'callbacks': [stop]}}
    for seed, top1 in enumerate(values):
        write_run(f'runs/{seed}', validated(*top1), {**plan, 'seed_everything': seed})
    assert seeds(shown('runs')) == [['2', '62.00 +- 1.4', '1, 0']]


@pytest.mark.parametrize(('settings', 'losses', 'ended'), [
    ({'stopping_threshold': 0.5}, [2.0, 0.4, 0.9], False),  # not at the end of the epoch
    ({'stopping_threshold': 0.5}, [2.0, 0.9, 0.4], True),
    ({}, [2.0, float('nan')], True), ({'check_finite': False}, [2.0, float('nan')], False)])
def test_metric_of_the_training_ends_it_at_the_end_of_an_epoch(settings, losses, ended):
    stop = {'class_path': 'lightning.pytorch.callbacks.EarlyStopping',
            'init_args': {'monitor': 'train/loss', 'patience': 9, **settings}}
    rows = [row(step, train_loss=value) for step, value in enumerate(losses)]
    config = {'trainer': {'callbacks': [stop]}}
    assert stopped_early(Run(Path('a'), 'a', config, {}, rows)) is ended


@pytest.mark.parametrize('trainer', [
    {'val_check_interval': 0.5}, {'val_check_interval': 4}, {'check_val_every_n_epoch': 2},
    {'check_val_every_n_epoch': None}])
def test_metric_of_the_training_ends_it_after_a_validation_where_these_are_others(trainer):
    stop = {'class_path': 'lightning.pytorch.callbacks.EarlyStopping',
            'init_args': {'monitor': 'train/loss', 'patience': 3}}
    rows = [row(step, **{name: value}) for step in range(8) for name, value in (
        ('train_loss', 1.0), *([('val_top1', 50.0)] if step % 2 else []))]
    config = {'trainer': {**trainer, 'callbacks': [stop]}}
    assert stopped_early(Run(Path('a'), 'a', config, {}, rows))
    assert not stopped_early(Run(Path('a'), 'a', config, {}, rows[:-1]))


def test_run_that_came_to_its_end_is_a_seed_beside_one_that_stopped_early(write_run, in_tmp_path, shown):
    stop = {'class_path': 'lightning.pytorch.callbacks.EarlyStopping',
            'init_args': {'monitor': 'val/top1', 'mode': 'max', 'patience': 1}}
    plan = {'trainer': {'max_epochs': 3, 'callbacks': [stop]}}
    for seed, top1 in enumerate([(61.0, 60.0), (61.0, 62.0, 63.0), (69.0,)]):  # the last was interrupted
        write_run(f'runs/{seed}', validated(*top1), {**plan, 'seed_everything': seed})
    assert seeds(shown('runs')) == [['2', '62.00 +- 1.4', '1, 0']]


def test_runs_with_other_numbers_of_workers_are_seeds(write_run, in_tmp_path, shown):
    for seed, top1 in enumerate((61.0, 63.0)):
        data = {'class_path': 'lightning_app.data.ImageNetDataModule', 'init_args': {'num_workers': seed}}
        write_run(f'runs/{seed}', validated(top1), {'seed_everything': seed, 'data': data})
    parts = shown('runs')
    assert seeds(parts) == [['2', '62.00 +- 1.4', '1, 0']]
    assert 'data.num_workers' in parts['settings']


def test_seed_without_a_value_does_not_count(write_run, in_tmp_path, shown):
    for seed, loss in ((0, 0.8), (1, 0.9), (2, float('nan'))):
        write_run(f'runs/{seed}', [row(9, val_loss=loss, val_top1=60.0)], {'seed_everything': seed})
    assert seeds(shown('runs', '--metric=val/loss')) == [['2', '60.00 +- 0.0', '0.8500 +- 0.071', '0, 1']]


def test_runs_without_a_seed_are_several(write_run, in_tmp_path, shown):
    for name, top1, seed in (('a', 60.0, False), ('b', 62.0, False), ('c', 64.0, 0)):
        write_run(f'runs/{name}', validated(top1, top1), {'seed_everything': seed})
    assert seeds(shown('runs')) == [['3', '62.00 +- 2.0', 'c, b, a']]


def test_two_callbacks_of_a_class_are_told_apart(write_run, in_tmp_path, shown):
    for seed, patience in ((0, 1), (1, 50)):
        stop = [{'class_path': 'lightning.pytorch.callbacks.EarlyStopping', 'init_args': {'patience': each}}
                for each in (patience, 3)]
        write_run(f'runs/{seed}', validated(60.0, 61.0), {
            'seed_everything': seed, 'trainer': {'max_epochs': 2, 'callbacks': stop}})
    parts = shown('runs')
    assert seeds(parts) is None
    assert 'trainer.callbacks.EarlyStopping.patience' in parts['settings']


def test_network_on_several_data_keeps_the_errors_of_each(write_run, in_tmp_path, shown):
    for name, classes in (('net', 1000), ('places', 365), ('own', 10)):
        data = {'class_path': 'lightning_app.data.ImageNetDataModule', 'init_args': {'num_classes': classes}}
        write_run(f'runs/{name}', validated(60.0, 61.0), {'data': data}, name='se_resnet152')
    lines = shown('runs')['paper,'].splitlines()[1:]
    assert [line.partition(': ')[2] for line in sorted(lines)] == ['21.57 / 5.73 (Table 2)', '40.37 / 11.01 (Table 6)']


def test_plain_twin_of_the_ablations_has_the_errors_of_the_table(write_run, in_tmp_path, shown):
    data = {'class_path': 'lightning_app.data.ImageNetDataModule', 'init_args': {'num_classes': 1000}}
    write_run('runs/a', validated(60.0, 61.0), {'data': data}, network={'bias': False}, plain=True)
    assert '23.30 / 6.55' in shown('runs')['paper,']


def test_runs_of_both_levels_are_shown_and_evaluations_are_not(write_run, in_tmp_path, shown):
    for name in ('version_0', 'version_0/validate_0', 'paper/version_0', 'quick/version_0'):
        write_run(f'runs/{name}', validated(60.0, 61.0))
    assert len(shown('runs')['run'].splitlines()) == 4


def test_training_that_began_in_another_folder(write_run, in_tmp_path, shown):
    write_run('runs/a', validated(60.0, 61.0, first=3), {'trainer': {'max_epochs': 5}})
    assert 'a: its first epochs are in another folder' in shown('runs')['notes']
    write_run('sparse/a', validated(60.0, first=1), {'trainer': {'max_epochs': 2, 'check_val_every_n_epoch': 2}})
    assert 'notes' not in shown('sparse')
    write_run('by_steps/a', validated(60.0, first=1), {'trainer': {'max_epochs': 2, 'check_val_every_n_epoch': None}})
    assert 'notes' not in shown('by_steps')


def test_best_value_is_in_the_picture(write_run):
    folder = write_run('runs/a', validated(*range(40, 80, 10), *([10.1] * 30), *([10.2] * 30)))
    figure = curves.draw(read_runs([folder])[0], 'val/top1', ['a'])
    assert figure.axes[0].get_ylim()[1] > 70


def test_seeds_are_put_together(write_run, in_tmp_path, shown):
    for seed, top1 in enumerate((60, 62, 67)):
        write_run(f'se{seed}', validated(50, top1), config={'seed_everything': seed})
    write_run('se3', validated(90), config={'seed_everything': 3})  # has not come as far
    write_run('plain0', validated(50, 55), plain=True)
    lines = shown('se0', 'se1', 'se2', 'se3', 'plain0', '--metric=val/loss')['mean'].splitlines()
    assert re.split(r' {2,}', lines[1]) == ['network', 'seeds', 'best val/top1', 'best val/loss', 'runs']
    assert [re.split(r' {2,}', line) for line in lines[2:]] == [
        ['se_resnet50', '3', '63.00 +- 3.6', '3.370 +- 0.036', 'se2, se1, se0']]


def test_of_a_seed_the_last_run_that_came_furthest_counts_not_the_best(write_run, in_tmp_path, shown):
    for name, seed, top1 in (('version_2', 0, (50, 70)), ('version_10', 0, (50, 60)), ('version_3', 1, (50, 64)),
                             ('version_4', 2, (90,)), ('version_1', 2, (50, 65))):
        write_run(name, validated(*top1), config={'seed_everything': seed})
    line = shown('.')['mean'].splitlines()[2]
    assert re.split(r' {2,}', line) == ['se_resnet50', '3', '63.00 +- 2.6', 'version_1, version_3, version_10']


# The paper


@pytest.mark.parametrize(('model', 'expected'), [
    ({}, ['23.29 6.62 Table 2', '22.28 6.03 Table 10']),
    ({'network': {'reduction': 16, 'se': True}}, ['23.29 6.62 Table 2', '22.28 6.03 Table 10']),
    ({'plain': True}, ['24.8 7.48 Table 2', '23.3 6.55 Table 10', '23.21 6.53 footnote 2']),
    ({'network': {'reduction': 4}}, ['23.21 6.63 Table 7 of CVPR', '22.25 6.09 Table 10']),
    ({'network': {'reduction': 4}, 'schedule': {'name': 'multistep'}},
     ['22.25 6.09 Table 10', '23.21 6.63 Table 7 of CVPR']),
    ({'network': {'stages': [4], 'bias': False}}, ['22.68 6.22 Table 13']),
    ({'network': {'placement': '3x3', 'bias': False}}, ['22.48 6.02 Table 15']),
    ({'network': {'placement': '3x3'}}, []),
    ({'name': 'se_resnet101'}, ['22.38 6.07 Table 2']),
    ({'name': 'se_resnet101', 'network': {'reduction': 8}}, []),
    ({'name': 'se_senet154'}, ['18.68 4.47 Table 8']), ({'name': 'se_senet154', 'plain': True}, []),
    ({'plain': True, 'schedule': {'name': 'multistep'}},
     ['23.3 6.55 Table 10', '23.21 6.53 footnote 2', '24.8 7.48 Table 2']),
    ({'name': 'se_mobilenetv1_100'}, ['25.3 7.7 Table 3', '25.3 7.9 Table 3 of CVPR']),
    ({'name': 'se_resnet50.v1_5'}, []), ({'name': 'resnet50'}, []),
    ({'network': {'pretrained': True}}, []), ({'add_se': {'reduction': 8}}, []),
    ({'network': {'checkpoint_path': 'trained.ckpt'}}, []), ({'name': 'se_resnet50', 'plain': True, 'add_se': {}}, []),
])
def test_errors_of_the_paper(model, expected, write_run):
    run, = read_runs([write_run('run', validated(50), hparams={'provenance': {'data': {'classes': 1000}}}, **model)])[0]
    assert [f'{each.errors.top1} {each.errors.top5} {each.table}' for each in printed(run)] == expected


@pytest.mark.parametrize(('data', 'classes', 'name', 'count'), [
    ('ImageNetDataModule', 1000, 'se_resnet152', 1), ('ImageNetDataModule', 365, 'se_resnet152', 1),
    ('ImageNetDataModule', 10, 'se_resnet152', 0), ('ImageNetDataModule', None, 'se_resnet152', 0),
    ('CIFAR10DataModule', 10, 'se_preresnet110_cifar', 1), ('CIFAR10DataModule', 10, 'se_resnet152', 0)])
def test_errors_of_the_paper_are_of_the_same_data(data, classes, name, count, write_run):
    config = {'data': {'class_path': f'lightning_app.data.{data}', 'init_args': {'num_classes': None}}}
    folder = Path(write_run('run', validated(50), config=config, name=name))
    (folder / 'checkpoints').mkdir()
    (folder / 'checkpoints' / 'a.ckpt').write_text('damaged')
    if classes is not None:
        torch.save({'hyper_parameters': {'num_classes': classes}}, folder / 'checkpoints' / 'best.ckpt')
    assert len(printed(read_runs([folder])[0][0])) == count


def test_paper_and_cost_stand_in_the_table(write_run, in_tmp_path, shown):
    hparams = {'network': {'parameters': 28_088_024, 'multiply_adds': 3_870_000_000},
               'provenance': {'data': {'classes': 1000}}}
    write_run('run', validated(50, 76.5), hparams=hparams, network={'reduction': 4})
    parts = shown('run')
    found = {name: cells(parts['run'], name)[0] for name in ('network', 'paper', 'M parameters', 'G multiply-adds')}
    assert found == {'network': 'se_resnet50, reduction=4', 'paper': '23.21 / 6.63', 'M parameters': '28.09',
                     'G multiply-adds': '3.87'}
    assert parts['paper,'].splitlines()[1] == (
        '  se_resnet50, reduction=4: 23.21 / 6.63 (Table 7 of CVPR); 22.25 / 6.09 (Table 10)')


# The curves


def drawn(runs, metric='val/top1'):
    found, _ = read_runs(runs)
    return curves.draw(found, metric, labels(found))


def test_curves_are_the_values(write_run, in_tmp_path):
    figure = drawn([write_run('a', validated(50, 70, 60)), write_run('b', validated(40, 45, 55), plain=True)])
    accuracy, loss = figure.axes
    assert [axes.get_xlabel() for axes in figure.axes] == ['epoch', 'step']
    first, best, second, _ = accuracy.lines
    assert (list(first.get_xdata()), list(first.get_ydata())) == ([0, 1, 2], [50, 70, 60])
    assert (list(best.get_xdata()), list(best.get_ydata())) == ([1], [70])
    assert list(second.get_ydata()) == [40, 45, 55]
    assert list(loss.lines[0].get_xdata()) == [4, 14, 24]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        'a: plain false (70.00)', 'b: plain true (55.00)']
    assert len({line.get_color() for line in (first, second)}) == 2


def test_several_validations_an_epoch_are_drawn_over_steps(write_run, in_tmp_path):
    figure = drawn([write_run('a', [row(4, val_top1=50), row(9, val_top1=60)])])
    axes, = figure.axes  # no loss of the training was logged
    assert axes.get_xlabel() == 'step'
    assert list(axes.lines[0].get_xdata()) == [4, 9]


def test_long_curves_are_averaged_over_steps_and_the_beginning_may_lie_outside(write_run, in_tmp_path):
    losses = [100.0, *(2 - 0.01 * step for step in range(1, 100))]
    figure = drawn([write_run('a', [row(step, train_loss=loss) for step, loss in enumerate(losses)])], 'train/loss')
    axes, = figure.axes
    behind, mean, best = axes.lines
    assert list(behind.get_ydata()) == losses
    np.testing.assert_allclose(mean.get_ydata(), [statistics.mean(pair) for pair in itertools.pairwise(losses)])
    np.testing.assert_allclose(mean.get_xdata(), [step + 0.5 for step in range(99)])
    assert 'running mean of 2 values' in axes.get_title(loc='left')
    assert axes.get_ylim()[1] < 2.1
    assert list(best.get_ydata()) == [losses[-1]]


@pytest.mark.parametrize(('count', 'looks', 'entries'), [(10, 10, 10), (11, 2, 2)])
def test_many_runs(count, looks, entries, write_run, in_tmp_path):
    runs = [write_run(f'version_{index}', validated(70 - index), optim={'lr': index}) for index in range(count)]
    figure = drawn(runs)
    lines = [line for line in figure.axes[1].lines]
    assert len(lines) == count
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == looks
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(texts) == entries
    if count > 10:
        assert texts == ['the best: version_0: lr 0 (70.00)', 'the 10 others']


@pytest.mark.parametrize('count', [1, 3, 10, 11])
def test_legend_covers_no_curve_and_lies_in_the_picture(count, write_run, in_tmp_path):
    figure = drawn([
        write_run(f'version_{index}', validated(70 - index), optim={'lr': index}, loss={'a_name_that_is_long': index})
        for index in range(count)])
    figure.savefig('curves.png')
    legend = figure.legends[0].get_window_extent()
    for axes in figure.axes:
        assert legend.y1 <= axes.get_tightbbox().y0
        assert axes.get_window_extent().height > 200
    assert legend.x0 >= 0
    assert legend.x1 <= figure.bbox.x1
    assert legend.y0 >= 0


@pytest.mark.parametrize('metric', ['val/top1', 'train/loss'])
def test_long_settings_lie_in_the_picture(metric, write_run, in_tmp_path):
    figure = drawn([
        write_run(f'version_{index}', validated(70 - index), network={'path': f'/{index}' + '/a/folder' * 20})
        for index in range(4)], metric)
    figure.savefig('curves.png')
    legend = figure.legends[0].get_window_extent()
    assert 0 <= legend.x0 <= legend.x1 <= figure.bbox.x1
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert all(text.startswith('version_') and text.endswith(')') and ' ... ' in text for text in texts)


@pytest.mark.parametrize(('output', 'files'), [
    ('new/curves', ['curves.png', 'curves.svg']), ('new/curves.png', ['curves.png']),
    ('new/curves.svg', ['curves.svg'])])
def test_suffix_decides_the_format(output, files, write_run, in_tmp_path, shown):
    write_run('a', validated(50, 60))
    parts = shown('a', f'--output={output}')
    assert sorted(path.name for path in Path('new').iterdir()) == files
    assert 'written' in parts
    heads = {'.png': b'\x89PNG', '.svg': b'<?xml'}
    assert all(path.read_bytes().startswith(heads[path.suffix]) for path in Path('new').iterdir())


def test_same_runs_give_the_same_files(write_run, in_tmp_path):
    folder = write_run('a', validated(50, 60))
    for name in ('first', 'second'):
        compare(folder, output=name)
    for suffix in ('.png', '.svg'):
        assert Path(f'first{suffix}').read_bytes() == Path(f'second{suffix}').read_bytes()


@pytest.mark.parametrize(('option', 'why', 'do'), [
    ('--output=curves.pdf', 'the suffix is none of .png, .svg', 'curves.png'),
    ('--output=a', 'it is a folder', 'a/compare.png'),
    ('--output=a/config.yaml/curves.png', 'it cannot be written', 'folder'),
    ('--csv=a', 'it cannot be written', 'folder')])
def test_output_that_cannot_be(option, why, do, write_run, in_tmp_path, cli_error):
    write_run('a', validated(50, 60))
    found = cli_error(['compare', 'a', option])
    assert why in found[1]
    assert do in found[2]


def test_without_matplotlib(write_run, in_tmp_path, cli_error, shown, monkeypatch):
    write_run('a', validated(50, 60))
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    _, why, do = cli_error(['compare', 'a', '--output=curves'])
    assert 'matplotlib' in why
    assert 'se-timm[analysis]' in do
    assert 'run' in shown('a')  # the table needs none


# The command line


@pytest.mark.parametrize('args', [['a', 'b', '--metric=val/loss'], ['--metric', 'val/loss', 'a', 'b']])
def test_runs_stand_before_or_after_the_options(args, write_run, in_tmp_path, shown):
    for name in ('a', 'b'):
        write_run(name, validated(50, 60))
    assert 'best val/loss' in shown(*args)['run']


@pytest.mark.parametrize(('args', 'given', 'do'), [
    ([], 'no RUN', '--help'), (['a', '--metrc=val/loss'], '--metrc=val/loss', 'metric'),
    (['a', '--metric=val/loss', 'b'], 'b', 'name each RUN before the options')])
def test_command_lines_that_cannot_be_read(args, given, do, cli_error):
    found = cli_error(['compare', *args])
    assert found[0] == given
    assert do in found[2]


def test_help_tells_of_the_runs(capsys):
    with pytest.raises(SystemExit) as stop:
        main(['compare', '--help'])
    assert stop.value.code == 0
    text = ' '.join(capsys.readouterr().out.split())
    assert 'compare RUN [RUN ...] [options]' in text
    assert 'Folders of trainings, such as runs/paper/version_0' in text


def test_runs_are_found_once_under_two_names(write_run, in_tmp_path):
    write_run('paper/version_0', validated(50, 60))
    Path('link').symlink_to('paper')
    for given in (['paper', str(in_tmp_path / 'paper')], ['paper', 'link'], ['.']):
        assert len(read_runs(given)[0]) == 1


def test_run_that_ended_within_the_last_epoch_is_no_seed(write_run, in_tmp_path, shown):
    plan = {'trainer': {'max_epochs': -1, 'max_steps': 20}}
    late = row(16, val_loss=3.0, val_top1=20.0, val_top5=40.0)
    for seed, rows in ((0, validated(60.0, 61.0)), (1, validated(62.0, 65.0)), (2, [*validated(20.0), late])):
        write_run(f'runs/{seed}', rows, {**plan, 'seed_everything': seed})
    assert seeds(shown('runs')) == [['2', '63.00 +- 2.8', '1, 0']]


def test_steps_up_to_the_checkpoint_are_done(write_run, in_tmp_path, shown):
    folder = Path(write_run('run', validated(50), config={'trainer': {'max_epochs': -1, 'max_steps': 40}}))
    (folder / 'checkpoints').mkdir()
    (folder / 'checkpoints' / 'last-step=00000015.ckpt').touch()
    assert 'not finished, 15/40 steps' in shown('run')['notes']


def test_name_of_a_single_run_tells_its_study(write_run, in_tmp_path):
    write_run('paper/version_0', validated(50, 60))
    assert [run.name for run in read_runs(['paper'])[0]] == ['paper/version_0']


def test_errors_of_cifar_100(write_run):
    config = {'data': {'class_path': 'lightning_app.data.CIFAR100DataModule', 'init_args': {'num_classes': 100}}}
    run, = read_runs([write_run('run', validated(50), config=config, name='se_preresnet110_cifar')])[0]
    assert [(each.errors.top1, each.table) for each in printed(run)] == [(23.85, 'Table 5')]
