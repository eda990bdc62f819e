"""Data sets against their sources, read by another route; IDX files written by hand."""

from __future__ import annotations

import gzip
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from fashion_files import idx, write_fashion
from torch import Tensor

from hamdist.config import StreamSettings
from hamdist.errors import SettingsError, StreamError
from hamdist.streams import (
    CIFAR10,
    FASHION_MNIST,
    MNIST,
    DataSet,
    digits,
    make_stream,
    read_images,
)
from hamdist.streams.sources.image_bytes import read_idx
from hamdist.streams.sources.images import ImageFiles


def epoch(data: DataSet, items: int) -> tuple[Tensor, Tensor]:
    samples = list(islice(data.train.samples(), items))
    targets = [sample.y for sample in samples if sample.y is not None]
    return torch.cat([sample.u for sample in samples]), torch.cat(targets)


class TestDigits:
    @pytest.fixture
    def source(self) -> tuple[Tensor, Tensor]:
        from sklearn.datasets import load_digits

        x, y = load_digits(return_X_y=True)
        return torch.from_numpy(x), torch.from_numpy(y)

    def test_parts_make_up_the_source(self, source: tuple[Tensor, Tensor]) -> None:
        data = digits(1, 0, torch.float64)
        x, y = epoch(data, 1797 - len(data.x))
        both = torch.cat([torch.cat([x, data.x]), torch.cat([y, data.y]).unsqueeze(1)], 1)
        # undo the standardisation by the extremes: blank is 0, the darkest pixel is 16
        scale = (both[:, :64].max() - both[:, :64].min()) / 16
        both[:, :64] = ((both[:, :64] - both[:, :64].min()) / scale).round()
        original = torch.cat([source[0], source[1].unsqueeze(1).double()], 1)
        assert sorted(both.tolist()) == sorted(original.tolist())

    def test_training_part_is_standardised(self) -> None:
        x, _ = epoch(digits(1, 0, torch.float64), 1438)
        assert len(digits(1, 0, torch.float64).x) == 1797 - 1438
        assert x.mean().item() == pytest.approx(0.0, abs=1e-12)
        assert x.pow(2).mean().item() == pytest.approx(1.0, abs=1e-9)

    def test_held_out_is_a_fifth_of_each_class(self, source: tuple[Tensor, Tensor]) -> None:
        whole = torch.bincount(source[1], minlength=10)
        held = torch.bincount(digits(1, 0, torch.float32).y, minlength=10)
        assert (held - whole / 5).abs().max() <= 0.5

    def test_seed_orders_the_training_part_only(self) -> None:
        one, two = digits(8, 0, torch.float32), digits(8, 1, torch.float32)
        assert torch.equal(one.x, two.x)
        assert torch.equal(one.y, two.y)
        first, second = (next(iter(data.train.samples())) for data in (one, two))
        assert not torch.equal(first.u, second.u)

    def test_spec(self) -> None:
        for dtype in (torch.float32, torch.float64):
            data = digits(8, 0, dtype)
            spec, sample = data.train.spec, next(iter(data.train.samples()))
            assert sample.y is not None
            assert (spec.u_shape, spec.y_shape, spec.classes) == ((8, 64), (8,), 10)
            assert (sample.u.shape, sample.u.dtype) == (spec.u_shape, dtype)
            assert (sample.y.dtype, data.y.dtype) == (torch.int64, torch.int64)
            assert data.x.dtype == dtype

    def test_batch(self) -> None:
        with pytest.raises(SettingsError, match="batch is 0"):
            digits(0, 0, torch.float32)


