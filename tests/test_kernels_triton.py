"""What the contract does not say of the GPU kernels: cuts of large tensors, bits, layers, and the compiled code.

Here they are interpreted, on the CPU (tests/conftest.py), and compiled for a GPU that is not there; tests/gpu runs
them.
"""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import close

import batchnorm
from batchnorm.cli import info
from batchnorm.errors import ArgumentError
from batchnorm.kernels import dispatch, reference
from batchnorm.kernels.contract import Affine

pytest.importorskip("triton", reason="Triton is not installed")
from batchnorm.kernels.triton import backend, layout

pytestmark = pytest.mark.usefixtures("quiet_interpreter")


@pytest.fixture
def _by_triton():
    dispatch.set_backend("triton")
    yield
    dispatch.set_backend("auto")


def _channels_last(x):
    return x.transpose(1, 2).contiguous().transpose(1, 2)


CUT = {
    "rows": ((300, 64, 1), lambda x: x),
    "folded rows": ((64, 24, 8), _channels_last),
    "uneven rows": ((3, 72, 51), _channels_last),
    "small planes": ((72, 8, 5), lambda x: x),
    "planes": ((6, 2, 1160), lambda x: x),
    "whole planes": ((11, 2, 1024), lambda x: x),
    "columns of a transpose": ((3200, 2, 1), lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)),
}


@pytest.mark.parametrize("name", CUT)
def test_a_tensor_cut_among_programs_gives_what_the_reference_gives(monkeypatch, name):
    """Several programs a group, each with whole and with bounded blocks; and the same bits again."""
    monkeypatch.setattr(layout, "_PROGRAMS", 9)
    shape, arrange = CUT[name]
    x, dy, residual = (arrange(torch.randn(shape)) for _ in range(3))
    x += 1e4
    weight, bias = torch.rand(shape[1]) + 0.5, torch.randn(shape[1])
    affine = Affine(weight, bias, 1e-5, "relu")
    seen = layout.layout_of(x, is_masked=False)
    assert seen.tiling(1).splits(seen, seen.tiling(1).number) > 1
    moments, expected = backend.stats(x), reference.stats(x)
    exact = x.double()
    torch.testing.assert_close(moments.mean, exact.mean((0, 2)), rtol=1e-10, atol=0)
    torch.testing.assert_close(moments.var, exact.var((0, 2), correction=0), rtol=2e-6, atol=0)
    y, signs = backend.apply_packing(x, moments, affine, residual)
    close(y, reference.apply(x, expected, affine, residual).double(), torch.float32)
    assert signs.numel() * 8 == x.numel()
    assert torch.equal(backend.unpacked(signs, x), y > 0)
    found = backend.backward(dy, x, moments, affine, signs, is_estimated=True)
    wanted = reference.backward(dy, x, expected, affine, residual, is_estimated=True)
    close(found.x, wanted.x.double(), torch.float32)
    close(found.residual, wanted.residual.double(), torch.float32)
    for mine, theirs in zip(found.sums, wanted.sums, strict=True):
        close(mine, theirs.double(), torch.float32, 30)
    again = backend.stats(x)
    assert torch.equal(again.mean, moments.mean)
    assert torch.equal(again.var, moments.var)
    assert torch.equal(backend.backward(dy, x, moments, affine, signs, is_estimated=True).x, found.x)


@pytest.mark.parametrize("strides", [(2**30, 64, 1), (2**30, 1, 4)], ids=["planes", "rows"])
def test_elements_beyond_32_bits(strides):
    """Each number fits into 32 bits, and their product does not; memory that is not touched costs nothing."""
    size = (3 * 2**30 + 256) * 2
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0))
    x = torch.frombuffer(memory, dtype=torch.float16).as_strided((4, 4, 16), strides)
    values = torch.randn(4, 4, 16).half()
    x.copy_(values)
    moments, expected = backend.stats(x), reference.stats(values)
    close(moments.mean, expected.mean, torch.float32)
    affine = Affine(None, None, 1e-5, None)
    close(backend.apply(x, moments, affine), reference.apply(values, expected, affine).double(), torch.float16)


def test_padding_may_hold_anything_and_its_mean_is_not_the_shift():
    x = torch.randn(4, 3, 40) + 1e4
    mask = torch.rand(4, 1, 40) < 0.6
    mask[:, :, 0] = False
    x.masked_fill_(~mask, 1e19)
    moments, expected = backend.stats(x, mask), reference.stats(x, mask)
    torch.testing.assert_close(moments.mean, expected.mean, rtol=1e-9, atol=0)
    torch.testing.assert_close(moments.var, expected.var, rtol=1e-5, atol=0)
    assert torch.equal(moments.count, expected.count)


