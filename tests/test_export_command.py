"""`notall export`, as one types it."""

import json
import os
import re
import shlex
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, dynamic_module_utils

from api import (
    FLOATS,
    Verified,
    cli,
    export,
    exporters_checkpoint,
    hf,
    nemotron_nas,
    opened,
    read_header,
)
from families import family
from notall import Plan, Source, UsageError
from tiny_checkpoint import save_tiny_checkpoint
from tiny_gguf import WORDS, write_gguf


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """A function that runs `notall export` on a tiny model in a folder: its exit code,
    stdout and stderr.
    """
    family("llama").build().save_pretrained(tmp_path / "dense")
    monkeypatch.setenv("NOTALL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def run(*arguments, plan=None, model="dense"):
        (plan or Plan([1], [1])).save("plan.json")
        capsys.readouterr()
        monkeypatch.setattr(
            "sys.argv", ["notall", "export", model, "--plan", "plan.json", *arguments]
        )
        with pytest.raises(SystemExit) as end:
            cli.main()
        return (end.value.code or 0, *capsys.readouterr())

    return run


@pytest.mark.parametrize(
    ("options", "dtype"),
    [((), torch.bfloat16), (("--dtype", "float32"), torch.float32)],
)
def test_a_gguf_file_is_written_and_counted_in_the_dtype_it_is_run_in(
    run, options, dtype, monkeypatch, capsys
):
    write_gguf(family("llama").build(vocab_size=len(WORDS)), Path("dense.gguf"))
    code, out, err = run("--to", "hf", "--out", "written", *options, model="dense.gguf")
    assert code == 0, err
    assert {
        weight.dtype for weight in load_file("written/model.safetensors").values()
    } == {dtype}
    assert f"in {str(dtype).removeprefix('torch.')}" in out
    export(
        Source("dense.gguf", dtype=dict([options] if options else []).get("--dtype")),
        Plan([1]),
        "hf",
        "python",
    )
    assert {
        weight.dtype for weight in load_file("python/model.safetensors").values()
    } == {dtype}
    for command in (
        ["inspect", "dense.gguf"],
        ["plan", "dense.gguf", "-o", "deepest.json"],
    ):
        monkeypatch.setattr("sys.argv", ["notall", *command, *options])
        with pytest.raises(SystemExit):
            cli.main()
        assert f"in {str(dtype).removeprefix('torch.')}" in " ".join(
            capsys.readouterr().out.split()
        )


def test_what_a_check_says_is_how_near_it_came_and_how_near_it_had_to():
    assert str(Verified("llama.cpp", 0.3183, 0.5, "nats")).endswith(
        "answers as the skipped model does, within 0.32 nats (at most 0.5)"
    )
    assert str(Verified("llama.cpp", 0.0371, 0.205736, "nats")).endswith(
        "within 0.037 nats (at most 0.21)"
    )
    assert str(Verified("llama.cpp", 0.0, 0.5, "nats")).endswith(
        "does, to the last bit"
    )
    with pytest.raises(
        UsageError, match=r"by 0\.231 nats \(at most 0\.206 was expected\)"
    ):
        Verified("llama.cpp", 0.2314159, 0.205736, "nats").checked()


def test_a_folder_is_written_and_listed(run):
    code, out, _ = run("--to", "hf", "--out", "written", "--json")
    assert code == 0
    assert {"config.json", "model.safetensors", "notall.json", "README.md"} <= {
        row["file"] for row in json.loads(out)["files"]
    }
    assert AutoModelForCausalLM.from_pretrained("written").config.num_hidden_layers == 3


def test_each_export_says_at_the_terminal_by_what_it_was_checked(run):
    code, out, _ = run("--to", "hf", "--out", "checked")
    assert code == 0
    assert re.search(
        r"^Check:   transformers \S+ answers as the skipped model does, "
        r"(within \S+ of the largest logit \(at most \S+\)|to the last bit)$",
        out,
        re.M,
    )
    assert re.search(
        r"^Weights: [\d.]+ KiB, 79% of the original model's [\d.]+ KiB in float32$",
        out,
        re.M,
    )
    assert re.search(r"^Next:    notall generate checked '.*'$", out, re.M)
    assert out.endswith("\nServe:   vllm serve checked\n")
    verified = json.loads(Path("checked/notall.json").read_text())["verified"]
    assert verified["by"].startswith("transformers ")
    assert verified["difference"] <= verified["most"]


@pytest.mark.parametrize(
    "plan", [Plan([1], [1]), Plan([2])], ids=["ordinary", "regrouped"]
)
def test_the_next_command_runs_the_export(run, plan, tmp_path, monkeypatch):
    monkeypatch.setattr(
        dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    shutil.rmtree("dense")
    save_tiny_checkpoint(Path("dense"))
    _, out, _ = run("--to", "hf", "--out", "written", "--no-verify", plan=plan)
    command = re.search(r"^Next: +(.*)$", out, re.M)[1]
    monkeypatch.setattr("sys.argv", [*shlex.split(command), "--max-new-tokens", "2"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code


@pytest.mark.parametrize(
    ("target", "plan"),
    [
        pytest.param("hf", Plan([2]), id="regrouped-hf"),
        pytest.param("nemotron-nas", Plan([1], [1]), id="ordinary-nemotron-nas"),
        pytest.param("hf", Plan([1], [1]), marks=pytest.mark.slow, id="ordinary-hf"),
        pytest.param(
            "nemotron-nas",
            Plan([2]),
            marks=pytest.mark.slow,
            id="regrouped-nemotron-nas",
        ),
    ],
)
def test_weights_are_written_in_another_dtype_that_is_asked_for(run, target, plan):
    """As the export is without it, rounded."""
    for out, options in (("own", ()), ("half", ("--dtype", "bfloat16"))):
        assert run("--to", target, "--out", out, *options, plan=plan)[0] == 0
    own, half = (load_file(f"{out}/model.safetensors") for out in ("own", "half"))
    assert own.keys() == half.keys()
    for name, weight in own.items():
        assert weight.dtype == torch.float32
        assert torch.equal(half[name], weight.to(torch.bfloat16))
    settings = json.loads(Path("half/config.json").read_text())
    assert settings.get("dtype", settings.get("torch_dtype")) == "bfloat16"
    manifest = json.loads(Path("half/notall.json").read_text())
    assert manifest["weight_bytes"]["written"] * 2 == sum(
        4 * weight.numel() for weight in own.values()
    )
    own_bytes = json.loads(Path("own/notall.json").read_text())["weight_bytes"]["dense"]
    assert (
        manifest["weight_bytes"]["dense"] * 2 == own_bytes
    )  # as the original model would be in that dtype
    if target == "hf":
        assert "difference" in manifest["verified"]
    assert run("--to", target, "--out", "same", "--dtype", "float32", plan=plan)[0] == 0
    assert (
        Path("same/model.safetensors").read_bytes()
        == Path("own/model.safetensors").read_bytes()
    )


@pytest.mark.parametrize(
    ("before", "after"), [("F32", "BF16"), ("F16", "F32"), ("F64", "F16")]
)
def test_a_tensor_is_rounded_when_it_is_read(before, after, tmp_path):
    values = torch.randn(
        7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    ).to(FLOATS[before])
    save_file({"x": values}, tmp_path / "x.safetensors")
    cast = read_header(tmp_path / "x.safetensors")["x"].changed(
        lambda values: values, dtype=after
    )
    assert torch.equal(cast.read(), values.to(FLOATS[after]))
    assert (cast.dtype, cast.size, cast.shape) == (after, cast.read().nbytes, (7, 5))


def test_a_quantised_model_has_no_dtype_to_choose(run):
    with opened(Source("dense")) as dense:
        dense.config.quantization_config = {"quant_method": "fp8"}
        with pytest.raises(
            UsageError,
            match=(
                "dense is quantised, so that no dtype can be chosen; leave --dtype out"
            ),
        ):
            dense.in_dtype(torch.bfloat16)


def test_as_json_the_check_is_said_beside_the_list(run):
    code, out, err = run("--to", "hf", "--out", "written", "--json", plan=Plan([2]))
    assert code == 0
    found = json.loads(out)
    assert (
        f"Check:   {found['check']}\nWeights: {found['weights']}\nNext:   "
        f" {found['next']}\n" in err
    )
    assert (found["serve"], found["alone"]) == (
        "vllm serve written",
        "vllm serve written --trust-remote-code",
    )


@pytest.mark.parametrize("target", ["hf", "nemotron-nas"])
def test_an_export_that_was_not_checked_says_why(run, target, monkeypatch):
    monkeypatch.setattr(nemotron_nas, "find_spec", lambda name: None)
    reason = "MLX-LM is not installed (pip install mlx-lm)"
    for options, not_run in (
        ((), reason),
        (("--no-verify",), "it was turned off (--no-verify)"),
    ):
        if target == "hf" and not options:
            continue  # transformers is always here
        code, out, _ = run("--to", target, "--out", "written", *options)
        assert code == 0
        assert f"Check:   not compared with the skipped model: {not_run}\n" in out
        assert json.loads(Path("written/notall.json").read_text())["verified"] == {
            "not_run": not_run
        }
        assert (
            f"not compared with the skipped model: {not_run}"
            in Path("written/README.md").read_text()
        )
        shutil.rmtree("written")


def test_a_config_with_an_infinite_number_is_exported_as_it_stood(run):
    """transformers wrote them so, in older checkpoints."""
    config = Path("dense/config.json")
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"not_used": float("inf")})
    )
    code, _, err = run("--to", "hf", "--out", "written", "--no-verify")
    assert code == 0, err
    assert json.loads(Path("written/config.json").read_text())["not_used"] == float(
        "inf"
    )


def test_nemotron_nas_is_a_target(run):
    assert run("--to", "nemotron-nas", "--out", "written", plan=Plan([2]))[0] == 0


@pytest.mark.parametrize(
    ("arguments", "plan", "said"),
    [
        (("--to", "hf", "--out", "dense"), None, "exists already"),
        (("--to", "hf", "--out", "new"), Plan([9]), "layers are 0 to 3"),
        (
            ("--to", "hf", "--out", "new"),
            Plan([1], fingerprint="llama-30x576-1f0c2a9b"),
            "was made for llama-30x576",
        ),
        (("--to", "gguf", "--out", "new"), None, "give that file"),
        (
            ("--to", "gguf", "--out", "new", "--dtype", "float16"),
            None,
            "leave --dtype out",
        ),
        (
            ("--to", "hf", "--out", "new", "--dtype", "int8"),
            None,
            "unknown dtype 'int8'",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_2(run, arguments, plan, said, tmp_path):
    code, out, err = run(*arguments, plan=plan)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == [
        "dense",
        "plan.json",
    ]


def test_no_verify_runs_nothing(run, monkeypatch):
    monkeypatch.setattr(
        hf.HFExport, "verify", lambda *_: pytest.fail("the model was run")
    )
    assert run("--to", "hf", "--out", "written", "--no-verify")[0] == 0
    with pytest.raises(pytest.fail.Exception):  # which would be seen
        run("--to", "hf", "--out", "other")


def test_an_export_that_is_terminated_leaves_nothing(run, monkeypatch, tmp_path):
    """A job scheduler's SIGTERM ends Python where it stands, unless someone makes an
    exception of it.
    """
    before = signal.getsignal(signal.SIGTERM)
    try:
        signal.signal(
            signal.SIGTERM, signal.SIG_IGN
        )  # without the mend this goes on, in place of ending pytest
        monkeypatch.setattr(
            exporters_checkpoint,
            "write_shards",
            lambda *_: os.kill(os.getpid(), signal.SIGTERM),
        )
        assert (
            run("--to", "hf", "--out", "written", "--no-verify")[0]
            == 128 + signal.SIGTERM
        )
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN  # as it was before
    finally:
        signal.signal(signal.SIGTERM, before)
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "plan.json", "cache"}
