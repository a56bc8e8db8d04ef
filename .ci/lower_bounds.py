"""Print the lower bound of every dependency in pyproject.toml as a pip constraint, `name==version`."""
import re
from pathlib import Path

import tomllib

project = tomllib.loads((Path(__file__).parents[1] / 'pyproject.toml').read_text())['project']
extras = project['optional-dependencies']
for requirement in [*project['dependencies'], *(each for name in extras if name != 'lint' for each in extras[name])]:
    if match := re.match(r'([\w.-]+)(?:\[[^]]*\])?>=([\w.]+)', requirement):
        print(f'{match[1]}=={match[2]}')
