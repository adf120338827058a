"""If these fail, a folder from a hub's cache, or with its weights linked to another disk, does not open."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

import qrun
from qrun.errors import QrunError
from qrun.folder.external_data import external_locations, with_data_from_root, with_true_places
from tests.commands import qrun as command

PROMPT = "Once upon a time there was a link. " * 6


@pytest.fixture(scope="module")
def two_graphs(exporter) -> Path:
    """int4 with a graph for prompts and a cache of 8 bits: two graphs, the second over two data files."""
    return exporter("int4", prefill=True, int8_kv_cache=True, max_position_embeddings=1024)


def in_cache(folder: Path, root: Path, *, spread: bool) -> Path:
    """The folder as hubs keep it: links to blobs by hash; spread: each in its own folder."""
    snapshot = root / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    for index, path in enumerate(sorted(folder.iterdir())):
        blob = root / "blobs" / (f"{index:02x}" if spread else "") / f"hash{index}"
        blob.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, blob)
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


def data_elsewhere(folder: Path, root: Path) -> Path:
    """The folder with its data files moved to another place, under other names, and linked."""
    copy = Path(shutil.copytree(folder, root / "model"))
    disk = root / "disk über"
    disk.mkdir()
    for path in copy.glob("*.data"):
        path.rename(disk / f"moved {path.name}")
        path.symlink_to(disk / f"moved {path.name}")
    return copy


def answer(folder: Path, **options) -> tuple[int, ...]:
    model = qrun.open(folder, **options)
    *_, last = model.generate(PROMPT, max_tokens=8, do_sample=False)
    return last.token_ids


LAYOUTS = {
    "hub's cache": lambda folder, root: in_cache(folder, root, spread=False),
    "cache with folders": lambda folder, root: in_cache(folder, root, spread=True),
    "data on another disk": data_elsewhere,
    "linked folder": lambda folder, root: (root / "link").symlink_to(folder) or root / "link",
    "hard links": lambda folder, root: shutil.copytree(folder, root / "hard", copy_function=os.link),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("prompts_later", [True, "later", False])
def test_a_folder_answers_wherever_links_keep_its_files(layout, prompts_later, two_graphs, tmp_path):
    folder = LAYOUTS[layout](two_graphs, tmp_path)
    expected = answer(two_graphs, prefill_graph=prompts_later)
    assert answer(folder, prefill_graph=prompts_later, check_hashes=True) == expected


@pytest.mark.export
@pytest.mark.parametrize("layout", ["cache with folders", "data on another disk", "hard links"])
def test_a_linked_folder_is_verified_with_its_twins(layout, two_graphs, tmp_path):
    # onnx_ir refuses a data file that is a link to another folder, or has a second hard link.
    from qconvert.formats.layout import Arrays
    from qconvert.proof.twin import sharp_twin
    from qconvert.proof.twin_session import TwinSession
    from qrun.folder.manifest import read_manifest

    folder = LAYOUTS[layout](two_graphs, tmp_path)
    for name in ("model.onnx", "prefill.onnx"):
        assert sum(array.nbytes for array in all_arrays(Arrays(folder / name))) > 50_000
        TwinSession(sharp_twin(folder / name, half=False), folder, read_manifest(folder))


def all_arrays(arrays):
    return [arrays[name] for name in arrays._tensors]


@pytest.mark.export
def test_a_folder_for_tensorrt_with_linked_data_runs_on_the_cpu(tmp_path):
    from qconvert.export import ExportOptions, export
    from qconvert.progress import Progress
    from tests.tiny import make_tiny_checkpoint

    options = ExportOptions(target="tensorrt", precision="fp16", output=tmp_path / "trt", verify=False)
    export(str(make_tiny_checkpoint(tmp_path / "tiny")), options, Progress(quiet=True))
    assert answer(data_elsewhere(tmp_path / "trt", tmp_path)) == answer(tmp_path / "trt")


def test_links_are_told_by_info(two_graphs, tmp_path):
    folder = data_elsewhere(two_graphs, tmp_path)
    place = tmp_path / "disk über" / "moved model.onnx.data"
    assert f"model.onnx.data, a link to {place}" in command("info", folder).stdout
    files = json.loads(command("info", folder, "--json").stdout)["files"]
    assert {entry["path"]: entry["link_to"] for entry in files if entry["link_to"]} == {
        "model.onnx.data": str(place),
        "prefill.onnx.data": str(tmp_path / "disk über" / "moved prefill.onnx.data"),
    }


def test_a_link_whose_end_is_gone_or_no_file_is_named(two_graphs, tmp_path):
    folder = data_elsewhere(two_graphs, tmp_path)
    place = tmp_path / "disk über" / "moved model.onnx.data"
    place.unlink()
    with pytest.raises(
        QrunError, match=r"model\.onnx\.data is a link to .*moved model\.onnx\.data, and nothing"
    ):
        qrun.open(folder)
    place.mkdir()
    with pytest.raises(QrunError, match=r"model\.onnx\.data is not a regular file"):
        qrun.open(folder)


def test_the_graph_s_own_names_must_not_leave_the_folder_whatever_is_linked(two_graphs, tmp_path):
    import onnx

    folder = data_elsewhere(two_graphs, tmp_path)
    for name in ("model.onnx", "prefill.onnx"):
        graph = onnx.load(folder / name, load_external_data=False)
        before = graph.SerializeToString()
        for location in (
            "../disk über/moved model.onnx.data",
            str(tmp_path / "disk über" / "moved model.onnx.data"),
            "x/../config.json",
        ):
            tensor = next(tensor for tensor in graph.graph.initializer if tensor.external_data)
            next(entry for entry in tensor.external_data if entry.key == "location").value = location
            write_graph(folder, name, graph.SerializeToString())
            with pytest.raises(QrunError, match="which is not one of the model folder's files"):
                qrun.open(folder)
        write_graph(folder, name, before)
    assert answer(folder) == answer(two_graphs)


def write_graph(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / "qconvert.json").read_text())
    for entry in manifest["files"]:
        if entry["path"] == name:
            entry["size"] = len(content)
    (folder / "qconvert.json").write_text(json.dumps(manifest))


def test_only_names_change_in_a_graph_that_is_given_other_places(two_graphs, tmp_path):
    import onnx

    folder = data_elsewhere(two_graphs, tmp_path)
    for name in ("model.onnx", "prefill.onnx"):
        moved = with_true_places(folder / name)
        (tmp_path / name).write_bytes(moved)
        disk = tmp_path.relative_to("/") / "disk über"
        expected = {str(disk / f"moved {location}") for location in external_locations(folder / name)}
        assert external_locations(tmp_path / name) == expected
        graph, other = onnx.load_from_string(moved), onnx.load(folder / name, load_external_data=False)
        for model in (graph, other):
            for tensor in model.graph.initializer:
                for entry in tensor.external_data:
                    if entry.key == "location":
                        entry.value = ""
        assert graph == other
        assert with_true_places(two_graphs / name) is None


def test_a_long_place_takes_a_longer_length(tmp_path):
    # Lengths are numbers in base 128: a place of 300 letters lengthens everything around it.
    import onnx
    from onnx import TensorProto, helper

    tensor = TensorProto(name="w", data_type=1, dims=[1], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "d"), ("offset", "0"), ("length", "4")):
        tensor.external_data.add(key=key, value=value)
    model = helper.make_model(helper.make_graph([], "g", [], [], initializer=[tensor]))
    folder = tmp_path / ("f" * 150) / ("g" * 150)
    renamed = onnx.load_from_string(with_data_from_root(model.SerializeToString(), folder))
    entries = {entry.key: entry.value for entry in renamed.graph.initializer[0].external_data}
    assert entries == {"location": str(folder / "d").lstrip("/"), "offset": "0", "length": "4"}