def _step(layer, x, residual, mask=None):
    x, residual = x.clone().requires_grad_(), residual.clone().requires_grad_()
    y = layer(x, residual, mask=mask)
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    layer(x, residual, mask=mask).sin().sum().backward()
    grads = [x.grad, residual.grad, *(parameter.grad for parameter in layer.parameters())]
    return [y, first, second, *grads, *layer.buffers()]


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("is_masked", [False, True])
def test_layers_train_the_same(momentum, is_masked):
    """Output, gradients, gradients of gradients, running statistics and their count, with a bit mask inside."""
    x, residual = (torch.randn(4, 8, 3, 2).to(memory_format=torch.channels_last) for _ in range(2))
    mask = torch.rand(4, 3, 2) < 0.7 if is_masked else None
    results = []
    for name in ("triton", "reference"):
        dispatch.set_backend(name)
        try:
            layer = batchnorm.BatchNorm2d(8, momentum=momentum, activation="relu")
            results.append(_step(layer, x, residual, mask))
        finally:
            dispatch.set_backend("auto")
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("_by_triton")
def test_add_and_relu_keep_one_bit_an_element():
    x, residual = torch.randn(4, 8, 5, 2), torch.randn(4, 8, 5, 2)
    layer = batchnorm.BatchNorm2d(8, activation="relu")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x.to(memory_format=torch.channels_last).requires_grad_(), residual)
    assert sorted(t.nbytes for t in kept if t.ndim != 1 or t.dtype == torch.uint8) == [x.numel() // 8, x.nbytes]


@pytest.mark.usefixtures("_by_triton")
def test_a_batch_that_is_not_finite_is_left_out_without_a_look_at_it():
    layer = batchnorm.BatchNorm1d(3)
    before = {name: value.clone() for name, value in layer.named_buffers()}
    x = torch.randn(6, 3)
    x[2, 1] = float("nan")
    layer(x)
    torch.testing.assert_close(dict(layer.named_buffers()), before)


def test_sync_batch_norm_reads_no_number():
    """On tensors without numbers, and with ranks of make-believe: whoever read one back would fail here."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        layer = batchnorm.SyncBatchNorm(8, activation="relu", device="meta")
        x = torch.empty(4, 8, 5, device="meta", requires_grad=True)
        layer(x, x, mask=torch.empty(4, 5, device="meta", dtype=torch.bool)).sum().backward()
        assert x.grad.shape == x.shape
        with pytest.raises(RuntimeError, match="item"):
            layer.running_mean.sum().item()
    finally:
        dist.destroy_process_group()


class TestDispatch:
    @pytest.mark.usefixtures("_by_triton")
    def test_by_name(self):
        assert dispatch.backend_for(torch.randn(2, 3)) is backend
        with pytest.raises(ArgumentError, match=r"Triton backend was chosen by name, but the input is .*meta"):
            dispatch.backend_for(torch.empty(2, 3, device="meta"))

    @pytest.mark.usefixtures("_by_triton")
    def test_compiled_kernels_are_not_for_the_cpu(self, monkeypatch):
        monkeypatch.setattr(backend, "IS_INTERPRETED", False)
        with pytest.raises(ArgumentError, match=r"a GPU \(of the CPU under TRITON_INTERPRET=1\)"):
            dispatch.backend_for(torch.randn(2, 3))

    def test_without_triton_the_name_says_what_to_do(self, monkeypatch):
        monkeypatch.setattr(dispatch, "_why_no_import", lambda: "No module named 'triton': pip install triton")
        with pytest.raises(ArgumentError, match="the Triton backend is not there: No module named 'triton': pip"):
            dispatch.set_backend("triton")

    def test_info_says_what_computes_on_a_gpu(self, monkeypatch):
        assert "PyTorch finds no GPU" in info._facts()["gpu kernels"]
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
        monkeypatch.setattr(dispatch, "why_no_triton", lambda device: f"no compiler for {device}")
        assert "the reference, as Triton" in info._gpu(True)
        assert "cannot run on a GPU: no compiler for cuda:0" in info._gpu(True)


CASES = [
    ((256, 256, 56, 56), "bfloat16", "channels_last", "relu", "residual"),
    ((256, 64, 112, 112), "float32", "contiguous", "relu", "alone"),
    ((256, 512, 7, 7), "float16", "contiguous", None, "alone"),
    ((256, 256, 56, 56), "bfloat16", "channels_last", "relu", "dual"),
    ((256, 2048, 7, 7), "bfloat16", "contiguous", "relu", "dual"),
]
LAUNCHES = {"residual": 7, "alone": 7, "dual": 6}


@pytest.fixture(scope="module")
def compiled():
    """What became of each launch of CASES."""
    tests = Path(__file__).parent
    paths = os.pathsep.join([str(tests), *sys.path])
    done = subprocess.run(
        [sys.executable, str(tests / "gpu_compiled.py"), json.dumps(CASES)],
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


class TestCompiledCode:
    """For a Hopper GPU (sm_90), made without one."""

    def test_nothing_spills(self, compiled):
        assert len(compiled) == sum(LAUNCHES[case[-1]] for case in CASES)
        for kernel in compiled:
            assert kernel["stack"] == 0, kernel
            assert not any(name.startswith(("LDL", "STL")) for name in kernel["memory"]), kernel

    def test_activations_are_read_and_written_16_bytes_at_a_time(self, compiled):
        least = {"partial_moments": (8, 0), "applied": (4, 4), "partial_sums": (8, 0), "differentiated": (4, 2)}
        least |= {"applied_both": (8, 4), "partial_sums_of_both": (6, 0), "differentiated_both": (6, 4)}
        for kernel in compiled:
            loads, stores = least.get(kernel["kernel"], (0, 0))
            assert kernel["memory"].get("LDG.E.128", 0) >= loads, kernel
            assert kernel["memory"].get("STG.E.128", 0) >= stores, kernel

    def test_registers_leave_room_for_enough_programs(self, compiled):
        """Programs of 128 threads on a multiprocessor of 65536 registers."""
        for kernel in compiled:
            assert kernel["registers"] <= 96, kernel
