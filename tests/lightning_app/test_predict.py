"""`predict` writes a line for each image, whatever the image and the number of processes."""
import csv
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo
from torch.utils.data import DataLoader

from lightning_app import ImageClassifier
from lightning_app.callbacks.predictions import PredictionWriter
from lightning_app.cli import main

pytestmark = pytest.mark.usefixtures('in_tmp_path')

QUIET = ['--trainer.accelerator=cpu', '--trainer.enable_progress_bar=false', '--data.num_workers=0']


@pytest.fixture
def checkpoint(on_photos):
    main(['fit', *on_photos])
    return str(next(Path('runs').rglob('*.ckpt')))


@pytest.fixture
def mixed(tmp_path):
    """Seven images and a broken one, in nested folders."""
    root = tmp_path / 'mixed'
    for index, name in enumerate(['b/1.png', 'b/0.jpg', 'a.png', 'c/d/2.bmp', 'é, "x".png', 'z.PNG', 'y.webp']):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB' if index % 2 else 'L', (30 + index, 40), index * 30).save(path)
    (root / 'b' / 'broken.png').write_bytes(b'no image')
    return root


def table(path='predictions.csv'):
    with open(path, newline='') as file:
        return list(csv.reader(file))


@pytest.mark.parametrize('path', ['.', '', 'mixed/a.png/predictions.csv'])
def test_file_that_cannot_be_is_refused_before_the_predictions(path, mixed, make_trainer, photo_data, refused):
    trainer = make_trainer(callbacks=[PredictionWriter(path)])
    model = ImageClassifier('test_resnet', num_classes=3)
    with refused('PredictionWriter: path', '', 'name'):
        trainer.predict(model, photo_data(images=str(mixed)))
    assert not trainer.predict_loop.batch_progress.total.ready


def test_images_without_names_are_refused_before_the_predictions(make_trainer, refused):
    with refused('PredictionWriter', 'names of images', 'give predict the data module'):
        make_trainer(callbacks=[PredictionWriter()]).predict(
            ImageClassifier('test_resnet', num_classes=3), DataLoader(torch.zeros(4, 3, 32, 32)))


ORDER = ['a.png', 'b/0.jpg', 'b/1.png', 'b/broken.png', 'c/d/2.bmp', 'y.webp', 'z.PNG', 'é, "x".png']


def test_table_of_a_checkpoint(checkpoint, mixed, capsys):
    (mixed / 'notes.txt').write_text('no image')
    with pytest.warns(UserWarning, match='1 files have no image ending and are left out: notes.txt'):
        cli = main([
            'predict', '--ckpt_path', checkpoint, '--data.images', str(mixed), '--data.eval_batch_size=3', *QUIET])
    header, *rows = table()
    # three classes: fewer than five
    assert header == ['image', 'class1', 'probability1', 'class2', 'probability2', 'class3', 'probability3']
    assert [row[0] for row in rows] == ORDER
    model = ImageClassifier.load_from_checkpoint(checkpoint).eval()
    for index, row in enumerate(rows):
        if row[0] == 'b/broken.png':
            assert row[1:] == ['(unreadable)']
            continue
        with torch.no_grad():
            image = cli.datamodule.normalisation(cli.datamodule.prediction[index][0])
            probability, label = model(image[None]).softmax(1)[0].sort(descending=True)
        assert row[1::2] == [['ant', 'bee', 'cat'][i] for i in label]
        assert [float(cell) for cell in row[2::2]] == pytest.approx(probability.tolist(), abs=2e-6)
    assert 'predictions of 7 images: predictions.csv; 1 could not be read' in capsys.readouterr().out


def test_second_prediction_is_without_the_images_of_the_first(checkpoint, mixed):
    cli = main(['predict', '--ckpt_path', checkpoint, '--data.images', str(mixed), *QUIET])
    cli.datamodule.images = str(mixed / 'b')
    cli.trainer.predict(cli.model, cli.datamodule)
    assert [row[0] for row in table()] == ['image', '0.jpg', '1.png', 'broken.png']


def test_photos_are_told_apart(on_photos, photos):
    main(['fit', *on_photos, '--trainer.max_epochs=6', '--model.optim.lr=0.05'])
    checkpoint = str(next(Path('runs').rglob('*.ckpt')))
    main(['predict', '--ckpt_path', checkpoint, '--data.images', str(photos / 'val'), *QUIET])
    _, *rows = table()
    assert len(rows) == 7
    right = [row[1] == row[0].split('/')[0] for row in rows]
    assert sum(right) >= 6  # colours that differ much


def test_data_may_be_gone(checkpoint, mixed, photos):
    photos.rename('moved')
    main(['predict', '--ckpt_path', checkpoint, '--data.images', str(mixed), *QUIET])
    assert len(table()) == 9


def test_output_goes_where_it_is_told(checkpoint, mixed):
    main(['predict', '--ckpt_path', checkpoint, '--data.images', str(mixed), '--output=out/of/the/way.csv', *QUIET])
    assert len(table('out/of/the/way.csv')) == 9
    assert not Path('predictions.csv').exists()


@pytest.mark.parametrize('name', ['a.png', 'a.gif', 'a'])
def test_single_image(name, checkpoint, mixed):
    """Its ending is of no consequence."""
    Image.open(mixed / 'a.png').save(mixed / name, 'gif' if name == 'a.gif' else 'png')
    main(['predict', '--ckpt_path', checkpoint, '--data.images', str(mixed / name), *QUIET])
    assert [row[0] for row in table()] == ['image', name]
    assert table()[1][1] in ('ant', 'bee', 'cat')


