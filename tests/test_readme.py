"""The README's commands and code do what it says."""
import re
import shlex
from pathlib import Path

import pytest

from lightning_app.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf'^```{language}\n(.*?)^```', README, flags=re.M | re.S)


def commands() -> list[str]:
    """All commands of the program, continued lines joined."""
    text = '\n'.join(blocks('text') + blocks('bash')).replace('\\\n', ' ')
    return [line for line in text.splitlines() if 'lightning_app ' in line and not line.startswith('#')]


def test_opens_with_exactly_two_one_line_commands() -> None:
    first, second = blocks('bash')
    assert first == (
        "pip install -e '.[quickstart]' && python -m lightning_app fit --config configs/quickstart.yaml\n")
    assert second == "pip install -e '.[test]' && pytest -n 2 --dist loadfile\n"
    assert README.index(second) < README.index('\n## ')


def test_ci_runs_the_second_command() -> None:
    line = next(line for line in README.splitlines() if '&& pytest' in line)
    assert line == blocks('bash')[1].strip()
    assert "grep -m1 '&& pytest' README.md" in (ROOT / '.ci' / 'run').read_text()


@pytest.mark.parametrize('code', blocks('python'), ids=lambda code: code.strip().splitlines()[-1][:40])
def test_python_code_runs(code: str) -> None:
    lines = [line for line in code.splitlines() if 'pretrained=True' not in line]  # those need a download
    assert len(lines) < len(code.splitlines()) or 'pretrained=True' not in code
    exec('import timm, se_timm\n' + '\n'.join(lines), {})


@pytest.mark.parametrize('command', commands())
def test_command_parses(
        command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(command[command.index('lightning_app') + len('lightning_app'):])
    if '--ckpt_path' in words:  # the checkpoints are of other runs; tests of predict and resume cover these
        assert words[0] in ('fit', 'validate', 'predict', 'export', 'analyze')
        return
    if words[0] == 'dashboard':  # it has no config to print; without an account it writes a file
        monkeypatch.chdir(tmp_path)
        main(words)
        assert 'written to workspace.json' in capsys.readouterr().out
        return
    if words[0] in ('analyze', 'compare', 'loading', 'prepare'):  # of files that are not here: that is what they say
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 2
        assert 'there is no such option' not in capsys.readouterr().err
        return
    monkeypatch.chdir(ROOT)
    if words[0] == 'sweep':
        main([*words, '--dry_run', 'true'])
        assert '1 of ' in capsys.readouterr().out
        return
    with pytest.raises(SystemExit) as stop:
        main([*words, '--print_config'])
    assert stop.value.code == 0, capsys.readouterr().err
    assert 'model:' in capsys.readouterr().out


@pytest.mark.parametrize('path', sorted(set(re.findall(r'(?:configs|\.ci)/[\w/.]+', README))))
def test_named_file_exists(path: str) -> None:
    assert (ROOT / path.rstrip('.')).exists()


def test_every_config_is_named() -> None:
    for path in (ROOT / 'configs').rglob('*.yaml'):
        assert path.name in README


@pytest.mark.parametrize('name', re.findall(r"create_model\('([\w.]+)'", README))
def test_named_network_exists(name: str) -> None:
    import timm

    import se_timm  # noqa: F401

    base, _, tag = name.partition('.')
    assert timm.is_model(base)
    assert not tag or name in timm.list_models(f'{base}*', include_tags=True)
