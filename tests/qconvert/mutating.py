"""Seeded damage to files of checkpoints and exports: other types, out of range, absent, torn bytes."""

from __future__ import annotations

import copy
import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 7, 255, 257, 1.5, -0.0, 1e-30, 1e30, 2**31, 2**63, 10**30, -(10**30)),
    *(
        float("inf"),
        float("nan"),
        "",
        " ",
        "x",
        "12",
        "<|im_end|>",
        "\ud800",
        "\0",
        "ÿ" * 300,
        "{{ x }",
        "../x",
    ),
    *([], [[]], [None], [1, "a"], {}, {"a": 1}, {"": {}}, {"content": 5}, [{"name": 1}]),
)


def mutate_json(value: Any, random_: random.Random) -> Any:
    """A copy with one to three changes somewhere in it."""
    changed = copy.deepcopy(value)
    for _ in range(random_.randint(1, 3)):
        changed = _change(changed, random_)
    return changed


def _change(value: Any, random_: random.Random) -> Any:
    places = _places(value)
    if not places or random_.random() < 0.03:
        return random_.choice(ODD)
    holder, key = random_.choice(places)
    kind = random_.random()
    if kind < 0.15:
        del holder[key]
    elif kind < 0.25:
        holder[key] = [holder[key]]
    elif kind < 0.32:
        holder[key] = {"value": holder[key]}
    elif kind < 0.42:
        holder[key] = str(holder[key])
    elif kind < 0.5 and isinstance(holder[key], int | float):
        holder[key] = holder[key] * random_.choice([-1, 0, 2, 3, 1000, 10**6])
    elif kind < 0.55 and isinstance(holder, dict):
        holder[str(random_.choice(ODD))[:20]] = holder.pop(key)
    elif kind < 0.6:
        holder[key] = copy.deepcopy(random_.choice(places)[0])
    else:
        holder[key] = random_.choice(ODD)
    return value


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Where something stands. Of long lists and maps only some: a vocabulary would outnumber all else."""
    found: list[tuple[Any, Any]] = []
    keys = (
        list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    )
    for key in keys[:40]:
        found.append((value, key))
        found += _places(value[key])
    return found


def mutate_bytes(content: bytes, random_: random.Random) -> bytes:
    """Cut off, torn, overwritten, or in another encoding."""
    kind, place = random_.randrange(6), random_.randrange(max(1, len(content)))
    if kind == 0:
        return content[:place]
    if kind == 1:
        return content[:place] + bytes([random_.randrange(256)]) + content[place + 1 :]
    if kind == 2:
        return content[:place] + content[place + random_.randrange(1, 60) :]
    if kind == 3:
        return content.decode("latin-1").encode("utf-16")
    if kind == 4:
        return b"\xef\xbb\xbf" + content
    return content[:place] + b"[" * 5000 + content[place:]


def mutate_file(path: Path, random_: random.Random) -> None:
    """Damage one file: JSON mostly as JSON, a safetensors file in its header, others as bytes."""
    content = path.read_bytes()
    path.unlink()  # it may be a link to what other tests read
    if path.suffix == ".safetensors":
        path.write_bytes(_mutate_header(content, random_))
    elif path.suffix == ".json" and random_.random() < 0.85:
        path.write_text(json.dumps(mutate_json(json.loads(content), random_)), encoding="utf-8")
    else:
        path.write_bytes(mutate_bytes(content, random_))


def _mutate_header(content: bytes, random_: random.Random) -> bytes:
    (length,) = struct.unpack("<Q", content[:8])
    header, data = content[8 : 8 + length], content[8 + length :]
    if random_.random() < 0.8:
        header = json.dumps(mutate_json(json.loads(header), random_)).encode()
    else:
        header = mutate_bytes(header, random_)
    stated = random_.choice([len(header)] * 9 + [length, 0, 1, 2**40, 2**63, len(header) + 1])
    return struct.pack("<Q", stated) + header + (data if random_.random() < 0.9 else data[: len(data) // 2])


def mutated_copy(template: Path, into: Path, names: list[str], seed: int) -> tuple[Path, str]:
    """A copy of a folder in which one file is damaged, and its name. The others are links."""
    random_ = random.Random(seed)
    if into.exists():
        shutil.rmtree(into)
    for path in template.rglob("*"):
        target = into / path.relative_to(template)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            target.symlink_to(path)
    name = random_.choice(names)
    mutate_file(into / name, random_)
    return into, name


def tried(count: int, attempt: Callable[[int], str | None]) -> tuple[int, dict[int, str]]:
    """How many attempts ended as they should, and what went wrong in the others, by their seed."""
    wrong = {seed: what for seed in range(count) if (what := attempt(seed)) is not None}
    return count - len(wrong), wrong
