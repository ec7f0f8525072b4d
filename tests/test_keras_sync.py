"""synchronized=True: the statistics of all processes (torch) and of all devices (JAX) together."""

from __future__ import annotations

import keras_sync_cases
import numpy as np
import oracle
import ranks
from on_jax import on_jax


def test_processes_give_what_one_gives_on_the_whole_batch(tmp_path):
    found = ranks.run(keras_sync_cases.on_a_rank, len(keras_sync_cases.SIZES), tmp_path)
    assert all(isinstance(result, list) for result in found), found
    x, dy = keras_sync_cases.batch()
    for number, mask in enumerate((None, x[..., 0] > 100)):
        parts = [result[number] for result in found]
        expected = oracle.train(x, dy, eps=1e-3, channels=(2,), mask=mask)
        np.testing.assert_allclose(np.concatenate([y for y, _, _ in parts]), expected.y, atol=1e-5)
        np.testing.assert_allclose(np.concatenate([dx for _, dx, _ in parts]), expected.dx, atol=1e-5)
        for _, _, statistics in parts:
            np.testing.assert_allclose(statistics["moving_mean"], expected.mean, rtol=1e-6)
            np.testing.assert_allclose(statistics["moving_variance"], expected.var, rtol=1e-5)
    # Renormalization, in its first step, leads towards mean 0 and deviation 1: r as it is, d at its bound.
    whole = oracle.train(x, dy, eps=1e-3, channels=(2,))
    expected = whole.y * np.sqrt(whole.var + 1e-3) + 1.0
    np.testing.assert_allclose(np.concatenate([result[2][0] for result in found]), expected, atol=1e-4)


def test_devices_of_jax_give_what_one_gives_on_the_whole_batch():
    code = "import keras_sync_cases as c; s = c.on_devices_of_jax(); print(*s['moving_mean'], *s['moving_variance'])"
    done = on_jax("-c", code, XLA_FLAGS="--xla_force_host_platform_device_count=2")
    x, _ = keras_sync_cases.batch()
    mean, var, _ = oracle.moments(x, channels=(2,))
    np.testing.assert_allclose([float(word) for word in done.split()[-8:]], [*mean, *var], rtol=1e-5)
