"""How commands of the pages are run here: what stands for what, what is not run and why."""

from __future__ import annotations

import re

# Words of the pages, and what is at hand in the folder where the commands run (see ``bench.Bench``).
# `checkpoint` and `Qwen2.5-1.5B-Instruct` are folders there: no word has to change for them.
STANDS_FOR = {
    "CHECKPOINT": "./checkpoint",
    "SOURCE": "./checkpoint",
    "TEXT": "Hello",
    "FOLDER/model.plan": "./for-gpu/model.plan",
    "FOLDER": "./small",
    "model.plan": "./for-gpu/model.plan",
}
# The small model has a context of 96 tokens, so lengths become smaller;
# the sample takes them as they are.
SMALLER = {
    "-p 128,512 -n 64": "-p 8,32 -n 4",
    "-p 256 -n 64": "-p 16 -n 4",
    "--max-length 4096": "--max-length 96",
}

# What a command needs that another one makes. Each maker is itself a command of a page.
MADE_BY = {
    "small": "qconvert export ./checkpoint --precision int4 --output ./small",
    "whole": "qconvert export ./checkpoint --precision fp32 --output ./whole",
    "Qwen2.5-1.5B-Instruct-onnx-int8": "qconvert export ./Qwen2.5-1.5B-Instruct",
    "Qwen2.5-1.5B-Instruct-tensorrt-bf16": (
        "qconvert export ./Qwen2.5-1.5B-Instruct --target tensorrt --precision bf16 --max-length 4096"
    ),
    "demo/sample-model-onnx-int8": (
        "qconvert export demo/sample-model --output demo/sample-model-onnx-int8 --force"
    ),
    "from-gguf": "qconvert export ./qwen2.5-1.5b-instruct-q8_0.gguf --output ./from-gguf",
    "for-gpu": "qconvert export ./checkpoint --engine --compute-capability 8.9 --output ./for-gpu",
}

# GGUF files of the pages, small ones here: that name, and into how many parts it is split.
GGUF_FILES = {"qwen2.5-1.5b-instruct-q8_0.gguf": 1, "model-00001-of-00003.gguf": 3}

# Where the pages' server listens; here it takes a free port.
SERVER = "http://127.0.0.1:8080"

# What is typed into a command that reads standard input.
TYPED = {"qrun chat": "Hello\n/exit\n"}

# Commands that take minutes: `make test-docs` runs them, on the sample, and all the others on it as well.
SLOW = (
    r"--recipe gptq",
    r"qconvert .*demo/sample-model",
    r"qrun .*demo/sample-model",
    r"--target tensorrt",
    r"tensorrt-bf16",
)

_GPU = "a plan, or a GPU provider, needs an NVIDIA GPU: tests/trt runs these commands on an emulated one"
_HUB = "downloads from a model hub: tests/qconvert/test_hub.py runs it with the hub's client replaced"
_NETWORK = (
    "changes the user's environment or fetches from the network; the extras it names are compared below"
)
_HOURS = "hours on an idle machine, gigabytes of disk; that program and options exist is tested below"
_CHECK_ALL = "a check of all of this repository; that the target exists is tested below"

# Patterns of commands that no test runs, each with its reason. One that matches nothing any more is an error.
NOT_RUN = {
    r"git clone .*": "there is no address to clone from on this page",
    r"git lfs install|git lfs pull|hf auth login": (
        "another program's command, for a repository or an account of the user's"
    ),
    r"pip (install|uninstall|config) .*": _NETWORK,
    r"make (test|lint|interop|demo)|make test-(slow|matrix|planted|mutations|docs)": _CHECK_ALL,
    r"make test-(schemas|kills|llama)": _CHECK_ALL,
    r"make (benchmark|compare|soak)": _HOURS,
    r"make test-gpu": _GPU,
    r".*GPTQ-Int4.*": "tests/qconvert/test_quantised.py runs these on tiny checkpoints",
    r"qconvert .* --adapter .*": "an adapter of the user's: tests/qconvert/test_adapters.py runs these",
    r"make (test-formats|formats-table)": "an environment of its own, with the libraries of tests/formats",
    r"qrun eval --engine sample-fp32 .*": "minutes on exports of the sample: its figures stand below it",
    r"qrun batch --ray|qrun batch .* --ray .*": "a cluster, and files on a store: tests/ray runs such jobs",
    r"qrun deploy .*": "it answers until Ctrl-C: tests/ray/test_deploy.py runs it",
    r"make test-ray": "an environment of its own, with Ray: it runs tests/ray",
    r"make test-clients": "an environment of its own, with five other projects: it runs tests/clients",
    r"python -m benchmarks\..*": _HOURS,
    r"python -m tests\.qconvert\.planted.*": (
        "prints the table of docs/planted.md: test_planted.py compares each cell with what this would print"
    ),
    r"python -m tests\.docs\.commands_page": (
        "writes docs/commands.md: test_commands_page.py compares that with what this would write"
    ),
    r"qrun chat --engine .*model\.plan": _GPU,
    r"qconvert verify .*model\.plan.*": _GPU,
    r".* --device tensorrt": _GPU,
    r"qconvert export (Qwen/.*|ORG/NAME)": _HUB,
    r"qrun generate --schema FILE": "an option named in a sentence: tests/qrun/test_cli.py runs it",
    r"qconvert sample .*": (
        "downloads 93 MB: tests/qconvert/test_sample.py runs it, and it made the checkpoint used here"
    ),
}


def why_not_run(command: str) -> str | None:
    """The reason for which no test runs a command, or None."""
    return next((reason for pattern, reason in NOT_RUN.items() if re.fullmatch(pattern, command)), None)


def is_slow(command: str) -> bool:
    return any(re.search(pattern, command) for pattern in SLOW)
