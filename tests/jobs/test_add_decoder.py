"""Two decoders of the same ids in one model folder: added, chosen, saved, refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from tests.conftest import build_tiny_tokenizer
from v2flow_cli.bench.run import run_bench
from v2flow_cli.bench.sweep import parse_sweeps
from v2flow_cli.cli.app import app
from v2flow_cli.errors import DataError, ModelError
from v2flow_cli.jobs.add_decoder import add_decoder
from v2flow_cli.store.token_file import save_token_ids
from v2flow_cli.store.token_manifest import TokenManifest
from v2flow_cli.tokenizer import V2FlowTokenizer


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The tiny tokenizer as another training of its decoder left it, in bf16 and with sampling of its own."""
    model = build_tiny_tokenizer()
    torch.manual_seed(5)
    with torch.no_grad():
        for part in (model.context, model.flow):
            for parameter in part.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter)).copy_(parameter.bfloat16())
    model.config.sampling = {**model.config.sampling, "noise_temperature": 0.5, "num_flow_steps": 3}
    folder = tmp_path_factory.mktemp("models") / "trained"
    model.to(torch.bfloat16).save_pretrained(folder)
    encoder = build_tiny_tokenizer()  # float32, as `train` keeps what ids hang on
    encoder.load_state_dict(load_file(folder / "model.safetensors") | _encoder_weights(encoder))
    encoder.config.sampling = model.config.sampling
    encoder.save_pretrained(folder)
    return folder


def _encoder_weights(model):
    return {k: v for k, v in model.state_dict().items() if k.split(".")[0] not in ("context", "flow")}


@pytest.fixture
def folder(tmp_path, tiny_tokenizer_folder):
    return shutil.copytree(tiny_tokenizer_folder, tmp_path / "both")


@pytest.fixture
def both(folder, trained):
    add_decoder(folder, trained)
    return folder


def decoded(tokenizer, **options):
    ids = torch.arange(8).reshape(2, 4)
    return tokenizer.decode(ids, seeds=[1, 2], **options)


def test_a_folder_without_other_decoders_has_only_faithful(tiny_tokenizer_folder):
    tokenizer = V2FlowTokenizer.from_pretrained(tiny_tokenizer_folder)
    assert tokenizer.decoder_names == ("faithful",)
    assert tokenizer.with_decoder("faithful") is tokenizer.with_decoder() is tokenizer
    for ask in (
        lambda: V2FlowTokenizer.from_pretrained(tiny_tokenizer_folder, decoder="sharp"),
        lambda: decoded(tokenizer, decoder="sharp"),
    ):
        with pytest.raises(ModelError, match="no decoder 'sharp'; it has faithful"):
            ask()


def test_the_second_decoder_is_that_of_the_other_folder(both, trained, tiny_tokenizer_folder):
    alone, other = (V2FlowTokenizer.from_pretrained(place) for place in (tiny_tokenizer_folder, trained))
    tokenizer = V2FlowTokenizer.from_pretrained(both)
    assert tokenizer.decoder_names == ("faithful", "sharp") and tokenizer.decoder_name == "faithful"
    assert torch.equal(decoded(tokenizer), decoded(alone))
    assert torch.equal(decoded(tokenizer, decoder="sharp"), decoded(other))
    assert not torch.equal(decoded(other), decoded(alone))
    sharp = V2FlowTokenizer.from_pretrained(both, decoder="sharp")
    assert torch.equal(decoded(sharp), decoded(other)) and torch.equal(
        decoded(sharp, decoder="faithful"), decoded(alone)
    )
    assert sharp.config.sampling["noise_temperature"] == 0.5 and tokenizer.config.sampling["noise_temperature"] != 0.5
    assert sharp.with_decoder("faithful").config.sampling == alone.config.sampling


def test_ids_and_token_digest_do_not_change(both, trained, tiny_tokenizer_folder):
    alone, other = (V2FlowTokenizer.from_pretrained(place) for place in (tiny_tokenizer_folder, trained))
    tokenizer = V2FlowTokenizer.from_pretrained(both)
    sharp = tokenizer.with_decoder("sharp")
    assert tokenizer.token_digest == sharp.token_digest == alone.token_digest == other.token_digest
    assert tokenizer.digest == alone.digest and sharp.digest == other.digest != alone.digest
    assert sharp.latents is tokenizer.latents and sharp.resampler is tokenizer.resampler
    assert set(tokenizer.state_dict()) == set(alone.state_dict())  # not part of a checkpoint


def test_loading_it_draws_no_random_number(both):
    tokenizer = V2FlowTokenizer.from_pretrained(both)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    tokenizer.with_decoder("sharp")
    assert torch.equal(torch.rand(1), expected)


def test_the_decoder_keeps_its_number_format_and_is_saved_with_the_model(both, trained, tmp_path):
    weights = load_file(trained / "model.safetensors")
    added = load_file(both / "decoder-sharp.safetensors")
    assert set(added) == {key for key in weights if key.split(".")[0] in ("context", "flow")}
    assert all(torch.equal(added[key], weights[key]) and added[key].dtype == weights[key].dtype for key in added)
    for tokenizer in (V2FlowTokenizer.from_pretrained(both, decoder=name) for name in ("faithful", "sharp")):
        copy = tmp_path / f"copy-{tokenizer.decoder_name}"
        tokenizer.save_pretrained(copy)
        again = V2FlowTokenizer.from_pretrained(copy)
        assert again.decoder_name == "faithful" and again.digest == tokenizer.with_decoder("faithful").digest
        assert torch.equal(decoded(again, decoder="sharp"), decoded(tokenizer, decoder="sharp"))
        tokenizer.save_pretrained(copy)  # over itself
        assert V2FlowTokenizer.from_pretrained(copy).decoder_names == ("faithful", "sharp")


