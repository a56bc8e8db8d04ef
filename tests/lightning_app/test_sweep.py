"""The sweep files are the paper's tables, and their grid runs without a server, however often it is interrupted."""
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

import se_timm  # noqa: F401  (registers the networks)
from lightning_app.analysis.studies import STUDIES
from lightning_app.cli import main
from lightning_app.logger import own_project
from lightning_app.sweep import BEGUN, FINISHED, checked, combinations, mark, passed_on, read_sweep, runs_of, train
from se_timm.paper import FIXED_SCHEDULE, SETTINGS

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / 'configs' / 'sweep').glob('*.yaml'))


@pytest.fixture
def sweep_file(write_yaml):
    """Return a function that writes a sweep of `configs/quickstart.yaml`, changed as told, and returns its path."""
    def write(**changes):
        content = {
            'program': 'lightning_app', 'method': 'grid',
            'command': ['${env}', 'WANDB_RUN_GROUP=trial', '${interpreter}', '-m', '${program}', 'fit', '--config',
                        str(ROOT / 'configs' / 'quickstart.yaml'), '${args}'],
            'parameters': {'model.network': {'values': ['{reduction: 4}', '{se: false}']}}}
        return write_yaml('small.yaml', {key: value for key, value in {**content, **changes}.items() if value})

    return write


def plain(arguments):
    """Return arguments of a network as YAML has them."""
    return json.loads(json.dumps(arguments))


# The files of the paper's tables


