"""A chat with a fake model, run by test_console in a terminal: chatting.py FOLDER ANSWER..."""

from __future__ import annotations

import sys
from pathlib import Path

from qrun.cli.console import ChatConsole
from tests.fakes import IM_START, fake_manifest, fake_model, scripted, tiny_tokenizer


def main() -> None:
    folder, *answers = sys.argv[1:]
    tokenizer = tiny_tokenizer(Path(folder))
    header = tokenizer.encode("<|im_start|>assistant\n")
    la = tokenizer.encode("la ")

    def rule(seen: list[int]) -> int:
        starts = [i for i in range(len(seen)) if seen[i : i + len(header)] == header]
        start = starts[-1] + len(header)
        if answers[len(starts) - 1] == "endless":
            return la[(len(seen) - start) % 3]
        if answers[len(starts) - 1] == "silent":  # tokens that have no text, without an end
            return IM_START
        # What an interrupted answer came to is not known beforehand, so only the last one is checked.
        return scripted(tokenizer, [answers[len(starts) - 1]])(seen[starts[-1] :])

    model = fake_model(tokenizer, rule, manifest=fake_manifest(context_length=100_000))
    ChatConsole(model.chat()).run()


main()
