"""Image files of every kind become 8-bit RGB with the right values, and broken ones are told."""
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, features

from lightning_app.data.decode import UnreadableImage, decode

RED, BLUE, WHITE, BLACK = (255, 0, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)


def encode(image, kind='PNG', **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def row(mode, *values):
    """Return a Pillow image of one row of pixels."""
    image = Image.new(mode, (len(values), 1))
    image.putdata(values)
    return image


def png(colour_type, depth, rows, *chunks):
    """Return a PNG file from raw rows of bytes: Pillow does not write 16-bit colour, nor 2 and 4 bits of grey."""
    def chunk(name, data):
        return struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name + data))
    samples = {0: 1, 2: 3, 4: 2, 6: 4}[colour_type]
    width = len(rows[0]) * 8 // (samples * depth)
    header = struct.pack('>IIBBBBB', width, len(rows), depth, colour_type, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + b''.join([
        chunk(b'IHDR', header), *(chunk(*each) for each in chunks),
        chunk(b'IDAT', zlib.compress(b''.join(b'\0' + line for line in rows))), chunk(b'IEND', b'')])


def big_endian(*values):
    return struct.pack(f'>{len(values)}H', *values)


def palette(*options, **more):
    image = row('P', 0, 1)
    image.putpalette([*RED, *BLUE])
    return encode(image, *options, **more)


def grey(*values):
    return [(value,) * 3 for value in values]


# 16 bits to 8 by 255 / 65535 and rounding: 128 is just below one half, 129 just above
SIXTEEN = (0, 128, 129, 257, 32768, 65278, 65535)
EIGHT = grey(0, 0, 1, 1, 128, 254, 255)
SIXTEEN_GREY = Image.fromarray(np.array([SIXTEEN], dtype=np.uint16))
# 0, 1024, 2048 and 4095 in 12 bits each, which Pillow does not write; then the tags: width, height, bits, no
# compression, black is 0, and where how many rows and bytes lie
TWELVE_GREY = b'II*\0' + struct.pack('<I', 14) + bytes.fromhex('000400800fff') + struct.pack('<H', 8) + b''.join(
    struct.pack('<HHII', tag, 3, 1, value) for tag, value in (
        (256, 4), (257, 1), (258, 12), (259, 1), (262, 1), (273, 8), (278, 1), (279, 6))) + bytes(4)

CASES = {
    'grey': (encode(row('L', 0, 7, 255)), grey(0, 7, 255)),
    'grey tiff': (encode(row('L', 0, 7, 255), 'TIFF'), grey(0, 7, 255)),
    'grey 2 bits': (png(0, 2, [bytes([0b00011011])]), grey(0, 85, 170, 255)),
    'grey 4 bits': (png(0, 4, [bytes([0x0F])]), grey(0, 255)),
    '1 bit': (encode(row('1', 0, 255)), grey(0, 255)),
    '1 bit tiff': (encode(row('1', 0, 255), 'TIFF'), grey(0, 255)),
    'rgb png': (encode(row('RGB', RED, (1, 2, 3))), [RED, (1, 2, 3)]),
    'rgb bmp': (encode(row('RGB', RED, (1, 2, 3)), 'BMP'), [RED, (1, 2, 3)]),
    'rgb ppm': (encode(row('RGB', RED, (1, 2, 3)), 'PPM'), [RED, (1, 2, 3)]),
    # (255 - ink) * (255 - black) / 255
    'cmyk tiff': (
        encode(row('CMYK', (0, 0, 0, 0), (255, 0, 0, 0), (0, 0, 0, 255), (51, 102, 153, 0)), 'TIFF'),
        [WHITE, (0, 255, 255), BLACK, (204, 153, 102)]),
    'palette': (palette(), [RED, BLUE]),
    'palette bmp': (palette('BMP'), [RED, BLUE]),
    'palette, one colour transparent': (palette(transparency=1), [RED, WHITE]),
    'palette, an alpha a colour': (palette(transparency=bytes([255, 0])), [RED, WHITE]),
    'palette, half transparent': (palette(transparency=bytes([255, 51])), [RED, (204, 204, 255)]),
    'rgb, one colour transparent': (
        png(2, 8, [bytes([*RED, *BLUE])], (b'tRNS', big_endian(*BLUE))), [RED, WHITE]),
    'grey, one value transparent': (png(0, 8, [bytes([9, 0])], (b'tRNS', big_endian(0))), [(9, 9, 9), WHITE]),
    'alpha': (
        encode(row('RGBA', (*RED, 255), (*RED, 0), (*BLACK, 51))), [RED, WHITE, (204, 204, 204)]),
    'alpha tiff': (encode(row('RGBA', (*RED, 255), (*RED, 0)), 'TIFF'), [RED, WHITE]),
    'grey with alpha': (encode(row('LA', (9, 255), (9, 0), (0, 51))), grey(9, 255, 204)),
    '16-bit grey png': (png(0, 16, [big_endian(*SIXTEEN)]), EIGHT),
    '16-bit grey png, by Pillow': (encode(SIXTEEN_GREY), EIGHT),
    '16-bit grey tiff': (encode(SIXTEEN_GREY, 'TIFF'), EIGHT),
    '16-bit grey tiff, big endian': (
        encode(Image.frombytes('I;16B', (len(SIXTEEN), 1), big_endian(*SIXTEEN)), 'TIFF'), EIGHT),
    '16-bit grey tiff, white is 0': (
        encode(SIXTEEN_GREY, 'TIFF', tiffinfo={262: 0}), grey(255, 255, 254, 254, 127, 1, 0)),
    '16-bit grey png, one value transparent': (
        png(0, 16, [big_endian(*SIXTEEN)], (b'tRNS', big_endian(257))), grey(0, 0, 1, 255, 128, 254, 255)),
    '12-bit grey tiff': (TWELVE_GREY, grey(0, 64, 128, 255)),
    '16-bit grey pgm': (b'P5 7 1 65535\n' + big_endian(*SIXTEEN), EIGHT),
    '16-bit grey with alpha': (png(4, 16, [big_endian(32768, 65535, 0, 0)]), grey(128, 255)),
    # colour is cut to its upper 8 bits, by Pillow
    '16-bit rgb': (png(2, 16, [big_endian(0, 32768, 65535, 65535, 257, 0)]), [(0, 128, 255), (255, 1, 0)]),
    '16-bit alpha': (png(6, 16, [big_endian(65535, 0, 0, 65535, 65535, 0, 0, 0)]), [RED, WHITE]),
}


@pytest.mark.parametrize('name', CASES)
def test_pixel_values(name):
    data, expected = CASES[name]
    image = decode(data)
    assert image.mode == 'RGB'
    assert image.size == (len(expected), 1)
    np.testing.assert_array_equal(np.asarray(image)[0], expected)


@pytest.mark.parametrize(('mode', 'colour', 'expected'), [
    ('RGB', (200, 100, 50), (200, 100, 50)), ('L', 90, (90, 90, 90)), ('CMYK', (51, 102, 153, 0), (204, 153, 102)),
])
def test_jpeg(mode, colour, expected):
    image = decode(encode(Image.new(mode, (16, 24), colour), 'JPEG', quality=95))
    assert (image.mode, image.size) == ('RGB', (16, 24))
    np.testing.assert_allclose(np.asarray(image, dtype=float), np.broadcast_to(expected, (24, 16, 3)), atol=3)


@pytest.mark.skipif(not features.check('webp'), reason='this Pillow has no WebP')
def test_webp(noise):
    np.testing.assert_array_equal(decode(encode(noise(0), 'WEBP', lossless=True)), noise(0))
    np.testing.assert_array_equal(
        np.asarray(decode(encode(row('RGBA', (*RED, 255), (*RED, 0)), 'WEBP', lossless=True)))[0], [RED, WHITE])


def test_rgb_is_not_changed(noise):
    np.testing.assert_array_equal(decode(encode(noise(0))), noise(0))


def test_orientation_is_not_applied(noise):
    # as timm and torchvision, whose published accuracies are of images as they are stored
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    data = encode(noise(0), 'PNG', exif=exif)
    assert Image.open(io.BytesIO(data)).getexif()[0x0112] == 6
    np.testing.assert_array_equal(decode(data), noise(0))


@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'TIFF', 'BMP', 'PPM', 'WEBP'])
@pytest.mark.parametrize('share', [0.1, 0.5, 0.9])
def test_truncated(noise, kind, share):
    data = encode(noise(0), kind)
    with pytest.raises(UnreadableImage):
        decode(data[:int(len(data) * share)])


