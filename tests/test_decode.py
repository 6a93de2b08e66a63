"""Decoding: every kind of picture upright and in its colours, bombs and rubbish refused."""

import functools
import io
import itertools
import random
import struct
import zlib
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from conftest import BROKEN, SIDE, encode
from PIL import Image, PngImagePlugin, features

import dataio


def decode(data, size=SIDE, max_pixels=1_000_000):
    image = dataio.decode_image(data, size, max_pixels)
    assert image.dtype == np.uint8
    assert image.shape == (size, size, 3)
    return image


def plain(mode, colour, size=(SIDE, SIDE)):
    return Image.new(mode, size, colour)


def palette(size=(SIDE, SIDE)):
    image = Image.new("P", size, 3)
    image.putpalette([0, 0, 0] * 3 + [10, 200, 30] + [255] * 3 * 252)
    return image


def need_codec(kind):
    codec = {"avif": "avif", "jpeg2000": "jpg_2000"}.get(kind)
    if codec and not features.check(codec):
        pytest.skip(f"Pillow without {kind}")


def deep_grey(value, size=SIDE):
    return Image.fromarray(np.full((size, size), value, np.uint16))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (encode(plain("L", 99)), (99, 99, 99)),
        (encode(palette()), (10, 200, 30)),
        (encode(palette(), transparency=7), (10, 200, 30)),
        (encode(palette(), transparency=bytes([255, 255, 255, 9])), (124, 131, 125)),
        (encode(plain("RGB", (1, 2, 3))), (1, 2, 3)),
        (encode(plain("RGBA", (1, 2, 3, 255))), (1, 2, 3)),
        (encode(plain("LA", (77, 255))), (77, 77, 77)),
        (encode(plain("1", 1)), (255, 255, 255)),
        (encode(plain("1", 0)), (0, 0, 0)),
        (encode(deep_grey(0xABCD)), (0xAB, 0xAB, 0xAB)),
        (encode(deep_grey(0xABCD), "tiff"), (0xAB, 0xAB, 0xAB)),
        (encode(deep_grey(65535)), (255, 255, 255)),
        (encode(deep_grey(255)), (255, 255, 255)),
        (encode(plain("CMYK", (0, 0, 0, 0)), "jpeg"), (255, 255, 255)),
        (encode(plain("CMYK", (0, 255, 255, 0)), "jpeg"), (255, 0, 0)),
        (encode(plain("L", 80), "jpeg"), (80, 80, 80)),
        (encode(plain("RGB", (200, 30, 60)), "jpeg", quality=100, subsampling=0), (200, 30, 60)),
        (encode(plain("RGB", (200, 30, 60)), "webp", lossless=True), (200, 30, 60)),
        (encode(plain("RGB", (200, 30, 60)), "bmp"), (200, 30, 60)),
        (encode(plain("RGB", (200, 30, 60)), "tiff"), (200, 30, 60)),
        (encode(palette(), "gif"), (10, 200, 30)),
        (encode(plain("RGB", (200, 30, 60)), "jpeg", exif=b"Exif\0\0 no such thing"), (200, 30, 60)),
    ],
)  # fmt: skip
def test_pictures_of_every_mode_have_their_colour(data, expected):
    assert np.abs(decode(data).astype(int) - expected).max() <= 3


def test_a_square_png_of_the_right_size_is_decoded_bit_for_bit():
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    assert (decode(encode(pixels)) == pixels).all()
    assert (decode(memoryview(encode(pixels))) == pixels).all()
    assert (decode(pa.py_buffer(encode(pixels))) == pixels).all()


@pytest.mark.parametrize("kind", ["jpeg", "png", "tiff", "webp", "avif"])
@pytest.mark.parametrize(
    ("orientation", "corner"),
    [(1, (0, 0)), (2, (0, 1)), (3, (1, 1)), (4, (1, 0)), (5, (0, 0)), (6, (0, 1)), (7, (1, 1)), (8, (1, 0))],
)
def test_a_camera_held_sideways_is_turned_upright(kind, orientation, corner):
    need_codec(kind)
    pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
    pixels[:8, :8] = 255  # white at the upper left of what is stored
    assert brightest_corner(encode(pixels, kind, exif=turned_exif(orientation))) == corner


