"""The cache of teacher outputs: what goes in comes out, for the model that it was written for."""

import pickle
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import pad_kernels as pk

pytest.importorskip("safetensors", reason="the cache needs pip install 'pad-kernels[cache]'")
pytest.importorskip("tqdm", reason="the cache needs pip install 'pad-kernels[cache]'")

from cache_toy import BATCH, INFO, ROWS, VOCAB, K, hidden, length, run, weight, write
from doc_pages import Page

from pad_kernels.cache import TeacherCache, TeacherCacheWriter, tokenizer_hash

pytestmark = pytest.mark.usefixtures("one_thread")
ADVANTAGE = replace(INFO, kind="advantage", reference="toy/reference")


def logprobs(example: int, seed: int = 1, **options) -> torch.Tensor:
    """Dense log-probabilities of one example in float64."""
    logits = hidden([example], torch.float64, options.pop("state", 0)) @ weight(seed).double().T
    if cap := options.get("softcap"):
        logits = torch.tanh(logits * options.get("logit_scale", 1.0) / cap) * cap
    return (logits / options.get("temperature", 1.0)).log_softmax(-1)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> TeacherCache:
    return write(tmp_path_factory.mktemp("cache") / "teacher")


def test_rows_are_the_teachers_likeliest_tokens(cache: TeacherCache) -> None:
    assert len(cache) == ROWS
    assert cache.lengths.tolist() == [length(e) for e in range(ROWS)]
    for row, (ids, values) in enumerate(cache):
        expected = logprobs(row).topk(K)
        assert ids.dtype == torch.int64 and values.dtype == torch.float32
        assert torch.equal(ids, expected.indices)
        torch.testing.assert_close(values.double(), expected.values, rtol=1e-5, atol=1e-6)


def test_rows_are_exactly_what_linear_topk_gave(cache: TeacherCache) -> None:
    for start in range(0, ROWS, BATCH):
        batch = range(start, min(start + BATCH, ROWS))
        top = pk.linear_topk(hidden(batch), weight(1), K)
        packed = cache.pack(batch)
        assert torch.equal(packed.ids, top.ids) and torch.equal(packed.values, top.logprobs)


def test_pack_takes_any_rows_in_any_order(cache: TeacherCache) -> None:
    rows = [5, 0, 52, 17, 17, -1, 30]
    for given in (rows, torch.tensor(rows), tuple(rows)):
        packed = cache.pack(given)
        assert packed.cu_seqlens.tolist()[-1] == len(packed.ids) == len(packed.values)
        for i, row in enumerate(rows):
            start, end = packed.cu_seqlens[i : i + 2].tolist()
            ids, values = cache[row]
            assert torch.equal(packed.ids[start:end], ids)
            assert torch.equal(packed.values[start:end], values)


def test_batches_are_all_rows_in_order(cache: TeacherCache) -> None:
    batches = list(cache.batches(10))
    assert [len(b.cu_seqlens) - 1 for b in batches] == [10] * 5 + [3]
    assert torch.equal(torch.cat([b.values for b in batches]), cache.pack(range(ROWS)).values)


def test_there_are_several_shards_and_a_row_without_tokens(cache: TeacherCache) -> None:
    shards = list(cache._path.glob("*.safetensors"))
    assert len(shards) > 4
    assert cache[0][0].shape == (0, K)


def test_what_is_returned_is_a_copy(cache: TeacherCache) -> None:
    ids, values = cache[1]
    kept = ids.clone(), values.clone()
    ids += 1
    values += 1
    assert torch.equal(cache[1][0], kept[0]) and torch.equal(cache[1][1], kept[1])


def test_travels_to_a_worker(cache: TeacherCache) -> None:
    cache.pack([3])
    other = pickle.loads(pickle.dumps(cache))
    assert torch.equal(other[3][1], cache[3][1])


@pytest.mark.parametrize("row", [ROWS, -ROWS - 1])
def test_rows_out_of_range(cache: TeacherCache, row: int) -> None:
    with pytest.raises(IndexError, match=f"{ROWS} rows"):
        cache[row]


def test_rows_that_are_no_rows(cache: TeacherCache) -> None:
    with pytest.raises(TypeError, match="row: expected an integer"):
        cache.pack([1.0])
    with pytest.raises(ValueError, match="rows: expected at least one"):
        cache.pack([])


def test_an_empty_dataset(tmp_path: Path) -> None:
    empty = write(tmp_path, dataset=[])
    assert len(empty) == 0 and len(empty.lengths) == 0 and list(empty.batches(2)) == []


