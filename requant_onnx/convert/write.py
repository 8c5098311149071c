"""Write a converted model: decodes in place of weights, float16 vectors, integer activations, and the report."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import TypeVar

import numpy as np
import onnx

from requant_onnx.choices import BiasType, Form
from requant_onnx.config import METADATA_KEY, QuantConfig
from requant_onnx.convert.nearest import Result
from requant_onnx.convert.prepare import Prepared
from requant_onnx.convert.report import QuantReport, VectorReport, WeightReport
from requant_onnx.errors import ModelError
from requant_onnx.files.walk import all_graphs
from requant_onnx.graph.decode.forms import FORMS, Coded, Target, bytes_of_each, decode_of, group_weights
from requant_onnx.graph.decode.lookup import decode_after_lookup
from requant_onnx.graph.decode.replace import replace_weights, set_metadata
from requant_onnx.graph.decode.vectors import decode_vectors, halvable, shorten_names
from requant_onnx.graph.decode.writer import Constants, Decode, DecodeWriter
from requant_onnx.graph.edit import set_initializer
from requant_onnx.graph.float_constants import float_constants, unconverted
from requant_onnx.graph.integer.nodes import quantize_activations
from requant_onnx.graph.layers import find_layers
from requant_onnx.graph.names import FreshNames
from requant_onnx.graph.slim import slim
from requant_onnx.graph.weights import SkippedWeight
from requant_onnx.numerics.arrays import GenericArray
from requant_onnx.runtimes import RUNTIMES

T = TypeVar("T")
Built = tuple[onnx.ModelProto, QuantReport]
Biases = Mapping[str, GenericArray]


def write(prepared: Prepared, results: Iterable[Result], biases: Biases) -> tuple[onnx.ModelProto, QuantReport]:
    """Replace weights by their decodes.  Returns the model and its report.

    The model is `prepared.model`, which changes, or the source if no weight is worth converting.
    biases: new biases, (oc,), by name.
    If the results come from `drain`, codes and the nodes that hold them are never all in memory at once.
    Raises ModelError if a weight planned for integer kernels has levels beyond the largest float.
    """
    model, config, integers, target = prepared.model, prepared.config, prepared.integers, prepared.target
    finite, skipped = _finite(results)
    quantized = {name: result.quantized for name, result in finite.items() if result.is_integer}
    errors = {name: result.error for name, result in finite.items()}
    constants, writer = float_constants(model), Constants(FreshNames(model))
    decodes, converted = _decode(finite, target, writer, integers.plan.why_not, skipped)
    done, halved = {weight.name for weight in converted}, Vectors()
    biases = _of_converted(prepared, biases, errors.keys(), done)
    for name, values in biases.items():
        set_initializer(model.graph, values, name)
    if done:
        decode_after_lookup(model, replace_weights(model, done, drain(decodes)))
        if integers.plan.weighted:
            new_biases = [
                replace(bias, values=np.asarray(biases.get(bias.node.bias, bias.values), np.float32)) for bias in integers.biases
            ]
            paired = RUNTIMES[config.runtime].paired
            quantize_activations(model, integers.plan, integers.grids, new_biases, quantized, paired=paired)
        halved = _halve_vectors(prepared, {each.name for each in constants} - done, errors, writer)
        slim(model)
        set_metadata(model, METADATA_KEY, _settings(config))
    graphs = list(all_graphs(model.graph))
    stays = {item.name for graph in graphs for item in (*graph.initializer, *(each.values for each in graph.sparse_initializer))}
    stays |= {name for graph in graphs for node in graph.node for name in node.output}
    rest = [each for each in constants if each.name in stays - halved.names]
    skips = (*prepared.plan.skipped, *skipped)
    report = QuantReport(
        config=config.to_dict(),
        opset=(prepared.origin.opset, target.opset),
        folded_batchnorms=prepared.folded,
        converted=converted,
        skipped=(*skips, *unconverted(rest, done, skips)),
        activations=integers.reports(),
        vectors=halved.report,
        notes=prepared.notes,
        floats=sum(each.bytes for each in prepared.origin.constants),
    )
    return (model if done else prepared.origin.source), report


def _of_converted(prepared: Prepared, biases: Biases, quantized: Collection[str], converted: set[str]) -> Biases:
    """The new biases without those that correct the error of a weight that was quantized, but stays float."""
    kept = {layer.bias for layer in find_layers(prepared.graph, quantized) if layer.weight not in converted}
    return {name: values for name, values in biases.items() if name not in kept}


@dataclass(frozen=True)
class Vectors:
    """The vectors that were stored as float16: their names in the model before, and their report."""

    names: frozenset[str] = frozenset()
    report: VectorReport = field(default_factory=VectorReport)


def _halve_vectors(prepared: Prepared, names: set[str], errors: Mapping[str, float], constants: Constants) -> Vectors:
    """Store biases and other vectors as float16 where the settings say so.  Changes `prepared.model`.

    names: constants of the model that may be vectors; weights that the plan skips stay.  errors: weight -> squared error.
    """
    form, wanted = FORMS[prepared.config.form], prepared.config.biases
    if wanted is BiasType.FLOAT or (wanted is BiasType.AUTO and not (form.half_vectors and prepared.target.half)):
        return Vectors()
    layers = find_layers(prepared.graph, errors.keys())
    limits = {layer.bias: errors[layer.weight] for layer in layers if layer.can_correct}
    vectors = halvable(prepared.model, names - {each.name for each in prepared.plan.skipped}, limits)
    decode = decode_vectors(DecodeWriter(constants), vectors)
    if decode is None:
        return Vectors()
    replace_weights(prepared.model, vectors.keys(), [decode])
    shorten_names(prepared.model, constants.names, vectors)
    before = sum(values.nbytes for values in vectors.values())
    return Vectors(frozenset(vectors), VectorReport(len(vectors), before, decode.bytes))


def _settings(config: QuantConfig) -> str:
    """The version and the settings of a conversion as JSON, without defaults, except for the form, on which sessions depend."""
    defaults = QuantConfig(form=config.form).to_dict()
    given = {name: value for name, value in config.to_dict().items() if name == "form" or value != defaults.get(name)}
    return json.dumps({"version": version("requant_onnx"), **given}, sort_keys=True, separators=(",", ":"))


def drain(items: list[T]) -> Iterator[T]:
    """The items in order, each removed from the list, so that it can be freed when the next one is requested."""
    items.reverse()
    while items:
        yield items.pop()


def _finite(results: Iterable[Result]) -> tuple[dict[str, Result], list[SkippedWeight]]:
    """The results with finite weights, by name, and the other weights, which are skipped.

    Raises ModelError if such a weight was planned for integer kernels, because activations already depend on this.
    """
    finite: dict[str, Result] = {}
    skipped = []
    for result in results:
        name = result.planned.weight.name
        if result.finite:
            finite[name] = result
        elif result.is_integer:
            raise ModelError(f"the weight '{name}' has levels beyond the largest float; fix the model, or choose --form folded")
        else:
            skipped.append(_skipped(result, "has levels beyond the largest float"))
    return finite, skipped


def _decode(
    results: dict[str, Result],
    target: Target,
    constants: Constants,
    why_not_int8: Mapping[str, str],
    skipped: list[SkippedWeight],
) -> tuple[list[Decode], tuple[WeightReport, ...]]:
    """The decodes of all weights that are worth converting, and their reports.  Removes the results from their dictionary one by
    one, and adds the weights that stay in float to `skipped`."""
    order, decodes = list(results), []
    reports: dict[str, WeightReport] = {}
    stays: list[list[SkippedWeight]] = []  # for each decode, its weights, in case they stay in float after all
    for group in drain(group_weights([result.coded() for result in results.values()], target)):
        decode = decode_of(group, target, constants)
        members = [results.pop(weight.name) for weight in group]
        stored = sum(result.planned.weight.stored_bytes for result in members)
        if decode.bytes >= stored and not FORMS[group[0].form].on_integers:
            skipped += [_skipped(result, _not_smaller(group, decode, stored)) for result in members]
            continue
        decodes.append(decode)
        stays.append([_skipped(result, "would not get smaller, because of the table that decodes it") for result in members])
        sizes = bytes_of_each(group, decode)
        for weight, result in zip(group, members, strict=True):
            reports[weight.name] = result.report(sizes[weight.name], why_not_int8.get(weight.name, ""))
    costly = _not_worth_their_tables(decodes, [sum(weight.bytes for weight in each) for each in stays])
    costly -= {k for k, each in enumerate(stays) if any(FORMS[Form(reports[weight.name].form)].on_integers for weight in each)}
    for each in (each for k in sorted(costly) for each in stays[k]):
        skipped.append(each)
        del reports[each.name]
    decodes = [decode for k, decode in enumerate(decodes) if k not in costly]
    return decodes, tuple(reports[name] for name in order if name in reports)


def _not_worth_their_tables(decodes: Sequence[Decode], stored: Sequence[int]) -> set[int]:
    """The indices of all decodes with tables, if these take as much as the decodes save (in files of a few kB); else none.

    stored: bytes of the weights of each decode.
    """
    with_tables = {k for k, decode in enumerate(decodes) if decode.shared_nodes}
    tables = {name: size for k in with_tables for name, size in decodes[k].shared_sizes().items()}
    saved = sum(stored[k] - decodes[k].bytes for k in with_tables)
    return with_tables if saved <= sum(tables.values()) else set()


def _not_smaller(group: tuple[Coded, ...], decode: Decode, stored: int) -> str:
    together = f", with {len(group) - 1} others" if len(group) > 1 else ""
    return f"would not get smaller ({stored} bytes, but {decode.bytes} with its decode{together})"


def _skipped(result: Result, reason: str) -> SkippedWeight:
    weight = result.planned.weight
    return SkippedWeight(weight.name, weight.op, weight.shape, reason, weight.stored_bytes)
