"""The user's own images: layouts, parts, unreadable files, the cache, duplicates."""

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from study.data.dataset import Dataset
from study.data.duplicates import find_duplicates
from study.data.image_folder import load_image_folder
from study.data.load import load_dataset
from study.data.split import in_proportion, make_split
from study.errors import UserError
from tests.support.folders import write_cifar10

pytestmark = pytest.mark.usefixtures("empty_cache")


def by_class(_: int, name: str) -> str:
    return name


def by_part(row: int, name: str) -> str:
    return f"{'train' if row < 334 else 'test'}/{name}"


@pytest.fixture
def classes_only(small_dataset: Dataset, tmp_path: Path) -> Path:
    write_cifar10(small_dataset, tmp_path / "own", by_class)
    return tmp_path / "own"


def test_pixels_labels_and_classes_match_imagefolder(
    small_dataset: Dataset, tmp_path: Path
) -> None:
    write_cifar10(small_dataset, tmp_path / "own", by_part)
    own = load_dataset(str(tmp_path / "own"), image_size=32)
    train, test = (ImageFolder(str(tmp_path / "own" / part)) for part in ("train", "test"))
    assert own.classes == tuple(train.classes) == tuple(sorted(small_dataset.classes))
    assert own.labels.tolist() == [*train.targets, *test.targets]
    assert own.training_count == len(train) == 334
    expected = [np.asarray(image) for image, _ in (*train, *test)]
    np.testing.assert_array_equal(own.pixels, np.stack(expected))
    paths = [str(Path(path).relative_to(tmp_path / "own")) for path, _ in train.samples]
    assert list(own.files[:334]) == paths
    assert own.name == "own"


def test_val_folder_is_used_as_val(small_dataset: Dataset, tmp_path: Path) -> None:
    def place(row: int, name: str) -> str:
        return f"{('train', 'train', 'val', 'test')[row % 4]}/{name}"

    write_cifar10(small_dataset, tmp_path / "own", place)
    own = load_dataset(str(tmp_path / "own"), image_size=32)
    split = make_split(own)
    assert [len(rows) for rows in (split.train, split.val, split.test)] == [200, 100, 100]
    assert {own.files[row].split("/")[0] for row in split.val} == {"val"}
    assert {own.files[row].split("/")[0] for row in split.test} == {"test"}
    with pytest.raises(UserError, match=r"--val-fraction: .* has a val/ folder"):
        make_split(own, 0.2)


def test_test_and_val_are_stratified_and_deterministic(classes_only: Path) -> None:
    own = load_dataset(str(classes_only), image_size=32, test_fraction=0.3)
    split = make_split(own, 0.2)
    for part, rows, share in (("test", split.test, 0.3), ("val", split.val, 0.7 * 0.2)):
        for label in range(10):
            of_class = (own.labels == label).sum()
            count = (own.labels[rows] == label).sum()
            assert abs(count - share * of_class) <= 1, part
    again = load_dataset(str(classes_only), image_size=32, test_fraction=0.3)
    assert again.files == own.files
    assert again.sha256 == own.sha256
    assert len(load_dataset(str(classes_only), image_size=32).files) == 400


def test_sample_keeps_the_proportions(small_dataset: Dataset, tmp_path: Path) -> None:
    kept = [row for row in range(400) if small_dataset.labels[row] != 3 or row % 3 == 0]
    for row in kept:
        write_cifar10(small_dataset, tmp_path / "own", by_part, range(row, row + 1))
    whole = load_dataset(str(tmp_path / "own"), image_size=32)
    part = load_dataset(str(tmp_path / "own"), images=200, image_size=32)
    assert len(part.labels) == 200
    assert set(part.files) < set(whole.files)
    for label in range(10):
        expected = 200 / len(kept) * (whole.labels == label).sum()
        assert abs((part.labels == label).sum() - expected) <= 2
    with pytest.raises(UserError, match=f"give 200 to {len(kept)}"):
        load_dataset(str(tmp_path / "own"), images=500, image_size=32)


