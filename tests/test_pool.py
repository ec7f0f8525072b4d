"""The pool of output buffers: nobody can tell a tensor that lies in one from any other, and none is lent twice."""

from __future__ import annotations

import copy
import io
import multiprocessing
import os
import pickle
import platform
import subprocess
import sys
import threading

import pytest
import torch

from batchnorm import BatchNorm2d, batch_norm

cpu = pytest.importorskip("batchnorm.kernels.cpu", reason="installed without the CPU core")
_cpu = pytest.importorskip("batchnorm.kernels._cpu")

MB = 1 << 20


@pytest.fixture(autouse=True)
def _limit():
    before = _cpu.pool_state()[0]
    cpu.limit_pool(0)  # empty
    cpu.limit_pool(64)
    yield
    _cpu.limit_pool(before)


def _input(value=0):
    """16 MB, a different one for each value."""
    return torch.full((2, 8, 512, 512), float(value)).add_(torch.linspace(0, 1, 512))


def _expected(x):
    return torch.nn.functional.batch_norm(x, None, None, training=True)


def _overwrite(times=4):
    """Takes buffers, fills them with something else and gives them back: what was lent too early would show it."""
    for _ in range(times):
        [batch_norm(_input(9))[0].fill_(-7) for _ in range(3)]


HOLDERS = {
    "view": lambda y: y[1],
    "storage": lambda y: y.untyped_storage(),
    "numpy": lambda y: y.numpy(),
    "numpy-view": lambda y: y.numpy()[:, 1:, ::2],
    "dlpack": lambda y: torch.utils.dlpack.to_dlpack(y),
    "set": lambda y: torch.empty(0).set_(y),
    "data": lambda y: torch.nn.Parameter(y).data,
    "detach": lambda y: y.detach(),
    "in-place": lambda y: y.mul_(2).relu_(),
    "memoryview": lambda y: memoryview(y.numpy()),
    "saved-for-backward": lambda y: (torch.ones((), requires_grad=True) * y).grad_fn,
}


@pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS)
def test_whatever_holds_the_memory_keeps_it(hold):
    y = batch_norm(_input())[0]
    lent, values = _cpu.pool_state()[2], y.view(-1)[::4096]
    address = y.data_ptr()
    assert lent >= y.nbytes
    holder = hold(y)
    expected = values.clone()
    del y, values
    assert _cpu.pool_state()[2] == lent
    _overwrite()
    assert batch_norm(_input())[0].data_ptr() != address
    if isinstance(holder, torch.Tensor) and holder.numel() == 2 * 8 * 512 * 512:
        assert torch.equal(holder.view(-1)[::4096], expected)
    del holder
    assert _cpu.pool_state()[2] == 0


def test_a_buffer_is_recycled_in_any_layout_and_dtype():
    x = _input()
    y = batch_norm(x)[0]
    first = y.data_ptr()
    del y
    last = x.contiguous(memory_format=torch.channels_last)
    again = batch_norm(last)[0]
    assert again.data_ptr() == first
    assert again.stride() == last.stride()
    torch.testing.assert_close(again, _expected(x))
    del again
    half = torch.cat([x, x]).bfloat16()
    assert batch_norm(half)[0].data_ptr() == first


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(1, 8, 512, 512),
        torch.randn(1, 8, 512, 512).contiguous(memory_format=torch.channels_last),
        torch.randn(4, 1, 1024, 512),
        torch.randn(2, 4, 8, 128, 256).contiguous(memory_format=torch.channels_last_3d),
        torch.randn(4096, 512),
        torch.randn(2097152, 1),
    ],
    ids=lambda x: "x".join(map(str, x.shape)),
)
def test_looks_like_empty_like(x):
    y = cpu.new_like(x)
    assert _cpu.pool_state()[2] > 0
    other = torch.empty_like(x)
    assert (y.shape, y.stride(), y.dtype, y.device) == (other.shape, other.stride(), other.dtype, other.device)
    assert y.untyped_storage().nbytes() == other.untyped_storage().nbytes()
    assert (y.storage_offset(), y._base, y.requires_grad, y.is_leaf) == (0, None, False, True)
    with torch.inference_mode():
        assert cpu.new_like(x).is_inference() == torch.empty_like(x).is_inference()


def test_training_reads_what_was_saved():
    """Activations and gradients of a deep network live in the pool at once; each is still what it was."""
    torch.manual_seed(0)
    x = torch.randn(2, 8, 512, 512)

    def gradients(layers):
        leaf = x.clone().requires_grad_()
        y = leaf
        for layer in layers:
            y = layer(y).sin()
        return torch.autograd.grad(y.square().sum(), [leaf, *(p for layer in layers for p in layer.parameters())])

    layers = [BatchNorm2d(8, activation="silu") for _ in range(4)]
    pooled = gradients(layers)
    again = gradients(layers)
    cpu.limit_pool(0)
    for one, two, three in zip(pooled, again, gradients(layers), strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


def test_in_place_after_the_layer():
    leaf = _input().requires_grad_()
    y = BatchNorm2d(8)(leaf)
    y += 1
    torch.nn.functional.relu(y, inplace=True).sum().backward()
    other = _input().requires_grad_()
    torch.relu(torch.nn.BatchNorm2d(8)(other) + 1).sum().backward()
    torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-4, atol=1e-4)


