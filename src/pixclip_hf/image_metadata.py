"""What image files hold beside their pixels, and how it is taken out of them without coding the pixels anew.

Structures: JPEG by ITU-T T.81, annex B; PNG by its specification, third edition; WebP by RFC 9649.
"""

import re
from collections.abc import Iterator

from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

_PNG_METADATA = (b"eXIf", b"tEXt", b"zTXt", b"iTXt", b"tIME")
_IFDS = (0x8769, 0x8825)
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]", re.DOTALL)


def has_metadata(image: Image.Image) -> bool:
    """Whether a file holds more than pixels and color."""
    kept = (
        "exif",
        "xmp",
        "XML:com.adobe.xmp",
        "Raw profile type exif",
        "Raw profile type xmp",
        "photoshop",
        "comment",
    )
    # Where a TIFF keeps EXIF and a place.
    return any(map(image.info.get, kept)) or (
        isinstance(image, TiffImageFile) and any(tag in image.tag_v2 for tag in _IFDS)
    )


def _strip_jpeg(data: bytes) -> bytes:
    """Without its comments, EXIF, XMP, IPTC and what follows the image, such as a second one for a 3D view.

    Raises:
        ValueError: the file is not a row of segments up to the end of its image.
    """
    kept, at = bytearray(data[:2]), 2
    while data[at : at + 2] != b"\xff\xd9":
        if at + 4 > len(data) or data[at] != 0xFF:
            raise ValueError(f"a segment must begin at byte {at}, got {data[at : at + 4]!r}")
        marker = data[at + 1]
        if marker == 0xFF:  # a byte that fills
            at += 1
            continue
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        segment = data[at:end]
        private = marker in (0xE1, 0xED, 0xFE) or (marker == 0xE2 and segment[4:8] == b"MPF\0")
        if not private:
            kept += segment
        at = end
        if marker == 0xDA:  # the coded pixels, up to the next marker
            found = _MARKER.search(data, at)
            end = found.start() if found else len(data)
            kept += data[at:end]
            at = end
    return bytes(kept) + b"\xff\xd9"


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Kind and bytes of each chunk."""
    at = 8
    while at + 8 <= len(data):
        kind, end = data[at + 4 : at + 8], at + 12 + int.from_bytes(data[at : at + 4], "big")
        yield kind, data[at:end]
        at = end
        if kind == b"IEND":
            break


def png_has_metadata(data: bytes) -> bool:
    """As [`has_metadata`], of the bytes of a PNG."""
    return any(kind in _PNG_METADATA for kind, _ in _png_chunks(data))


def _strip_png(data: bytes) -> bytes:
    return data[:8] + b"".join(chunk for kind, chunk in _png_chunks(data) if kind not in _PNG_METADATA)


def _strip_webp(data: bytes) -> bytes:
    kept, at = bytearray(), 12
    while at + 8 <= len(data):
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        end = at + 8 + size + size % 2
        chunk = bytearray(data[at:end])
        if chunk[:4] == b"VP8X":
            chunk[8] &= ~0x0C  # no EXIF, no XMP
        if chunk[:4] not in (b"EXIF", b"XMP "):
            kept += chunk
        at = end
    return b"RIFF" + (4 + len(kept)).to_bytes(4, "little") + b"WEBP" + bytes(kept)


STRIPPERS = {"JPEG": _strip_jpeg, "MPO": _strip_jpeg, "PNG": _strip_png, "WEBP": _strip_webp}
