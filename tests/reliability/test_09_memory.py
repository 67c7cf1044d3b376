"""9. The resident memory of `encode` does not grow with the set."""

import itertools
import resource

import pytest
from PIL import Image

from tests.reliability.processes import fork, wait
from tests.store.test_shards import write_tar
from v2flow_cli.jobs.encode import SetEncoder, encode_shards
from v2flow_cli.store.shards import find_shard_files
from v2flow_cli.tokenizer import V2FlowTokenizer

SIZES = [pytest.param(50, 300, id="300"), pytest.param(1_000, 10_000, id="10000", marks=pytest.mark.slow)]


@pytest.mark.parametrize(("small", "large"), SIZES)
def test_encode(tmp_path, tiny_tokenizer_folder, small, large):
    import io

    buffer = io.BytesIO()
    Image.effect_noise((32, 32), 50).convert("RGB").save(buffer, "PNG")
    per_shard, peaks = small // 5, {}
    for count in (small, large):
        folder = tmp_path / f"tars-{count}"
        folder.mkdir()
        keys = (f"{i:06d}.png" for i in itertools.count())
        for shard in range(count // per_shard):
            members = [(next(keys), buffer.getvalue()) for _ in range(per_shard)]
            write_tar(folder / f"s-{shard:04d}.tar", members)

        def encode(folder=folder, count=count):
            encoder = SetEncoder(V2FlowTokenizer.from_pretrained(tiny_tokenizer_folder))
            shards = find_shard_files([folder])
            report = encode_shards(encoder, shards, tmp_path / f"t-{count}", force=False, tick=lambda n: None)
            assert report.images == count
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            (tmp_path / f"{count}.peak").write_text(str(peak))

        assert wait([fork(encode)], 3000) == [0]
        peaks[count] = int((tmp_path / f"{count}.peak").read_text())
    print(f"peak resident memory: {peaks} KiB")
    assert peaks[large] < 1.1 * peaks[small]
