from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from batchnorm import FeatureNormalization
from batchnorm.errors import BatchNormError, DtypeError, ShapeError

FORMS = ["tensor", "array", "list", "generator", "pairs", "loader", "loader of pairs", "(N, L, C)"]


def _rows(n=60, c=4, seed=0):
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((n, c)) @ rng.standard_normal((c, c))
    return mixed * 10.0 ** (np.arange(c) - c // 2.0) + np.arange(c) * 100


def _as(form, rows):
    tensor = torch.from_numpy(rows)
    parts = list(tensor.split([1, 20, 0, 39]))
    return {
        "tensor": lambda: tensor,
        "array": lambda: rows,
        "list": lambda: parts,
        "generator": lambda: (part for part in parts),
        "pairs": lambda: [(part, torch.zeros(len(part))) for part in parts],
        "loader": lambda: DataLoader(tensor, batch_size=7),
        "loader of pairs": lambda: DataLoader(TensorDataset(tensor, torch.arange(60)), batch_size=7, shuffle=True),
        "(N, L, C)": lambda: tensor.view(6, 10, 4),
    }[form]()


@pytest.mark.parametrize("whiten", [False, True], ids=["standardise", "whiten"])
@pytest.mark.parametrize("form", FORMS)
def test_streaming_is_one_pass(form, whiten):
    rows = _rows()
    layer = FeatureNormalization(4, whiten=whiten)
    assert layer.adapt(_as(form, rows)) is layer
    np.testing.assert_allclose(layer.mean, rows.mean(0))
    np.testing.assert_allclose(layer.var, rows.var(0))
    assert int(layer.count) == 60
    y = layer(torch.from_numpy(rows)).numpy()
    np.testing.assert_allclose(y.mean(0), 0, atol=1e-9)
    np.testing.assert_allclose(y.std(0), 1, rtol=1e-9)
    if whiten:
        np.testing.assert_allclose(y.T @ y / 60, np.eye(4), atol=1e-8)
        # ZCA-cor: of all whitenings the one closest to the standardised features, hence symmetric beside them.
        standard = (rows - rows.mean(0)) / rows.std(0)
        cross = y.T @ standard / 60
        np.testing.assert_allclose(cross, cross.T, atol=1e-8)
        assert (np.diag(cross) > 0).all()
    else:
        np.testing.assert_allclose(y, (rows - rows.mean(0)) / rows.std(0), atol=1e-9)


def test_adapting_again_replaces():
    layer = FeatureNormalization(4).adapt(_rows())
    layer.adapt(_rows(30, seed=1) + 5)
    np.testing.assert_allclose(layer.mean, (_rows(30, seed=1) + 5).mean(0))
    assert int(layer.count) == 30


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("value", [0.0, 1000.1, -3e-7, 1e30])
def test_a_constant_feature_gives_zero(whiten, value):
    rows = _rows().astype(np.float32)
    rows[:, 2] = value
    layer = FeatureNormalization(4, whiten=whiten).adapt([rows[:11], rows[11:]])
    y = layer(torch.from_numpy(rows))
    assert (y[:, 2].abs() < 1e-5).all()
    assert y.isfinite().all()
    torch.testing.assert_close(y[:, [0, 1, 3]].double().var(0, correction=0), torch.ones(3).double(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("seed", range(20))
def test_rank_deficient_data_whiten_to_their_rank(seed):
    rng = np.random.default_rng(seed)
    c = int(rng.integers(2, 12))
    rank = int(rng.integers(1, c + 1))
    rows = rng.standard_normal((200, rank)) @ rng.standard_normal((rank, c)) * np.exp(rng.uniform(-8, 8, c)) + 50
    layer = FeatureNormalization(c, whiten=True).adapt([rows[i :: seed % 7 + 1] for i in range(seed % 7 + 1)])
    y = layer(torch.from_numpy(rows)).numpy()
    eigenvalues = np.linalg.eigvalsh(y.T @ y / 200)
    np.testing.assert_allclose(eigenvalues[-rank:], 1, rtol=1e-4)
    np.testing.assert_allclose(eigenvalues[:-rank], 0, atol=1e-4)


@pytest.mark.parametrize("seed", range(8))
def test_directions_in_which_the_data_do_not_vary_are_not_blown_up(seed):
    """Their eigenvalues are rounding: a new row that leaves the data's plane must not come out 1e8 times as large."""
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((2, 100))
    layer = FeatureNormalization(4, whiten=True).adapt(np.stack([a, 3 * a + 1, b, a + b], axis=1))
    step = torch.from_numpy(rng.standard_normal((10, 4)) * 0.1)
    assert layer(layer.mean + step).abs().max() < 5


def test_fewer_rows_than_features_whiten():
    rows = _rows(5, 12)
    y = FeatureNormalization(12, whiten=True).adapt(rows)(torch.from_numpy(rows)).numpy()
    np.testing.assert_allclose(np.linalg.eigvalsh(y.T @ y / 5)[-4:], 1, rtol=1e-6)


@pytest.mark.parametrize("offset", [1e4, 1e6])
@pytest.mark.parametrize("whiten", [False, True])
def test_float32_with_large_offsets(offset, whiten):
    rows = (np.random.default_rng(0).standard_normal((500, 3)) + offset).astype(np.float32)
    layer = FeatureNormalization(3, whiten=whiten).adapt(DataLoader(torch.from_numpy(rows), batch_size=32))
    np.testing.assert_allclose(layer.var, rows.astype(np.float64).var(0), rtol=1e-9)
    y = layer(torch.from_numpy(rows))
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.mean(0), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(y.var(0, correction=0), torch.ones(3), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype):
    rows = torch.from_numpy(_rows(c=3)).to(dtype)
    y = FeatureNormalization(3).adapt(rows)(rows)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double().mean(0), torch.zeros(3).double(), rtol=0, atol=2e-2)


def test_data_is_left_alone():
    rows = torch.from_numpy(_rows())
    before = rows.clone()
    FeatureNormalization(4, whiten=True).adapt(rows)(rows)
    assert torch.equal(rows, before)


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("assign", [False, True])
def test_state_dict(whiten, assign):
    rows = torch.from_numpy(_rows())
    layer = FeatureNormalization(4, whiten=whiten).adapt(rows)
    assert list(layer.state_dict()) == ["mean", "var", *["whitening"] * whiten, "count"]
    assert not list(layer.parameters())
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    twin = FeatureNormalization(4, whiten=whiten)
    twin.load_state_dict(torch.load(file, weights_only=True), assign=assign)
    for other in (twin, copy.deepcopy(layer)):
        torch.testing.assert_close(other(rows), layer(rows), rtol=0, atol=0)


def test_whitening_and_standardising_files_are_not_mixed_up():
    state = FeatureNormalization(4).adapt(_rows()).state_dict()
    with pytest.raises(RuntimeError, match=r"Missing key.*whitening"):
        FeatureNormalization(4, whiten=True).load_state_dict(state)


@pytest.mark.parametrize("convert", ["half", "float", "bfloat16"])
def test_converting_the_model_keeps_float64_statistics(convert):
    layer = FeatureNormalization(4, whiten=True).adapt(_rows())
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    getattr(torch.nn.Sequential(layer), convert)()
    for name, value in layer.state_dict().items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name])


