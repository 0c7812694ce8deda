#!/usr/bin/env bash
# All that notall has for a CUDA device, on yours: one command, about half an hour on one card.
#
#   benchmarks/gpu.sh                 every step, in order; a step that fails stops no other
#   benchmarks/gpu.sh tests table     these steps
#   benchmarks/gpu.sh --smoke         a little of each step, on any machine, without a device too
#
# Results are in results/gpu (OUT=FOLDER for another): a log and what each step wrote. The last
# lines say what passed, what failed, and what was not covered: please send them with an issue.
# A new step is a function `step_NAME` here, and its name in STEPS.
set -uo pipefail
cd "$(dirname "$0")/.."
STEPS="setup device tests readme table paper"
python=${PYTHON:-.venv/bin/python}
out=${OUT:-results/gpu}
smoke=
export HF_HUB_OFFLINE=1
mkdir -p "$out"

# `make setup` installs torch from the package index, whose wheels for Linux are built for CUDA.
# Another build, for the driver that is here:
#   .venv/bin/pip install --index-url https://download.pytorch.org/whl/cu126 torch
step_setup() {
  [ -n "${PYTHON:-}" ] || make setup
}

# Whether torch sees a device. The rest runs without one too, and says so in the end.
step_device() {
  "$python" - <<'END'
import torch

print(f"torch {torch.__version__}, built for CUDA {torch.version.cuda}")
for index in range(torch.cuda.device_count()):
    about = torch.cuda.get_device_properties(index)
    print(f"cuda:{index}: {about.name}, {about.total_memory / 2**30:.0f} GiB")
if not torch.cuda.is_available():
    raise SystemExit("torch sees no CUDA device: see the lines on torch in benchmarks/gpu.sh")
END
}

# The tests that are about devices, slow ones too: on the real one, or two where they are.
step_tests() {
  local some=(-m devices)
  [ -z "$smoke" ] || some=(-m "devices and not slow" -k "simulated or llama-one")
  "$python" -m pytest -q -p no:cacheprovider -rs "${some[@]}" tests
}

# What the README types and shows in Python, on the default model. It names no device.
step_readme() {
  local model=smollm2
  [ -z "$smoke" ] || model=$(tiny_model)
  "$python" -m notall generate "$model" "Water boils at" --skip attention:4 --beside || return
  "$python" - "$model" "$out" <<'END'
import re
import shutil
import sys
from pathlib import Path

model, out = sys.argv[1:]
(snippet,) = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), re.S)
written = Path(out) / "smollm2-pruned"
shutil.rmtree(written, ignore_errors=True)
snippet = snippet.replace('"smollm2-pruned"', f'"{written}"').replace('"smollm2"', f'"{model}"')
exec(snippet)
print("the README's snippet ran on", globals()["model"].device)
END
}

# What each part finds and takes there and on the CPU, on the default model.
step_table() {
  if [ -n "$smoke" ]; then
    "$python" benchmarks/on_device.py --model "$(tiny_model)" --small --out "$out"
  else
    "$python" benchmarks/on_device.py --out "$out"
  fi
}

# The paper's time tables, with random weights: Llama-2 7B and 13B, eager and compiled.
step_paper() {
  local times="$python benchmarks/shapes/paper_times.py"
  if [ -n "$smoke" ]; then
    cat > "$out/tiny.json" <<< '{"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 6,
      "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 128}'
    local few="--shape $out/tiny.json --dtype float32 --new 2 --rounds 1 --prompt 8 --batch 1"
    few+=" --fractions 0.33"
    $times $few --out "$out/tiny" && $times $few --out "$out/tiny-one-layer" --one-layer &&
      $times $few --out "$out/tiny-compiled" --compile
    return
  fi
  local size failed=0
  for size in 7b 13b; do
    local asked="--shape llama-2-$size --minutes 1.5"
    $times $asked --out "$out/$size" || failed=1
    $times $asked --out "$out/$size-compiled" --compile || failed=1
  done
  return $failed
}

tiny_model() {  # a checkpoint folder, for the smoke test
  local folder="$out/tiny-model"
  [ -d "$folder" ] || "$python" -c '
import sys
from pathlib import Path

sys.path.insert(0, "tests")
from tiny_checkpoint import save_tiny_checkpoint

save_tiny_checkpoint(Path(sys.argv[1]), num_hidden_layers=12, max_position_embeddings=512)
' "$folder" > /dev/null
  echo "$folder"
}

not_covered() {
  "$python" - <<'END'
import importlib.util

import torch

count = torch.cuda.device_count()
if not count:
    print("- any device: none is here; tests ran on simulated ones, where g++ compiles them")
elif count == 1:
    print("- two devices (--device-map): one is here")
for package in ("bitsandbytes", "ray", "vllm"):
    if importlib.util.find_spec(package) is None:
        print(f"- {package}: not installed")
print("- workers on several machines (Ray), healing with several processes")
print("- engines but transformers: notall pareto --engine vllm, where that is installed")
print("- models larger than the default one, but for the times of the step paper; float16")
END
}

asked=()
for word in "$@"; do
  case $word in
    --smoke) smoke=yes ;;
    *)
      if [[ " $STEPS " != *" $word "* ]]; then
        echo "there is no step $word: give some of $STEPS" >&2
        exit 2
      fi
      asked+=("$word")
      ;;
  esac
done
[ ${#asked[@]} -gt 0 ] || asked=($STEPS)

summary=()
status=0
for step in "${asked[@]}"; do
  echo "== $step"
  SECONDS=0
  said=passed
  "step_$step" 2>&1 | tee "$out/$step.log" || { said=FAILED; status=1; }
  summary+=("$step: $said, after $SECONDS s ($out/$step.log)")
done
echo "== done"
printf '%s\n' "${summary[@]}"
echo "Not covered:"
not_covered
exit $status
