"""Reading images: upright once, in every mode, within limits; what cannot be read is refused by its name."""

import io
import struct
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from pixclip_hf.processing import processing_addresses
from pixclip_hf.processing.processing_images import load_images

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (14, 19, 3), dtype=np.uint8)
FAULTS = Path(__file__).parents[3] / "shared/faults"


def png(image, **options):
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


def turned(tmp_path, orientation, name="turned.png"):
    """A file whose pixels are to be turned by its tag."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / name).write_bytes(png(Image.fromarray(PIXELS), exif=exif))
    return tmp_path / name


@pytest.mark.parametrize("orientation", range(1, 9))
def test_files_are_turned_upright_once(orientation, tmp_path, caplog):
    path = turned(tmp_path, orientation)
    (read,) = load_images([path])
    expected = np.asarray(ImageOps.exif_transpose(Image.open(path)))
    assert np.array_equal(np.asarray(read), expected) and not caplog.records
    assert (read.size == Image.open(path).size) == (orientation < 5)
    assert dict(read.getexif()) == {}
    assert np.array_equal(np.asarray(load_images(read)[0]), expected)


def test_pil_images_stay_in_their_own_frame_with_a_warning(tmp_path, caplog):
    (read,) = load_images([Image.open(turned(tmp_path, 6))])
    assert np.array_equal(np.asarray(read), PIXELS)
    (record,) = caplog.records
    assert "images[0]" in record.message and "EXIF orientation 6" in record.message


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\x7f", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", 0, 9, 77]
)
@pytest.mark.parametrize("form", ["path", "PIL", "converted"])
def test_broken_exif_and_other_numbers_mean_upright(exif, form, tmp_path, caplog):
    path = tmp_path / "a.jpg"
    if isinstance(exif, bytes):
        Image.fromarray(PIXELS).save(path, exif=exif, quality=95)
    else:
        tag = Image.Exif()
        tag[0x0112] = exif
        Image.fromarray(PIXELS).save(path, exif=tag, quality=95)
    image = {
        "path": lambda: path,
        "PIL": lambda: Image.open(path),
        "converted": lambda: Image.open(path).convert("RGB"),
    }
    (read,) = load_images(image[form]())
    assert read.size == (19, 14) and not caplog.records


@pytest.mark.skipif(not FAULTS.is_dir(), reason="the faulty photograph of ../shared is not here")
def test_a_photograph_with_another_broken_tag_is_turned():
    (read,) = load_images([FAULTS / "turned_with_broken_tag.jpg"])
    assert read.size == (48, 64)


def test_xmp_does_not_turn_a_second_time(tmp_path):
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    Image.fromarray(PIXELS).save(tmp_path / "a.webp", lossless=True, xmp=xmp)
    (read,) = load_images([tmp_path / "a.webp"])
    assert load_images([read])[0].size == read.size == (14, 19)


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def deep_png(transparent, values):
    """A PNG of 16 bits, gray or RGB, with one transparent color."""
    values = np.asarray(values, ">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    header = struct.pack(">IIBBBBB", values.shape[1], len(values), 16, 0 if values.ndim == 2 else 2, 0, 0, 0)
    color = struct.pack(f">{len(transparent)}H", *transparent)
    parts = chunk(b"IHDR", header) + chunk(b"tRNS", color) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def test_transparent_colors_of_16_bits_are_white(tmp_path):
    (tmp_path / "gray.png").write_bytes(deep_png([514], [[514, 257 * 9]]))
    (tmp_path / "rgb.png").write_bytes(deep_png([514, 771, 1028], [[[514, 771, 1028], [257 * 9, 0, 0]]]))
    gray, rgb = load_images([tmp_path / "gray.png", tmp_path / "rgb.png"])
    assert np.asarray(gray).tolist() == [[[255] * 3, [9] * 3]]
    assert np.asarray(rgb).tolist() == [[[255] * 3, [9, 0, 0]]]


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("CMYK", "jpg"), ("CMYK", "tif"), ("YCbCr", "jpg"), ("1", "png"), ("P", "gif"), ("LA", "png"), ("RGBA", "webp")],
)
def test_modes_become_rgb(mode, suffix, tmp_path):
    gray = Image.new("L", (20, 10), 200).convert("RGB").convert(mode if mode != "P" else "RGB")
    (gray.convert("P") if mode == "P" else gray).save(tmp_path / f"a.{suffix}")
    (read,) = load_images([tmp_path / f"a.{suffix}"])
    assert read.mode == "RGB" and read.size == (20, 10)
    expected = 255 if mode == "1" else 200
    assert abs(int(np.asarray(read)[5, 10, 0]) - expected) <= 55  # of 1 bit: dithered


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_the_first_of_several_frames_is_read(suffix, tmp_path):
    first, *others = (Image.new("RGB", (20, 10), color) for color in ((250, 0, 0), (0, 250, 0), (0, 0, 250)))
    first.save(tmp_path / f"a.{suffix}", save_all=True, append_images=others)
    (read,) = load_images([tmp_path / f"a.{suffix}"])
    red, green, _ = read.getpixel((5, 5))
    assert red > 200 and green < 50


@pytest.mark.parametrize("form", ["file", "PIL", "array"])
def test_too_many_pixels_are_refused_by_name_and_limit(form, tmp_path, monkeypatch):
    image = Image.new("L", (60, 50))
    image.save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    given = {"file": tmp_path / "a.png", "PIL": image, "array": np.zeros((50, 60, 3), np.uint8)}[form]
    with pytest.raises(ValueError, match=r"images\[1\].*(limit of 2000|at most 2000 pixels).*"):
        load_images([Image.new("RGB", (4, 4)), given])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert load_images([given])[0].size == (60, 50)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "tif", "bmp"])
def test_cut_files_are_refused_by_name(suffix, tmp_path):
    path = tmp_path / f"a.{suffix}"
    noise = Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    noise.save(path)
    data = path.read_bytes()
    for length in (0, 7, len(data) // 3, len(data) * 2 // 3):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=rf"images\[0\].*a.{suffix}"):
            load_images([path])


def test_bytes_of_any_kind_raise_nothing_else(tmp_path):
    """Files with flipped bytes are read or refused, and no decoder's own exception gets through."""
    path = tmp_path / "a"
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "a camera"
    for suffix in ("jpeg", "png", "webp", "tiff", "gif"):
        Image.fromarray(PIXELS).save(path, suffix, **({} if suffix == "gif" else {"exif": exif}))
        data = np.frombuffer(path.read_bytes(), np.uint8)
        for _ in range(40):
            broken = data.copy()
            at = RNG.integers(4, min(len(broken), 250), 6)
            broken[at] = RNG.integers(0, 256, len(at))
            path.write_bytes(broken.tobytes())
            try:
                (read,) = load_images([path])
                assert read.mode == "RGB"
            except ValueError as error:
                assert "images[0]" in str(error)  # noqa: PT017 -- either is right


