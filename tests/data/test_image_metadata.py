"""What is stored of an image file: the pixels of one image, as they were coded, and nothing beside them."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from pixclip_hf.images import holds_more, open_image, store_image

SECRET = b"48.858 N 2.294 E, by someone"
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 20, 3), dtype=np.uint8))


def encoded(kind, image=IMAGE, **options):
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def segment(marker, content):
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def riff(webp, kind):
    content = webp[8:] + kind + struct.pack("<I", len(SECRET)) + SECRET
    return b"RIFF" + struct.pack("<I", len(content)) + content


JPEG, PNG, WEBP, GIF = (encoded(kind) for kind in ("JPEG", "PNG", "WEBP", "GIF"))
XMP = b"http://ns.adobe.com/xmp/extension/\0"
THUMBNAIL = SECRET[:27]  # of 3 x 3 pixels
# File with something in it that is no pixel -> whether the coded pixels stay.
FILES = {
    "JPEG, EXIF": (JPEG[:2] + segment(0xE1, b"Exif\0\0" + SECRET) + JPEG[2:], True),
    "JPEG, what an application added": (JPEG[:2] + segment(0xEC, SECRET) + JPEG[2:], True),
    "JPEG, XMP that goes on": (JPEG[:2] + segment(0xE1, XMP + SECRET) + JPEG[2:], True),
    "JPEG, a comment at the end": (JPEG[:-2] + segment(0xFE, SECRET) + JPEG[-2:], True),
    "JPEG, a second image": (JPEG + JPEG[:2] + segment(0xE1, b"Exif\0\0" + SECRET) + JPEG[2:], True),
    "JPEG, a film behind it": (JPEG + SECRET, True),
    "JPEG, a thumbnail": (JPEG[:2] + segment(0xE0, JPEG[6:18] + b"\3\3" + THUMBNAIL) + JPEG[20:], True),
    "PNG, a text": (PNG[:33] + chunk(b"tEXt", b"a\0" + SECRET) + PNG[33:], True),
    "PNG, a private chunk": (PNG[:-12] + chunk(b"prVt", SECRET) + PNG[-12:], True),
    "PNG, the uncropped rest behind it": (PNG + SECRET, True),
    "PNG, a part of another one behind it": (PNG + chunk(b"iCCP", SECRET), True),
    "WebP, EXIF": (riff(WEBP, b"EXIF"), True),
    "WebP, an unknown chunk": (riff(WEBP, b"GPSx"), True),
    "WebP, something behind it": (WEBP + SECRET, True),
    "GIF, XMP": (GIF[:-1] + b"\x21\xff\x0bXMP DataXMP" + bytes([len(SECRET)]) + SECRET + b"\0;", False),
    "GIF, a late comment": (GIF[:-1] + b"\x21\xfe" + bytes([len(SECRET)]) + SECRET + b"\0;", False),
    "BMP, something behind it": (encoded("BMP") + SECRET, False),
    "TIFF, what and by whom": (encoded("TIFF", tiffinfo={270: SECRET.decode(), 315: "x", 316: "a-host"}), False),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_nothing_beside_the_pixels_is_stored(name):
    data, as_coded = FILES[name]
    assert SECRET[:27] in data and holds_more(data)
    stored, size = store_image(data)
    assert SECRET[:27] not in stored and size == IMAGE.size and not holds_more(stored)
    assert (Image.open(io.BytesIO(stored)).format == Image.open(io.BytesIO(data)).format) == as_coded or "PNG" in name
    assert np.array_equal(open_image({"bytes": stored}), open_image({"bytes": data}))


def test_a_file_without_an_end_is_no_image():
    with pytest.raises(ValueError, match="image"):
        store_image(JPEG[:-2])


MODES = {"JPEG": ("RGB", "L", "CMYK"), "PNG": ("RGB", "L", "LA", "RGBA", "P", "1", "I;16"), "WEBP": ("RGB", "RGBA")}
OPTIONS = ({}, {"icc_profile": b"profile" * 40}, {"progressive": True}, {"lossless": True})


@pytest.mark.parametrize(("kind", "mode"), [(kind, mode) for kind, modes in MODES.items() for mode in modes])
def test_files_of_pixels_alone_are_kept_as_they_are(kind, mode):
    image = Image.fromarray(np.full((9, 7), 7000, dtype=np.uint16)) if mode == "I;16" else IMAGE.convert(mode)
    for options in OPTIONS:
        data = encoded(kind, image, **options)
        assert not holds_more(data) and store_image(data)[0] is data
