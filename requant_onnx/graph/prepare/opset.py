"""Raise the opset of a model with as few changes as possible.

If the operators in use differ between the two versions only by additional types and by optional attributes whose absence means
the old behavior, only the version number changes.  Otherwise onnx.version_converter is used: what it cannot read is rewritten
before, and what it drops is restored afterward.
https://onnx.ai/onnx/api/version_converter.html
"""

from __future__ import annotations

import onnx
from onnx import version_converter

from requant_onnx.errors import ModelError
from requant_onnx.files.load import opset_of
from requant_onnx.files.walk import all_graphs
from requant_onnx.graph.constants import is_standard_proto, load_proto
from requant_onnx.graph.edit import tensor_proto
from requant_onnx.graph.prepare.expose import inlined
from requant_onnx.text import first_line

HARMLESS = {
    "AveragePool": {"dilations"},
    "BatchNormalization": {"training_mode"},
    "Cast": {"saturate"},
    "CastLike": {"saturate"},
    "Constant": {"sparse_value", "value_float", "value_floats", "value_int", "value_ints", "value_string", "value_strings"},
    "DequantizeLinear": {"axis", "block_size", "output_dtype"},
    "MaxPool": {"ceil_mode", "dilations", "storage_order"},
    "QuantizeLinear": {"axis", "block_size", "output_dtype", "precision", "saturate"},
    "Reshape": {"allowzero"},
    "Shape": {"end", "start"},
}
"""Attributes added by a newer version that keep the old behavior when absent."""


def raise_opset(model: onnx.ModelProto, target: int) -> onnx.ModelProto:
    """The model at opset `target` or above.  May change and return the given model.

    Raises ModelError when the converter fails.
    """
    current = opset_of(model)
    if current >= target:
        return model
    nodes = [node for graph in all_graphs(model.graph) for node in graph.node]
    nodes += [node for function in model.functions for node in function.node]
    local = {(function.domain, function.name) for function in model.functions}
    if all((node.domain, node.op_type) in local or _unchanged(node, current, target) for node in nodes):
        for holder in (model, *model.functions):
            for entry in holder.opset_import:
                entry.version = target if entry.domain in ("", "ai.onnx") else entry.version
    else:
        model = _convert(model, current, target)
    needed = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", target)])
    model.ir_version = max(model.ir_version, needed)
    return model


def _unchanged(node: onnx.NodeProto, current: int, target: int) -> bool:
    if node.domain not in ("", "ai.onnx"):
        return True
    try:
        old = onnx.defs.get_schema(node.op_type, current)
        new = onnx.defs.get_schema(node.op_type, target)
    except onnx.defs.SchemaError:  # a model-local function, or an operator that was removed
        return False
    return not new.deprecated and (old.since_version == new.since_version or _compatible(old, new))


def _compatible(old: onnx.defs.OpSchema, new: onnx.defs.OpSchema) -> bool:
    before, after = _attributes(old), _attributes(new)
    added = after.keys() - before.keys()
    same_attributes = all(after.get(name) == value for name, value in before.items())
    same_tensors = _tensors(old.inputs) == _tensors(new.inputs) and _tensors(old.outputs) == _tensors(new.outputs)
    return same_attributes and same_tensors and added <= HARMLESS.get(old.name, set())


def _attributes(schema: onnx.defs.OpSchema) -> dict[str, tuple[object, bool, bytes]]:
    return {
        name: (attribute.type, attribute.required, attribute.default_value.SerializeToString())
        for name, attribute in schema.attributes.items()
    }


def _tensors(parameters: object) -> list[tuple[str, object]]:
    return [(parameter.name, parameter.option) for parameter in parameters]  # type: ignore[attr-defined]


def _readable(model: onnx.ModelProto, target: int) -> onnx.ModelProto:
    """The model without what the converter drops or refuses: functions, sparse tensors, and the second name of the standard domain.

    May change the given model.
    """
    if model.functions:
        model = inlined(model)
    called = {(node.domain, node.op_type) for graph in all_graphs(model.graph) for node in graph.node}
    left = [function.name for function in model.functions if (function.domain, function.name) in called]
    if left:
        raise ModelError(
            f"the function '{left[0]}' needs another opset than the model, so the opset cannot be raised; "
            f"export the model with opset {target} or above"
        )
    others = [(entry.domain, entry.version) for entry in model.opset_import if entry.domain not in ("", "ai.onnx")]
    imports = [onnx.helper.make_opsetid(*entry) for entry in (("", opset_of(model)), *others)]
    del model.opset_import[:]
    model.opset_import.extend(imports)
    for graph in all_graphs(model.graph):
        graph.initializer.extend(tensor_proto(load_proto(item), item.values.name) for item in graph.sparse_initializer)
        del graph.sparse_initializer[:]
        for node in filter(is_standard_proto, graph.node):
            node.ClearField("domain")  # an empty text would take two bytes
            _fill_constant(node)
    return model


def _fill_constant(node: onnx.NodeProto) -> None:
    """Make the value of a Constant dense."""
    for item in node.attribute:
        if item.type == onnx.AttributeProto.SPARSE_TENSOR:
            item.CopyFrom(onnx.helper.make_attribute("value", tensor_proto(load_proto(item.sparse_tensor), "")))


def _convert(model: onnx.ModelProto, current: int, target: int) -> onnx.ModelProto:
    model = _readable(model, target)
    try:
        converted = version_converter.convert_version(model, target)
    except Exception as error:  # the converter raises RuntimeError, ConvertError and others
        raise ModelError(
            f"the model's opset {current} cannot be raised to {target} ({first_line(error)}); "
            f"export it with opset {target} or above"
        ) from None
    kept = {entry.key for entry in converted.metadata_props}
    converted.metadata_props.extend(entry for entry in model.metadata_props if entry.key not in kept)
    for field in ("doc_string", "domain", "model_version", "producer_name", "producer_version"):
        setattr(converted, field, getattr(model, field))
    converted.graph.doc_string = model.graph.doc_string
    for before, after in ((model.graph.input, converted.graph.input), (model.graph.output, converted.graph.output)):
        declared = {item.name: item for item in before}
        for item in after:  # the converter infers sizes where the model has names
            item.CopyFrom(declared.get(item.name, item))
    if current < 11:
        _keep_asymmetric(converted)
    return converted


def _keep_asymmetric(model: onnx.ModelProto) -> None:
    """Keep the coordinate scaling of Upsample, and of Resize before opset 11: the converter adds a half-pixel shift.

    https://onnx.ai/onnx/operators/onnx__Resize.html
    """
    for graph in all_graphs(model.graph):
        for node in graph.node:
            if node.op_type == "Resize" and not any(item.name == "coordinate_transformation_mode" for item in node.attribute):
                node.attribute.append(onnx.helper.make_attribute("coordinate_transformation_mode", "asymmetric"))
