"""If one of these fails, a command deletes or replaces something that its user made."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from qconvert.errors import QconvertError
from qconvert.folder import artifact
from qconvert.folder.artifact import ModelFolder, new_model_folder
from qconvert.proof.report import Failure
from qconvert.proof.verify import PROOFS, Proof
from qrun.folder.manifest import MANIFEST_NAME
from tests.qconvert.building import refused, run

NEAR_NAMES = (
    *(
        ".model.tmp-abcdefgh",
        ".model.tmp-0123456789abcdef",
        ".model.rounded-mine",
        ".model.tmp",
        ".model.old",
    ),
    *(".model.rounded-0123456789abcdef", "model.failed", "model.old", "model2", ".model.qconvert-lock.d"),
)


def tree(folder: Path) -> dict[str, str | None]:
    """Every path below a folder with its text, None for a folder."""
    return {
        str(path.relative_to(folder)): path.read_text() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def foreign_tree(folder: Path) -> dict[str, str | None]:
    """A user's folders beside the output ``model``, with names near those that an export makes for itself."""
    for name in NEAR_NAMES:
        (folder / name).mkdir(parents=True)
        (folder / name / "notes.txt").write_text(f"mine, in {name}")
    (folder / ".model.qconvert-lock").write_text("my own lock")
    return tree(folder)


def make(
    output: Path, content: str = "new", *, force: bool = False, meanwhile: Callable[[], object] | None = None
) -> None:
    with new_model_folder(output, force=force, needed_bytes=0) as folder:
        if meanwhile is not None:
            meanwhile()
        finish(folder, content)


def look(path: Path) -> object:
    return path.is_symlink(), tree(path) if path.is_dir() else path.is_file() and path.read_text()


def finish(folder: ModelFolder, content: str = "new") -> Path:
    (folder.path / "weights").write_text(content)
    folder.write_manifest({})
    return folder.publish()


def appearing(output: Path) -> dict[str, Callable[[], object]]:
    return {
        "a folder with files": lambda: (output.mkdir(), (output / "thesis.txt").write_text("mine")),
        "an empty folder": output.mkdir,
        "a file": lambda: output.write_text("mine"),
        "a link that leads nowhere": lambda: output.symlink_to("nowhere"),
        "an export of another hand": lambda: (
            output.mkdir(),
            (output / MANIFEST_NAME).write_text('{"format": "qconvert-model", "files": []}'),
        ),
    }


@pytest.mark.parametrize("kind", list(appearing(Path())))
@pytest.mark.parametrize("renameat2", [True, False])
def test_what_appears_under_the_outputs_name_meanwhile_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, renameat2: bool
) -> None:
    # It was replaced without a word, and its files were gone.
    if not renameat2:
        monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: object())
    output = tmp_path / "model"
    before = []

    def appear() -> None:
        appearing(output)[kind]()
        before.append(look(output))

    with pytest.raises(QconvertError, match=r"model appeared while this was running, and is left as it is"):
        make(output, meanwhile=appear)
    assert [look(output)] == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_export_whose_output_appears_meanwhile_is_refused(
    tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import qconvert.export

    write = qconvert.export.write_companions

    def meanwhile(*args: object, **options: object) -> None:
        write(*args, **options)
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "thesis.txt").write_text("mine")

    monkeypatch.setattr("qconvert.export.write_companions", meanwhile)
    result = run("export", tied, "--precision", "fp32", "--output", tmp_path / "model", "--no-verify")
    refused(result, "appeared while this was running")
    assert tree(tmp_path / "model") == {"thesis.txt": "mine"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "tied"]


@pytest.mark.parametrize("place", ["notes.txt", "runs/notes.txt", "runs/"])
def test_force_names_a_users_file_in_an_older_export_and_deletes_nothing(tmp_path: Path, place: str) -> None:
    output = tmp_path / "model"
    make(output, "old")
    (output / place).parent.mkdir(exist_ok=True)
    (output / place).mkdir() if place.endswith("/") else (output / place).write_text("mine")
    before = tree(output)
    with pytest.raises(
        QconvertError, match=rf"holds {place.split('/', maxsplit=1)[0]}.*did not make.*would delete it"
    ):
        make(output, force=True)
    assert tree(output) == before


