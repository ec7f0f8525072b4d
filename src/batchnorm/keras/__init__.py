"""Batch normalization as a layer of Keras 3, on any of its backends."""

from batchnorm.keras.batch_normalization import BatchNormalization as BatchNormalization
from batchnorm.keras.cloning import clone_layer as clone_layer
