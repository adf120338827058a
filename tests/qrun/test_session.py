"""If these fail, a graph gives other logits by another way through the same tokens."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest

from qrun.backends import kvcache, ledger
from qrun.backends.opening import open_session
from qrun.backends.ort import cache as ort_cache
from qrun.backends.ort.session import OrtSession
from qrun.errors import QrunError
from qrun.machine import usable_cores
from tests.tiny import write_tiny_tokenizer

TOKENS = np.random.default_rng(0).integers(0, 256, 40, dtype=np.int64)
# float32 sums in another order; the logits of this model are around 10.
TOLERANCE = 2e-4


@pytest.fixture(scope="module", params=["float32", "int8"])
def session(exporter, request) -> OrtSession:
    """With either type of KV cache."""
    folder = exporter(max_position_embeddings=1024, int8_kv_cache=request.param == "int8")
    opened = open_session(folder, threads=2)
    assert opened.manifest.kv.dtype == request.param
    assert isinstance(opened, OrtSession)
    return opened


def row(token_ids) -> np.ndarray:
    return np.asarray(token_ids, dtype=np.int64)[None]


def keys_and_values(cache) -> list[np.ndarray]:
    buffers = cache._buffers if hasattr(cache, "_buffers") else cache._past
    return [buffer.numpy()[:, :, : cache.length].copy() for buffer in buffers]


@pytest.fixture(scope="module")
def whole(session) -> np.ndarray:
    """Logits [40, vocab] of all positions, the tokens given at once."""
    return session.forward(row(TOKENS), session.new_cache(), "all")[0].copy()


def test_the_logits_depend_on_the_tokens_before(session, whole):
    """Otherwise none of the comparisons below would show anything."""
    other = TOKENS.copy()
    other[0] += 1
    logits = session.forward(row(other), session.new_cache(), "last")[0, 0]
    assert np.abs(logits - whole[-1]).max() > 100 * TOLERANCE


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "growing"])
@pytest.mark.parametrize("sizes", [[40], [16, 16, 8], [1] * 40, [39, 1], [1, 39]], ids=str)
def test_whole_in_chunks_and_token_by_token_are_alike(session, whole, sizes, in_place):
    cache = session.new_cache(in_place=in_place)
    start = 0
    for size in sizes:
        logits = session.forward(row(TOKENS[start : start + size]), cache, "all")
        np.testing.assert_allclose(logits[0], whole[start : start + size], atol=TOLERANCE)
        start += size
    assert cache.length == 40


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "growing"])
def test_last_none_and_all_give_the_positions_they_name(session, whole, in_place):
    cache = session.new_cache(in_place=in_place)
    vocab = session.manifest.model.vocab_size
    assert session.forward(row(TOKENS[:10]), cache, "none").shape == (1, 0, vocab)
    last = session.forward(row(TOKENS[10:20]), cache, "last")
    assert last.shape == (1, 1, vocab)
    np.testing.assert_allclose(last[0, 0], whole[19], atol=TOLERANCE)
    assert session.forward(row(TOKENS[20:]), cache, "all").shape == (1, 20, vocab)


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "growing"])
def test_a_trimmed_cache_goes_on_as_if_the_rest_had_never_been(session, whole, in_place):
    cache = session.new_cache(in_place=in_place)
    session.forward(row(TOKENS[:25]), cache, "none")
    session.forward(row([1, 2, 3, 4, 5, 6, 7]), cache, "none")
    cache.trim(20)
    logits = session.forward(row(TOKENS[20:]), cache, "all")
    np.testing.assert_allclose(logits[0], whole[20:], atol=TOLERANCE)


def test_a_cache_trimmed_to_nothing_is_a_new_one(session, whole):
    cache = session.new_cache()
    session.forward(row([9] * 30), cache, "none")
    cache.trim(0)
    np.testing.assert_allclose(session.forward(row(TOKENS), cache, "all")[0], whole, atol=TOLERANCE)


def test_growing_beyond_the_capacity_moves_the_entries_and_computes_none_anew(session):
    cache = session.new_cache()
    many = np.random.default_rng(1).integers(0, 256, 300, dtype=np.int64)
    session.forward(row(many[:250]), cache, "none")
    before, capacity = keys_and_values(cache), cache.capacity
    assert capacity == kvcache.MINIMUM_CAPACITY
    logits = session.forward(row(many[250:]), cache, "last").copy()
    assert cache.capacity > capacity
    for old, new in zip(before, keys_and_values(cache)):
        np.testing.assert_array_equal(new[:, :, :250], old)
    reference = session.forward(row(many), session.new_cache(), "last")
    np.testing.assert_allclose(logits, reference, atol=TOLERANCE)


def test_two_sequences_of_different_lengths_are_each_as_if_alone(session):
    """Row 0 has 12 tokens, row 1 has 5: it is padded to 12 and its length set back."""
    first, second = TOKENS[:12], TOKENS[20:25]
    cache = session.new_cache(batch=2)
    padded = np.concatenate([second, np.zeros(7, dtype=np.int64)])
    session.forward(np.stack([first, padded]), cache, "none")
    cache.lengths[:] = (12, 5)
    for step in range(6):
        tokens = np.array([[TOKENS[12 + step]], [TOKENS[25 + step]]])
        logits = session.forward(tokens, cache, "last").copy()
    for index, sequence in enumerate((TOKENS[:18], TOKENS[20:31])):
        alone = session.forward(row(sequence), session.new_cache(), "last")[0]
        np.testing.assert_allclose(logits[index], alone, atol=TOLERANCE)
    assert cache.lengths.tolist() == [18, 11]


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "growing"])
def test_two_sequences_of_one_length_are_each_as_if_alone(session, whole, in_place):
    cache = session.new_cache(batch=2, in_place=in_place)
    both = np.stack([TOKENS, TOKENS[::-1]])
    reversed_alone = session.forward(row(TOKENS[::-1]), session.new_cache(), "all")[0].copy()
    logits = session.forward(both[:, :30], cache, "all").copy()
    for position in range(30, 40):
        step = session.forward(both[:, position : position + 1], cache, "last")
        logits = np.concatenate([logits, step], axis=1)
    np.testing.assert_allclose(logits[0], whole, atol=TOLERANCE)
    np.testing.assert_allclose(logits[1], reversed_alone, atol=TOLERANCE)


@pytest.mark.parametrize("logits", ["last", "all", "none"])
def test_more_prompt_for_several_sequences_is_read_row_by_row(session, logits):
    """The kernel takes several tokens for one row only: it was refused, and pieces of a batch with it."""
    cache = session.new_cache(batch=2)
    rows = np.stack([TOKENS, TOKENS[::-1]])
    session.forward(rows[:, :14], cache, "none")
    found = session.forward(rows[:, 14:], cache, logits)
    assert found.shape == (2, {"last": 1, "all": 26, "none": 0}[logits], 320)
    assert cache.lengths.tolist() == [40, 40]
    for index, tokens in enumerate(rows):
        alone = session.forward(row(tokens), session.new_cache(), "all")[0]
        np.testing.assert_allclose(found[index], alone[40 - found.shape[1] :], atol=TOLERANCE)


def test_more_prompt_for_several_sequences_in_a_growing_cache_is_refused(session):
    cache = session.new_cache(batch=2, in_place=False)
    session.forward(np.stack([TOKENS[:4], TOKENS[4:8]]), cache, "none")
    with pytest.raises(QrunError, match="2 sequences in a growing cache cannot each take 3 more tokens"):
        session.forward(np.stack([TOKENS[:3], TOKENS[3:6]]), cache, "none")
    assert cache.length == 4


def test_two_caches_of_one_session_do_not_disturb_each_other(session, whole):
    left, right = session.new_cache(), session.new_cache()
    session.forward(row(TOKENS[:30]), left, "none")
    session.forward(row([7] * 35), right, "none")
    np.testing.assert_allclose(session.forward(row(TOKENS[30:]), left, "all")[0], whole[30:], atol=TOLERANCE)


@pytest.mark.parametrize("token_id", [-1, 320, 10**9])
def test_a_token_id_outside_the_vocabulary_is_named_and_nothing_is_cached(session, token_id):
    cache = session.new_cache()
    with pytest.raises(QrunError, match=f"token id {token_id} is outside the vocabulary of 320"):
        session.forward(row([1, token_id, 2]), cache, "last")
    assert cache.length == 0


def test_no_tokens_at_all_are_refused(session):
    with pytest.raises(QrunError, match="no token ids"):
        session.forward(row([]), session.new_cache(), "last")


def test_the_context_length_is_the_end_of_the_cache(exporter):
    session = open_session(exporter(max_position_embeddings=64), threads=1)
    cache = session.new_cache()
    session.forward(row(np.arange(64)), cache, "none")
    with pytest.raises(QrunError, match="65 tokens do not fit: tiny has a context of 64"):
        session.forward(row([1]), cache, "last")
    assert cache.length == 64


def test_too_little_memory_for_the_cache_is_told_before_it_is_taken(session, monkeypatch):
    monkeypatch.setattr(ledger, "available_memory", lambda: 1000)
    with pytest.raises(QrunError, match=r"a KV cache of 10 tokens needs .* GB of memory are free"):
        session.forward(row(TOKENS[:10]), session.new_cache(), "last")


@pytest.mark.parametrize("taken", [0, 1, 4])
def test_a_cache_that_cannot_grow_is_what_it_was(session, whole, monkeypatch, taken):
    """Memory ends after some of the new buffers: the old ones stay, all of them, and go on being used."""
    cache = session.new_cache()
    session.forward(row(TOKENS[:20]), cache, "none")
    real, made = ort_cache.Buffer, []

    def scarce(*arguments):
        if len(made) == taken:
            raise MemoryError
        made.append(real(*arguments))
        return made[-1]

    monkeypatch.setattr(ort_cache, "Buffer", scarce)
    many = np.zeros((1, kvcache.MINIMUM_CAPACITY), dtype=np.int64)
    with pytest.raises(QrunError, match=r"a KV cache of .* tokens needs"):
        session.forward(many, cache, "none")
    assert cache.lengths.tolist() == [20]
    np.testing.assert_allclose(session.forward(row(TOKENS[20:]), cache, "all")[0], whole[20:], atol=TOLERANCE)
    monkeypatch.undo()
    cache.trim(20)
    session.forward(many, cache, "none")  # memory is there again
    cache.trim(20)
    np.testing.assert_allclose(session.forward(row(TOKENS[20:]), cache, "all")[0], whole[20:], atol=TOLERANCE)


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "growing"])
@pytest.mark.parametrize("batch", [1, 2])
def test_arrays_that_are_bound_live_until_others_are_bound_in_their_place(
    session, monkeypatch, in_place, batch
):
    """ONNX Runtime does not keep them: a mask that was freed summed up to 46,200 where 420 was right."""
    arrays: dict[int, weakref.ref] = {}
    bound: dict[str, weakref.ref] = {}
    real = session.values.value

    def remembered(array):
        value = real(array)
        arrays[id(value)] = weakref.ref(array if array.base is None else array.base)
        return value

    monkeypatch.setattr(session.values, "value", remembered)
    cache = session.new_cache(batch, in_place=in_place)

    class Watched:
        def __getattr__(self, name):
            return getattr(binding, name)

        def bind_ortvalue_input(self, name, value):
            if id(value) in arrays:
                bound[name] = arrays.pop(id(value))  # a value is bound as soon as it is made
            binding.bind_ortvalue_input(name, value)

        def bind_ortvalue_output(self, name, value):
            if id(value) in arrays:
                bound[name] = arrays.pop(id(value))  # a value is bound as soon as it is made
            binding.bind_ortvalue_output(name, value)

    binding = cache._binding
    monkeypatch.setattr(session._inference, "run_with_iobinding", lambda watched: checked(), raising=False)
    runs = []

    def checked():
        gc.collect()
        assert {"attention_mask", "input_ids", "logits"} <= bound.keys()
        dead = [name for name, array in bound.items() if array() is None]
        assert not dead, f"bound and gone: {dead}"
        runs.append(len(bound))
        type(session._inference).run_with_iobinding(session._inference, binding)

    cache._binding = Watched()
    for new in (5, 1, 1):
        session.forward(np.ones((batch, new), dtype=np.int64), cache, "last")
    assert len(runs) == 3


@pytest.mark.parametrize("batch", [1, 2])
def test_a_cache_of_another_session_is_refused(session, exporter, batch):
    """Both fit in shape: the check once looked at the class alone."""
    other = open_session(session.manifest.folder, threads=1)
    with pytest.raises(AssertionError, match="another session"):
        session.forward(np.zeros((batch, 1), dtype=np.int64), other.new_cache(batch))


def test_the_forecast_is_what_the_buffers_take(session):
    cache = session.new_cache()
    session.forward(row(TOKENS), cache, "none")
    assert {buffer.numpy().dtype.name for buffer in cache._buffers} == {session.manifest.kv.dtype}
    assert cache.nbytes == sum(buffer.numpy().nbytes for buffer in cache._buffers)


@pytest.mark.parametrize(("threads", "device"), [(1, "CPU, 1 thread"), (3, "CPU, 3 threads")])
def test_the_session_says_where_it_runs_and_keeps_to_its_threads(tiny_export, threads, device):
    session = open_session(tiny_export, threads=threads)
    assert session.device == device
    assert session._inference.get_session_options().intra_op_num_threads == threads


def test_without_a_number_of_threads_all_usable_cores_work(tiny_export):
    options = open_session(tiny_export)._inference.get_session_options()
    assert options.intra_op_num_threads == usable_cores()


def test_bad_options_are_named(tiny_export):
    with pytest.raises(QrunError, match="threads is 0"):
        open_session(tiny_export, threads=0)
    with pytest.raises(QrunError, match='unknown device "tpu"'):
        open_session(tiny_export, device="tpu")


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_quantised_graphs_take_the_same_ways(exporter, precision):
    session = open_session(exporter(precision, max_position_embeddings=1024), threads=1)
    reference = session.forward(row(TOKENS), session.new_cache(), "last")[0, 0].copy()
    cache = session.new_cache()
    for token in TOKENS:
        logits = session.forward(row([token]), cache, "last")[0, 0]
    # Activations are quantised per row and block, so only the order of sums differs here too.
    np.testing.assert_allclose(logits, reference, atol=0.05 * np.abs(reference).max())
    assert logits.argmax() == reference.argmax()


def test_the_tokenizer_is_not_needed_to_run_token_ids(broken):
    write_tiny_tokenizer(broken)  # the same bytes: sizes are still those of the manifest
    assert open_session(broken).manifest.name == "tiny"
