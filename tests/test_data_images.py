"""Reading pictures: every kind of file becomes upright RGB in uint8, or one line says why not."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from data import DataError
from data.images import image_size, read_image

HEIGHT, WIDTH = 40, 60


@pytest.fixture
def pixels():
    """uint8 [40,60,3]: smooth, and no two corners or channels alike."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    return np.stack([4 * y + x, 240 - 3 * x, 30 + 2 * x + y], axis=2).astype(np.uint8)


def assert_reads(path, difference, expected):
    """The picture, after checking its form and that it lies within `difference` (mean) of `expected` [H,W,3]."""
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
def test_exif_turns_the_picture_upright(tmp_path, pixels, orientation, suffix):
    undo = {  # how the camera stored an upright picture
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
    """The standard allows it there; the size is read without decoding and must be that of the picture all the same."""
    exif, plain, path = Image.Exif(), io.BytesIO(), tmp_path / "a.png"
    exif[0x0112] = 6
    Image.fromarray(pixels).save(plain, "PNG")
    part = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
    part = struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part))
    path.write_bytes(plain.getvalue()[:-12] + part + plain.getvalue()[-12:])
    assert image_size(path) == tuple(read_image(path).shape[1:]) == (WIDTH, HEIGHT)


def test_a_size_comes_from_the_header_alone(tmp_path, pixels):
    for kind in ("JPEG", "PNG", "BMP", "TIFF", "GIF"):
        path, noise = tmp_path / kind, np.random.default_rng(0).integers(256, size=(200, 300, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path, kind, **({"compression": "raw"} if kind == "TIFF" else {}))
        if kind != "TIFF":  # whose header may lie behind the pixels
            path.write_bytes(path.read_bytes()[:5000])
        assert image_size(path) == (200, 300)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif"])
def test_grey(tmp_path, pixels, name):
    grey = pixels[..., 0]
    Image.fromarray(grey).save(tmp_path / name)
    image = assert_reads(tmp_path / name, 2 if name == "a.jpg" else 0, np.stack([grey] * 3, axis=2))
    assert (image[0] == image[1]).all() and (image[1] == image[2]).all()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("options", [{}, {"transparency": bytes(range(200))}])
@pytest.mark.parametrize("name", ["a.png", "a.gif"])
def test_palette(tmp_path, pixels, name, options):
    image = Image.fromarray(pixels).quantize(64)
    image.save(tmp_path / name, **(options if name == "a.png" else {}))
    assert_reads(tmp_path / name, 0, np.array(image.convert("RGB")))


def test_real_palette_gif(shared):
    path = shared / "data/hymenoptera_data/train/ants/imageNotFound.gif"
    image = read_image(path)
    assert image.dtype == torch.uint8 and image.shape == (3, *image_size(path))


def test_rgba_drops_its_transparency(tmp_path, pixels):
    alpha = np.full((HEIGHT, WIDTH, 1), 7, dtype=np.uint8)
    Image.fromarray(np.concatenate([pixels, alpha], axis=2)).save(tmp_path / "a.png")
    assert_reads(tmp_path / "a.png", 0, pixels)


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_16_bits_become_8_by_their_high_byte(tmp_path, pixels, name):
    deep = pixels[..., 0].astype(np.uint16) * 256 + 255
    Image.fromarray(deep).save(tmp_path / name)
    assert_reads(tmp_path / name, 0, np.stack([pixels[..., 0]] * 3, axis=2))


def test_cmyk_jpeg(tmp_path, pixels):
    Image.fromarray(pixels).convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    assert_reads(tmp_path / "a.jpg", 3, pixels)


def assert_refused(path, *parts):
    for function in (read_image, image_size):
        with pytest.raises(DataError) as caught:
            function(path)
        message = str(caught.value)
        assert message.startswith(f"{path}: ") and "\n" not in message
        assert all(part in message for part in parts), message
        assert caught.value.kind == "image"


def test_what_is_no_picture_is_said_in_one_line(tmp_path):
    assert_refused(tmp_path / "gone.jpg", "No such file")
    (tmp_path / "empty.jpg").write_bytes(b"")
    assert_refused(tmp_path / "empty.jpg", "no picture format", "mend or replace it")
    (tmp_path / "page.png").write_text("<html>not found</html>")
    assert_refused(tmp_path / "page.png", "no picture format")
    (tmp_path / "folder.jpg").mkdir()
    assert_refused(tmp_path / "folder.jpg", "directory")


def test_lfs_pointer(shared):
    assert_refused(shared / "data/bad_inputs/lfs_pointers/image.jpg", "git-LFS pointer", "git lfs pull")


@pytest.mark.filterwarnings("ignore:Truncated File Read")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "TIFF", "GIF", "WEBP"])
def test_cut_off_files_are_refused(tmp_path, kind):
    """Wherever a file ends, the one exception is DataError: a trainer that meets it can name the file."""
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(256, size=(30, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, kind)
    content = buffer.getvalue()
    for share in np.linspace(0, 0.95, 40):
        path = tmp_path / f"{share:.3f}"
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(DataError) as caught:
            read_image(path)
        assert str(caught.value).startswith(f"{path}: cannot be read as a picture: ")
        assert "\n" not in str(caught.value)