def turned_exif(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def brightest_corner(data):
    image = decode(data).astype(int)
    bright = {(y, x): image[8 * y : 8 * y + 8, 8 * x : 8 * x + 8].mean() for y in (0, 1) for x in (0, 1)}
    corner = max(bright, key=bright.get)
    assert bright[corner] > 220
    return corner


def profile_text(text):
    """A PNG, white at the upper left, with EXIF as ImageMagick writes it: as hexadecimal text."""
    pixels, notes = np.zeros((SIDE, SIDE, 3), np.uint8), PngImagePlugin.PngInfo()
    pixels[:8, :8] = 255
    notes.add_text("Raw profile type exif", f"\nexif\n{len(text) // 2:8}\n{text}\n")
    return encode(pixels, pnginfo=notes)


def test_exif_as_text_turns_a_png_and_is_passed_over_where_it_is_no_hexadecimal():
    assert brightest_corner(profile_text(turned_exif(6).tobytes().hex())) == (0, 1)
    for text in ("no hexadecimal", "deadbeef", "", "4"):
        assert brightest_corner(profile_text(text)) == (0, 0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_exif_that_is_damaged_anywhere_never_costs_the_picture(kind):
    pixels, whole = np.full((SIDE, SIDE, 3), 90, np.uint8), turned_exif(6)
    whole[0x010F] = "a maker"
    whole[0x011A] = 72.0
    whole = whole.tobytes()
    damaged = [whole[:end] for end in range(6, len(whole))]
    damaged += [whole[:at] + bytes([value]) + whole[at + 1 :] for at in range(6, len(whole)) for value in (0, 255)]
    for exif in (*damaged, b"Exif\0\0 no such thing", b"rubbish"):
        assert np.abs(decode(encode(pixels, kind, exif=exif)).astype(int) - 90).max() <= 1


@pytest.mark.filterwarnings("ignore")
def test_a_readable_orientation_turns_the_picture_though_the_rest_of_the_exif_is_broken():
    exif = turned_exif(6)
    exif[0x011A] = 72.0
    raw = exif.tobytes()
    raw = raw[:14] + b"\xff\xff" + raw[16:-8]  # 65,535 entries and no values
    pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
    pixels[:8, :8] = 255
    for kind in ("jpeg", "png", "webp"):
        assert brightest_corner(encode(pixels, kind, exif=raw)) == (0, 1)


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff"])
def test_a_colour_profile_that_is_rubbish_is_passed_over(kind):
    assert np.abs(decode(encode(plain("RGB", (90, 90, 90)), kind, icc_profile=b"rubbish")).astype(int) - 90).max() <= 1


def segment(marker, content):
    return b"\xff" + bytes([marker]) + (len(content) + 2).to_bytes(2) + content


NAMES = [
    b"ICC_PROFILE\0",
    b"ICC_PROFILE\0\1",
    b"JFIF\0",
    b"Adobe",
    b"MPF\0",
    b"Photoshop 3.0\0",
    b"http://ns.adobe.com/xap/1.0/\0",
    b"",
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("marker", [*range(0xE0, 0xF0), 0xFE])
def test_a_note_in_a_jpeg_that_is_too_short_never_costs_the_picture_nor_its_turn(marker):
    pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
    pixels[:8, :8] = 255
    data = encode(pixels, "jpeg", exif=turned_exif(6))
    for content in [name[:end] for name in NAMES for end in range(len(name) + 1)] + [name + b"8BIM\xff\xff" for name in NAMES]:
        assert brightest_corner(data[:2] + segment(marker, content) + data[2:]) == (0, 1)


@pytest.mark.filterwarnings("ignore")
def test_tags_of_a_tiff_that_are_no_pixels_may_say_anything():
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    exif = turned_exif(3)
    exif.update({0x010E: "a text", 0x010F: "a maker", 0x8298: "a right"})
    data = encode(pixels, "tiff", exif=exif, icc_profile=b"a profile", dpi=(72, 72))
    at = int.from_bytes(data[4:8], "little")
    for entry in range(at + 2, at + 2 + 12 * int.from_bytes(data[at : at + 2], "little"), 12):
        if (tag := int.from_bytes(data[entry : entry + 2], "little")) in {270, 271, 282, 283, 296, 33432, 34675}:
            for kind, where in itertools.product(range(1, 14), (0, len(data) - 1, len(data) + 99, 2**32 - 1)):
                broken = b"".join(part.to_bytes(size, "little") for part, size in ((tag, 2), (kind, 2), (5, 4), (where, 4)))
                assert (decode(data[:entry] + broken + data[entry + 12 :]) == pixels[::-1, ::-1]).all()


def test_exif_of_an_avif_that_is_no_exif_is_passed_over():
    need_codec("avif")
    exif = Image.Exif()
    exif[0x010F] = "a maker"
    data, marks = encode(plain("RGB", (200, 30, 60)), "avif", exif=exif.tobytes()), exif.tobytes()[6:10]
    assert data.count(marks) == 1
    assert np.abs(decode(data.replace(marks, b"none")).astype(int) - (200, 30, 60)).max() <= 3


@pytest.mark.parametrize("content", [b"", b"x", b"\xff" * 40, b"\0\0\0\x08resc", b"\0\0\0\0resd"])
@pytest.mark.parametrize("kind", [b"res ", b"xml ", b"uuid", b"abcd"])
def test_a_box_of_a_jpeg_2000_that_is_no_pixels_may_hold_anything(kind, content):
    need_codec("jpeg2000")
    data = encode(plain("RGB", (200, 30, 60)), "jpeg2000")
    at = data.index(b"jp2h") - 4
    end = at + int.from_bytes(data[at : at + 4])
    box = (8 + len(content)).to_bytes(4) + kind + content
    inside = data[:at] + (end - at + len(box)).to_bytes(4) + data[at + 4 : end] + box + data[end:]
    for broken in (inside, data[:end] + box + data[end:], data + box):
        assert np.abs(decode(broken).astype(int) - (200, 30, 60)).max() <= 3


def test_long_notes_do_not_cost_the_picture():
    notes = PngImagePlugin.PngInfo()
    notes.add_text("parameters", "x" * (2 << 20), zip=True)
    data = encode(plain("RGB", (1, 2, 3)), pnginfo=notes, icc_profile=bytes(2 << 20))
    assert (decode(data) == (1, 2, 3)).all()


def clear(mode="RGBA"):
    return plain(mode, (255, 0, 0, 0) if mode == "RGBA" else (250, 0))


def clear_palette():
    image = plain("PA", (3, 0))
    image.putpalette([0, 0, 0] * 3 + [10, 200, 30] + [255] * 3 * 252)
    return image


TRANSPARENT = {
    "png RGBA": lambda: encode(clear()),
    "png LA": lambda: encode(clear("LA")),
    "png RGB with a clear colour": lambda: encode(plain("RGB", (1, 2, 3)), transparency=(1, 2, 3)),
    "png L with a clear value": lambda: encode(plain("L", 7), transparency=7),
    "png of 16 bits with a clear value": lambda: encode(deep_grey(999), transparency=999),
    "png of 1 bit with a clear value": lambda: encode(plain("1", 1), transparency=255),
    "png P with a clear index": lambda: encode(palette(), transparency=3),
    "png P with alphas": lambda: encode(palette(), transparency=bytes(4)),
    "gif": lambda: encode(palette(), "gif", transparency=3),
    "webp": lambda: encode(clear(), "webp", lossless=True, exact=True),
    "tiff RGBA": lambda: encode(clear(), "tiff"),
    "tiff LA": lambda: encode(clear("LA"), "tiff"),
    "tiff PA": lambda: encode(clear_palette(), "tiff"),
    "avif": lambda: encode(clear(), "avif"),
    "jpeg2000": lambda: encode(clear(), "jpeg2000"),
}


@pytest.mark.parametrize("kind", TRANSPARENT)
def test_what_is_transparent_shows_mid_grey_in_every_format(kind):
    need_codec(kind)
    assert (decode(TRANSPARENT[kind]()) == 128).all()


def test_half_transparent_pixels_are_blended_before_the_picture_is_scaled():
    assert np.abs(decode(encode(plain("RGBA", (255, 0, 0, 128)))).astype(int) - (192, 64, 64)).max() <= 1
    pixels = np.zeros((2 * SIDE, 2 * SIDE, 4), np.uint8)
    pixels[:, ::2] = (255, 255, 255, 0)  # hidden white between columns of solid grey
    pixels[:, 1::2] = (128, 128, 128, 255)
    assert (decode(encode(pixels)) == 128).all()


NUMBERS = [
    (np.float32, 0.0, 0), (np.float32, 0.5, 128), (np.float32, 1.0, 255),
    (np.int32, 0, 0), (np.int32, 77, 77), (np.int32, 255, 255), (np.int32, 257 * 171, 171), (np.int32, 65535, 255),
    (np.uint16, 257 * 171, 171), (">u2", 257 * 171, 171), (np.uint16, 65535, 255), (np.uint16, 257, 1), (np.uint16, 77, 77),
]  # fmt: skip


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
@pytest.mark.parametrize(("kind", "value", "expected"), NUMBERS)
def test_floats_and_wide_integers_keep_their_brightness(kind, value, expected, compression):
    data = encode(np.full((SIDE, SIDE), value, kind), "tiff", compression=compression)
    assert (decode(data) == expected).all()


def chunk(kind, content):
    return len(content).to_bytes(4) + kind + content + zlib.crc32(kind + content).to_bytes(4)


def deep_png(pixels):
    """uint16 [H, W, 2, 3 or 4] as a PNG, which Pillow does not write."""
    height, width, bands = pixels.shape
    head = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[bands], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def deep_tiff(pixels, order, packed):
    """uint16 [H, W, 3 or 4] as a TIFF of one strip, upside down, little (<) or big (>) end first, deflated if `packed`."""
    (height, width, bands), strip = pixels.shape, pixels[::-1, ::-1].astype(f"{order}u2").tobytes()
    strip = zlib.compress(strip) if packed else strip
    tags = {256: width, 257: height, 258: 8 + len(strip), 259: 8 if packed else 1, 262: 2, 273: 8, 274: 3, 277: bands, 278: height}
    tags |= {279: len(strip)} | ({338: 2} if bands == 4 else {})
    kind = lambda tag: (3, bands) if tag == 258 else (3, 1) if tag in (274, 338) else (4, 1)  # noqa: E731
    ends = {tag: struct.pack(f"{order}H2x" if tag in (274, 338) else f"{order}I", value) for tag, value in tags.items()}
    entries = b"".join(struct.pack(f"{order}HHI", tag, *kind(tag)) + end for tag, end in ends.items())
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", 8 + len(strip) + 2 * bands)
    return head + strip + struct.pack(f"{order}{bands}H", *[16] * bands) + struct.pack(f"{order}H", len(tags)) + entries + bytes(4)


DEEP = {"png": deep_png, **{f"tiff {o} {p}": functools.partial(deep_tiff, order=o, packed=p) for o in "<>" for p in (False, True)}}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bands", [3, 4])
@pytest.mark.parametrize("kind", DEEP)
def test_colours_of_16_bits_in_0_to_255_are_as_they_are_and_others_are_divided_by_257(kind, bands):
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, bands))
    pixels[..., 3:] = 65535
    data = DEEP[kind](pixels)
    assert (decode(data) == pixels[..., :3]).all()
    with pytest.raises(ValueError, match=r".+"):
        decode(data[: len(data) // 2])
    wide = np.minimum(pixels * 257, 65535)
    assert (decode(DEEP[kind](wide)) == pixels[..., :3]).all()
    wide[..., :3] = 0
    assert (decode(DEEP[kind](wide)) == 0).all()


def test_grey_with_alpha_of_16_bits_is_divided_by_257_and_refused_in_0_to_255():
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 2))
    pixels[..., 1] = 65535
    with pytest.raises(ValueError, match="store it in 8 bits"):
        decode(deep_png(pixels))
    assert (decode(deep_png(pixels * [257, 1])) == pixels[..., :1]).all()


@pytest.mark.parametrize(
    ("kind", "low", "high"),
    [(np.float32, 0, 255), (np.float32, -0.5, 1), (np.float32, 0, np.nan), (np.int32, -1, 9), (np.int32, 0, 65536)],
)
def test_numbers_outside_the_ranges_are_refused_with_the_range_found(kind, low, high):
    pixels = np.full((SIDE, SIDE), low, kind)
    pixels[3, 4] = high
    told = rf"values from {pixels.min()} to {pixels.max()}: floats must be in 0\.\.1, integers in 0\.\.65535"
    with pytest.raises(ValueError, match=told):
        decode(encode(pixels, "tiff"))


@pytest.mark.parametrize("kind", ["avif", "jpeg2000"])
def test_avif_and_jpeg_2000_are_decoded_where_pillow_has_them(kind):
    need_codec(kind)
    data = encode(plain("RGB", (200, 30, 60), (3000, 2000)), kind)
    assert np.abs(decode(data, max_pixels=6_000_000).astype(int) - (200, 30, 60)).max() <= 3
    with pytest.raises(ValueError, match="3000 x 2000 pixels are more than"):
        decode(data)
    for end in (8, 40, len(data) // 2):
        with pytest.raises(ValueError, match=r".+"):
            decode(data[:end], max_pixels=6_000_000)


@pytest.mark.parametrize("kind", ["gif", "png", "webp"])
def test_an_animated_picture_gives_its_first_frame(kind):
    frames = [plain("RGB", colour) for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    options = {"lossless": True} if kind == "webp" else {}
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], duration=10, **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert np.abs(decode(data).astype(int) - (250, 0, 0)).max() <= 3


def test_a_picture_of_one_pixel_fills_the_square():
    assert (decode(encode(plain("RGB", (9, 8, 7), (1, 1)))) == (9, 8, 7)).all()


def test_a_large_picture_is_averaged_down_and_not_sampled():
    checks = np.indices((8 * SIDE, 8 * SIDE)).sum(0) % 2 * 255
    assert np.abs(decode(encode(checks.astype(np.uint8))).astype(int) - 127).max() <= 3


@pytest.mark.parametrize("turned", [False, True])
def test_a_picture_that_is_not_square_loses_the_ends_of_its_longer_side(turned):
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, :20], pixels[:, 20:40], pixels[:, 40:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    image = decode(encode(pixels.transpose(1, 0, 2) if turned else pixels))
    assert (image[2:-2, 2:-2] == (0, 255, 0)).all()
    assert (image[..., 1] > 150).all()


def test_a_picture_20000_pixels_wide_is_decoded_or_refused_by_its_area():
    wide = encode(plain("RGB", (5, 6, 7), (20_000, 3)))
    assert (decode(wide) == (5, 6, 7)).all()
    with pytest.raises(ValueError, match=r"20000 x 3 pixels are more than data.max_image_pixels=59999"):
        decode(wide, max_pixels=59_999)
    decode(wide, max_pixels=60_000)


@pytest.mark.parametrize("kind", ["png", "gif", "tiff", "bmp", "jpeg", "webp"])
def test_a_bomb_is_refused_before_it_is_unpacked(kind, monkeypatch):
    data = encode(plain("L" if kind != "webp" else "RGB", 0, (3000, 3000)), kind)
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("was unpacked"))
    with pytest.raises(ValueError, match="3000 x 3000 pixels are more than"):
        decode(data)


def test_a_bomb_of_billions_of_pixels_in_a_few_bytes_is_refused():
    data = bytearray(encode(plain("L", 0)))
    data[16:24] = (60_000).to_bytes(4) * 2  # width and height in IHDR
    data[29:33] = dataio.zlib.crc32(data[12:29]).to_bytes(4)
    for max_pixels in (1_000_000, 10**12):  # Pillow's own limit holds too
        with pytest.raises(ValueError, match=r"60000 x 60000|[Bb]omb|3600000000"):
            decode(bytes(data), max_pixels=max_pixels)


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "webp", "tiff"])
def test_truncated_pictures_are_refused(kind):
    data = encode(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8), kind)
    decode(data)
    for share in (0.0, 0.01, 0.1, 0.5):
        with pytest.raises(ValueError, match=r".+"):
            decode(data[: int(share * len(data))])


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\0", b"hello, I am text", b"<svg xmlns='http://www.w3.org/2000/svg'/>", BROKEN, b"GIF89a", b"P6 1 1 255 abc",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    ],
)  # fmt: skip
def test_what_is_no_picture_is_refused_with_a_reason(data):
    with pytest.raises(ValueError, match=r"\w+"):
        decode(data)


