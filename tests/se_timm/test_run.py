"""`python -m se_timm.run SCRIPT ARGS`: a script of timm's kind, run as Python would run it, sees our networks."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import se_timm
from se_timm.run import main

SCRIPT = '''
"""Imports a neighbour, as timm's scripts may, and says what it finds."""
import json, sys
import neighbour, timm
if __name__ == '__main__':
    print(json.dumps({
        'argv': sys.argv, 'path': sys.path[0], 'file': __file__, 'neighbour': neighbour.VALUE,
        'networks': timm.list_models('se_*'), 'shape': list(timm.create_model(sys.argv[2]).fc.weight.shape),
    }))
    sys.exit(3)
'''


def run(*arguments, cwd):
    """Run the module in a fresh process in `cwd`, which finds se_timm also if it is not installed."""
    paths = [str(Path(se_timm.__file__).parents[1]), os.environ.get('PYTHONPATH')]
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join(filter(None, paths))}
    return subprocess.run(
        [sys.executable, '-m', 'se_timm.run', *arguments],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture
def script(tmp_path):
    folder = tmp_path / 'scripts'
    folder.mkdir()
    (folder / 'neighbour.py').write_text('VALUE = 42\n')
    (folder / 'validate.py').write_text(SCRIPT)
    return folder / 'validate.py'


@pytest.mark.parametrize('relative', [True, False], ids=['relative', 'absolute'])
def test_script_runs_as_main_with_its_arguments_and_our_networks(script, tmp_path, relative):
    path = os.path.join('scripts', 'validate.py') if relative else str(script)
    result = run(path, '--model', 'se_resnet20_cifar', '--flag', cwd=tmp_path)
    assert result.returncode == 3, result.stderr  # the script's own
    seen = json.loads(result.stdout)
    assert seen['argv'] == [path, '--model', 'se_resnet20_cifar', '--flag']
    assert seen['neighbour'] == 42
    assert Path(seen['path']).resolve() == script.parent.resolve()
    assert Path(tmp_path, seen['file']).resolve() == script.resolve()
    assert {'se_resnet50', 'se_resnet20_cifar'} <= set(seen['networks'])
    assert seen['shape'] == [10, 64]


def test_help_tells_of_the_command(capsys):
    with pytest.raises(SystemExit) as stop:
        main(['--help'])
    assert stop.value.code == 0
    assert 'python -m se_timm.run SCRIPT' in capsys.readouterr().out


def test_safe_path_has_no_folder_of_the_script(tmp_path):
    (tmp_path / 'lib').mkdir()
    (tmp_path / 'lib' / 'only_here.py').touch()
    (tmp_path / 'script.py').write_text('import only_here\n')
    paths = f'{tmp_path}/lib{os.pathsep}{Path(se_timm.__file__).parents[1]}'
    result = subprocess.run(
        [sys.executable, '-m', 'se_timm.run', 'script.py'], cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env={**os.environ, 'PYTHONSAFEPATH': '1', 'PYTHONPATH': paths}, check=False)
    assert result.returncode == 0, result.stderr


def test_traceback_of_the_script_is_shown(tmp_path):
    (tmp_path / 'broken.py').write_text('raise LookupError("from the script")\n')
    result = run('broken.py', cwd=tmp_path)
    assert result.returncode == 1
    assert 'LookupError: from the script' in result.stderr


@pytest.mark.parametrize(('arguments', 'given'), [(['missing.py', '--model', 'x'], 'missing.py'), ([], 'none')])
def test_missing_script_is_an_error_of_three_lines(arguments, given, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    first, why, remedy = capsys.readouterr().err.splitlines()
    assert first == f'error: script: {given}'
    assert why.startswith('  why: ')
    assert 'python -m se_timm.run' in remedy
