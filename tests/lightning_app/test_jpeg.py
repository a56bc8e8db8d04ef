"""JPEG decoders: the same pixels from each but one, and one choice among them."""
import io
import multiprocessing
import os
import time

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from lightning_app.data import jpeg
from lightning_app.data.decode import UnreadableImage, decode
from lightning_app.data.jpeg import DECODERS, choose_decoder
from lightning_app.data.picture import Picture
from lightning_app.data.splits import open_split


def encode(image, kind='JPEG', **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture(scope='module')
def files(photo):
    """Return JPEG files of every kind, by name."""
    exif = Image.Exif()
    exif[0x112] = 6  # to be shown turned
    whole = encode(photo, quality=90)
    return {
        '4:4:4': encode(photo, subsampling='4:4:4'), '4:2:2': encode(photo, subsampling='4:2:2'), '4:2:0': whole,
        'progressive': encode(photo, progressive=True), 'grey': encode(photo.convert('L')),
        'odd': encode(photo.crop((0, 0, 301, 227))), 'narrow': encode(photo.crop((0, 0, 1, 90))),
        'turned': encode(photo, exif=exif), 'RGB': encode(photo, keep_rgb=True), 'more behind it': whole + b'\0' * 99,
        'CMYK': encode(photo.convert('CMYK')), 'damaged': whole[:9000] + bytes(60) + whole[9060:],
        'PNG': encode(photo.crop((0, 0, 60, 40)), 'PNG')}


SAME = [name for name in DECODERS if name != 'simplejpeg-fast']
KINDS = ['4:4:4', '4:2:2', '4:2:0', 'progressive', 'grey', 'odd', 'narrow', 'turned', 'RGB', 'more behind it', 'CMYK',
         'damaged', 'PNG']


@pytest.mark.parametrize('name', SAME)
@pytest.mark.parametrize('kind', KINDS)
def test_every_decoder_gives_the_pixels_of_pillow(files, kind, name):
    picture, expected = Picture(files[kind], name), decode(files[kind])
    assert picture.size == (expected.height, expected.width)
    np.testing.assert_array_equal(picture.pixels(), expected)
    np.testing.assert_array_equal(Picture(files[kind], name).image(), expected)


def boxes(height, width):
    """Return rows and columns of parts: corners, the whole, the middle, the last row, the last column, at random."""
    low, high = slice(0, height // 2), slice(height // 2, height)
    left, right = slice(0, width // 2), slice(width // 2, width)
    some = [(low, left), (low, right), (high, left), (high, right), (slice(0, height), slice(0, width)),
            (slice(height // 4, height // 2), slice(width // 3, width // 2)),
            (slice(height - 1, height), slice(0, width)), (slice(0, height), slice(width - 1, width))]
    random = np.random.default_rng(height * width)
    for _ in range(40):
        top, left = random.integers(height), random.integers(width)
        some.append((slice(top, random.integers(top, height) + 1), slice(left, random.integers(left, width) + 1)))
    return [box for box in some if all(each.stop > each.start for each in box)]


@pytest.mark.parametrize('name', SAME)
@pytest.mark.parametrize('kind', KINDS)
def test_every_decoder_gives_the_same_parts(files, kind, name):
    expected = np.array(decode(files[kind]))
    for down, across in boxes(*expected.shape[:2]):
        pixels = Picture(files[kind], name).part(down, across)
        np.testing.assert_array_equal(pixels, expected[down, across])
        assert pixels.flags.c_contiguous
        assert pixels.flags.owndata


@pytest.mark.parametrize('colours', ['444', '422', '420', '440', '411'])
@pytest.mark.parametrize('size', [(64, 64), (65, 47), (97, 33), (17, 301)])
def test_parts_are_decoded_at_all(photo, colours, size):
    """With every subsampling of the colours, whose filter needs the neighbours of an edge."""
    pixels = np.array(photo.resize(size[::-1]))
    file = simplejpeg.encode_jpeg(pixels, colorsubsampling=colours)
    expected = np.array(decode(file))
    parts = [box for box in boxes(*size) if box[1].stop - box[1].start >= jpeg.NARROW]
    assert len(parts) > 8
    for down, across in parts:
        np.testing.assert_array_equal(jpeg.part_by_nvimgcodec(file, down, across), expected[down, across])


def test_parts_of_real_photos(real_data):
    source = open_split(real_data / 'imagenet1k-sample256', 'val')
    for index in range(0, 1000, 20):
        expected = np.array(source.load(index))
        for down, across in boxes(*expected.shape[:2])[:20]:
            np.testing.assert_array_equal(
                Picture(source.read(index), 'nvimgcodec').part(down, across), expected[down, across])


def test_parts_are_decoded_in_forked_processes(files):
    """After this process has decoded some; each has a decoder of its own."""
    box = slice(10, 90), slice(20, 99)
    expected = Picture(files['4:2:0'], 'nvimgcodec').part(*box)
    with multiprocessing.get_context('fork').Pool(2) as pool:
        for pixels in pool.starmap(jpeg.part_by_nvimgcodec, [(files['4:2:0'], *box)] * 8):
            np.testing.assert_array_equal(pixels, expected)


def test_what_c_writes_is_left_out(capfd):
    with jpeg.without_stderr():
        os.write(2, b'of no interest')
    os.write(2, b'this is')
    assert capfd.readouterr().err == 'this is'


@pytest.mark.parametrize('shrink', [2, 4, 8])
@pytest.mark.parametrize('kind', KINDS)
def test_every_decoder_gives_the_same_fewer_pixels(files, kind, shrink):
    expected = Picture(files[kind]).pixels(shrink)
    height, width = Picture(files[kind]).size
    fewer = (height, width) if kind in ('PNG', 'narrow') else (-(-height // shrink), -(-width // shrink))
    assert expected.shape[:2] == fewer
    for name in SAME:
        np.testing.assert_array_equal(Picture(files[kind], name).pixels(shrink), expected)


@pytest.mark.parametrize('name', DECODERS)
@pytest.mark.parametrize('length', [0, 2, 3, 20, 700, -2])
def test_every_decoder_tells_a_file_that_is_cut_off(files, name, length):
    picture = Picture(files['4:2:0'][:length], name)
    with pytest.raises(UnreadableImage):
        picture.pixels()
    with pytest.raises(UnreadableImage):
        Picture(files['4:2:0'][:length], name).part(slice(0, 2), slice(0, 20))  # which may be whole


@pytest.mark.parametrize('name', SAME)
def test_every_decoder_takes_real_photos_as_pillow_does(name, real_data):
    source = open_split(real_data / 'imagenet1k-sample256', 'val')
    for index in range(0, 1000, 20):
        np.testing.assert_array_equal(Picture(source.read(index), name).pixels(), source.load(index))


@pytest.mark.parametrize('shrink', [1, 2, 4, 8])
@pytest.mark.parametrize('kind', ['4:4:4', '4:2:2', '4:2:0', 'progressive', 'grey', 'odd', 'turned'])
def test_fast_pixels_are_near(files, kind, shrink):
    expected = Picture(files[kind]).pixels(shrink).astype(int)
    difference = abs(Picture(files[kind], 'simplejpeg-fast').pixels(shrink) - expected)
    assert difference.mean() < 2
    assert np.percentile(difference, 99) < 12
    assert shrink > 1 or difference.any()


def test_fast_pixels_of_real_photos_are_near(real_data):
    source = open_split(real_data / 'imagenet1k-sample256', 'val')
    difference = np.concatenate([
        abs(Picture(source.read(index), 'simplejpeg-fast').pixels() - np.array(source.load(index), int)).ravel()
        for index in range(0, 1000, 20)])
    assert difference.mean() < 2
    assert np.percentile(difference, 99) < 12


@pytest.mark.parametrize('kind', ['CMYK', 'damaged', 'PNG'])
def test_what_the_fast_decoder_refuses_is_left_to_pillow(files, kind):
    np.testing.assert_array_equal(Picture(files[kind], 'simplejpeg-fast').pixels(), decode(files[kind]))


def test_image_in_memory(noise):
    picture = Picture(noise(3))
    assert picture.size == (noise(3).height, noise(3).width)
    assert picture.image() is picture.image()
    np.testing.assert_array_equal(picture.pixels(4), noise(3))
    assert Picture.of(picture) is picture


def test_the_fastest_is_chosen(files, monkeypatch):
    def slow(data):
        time.sleep(0.02)
        return DECODERS['pillow'].pixels(data)

    decoders = {name: DECODERS['pillow']._replace(pixels=slow) for name in ('first', 'second', 'third')}
    decoders['second'] = DECODERS['pillow']
    monkeypatch.setattr(jpeg, 'DECODERS', decoders)
    assert choose_decoder('auto', [files['PNG'], files['odd']]) == 'second'
    assert choose_decoder('auto', [files['PNG']]) == 'first'  # no JPEG to try
    assert choose_decoder('third', [files['odd']]) == 'third'


def test_large_files_are_decoded_few_times(files, monkeypatch):
    decoded = []

    def slow(data):
        decoded.append(data)
        time.sleep(0.05)
        return DECODERS['pillow'].pixels(data)

    monkeypatch.setattr(jpeg, 'SECONDS', 0.15)
    monkeypatch.setattr(jpeg, 'DECODERS', {'slow': DECODERS['pillow']._replace(pixels=slow), **DECODERS})
    assert jpeg.decoding_seconds(['slow', 'pillow'], [files['odd']] * 4)['slow'] > 0.05
    assert 2 <= len(decoded) <= 3


def test_decoders_of_parts_are_tried_with_parts(files, monkeypatch):
    """They are chosen where that is faster, and not where it fails."""
    def slow(data):
        time.sleep(0.02)
        return DECODERS['pillow'].pixels(data)

    def broken(data, down, across):
        raise OSError('no such instruction')

    parts = DECODERS['nvimgcodec']._replace(pixels=slow)
    monkeypatch.setattr(jpeg, 'DECODERS', {'pillow': DECODERS['pillow']._replace(pixels=slow), 'parts': parts})
    assert choose_decoder('auto', [files['odd'], files['CMYK'], files['more behind it']]) == 'parts'
    monkeypatch.setitem(jpeg.DECODERS, 'parts', parts._replace(part=broken))
    assert choose_decoder('auto', [files['odd']]) == 'pillow'


def test_a_decoder_with_other_pixels_is_not_chosen(files, monkeypatch):
    monkeypatch.setattr(jpeg, 'decoding_seconds', lambda names, examples: dict.fromkeys(names, 1) | {names[-1]: 0})
    assert choose_decoder('auto', [files['odd']]) == 'pillow'
    assert choose_decoder('simplejpeg-fast', [files['odd']]) == 'simplejpeg-fast'
    assert choose_decoder('simplejpeg-fast', [files['odd']], accurate=True) == 'simplejpeg'
    assert choose_decoder('pillow', accurate=True) == 'pillow'


def test_a_decoder_that_does_not_work_here_is_not_chosen(files, monkeypatch):
    def broken(data):
        raise ImportError('libsomething.so: cannot open shared object file')

    decoders = {'broken': DECODERS['pillow']._replace(pixels=broken), 'pillow': DECODERS['pillow']}
    monkeypatch.setattr(jpeg, 'DECODERS', decoders)
    assert choose_decoder('auto', [files['odd']]) == 'pillow'


def test_a_decoder_that_breaks_down_leaves_the_file_to_pillow(files, monkeypatch):
    def broken(data):
        raise MemoryError

    monkeypatch.setitem(DECODERS, 'simplejpeg', DECODERS['simplejpeg']._replace(pixels=broken))
    np.testing.assert_array_equal(Picture(files['odd'], 'simplejpeg').pixels(), decode(files['odd']))


def test_unknown_decoder(refused):
    with refused("data.decoder: 'simplejpg'", 'no such', 'did you mean simplejpeg or simplejpeg-fast?'):
        choose_decoder('simplejpg')


def test_decoder_that_is_not_installed(refused, monkeypatch):
    for name in ('nvimgcodec', 'simplejpeg', 'simplejpeg-fast'):
        monkeypatch.setitem(DECODERS, name, DECODERS[name]._replace(packages=('PIL', 'nowhere.at_all')))
        with refused(f'data.decoder: {name}', 'nowhere.at_all is not installed', "pip install 'se-timm[fast]'"):
            choose_decoder(name)
    assert choose_decoder() == 'torchcodec'