def test_the_folder_names_the_default_decoder(folder, trained):
    add_decoder(folder, trained, "sharp", default=True)
    tokenizer = V2FlowTokenizer.from_pretrained(folder)
    assert tokenizer.decoder_name == "sharp"
    assert V2FlowTokenizer.from_pretrained(folder, decoder="faithful").decoder_name == "faithful"


@pytest.mark.parametrize("name", ["faithful", "Sharp", "", "../x"])
def test_bad_names_are_refused(folder, trained, name):
    with pytest.raises(ModelError, match="cannot be named"):
        add_decoder(folder, trained, name)


def test_the_decoder_of_another_tokenizer_is_refused(folder, tmp_path):
    other = build_tiny_tokenizer()
    other.quantizer.codebook.add_(1)
    other.save_pretrained(tmp_path / "other")
    before = (folder / "config.json").read_bytes()
    with pytest.raises(ModelError, match=r"token digest is .*freeze_tokens"):
        add_decoder(folder, tmp_path / "other")
    assert (folder / "config.json").read_bytes() == before and not list(folder.glob("decoder-*"))


def test_a_missing_damaged_or_foreign_file_is_an_error_when_it_is_used(both, trained):
    file = both / "decoder-sharp.safetensors"
    content = file.read_bytes()
    for change, message in (
        (lambda: file.write_bytes(content[:-1] + b"x"), "SHA-256 .* damaged, or of another model"),
        (file.unlink, "decoder-sharp.safetensors is missing"),
    ):
        change()
        tokenizer = V2FlowTokenizer.from_pretrained(both)
        assert decoded(tokenizer).shape == (2, 3, 32, 32)
        with pytest.raises(ModelError, match=message):
            tokenizer.with_decoder("sharp")
    config = json.loads((both / "config.json").read_text())
    del config["decoders"]["sharp"]["flow"]
    (both / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"decoders\.sharp needs the keys context, flow, sampling, sha256"):
        V2FlowTokenizer.from_pretrained(both, decoder="sharp")


def test_refined_ids_are_the_same_whichever_decoder_is_used(both, tiny_tokenizer_folder):
    tokenizer = V2FlowTokenizer.from_pretrained(both)
    tokenizer.config.refine_steps = 6
    photos = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = V2FlowTokenizer.from_pretrained(tiny_tokenizer_folder).encode(photos, refine_steps=6)
    assert not torch.equal(expected, tokenizer.encode(photos, refine_steps=0))
    assert torch.equal(tokenizer.with_decoder("sharp").encode(photos), expected)
    assert torch.equal(tokenizer.encode(photos), expected)  # a grid has one length, and needs no number


def test_weights_of_other_shapes_are_an_error(both):
    config = json.loads((both / "config.json").read_text())
    config["decoders"]["sharp"]["flow"]["hidden_size"] *= 2
    (both / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"do not fit decoders\.sharp of config\.json"):
        V2FlowTokenizer.from_pretrained(both, decoder="sharp")


def test_the_commands_accept_the_decoder(both, trained, tmp_path):
    tokenizer = V2FlowTokenizer.from_pretrained(both)
    save_token_ids(tmp_path / "tokens" / "a.npy", np.arange(4), 64)
    TokenManifest(tokenizer.token_digest, (32, 32), 64, 4, {"a": 1}).save(tmp_path / "tokens")

    def decode(model, out, *options):
        words = ["decode", tmp_path / "tokens", "-o", tmp_path / out, "--model", model, "--dtype", "fp32", *options]
        return CliRunner().invoke(app, [*map(str, words), "--json"])

    def pixels(out):
        return np.asarray(Image.open(tmp_path / out / "a.png"))

    assert json.loads(decode(both, "sharp", "--decoder", "sharp").stdout)["decoder"] == "sharp"
    assert json.loads(decode(both, "faithful").stdout)["decoder"] == "faithful"
    decode(trained, "trained")
    assert np.array_equal(pixels("sharp"), pixels("trained")) and not np.array_equal(
        pixels("sharp"), pixels("faithful")
    )
    wrong = decode(both, "none", "--decoder", "vivid")
    assert wrong.exit_code == 1 and "no decoder 'vivid'; it has faithful and sharp" in " ".join(wrong.output.split())


def test_bench_shows_every_decoder_of_a_model_and_encodes_once(both, sample_images):
    photos = [(str(i), image) for i, image in enumerate(sample_images[:2])]
    tokenizer = V2FlowTokenizer.from_pretrained(both)
    calls = []
    encode = tokenizer.encode
    tokenizer.encode = lambda *args: calls.append(1) or encode(*args)
    options = {"with_codecs": False, "with_speed": False, "size": 32}
    rows = run_bench({"m": tokenizer}, photos, **options).result.coders
    assert [row.system for row in rows] == ["m, decoder faithful", "m, decoder sharp"]
    assert [row.settings["decoder"] for row in rows] == ["faithful", "sharp"]
    assert rows[1].settings["noise_temperature"] == 0.5 and rows[0].weights_digest != rows[1].weights_digest
    assert rows[0].values["psnr_db"] != rows[1].values["psnr_db"]
    assert len(calls) == 2  # one batch, for the codecs' budgets and for the figures: not once a decoder
    [row] = run_bench({"m": tokenizer}, photos, settings=parse_sweeps(["decoder=sharp"]), **options).result.coders
    assert row.values["psnr_db"] == rows[1].values["psnr_db"]
    with pytest.raises(DataError, match="--decoder vivid: no model has it; they have faithful and sharp"):
        run_bench({"m": tokenizer}, photos, settings=parse_sweeps([], {"decoder": "vivid"}), **options)
