"""Every stage on a real GPU, in about a minute: `pytest -m gpu tests/test_gpu.py`. Nothing here ran on one yet."""

import math

import pytest
import torch

from v2flow_cli.llm.sample import DrawingLM
from v2flow_cli.recipe import load_recipe
from v2flow_cli.store.stream import SampleStream
from v2flow_cli.tokenizer import V2FlowTokenizer
from v2flow_cli.training.loop import train
from v2flow_cli.training.objectives.drawing import finetune
from v2flow_cli.training.objectives.language_model import pretrain

from .conftest import RECIPES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
LOOP = ("train.precision=auto", "train.steps=8", "train.log_every=4", "train.grid_every=8", "train.save_every=0")


def quiet(message):
    pass


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    from v2flow_cli.assets import sample_photos

    folder = tmp_path_factory.mktemp("gpu")
    (folder / "photos").mkdir()
    for name, image in sample_photos():
        image.resize((96, 80)).save(folder / "photos" / f"{name}.png")
    lines = [f"caption {i}: a red fox number {i * i} runs over {i} fields" for i in range(200)]
    (folder / "captions.txt").write_text("\n".join(lines))
    return folder


def tiny(name, root, output, *more):
    settings = [f"output={root / output}", *LOOP, *more]
    if name in ("autoencoder", "tokenizer"):
        settings.append(f"data.sources=[{root / 'photos'}]")
    return load_recipe(RECIPES / "tiny" / f"{name}.yaml", settings)


def test_every_stage_trains_and_its_model_runs(root):
    """Compiled steps, photos on the device, cached latents and ids, Muon, a skipped step, fp32 beside bf16, drawing."""
    resident = "data.resident_px=80"
    done = train(tiny("autoencoder", root, "ae", resident, "optimizer.kind=muon"), resume=False, log=quiet)
    assert math.isfinite(done.metrics["train/loss"])
    text = tuple(s for s in LOOP if "grid" not in s)
    pretrain(
        load_recipe(RECIPES / "tiny" / "lm.yaml", [f"text=[{root}/*.txt]", f"output={root / 'lm'}", *text]), log=print
    )
    parts = (f"latents.autoencoder={root / 'ae'}", f"vocabulary.llm={root / 'lm'}")
    train(tiny("tokenizer", root, "t", *parts, resident, "train.skip_bad_steps=1"), resume=False, log=quiet)
    frozen = (f"init_from={root / 't'}", "freeze_tokens=true", "loss.ssim=1.0", "latents.cache=device")
    train(tiny("tokenizer", root, "decoder", *parts, *frozen), resume=False, log=quiet)

    model = V2FlowTokenizer.from_pretrained(root / "decoder").cuda()
    images = torch.rand(4, 3, 64, 64, device="cuda") * 2 - 1
    exact = model.encode(images)
    with torch.autocast("cuda", torch.bfloat16):
        assert (model.encode(images) == exact).float().mean() > 0.9
    assert torch.isfinite(model.decode(exact)).all()

    photos = [str(root / "photos")]
    assert len(SampleStream(photos, seed=0))
    settings = [f"llm={root / 'lm'}", f"tokenizer={root / 'decoder'}", f"output={root / 'llm'}", "data.token_sets=[]"]
    finetune(load_recipe(RECIPES / "tiny" / "llm.yaml", [*settings, f"data.photos={photos}", *text]), log=print)
    llm = DrawingLM.from_pretrained(root / "llm", "cuda")
    plain = DrawingLM.from_pretrained(root / "llm", "cuda")
    plain._static_step = None
    drawn = llm.generate(["a red fox", "two dogs"] * 4, temperature=0.0)
    assert torch.equal(drawn, plain.generate(["a red fox", "two dogs"] * 4, temperature=0.0))
