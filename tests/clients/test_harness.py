"""lm-eval's local-completions client: log-likelihoods, and answers up to a stop string, on local tasks."""

from __future__ import annotations

import json

import pytest

from tests.tiny import write_tiny_tokenizer

lm_eval = pytest.importorskip("lm_eval", reason="needs lm-eval: run `make test-clients`")

# The model writes the letter "abcdefghij"[n % 10] at the n-th place, whatever stands before it.
LETTERS = "abcdefghij" * 30
CHOICES = """
task: choices
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: right
target_delimiter: ""
metric_list: [{metric: acc}]
"""
ANSWERS = """
task: answers
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: answer
target_delimiter: ""
generation_kwargs: {until: ["j"], max_gen_toks: 30}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in ("HF_HOME", "HF_DATASETS_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))
    write_tiny_tokenizer(tmp_path)
    rows = []
    for length in range(1, 40):
        right = length % 3
        choices = ["xyz", "abx", "zzz"]
        choices[right] = LETTERS[length : length + 3]
        question = ("What? " * 20)[:length]
        answer = LETTERS[length:].partition("j")[0]
        rows.append({"question": question, "choices": choices, "right": right, "answer": answer})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, text in {"choices": CHOICES, "answers": ANSWERS}.items():
        (tmp_path / f"{name}.yaml").write_text(text.replace("FILE", str(tmp_path / "rows.jsonl")))
    return tmp_path


@pytest.mark.parametrize("tokens", [True, False], ids=["token ids", "texts"])
@pytest.mark.parametrize(("batch", "concurrent"), [(1, 1), (8, 1), (1, 4)])
def test_every_question_is_judged_as_the_model_deserves(address, folder, batch, concurrent, tokens):
    from lm_eval.tasks import TaskManager

    arguments = {
        "model": "m",
        "base_url": f"{address}/v1/completions",
        "tokenizer": str(folder),
        "tokenizer_backend": "huggingface",
        "tokenized_requests": tokens,
        "num_concurrent": concurrent,
        "max_retries": 1,
    }
    found = lm_eval.simple_evaluate(
        model="local-completions",
        model_args=arguments,
        tasks=["choices", "answers"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        batch_size=batch,
        bootstrap_iters=0,
    )
    assert found["results"]["choices"]["acc,none"] == 1.0
    assert found["results"]["answers"]["exact_match,none"] == 1.0
    # Greedy tokens have a probability of almost 1 here, and the client compares exact numbers to see them.
    first = found["samples"]["choices"][0]
    likelihood, greedy = first["resps"][first["doc"]["right"]][0]
    assert float(likelihood) == pytest.approx(0, abs=0.1)
    assert greedy in (True, "True")