def test_every_flipped_bit_of_a_small_png_gives_a_picture_or_a_refusal():
    whole, refused = encode(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)), 0
    for place in range(len(whole)):
        data = bytearray(whole)
        data[place] ^= 1 << place % 8
        try:
            decode(bytes(data))
        except ValueError:
            refused += 1
    assert refused > len(whole) // 2  # PNG has checksums


def mutated(data, rng):
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8, 40])):
        place = rng.randrange(len(data) + 1)
        kind = rng.randrange(5)
        if kind == 0 and place < len(data):
            data[place] ^= 1 << rng.randrange(8)
        elif kind == 1 and place < len(data):
            data[place] = rng.choice([0, 255, 127, 128, rng.randrange(256)])
        elif kind == 2:
            data[place:place] = rng.randbytes(rng.randrange(1, 20))
        elif kind == 3:
            del data[place : place + rng.randrange(1, 20)]
        elif len(data) > 2 and rng.random() < 0.2:
            del data[place:]
    return bytes(data)


@pytest.mark.filterwarnings("ignore")
def test_three_hundred_mutated_pictures_give_pixels_or_a_value_error():
    pixels, rng = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8), random.Random(11)
    exif = Image.Exif()
    exif[0x0112] = 6
    valid = [
        encode(pixels), encode(pixels, "jpeg"), encode(pixels, "jpeg", exif=exif), encode(pixels, "png", exif=exif),
        encode(pixels, "webp"),
        encode(palette(), "gif"), encode(palette(), "png", transparency=b"\1\2\3"), encode(deep_grey(9)), encode(pixels, "tiff"),
        encode(pixels, "tiff", compression="tiff_lzw"), encode(pixels, "bmp"), encode(plain("CMYK", 0), "jpeg"),
    ]  # fmt: skip
    outcomes = Counter()
    for n in range(300):
        try:
            decode(mutated(valid[n % len(valid)], rng))
            outcomes["picture"] += 1
        except ValueError as error:
            outcomes["refused" if str(error) else "refused without a reason"] += 1
    assert outcomes.keys() == {"picture", "refused"}
    assert min(outcomes.values()) > 30