def test_copies_are_independent():
    y = batch_norm(_input())[0]
    file = io.BytesIO()
    torch.save(y, file)
    file.seek(0)
    copies = [copy.deepcopy(y), pickle.loads(pickle.dumps(y)), torch.load(file), y.clone()]
    expected = _expected(_input())
    del y
    _overwrite()
    for each in copies:
        torch.testing.assert_close(each, expected)
        each.resize_(1)


def test_share_memory_moves_the_values_out():
    y = batch_norm(_input())[0]
    y.share_memory_()
    assert y.is_shared()
    assert _cpu.pool_state()[2] == 0
    _overwrite()
    torch.testing.assert_close(y, _expected(_input()))


def _check_in_child(received, answer):
    y = received.get()
    batch_norm(_input(3))  # the child has a pool of its own
    answer.put(float((y - _expected(_input())).abs().max()))


@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")  # JAX's, where another test has loaded it
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_through_a_queue(method):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} here")
    context = torch.multiprocessing.get_context(method)
    send, answer = context.Queue(), context.Queue()
    child = context.Process(target=_check_in_child, args=(send, answer))
    child.start()
    y = batch_norm(_input())[0]
    send.put(y)
    assert answer.get(timeout=120) < 1e-5
    child.join(60)
    assert child.exitcode == 0


def test_smaller_is_possible_and_larger_is_refused_by_torch():
    y = batch_norm(_input())[0]
    y.resize_(10)
    with pytest.raises(RuntimeError, match="not resizable"):
        y.resize_(2, 8, 1024, 512)
    larger = y.new_empty(0)
    larger.resize_(2, 8, 1024, 512)


def test_an_outer_out_argument_takes_a_buffer_of_the_right_size():
    x = _input()
    y = batch_norm(x)[0]
    torch.add(x, 1, out=y)
    assert torch.equal(y, x + 1)


@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_forking_while_other_threads_use_the_pool():
    """No child inherits a locked pool, and no child's work reaches its parent's tensors."""
    code = """
import os, threading, torch
from batchnorm import batch_norm
from batchnorm.kernels import _cpu
torch.set_num_threads(1)
x = torch.randn(1, 8, 512, 1024)
kept = batch_norm(x)[0]
expected = kept.clone()
stop = threading.Event()
def churn():
    while not stop.is_set():
        _cpu.pooled_like(x)
threads = [threading.Thread(target=churn) for _ in range(2)]
[t.start() for t in threads]
for _ in range(20):
    child = os.fork()
    if child == 0:
        _cpu.pooled_like(x)
        y = batch_norm(x)[0]
        fine = torch.equal(y, expected) and torch.equal(kept, expected)
        kept.fill_(5)
        os._exit(0 if fine else 1)
    assert os.waitpid(child, 0)[1] == 0
stop.set()
[t.join() for t in threads]
assert torch.equal(kept, expected)
"""
    env = {**os.environ, "PYTHONWARNINGS": "ignore::DeprecationWarning"}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env=env)


