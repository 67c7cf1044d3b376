"""What a first answer waits for: the modules that a command imports (no times: those depend on the machine)."""

import json
import subprocess
import sys

from PIL import Image

# Each takes as long to import as a good part of torch, or is of use to other commands alone.
HEAVY = (
    "accelerate datasets diffusers lpips pandas peft scipy skimage sklearn sympy timm torch._dynamo torch._inductor "
    "torch.distributed.tensor torch_fidelity torchmetrics torchvision transformers.modeling_utils webdataset"
).split()

RUN = """
import json, sys
from v2flow_cli.cli.app import app
for arguments in json.loads(sys.argv[1]):
    app(arguments, standalone_mode=False)
print(json.dumps(sorted(sys.modules)))
"""


def test_encode_and_decode_import_what_they_use(tmp_path, tiny_tokenizer_folder):
    Image.effect_noise((40, 48), 60).convert("RGB").save(tmp_path / "a.jpg")
    model = ["--model", str(tiny_tokenizer_folder)]
    commands = [
        ["encode", str(tmp_path / "a.jpg"), "-o", str(tmp_path / "tokens"), *model],
        ["decode", str(tmp_path / "tokens"), "-o", str(tmp_path / "decoded"), *model],
    ]
    done = subprocess.run([sys.executable, "-c", RUN, json.dumps(commands)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    imported = set(json.loads(done.stdout.splitlines()[-1]))
    assert (tmp_path / "decoded" / "a.png").is_file() and "torch" in imported
    assert [name for name in HEAVY if name in imported] == []