def test_force_looks_again_at_the_moment_of_publishing(tmp_path: Path) -> None:
    output = tmp_path / "model"
    make(output, "old")
    with pytest.raises(QconvertError, match=r"holds notes\.txt, which qconvert did not make"):
        make(output, force=True, meanwhile=lambda: (output / "notes.txt").write_text("mine"))
    assert tree(output)["notes.txt"] == "mine"
    assert tree(output)["weights"] == "old"


def test_a_file_that_appears_between_the_last_look_and_the_swap_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "model"
    make(output, "old")
    swap = artifact.exchange

    def late(first: Path, second: Path) -> None:
        if not (second / "notes.txt").exists() and (second / "weights").read_text() == "old":
            (second / "notes.txt").write_text("mine")
        swap(first, second)

    monkeypatch.setattr(artifact, "exchange", late)
    with pytest.raises(QconvertError, match=r"notes\.txt"):
        make(output, force=True)
    assert tree(output)["notes.txt"] == "mine"
    assert tree(output)["weights"] == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("content", ["{}", "not JSON", '{"format": "mine"}', "[1]"])
def test_a_users_own_file_called_like_the_manifest_makes_no_folder_ours(tmp_path: Path, content: str) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / MANIFEST_NAME).write_text(content)
    (tmp_path / "model" / "dear.jpg").write_text("x")
    with pytest.raises(QconvertError, match="did not make"):
        make(tmp_path / "model", force=True)
    assert tree(tmp_path / "model")["dear.jpg"] == "x"


def test_a_manifest_that_names_files_elsewhere_deletes_none_of_them(tmp_path: Path) -> None:
    (tmp_path / "dear.jpg").write_text("x")
    (tmp_path / "model").mkdir()
    listed = f'[{{"path": "../dear.jpg"}}, {{"path": "{tmp_path}/dear.jpg"}}]'
    (tmp_path / "model" / MANIFEST_NAME).write_text(f'{{"format": "qconvert-model", "files": {listed}}}')
    make(tmp_path / "model", force=True)
    assert (tmp_path / "dear.jpg").read_text() == "x"


def test_two_exports_to_one_output_at_once(tmp_path: Path) -> None:
    # Both ended well, and the first one's folder was gone.
    with new_model_folder(tmp_path / "model", force=False, needed_bytes=0) as first:
        with pytest.raises(QconvertError, match=r"another export is writing to .*model"):
            make(tmp_path / "model", "second")
        finish(first, "first")
    assert (tmp_path / "model" / "weights").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_two_exports_beside_each_other_do_not_wait(tmp_path: Path) -> None:
    with new_model_folder(tmp_path / "one", force=False, needed_bytes=0):
        make(tmp_path / "two")


def test_a_folder_of_the_users_called_like_a_failed_export_is_left_alone(
    tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # --keep-failed replaced it. Another name is taken, also for the second failure.
    (tmp_path / "model.failed").mkdir()
    (tmp_path / "model.failed" / "thesis.txt").write_text("mine")
    made_up = Proof("a test's", lambda _: True, lambda _: [Failure("short, whole", "made up by a test")])
    monkeypatch.setattr("qconvert.proof.verify.PROOFS", (*PROOFS, made_up))
    for name in ("model.failed-2", "model.failed-3"):
        result = run("export", tied, "--precision", "fp32", "--output", tmp_path / "model", "--keep-failed")
        refused(result, str(tmp_path / name))
        assert (tmp_path / name / MANIFEST_NAME).is_file()
    assert tree(tmp_path / "model.failed") == {"thesis.txt": "mine"}
    assert not (tmp_path / "model").exists()


def test_an_export_touches_nothing_beside_its_output(tied: Path, tmp_path: Path) -> None:
    around = tmp_path / "around"
    before = foreign_tree(around)
    for force in ((), ("--force",)):
        result = run(
            "export", tied, "--precision", "fp32", "--output", around / "model", "--no-verify", *force
        )
        assert result.exit_code == 0, result.output
        shutil.rmtree(around / "model") if force else None
    assert tree(around) == before


def test_stores_of_rounded_weights_are_known_by_more_than_their_name(tmp_path: Path) -> None:
    from qconvert.calibration.gptq.store import RoundedWeights
    from qconvert.recipes.precisions import recipe_for

    before = foreign_tree(tmp_path)
    store = RoundedWeights(tmp_path / "model", {}, recipe_for("int4", 64))
    store.folder.mkdir()
    (store.folder / "0.safetensors").write_text("a layer")
    store.remove()
    assert tree(tmp_path) == before