def chunks_of(png: bytes) -> list[bytes]:
    parts, at = [], 8
    while at < len(png):
        parts.append(png[at : at + 12 + int.from_bytes(png[at : at + 4])])
        at += len(parts[-1])
    return parts


@pytest.mark.parametrize(
    ("kind", "content"), [(b"tEXt", b"a\0note"), (b"pHYs", b"\0"), (b"gAMA", b"\0"), (b"sRGB", b""), (b"acTL", b"\0")]
)
@pytest.mark.parametrize("checksum", ["wrong", "right"])
def test_a_png_whose_notes_are_damaged_is_decoded_and_one_whose_pixels_are_is_not(kind, content, checksum):
    whole = encode(np.full((8, 8, 3), 90, np.uint8))
    right = zlib.crc32(kind + content).to_bytes(4)
    note = len(content).to_bytes(4) + kind + content + (right if checksum == "right" else b"oops")
    header, *rest = chunks_of(whole)
    assert (dataio.decode_image(whole[:8] + header + note + b"".join(rest), 8, 10**6) == 90).all()
    broken = b"".join(
        part[:8] + bytes(len(part) - 12) + part[-4:] if part[4:8] == b"IDAT" else part for part in (header, note, *rest)
    )
    with pytest.raises(ValueError, match=r"\w"):
        dataio.decode_image(whole[:8] + broken, 8, 10**6)