def test_train_and_eval_make_no_difference():
    rows = torch.from_numpy(_rows())
    layer = FeatureNormalization(4).adapt(rows)
    torch.testing.assert_close(layer.train()(rows), layer.eval()(rows), rtol=0, atol=0)
    assert int(layer.count) == 60


def test_gradients_vmap_and_compile():
    layer = FeatureNormalization(4, whiten=True).adapt(_rows())
    x = torch.from_numpy(_rows(6)).requires_grad_()
    assert torch.autograd.gradcheck(layer, x, atol=1e-4)
    torch.testing.assert_close(torch.vmap(layer)(x), layer(x))
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize(
    ("data", "error", "match"),
    [
        (np.ones((5, 3)), ShapeError, r"expected \(..., 4\), got \(5, 3\)"),
        (np.ones(()), ShapeError, r"expected \(..., 4\), got \(\)"),
        (np.ones((1, 4)), ShapeError, "at least 2 rows, got 1"),
        (np.ones((0, 4)), ShapeError, "at least 2 rows, got 0"),
        ([], ShapeError, "at least 2 rows, got 0"),
        (np.ones((5, 4), np.int64), DtypeError, "expects float data, got int64"),
        (torch.ones(5, 4, dtype=torch.uint8), DtypeError, "expects float data, got torch.uint8"),
        (torch.ones(5, 4, dtype=torch.complex64), DtypeError, "expects float data, got torch.complex64"),
        (np.array([["a"] * 4]), DtypeError, "expects float data"),
        (
            np.array([[1, 2, np.nan, 3], [1, np.inf, 2, 3.0]]),
            BatchNormError,
            r"NaN or infinity in the features \[1, 2\]",
        ),
        ([np.ones((5, 4)), np.ones((5, 2))], ShapeError, r"got \(5, 2\)"),
        ([np.ones((5, 4)), np.full((5, 4), np.nan)], BatchNormError, "nothing was changed"),
    ],
)
@pytest.mark.parametrize("whiten", [False, True])
def test_errors_leave_the_state_as_it_was(data, error, match, whiten):
    layer = FeatureNormalization(4, whiten=whiten).adapt(_rows())
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    with pytest.raises(error, match=match):
        layer.adapt(data)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize(
    ("x", "error", "match"),
    [
        (torch.ones(5, 3), ShapeError, r"expected \(..., 4\), got \(5, 3\)"),
        (torch.ones(5, 4, dtype=torch.int64), DtypeError, "float tensor, got torch.int64"),
    ],
)
def test_errors_in_forward(x, error, match):
    with pytest.raises(error, match=match):
        FeatureNormalization(4).adapt(_rows())(x)


def test_without_statistics():
    with pytest.raises(BatchNormError, match=r"no statistics yet: call adapt"):
        FeatureNormalization(4)(torch.ones(5, 4))
