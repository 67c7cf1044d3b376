"""The public photos of docs/bench.md as one folder: out of packages that anyone can fetch, checked by their SHA-256.

    pip download --no-deps scikit-image scikit-learn -d packages/
    (cd packages && apt-get download mate-backgrounds)
    python recipes/eval/public_photos.py packages/ --out public-photos/

PACKAGES are wheels, Debian packages, or folders of such or of unpacked files. Standard library only; a Debian package
needs ``xz`` support in Python (``import lzma``).
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

#: The end of each photo's path in its package, and the SHA-256 of the file. Versions with these files: scikit-image
#: 0.26.0, scikit-learn 1.9.1, mate-backgrounds 1.26.0-1; others have them too, or are refused.
PHOTOS = {
    "skimage/data/astronaut.png": "88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5",
    "skimage/data/chelsea.png": "596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb",
    "skimage/data/coffee.png": "cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7",
    "skimage/data/rocket.jpg": "c2dd0de7c538df8d111e479619b129464d0269d0ae5fd18ca91d33a7fdfea95c",
    "skimage/data/motorcycle_left.png": "db18e9c4157617403c3537a6ba355dfeafe9a7eabb6b9b94cb33f6525dd49179",
    "sklearn/datasets/images/china.jpg": "8378025ad2519d649d02e32bd98990db4ab572357d9f09841c2fbfbb4fefad29",
    "sklearn/datasets/images/flower.jpg": "a77f6ec41e353afdf8bdff2ea981b2955535d8d83294f8cfa49cf4e423dd5638",
    "backgrounds/mate/abstract/Elephants.jpg": "b402668de7212c568090edc032288759029e15e5153f3ae43f079abfd44105a4",
    "backgrounds/mate/nature/Aqua.jpg": "5c30118205982da441bf7e6a1ada636a8a0be879408140b3148280c665ed6bce",
    "backgrounds/mate/nature/Blinds.jpg": "f7aac0dcc2e06d0491643e84df3da1d9db7c4610f58806a880d56e074799f600",
    "backgrounds/mate/nature/Dune.jpg": "8a67c2cb0be8c46b70c237311a4fa4d2b4ac7d39568135384787801fa5cc9a91",
    "backgrounds/mate/nature/FreshFlower.jpg": "972b0a0c4e5e3fa93f4f244fc84bc64b121a5eac3aaa5856f1308c1f38a02f8e",
    "backgrounds/mate/nature/Garden.jpg": "d3095ee09d425ef23d27155412136cf14fc3c9af76ca58b452f55e23da324e78",
    "backgrounds/mate/nature/GreenMeadow.jpg": "8fa0de0aa4089f7319c9fb7a6d006d4cab6023e8c8853731557cff53567b4832",
    "backgrounds/mate/nature/LadyBird.jpg": "e35a9a4126ef969c90b29c038058c5a575a20eadd84106a37bf1fa9931e7b61d",
    "backgrounds/mate/nature/RainDrops.jpg": "3e4ea9671c28c90a86cf67b3db9daf18c4741587c596333a7529ca589aaa0c16",
    "backgrounds/mate/nature/Storm.jpg": "77ca53077831d3237f73393a91fc879158abc046d852941c26e90de336356957",
    "backgrounds/mate/nature/TwoWings.jpg": "665e5abf8a5399070a91a9a8e455fe071e5b61697ff78fdeda4e9843ef545aeb",
    "backgrounds/mate/nature/Wood.jpg": "19c78500ac00a622e19907ab9cc7d06d46fe08c4a6142759a84195696150ec07",
    "backgrounds/mate/nature/YellowFlower.jpg": "254da96256acb7add685679775a04d1e4a5bc8cd13e5a5a3d61351ce198a5306",
}


def members(package: Path) -> Iterator[tuple[str, bytes]]:
    """(path, content) of the files in ``PHOTOS`` that a wheel, a Debian package or a folder holds, wrong ones too."""
    if package.is_dir():
        for path in sorted(p for p in package.rglob("*") if p.is_file()):
            if path.suffix in (".whl", ".deb"):
                yield from members(path)
            elif photo_of(path.as_posix()):
                yield path.as_posix(), path.read_bytes()
    elif package.suffix == ".whl":
        with zipfile.ZipFile(package) as wheel:
            for name in filter(photo_of, wheel.namelist()):
                yield f"{package}/{name}", wheel.read(name)
    elif package.suffix == ".deb":
        with tarfile.open(fileobj=io.BytesIO(_data_of(package))) as tar:
            for member in tar:
                file = tar.extractfile(member) if photo_of(member.name) else None
                if file is not None:
                    yield f"{package}/{member.name}", file.read()
    else:
        raise SystemExit(f"{package}: expected a .whl, a .deb, or a folder of them.")


def photo_of(path: str) -> str | None:
    """The key of ``PHOTOS`` that ``path`` ends in."""
    return next((name for name in PHOTOS if f"/{path}".endswith(f"/{name}")), None)


def _data_of(package: Path) -> bytes:
    """The member data.tar.* of an ar archive: 60 bytes of header, then the content, at even places."""
    content, place = package.read_bytes(), 8
    if not content.startswith(b"!<arch>\n"):
        raise SystemExit(f"{package}: not a Debian package.")
    while place + 60 <= len(content):
        name, size = content[place : place + 16].decode().strip(" /"), int(content[place + 48 : place + 58])
        if name.startswith("data.tar"):
            return content[place + 60 : place + 60 + size]
        place += 60 + size + size % 2
    raise SystemExit(f"{package}: no data.tar in it.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("packages", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    found: dict[str, bytes] = {}
    wrong: dict[str, str] = {}
    for package in options.packages:
        if not package.exists():
            raise SystemExit(f"{package}: no such file or folder.")
        for path, content in members(package):
            photo, digest = photo_of(path), hashlib.sha256(content).hexdigest()
            assert photo is not None
            if digest == PHOTOS[photo]:
                found[photo] = content
            else:
                wrong[photo] = f"{path}: SHA-256 {digest[:16]}..., expected {PHOTOS[photo][:16]}..."
    problems = [wrong.get(photo, f"{photo}: not in these packages") for photo in PHOTOS if photo not in found]
    if problems:
        sys.exit("\n".join([*problems, f"{len(problems)} of {len(PHOTOS)} photos are missing; nothing was written."]))
    options.out.mkdir(parents=True, exist_ok=True)
    partial = options.out / ".partial"  # a run that was killed may have left one
    extra = sorted({p.name for p in options.out.iterdir()} - {PurePosixPath(p).name for p in PHOTOS} - {partial.name})
    if extra:
        sys.exit(f"{options.out}: holds other files ({extra[0]}), and would not be the set. Use an empty folder.")
    for photo, content in found.items():
        partial.write_bytes(content)
        os.replace(partial, options.out / PurePosixPath(photo).name)
    _print(f"{options.out}: {len(found)} photos")


def _print(text: str) -> None:
    """``text`` on stdout; where its reader has gone the exit code is that of SIGPIPE."""
    try:
        print(text, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python's last flush would fail too
        sys.exit(141 if isinstance(error, BrokenPipeError) else f"stdout cannot be written ({error.strerror}).")


if __name__ == "__main__":
    main()