OPTIONS = {"softcap": 5.0, "logit_scale": 0.5, "temperature": 2.0}


def test_head_options_and_padding(tmp_path: Path) -> None:
    padded = weight(1, rows=VOCAB + 5)
    padded[:VOCAB] = weight(1)
    bias = torch.cat([torch.zeros(VOCAB), torch.full((5,), 100.0)])

    def capped(batch):
        head = pk.Head(hidden(batch), padded, bias, vocab_size=VOCAB, **OPTIONS)
        return head, torch.tensor([length(e) for e in batch])

    cache = write(tmp_path, capped, replace(INFO, **OPTIONS))
    expected = logprobs(11, **OPTIONS).topk(K)
    assert torch.equal(cache[11][0], expected.indices)
    torch.testing.assert_close(cache[11][1].double(), expected.values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_a_student_learns_from_the_cache_as_from_the_teacher(
    cache: TeacherCache, tail: str
) -> None:
    rows = [0, 12, 5, 33]
    packed = torch.cat([hidden([row]) for row in rows])
    student = pk.Head(torch.randn(len(packed), 6), torch.randn(VOCAB, 6))
    live = pk.TopKTeacher(*pk.linear_topk(packed, weight(1), K), tail)
    loss, expected = (
        pk.linear_divergence(student, teacher, kind="forward_kl")
        for teacher in (cache.teacher(rows, tail=tail, device="cpu"), live)
    )
    assert expected > 0.1
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="kind: expected a cache of kind 'advantage'"):
        cache.advantage(rows)


def test_advantage(tmp_path: Path) -> None:
    info = replace(ADVANTAGE, temperature=2.0, reference_softcap=4.0)

    def both(batch):
        aligned = pk.Head(hidden(batch), weight(1), temperature=2.0)
        reference = pk.Head(hidden(batch, seed=7), weight(2), softcap=4.0)
        return aligned, reference, [length(e) for e in batch]

    cache = write(tmp_path, both, info)
    for row in (1, 30, 52):
        aligned = logprobs(row, temperature=2.0)
        ratio = aligned - logprobs(row, 2, softcap=4.0, state=7)
        ids = aligned.topk(K).indices
        assert torch.equal(cache[row][0], ids)
        torch.testing.assert_close(
            cache[row][1].double(), ratio.gather(-1, ids), rtol=1e-5, atol=1e-5
        )
    kept = cache.pack([30, 1])
    student = pk.Head(torch.randn(len(kept.ids), 6), torch.randn(VOCAB, 6))
    found = pk.linear_expected_advantage(student, cache.advantage([30, 1]), reduction="sum")
    probability = (student.hidden @ student.weight.T).softmax(-1).gather(-1, kept.ids)
    torch.testing.assert_close(found, (probability * kept.values).sum(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="kind: expected a cache of kind 'teacher'"):
        cache.teacher([1])


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_dtypes(tmp_path: Path, dtype: str) -> None:
    def double(batch):
        head = pk.Head(hidden(batch, torch.float64), weight(1).double())
        return head, [length(e) for e in batch]

    cache = write(tmp_path, double, replace(INFO, dtype=dtype))
    exact = torch.cat([logprobs(e).topk(K).values for e in range(ROWS)])
    got = cache.pack(range(ROWS)).values
    assert got.dtype == (torch.float64 if dtype == "float64" else torch.float32)
    error = {"float16": 2**-11, "float32": 2**-24, "float64": 0.0}[dtype]
    off = (got.double() - exact).abs()
    assert (off <= error * exact.abs() + 1e-14).all()
    assert (off > error / 8 * exact.abs()).any() or dtype == "float64"  # it was stored so


CHANGES = {
    "model": "toy/other",
    "tokenizer_hash": "1" * 64,
    "vocab_size": VOCAB + 1,
    "k": K + 1,
    "dataset": "another",
    "dtype": "float16",
    "softcap": 30.0,
    "logit_scale": 0.25,
    "temperature": 0.5,
}


@pytest.mark.parametrize("field", [*CHANGES, "kind"])
def test_a_mismatch_names_the_field_and_both_values(cache: TeacherCache, field: str) -> None:
    other = ADVANTAGE if field == "kind" else replace(INFO, **{field: CHANGES[field]})
    wanted, found = repr(getattr(other, field)), repr(getattr(INFO, field))
    message = re.escape(f"{field}: expected {wanted}, got {found} in the cache {cache._path}")
    with pytest.raises(ValueError, match=message):
        TeacherCache(cache._path, other)
    with pytest.raises(ValueError, match=message):
        TeacherCacheWriter(cache._path, other)


def test_a_cache_can_be_opened_to_look_at_it(cache: TeacherCache) -> None:
    assert TeacherCache(cache._path, None).info == INFO
    with pytest.raises(TypeError, match="info: expected a CacheInfo"):
        TeacherCache(cache._path, {"k": 4})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": ""}, "model: expected a string that is not empty"),
        ({"k": 0}, "k: expected an integer >= 1"),
        ({"k": VOCAB + 1}, "k: expected at most vocab_size"),
        ({"kind": "topk"}, "kind: expected one of"),
        ({"kind": "advantage"}, "reference: expected the reference model's name"),
        ({"reference": "r"}, "reference: expected ''"),
        ({"dtype": "bfloat16"}, "dtype: expected one of"),
        ({"temperature": 0.0}, "temperature: expected a number > 0"),
        ({"reference_softcap": 3.0}, "expected no head options without a reference"),
    ],
)
def test_info_that_makes_no_sense(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(INFO, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"softcap": 30.0}, "head.softcap: expected None as in info, got 30.0"),
        ({"temperature": 0.7}, "head.temperature: expected 1.0 as in info, got 0.7"),
        ({"vocab_size": VOCAB - 1}, "head.vocab_size: expected 37 as in info, got 36"),
    ],
)
def test_a_head_that_info_does_not_describe(tmp_path: Path, change: dict, message: str) -> None:
    def other(batch):
        head, lengths = run(batch)
        return replace(head, **change), lengths

    with pytest.raises(ValueError, match=message):
        write(tmp_path, other)


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (lambda head, lengths: head, ValueError, "run: expected a function that returns"),
        (lambda head, lengths: (head, head, lengths), ValueError, "run: expected a function"),
        (lambda head, lengths: (head.hidden, lengths), TypeError, "head: expected a pad_kernels"),
        (lambda head, lengths: (head, lengths[1:]), ValueError, "lengths: expected one for each"),
        (lambda head, lengths: (head, [1, 1, 1]), ValueError, "lengths: expected lengths >= 0"),
        (lambda head, lengths: (head, [-1, 1, 5]), ValueError, "lengths: expected lengths >= 0"),
        (lambda head, lengths: (head, [0.0, 1.0, 4.0]), TypeError, "lengths: expected dtype"),
        (
            lambda head, lengths: (replace(head, hidden=head.hidden[None]), lengths),
            ValueError,
            "head.hidden: expected 2 dimension",
        ),
    ],
)
def test_a_function_that_returns_something_else(tmp_path, returned, error, message) -> None:
    with pytest.raises(error, match=message):
        write(tmp_path, lambda batch: returned(*run(batch)))


