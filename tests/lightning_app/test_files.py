"""Files that are written beside their place."""
import pytest

from lightning_app.files import replaced, writing


@pytest.mark.parametrize(('name', 'unfinished'), [(None, '.a.txt'), ('.other', '.other')])
def test_an_older_file_stays_until_the_new_one_is_written(tmp_path, name, unfinished):
    file = tmp_path / 'a.txt'
    file.write_text('old')
    with replaced(file, name) as place:
        place.write_text('new')
        assert (place.name, file.read_text()) == (unfinished, 'old')
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [('a.txt', 'new')]


@pytest.mark.parametrize('error', [OSError, KeyboardInterrupt])
@pytest.mark.parametrize('begun', [True, False])
def test_an_unfinished_file_is_removed(tmp_path, error, begun):
    def write(place):
        if begun:
            place.write_text('half of')
        raise error

    file = tmp_path / 'a.txt'
    file.write_text('old')
    with pytest.raises(error), replaced(file) as place:
        write(place)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [('a.txt', 'old')]


def test_file_that_cannot_be_written_is_named_once(tmp_path, refused):
    file = tmp_path / 'none' / 'a.txt'
    for given, why in ((f'output: {tmp_path}', f'it cannot be written (No such file or directory: {file})'),
                       (f'output: {file}', 'it cannot be written (No such file or directory)')):
        with refused(given, why, 'make room'), writing(given, 'make room'):
            file.write_text('')
    with refused('output: a', 'it cannot be written (other images)', 'make room'), writing('output: a', 'make room'):
        raise OSError('other images')


def test_nothing_written(tmp_path):
    with pytest.raises(FileNotFoundError), replaced(tmp_path / 'a.txt'):
        pass
