"""What a package does that was installed where there is no compiler: everything, by the reference backend."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import batchnorm
from batchnorm.kernels import dispatch

# As if it had never been compiled: Python finds None in its place, and no module.
HIDE = "import sys; sys.modules['batchnorm.kernels._cpu'] = None\n"
WHY = "batchnorm was installed without it, as it could not be compiled"


@pytest.fixture
def _reference():
    before = dispatch.get_backend()
    dispatch.set_backend("reference")
    yield
    dispatch.set_backend(before)


def _run(code):
    return subprocess.run([sys.executable, "-c", HIDE + code], capture_output=True, text=True, timeout=120)


def test_layers_train_and_info_says_why():
    done = _run(
        "import torch, batchnorm\n"
        "from batchnorm.kernels import dispatch\n"
        "net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), batchnorm.BatchNorm2d(4), torch.nn.ReLU(inplace=True))\n"
        "net(torch.randn(2, 1, 8, 8)).sum().backward()\n"
        "print(dispatch.backend_for(torch.ones(2, 2)).__name__, net[0].weight.grad is not None)\n"
        "sys.argv = ['batchnorm', 'info']; from batchnorm.cli.app import main; main()\n"
    )
    assert "batchnorm.kernels.reference True" in done.stdout, done.stderr
    assert f"not there: {WHY}. Install a C++17 compiler" in done.stdout


def test_the_core_by_name_says_what_to_do():
    done = _run("from batchnorm.kernels import dispatch\ndispatch.set_backend('cpu')")
    assert done.returncode == 1
    assert f"the CPU backend is not there ({WHY}): install a C++17 compiler" in done.stderr


@pytest.mark.usefixtures("_reference")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_reference_backends_output_may_be_changed_in_place(layout):
    """ReLU in place, and `y += shortcut`, after our layer: a view made inside a Function would refuse both."""
    layer = batchnorm.BatchNorm2d(3)
    x = torch.randn(4, 3, 5, 5).to(memory_format=layout)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = layer(mine)
    y += mine
    torch.relu_(y).square().sum().backward()
    expected = torch.relu(torch.nn.functional.batch_norm(theirs, None, None, training=True) + theirs)
    expected.square().sum().backward()
    assert y.is_contiguous(memory_format=layout)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(mine.grad, theirs.grad)


def test_with_the_channels_on_another_axis_the_output_may_be_changed_in_place():
    x = torch.randn(4, 5, 3, requires_grad=True)
    torch.relu_(batchnorm.BatchNorm(3, channel_axis=-1)(x)).sum().backward()
    assert x.grad is not None