def test_every_table_has_a_file():
    assert [path.stem for path in FILES] == sorted(STUDIES)


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.stem)
def test_values_are_the_rows_of_the_paper(path):
    chosen = combinations(read_sweep(str(path))['parameters'])
    assert all(values.keys() == {'model.network'} for values in chosen)
    assert [yaml.safe_load(values['model.network']) for values in chosen] == [
        plain(row.arguments) for row in STUDIES[path.stem].rows]


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.stem)
def test_network_of_every_row_is_built(path):
    networks = [yaml.safe_load(values['model.network']) for values in combinations(read_sweep(str(path))['parameters'])]
    assert [timm.create_model('se_resnet50', device='meta', **network).num_classes for network in networks] == (
        [1000] * len(networks))


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.stem)
def test_agent_of_wandb_runs_the_same_command(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    content = yaml.safe_load(path.read_text())
    run = runs_of(str(path), None, [])[-1]
    value = content['parameters']['model.network']['values'][-1]
    macros = {'${env}': ['/usr/bin/env'], '${interpreter}': ['python'], '${program}': [content['program']],
              '${args}': create_sweep_command_args({'args': {'model.network': {'value': value}}})['args']}
    theirs = [word for each in create_sweep_command(content['command']) for word in macros.get(each, [each])]
    env, group, python, *words = theirs
    assert (env, group, python) == ('/usr/bin/env', f'WANDB_RUN_GROUP={path.stem}', 'python')
    assert run.environment == {'WANDB_RUN_GROUP': path.stem, 'WANDB_PROJECT': content['project']}
    assert content['project'] == own_project()  # where `dashboard` looks for them
    assert ['-m', 'lightning_app', *run.args[:-2]] == words  # the last two are folder and checkpoint


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.stem)
def test_first_training_parses(path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stop:
        main([*runs_of(str(path), None, [])[0].args, '--print_config'])
    assert stop.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config['model']['network'] == plain(STUDIES[path.stem].rows[0].arguments)
    assert config['model']['name'] == 'se_resnet50'
    assert config['trainer']['default_root_dir'].startswith(f'runs/sweep/{path.stem}/')


def test_recipe_is_the_paper_s():
    recipe, paper = yaml.safe_load((ROOT / 'configs/imagenet/ablation.yaml').read_text()), SETTINGS['ablations'].values
    optim, schedule = recipe['model']['optim'], recipe['model']['schedule']
    assert (optim['lr'], 1 / schedule['decay_rate'], len(schedule['decay_milestones'])) == (
        paper['lr'], paper['drop_by'], paper['drops'])
    assert (recipe['model']['network']['bias'], recipe['model']['loss']['smoothing'] > 0) == (
        paper['bias'], paper['label_smoothing'])
    assert f'{recipe["trainer"]["max_epochs"]} epochs' in FIXED_SCHEDULE.title


# What is run


def test_dry_run_prints_a_command_for_each_combination(sweep_file, capsys, in_tmp_path):
    file = sweep_file(parameters={
        'model.network': {'values': ['{reduction: 4}', '{se: false}']}, 'model.optim.lr': {'values': [0.05, 0.1]},
        'trainer.max_epochs': {'value': 3}})
    main(['sweep', file, '--dry_run', 'true', '--data.batch_size', '32'])
    lines = capsys.readouterr().out.splitlines()
    assert lines[::2] == [
        f'{number} of 4: model.network={network}, model.optim.lr={lr}, trainer.max_epochs=3'
        for number, (network, lr) in enumerate(
            [(network, lr) for network in ('{reduction: 4}', '{se: false}') for lr in (0.05, 0.1)], 1)]
    folder = 'runs/sweep/small/model.network=se-false,model.optim.lr=0.1'  # what does not vary is not in the name
    assert shlex.split(lines[-1]) == [
        'WANDB_RUN_GROUP=trial', 'python', '-m', 'lightning_app', 'fit', '--config',
        str(ROOT / 'configs/quickstart.yaml'), '--model.network={se: false}', '--model.optim.lr=0.1',
        '--trainer.max_epochs=3', '--data.batch_size', '32', f'--trainer.default_root_dir={folder}',
        '--ckpt_path=auto']
    assert list(in_tmp_path.iterdir()) == [Path(file)]


@pytest.mark.parametrize('arguments', [
    ['--dry_run'], ['--dry_run', '--data.batch_size=8'], ['--data.batch_size=8', '--dry_run', 'true']])
def test_dry_run_stands_alone_or_with_a_value(arguments, sweep_file, capsys, in_tmp_path):
    main(['sweep', sweep_file(), *arguments])
    command = capsys.readouterr().out.splitlines()[1]
    assert ('--data.batch_size=8' in command) == ('--data.batch_size=8' in arguments)
    assert not Path('runs').exists()


@pytest.mark.parametrize('options', [
    ['--trainer.default_root_dir', 'there'], ['--trainer.default_root_dir=there'], ['--folder=there']])
def test_folder_of_the_trainings_can_be_given(options, sweep_file, capsys, in_tmp_path):
    main(['sweep', sweep_file(), '--dry_run=true', *options])
    command = capsys.readouterr().out.splitlines()[1]
    assert command.count('default_root_dir') == 1
    assert '--trainer.default_root_dir=there/model.network=reduction-4 ' in command


def test_folders_differ_also_for_values_that_read_alike(sweep_file):
    values = ['{reduction: 4}', 'reduction 4', 'x' * 300, 'a-2', 'a', 'a!']
    names = [run.folder.name for run in runs_of(sweep_file(parameters={'model.network': {'values': values}}), None, [])]
    assert len(set(names)) == 6
    assert max(map(len, names)) < 255
    file = sweep_file(parameters={'model.optim.lr': {'values': [0.1, -0.1]}})
    assert [run.folder.name for run in runs_of(file, None, [])] == ['model.optim.lr=0.1', 'model.optim.lr=-0.1']


def test_group_is_the_name_of_the_file_where_the_command_has_none(sweep_file):
    command = yaml.safe_load(Path(sweep_file()).read_text())['command']
    run = runs_of(sweep_file(command=command[2:]), None, [])[0]
    assert run.environment == {'WANDB_RUN_GROUP': 'small'}


# What is refused, before any training


@pytest.mark.parametrize(('changes', 'given', 'why', 'do'), [
    ({'method': 'bayes'}, 'method: bayes', 'only a grid', 'wandb sweep FILE'),
    ({'parameters': {'model.optim.lr': {'min': 0.1, 'max': 0.2}}}, 'parameters.model.optim.lr: {',
     'values', 'wandb sweep FILE'),
    ({'parameters': {'model': {'parameters': {'plain': {'values': [True]}}}}}, 'parameters.model', 'keys have dots',
     'values: [...]'),
    ({'parameters': {'model.optim.lr': {'values': []}}}, 'parameters.model.optim.lr', 'values', 'values: [...]'),
    ({'parameters': {'model.optim.lr': {'values': [0.1, 0.2, 0.1]}}}, 'parameters.model.optim.lr: 0.1', 'listed twice',
     'seed_everything'),
    ({'parameters': {'ckpt_path': {'values': ['a']}}}, 'parameters.ckpt_path', 'its own checkpoint', 'leave it out'),
    ({'parameters': {'trainer.default_root_dir': {'value': 'a'}}}, 'parameters.trainer.default_root_dir', 'its own',
     '--folder DIR'),
    ({'parameters': None}, 'small.yaml', 'it needs parameters', 'configs/sweep/reduction.yaml'),
    ({'command': None}, 'small.yaml', 'a command', 'configs/sweep/reduction.yaml'),
    ({'early_terminate': {'type': 'hyperband'}}, 'early_terminate: {', 'no use', 'wandb sweep FILE'),
    ({'metrics': {'name': 'val/top1'}}, 'metrics', 'no use', 'did you mean metric'),
    ({'command': ['${interpreter}', '-m', '${program}', 'fit', '${args_json}']}, 'command: ${interpreter}',
     '${args_json} is none of ${env}', 'configs/sweep/reduction.yaml'),
    ({'command': ['${env}', '${interpreter}', 'train.py', '${args}']}, 'command: ${env}', 'lightning_app fit',
     'configs/sweep/reduction.yaml'),
    ({'command': ['A=b', '${interpreter}', '-m', '${program}', 'fit', '${args}']}, 'command: A=b', 'lightning_app fit',
     'configs/sweep/reduction.yaml'),
    ({'parameters': {'model.optim.lrr': {'values': [0.1]}}}, '--model.optim.lrr', 'no such option', 'model.optim.lr'),
    ({'parameters': {'model.optim.lr': {'values': [0.1, 'high']}}}, 'model.optim.lr: high', 'a number', 'correct'),
])
def test_what_it_cannot_honour_is_refused(changes, given, why, do, sweep_file, cli_error, in_tmp_path):
    file = sweep_file(**changes)
    lines = cli_error(['sweep', file])
    assert given in lines[0]
    assert why in lines[1]
    assert do in lines[2]
    assert list(in_tmp_path.iterdir()) == [Path(file)]  # nothing has run


@pytest.mark.parametrize(('option', 'given', 'do'), [
    ('--data.batch_sizes=8', 'batch_sizes', 'batch_size'),
    ('--ckpt_path=last', '--ckpt_path=last with sweep', 'leave it out'),
    ('--print_config', '--print_config with sweep', 'say --dry_run for'),
    ('--dry_run=perhaps', 'dry_run', 'correct'),
    ("--model.network={'reduction': 8}", 'network={reduction: 4} and model.network={se: false}', 'before ${args}'),
    ('--model.network.reduction=8', '', 'before ${args}'), ('--config=fixed.yaml', '', 'before ${args}'),
])
def test_options_are_checked(option, given, do, sweep_file, cli_error, write_yaml, in_tmp_path):
    write_yaml('fixed.yaml', {'model': {'network': {}}})
    values = ['{reduction: 4}', '{reduction: 16}'] if not given else ['{reduction: 4}', '{se: false}']
    lines = cli_error(['sweep', sweep_file(parameters={'model.network': {'values': values}}), option])
    assert given in lines[0]
    assert do in lines[2]


def test_options_below_a_parameter_are_taken(sweep_file, capsys, in_tmp_path):
    main(['sweep', sweep_file(), '--dry_run', '--model.network.drop_rate', '0.1'])
    assert capsys.readouterr().out.count('--model.network.drop_rate 0.1') == 2


def test_config_that_has_changed_since_a_training(on_photos, sweep_file, write_yaml, in_tmp_path, cli_error):
    """The rows of a table would be of two recipes."""
    def recipe(lr=0.01, network=None, devices=1):
        return write_yaml('recipe.yaml', {
            'model': {'optim': {'lr': lr}, 'schedule': None, 'network': network}, 'seed_everything': True,
            'data': {'class_path': 'ImageNetDataModule'}, 'trainer': {'devices': devices}})

    fit = ['${interpreter}', '-m', '${program}', 'fit']
    photos = [each for each in on_photos if 'model.' not in each and 'devices' not in each]
    file = sweep_file(command=[*fit, '--config', recipe(), *photos, '${args}'],
                      parameters={'model.name': {'values': ['test_resnet', 'se_resnet20_cifar']}})
    run, _ = checked(runs_of(file, None, []))
    assert train(run) is None
    main(['sweep', file, '--dry_run'])
    recipe(devices=2)
    main(['sweep', file, '--dry_run'])  # a resumed one may have others
    for changed, said in (({'lr': 0.02}, 'model.optim.lr was 0.01 when it was trained, and is 0.02 now'),
                          ({'network': {'drop_rate': 0.1}}, 'model.network was None when it was trained')):
        recipe(**changed)
        given, why, _ = cli_error(['sweep', file])
        assert given == f'{run.folder}: finished'
        assert said in why
    for name in (BEGUN, FINISHED):
        (run.folder / name).write_text(json.dumps(run.args))  # by a version that kept no settings
    main(['sweep', file, '--dry_run'])


def test_project_of_the_file_is_that_of_the_runs(sweep_file, monkeypatch):
    run, _ = runs_of(sweep_file(project='mine', entity='team'), None, [])
    assert {**run.environment, 'WANDB_RUN_GROUP': ''} == {
        'WANDB_RUN_GROUP': '', 'WANDB_PROJECT': 'mine', 'WANDB_ENTITY': 'team'}
    monkeypatch.setenv('WANDB_PROJECT', 'another')
    assert 'WANDB_PROJECT' not in runs_of(sweep_file(project='mine'), None, [])[0].environment


def test_file_that_is_not_there(cli_error):
    assert 'nowhere.yaml' in cli_error(['sweep', 'nowhere.yaml'])[0]
    _, why, do = cli_error(['sweep', f'{FILES[0].parent}/reductoin.yaml'])
    assert why == 'there is no such file'
    assert do.startswith(f'did you mean {FILES[0].parent}/reduction.yaml? ')


def test_help_shows_the_form_that_is_taken(capsys):
    with pytest.raises(SystemExit) as stop:
        main(['sweep', '--help'])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert 'sweep FILE [--dry_run] [--folder FOLDER] [options of fit]' in text
    assert re.findall(r'^  (--\w+)', text, re.MULTILINE) == ['--dry_run', '--folder']


def test_training_with_other_options_is_not_taken_for_these(sweep_file, cli_error, in_tmp_path):
    """Neither one that is finished nor, once it has a checkpoint, one that was interrupted."""
    def goes(size):
        main(['sweep', sweep_file(), '--dry_run=true', f'--data.batch_size={size}'])

    def is_refused():
        lines = cli_error(['sweep', sweep_file(), '--dry_run=true', '--data.batch_size=64'])
        assert str(run.folder) in lines[0]
        assert '--folder' in lines[2]

    run = checked(runs_of(sweep_file(), None, ['--data.batch_size=32']))[1]
    mark(run.folder / BEGUN, run)
    goes(64)
    (run.folder / 'version_0/checkpoints').mkdir(parents=True)
    (run.folder / 'version_0/checkpoints/best.ckpt').touch()
    is_refused()
    goes(32)
    (run.folder / BEGUN).unlink()
    mark(run.folder / FINISHED, run)
    is_refused()
    goes(32)
    (run.folder / FINISHED).write_text('["fi')  # cut off
    goes(64)


def test_training_keeps_its_folder_where_other_parameters_vary(sweep_file, capsys, in_tmp_path):
    """One that is finished, and one that was interrupted, when a second seed is asked for, or but one network."""
    networks = {'values': ['{reduction: 4}', '{se: false}']}
    runs = checked(runs_of(sweep_file(), None, []))
    mark(runs[0].folder / FINISHED, runs[0])
    mark(runs[1].folder / BEGUN, runs[1])
    for parameters in ({'model.network': networks, 'seed_everything': {'values': [0, 1]}},
                       {'model.network': {'values': networks['values'][:1]}, 'seed_everything': {'values': [0, 1]}}):
        capsys.readouterr()
        main(['sweep', sweep_file(parameters=parameters), '--dry_run=true'])
        lines = capsys.readouterr().out.splitlines()
        assert [line for line in lines if line.endswith('finished before')] == lines[:1]
        folders = re.findall(r'default_root_dir=(\S+?)\'? ', '\n'.join(lines))
        assert folders[0] == str(runs[0].folder)
        assert len(set(folders)) == len(folders) == len(lines) / 2
        assert (folders[2:3] == [str(runs[1].folder)]) == (len(folders) == 4)


def test_folder_that_was_moved_is_the_same(sweep_file, in_tmp_path):
    """As are other numbers of workers."""
    run = checked(runs_of(sweep_file(), None, []))[1]
    mark(run.folder / FINISHED, run)
    for base in (Path('runs/sweep/small').absolute(), Path('moved')):
        run.folder.parent.rename(base)
        main(['sweep', sweep_file(), f'--folder={base}', '--data.num_workers=1', '--dry_run=true'])


def test_folder_that_cannot_be(sweep_file, cli_error):
    file = sweep_file()
    assert 'is a file' in cli_error(['sweep', file, f'--folder={file}'])[1]


# Trainings

SMALL = ('--trainer.limit_train_batches=4', '--trainer.max_epochs=2', '--trainer.limit_val_batches=2',
         '--trainer.accelerator=cpu', '--trainer.enable_progress_bar=false', '--data.batch_size=8',
         '--data.num_workers=0')


def groups(records):
    return [record.run.run_group for record in records if record.WhichOneof('record_type') == 'run']


@pytest.mark.slow
def test_one_that_fails_is_named_and_the_others_are_finished_once(sweep_file, program, tmp_path, read_wandb, read_csv):
    values = ['{reduction: 100}', '{reduction: 4}']  # the first stages have 16 channels
    file = sweep_file(parameters={'model.network': {'values': values}})
    done = program('sweep', file, *SMALL, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-2:] == [
        '1 of 2 are not finished; the same command goes on with them',
        '  model.network={reduction: 100}: exit status 2']
    folder = tmp_path / 'runs/sweep/small/model.network=reduction-4'
    assert groups(read_wandb(folder)) == ['trial']
    assert [step for step, _ in read_csv(folder / 'version_0', 'val/top1')] == [3, 7]
    again = program('sweep', file, *SMALL, check=False)
    assert again.returncode == 1
    assert '2 of 2: model.network={reduction: 4}, finished before' in again.stdout
    assert '1 of 2 are not finished' in again.stderr
    assert [path.name for path in folder.glob('version_*')] == ['version_0']


@pytest.mark.slow
def test_sweep_that_is_stopped_goes_on_where_it_was(sweep_file, tmp_path, program, read_csv):
    file = sweep_file()
    command = ['sweep', file, *SMALL, '--trainer.limit_train_batches=20', '--trainer.max_epochs=3',
               '--trainer.log_every_n_steps=1']
    process = subprocess.Popen(
        [sys.executable, '-m', 'lightning_app', *command], cwd=tmp_path, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, env={**os.environ, 'PYTHONPATH': str(ROOT)})
    folder = tmp_path / 'runs/sweep/small/model.network=reduction-4/version_0'
    while not any((folder / 'checkpoints').glob('last-*.ckpt')) and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 128 + signal.SIGTERM, said
    assert 'SIGTERM: the sweep ends; the same command goes on with it' in said
    assert '2 of 2' not in said
    before = len(read_csv(folder, 'train/loss'))
    assert before < 60
    program(*command)
    assert [step for step, _ in read_csv(folder, 'train/loss')] == list(range(60))
    assert [path.name for path in folder.parent.glob('version_*')] == ['version_0']
    assert len(list((tmp_path / 'runs').rglob(FINISHED))) == 2


@pytest.mark.slow
def test_training_that_was_out_of_time_is_not_finished(sweep_file, tmp_path, program):
    file = sweep_file(parameters={'model.network': {'values': ['{reduction: 4}']}})
    limited = ['sweep', file, *SMALL, '--trainer.limit_train_batches=60', '--data.batch_size=16',
               '--trainer.max_time=00:00:00:01']
    done = program(*limited, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == '  model.network={reduction: 4}: ended by trainer.max_time'
    folder = tmp_path / 'runs/sweep/small/model.network=reduction-4'
    assert any(folder.glob('version_0/checkpoints/last-*'))
    assert not (folder / FINISHED).exists()


@pytest.mark.slow
def test_trial_run_is_not_taken_for_a_training(sweep_file, tmp_path, program):
    """It writes nothing, and the sweep goes on."""
    trial = program('sweep', sweep_file(), *SMALL, '--trainer.fast_dev_run=1')
    assert '2 of 2' in trial.stdout
    assert list((tmp_path / 'runs').rglob(FINISHED)) == []


def test_training_that_fails_in_its_course_is_not_finished(on_photos, sweep_file, in_tmp_path):
    Path('fails.py').write_text('from lightning.pytorch import Callback\n\n\nclass Fails(Callback):\n'
                                '    def on_train_end(self, *_):\n        raise SystemExit(3)\n')
    file = sweep_file(
        command=[
            '${interpreter}', '-m', '${program}', 'fit', *on_photos, '--trainer.callbacks+=fails.Fails', '${args}'],
        parameters={'model.name': {'value': 'test_resnet'}})
    run, = runs_of(file, None, [])
    assert train(run) == 'exit status 3'
    assert any(run.folder.glob('version_*/config.yaml'))
    assert not (run.folder / FINISHED).exists()


def test_interrupt_is_told_and_left_to_the_terminal_to_pass_on(capsys):
    process = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE)
    with passed_on(process) as received:
        os.kill(os.getpid(), signal.SIGINT)
        assert received == [signal.SIGINT]
        process.communicate(b'\n')
    assert process.returncode == 0
    assert capsys.readouterr().err == (
        f'SIGINT: the sweep ends when this training has; if no terminal told that, too: kill -TERM {os.getpid()}\n')


def test_training_in_other_processes_is_the_same(sweep_file, capsys, in_tmp_path):
    run = checked(runs_of(sweep_file(), None, []))[1]
    mark(run.folder / FINISHED, run)
    main(['sweep', sweep_file(), '--trainer.strategy=ddp', '--trainer.num_nodes=2', '--trainer.accelerator=cpu',
          '--trainer.logger=false', '--data.prefetch=3', '--dry_run=true'])
    assert capsys.readouterr().out.count('--trainer.strategy=ddp') == 2  # and is not refused as another


def test_folders_of_long_values_can_be_made(sweep_file, in_tmp_path):
    values = [f'{{reduction: {number}{" " * 100}, drop_rate: {"0" * 300}.1}}' for number in (4, 8)]
    runs = runs_of(sweep_file(parameters={'model.network': {'values': values}}), None, [])
    for run in runs:
        run.folder.mkdir(parents=True)
    assert len({run.folder for run in runs}) == 2
