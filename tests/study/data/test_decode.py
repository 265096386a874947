"""Image files of every kind are decoded to square RGB images, or refused with a reason."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from study.data.dataset import Dataset
from study.data.decode import UnreadableImageError, is_image_name, read_image, read_images


@pytest.fixture
def photo(small_dataset: Dataset) -> Image.Image:
    """A real image, enlarged."""
    return Image.fromarray(small_dataset.pixels[7]).resize((96, 64), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_every_mode_matches_convert(mode: str, photo: Image.Image, tmp_path: Path) -> None:
    suffix = {"CMYK": "tif", "YCbCr": "tif", "HSV": "tif"}.get(mode, "png")
    file = tmp_path / f"image.{suffix}"
    saved = photo.convert(mode) if mode != "HSV" else photo
    saved.save(file)
    with Image.open(file) as image:
        expected = image.convert("RGB").resize((40, 40), 2, box=(16, 0, 80, 64))
    np.testing.assert_array_equal(read_image(file, 40), np.asarray(expected))


def test_sixteen_bit_images_keep_their_highest_eight(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    assert np.abs(read_image(tmp_path / "deep.png", 64)[..., 0] - (values >> 8)).max() == 0


def test_exif_orientation_is_applied(photo: Image.Image, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to see it upright
    photo.save(tmp_path / "turned.png", exif=exif)
    upright = photo.transpose(Image.Transpose.ROTATE_270)
    upright.save(tmp_path / "upright.png")
    np.testing.assert_array_equal(
        read_image(tmp_path / "turned.png", 48), read_image(tmp_path / "upright.png", 48)
    )


def test_large_jpeg_is_decoded_at_reduced_size(photo: Image.Image, tmp_path: Path) -> None:
    photo.resize((2400, 1600)).save(tmp_path / "large.jpg", quality=95)
    with Image.open(tmp_path / "large.jpg") as image:
        whole = image.convert("RGB").resize((96, 96), 2, box=(400, 0, 2000, 1600))
    difference = np.abs(read_image(tmp_path / "large.jpg", 96).astype(int) - np.asarray(whole))
    assert difference.mean() < 1


def test_smallest_image(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1), (9, 8, 7)).save(tmp_path / "dot.png")
    assert (read_image(tmp_path / "dot.png", 32) == (9, 8, 7)).all()


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    pictures = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    pictures[0].save(tmp_path / "moving.gif", save_all=True, append_images=pictures[1:])
    assert (read_image(tmp_path / "moving.gif", 8) == (255, 0, 0)).all()


def test_unreadable_files_are_refused(photo: Image.Image, tmp_path: Path) -> None:
    photo.save(tmp_path / "whole.jpg")
    content = (tmp_path / "whole.jpg").read_bytes()
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "float.tif")
    for name, written, reason in (
        ("empty.jpg", b"", "not an image that Pillow can read"),
        ("cut.jpg", content[: len(content) // 2], "truncated"),
        ("text.png", b"hello", "not an image that Pillow can read"),
        ("page.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        ("float.tif", None, r"mode F"),
        ("nowhere.png", None, "No such file"),
    ):
        if written is not None:
            (tmp_path / name).write_bytes(written)
        with pytest.raises(UnreadableImageError, match=reason):
            read_image(tmp_path / name, 32)


def test_image_with_too_many_pixels_is_refused(tmp_path: Path) -> None:
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    with pytest.raises(UnreadableImageError, match="decompression bomb"):
        read_image(tmp_path / "bomb.png", 32)


def test_many_files_are_read_in_order(small_dataset: Dataset, tmp_path: Path) -> None:
    paths = []
    for row, pixels in enumerate(small_dataset.pixels[:40]):
        paths.append(tmp_path / f"{row}.png")
        Image.fromarray(pixels).save(paths[-1])
    paths[11].write_bytes(b"")
    found = list(read_images(paths, 32))
    assert [path for path, _ in found] == paths
    for row, (_, image) in enumerate(found):
        if row == 11:
            assert isinstance(image, UnreadableImageError)
        else:
            np.testing.assert_array_equal(image, small_dataset.pixels[row])


def test_image_names() -> None:
    assert all(map(is_image_name, ("a.jpg", "a.JPEG", "a.b.png", "a.webp", "a.tif", "a.bmp")))
    assert not any(map(is_image_name, ("a.txt", ".a.jpg", "Thumbs.db", "jpg", "a.eps", "a")))
