"""The program as a user starts it, in a process of its own."""
import ast
import os
import re
import shlex
import signal
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from lightning_app import __main__ as entry
from lightning_app.cli import main
from se_timm.errors import until_nobody_reads

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

REPOSITORY = Path(__file__).parents[2]


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        main(['--help'])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith('usage: python -m lightning_app')
    for command in ('fit', 'validate', 'test', 'predict'):
        assert re.search(rf'^ +{command} +\w[^.]+\.$', text, re.MULTILINE)  # whole sentences
    assert '__main__.py' not in text
    assert re.search(r'Other commands: analyze, .*\bsweep\.', text, re.DOTALL)


def test_help_of_fit_explains_every_argument_of_ours(capsys):
    with pytest.raises(SystemExit) as stop:
        main(['fit', '--help'])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for option in ('model.name', 'model.optim.lr', 'model.schedule.warmup_epochs', 'model.loss.smoothing',
                   'model.fused', 'model.recompute', 'model.compile',
                   'model.max_nonfinite_steps'):
        assert re.search(rf'--{re.escape(option)} \S+\n? +\S+', text), option
    assert 'model.num_classes' not in re.findall(r'--([\w.]+)', text)


@pytest.mark.parametrize(('command', 'said'), [
    ('fit', 'last.*of the runs that is whole; or.*auto'), ('validate', 'Checkpoint of a training'),
    ('predict', 'Checkpoint of a training')])
def test_help_of_the_checkpoint_has_the_words_that_are_taken(capsys, command, said):
    with pytest.raises(SystemExit):
        main([command, '--help'])
    text = ' '.join(re.split(r'--ckpt_path CKPT_PATH|--(?:weights|verbose)', capsys.readouterr().out)[1].split())
    assert re.search(said, text)
    assert 'registry' not in text
    assert 'hpc' not in text


@pytest.mark.parametrize('option', ['--data.help', '--data.help=DigitsDataModule', '--model.distill.help'])
def test_help_of_a_class(capsys, option):
    with pytest.raises(SystemExit) as stop:
        main(['fit', option])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith('usage: python -m lightning_app ')


def test_entry_is_main():
    assert entry.main is main


def test_quickstart_trains_says_the_result_and_evaluates_it_by_the_command_it_prints(program, tmp_path):
    config = REPOSITORY / 'configs' / 'quickstart.yaml'
    done = program('fit', '--config', config, '--trainer.max_epochs=2', '--trainer.accelerator=cpu')
    said = done.stdout + done.stderr
    assert 'se_resnet20_cifar: 0.27 M parameters' in said
    assert 'Traceback' not in said
    # nothing that a newcomer would have to look up
    for noise in ('wandb: WARNING', 'anonymous', 'will be deleted'):
        assert noise not in said, said[max(said.index(noise) - 300, 0):said.index(noise) + 300]
    best = re.search(r'best: top-1 ([\d.]+) %, top-5 ([\d.]+) %, epoch (\d)', said)
    assert float(best[1]) > 20  # of ten classes, in two epochs
    folder = tmp_path / 'runs' / 'quickstart' / 'version_0'
    assert (folder / 'config.yaml').is_file()
    assert (folder / 'metrics.csv').is_file()
    assert len(list(folder.rglob('run-*.wandb'))) == 1

    command = shlex.split(re.search(r'evaluate: +(.*)', said)[1])
    assert command[:3] == ['python', '-m', 'lightning_app']
    evaluated = program(*command[3:], '--trainer.accelerator=cpu')
    numbers = {name: float(value) for name, value in re.findall(r'(val/top[15])\W+([\d.]+)', evaluated.stdout)}
    assert numbers == pytest.approx({'val/top1': float(best[1]), 'val/top5': float(best[2])}, abs=0.005)
    # an evaluation needs no callbacks and writes no checkpoints
    for noise in ('Be aware that when using', 'dirpath has changed'):
        assert noise not in evaluated.stderr


def test_error_is_three_lines_after_nothing_but_the_prefix(program):
    done = program('fit', '--model.lr=0.1', check=False)
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 3
    assert lines[0] == 'error: model.lr=0.1' or lines[0].startswith('error: --model.lr')
    assert lines[1].startswith('  why: ')
    assert lines[2].startswith('  do:  did you mean --model.optim.lr')
    assert done.stdout == ''


def bounds(name):
    project = tomllib.loads((REPOSITORY / 'pyproject.toml').read_text())['project']
    return next(Requirement(line).specifier for line in project['dependencies'] if Requirement(line).name == name)


@pytest.mark.parametrize(('version', 'accepted'), [
    ('2.6.2', False), ('2.6.3', False),  # malicious: GHSA-w37p-236h-pfx3
    ('2.7.0', False),  # may change the private hook by which what is given survives --ckpt_path
    ('2.6.1', False), ('2.6.4', True), ('2.6.6', True)])
def test_bounds_of_lightning(version, accepted):
    assert (version in bounds('lightning')) == accepted


def public_names(tree):
    return {name for each in tree.body if isinstance(each, ast.Assign) and ast.unparse(each.targets[0]) == '__all__'
            for name in ast.literal_eval(each.value)}


def test_what_one_module_imports_of_another_is_public_there():
    trees = {path: ast.parse(path.read_text()) for package in ('se_timm', 'lightning_app')
             for path in (REPOSITORY / package).rglob('*.py')}
    public = {path.parent if path.stem == '__init__' else path.with_suffix(''): public_names(tree)
              for path, tree in trees.items()}
    imports = [(path, each) for path, tree in trees.items() for each in ast.walk(tree)
               if isinstance(each, ast.ImportFrom)]
    missing = set()
    for path, each in imports:
        folder = path.parents[each.level - 1] if each.level else REPOSITORY
        source = folder.joinpath(*(each.module or '').split('.'))
        names = {alias.name for alias in each.names if source / alias.name not in public} - {'*'}
        missing |= {f'{source}: {name}' for name in names - public.get(source, names) if name[0] != '_'}
    assert not missing


def test_every_dependency_has_a_lower_bound():
    project = tomllib.loads((REPOSITORY / 'pyproject.toml').read_text())['project']
    for line in project['dependencies']:
        assert any(bound.operator in ('>=', '~=', '==') for bound in Requirement(line).specifier), line


@pytest.mark.parametrize(('module', 'arguments'), [
    ('se_timm.zoo', ['se_resnet18']), ('lightning_app', ['compare', 'run'])], ids=['zoo', 'compare'])
def test_output_that_nobody_reads_ends_the_program_quietly(module, arguments, program, tmp_path):
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'metrics.csv').write_text('epoch,step,val/top1,val/loss\n0,3,50.0,1.0\n')
    reading, writing = os.pipe()
    os.close(reading)
    done = program(*arguments, module=module, check=False, stdout=writing)
    os.close(writing)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, '')


def test_output_that_is_closed_is_not_waited_for(program):
    done = program('se_resnet18', module='se_timm.zoo', prefix=['bash', '-c', 'exec "$@" >&-', '-'])
    assert (done.stdout, done.stderr) == ('', '')


def test_other_pipe_that_is_broken_is_told():
    with pytest.raises(BrokenPipeError), until_nobody_reads():
        raise BrokenPipeError
