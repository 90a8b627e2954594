"""The cache after a kill, a crash, a change of mind; and the files it refuses."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

pytest.importorskip("safetensors", reason="the cache needs pip install 'pad-kernels[cache]'")
pytest.importorskip("tqdm", reason="the cache needs pip install 'pad-kernels[cache]'")

from cache_toy import BATCH, INFO, ROWS, run, write

from pad_kernels.cache import TeacherCache, TeacherCacheWriter

pytestmark = pytest.mark.usefixtures("one_thread")


def content(directory: Path) -> dict[str, bytes]:
    """Every file of a cache; the lock is no part of it."""
    return {p.name: p.read_bytes() for p in directory.iterdir() if p.name != "writer.lock"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "cache"
    write(path)
    return path


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """A cache to damage."""
    for name, data in content(whole).items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


class Interrupted(Exception):
    pass


def dying(calls: int, seen: list[int] | None = None):
    """A function that runs the head that many times and then raises."""
    left = calls

    def wrapped(batch):
        nonlocal left
        if left == 0:
            raise Interrupted
        left -= 1
        if seen is not None:
            seen.extend(batch)
        return run(batch)

    return wrapped


@pytest.mark.skipif(sys.platform != "linux", reason="forks, and reopens files through /proc")
def test_killed_at_any_moment(whole: Path, tmp_path: Path) -> None:
    """SIGKILL before every sync and rename, with half of the file, and at random times."""
    program = Path(__file__).with_name("cache_toy.py")
    done = subprocess.run(
        [sys.executable, str(program), str(tmp_path)], stdout=subprocess.PIPE, text=True, check=True
    )
    counts = json.loads(done.stdout)
    shards = len(content(whole)) - 1
    assert counts["calls"] == 6 * (shards + 1)  # two files a shard, the first and last manifest
    assert counts["kills"] > 2
    expected = content(whole)
    for path in (*(tmp_path / f"call-{i}" for i in range(counts["calls"])), tmp_path / "random"):
        assert content(path) == expected
        TeacherCache(path, INFO)


@pytest.mark.parametrize("dataset", [range(ROWS), "iterable"])
def test_resumes_at_the_first_missing_row(whole: Path, tmp_path: Path, dataset: object) -> None:
    seen: list[int] = []
    starts = []
    for _ in range(100):
        data = iter(range(ROWS)) if dataset == "iterable" else dataset
        with TeacherCacheWriter(tmp_path, INFO) as writer:
            starts.append(writer.rows)
        before = len(seen)
        try:
            write(tmp_path, dying(7, seen), dataset=data)
            break
        except Interrupted:
            assert seen[before] == starts[-1]
    assert len(starts) > 2 and starts == sorted(starts)
    assert set(seen) == set(range(ROWS))
    assert content(tmp_path) == content(whole)


def test_what_a_killed_writer_left_is_swept_away(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        write(tmp_path, dying(12))
    for left in ("shard-00099.safetensors", "shard-00098.safetensors.tmp", "manifest.json.tmp"):
        (tmp_path / left).write_bytes(b"half")
    write(tmp_path)
    assert content(tmp_path) == content(whole)


def test_a_finished_cache_is_not_run_again(copy: Path, whole: Path) -> None:
    assert len(write(copy, dying(0))) == ROWS
    assert content(copy) == content(whole)
    with TeacherCacheWriter(copy, INFO) as writer:
        assert writer.complete and writer.rows == ROWS
        with pytest.raises(ValueError, match="is finished, with 53 rows"):
            writer.append(torch.zeros(0, 4, dtype=torch.int64), torch.zeros(0, 4), [0])


def test_another_dataset_is_refused(copy: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    for rows in (ROWS - 1, ROWS + 1):
        with pytest.raises(
            ValueError, match=f"dataset: expected 53 rows as in .*, got {rows} rows"
        ):
            write(copy, dataset=range(rows))
    unfinished = tmp_path_factory.mktemp("unfinished")
    with pytest.raises(Interrupted):
        write(unfinished, dying(10))
    for data in ([1, 2], iter([1, 2])):
        with pytest.raises(ValueError, match="dataset: expected"):
            write(unfinished, dataset=data)


def test_a_dataset_that_is_shorter_than_it_says(tmp_path: Path) -> None:
    class Short:
        def __len__(self) -> int:
            return 10

        def __iter__(self):
            return iter(range(8))

    with pytest.raises(ValueError, match="dataset: expected as many rows as its length 10, got 8"):
        write(tmp_path, dataset=Short())
    with pytest.raises(ValueError, match="unfinished"):
        TeacherCache(tmp_path, INFO)


def test_an_unfinished_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        write(tmp_path, dying(12))
    with pytest.raises(ValueError, match=r"unfinished: \d+ rows so far"):
        TeacherCache(tmp_path, INFO)


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    pytest.importorskip("fcntl", reason="no file locks on this system")
    with (
        TeacherCacheWriter(tmp_path, INFO),
        pytest.raises(RuntimeError, match="another writer is at work"),
    ):
        TeacherCacheWriter(tmp_path, INFO)
    TeacherCacheWriter(tmp_path, INFO).close()


def test_a_closed_writer_writes_nothing(tmp_path: Path) -> None:
    with TeacherCacheWriter(tmp_path, INFO) as writer:
        writer.append(torch.arange(4)[None], -torch.ones(1, 4), [1])
    for late in (
        lambda: writer.append(torch.arange(4)[None], -torch.ones(1, 4), [1]),
        writer.finish,
    ):
        with pytest.raises(ValueError, match="has a closed writer"):
            late()
    with TeacherCacheWriter(tmp_path, INFO) as writer:
        assert writer.rows == 0


def test_a_directory_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="path: expected a new or empty directory, or a cache"):
        write(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("keep", [0, 1, 100, -1])
def test_truncated(copy: Path, keep: int, verify: bool) -> None:
    shard = copy / "shard-00001.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[:keep])
    message = f"shard-00001.safetensors is damaged: {len(data[:keep])} bytes, expected {len(data)}"
    with pytest.raises(ValueError, match=message):
        TeacherCache(copy, INFO, verify=verify)
    with pytest.raises(ValueError, match=message):
        TeacherCacheWriter(copy, INFO)


@pytest.mark.parametrize("place", range(8))
def test_one_flipped_bit(copy: Path, place: int) -> None:
    """Anywhere: in the length of the header, the header, each of the three columns."""
    shard = copy / "shard-00002.safetensors"
    data = bytearray(shard.read_bytes())
    data[place * (len(data) - 1) // 7] ^= 1 << place
    shard.write_bytes(data)
    with pytest.raises(ValueError, match=r"shard-00002.safetensors is damaged: its SHA-256 is"):
        TeacherCache(copy, INFO)
    lazy = TeacherCache(copy, INFO, verify=False)
    rows = [shard.rows for shard in lazy._manifest.shards]
    lazy.pack(range(sum(rows[:2])))
    with pytest.raises(ValueError, match=r"shard-00002.safetensors is damaged: its SHA-256 is"):
        lazy[sum(rows[:2])]


def test_a_shard_that_is_gone_or_exchanged(copy: Path) -> None:
    first, second = copy / "shard-00000.safetensors", copy / "shard-00001.safetensors"
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    with pytest.raises(ValueError, match=r"shard-00000.safetensors is damaged"):
        TeacherCache(copy, INFO)
    first.write_bytes(kept)
    TeacherCache(copy, INFO)
    second.unlink()
    with pytest.raises(
        ValueError, match=r"shard-00001.safetensors is damaged: the file is missing"
    ):
        TeacherCache(copy, INFO)


def test_every_byte_of_the_manifest_counts(copy: Path) -> None:
    manifest = copy / "manifest.json"
    data = manifest.read_bytes()
    body = json.loads(data)
    for forged in (
        data[: len(data) // 2],
        b"",
        b"\xff\xfe",
        b"[]",
        data.replace(b'"complete": true', b'"complete": false'),
        data.replace(b"toy/teacher", b"toy/student"),
        data.replace(str(body["shards"][0]["rows"]).encode(), b"9", 1),
        json.dumps({**body, "shards": body["shards"][:-1]}).encode(),
    ):
        assert forged != data
        manifest.write_bytes(forged)
        with pytest.raises(ValueError, match=r"manifest.json is damaged"):
            TeacherCache(copy, INFO)
    manifest.unlink()
    with pytest.raises(ValueError, match=r"path: expected the directory of a cache"):
        TeacherCache(copy, INFO)


def test_progress_bar(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write(tmp_path / "quiet")
    assert capsys.readouterr().err == ""
    with pytest.raises(Interrupted):
        write(tmp_path / "loud", dying(12), progress=True)
    assert f"{12 * BATCH}/{ROWS}" in capsys.readouterr().err
    with TeacherCacheWriter(tmp_path / "loud", INFO) as writer:
        start = writer.rows
    assert start
    write(tmp_path / "loud", progress=True)
    shown = capsys.readouterr().err
    assert f"{start}/{ROWS}" in shown and f"{ROWS}/{ROWS}" in shown


def test_tokens_are_not_run_under_gradients(tmp_path: Path) -> None:
    modes = []

    def watched(batch):
        modes.append(torch.is_grad_enabled())
        return run(batch)

    write(tmp_path, watched)
    assert modes and not any(modes)


def test_shards_are_visible_one_by_one(tmp_path: Path) -> None:
    """Another process may look while a writer is at work: it sees whole shards or nothing."""
    stop = threading.Event()
    seen = set()

    def look() -> None:
        while not stop.is_set():
            try:
                TeacherCache(tmp_path, INFO)
            except ValueError as error:
                seen.add("damaged" in str(error))

    thread = threading.Thread(target=look)
    thread.start()
    write(tmp_path)
    stop.set()
    thread.join()
    assert True not in seen
