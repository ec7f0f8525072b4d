"""Batch normalization layers taken over from one framework into another: Keras 3, PyTorch, Flax NNX."""

from batchnorm.surgery.porting.operation import port as port