GOOD_IDS = torch.tensor([[1, 0, 2, 3], [4, 5, 6, 36]])


@pytest.mark.parametrize(
    ("ids", "values", "error", "message"),
    [
        (GOOD_IDS[:, :3], -torch.ones(2, 4), ValueError, r"ids: expected shape \(2, 4\)"),
        (GOOD_IDS.float(), -torch.ones(2, 4), TypeError, "ids: expected dtype"),
        (GOOD_IDS + 1, -torch.ones(2, 4), ValueError, r"ids: expected ids in \[0, 37\)"),
        (GOOD_IDS - 1, -torch.ones(2, 4), ValueError, r"ids: expected ids in \[0, 37\)"),
        (GOOD_IDS // 2, -torch.ones(2, 4), ValueError, "ids: expected distinct"),
        (GOOD_IDS, -torch.ones(3, 4), ValueError, r"values: expected shape \(2, 4\)"),
        (GOOD_IDS, torch.full((2, 4), 0.5), ValueError, "values: expected log-probs <= 0, got 0.5"),
        (GOOD_IDS, torch.full((2, 4), torch.nan), ValueError, "values: expected log-probs <= 0"),
        (GOOD_IDS, torch.full((2, 4), -7e4), ValueError, "values: expected values in the range"),
    ],
)
def test_outputs_that_cannot_be(tmp_path, ids, values, error, message) -> None:
    with TeacherCacheWriter(tmp_path, replace(INFO, dtype="float16")) as writer:
        with pytest.raises(error, match=message):
            writer.append(ids, values, [2])
        assert writer.rows == 0
        writer.append(GOOD_IDS, -torch.ones(2, 4), [2])
        assert writer.rows == 1


def test_log_ratios_must_be_finite(tmp_path: Path) -> None:
    with TeacherCacheWriter(tmp_path, ADVANTAGE) as writer:
        writer.append(GOOD_IDS, torch.ones(2, 4), [2])
        with pytest.raises(ValueError, match="values: expected finite log-ratios, got inf"):
            writer.append(GOOD_IDS, torch.full((2, 4), torch.inf), [2])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_hidden_states(tmp_path: Path, dtype: str) -> None:
    """In the dtype they are stored in; with the teacher's weight they are the teacher."""
    info = replace(INFO, kind="hidden", k=hidden([1]).shape[1], dtype=dtype)
    cache = write(tmp_path, info=info)
    rows = [4, 2, 11]
    kept = cache.hidden(rows)
    assert torch.equal(kept, hidden(rows).to(getattr(torch, dtype)))
    assert cache.pack(rows).cu_seqlens.diff().tolist() == [length(row) for row in rows]
    student = pk.Head(torch.randn(len(kept), 6), torch.randn(VOCAB, 6))
    found = pk.linear_divergence(student, pk.Head(kept.float(), weight(1)))
    whole = pk.linear_divergence(student, pk.Head(hidden(rows), weight(1)))
    assert found.item() == pytest.approx(whole.item(), rel=1e-6 if dtype == "float32" else 2e-2)
    with pytest.raises(ValueError, match="kind: expected a cache of kind 'teacher'"):
        cache.teacher(rows)


def test_hidden_states_that_cannot_be(tmp_path: Path) -> None:
    with TeacherCacheWriter(tmp_path, replace(INFO, kind="hidden", k=3)) as writer:
        with pytest.raises(TypeError, match="ids: expected None with hidden states"):
            writer.append(torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 3), [1])
        with pytest.raises(ValueError, match="values: expected finite hidden states, got nan"):
            writer.append(None, torch.full((1, 3), torch.nan), [1])
        with pytest.raises(ValueError, match=r"values: expected shape \(1, 3\)"):
            writer.append(None, torch.zeros(1, 4), [1])
    with pytest.raises(TypeError, match=r"ids: expected a torch\.Tensor"):
        TeacherCacheWriter(tmp_path / "other", INFO).append(None, torch.zeros(1, K), [1])


