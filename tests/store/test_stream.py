"""The training stream: every sample once an epoch, the same order on any number of ranks, exact resume."""

import itertools

import pytest
from PIL import Image

from tests.store.test_shards import save_image, write_tar
from v2flow_cli.errors import DataError
from v2flow_cli.store.stream import SampleStream


@pytest.fixture
def tars(tmp_path):
    folder = tmp_path / "tars"
    folder.mkdir()
    number = itertools.count()
    for shard, size in enumerate((5, 1, 7, 3, 4)):
        members = []
        for _ in range(size):
            i = next(number)
            members += [(f"k{i:02d}.jpg", b"%d" % i), (f"k{i:02d}.txt", b"caption %d\nagain\n" % i)]
        write_tar(folder / f"s{shard}.tar", [*members, (f"only-text-{shard}.txt", b"x")])
    return str(folder)


def keys(stream, count, start=0):
    return [s.key for s in itertools.islice(stream.samples(start), count)]


def test_samples_carry_image_captions_and_source(tars):
    first = next(SampleStream([tars], seed=0).epoch())
    assert (first.key, first.image, first.captions) == ("k00", b"0", ("caption 0", "again"))
    assert first.source.endswith("s0.tar")


def test_each_epoch_has_every_sample_once_in_another_order(tars):
    stream = SampleStream([tars], seed=0, shuffle_shards=2)
    assert len(stream) == 20
    seen = keys(stream, 60)
    epochs = [seen[i : i + 20] for i in (0, 20, 40)]
    assert all(sorted(e) == [f"k{i:02d}" for i in range(20)] for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert seen == keys(SampleStream([tars], seed=0, shuffle_shards=2), 60)
    assert seen != keys(SampleStream([tars], seed=1, shuffle_shards=2), 60)


@pytest.mark.parametrize("window", [1, 2, 8])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_resume_and_ranks_keep_the_one_order(tars, window, world_size):
    order = keys(SampleStream([tars], seed=3, shuffle_shards=window), 90)
    for rank in range(world_size):
        stream = SampleStream([tars], seed=3, shuffle_shards=window, rank=rank, world_size=world_size)
        mine = order[rank::world_size]
        assert keys(stream, len(mine)) == mine
        for start in (1, 5, len(mine) - 1):
            assert keys(stream, len(mine) - start, start) == mine[start:]


@pytest.mark.parametrize("world_size", [1, 3, 25])
def test_epoch_is_one_sorted_pass(tars, world_size):
    parts = [
        [s.key for s in SampleStream([tars], seed=0, rank=r, world_size=world_size).epoch()] for r in range(world_size)
    ]
    assert [parts[i % world_size][i // world_size] for i in range(20)] == [f"k{i:02d}" for i in range(20)]
    assert sum(map(len, parts)) == 20


def test_skipping_reads_no_image(tars, monkeypatch):
    import v2flow_cli.store.stream as module

    reads = []
    original = module.read_member
    monkeypatch.setattr(module, "read_member", lambda *a: reads.append(a) or original(*a))
    next(SampleStream([tars], seed=0).samples(13))
    assert len(reads) == 1


def test_a_folder_of_images_with_sidecars(tmp_path):
    for i in range(6):
        save_image(tmp_path / f"{i % 2}" / f"{i}.png", (i, i, i))
    (tmp_path / "0" / "0.txt").write_text("one\ntwo\n")
    stream = SampleStream([str(tmp_path)], seed=0)
    assert sorted(keys(stream, 6)) == ["0/0", "0/2", "0/4", "1/1", "1/3", "1/5"]
    first = next(stream.epoch())
    assert (first.key, first.captions) == ("0/0", ("one", "two"))
    assert Image.open(first.source).size == (16, 12)


def test_sources_that_cannot_be_streamed(tmp_path, tars):
    with pytest.raises(DataError, match="no such file or folder"):
        SampleStream([str(tmp_path / "none")], seed=0)
    with pytest.raises(DataError, match="the list of sources is empty"):
        SampleStream([], seed=0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no images in it"):
        SampleStream([str(tmp_path / "empty")], seed=0)
    write_tar(tmp_path / "text.tar", [("1.txt", b"x")])
    with pytest.raises(DataError, match="no sample with an image"):
        next(SampleStream([str(tmp_path / "text.tar")], seed=0).samples())
    save_image(tmp_path / "tars" / "x.png")
    with pytest.raises(DataError, match="both images and tars"):
        SampleStream([tars], seed=0)
    with pytest.raises(ValueError, match="rank is 2"):
        SampleStream([tars], seed=0, rank=2, world_size=2)
    with pytest.raises(ValueError, match="shuffle_shards is 0"):
        SampleStream([tars], seed=0, shuffle_shards=0)
