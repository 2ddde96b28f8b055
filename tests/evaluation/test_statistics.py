"""Statistics of features: sums over batches, and files of several programs."""

import numpy as np
import pytest
import torch

from starflow import DataError
from starflow.evaluation.statistics import Moments, Statistics, read_statistics


def features() -> torch.Tensor:
    return torch.randn(50, 4, dtype=torch.float64) * 2 + 3


def moments(values: torch.Tensor) -> Moments:
    found = Moments(values.shape[1])
    found.add(values)
    return found


def state(values: torch.Tensor) -> dict[str, torch.Tensor]:
    """Tensors that torchmetrics' FrechetInceptionDistance keeps of reference features."""
    found = moments(values)
    return {
        "real_features_sum": found.sum,
        "real_features_cov_sum": found.products,
        "real_features_num_samples": torch.tensor(found.count),
    }


def test_moments_of_batches_are_the_mean_and_covariance_of_all():
    values = features()
    found = (moments(values[:7]) + moments(values[7:])).statistics("x")
    assert np.allclose(found.mean, values.mean(0).numpy(), rtol=0, atol=1e-12)
    assert np.allclose(found.covariance, np.cov(values.numpy(), rowvar=False), rtol=0, atol=1e-11)
    assert found.images == 50 and found.dims == 4


@pytest.mark.parametrize("count", [0, 1])
def test_a_covariance_takes_two_images(count):
    with pytest.raises(DataError, match=f"x: number of images {count}, a covariance takes at least 2"):
        moments(features()[:count]).statistics("x")


def test_saved_statistics_are_read_and_have_the_names_of_adm(tmp_path):
    saved = moments(features()).statistics("x")
    saved.save(tmp_path / "x.npz")
    with np.load(tmp_path / "x.npz") as arrays:
        assert arrays["mu"].shape == (4,) and arrays["sigma"].shape == (4, 4)
    found = read_statistics(tmp_path / "x.npz", 4)
    assert np.array_equal(found.mean, saved.mean) and np.array_equal(found.covariance, saved.covariance)
    assert found.images == 50


def test_statistics_of_adm_are_read_whatever_else_the_file_holds(tmp_path):
    arrays = {"mu": np.zeros(4, np.float32), "sigma": np.eye(4, dtype=np.float32)}
    np.savez(
        tmp_path / "adm.npz", **arrays, mu_s=np.zeros(9), sigma_s=np.eye(9), arr_0=np.zeros((2, 8, 8, 3), np.uint8)
    )
    found = read_statistics(tmp_path / "adm.npz", 4)
    assert found.images is None and found.mean.dtype == found.covariance.dtype == np.float64
    assert np.array_equal(found.covariance, np.eye(4))


def test_the_state_of_torchmetrics_is_read(tmp_path):
    values = features()
    # Files of the TarFlow code hold the network and the sums of generated images too.
    others = {"fake_features_sum": torch.zeros(4), "inception.fc.bias": torch.zeros(8)}
    torch.save({**state(values), **others}, tmp_path / "afhq_256_fid_stats.pth")
    found = read_statistics(tmp_path / "afhq_256_fid_stats.pth", 4)
    assert np.allclose(found.covariance, np.cov(values.numpy(), rowvar=False), rtol=0, atol=1e-11)
    assert found.images == 50


def npz(**arrays):
    return lambda path: np.savez(path, **arrays)


def torch_file(content):
    return lambda path: torch.save(content, path)


def written(content: bytes):
    return lambda path: path.write_bytes(content)


GOOD = {"mu": np.zeros(4), "sigma": np.eye(4)}


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("x.npz", lambda path: None, "no file of statistics at"),
        ("x.npz", lambda path: path.mkdir(), "no file of statistics at"),
        ("x.npz", written(b"not an archive"), "not an .npz file with mu and sigma"),
        ("x.npz", written(b""), "not an .npz file with mu and sigma"),
        ("x.npz", npz(mean=np.zeros(4)), "no mu and sigma in it, but mean"),
        ("x.npz", npz(mu=np.zeros(4)), "no sigma in it, but mu"),
        ("x.npz", npz(mu=np.zeros(4), sigma=np.eye(3)), "expected 4 features"),
        ("x.npz", npz(mu=np.zeros(2048), sigma=np.eye(4)), "expected 4 features"),
        ("x.npz", npz(mu=np.array(["a"] * 4), sigma=np.eye(4)), "not an .npz file with mu and sigma"),
        ("x.npz", npz(mu=np.array([None] * 4), sigma=np.eye(4)), "not an .npz file with mu and sigma"),
        ("x.npz", npz(mu=np.full(4, np.nan), sigma=np.eye(4)), "values are not finite"),
        ("x.npz", npz(**GOOD, images=np.array(1)), "number of images 1, a covariance takes at least 2"),
        ("x.npz", npz(**GOOD, images=np.zeros(3)), "not an .npz file with mu and sigma"),
        ("x.pth", written(b"not a pickle"), "not a checkpoint of torch"),
        ("x.pth", torch_file({"weight": torch.zeros(3)}), "no real_features_sum and real_features_cov_sum and"),
        ("x.pth", torch_file([1, 2]), "holds no weights but a list"),
        ("x.pth", torch_file({**state(torch.zeros(5, 3))}), "expected 4 features"),
        ("x.pth", torch_file({**state(torch.zeros(5, 4)), "real_features_sum": torch.zeros(3)}), "do not go together"),
        ("x.pth", torch_file({**state(torch.zeros(5, 4)), "real_features_num_samples": torch.zeros(2)}), "one number"),
        ("x.pth", torch_file({**state(torch.zeros(1, 4))}), "number of images 1"),
    ],
)
def test_other_files_are_refused_in_one_line(name, write, message, tmp_path):
    write(tmp_path / name)
    with pytest.raises(DataError) as error:
        read_statistics(tmp_path / name, 4)
    assert message in str(error.value) and name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("cut", [0.2, 0.9])
def test_a_truncated_file_is_refused(cut, tmp_path):
    path = tmp_path / "x.npz"
    Statistics(np.zeros(64), np.random.default_rng(0).normal(size=(64, 64)), 9).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(cut * len(content))])
    with pytest.raises(DataError, match=r"not an \.npz file"):
        read_statistics(path, 64)


class Harmful:
    """Object whose unpickling makes a file."""

    def __reduce__(self):
        return open, ("harm.txt", "w")


def test_no_code_of_a_file_is_run(tmp_path):
    torch.save({"real_features_sum": Harmful()}, tmp_path / "x.pth")
    np.savez(tmp_path / "x.npz", mu=np.array([Harmful()], dtype=object), sigma=np.eye(1))
    for name in ("x.pth", "x.npz"):
        with pytest.raises(DataError, match=name):
            read_statistics(tmp_path / name, 1)
    assert not (tmp_path.cwd() / "harm.txt").exists()
