"""What image files hold beside their pixels, and how it is taken out of them without coding the pixels anew.

Only what is known to belong to the pixels of one image stays: a list of what is private would never be complete.
Structures: JPEG by ITU-T T.81, annex B; PNG by its specification, third edition; WebP by RFC 9649.
"""

import re
from collections.abc import Callable, Iterator

from PIL import Image

# Frames, tables and scans of JPEG; the other markers carry what applications add.
_JPEG_CODED = frozenset([*range(0xC0, 0xD0), *range(0xDA, 0xE0)])
_PNG_PIXELS = frozenset(
    (b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"gAMA", b"cHRM", b"sRGB", b"iCCP", b"cICP", b"sBIT", b"pHYs")
)
_WEBP_PIXELS = frozenset((b"VP8X", b"VP8 ", b"VP8L", b"ALPH", b"ICCP"))
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]", re.DOTALL)


def pixels_alone(data: bytes, kind: str | None) -> bytes | None:
    """An encoded image without what is no pixel and no color of its first frame: EXIF, texts, thumbnails, a second
    image, and whatever follows its end.

    Args:
        data: the file.
        kind: its format, as PIL calls it.

    Returns:
        The file without these, `data` itself where it holds none; None for a format that is not JPEG, PNG or WebP,
        for several frames and for an odd structure: of those, nobody can tell without coding the pixels anew.
    """
    try:
        found = _STRIPPERS[kind](data) if kind in _STRIPPERS else None
    except ValueError:
        return None
    return data if found == data else found


def may_turn(image: Image.Image, data: bytes) -> bool:
    """Whether an encoded image has tags that may say how to turn it. Those of a PNG may stand behind its pixels: they
    are looked for among its chunks, because PIL would decode it."""
    return image.format != "PNG" or any(kind not in _PNG_PIXELS for kind, _ in _png_chunks(data))


def _strip_jpeg(data: bytes) -> bytes:
    """
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
        kept += _jpeg_segment(marker, data[at:end])
        at = end
        if marker == 0xDA:  # the coded pixels, up to the next marker
            found = _MARKER.search(data, at)
            end = found.start() if found else len(data)
            kept += data[at:end]
            at = end
    return bytes(kept) + b"\xff\xd9"


def _jpeg_segment(marker: int, segment: bytes) -> bytes:
    """What stays of a segment."""
    if marker in _JPEG_CODED or (marker == 0xE2 and segment[4:16] == b"ICC_PROFILE\0"):
        return segment
    if marker == 0xE0 and segment[4:9] == b"JFIF\0" and len(segment) >= 18:
        return segment if len(segment) == 18 else segment[:2] + b"\0\x10" + segment[4:16] + b"\0\0"  # no thumbnail
    if marker == 0xEE and segment[4:9] == b"Adobe":  # says what the channels are
        return segment[:2] + b"\0\x0e" + segment[4:16]
    return b""


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Kind and bytes of each chunk."""
    at = 8
    while at + 8 <= len(data):
        kind, end = data[at + 4 : at + 8], at + 12 + int.from_bytes(data[at : at + 4], "big")
        yield kind, data[at:end]
        at = end
        if kind == b"IEND":
            break


def _strip_png(data: bytes) -> bytes:
    return data[:8] + b"".join(chunk for kind, chunk in _png_chunks(data) if kind in _PNG_PIXELS)


def _strip_webp(data: bytes) -> bytes:
    """
    Raises:
        ValueError: an animation.
    """
    kept, at, stop = bytearray(), 12, min(8 + int.from_bytes(data[4:8], "little"), len(data))
    while at + 8 <= stop:
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        end = at + 8 + size + size % 2
        chunk = bytearray(data[at:end])
        if chunk[:4] in (b"ANIM", b"ANMF"):
            raise ValueError("an animation holds chunks in chunks")
        if chunk[:4] == b"VP8X":
            chunk[8] &= ~0x0C  # no EXIF, no XMP
        if bytes(chunk[:4]) in _WEBP_PIXELS:
            kept += chunk
        at = end
    return b"RIFF" + (4 + len(kept)).to_bytes(4, "little") + b"WEBP" + bytes(kept)


_STRIPPERS: dict[str | None, Callable[[bytes], bytes]] = {
    "JPEG": _strip_jpeg, "MPO": _strip_jpeg, "PNG": _strip_png, "WEBP": _strip_webp,
}  # fmt: skip
