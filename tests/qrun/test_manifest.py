"""If these fail, a folder that is broken, foreign or hostile is run, or refused without saying why."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest

import qrun
from qrun.errors import QrunError
from qrun.folder.external_data import external_locations
from qrun.folder.manifest import read_manifest


def edit(folder: Path, **changes) -> None:
    """Set dotted keys ("a__b" is a.b) of the manifest; None removes one."""
    path = folder / "qconvert.json"
    manifest = json.loads(path.read_text())
    for name, value in changes.items():
        *parents, last = name.split("__")
        where = manifest
        for parent in parents:
            where = where[parent]
        if value is None:
            del where[last]
        else:
            where[last] = value
    path.write_text(json.dumps(manifest))


def refusal(path: Path, **options) -> str:
    """The message with which ``qrun.open`` refuses; every other outcome fails the test."""
    with pytest.raises(QrunError) as caught:
        qrun.open(path, **options)
    assert caught.value.hint, f"it does not say what to do: {caught.value}"
    return str(caught.value)


def test_an_export_is_read_as_it_was_written(tiny_export):
    manifest = read_manifest(tiny_export)
    assert (manifest.name, manifest.precision, manifest.target) == ("tiny", "fp32", "onnxruntime")
    assert manifest.model.context_length == 1024
    assert manifest.eos_token_ids == (258, 256)
    assert manifest.verification == "not verified"
    # 3 layers, keys and values, 2 heads of 16 numbers of 4 bytes
    assert manifest.kv.bytes_per_token == 3 * 2 * 2 * 16 * 4
    manifest.check_files(hashes=True)


def test_a_missing_folder(tmp_path):
    message = refusal(tmp_path / "nowhere")
    assert f"no such model folder: {tmp_path / 'nowhere'}" in message
    assert "qconvert export" in message


def test_a_folder_that_is_not_ours(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"x")
    assert "is not a folder that qconvert made: it has no qconvert.json" in refusal(tmp_path)
    assert "is not a folder that qconvert made" in refusal(tmp_path / "model.onnx")


def test_a_checkpoint_is_to_be_converted_first(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert f"this looks like a checkpoint: convert it first with `qconvert export {tmp_path}`" in refusal(
        tmp_path
    )


def test_a_file_that_is_not_a_graph(tiny_export):
    assert "tokenizer.json is neither a model folder nor a .onnx file" in refusal(
        tiny_export / "tokenizer.json"
    )


def test_a_missing_file(broken):
    (broken / "model.onnx.data").unlink()
    assert "model.onnx.data is missing from the model folder" in refusal(broken)


def test_a_truncated_file(broken):
    path = broken / "model.onnx.data"
    size = path.stat().st_size
    os.truncate(path, size - 1)
    assert f"model.onnx.data is truncated: {size - 1:,} bytes, the manifest says {size:,}" in refusal(broken)


def test_a_file_that_has_grown(broken):
    with (broken / "model.onnx.data").open("ab") as file:
        file.write(b"x")
    assert "model.onnx.data is altered" in refusal(broken)


def test_an_altered_file_of_the_same_size_is_found_when_hashes_are_asked_for(broken):
    with (broken / "model.onnx.data").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    qrun.open(broken)
    assert "model.onnx.data is altered: its SHA-256 is not the manifest's" in refusal(
        broken, check_hashes=True
    )


def test_a_newer_format_asks_for_an_update(broken):
    edit(broken, format_version=2)
    assert "format version 2; this qrun reads up to 1" in refusal(broken)


def test_a_model_for_another_runtime(broken):
    edit(broken, target="openvino")
    assert 'a model for "openvino", which this qrun cannot run' in refusal(broken)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the manifest cannot be read"),
        ("{", "the manifest cannot be read"),
        ("[]", "the manifest is not ours"),
        ('{"format": "gguf"}', "the manifest is not ours"),
        ('{"format": "qconvert-model"}', '"format_version" is missing'),
        ('{"format": "qconvert-model", "format_version": "1"}', "is '1', not of type int"),
        ('{"format": "qconvert-model", "format_version": true}', "not of type int"),
    ],
)
def test_a_malformed_manifest(broken, content, message):
    (broken / "qconvert.json").write_text(content)
    assert message in refusal(broken)


def test_a_manifest_that_is_not_text(broken):
    (broken / "qconvert.json").write_bytes(b"\xff\xfe\x00")
    assert "the manifest cannot be read" in refusal(broken)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model__context_length": None}, '"model.context_length" is missing'),
        ({"model__context_length": 0}, '"model.context_length" is 0, not a positive number'),
        ({"model__head_size": "16"}, "\"model.head_size\" is '16', not of type int"),
        ({"kv_cache__dtype": "float7"}, "\"kv_cache.dtype\" is 'float7', not one of float32, float16"),
        ({"tokens__eos": ["<|im_end|>"]}, "\"tokens.eos\" is ['<|im_end|>'], not a list of token ids"),
        ({"tokens__eos": 5}, '"tokens.eos" is 5, not of type list'),
        ({"files": [1]}, '"path" is missing'),
        ({"files": [{"path": "a", "size": 1}]}, '"sha256" is missing'),
        ({"verification": "passed"}, '"verification.status" is missing'),
    ],
    ids=str,
)
def test_a_manifest_with_a_bad_value_names_the_key(broken, change, message):
    edit(broken, **change)
    assert message in refusal(broken)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret", "..\\secret", ""])
@pytest.mark.parametrize("key", ["graph__file", "files"])
def test_a_manifest_that_names_a_path_outside_its_folder(broken, name, key):
    edit(broken, **{key: name if key == "graph__file" else [{"path": name, "size": 1, "sha256": "0"}]})
    assert f"the manifest names a path outside the model folder: {name!r}" in refusal(broken)


# What a hostile graph may name: ONNX Runtime before 1.24 opens the first three.


def forget_size(folder: Path) -> None:
    """Let the manifest agree with whatever model.onnx is now."""
    path = folder / "qconvert.json"
    manifest = json.loads(path.read_text())
    for entry in manifest["files"]:
        if entry["path"] == "model.onnx":
            entry["size"] = (folder / "model.onnx").stat().st_size
    path.write_text(json.dumps(manifest))


def point_weights_at(folder: Path, location: str) -> None:
    """Rewrite model.onnx so that its first external weight lies at ``location``."""
    import onnx

    graph = onnx.load(folder / "model.onnx", load_external_data=False)
    tensor = next(tensor for tensor in graph.graph.initializer if tensor.external_data)
    next(entry for entry in tensor.external_data if entry.key == "location").value = location
    (folder / "model.onnx").write_bytes(graph.SerializeToString())
    forget_size(folder)


@pytest.mark.parametrize(
    "location", ["../secret", "{outside}/secret", "link", "missing", "*/_ORT_MEM_ADDR_/*"]
)
def test_weights_outside_the_folder_are_never_read(broken, location):
    outside = broken.parent
    (outside / "secret").write_bytes((broken / "model.onnx.data").read_bytes())
    (broken / "link").symlink_to(outside / "secret")
    location = location.format(outside=outside)
    point_weights_at(broken, location)
    message = refusal(broken)
    assert f"the graph wants to read {location!r}, which is not one of the model folder's files" in message


def test_locations_are_found_wherever_a_graph_may_hide_them(tmp_path):
    import onnx
    from onnx import TensorProto, helper

    def external(location: str) -> TensorProto:
        tensor = TensorProto(name=location, data_type=1, dims=[1], data_location=TensorProto.EXTERNAL)
        for key, value in (("offset", "0"), ("location", location)):
            tensor.external_data.add(key=key, value=value)
        return tensor

    embedded = helper.make_tensor("embedded", 1, [1], b"\x6a\x02\x08\x01", raw=True)
    branch = helper.make_graph([], "branch", [], [], initializer=[external("in a subgraph")])
    nodes = [
        helper.make_node("Constant", [], ["a"], value=external("in an attribute")),
        helper.make_node("If", ["c"], ["b"], then_branch=branch, else_branch=branch),
    ]
    graph = helper.make_graph(nodes, "g", [], [], initializer=[external("in an initializer"), embedded])
    sparse = helper.make_sparse_tensor(external("in a sparse value"), external("in a sparse index"), [1])
    graph.sparse_initializer.append(sparse)
    model = helper.make_model(graph)
    function_node = helper.make_node("Constant", [], ["a"], value=external("in a function"))
    opset = helper.make_opsetid("", 20)
    model.functions.append(helper.make_function("d", "f", [], ["a"], [function_node], [opset]))
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    assert external_locations(path) == {
        "in an initializer",
        "in an attribute",
        "in a subgraph",
        "in a sparse value",
        "in a sparse index",
        "in a function",
    }
    assert onnx.load(path, load_external_data=False).graph.name == "g"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"this is not a graph at all",
        b"\x00" * 100,
        b"\xff" * 100,
        b"\x3a\xff\xff\xff\xff\x0f" + b"x" * 50,
        b"version https://git-lfs.github.com/spec/v1\n",
        struct.pack("<Q", 8) + b"{}",
    ],
    ids=["empty", "text", "zeros", "ones", "a field beyond the end", "a pointer", "safetensors"],
)
def test_a_garbage_graph(broken, content):
    (broken / "model.onnx").write_bytes(content)
    forget_size(broken)
    message = refusal(broken)
    assert "model.onnx is not an ONNX graph" in message or "cannot open the graph" in message


def test_a_graph_that_was_cut_off(broken):
    path = broken / "model.onnx"
    os.truncate(path, path.stat().st_size // 2)
    forget_size(broken)
    assert "model.onnx is not an ONNX graph" in refusal(broken)


def test_a_graph_that_is_well_formed_and_means_nothing(broken):
    (broken / "model.onnx").write_bytes(b"\x08\x0a\x3a\x00")  # an IR version and an empty graph
    forget_size(broken)
    assert "cannot open the graph" in refusal(broken)


@pytest.mark.parametrize(
    "change", [{"model__num_key_value_heads": 1}, {"model__num_hidden_layers": 9}], ids=str
)
def test_a_manifest_that_does_not_fit_its_graph(broken, change):
    edit(broken, **change)
    model = qrun.open(broken)
    with pytest.raises(QrunError, match="cannot run the graph"):
        list(model.generate("hi", max_tokens=2))
