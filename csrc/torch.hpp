// The little that whole passes ask of torch itself, without its headers: Python objects that are called.
#pragma once

#include <nanobind/nanobind.h>

#include "tensor.hpp"

namespace batchnorm {

// tensor, parameter: the two classes whose memory holds what they are. empty_like, is_neg: functions of one
// tensor. new_large: empty_like for outputs of `large` bytes and more.
void set_torch(nanobind::object tensor, nanobind::object parameter, nanobind::object empty_like,
               nanobind::object is_neg, nanobind::object new_large, size_t large);

// cudnn_batch_norm: the function of torch of that name, see node.hpp.
void set_node(nanobind::object cudnn_batch_norm);
bool has_node();

// (y, mean, 1 / sqrt(var + eps), var) of a training pass, as a node of autograd's graph.
nanobind::object node_of(nanobind::handle x, nanobind::handle weight, nanobind::handle bias, double eps);

// Whether it is one of the two classes: subclasses and fake tensors have meanings of their own.
bool is_tensor(nanobind::handle value);

// Whether the memory of a tensor, one of the two classes, holds its values: no lazy sign.
bool is_literal(nanobind::handle tensor);

// A new tensor like `tensor`, which `view` describes.
nanobind::object empty_like(nanobind::handle tensor, const TensorView& view);

// `tensor` itself, or its values in a new contiguous one.
nanobind::object contiguous(nanobind::handle tensor);

}  // namespace batchnorm