class TestFashionMnist:
    @pytest.mark.parametrize("zipped", [False, True])
    def test_values(self, tmp_path: Path, zipped: bool) -> None:
        write_fashion(tmp_path, zipped=zipped)
        data = read_images(FASHION_MNIST, 4, 0, torch.float64, tmp_path)
        x, y = epoch(data, 3)
        order = x[:, 0].argsort()
        pixels = torch.arange(12, dtype=torch.float64)
        expected = ((pixels / 255 - 0.286) / 0.353).unsqueeze(1).expand(12, 784)
        torch.testing.assert_close(x[order], expected, rtol=1e-14, atol=1e-14)
        assert y[order].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
        torch.testing.assert_close(data.x, expected[:7], rtol=1e-14, atol=1e-14)
        assert data.y.tolist() == list(range(7))
        assert data.y.dtype == torch.int64

    def test_spec(self, tmp_path: Path) -> None:
        write_fashion(tmp_path)
        data = read_images(FASHION_MNIST, 5, 0, torch.float32, str(tmp_path))
        spec, sample = data.train.spec, next(iter(data.train.samples()))
        assert (spec.u_shape, spec.u_dtype, spec.classes) == ((5, 784), torch.float32, 10)
        assert (sample.u.shape, sample.u.dtype) == (spec.u_shape, spec.u_dtype)
        assert data.train.portable

    def test_looks_in_the_prefixes(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = tmp_path / "share" / "datasets" / "fashion-mnist"
        folder.mkdir(parents=True)
        write_fashion(folder)
        monkeypatch.setattr(sys, "prefix", str(tmp_path))
        expected = (
            folder,
            *(Path(p, "share/datasets/fashion-mnist") for p in ("/usr", "/usr/local")),
        )
        assert FASHION_MNIST.folders == expected
        assert len(read_images(FASHION_MNIST, 1, 0, torch.float32).x) == 7

    def test_nowhere(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folders = tmp_path / "a", tmp_path
        monkeypatch.setattr(ImageFiles, "folders", property(lambda _: folders))
        message = r"a \(all 4 files missing\); .*dataset-fashion-mnist.*git clone .*stream.path"
        with pytest.raises(StreamError, match=message):
            read_images(FASHION_MNIST, 1, 0, torch.float32)

    def test_partly_there(self, tmp_path: Path) -> None:
        write_fashion(tmp_path)
        (tmp_path / "t10k-labels-idx1-ubyte").unlink()
        with pytest.raises(StreamError, match=r"\(t10k-labels-idx1-ubyte missing\)"):
            read_images(FASHION_MNIST, 1, 0, torch.float32, tmp_path)

    def test_other_size(self, tmp_path: Path) -> None:
        write_fashion(tmp_path)
        (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(np.zeros((12, 8, 9))))
        with pytest.raises(StreamError, match="train-images-idx3-ubyte: images of 8 x 9"):
            read_images(FASHION_MNIST, 1, 0, torch.float32, tmp_path)

    def test_counts_differ(self, tmp_path: Path) -> None:
        write_fashion(tmp_path)
        (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(np.zeros(6)))
        message = "t10k-images-idx3-ubyte has 7 images and .*t10k-labels-idx1-ubyte has 6 labels"
        with pytest.raises(StreamError, match=message):
            read_images(FASHION_MNIST, 1, 0, torch.float32, tmp_path)

    def test_label_out_of_range(self, tmp_path: Path) -> None:
        write_fashion(tmp_path)
        (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.array([9] * 11 + [10])))
        with pytest.raises(StreamError, match="train-labels-idx1-ubyte: label 11 is 10"):
            read_images(FASHION_MNIST, 1, 0, torch.float32, tmp_path)

    def test_on_disk(self) -> None:
        installed = [folder for folder in FASHION_MNIST.folders if folder.is_dir()]
        if not installed:
            pytest.skip("Fashion-MNIST is not installed (Debian package dataset-fashion-mnist)")
        data = read_images(FASHION_MNIST, 100, 0, torch.float32)
        assert data.x.shape == (10_000, 784)
        assert torch.bincount(data.y).tolist() == [1000] * 10
        # published: mean .2860 and standard deviation .3530 of the training pixels, 6000 a class
        counts, total, squares = torch.zeros(10, dtype=torch.int64), 0.0, 0.0
        for sample in islice(data.train.samples(), 600):
            assert sample.y is not None
            counts += torch.bincount(sample.y, minlength=10)
            total += sample.u.sum().item()
            squares += sample.u.square().sum().item()
        assert counts.tolist() == [6000] * 10
        assert total / (60_000 * 784) == pytest.approx(0.0, abs=2e-3)
        assert squares / (60_000 * 784) == pytest.approx(1.0, abs=4e-3)


def write_cifar(folder: Path) -> None:
    """Two images a file; every byte of channel c of image i of file f is 100 c + 10 i + f."""
    names = [f"data_batch_{f}.bin" for f in range(1, 6)] + ["test_batch.bin"]
    for f, name in enumerate(names):
        records = [
            bytes([f]) + b"".join(bytes([100 * c + 10 * i + f] * 1024) for c in range(3))
            for i in range(2)
        ]
        (folder / name).write_bytes(b"".join(records))


class TestOtherImages:
    def test_mnist(self, tmp_path: Path) -> None:
        write_fashion(tmp_path)
        data = read_images(MNIST, 4, 0, torch.float64, tmp_path)
        expected = ((torch.arange(7, dtype=torch.float64) / 255 - 0.1307) / 0.3081).unsqueeze(1)
        torch.testing.assert_close(data.x, expected.expand(7, 784), rtol=1e-14, atol=1e-14)
        assert data.y.tolist() == list(range(7))

    def test_cifar10(self, tmp_path: Path) -> None:
        write_cifar(tmp_path)
        data = read_images(CIFAR10, 10, 0, torch.float64, tmp_path)
        assert data.train.spec.u_shape == (10, 3, 32, 32)
        sample = next(iter(data.train.samples()))
        assert sample.y is not None
        assert sorted(sample.y.tolist()) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
        means, stds = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
        for i in range(2):
            for c in range(3):
                value = ((100 * c + 10 * i + 5) / 255 - means[c]) / stds[c]
                torch.testing.assert_close(
                    data.x[i, c], torch.full((32, 32), value, dtype=torch.float64)
                )
        assert data.y.tolist() == [5, 5]

    @pytest.mark.parametrize("cut", [1, 3072])
    def test_cifar10_cut_off(self, tmp_path: Path, cut: int) -> None:
        write_cifar(tmp_path)
        file = tmp_path / "data_batch_3.bin"
        file.write_bytes(file.read_bytes()[:-cut])
        with pytest.raises(
            StreamError, match=r"data_batch_3.bin: \d+ bytes are no multiple of 3073"
        ):
            read_images(CIFAR10, 1, 0, torch.float32, tmp_path)

    def test_cifar10_label_out_of_range(self, tmp_path: Path) -> None:
        write_cifar(tmp_path)
        file = tmp_path / "test_batch.bin"
        file.write_bytes(b"\x0a" + file.read_bytes()[1:])
        with pytest.raises(StreamError, match=r"test_batch.bin: label 0 is 10"):
            read_images(CIFAR10, 1, 0, torch.float32, tmp_path)

    def test_missing_files_say_how_to_get_them(self, tmp_path: Path) -> None:
        with pytest.raises(StreamError, match=r"no CIFAR-10 in .*all 6 files.*cifar-10-binary.tar"):
            read_images(CIFAR10, 1, 0, torch.float32, tmp_path)
        with pytest.raises(StreamError, match=r"no MNIST in .*all 4 files.*s3.amazonaws.com/mnist"):
            read_images(MNIST, 1, 0, torch.float32, tmp_path)

    def test_sequences_and_permutations(self, tmp_path: Path) -> None:
        write_fashion(tmp_path)
        pixels = np.random.default_rng(0).integers(0, 256, (12, 28, 28))
        (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(pixels))
        given = {"source": "mnist", "batch": 12, "path": tmp_path}

        def rows(**images: int) -> Tensor:
            settings = StreamSettings.model_validate({**given, "images": images})
            stream = make_stream(settings, seed=0, dtype=torch.float64)
            sample = next(iter(stream.samples()))
            assert sample.u.shape == stream.spec.u_shape
            return sample.u

        flat = rows()
        by_row, by_pixel = rows(steps=28), rows(steps=784)
        assert torch.equal(by_row, flat.reshape(12, 28, 28))
        assert torch.equal(by_pixel, flat.reshape(12, 784, 1))
        mixed, again, other = rows(permutation=3), rows(permutation=3), rows(permutation=4)
        assert torch.equal(mixed, again)
        assert not torch.equal(mixed, other)
        order = torch.randperm(784, generator=torch.Generator().manual_seed(3))
        assert torch.equal(mixed, flat[:, order])
        assert torch.equal(rows(permutation=3, steps=28), mixed.reshape(12, 28, 28))
        with pytest.raises(SettingsError, match=r"steps is 5.*784 numbers"):
            rows(steps=5)

    def test_images_of_another_source_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"'images' belongs to mnist, fashion-mnist, cifar10"):
            StreamSettings.model_validate({"source": "digits", "images": {"steps": 8}})