def test_tokenizer_hash() -> None:
    class Tokenizer:
        def get_vocab(self) -> dict:
            return {"b": 1, "a": 0}

    same = tokenizer_hash({"a": 0, "b": 1})
    assert re.fullmatch("[0-9a-f]{64}", same)
    assert tokenizer_hash(Tokenizer()) == same == tokenizer_hash({b"a": 0, b"b": 1})
    others = [
        {"a": 1, "b": 0},
        {"a": 0},
        {"a": 0, "b": 2},
        {"a": 0, "b": 1, "c": 2},
        {"a": 0, "B": 1},
    ]
    # and some whose tokens and ids, written one after the other, look alike
    others += [{"\ud800": 0}, {"a11b": 0}, {"1a": 1}, {"a": 11}, {"1 a": 0}, {}]
    assert len({same, *map(tokenizer_hash, others)}) == 1 + len(others)
    assert tokenizer_hash('{"a": 0}') != tokenizer_hash('{"a": 1}')
    for wrong in (7, ["a"], {"a": "0"}, {3: 0}):
        with pytest.raises(TypeError):
            tokenizer_hash(wrong)


def test_tokenizer_hash_of_a_tokenizer() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"a": 0, "b": 1, "<unk>": 2}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    assert tokenizer_hash(tokenizer) == tokenizer_hash(vocabulary)
    tokenizer.add_tokens(["c"])
    assert tokenizer_hash(tokenizer) == tokenizer_hash({**vocabulary, "c": 3})


@pytest.mark.parametrize("missing", ["safetensors", "tqdm"])
def test_without_the_extra_only_the_cache_is_missing(missing: str) -> None:
    code = f"""
import sys
sys.modules["{missing}"] = None
import pad_kernels
try:
    import pad_kernels.cache
except ImportError as error:
    assert "needs {missing}: pip install 'pad-kernels[cache]'" in str(error), error
else:
    raise AssertionError("imported")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_core_does_not_import_the_cache() -> None:
    code = "import sys, pad_kernels; assert 'pad_kernels.cache' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_page_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Page("docs/cache.md").run()
    assert list(tmp_path.glob("*/manifest.json"))
