"""timm's own model tests, from the source archive of the installed timm, unchanged, on every network of ours."""
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from xml.etree import ElementTree

import pytest
import timm

import se_timm

MODULES = [module for module in timm.list_modules() if module.startswith('se_')]
NAMES = set(timm.list_models(module=MODULES))
TAGGED = set(timm.list_models(module=MODULES, include_tags=True))
KINDS = {
    'test_model_forward': NAMES,
    'test_model_backward': NAMES,
    'test_model_default_cfgs': TAGGED,
    'test_model_forward_torchscript': NAMES,
    'test_model_forward_features': NAMES,
    'test_model_forward_intermediates_features': NAMES,
    'test_model_forward_intermediates': NAMES,
    'test_prune_intermediate_layers_contract': NAMES,
    'test_model_forward_fx': NAMES,
    'test_model_backward_fx': NAMES,
    'test_model_forward_fx_torchscript': NAMES,
}
DOWNLOADING = ['test_model_inference', 'test_model_load_pretrained', 'test_model_features_pretrained']

# timm's file asks for names when it is collected. The plugin runs before: it registers ours and lets the file see them
# alone, also where the file names timm's own modules, a list that no module outside of timm can be in. It lets
# the maps of inception_v3* and inception_resnet_v2* be smaller than those of other networks: so it must know ours, too.
PLUGIN = '''
import fnmatch

import timm
import se_timm

MODULES = {modules!r}
OURS = set(timm.list_models(module=MODULES))
every_model = timm.list_models


def list_models(filter='', module='', **arguments):
    names = every_model(filter, MODULES if module else '', **arguments)
    return [name for name in names if name.split('.')[0] in OURS]


timm.list_models = list_models
match = fnmatch.fnmatch


def match_ours(name, pattern):
    name, prefix = str(name), 'se_'
    return match(name, pattern) or name.startswith(prefix + 'inception') and match(name[len(prefix):], pattern)


fnmatch.fnmatch = match_ours


def pytest_addoption(parser):
    parser.addoption('--only')
    parser.addoption('--other-than')


def wanted(item, only, other_than):
    name = getattr(item, 'callspec', None) and item.callspec.params.get('model_name')
    is_ours = isinstance(name, str) and name.split('.')[0] in OURS
    return is_ours and (item.originalname == only if only else item.originalname not in other_than)


def pytest_collection_modifyitems(config, items):
    only, other_than = config.getoption('--only'), (config.getoption('--other-than') or '').split(',')
    chosen = [item for item in items if wanted(item, only, other_than)]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen
'''

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope='module')
def suite(tmp_path_factory):
    """Return a folder with the tests of the installed timm version and the plugin."""
    folder = tmp_path_factory.mktemp('timm')
    requirement = f'timm=={timm.__version__}'
    download = subprocess.run(
        [sys.executable, '-m', 'pip', 'download', '--no-deps', '--no-binary', 'timm', requirement, '-d', folder],
        capture_output=True, text=True, timeout=600, check=False)
    if download.returncode:
        report = pytest.fail if 'CI' in os.environ else pytest.skip
        report(f'the source archive of {requirement} cannot be had: {download.stderr.strip()[-500:]}')
    [archive] = folder.glob('timm-*.tar.gz')
    with tarfile.open(archive) as tar:
        # not the package: the tests are to find the installed one
        wanted = [m for m in tar.getmembers() if re.match(r'[^/]+/(tests/.*|pyproject\.toml)$', m.name)]
        tar.extractall(folder, members=wanted, filter='data')
    [root] = [path.parent for path in folder.glob('*/pyproject.toml')]
    (root / 'ours_only.py').write_text(PLUGIN.format(modules=MODULES))
    return root


def run(suite, report, *options):
    """Run timm's file in a fresh process; return the exit code, the output and the names of the tests by outcome."""
    paths = [str(suite), str(Path(se_timm.__file__).parents[1]), os.environ.get('PYTHONPATH')]
    # on GitHub's machines the file leaves tests out
    environment = {key: value for key, value in os.environ.items() if key not in ('GITHUB_ACTIONS', 'PYTEST_ADDOPTS')}
    environment['PYTHONPATH'] = os.pathsep.join(filter(None, paths))
    result = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-p', 'ours_only', '-W', 'ignore', '-o', 'junit_logging=no',
         f'--junitxml={report}', *options, os.path.join('tests', 'test_models.py')],
        cwd=suite, env=environment, capture_output=True, text=True, timeout=1700, check=False)
    return result.returncode, result.stdout[-6000:] + result.stderr[-2000:], outcomes(report)


def outcomes(report):
    """Return model name -> 'passed', or what else came of its test."""
    cases = ElementTree.parse(report).iter('testcase')
    return {
        case.get('name').split('[')[-1].rstrip(']').split('-')[-1]: next((child.tag for child in case), 'passed')
        for case in cases
    }


@pytest.mark.parametrize('kind', KINDS)
def test_timms_test_passes_on_every_network(suite, kind, tmp_path):
    code, output, outcome = run(suite, tmp_path / 'report.xml', f'--only={kind}')
    assert outcome == dict.fromkeys(KINDS[kind], 'passed'), output
    assert code == 0, output


def test_whatever_else_timm_tests_on_every_model_passes(suite, tmp_path):
    """A kind of test that a later timm adds is run here, until it has its line above."""
    known = ','.join([*KINDS, *DOWNLOADING])
    code, output, outcome = run(suite, tmp_path / 'report.xml', f'--other-than={known}')
    assert set(outcome.values()) <= {'passed', 'skipped'}, output
    assert code == (0 if outcome else pytest.ExitCode.NO_TESTS_COLLECTED), output


def test_timms_file_has_the_tests_that_are_left_out(suite):
    text = (suite / 'tests' / 'test_models.py').read_text()
    assert [name for name in [*KINDS, *DOWNLOADING] if f'def {name}(' not in text] == []
