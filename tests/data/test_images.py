"""Reading images: every kind of file becomes upright RGB in uint8, or a one-line error."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from data import DataError
from data.images import image_size, read_image

HEIGHT, WIDTH = 40, 60


@pytest.fixture
def pixels():
    """uint8 [40,60,3]: smooth, with different corners and channels."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    return np.stack([4 * y + x, 240 - 3 * x, 30 + 2 * x + y], axis=2).astype(np.uint8)


def assert_reads(path, difference, expected):
    """The image, after checking its type and size, and its mean difference from `expected` [H,W,3]."""
    image = read_image(path)
    assert image.dtype == torch.uint8
    assert image.shape == (3, *expected.shape[:2])
    assert image_size(path) == expected.shape[:2]
    error = (image.float() - torch.tensor(expected.astype(np.float32)).permute(2, 0, 1)).abs().mean().item()
    assert error <= difference, error
    return image


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.bmp", "a.tif", "a.webp"])
def test_rgb(tmp_path, pixels, name):
    Image.fromarray(pixels).save(tmp_path / name)
    assert_reads(tmp_path / name, {"a.jpg": 3, "a.webp": 3}.get(name, 0), pixels)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, pixels, orientation, suffix):
    undo = {  # how a camera stores an upright image
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = Image.fromarray(pixels)
    if orientation in undo:
        stored = stored.transpose(undo[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / f"a.{suffix}", exif=exif)
    assert_reads(tmp_path / f"a.{suffix}", 3 if suffix == "jpg" else 0, pixels)


def test_exif_behind_the_pixels_of_a_png(tmp_path, pixels):
    """The standard allows it there. image_size, which does not decode pixels, must find it too."""
    exif, plain, path = Image.Exif(), io.BytesIO(), tmp_path / "a.png"
    exif[0x0112] = 6
    Image.fromarray(pixels).save(plain, "PNG")
    chunk = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    path.write_bytes(plain.getvalue()[:-12] + chunk + plain.getvalue()[-12:])
    assert image_size(path) == tuple(read_image(path).shape[1:]) == (WIDTH, HEIGHT)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "TIFF", "GIF"])
def test_the_size_is_in_the_header(tmp_path, kind):
    path, noise = tmp_path / kind, np.random.default_rng(0).integers(256, size=(200, 300, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, kind, **({"compression": "raw"} if kind == "TIFF" else {}))
    if kind != "TIFF":  # its header may come after the pixels
        path.write_bytes(path.read_bytes()[:5000])
    assert image_size(path) == (200, 300)


def test_the_size_is_read_without_decoding(tmp_path, pixels, monkeypatch):
    Image.fromarray(pixels).save(tmp_path / "a.png")
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("decoded"))
    assert image_size(tmp_path / "a.png") == (HEIGHT, WIDTH)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif"])
def test_grayscale(tmp_path, pixels, name):
    gray = pixels[..., 0]
    Image.fromarray(gray).save(tmp_path / name)
    image = assert_reads(tmp_path / name, 2 if name == "a.jpg" else 0, np.stack([gray] * 3, axis=2))
    assert (image[0] == image[1]).all() and (image[1] == image[2]).all()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("options", [{}, {"transparency": bytes(range(200))}])
@pytest.mark.parametrize("name", ["a.png", "a.gif"])
def test_palette(tmp_path, pixels, name, options):
    image = Image.fromarray(pixels).quantize(64)
    image.save(tmp_path / name, **(options if name == "a.png" else {}))
    assert_reads(tmp_path / name, 0, np.array(image.convert("RGB")))


@pytest.mark.realdata
def test_palette_gif_of_a_real_data_set(shared):
    path = shared / "data/hymenoptera_data/train/ants/imageNotFound.gif"
    image = read_image(path)
    assert image.dtype == torch.uint8 and image.shape == (3, *image_size(path))


def test_transparency_is_dropped(tmp_path, pixels):
    alpha = np.full((HEIGHT, WIDTH, 1), 7, dtype=np.uint8)
    Image.fromarray(np.concatenate([pixels, alpha], axis=2)).save(tmp_path / "a.png")
    assert_reads(tmp_path / "a.png", 0, pixels)


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_16_bits_are_reduced_to_the_upper_8(tmp_path, pixels, name):
    deep = pixels[..., 0].astype(np.uint16) * 256 + 255
    Image.fromarray(deep).save(tmp_path / name)
    assert_reads(tmp_path / name, 0, np.stack([pixels[..., 0]] * 3, axis=2))


def test_cmyk_jpeg(tmp_path, pixels):
    Image.fromarray(pixels).convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    assert_reads(tmp_path / "a.jpg", 3, pixels)


def assert_error(path, *parts):
    for function in (read_image, image_size):
        with pytest.raises(DataError) as error:
            function(path)
        message = str(error.value)
        assert message.startswith(f"{path}: ") and "\n" not in message
        assert all(part in message for part in parts), message
        assert error.value.kind == "image"


def test_files_that_are_no_images(tmp_path):
    assert_error(tmp_path / "gone.jpg", "No such file")
    (tmp_path / "empty.jpg").write_bytes(b"")
    assert_error(tmp_path / "empty.jpg", "no image format", "fix or replace it")
    (tmp_path / "page.png").write_text("<html>not found</html>")
    assert_error(tmp_path / "page.png", "no image format")
    (tmp_path / "folder.jpg").mkdir()
    assert_error(tmp_path / "folder.jpg", "directory")


def test_lfs_pointer(tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0123456789abcdef\nsize 12345\n"
    (tmp_path / "image.jpg").write_text(pointer)
    assert_error(tmp_path / "image.jpg", "git-LFS pointer", "git lfs pull")


@pytest.mark.realdata
def test_lfs_pointer_of_a_real_data_set(shared):
    assert_error(shared / "data/bad_inputs/lfs_pointers/image.jpg", "git-LFS pointer", "git lfs pull")


@pytest.mark.filterwarnings("ignore:Truncated File Read")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "TIFF", "GIF", "WEBP"])
def test_truncated_files(tmp_path, kind):
    """Wherever a file ends, the error is a DataError that names it."""
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(256, size=(30, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, kind)
    content = buffer.getvalue()
    for share in np.linspace(0, 0.95, 40):
        path = tmp_path / f"{share:.3f}"
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(DataError) as error:
            read_image(path)
        assert str(error.value).startswith(f"{path}: cannot be read as an image: ")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(("width", "height"), [(50_000, 50_000), (1_000_000_000, 1)])
def test_decompression_bombs_are_refused(tmp_path, width, height):
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(1000)))]
    content = b"\x89PNG\r\n\x1a\n"
    for name, body in [*parts, (b"IEND", b"")]:
        content += struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    (tmp_path / "a.png").write_bytes(content)
    for read in (read_image, image_size):
        with pytest.raises(DataError, match=r"cannot be read as an image: .*decompression bomb"):
            read(tmp_path / "a.png")


@pytest.mark.parametrize("error", [IndexError, TypeError, struct.error, KeyError, ZeroDivisionError, EOFError])
def test_what_decoders_raise_at_damaged_files(tmp_path, monkeypatch, error, pixels):
    """A GIF with a changed byte raised an IndexError, for example."""

    def broken(self):
        raise error("inside Pillow")

    Image.fromarray(pixels).save(tmp_path / "a.bmp")
    monkeypatch.setattr(ImageFile.ImageFile, "load", broken)
    with pytest.raises(DataError, match=r"cannot be read as an image: .*inside Pillow"):
        read_image(tmp_path / "a.bmp")