@pytest.mark.parametrize('name', ['mixed.tar', 'mixed.tar.gz', 'MIXED.ZIP'])
def test_archive_in_place_of_a_folder(name, checkpoint, cli_error):
    Path(name).write_bytes(b'')
    given, why, do = cli_error(['predict', '--ckpt_path', checkpoint, '--data.images', name, *QUIET])
    assert given == f'data.images: {name}'
    assert 'an archive' in why
    assert 'unpack it' in do
    assert not Path('predictions.csv').exists()


def test_not_one_image_that_can_be_read(checkpoint, mixed, cli_error):
    images = str(mixed / 'b' / 'broken.png')
    given, why, _ = cli_error(['predict', '--ckpt_path', checkpoint, '--data.images', images, *QUIET])
    assert given == f'data.images: {images}'
    assert why == 'none of 1 images could be read'
    assert table()[1] == ['broken.png', '(unreadable)']


def test_name_that_is_no_text(checkpoint, mixed):
    name = os.fsdecode(b'latin\xe9.png')
    (mixed / 'a.png').rename(mixed / name)
    main(['predict', '--ckpt_path', checkpoint, '--data.images', str(mixed), *QUIET])
    assert b'\nlatin\xe9.png,' in Path('predictions.csv').read_bytes()
    assert Path('predictions.csv').read_bytes().count(b'\n') == 9


@pytest.mark.parametrize(('output', 'why'), [('mixed', 'it is a folder'), ('mixed/a.png/p.csv', 'a.png is a file')])
def test_output_that_cannot_be_written_is_refused_before_the_work(output, why, checkpoint, mixed, cli_error):
    lines = cli_error(['predict', '--ckpt_path', checkpoint, '--data.images', str(mixed), f'--output={output}', *QUIET])
    assert lines[0].startswith('output: mixed')
    assert why in lines[1]


def test_imagenet_names_without_a_checkpoint(mixed, weights):
    # as with --model.network.pretrained=true, which needs a download
    main(['predict', '--model.name=test_resnet', weights(1000), '--data=ImageNetDataModule',
          '--data.images', str(mixed), '--data.image_size=32', '--data.batch_size=4', *QUIET])
    header, *rows = table()
    assert header[-2:] == ['class5', 'probability5']
    assert [row[0] for row in rows] == ORDER
    names = ImageNetInfo()
    words = {names.index_to_description(index, detailed=False) for index in range(1000)}
    for row in rows:
        if row[1] != '(unreadable)':
            assert set(row[1::2]) <= words
            probabilities = [float(cell) for cell in row[2::2]]
            assert probabilities == sorted(probabilities, reverse=True)
            assert 0 < sum(probabilities) < 1


def test_classes_without_names_are_numbers(mixed, weights):
    main(['predict', '--model.name=test_resnet', weights(7), '--data=ImageNetDataModule', '--data.images', str(mixed),
          '--data.num_classes=7', '--data.image_size=32', '--data.batch_size=4', *QUIET])
    _, *rows = table()
    assert set(rows[0][1::2]) <= {str(label) for label in range(7)}


def test_images_that_were_not_looked_at_are_not_called_unreadable(checkpoint, mixed, capsys):
    main(['predict', '--ckpt_path', checkpoint, '--data.images', str(mixed), '--data.eval_batch_size=4',
          '--trainer.limit_predict_batches=0.5', *QUIET])
    assert [row[0] for row in table()[1:]] == ORDER[:4]
    assert [row[0] for row in table() if row[1] == '(unreadable)'] == ['b/broken.png']
    assert 'predictions of 3 images: predictions.csv; 1 could not be read' in capsys.readouterr().out


def test_batches_and_workers_do_not_change_the_table(checkpoint, mixed):
    args = ['predict', '--ckpt_path', checkpoint, '--data.images', str(mixed), *QUIET[:2]]
    main([*args, '--data.eval_batch_size=8', '--output=one.csv', '--data.num_workers=0'])
    main([*args, '--data.eval_batch_size=1', '--output=many.csv', '--data.num_workers=1'])
    assert_same_tables(table('one.csv'), table('many.csv'))


@pytest.mark.slow
def test_two_processes_write_the_same_file(checkpoint, mixed, program):
    args = ['predict', '--ckpt_path', checkpoint, '--data.images', str(mixed), '--data.eval_batch_size=4', *QUIET]
    main([*args, '--output=one.csv'])
    done = program(*args, '--output=two.csv', '--trainer.devices=2', '--trainer.strategy=ddp')
    assert_same_tables(table('one.csv'), table('two.csv'))
    assert done.stdout.count('predictions of 7 images: two.csv; 1 could not be read') == 1


def assert_same_tables(first, second):
    """Assert the same names in the same order, and probabilities that differ by float32's rounding at most."""
    assert [[row[0], *row[1::2]] for row in first] == [[row[0], *row[1::2]] for row in second]
    for ours, theirs in zip(first[1:], second[1:], strict=True):
        assert [float(cell) for cell in ours[2::2]] == pytest.approx([float(cell) for cell in theirs[2::2]], abs=2e-6)