def test_tensors_outlive_the_module_and_the_interpreter():
    code = """
import sys, torch
import batchnorm
from batchnorm import batch_norm
x = torch.randn(2, 8, 512, 512, requires_grad=True)
y = batch_norm(x)[0]
torch.kept_for_ever = y.detach()  # let go by the interpreter's last steps
array = y.detach().numpy()
cycle = [y.exp()]; cycle.append(cycle)
for name in [n for n in sys.modules if n.startswith("batchnorm")]: del sys.modules[name]
del batchnorm
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    # nanobind counts what it leaks where a module is taken away; anything else would be a fault.
    assert found.returncode == 0, found.stderr
    assert "Error" not in found.stderr


def test_threads_never_share_a_buffer():
    torch.set_num_threads(1)
    wrong = []

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(1, 8, 512, 512, generator=generator)
        expected = _expected(x)
        for _ in range(15):
            y = batch_norm(x)[0]
            z = batch_norm(y)[0]
            if not torch.allclose(y, expected, atol=1e-4) or not torch.allclose(z, expected, atol=1e-3):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert _cpu.pool_state()[2] == 0


def test_no_more_lies_idle_than_the_limit():
    x = torch.randn(2, 8, 1024, 512, dtype=torch.bfloat16)  # 16 MB
    outputs = [batch_norm(x)[0] for _ in range(6)]
    assert _cpu.pool_state()[1:] == [0, 6 * 16 * MB]
    del outputs
    assert _cpu.pool_state()[1:] == [64 * MB, 0]
    cpu.limit_pool(20)
    assert _cpu.pool_state()[1] == 16 * MB
    cpu.limit_pool(0)
    assert _cpu.pool_state()[1] == 0
    y = batch_norm(x)[0]
    assert _cpu.pool_state()[1:] == [0, 0]
    y.resize_(3, 8, 1024, 512)


def test_what_was_lent_before_the_pool_was_turned_off_comes_back_to_the_system():
    y = batch_norm(_input())[0]
    cpu.limit_pool(0)
    torch.testing.assert_close(y, _expected(_input()))
    del y
    assert _cpu.pool_state()[1:] == [0, 0]


def test_small_and_sparse_tensors_stay_out_of_it():
    batch_norm(torch.randn(2, 8, 128, 120))
    gaps = torch.randn(2, 16, 512, 512)[:, ::2]
    batch_norm(gaps)
    assert _cpu.pool_state()[1:] == [0, 0]


def test_a_capsule_that_nobody_took_gives_its_buffer_back():
    capsule = _cpu.pooled_like(_input())
    assert _cpu.pool_state()[2] == 16 * MB
    del capsule
    assert _cpu.pool_state()[1:] == [16 * MB, 0]


_MEMORY_SETTINGS = ("BATCHNORM_POOL_MB", "GLIBC_TUNABLES", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")


def _without_memory_settings():
    return {name: value for name, value in os.environ.items() if name not in _MEMORY_SETTINGS}


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="no other C library learns from what it frees")
def test_a_network_in_evaluation_does_not_map_its_activations_afresh_at_each_layer():
    """With our outputs out of the heap glibc gave its end back and mapped it again in each convolution."""
    code = """
import resource, torch
from batchnorm import BatchNorm2d

torch.set_num_threads(1)
parts = [part for _ in range(4) for part in (torch.nn.Conv2d(16, 16, 3, padding=1, bias=False), BatchNorm2d(16))]
network, x = torch.nn.Sequential(*parts).eval(), torch.randn(128, 16, 32, 32)
with torch.no_grad():
    for _ in range(2):
        network(x)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    network(x)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    env = _without_memory_settings()
    found = subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True)
    pages_of_one_activation = 128 * 16 * 32 * 32 * 4 // 4096
    assert int(found.stdout) < pages_of_one_activation / 2


_OF_A_PROCESS = """
import ctypes, os
from batchnorm.kernels import _cpu, cpu

library = ctypes.CDLL(None)
library.malloc.restype = ctypes.c_void_p
library.free.argtypes = [ctypes.c_void_p]
block = ctypes.c_size_t(24 << 20)
first = library.malloc(block)
is_mapped = ctypes.c_size_t.from_address(first - ctypes.sizeof(ctypes.c_size_t)).value & 2  # glibc's IS_MMAPPED
library.free(first)  # from which glibc learns where nobody told it

def given_back():
    if not hasattr(library, "sbrk"):
        return 0
    library.sbrk.restype, library.sbrk.argtypes = ctypes.c_void_p, [ctypes.c_ssize_t]
    blocks = [library.malloc(block) for _ in range(8)]
    end = library.sbrk(0)
    while blocks:
        library.free(blocks.pop())
    return (end - library.sbrk(0)) >> 20

print(_cpu.pool_state()[0], _cpu.usual_pool_limit(), int(is_mapped == 0), given_back(), flush=True)
if os.fork() == 0:
    print(given_back(), flush=True)
    os._exit(0)
os.wait()
"""


@pytest.mark.parametrize(
    ("setting", "limit_of_pool"),
    [
        ({}, None),
        ({"BATCHNORM_POOL_MB": "0"}, 0),
        ({"BATCHNORM_POOL_MB": "100"}, 100 * MB),
        ({"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=30000000:glibc.malloc.trim_threshold=60000000"}, None),
    ],
)
def test_the_environment_sets_the_limit_and_how_much_the_heap_keeps(setting, limit_of_pool):
    """ResNet-50 mapped 20,000 to 118,000 pages afresh in each training step. Children of fork give memory back."""
    env = _without_memory_settings() | setting
    found = subprocess.run([sys.executable, "-c", _OF_A_PROCESS], env=env, check=True, capture_output=True, text=True)
    limit, usual, is_of_heap, given_back, given_back_by_child = map(int, found.stdout.split())
    assert 0 < usual <= 512 * MB
    assert limit == (usual if limit_of_pool is None else limit_of_pool)
    if platform.libc_ver()[0] == "glibc":  # others do not learn
        assert is_of_heap == (limit > 0)
        assert given_back_by_child > 60
        if "GLIBC_TUNABLES" in setting or limit < 160 * MB:
            assert given_back > 60
        elif limit > 200 * MB:  # a small machine keeps less than the 192 MB of this test
            assert given_back == 0
