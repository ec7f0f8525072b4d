"""fold_onnx(): graphs with every trap, files that are broken, and nothing half written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from batchnorm import fold_onnx
from batchnorm.errors import ArgumentError

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def norm(x, y, channels, name="bn", **attributes):
    """A BatchNormalization node and its initializers."""
    values = {
        f"{name}.g": np.abs(normal(channels)) + 0.5,
        f"{name}.b": normal(channels),
        f"{name}.m": normal(channels),
        f"{name}.v": np.abs(normal(channels)) + 0.5,
    }
    return helper.make_node("BatchNormalization", [x, *values], [y], name, **attributes), values


def save(path, nodes, values, x=("n", 4, 8, 8), outputs=("y",), *, constants=False, opset=17, ir=8, inputs=()):
    initializers = [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()]
    if constants:
        nodes = [helper.make_node("Constant", [], [one.name], value=one) for one in initializers] + nodes
        initializers = []
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x), *inputs],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * len(x)) for name in outputs],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir)
    onnx.checker.check_model(model)
    onnx.save(model, str(path))
    return path


def kinds(path):
    return [node.op_type for node in onnx.load(str(path)).graph.node]


def check(tmp_path, nodes, values, left, *, x=("n", 4, 8, 8), why=None, **options):
    """Folds a file, and compares the two with onnxruntime here too; `left` are the operators then."""
    source = save(tmp_path / "in.onnx", nodes, values, x, **options)
    report = fold_onnx(source, tmp_path / "out.onnx")
    assert report.agreement.holds, str(report)
    assert [kind for kind in kinds(tmp_path / "out.onnx") if kind != "Constant"] == left
    if why is not None:
        assert why in str(report)
    shape = [size if isinstance(size, int) else 3 for size in x]
    feed = {"x": normal(*shape)}
    for old, new in zip(run(source, feed), run(tmp_path / "out.onnx", feed), strict=True):
        assert np.abs(old - new).max() <= 1e-5 * np.abs(old).max()
    return report


def run(path, feed):
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, feed)


MAPS = {
    "Conv": (("Conv", {"pads": [1, 1, 1, 1]}), {"w": (6, 4, 3, 3)}, 6),
    "Conv, groups": (("Conv", {"group": 2, "dilations": [2, 2]}), {"w": (6, 2, 3, 3), "b": (6,)}, 6),
    "Conv, SAME": (("Conv", {"auto_pad": "SAME_UPPER"}), {"w": (6, 4, 3, 3), "b": (6,)}, 6),
    "ConvTranspose": (("ConvTranspose", {"strides": [2, 2]}), {"w": (4, 6, 3, 3)}, 6),
    "ConvTranspose, groups": (("ConvTranspose", {"group": 2}), {"w": (4, 3, 3, 3), "b": (6,)}, 6),
}


@pytest.mark.parametrize("constants", [False, True], ids=["initializers", "constants"])
@pytest.mark.parametrize("name", MAPS)
def test_into_the_convolution_before(tmp_path, name, constants):
    (kind, attributes), shapes, channels = MAPS[name]
    values = {key: normal(*shape) for key, shape in shapes.items()}
    layer, more = norm("a", "y", channels)
    nodes = [helper.make_node(kind, ["x", *values], ["a"], **attributes), layer]
    check(tmp_path, nodes, {**values, **more}, [kind], constants=constants)


@pytest.mark.parametrize("name", MAPS)
def test_into_the_convolution_after_unless_it_pads(tmp_path, name):
    (kind, attributes), shapes, _ = MAPS[name]
    values = {key: normal(*shape) for key, shape in shapes.items()}
    layer, more = norm("a", "c", 4)
    nodes = [helper.make_node("Relu", ["x"], ["a"]), layer, helper.make_node(kind, ["c", *values], ["y"], **attributes)]
    left = ["Relu", kind] if name == "Conv, groups" else ["Relu", "BatchNormalization", kind]
    why = {"Conv": "zero padding", "Conv, SAME": "zero padding"}.get(
        name, "share in its shift" if "T" in name else None
    )
    check(tmp_path, nodes, {**values, **more}, left, why=why)
    if len(left) == 3:  # without a shift nothing is in the way
        more["bn.m"], more["bn.b"] = 0 * more["bn.m"], 0 * more["bn.b"]
        (tmp_path / "out.onnx").unlink()
        check(tmp_path, nodes, {**values, **more}, ["Relu", kind])


GEMMS = [{}, {"transB": 1}, {"alpha": 0.5, "beta": 2.0}, {"transB": 1, "alpha": 3.0}]


@pytest.mark.parametrize("attributes", GEMMS, ids=str)
@pytest.mark.parametrize("bias", [None, (7,), (1, 7), ()], ids=str)
def test_gemm_before_and_after(tmp_path, attributes, bias):
    values = {"w": normal(7, 4) if "transB" in attributes else normal(4, 7)}
    values |= {} if bias is None else {"c": normal(*bias)}
    last = {"w2": normal(3, 7) if "transB" in attributes else normal(7, 3)}
    first, more = norm("a", "h", 7)
    second, others = norm("r", "s", 7, "bn2")
    nodes = [
        helper.make_node("Gemm", ["x", *values], ["a"], **attributes),
        first,
        helper.make_node("Relu", ["h"], ["r"]),
        second,
        helper.make_node("Gemm", ["s", *last], ["y"], **attributes),
    ]
    check(tmp_path, nodes, {**values, **last, **more, **others}, ["Gemm", "Relu", "Gemm"], x=("n", 4))


@pytest.mark.parametrize("order", [0, 1])
def test_matrix_products_with_and_without_addition(tmp_path, order):
    values = {"w": normal(4, 7), "c": normal(7), "w2": normal(7, 3), "c2": normal(3)}
    first, more = norm("b", "h", 7)
    second, others = norm("r", "s", 7, "bn2")
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Add", ["a", "c"] if order else ["c", "a"], ["b"]),
        first,
        helper.make_node("Relu", ["h"], ["r"]),
        second,
        helper.make_node("MatMul", ["s", "w2"], ["t"]),
        helper.make_node("Add", ["t", "c2"], ["y"]),
    ]
    left = ["MatMul", "Add", "Relu", "MatMul", "Add"]
    check(tmp_path, nodes, {**values, **more, **others}, left, x=("n", 4))


def test_a_matrix_product_without_addition_gets_one(tmp_path):
    layer, more = norm("a", "y", 7)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["a"]), layer]
    check(tmp_path, nodes, {"w": normal(4, 7), **more}, ["MatMul", "Add"], x=("n", 4))


def test_a_product_over_more_axes_is_left(tmp_path):
    layer, more = norm("a", "y", 5)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["a"]), layer]
    why = "works on more axes than a matrix has"
    check(tmp_path, nodes, {"w": normal(4, 7), **more}, ["MatMul", "BatchNormalization"], x=("n", 5, 4), why=why)


def conv_norm(**options):
    layer, more = norm("a", "y", 6, **options)
    return [helper.make_node("Conv", ["x", "w"], ["a"], "conv"), layer], {"w": normal(6, 4, 3, 3), **more}


def test_several_consumers_and_graph_outputs_are_left(tmp_path):
    nodes, values = conv_norm()
    left = ["Conv", "BatchNormalization"]
    why = "the output of the Conv before it goes elsewhere too"
    check(tmp_path, nodes, values, left, outputs=("y", "a"), why=why)
    (tmp_path / "out.onnx").unlink()
    nodes.append(helper.make_node("Relu", ["a"], ["z"]))
    check(tmp_path, nodes, values, [*left, "Relu"], outputs=("y", "z"), why=why)


def test_shared_initializers_stay_for_the_others(tmp_path):
    nodes, values = conv_norm()
    nodes.append(helper.make_node("Conv", ["x", "w"], ["z"]))
    check(tmp_path, nodes, values, ["Conv", "Conv"], outputs=("y", "z"))
    names = {one.name for one in onnx.load(str(tmp_path / "out.onnx")).graph.initializer}
    assert {"w", "w_folded"} <= names
    assert not any(name.startswith("bn") and "folded" not in name and "bias" not in name for name in names)


def test_an_initializer_that_callers_may_change_is_no_constant(tmp_path):
    nodes, values = conv_norm()
    weight = helper.make_tensor_value_info("w", TensorProto.FLOAT, (6, 4, 3, 3))
    why = "the Conv's weight is not constant"
    check(tmp_path, nodes, values, ["Conv", "BatchNormalization"], inputs=(weight,), why=why)


def test_one_layer_in_front_of_two_and_chains(tmp_path):
    layer, more = norm("r", "c", 4)
    second, others = norm("y1", "y2", 6, "bn2")
    third, last = norm("y2", "y", 6, "bn3")
    nodes = [
        helper.make_node("Relu", ["x"], ["r"]),
        layer,
        helper.make_node("Conv", ["c", "w"], ["y1"]),
        helper.make_node("Conv", ["c", "w"], ["z"]),
        second,
        third,
    ]
    values = {"w": normal(6, 4, 3, 3), **more, **others, **last}
    check(tmp_path, nodes, values, ["Relu", "Conv", "Conv"], outputs=("y", "z"))


def test_training_form_is_refused(tmp_path):
    nodes, values = conv_norm()
    nodes[1] = helper.make_node(
        "BatchNormalization", list(nodes[1].input), ["y", "mean", "var"], "bn", training_mode=1, momentum=0.9
    )
    source = save(tmp_path / "in.onnx", nodes, values)
    report = fold_onnx(source, tmp_path / "out.onnx")
    assert report.changed == ()
    assert "it is in training form" in str(report)


def test_older_operators(tmp_path):
    nodes, values = conv_norm(epsilon=0.01)
    check(tmp_path, nodes, values, ["Conv"], opset=9, ir=4)


def test_subgraphs_are_named(tmp_path):
    layer, more = norm("x", "inner", 4)
    same = helper.make_node("Identity", ["x"], ["other"])
    value = helper.make_tensor_value_info
    branches = {
        "then_branch": helper.make_graph([layer], "t", [], [value("inner", TensorProto.FLOAT, [None] * 4)]),
        "else_branch": helper.make_graph([same], "e", [], [value("other", TensorProto.FLOAT, [None] * 4)]),
    }
    values = {"yes": np.array(True), **more}
    report = check(tmp_path, [helper.make_node("If", ["yes"], ["y"], "choice", **branches)], values, ["If"])
    assert report.skipped[0].why == "it stands in a subgraph of If choice"


def test_a_value_that_a_subgraph_takes_is_left(tmp_path):
    nodes, values = conv_norm()
    value = helper.make_tensor_value_info
    graphs = {
        f"{name}_branch": helper.make_graph(
            [helper.make_node("Relu", ["a"], [name])], name, [], [value(name, TensorProto.FLOAT, [None] * 4)]
        )
        for name in ("then", "else")
    }
    nodes.append(helper.make_node("If", ["yes"], ["z"], **graphs))
    values["yes"] = np.array(True)
    check(tmp_path, nodes, values, ["Conv", "BatchNormalization", "If"], outputs=("y", "z"), why="goes elsewhere too")


def test_external_data_stays_external(tmp_path):
    nodes, values = conv_norm()
    values["w"] = normal(6, 4, 9, 9)
    source = save(tmp_path / "in.onnx", nodes, values, ("n", 4, 12, 12))
    model = onnx.load(str(source))
    onnx.save_model(model, str(source), save_as_external_data=True, location="in.bin", size_threshold=0)
    report = fold_onnx(source, tmp_path / "out.onnx", shapes={"x": (2, 4, 12, 12)})
    assert report.agreement.holds
    assert (tmp_path / "out.onnx.data").stat().st_size > 7000
    feed = {"x": normal(2, 4, 12, 12)}
    np.testing.assert_allclose(run(source, feed)[0], run(tmp_path / "out.onnx", feed)[0], rtol=1e-4, atol=1e-4)
    (tmp_path / "in.bin").unlink()
    with pytest.raises(ArgumentError, match="no valid ONNX model"):
        fold_onnx(source, tmp_path / "two.onnx")


def test_half_precision(tmp_path):
    nodes, values = conv_norm()
    half = {name: value.astype(np.float16) for name, value in values.items()}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT16, (2, 4, 8, 8))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT16, [None] * 4)],
        [numpy_helper.from_array(value, name) for name, value in half.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, str(tmp_path / "in.onnx"))
    assert fold_onnx(tmp_path / "in.onnx", tmp_path / "out.onnx").agreement.holds
    assert kinds(tmp_path / "out.onnx") == ["Conv"]
    kind = onnx.load(str(tmp_path / "out.onnx")).graph.initializer[0].data_type
    assert kind == TensorProto.FLOAT16


def test_numbers_that_overflow_are_left(tmp_path):
    nodes, values = conv_norm()
    values["bn.v"] = np.full(6, np.nan, np.float32)
    source = save(tmp_path / "in.onnx", nodes, values)
    assert "not finite" in str(fold_onnx(source, tmp_path / "out.onnx"))


def test_outputs_that_differ_leave_no_file(tmp_path, monkeypatch):
    from batchnorm.surgery import onnx_folding

    nodes, values = conv_norm()
    source = save(tmp_path / "in.onnx", nodes, values)
    layer = onnx_folding._layer
    monkeypatch.setattr(onnx_folding, "_layer", lambda *args: layer(*args)._replace(shift=layer(*args).shift + 1))
    report = fold_onnx(source, tmp_path / "out.onnx")
    assert not report.agreement.holds
    assert report.changed == ()
    assert "nothing was written" in str(report)
    assert [path.name for path in tmp_path.iterdir()] == ["in.onnx"]


def test_a_file_that_is_there_stays_without_force(tmp_path):
    nodes, values = conv_norm()
    source = save(tmp_path / "in.onnx", nodes, values)
    (tmp_path / "out.onnx").write_text("mine")
    with pytest.raises(ArgumentError, match=r"out.onnx exists: pass force=True"):
        fold_onnx(source, tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx").read_text() == "mine"
    assert fold_onnx(source, tmp_path / "out.onnx", force=True).agreement.holds
    assert kinds(tmp_path / "out.onnx") == ["Conv"]
    assert fold_onnx(source, source, force=True).agreement.holds  # in its own place


BROKEN = {
    "absent": (lambda whole: None, "is no file"),
    "empty": (lambda whole: b"", "no valid ONNX model"),
    "text": (lambda whole: b"this is no model, but text\n" * 9, "no ONNX file, or a damaged one|no valid ONNX model"),
    "truncated": (lambda whole: whole[: len(whole) // 2], "no ONNX file, or a damaged one|no valid ONNX model"),
    "a zip": (lambda whole: b"PK\x03\x04" + bytes(300), "no ONNX file, or a damaged one|no valid ONNX model"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files(tmp_path, name):
    make, match = BROKEN[name]
    nodes, values = conv_norm()
    source = save(tmp_path / "in.onnx", nodes, values)
    content = make(source.read_bytes())
    source.unlink()
    if content is not None:
        source.write_bytes(content)
    with pytest.raises(ArgumentError, match=match):
        fold_onnx(source, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_other_errors(tmp_path):
    relu = save(tmp_path / "relu.onnx", [helper.make_node("Relu", ["x"], ["y"])], {})
    with pytest.raises(ArgumentError, match="has no BatchNormalization node to fold"):
        fold_onnx(relu, tmp_path / "out.onnx")
    nodes, values = conv_norm()
    source = save(tmp_path / "in.onnx", nodes, values)
    with pytest.raises(ArgumentError, match="the model has no input z: it has x"):
        fold_onnx(source, tmp_path / "out.onnx", shapes={"z": (1,)})
    with pytest.raises(ArgumentError, match="onnxruntime cannot run the model"):
        fold_onnx(source, tmp_path / "out.onnx", shapes={"x": (1, 5, 8, 8)})
    with pytest.raises(ArgumentError, match=r"the folder of .* does not exist"):
        fold_onnx(source, tmp_path / "nowhere" / "out.onnx")
    assert sorted(path.name for path in Path(tmp_path).iterdir()) == ["in.onnx", "relu.onnx"]
