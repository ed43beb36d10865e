"""Make the environment in which SGLang serves on a machine without a GPU: for the tests and the CPU examples.

    python tools/sglang_env.py --output .venv-sglang

It takes about 3 GB and some minutes. sglang itself is not changed; the two modules of tools/sglang_cpu are installed
beside it, in place of packages that need a GPU. sglang needs other versions of packages than the trainer, hence an
environment of its own. An environment that is complete and up to date is left as it is. On a machine with GPUs use
`pip install sglang` in a new environment instead.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

SHIMS = Path(__file__).resolve().parent / "sglang_cpu"
REQUIREMENTS = SHIMS / "requirements.txt"
STAMP = "sglang_env.sha256"

# What pip is asked for, in this order: torch first and by itself, so that nothing below picks another one; then without
# their requirements what would bring GPU libraries along.
STEPS = (
    ("torch", ["torch==2.13.0"]),
    (
        "sglang",
        [
            "--no-deps", "sglang==0.5.23", "xgrammar==0.2.7", "compressed-tensors==0.18.0", "torchvision==0.28.0",
            "triton==3.7.1",
        ],
    ),
    ("what it imports", ["--requirement", str(REQUIREMENTS)]),
)  # fmt: skip


def digest() -> str:
    """SHA-256 over this file and all that it installs from beside it."""
    total = hashlib.sha256()
    for file in [Path(__file__), *sorted(path for path in SHIMS.rglob("*") if path.suffix in (".py", ".txt"))]:
        total.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return total.hexdigest()


def make(output: Path) -> None:
    """Make the environment, or bring it up to date.

    Raises:
        FileExistsError: `output` is something else than an environment.
        CalledProcessError: pip or the last check failed; what they printed was shown.
    """
    stamp, python, wanted = output / STAMP, output / "bin" / "python", digest()
    if python.exists() and stamp.is_file() and stamp.read_text() == wanted:
        return
    if output.exists() and not (output / "pyvenv.cfg").is_file() and any(output.iterdir()):
        raise FileExistsError(f"--output {output}: is there and no Python environment; give another folder")
    stamp.unlink(missing_ok=True)
    if not python.exists():
        print(f"[1/5] {output}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(output)], check=True)
    for number, (what, words) in enumerate(STEPS, start=2):
        print(f"[{number}/5] pip: {what}", flush=True)
        # Its complaint that sglang wants other versions is known: these work.
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *words], check=True)
    print("[5/5] stand-ins for the CPU, and a look whether the server can be imported", flush=True)
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    asked = subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True)
    target = Path(asked.stdout.strip())
    shutil.copy(SHIMS / "sitecustomize.py", target)
    shutil.copytree(SHIMS / "sgl_kernel", target / "sgl_kernel", dirs_exist_ok=True)
    subprocess.run([str(python), "-W", "ignore", "-c", "import sglang.srt.entrypoints.http_server"], check=True)
    stamp.write_text(wanted)


def main(argv: list[str] | None = None) -> int:
    """The command line; 0, 1 if pip failed, or 2 with one line on stderr."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(".venv-sglang"), metavar="DIR")
    try:
        make(parser.parse_args(argv).output)
    except FileExistsError as error:
        print(f"sglang_env: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"sglang_env: {' '.join(error.cmd[:4])} ... ended with {error.returncode}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
