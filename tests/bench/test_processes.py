"""A bench over two processes finds what one finds."""

import json
from pathlib import Path

from v2flow_cli.bench.results import as_record, images_csv, tables
from v2flow_cli.bench.run import run_bench
from v2flow_cli.runtime.processes import Processes, gather_texts, launch
from v2flow_cli.tokenizer import V2FlowTokenizer

from ..reliability.processes import ranks, wait


def bench(folder: Path, photos, mine: Processes):
    made = run_bench(
        {"v2flow": V2FlowTokenizer.from_pretrained(folder)},
        photos,
        batch_size=2,
        with_codecs=False,
        with_speed=False,
        keep=3,
        ranks=mine,
    )
    record = as_record(tables([made]), made.notes)
    kept = [(image.name, image.pictures["v2flow"].sum().item()) for image in made.result.kept]
    return {"record": record, "images": images_csv([made]), "kept": kept}


def test_two_ranks_give_the_results_of_one(tiny_tokenizer_folder, sample_images, tmp_path) -> None:
    photos = [
        (f"p{i}", image) for i, image in enumerate([*sample_images, *sample_images[:2]])
    ]  # 7: 4 batches, one short
    alone = json.loads(json.dumps(bench(tiny_tokenizer_folder, photos, Processes())))

    def one() -> None:
        with launch() as mine:
            found = bench(tiny_tokenizer_folder, photos, mine)
            (tmp_path / f"{mine.rank}.json").write_text(json.dumps(found))

    assert wait(ranks(one, 2, tmp_path), 120) == [0, 0]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["images"] == second["images"] == alone["images"]
    assert first["kept"] == alone["kept"] and second["kept"] == []
    assert first["record"] == second["record"] == alone["record"]


def test_ranks_share_all_figures(tmp_path) -> None:
    def one() -> None:
        with launch() as mine:
            heard = gather_texts("" if mine.rank == 0 else "ü" * mine.rank)
            (tmp_path / f"{mine.rank}.json").write_text(json.dumps(heard))

    assert wait(ranks(one, 3, tmp_path), 120) == [0, 0, 0]
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)] == [["", "ü", "üü"]] * 3
    assert gather_texts("alone") == ["alone"]
