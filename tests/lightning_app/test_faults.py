"""The faults of `faults.py`, each on a training of its own."""
import os
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

faults = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name('faults.py'))))

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != 'linux', reason='looks for processes in /proc')]


@pytest.fixture(scope='module')
def expected(tmp_path_factory):
    return faults.unbroken(tmp_path_factory.mktemp('unbroken'))


@pytest.mark.parametrize('fault', faults.FAULTS, ids=lambda fault: fault.__name__)
def test_fault(fault, expected, tmp_path):
    if fault is faults.disk_full and os.geteuid() != 0:
        pytest.skip('only root can mount a small disk')
    fewer = {'times': 2} if fault in (faults.job_killed, faults.checkpoint_damaged) else {}
    with faults.Training(tmp_path) as training:
        assert fault(training, expected, **fewer)
