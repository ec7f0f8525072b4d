"""What the processes of test_keras_sync.py do."""

from __future__ import annotations

import numpy as np

SIZES = (5, 0, 3)


def batch():
    rng = np.random.default_rng(0)
    return (rng.standard_normal((sum(SIZES), 6, 4)) + 100).astype("float32"), rng.standard_normal((sum(SIZES), 6, 4))


def on_a_rank(rank):
    """A step of a synchronized layer, with and without a mask, with this rank's part of the batch."""
    from keras_calls import step

    from batchnorm.keras import BatchNormalization

    ends = np.cumsum((0, *SIZES))
    x, dy = (whole[ends[rank] : ends[rank + 1]] for whole in batch())
    found = []
    for mask, renorm in ((None, False), (x[..., 0] > 100, False), (None, True)):
        layer = BatchNormalization(synchronized=True, momentum=0.0, renorm=renorm, renorm_clipping={"dmax": 1.0})
        got = step(layer, x, dy.astype("float32"), mask)
        found.append((got.y, got.dx, got.statistics))
    return found


def on_devices_of_jax():
    """A fit() on two devices, each with half of the batch; the layer's statistics."""
    import keras
    from keras_calls import weights

    from batchnorm.keras import BatchNormalization

    devices = keras.distribution.list_devices()
    assert len(devices) == 2, devices
    keras.distribution.set_distribution(keras.distribution.DataParallel(devices=devices))
    layer = BatchNormalization(synchronized=True, momentum=0.0)
    model = keras.Sequential([keras.Input((6, 4)), layer])
    model.compile("sgd", "mse")
    x, _ = batch()
    model.fit(x, x, batch_size=len(x), epochs=1, shuffle=False, verbose=0)
    return weights(layer)