class TestIdx:
    @pytest.mark.parametrize("zipped", [False, True])
    def test_last_dimension_is_fastest(self, tmp_path: Path, zipped: bool) -> None:
        raw = bytes.fromhex("00000803 00000002 00000001 00000003 0a0b0cff0e0f")
        path = tmp_path / "file"
        path.write_bytes(gzip.compress(raw) if zipped else raw)
        assert read_idx(path, 3).tolist() == [[[10, 11, 12]], [[255, 14, 15]]]

    @pytest.mark.parametrize(
        ("raw", "message"),
        [
            ("", "begins with nothing"),
            ("00000802 00000001", "begins with 00 00 08 02, but .* 1 dimensions .* 00 00 08 01"),
            ("00000d01 00000001 00000000", "begins with 00 00 0d 01"),
            ("01000801 00000001 00", "begins with 01 00 08 01"),
            ("00000801 0000", "ends after 6 bytes, inside its header of 8"),
            ("00000801 00000000", "announces 0 values"),
            ("00000801 00000003 0102", "truncated: 3 values announced, 2 of 3 bytes there"),
            ("00000801 00000001 0102", "1 bytes follow after the 1 values"),
            ("00000801 ffffffff 01", "truncated: 4294967295 values"),
        ],
    )
    def test_errors_name_the_file(self, tmp_path: Path, raw: str, message: str) -> None:
        path = tmp_path / "some-file"
        path.write_bytes(bytes.fromhex(raw))
        with pytest.raises(StreamError, match=f"some-file: .*{message}"):
            read_idx(path, 1)

    def test_damaged_gzip(self, tmp_path: Path) -> None:
        whole = gzip.compress(idx(np.arange(200)))
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 0xFF
        for damaged in (whole[:-9], bytes(flipped), whole[:40], whole + b"more"):
            path = tmp_path / "some-file.gz"
            path.write_bytes(damaged)
            with pytest.raises(StreamError, match=r"some-file.gz: cannot be read"):
                read_idx(path, 1)

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(StreamError, match="absent: cannot be read"):
            read_idx(tmp_path / "absent", 1)


def test_importing_streams_imports_no_sklearn() -> None:
    code = "import sys, hamdist.streams; sys.exit('sklearn' in sys.modules or 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
