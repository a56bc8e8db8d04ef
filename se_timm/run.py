"""`python -m se_timm.run SCRIPT [ARGS...]`: run a timm script (validate.py, benchmark.py, train.py) with our networks.

timm's scripts know the networks that are registered when they run; this registers ours first and then runs the script
as `python SCRIPT ARGS...` would. Under torchrun: `torchrun --nproc-per-node=8 -m se_timm.run train.py ...`.
"""
from __future__ import annotations

import runpy
import sys
from pathlib import Path

import se_timm  # noqa: F401  (registers the networks)

from .errors import InputError, exit_status, message, nearby


def check_script(arguments: list[str]) -> int:
    """Return 0 if the first of `arguments` is a script, else raise `InputError`."""
    if not arguments or not Path(arguments[0]).is_file():
        usage = ('python -m se_timm.run path/to/validate.py --model se_resnet50 ...; timm has its scripts in its '
                 'repository')
        raise InputError(message(f'script: {arguments[0]}', 'there is no such file', nearby(Path(arguments[0]), usage))
                         if arguments else message('script: none', 'a script to run is needed', usage))
    return 0


def main(arguments: list[str]) -> None:
    """Run the script `arguments[0]` with the remaining arguments, as `__main__`.

    Raises:
        SystemExit: With status 2, after a message, if no script is named or it does not exist; after `--help` with 0.
    """
    if arguments[:1] in (['-h'], ['--help']):
        print(__doc__)
        raise SystemExit(0)
    if status := exit_status(lambda: check_script(arguments)):
        raise SystemExit(status)
    script = arguments[0]
    sys.argv = arguments
    if not getattr(sys.flags, 'safe_path', False):  # Python 3.11 on; then there is no folder of the program's
        sys.path[0] = str(Path(script).resolve().parent)
    runpy.run_path(script, run_name='__main__')


if __name__ == '__main__':
    main(sys.argv[1:])