@pytest.mark.parametrize('data', [b'', b'\0', b'not an image', b'<html>404</html>', b'\xff\xd8\xff', bytes(10000)])
def test_no_image(data):
    with pytest.raises(UnreadableImage) as error:
        decode(data)
    assert ' at 0x' not in str(error.value)


@pytest.mark.parametrize(('dtype', 'kind'), [('float32', 'floating-point'), ('int32', '32-bit')])
def test_values_without_a_range_are_told(dtype, kind):
    with pytest.raises(UnreadableImage, match=f'{kind} pixels have no known range'):
        decode(encode(Image.fromarray(np.full((2, 2), 200, dtype)), 'TIFF'))


@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'TIFF', 'BMP', 'WEBP'])
def test_damage_is_no_other_error(noise, kind):
    # whatever the damage, the caller sees an image or UnreadableImage: any other exception would end a training
    generator = np.random.default_rng(0)
    data = encode(noise(0), kind)
    unreadable = 0
    for _ in range(60):
        damaged = bytearray(data)
        for place in generator.integers(20, len(data), 3):  # beyond the size in the header, which could be huge
            damaged[place] = generator.integers(256)
        try:
            assert decode(bytes(damaged)).mode == 'RGB'
        except UnreadableImage:
            unreadable += 1
    assert unreadable or kind in ('BMP', 'JPEG')  # raw pixels and JPEG's entropy code have no check sums