@pytest.mark.parametrize(
    ("sizes", "count", "expected"),
    [
        ([90, 10], 10, [9, 1]),
        ([99, 1], 10, [9, 1]),
        ([5, 5, 0], 10, [5, 5, 0]),
        ([33, 33, 34], 10, [3, 3, 4]),
        ([1000, 1, 1], 4, [2, 1, 1]),
    ],
)
def test_in_proportion(sizes: list[int], count: int, expected: list[int]) -> None:
    assert in_proportion(sizes, count) == expected


def test_unreadable_files_are_listed_and_skipped(
    classes_only: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = classes_only / "cat" / "broken.png"
    broken.write_bytes((classes_only / "cat").joinpath("000.png").name.encode())
    (classes_only / "cat" / "notes.txt").write_text("no image")
    (classes_only / "cat" / ".hidden.png").write_bytes(b"")
    own = load_dataset(str(classes_only), image_size=32)
    assert len(own.files) == 400
    assert own.unreadable == ("cat/broken.png: not an image that Pillow can read",)
    printed = capsys.readouterr().out
    assert "skipped files without an image suffix: 1 × .txt" in printed
    assert "skipped unreadable files: cat/broken.png" in printed
    # The cache remembers them.
    assert load_dataset(str(classes_only), image_size=32).unreadable == own.unreadable


def test_too_many_unreadable_files_are_refused(classes_only: Path) -> None:
    for number in range(5):
        (classes_only / "cat" / f"cut{number}.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(UserError, match=r"5 of 405 files cannot be read, more than 1%: cat/cut0"):
        load_dataset(str(classes_only), image_size=32)


def test_only_unreadable_files(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "own" / name).mkdir(parents=True)
        (tmp_path / "own" / name / "1.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="2 of 2 files cannot be read"):
        load_dataset(str(tmp_path / "own"), image_size=32)


def test_cache_is_used_until_a_file_changes(
    classes_only: Path, capsys: pytest.CaptureFixture[str], empty_cache: Path
) -> None:
    first = load_dataset(str(classes_only), image_size=32)
    capsys.readouterr()
    load_dataset(str(classes_only), image_size=32)
    assert "Decoding" not in capsys.readouterr().out

    file = classes_only / first.files[0]
    Image.new("RGB", (32, 32), "red").save(file)
    changed = load_dataset(str(classes_only), image_size=32)
    assert "Decoding" in capsys.readouterr().out
    assert changed.sha256 != first.sha256
    assert changed.pixels[0].tolist() == np.full((32, 32, 3), (255, 0, 0)).tolist()

    for pixels in (empty_cache / "images").glob("*/pixels.bin"):
        content = bytearray(pixels.read_bytes())
        content[0] ^= 1
        pixels.write_bytes(content)
    assert load_dataset(str(classes_only), image_size=32).sha256 == changed.sha256
    assert "Decoding" in capsys.readouterr().out


def test_links_are_followed_and_cycles_end(classes_only: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "elsewhere" / "deep" / "x.jpg")
    (classes_only / "cat" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "circle").symlink_to(classes_only / "cat")
    own = load_dataset(str(classes_only), image_size=32)
    assert len(own.files) == 401
    assert "cat/more/deep/x.jpg" in own.files


def test_undecodable_file_name(classes_only: Path) -> None:
    Image.new("RGB", (8, 8)).save(classes_only / "cat" / os.fsdecode(b"\xff\xfe.png"))
    assert sum("\ufffd" in name for name in load_dataset(str(classes_only)).files) == 1


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        ((), "no class folders in"),
        (("cat",), "1 class folder in"),
        (("cat", "dog"), "its class folders contain no images"),
        (("train/cat", "train/dog"), r"no test/ next to train/"),
        (
            ("train/cat", "train/dog", "val/cat"),
            r"no test/ next to train/ and val/; .* rename val/",
        ),
        (("train/cat", "train/dog", "test/bird"), r"class bird is in test/ but not in train/"),
    ],
)
def test_invalid_folders_are_refused(
    folders: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    for name in ("own", *(f"own/{folder}" for folder in folders)):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
    with pytest.raises(UserError, match=message):
        load_image_folder(tmp_path / "own", 32)


def test_class_may_be_named_train(small_dataset: Dataset, tmp_path: Path) -> None:
    def place(row: int, _: str) -> str:
        return ("train", "bus")[row % 2]

    write_cifar10(small_dataset, tmp_path / "own", place)
    assert load_dataset(str(tmp_path / "own"), image_size=32).classes == ("bus", "train")


def test_class_without_images_is_reported(small_dataset: Dataset, tmp_path: Path) -> None:
    write_cifar10(small_dataset, tmp_path / "own", by_part)
    (tmp_path / "own" / "train" / "zebra").mkdir()
    with pytest.raises(UserError, match="class zebra has 0 training and 0 test images"):
        make_split(load_dataset(str(tmp_path / "own"), image_size=32))


def test_empty_test_folder_is_not_filled_from_train(small_dataset: Dataset, tmp_path: Path) -> None:
    write_cifar10(small_dataset, tmp_path / "own" / "train", by_class)
    (tmp_path / "own" / "test").mkdir()
    own = load_dataset(str(tmp_path / "own"), image_size=32)
    with pytest.raises(UserError, match="and 0 test images, which leaves none for test"):
        make_split(own)


def test_test_fraction_with_a_test_folder_is_refused(
    small_dataset: Dataset, tmp_path: Path
) -> None:
    write_cifar10(small_dataset, tmp_path / "own", by_part)
    with pytest.raises(UserError, match=r"--test-fraction: .* has a test/ folder"):
        load_dataset(str(tmp_path / "own"), image_size=32, test_fraction=0.1)


def test_duplicates_in_two_parts_are_found(small_dataset: Dataset, tmp_path: Path) -> None:
    write_cifar10(small_dataset, tmp_path / "own", by_part)
    test = sorted((tmp_path / "own" / "test" / "cat").iterdir())
    copies = {
        "same.png": Image.open(test[0]),
        "larger.png": Image.open(test[1]).resize((50, 50)),
        "pressed.jpg": Image.open(test[2]),
        "brighter.png": Image.open(test[3]).point(lambda value: min(255, 20 + value)),
    }
    for name, image in copies.items():
        image.save(tmp_path / "own" / "train" / "cat" / name, quality=70)
    own = load_dataset(str(tmp_path / "own"), image_size=64)
    found = {
        (own.files[pair.first], own.files[pair.second].rsplit("/", 1)[1])
        for pair in find_duplicates(own, make_split(own))
    }
    assert found == {
        (f"test/cat/{file.name}", name) for file, name in zip(test, copies, strict=False)
    }


def test_different_images_are_not_duplicates(classes_only: Path, small_dataset: Dataset) -> None:
    own = load_dataset(str(classes_only), image_size=32)
    assert find_duplicates(own, make_split(own)) == []
    assert find_duplicates(small_dataset, make_split(small_dataset)) == []


def test_duplicates_within_a_part_are_not_reported(classes_only: Path) -> None:
    own = load_dataset(str(classes_only), image_size=32)
    split = make_split(own)
    twice = replace(own, pixels=own.pixels.copy(), hashes=own.hashes.copy())  # type: ignore[union-attr]
    first, second = split.train[:2]
    twice.pixels[first] = twice.pixels[second]
    assert twice.hashes is not None
    twice.hashes[first] = twice.hashes[second]
    assert find_duplicates(twice, split) == []


def test_files_are_counted_by_class(classes_only: Path) -> None:
    own = load_dataset(str(classes_only), image_size=32)
    names = Counter(name.split("/")[0] for name in own.files)
    for label, name in enumerate(own.classes):
        assert names[name] == (own.labels == label).sum()


def test_pixels_decide_if_hashes_are_equal(classes_only: Path) -> None:
    own = load_dataset(str(classes_only), image_size=32)
    alike = replace(own, hashes=np.zeros(len(own.labels), np.uint64))
    assert find_duplicates(alike, make_split(own)) == []


def test_changed_file_of_the_same_size_is_decoded_again(classes_only: Path) -> None:
    file = classes_only / "cat" / "plain.bmp"
    found = []
    for number, colour in enumerate(("red", "blue")):
        Image.new("RGB", (32, 32), colour).save(file)
        os.utime(file, (1_000_000_000 + number,) * 2)
        found.append(load_dataset(str(classes_only), image_size=32).sha256)
    assert found[0] != found[1]
