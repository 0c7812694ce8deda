#!/usr/bin/env bash
# The paper's time tables on one CUDA device, with random weights: Llama-2 7B and 13B, eager and compiled, in 8 minutes.
# `benchmarks/gpu.sh --smoke` runs the same on a tiny shape, on any device.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
out=${OUT:-results/gpu}

if [ "${1:-}" = --smoke ]; then
  mkdir -p "$out"
  echo '{"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6,
         "num_attention_heads": 4, "vocab_size": 128}' > "$out/tiny.json"
  run() { "$python" benchmarks/shapes/paper_times.py --shape "$out/tiny.json" --dtype float32 --new 2 --rounds 1 "$@"; }
  run --out "$out/tiny" --prompt 8 16 --batch 1 2
  run --out "$out/tiny-one-layer" --prompt 8 --batch 1 --fractions 0.33 --one-layer
  run --out "$out/tiny-compiled" --prompt 8 --batch 1 --fractions 0.33 --compile  # a form of layer takes long to compile
  exit
fi

# Minutes are shared out so that both sizes, eager and compiled, end within eight.
"$python" benchmarks/shapes/paper_times.py --shape llama-2-7b --out "$out/7b" --minutes 1.5
"$python" benchmarks/shapes/paper_times.py --shape llama-2-13b --out "$out/13b" --minutes 1.5
"$python" benchmarks/shapes/paper_times.py --shape llama-2-7b --out "$out/7b-compiled" --minutes 1.5 --compile
"$python" benchmarks/shapes/paper_times.py --shape llama-2-13b --out "$out/13b-compiled" --minutes 1.5 --compile