class Handler(BaseHTTPRequestHandler):
    agents: list[str] = []

    def do_GET(self):
        self.agents.append(self.headers["User-Agent"])
        if self.path == "/silent":
            time.sleep(3)
        elif self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/image.png")
            self.end_headers()
        elif self.path == "/moved-to-a-file":
            self.send_response(302)
            self.send_header("Location", "file:///etc/hostname")
            self.end_headers()
        else:
            self.send_response(200 if self.path in ("/image.png", "/endless", "/slow") else 404)
            self.end_headers()
            try:
                if self.path == "/endless":
                    while True:
                        self.wfile.write(bytes(2**16))
                for byte in png(Image.fromarray(PIXELS)) if self.path == "/slow" else ():
                    self.wfile.write(bytes([byte]))
                    time.sleep(0.05)
                self.wfile.write(png(Image.fromarray(PIXELS)))
            except OSError:
                pass  # the reader has gone

    def log_message(self, *args):
        """Quiet."""


@pytest.fixture
def address(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv(processing_addresses.ALLOW_LOCAL, "1")
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_addresses(address):
    for path in ("image.png", "moved"):
        assert np.array_equal(np.asarray(load_images(f"{address}/{path}")[0]), PIXELS)
    assert "pixclip-hf" in Handler.agents[-1]
    with pytest.raises(ValueError, match=r"images\[1\].*/other.png.*404"):
        load_images([Image.new("RGB", (4, 4)), f"{address}/other.png?key=secret"])
    with pytest.raises(ValueError) as raised:
        load_images(f"{address}/other.png?key=secret")
    assert "secret" not in str(raised.value)


def test_addresses_are_bounded_in_time_and_bytes(address, monkeypatch):
    monkeypatch.setattr(processing_addresses, "MOST_SECONDS", 1)
    for path in ("silent", "slow"):
        start = time.monotonic()
        with pytest.raises(TimeoutError, match=rf"images\[0\].*/{path}.*within 1 seconds"):
            load_images([f"{address}/{path}"])
        assert time.monotonic() - start < 2.5
    monkeypatch.setattr(processing_addresses, "MOST_SECONDS", 30)
    monkeypatch.setattr(processing_addresses, "MOST_BYTES", 2**18)
    with pytest.raises(ValueError, match=r"images.*/endless.*more than 262144 bytes"):
        load_images(f"{address}/endless")


def test_local_addresses_only_on_request(address, monkeypatch, tmp_path):
    (tmp_path / "a b.png").write_bytes(png(Image.fromarray(PIXELS)))
    uri = (tmp_path / "a b.png").as_uri()
    assert np.array_equal(np.asarray(load_images(uri)[0]), PIXELS)
    with pytest.raises((ValueError, ConnectionError), match="can't be read"):
        load_images(f"{address}/moved-to-a-file")
    monkeypatch.delenv(processing_addresses.ALLOW_LOCAL)
    port = address.rpartition(":")[2]
    places = (
        f"127.0.0.1:{port}",
        f"localhost:{port}",
        f"[::1]:{port}",
        f"2130706433:{port}",
        "10.0.0.1",
        "169.254.1.1",
    )
    for place in places:
        with pytest.raises(ValueError, match=r"images\[0\].*private network"):
            load_images([f"http://{place}/image.png"])
    with pytest.raises(ValueError, match=r"images\[0\].*only where PIXCLIP_HF_LOCAL_ADDRESSES=1"):
        load_images([uri])


@pytest.mark.parametrize("user", ("me:cret@", "me:cret/0@", "cret@", "me:cret@x:"))
def test_addresses_with_a_password_are_refused_without_it(user):
    with pytest.raises(ValueError, match=r"images\[0\].* (is not read: it holds a user name|names no host)") as error:
        load_images([f"http://{user}127.0.0.1/image.png?key=cret"])
    assert "cret" not in str(error.value)


@pytest.mark.parametrize("ip", ("::127.0.0.1", "64:ff9b::a00:1", "2002:7f00:1::", "::ffff:10.0.0.1", "fe80::1%eth0"))
def test_addresses_that_lead_into_a_private_network(ip):
    with pytest.raises(processing_addresses._LocalAddress):
        processing_addresses._refuse_private(ip, "host")
    processing_addresses._refuse_private("64:ff9b::808:808", "host")


def test_no_address_is_read_offline(address, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE"):
        load_images(f"{address}/image.png")
