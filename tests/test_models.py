"""Models are loaded as they are or refused in one line; provenance names their weights,
and no folder.
"""

import hashlib
import json
import logging
import os
import pickle
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from api import (
    UsageError,
    check_weights,
    digests,
    files,
    gguf_copies,
    identity,
    loading as models,
    paper_grid,
    quiet,
    read_text,
    score,
    summarize,
    weightless,
)
from families import family
from notall import Plan, locate
from tiny_checkpoint import save_tiny_checkpoint
from tiny_gguf import WORDS, write_gguf

TRANSFORMERS_4 = transformers.__version__.startswith("4.")
IDS = torch.randint(0, 99, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NOTALL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path):
    """A model as save_pretrained leaves it."""
    return save(family("llama").build(), tmp_path / "tiny")


@pytest.fixture
def gguf(tmp_path):
    return write_gguf(
        family("llama").build(vocab_size=len(WORDS)), tmp_path / "tiny.gguf"
    )


def save(model, folder):
    model.save_pretrained(folder)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(99)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(
        folder
    )
    return folder


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids.to(model.device)).logits


def refused(function, *arguments, **options):
    """The one line that a user reads."""
    with pytest.raises(UsageError) as error:
        function(*arguments, **options)
    said = str(error.value)
    assert "\n" not in said
    assert len(said) < 400
    return said


# --- load ---


def test_a_folder_gives_the_model_that_was_saved(folder):
    model, tokenizer = models.load(
        folder, dtype="float32", device="cpu", attn_implementation="eager"
    )
    assert torch.equal(logits(model), logits(family("llama").build()))
    assert not model.training
    assert all(weight.requires_grad for weight in model.parameters())
    assert tokenizer.convert_ids_to_tokens(5) == "w5"


def test_dtype_and_attention_are_as_asked(folder):
    model, _ = models.load(str(folder), dtype="bfloat16", attn_implementation="eager")
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == "eager"
    assert "give sdpa or eager" in refused(
        models.load, folder, attn_implementation="wishful"
    )


def test_a_device_map_places_the_model(folder):
    model, _ = models.load(folder, dtype="float32", device_map={"": "cpu"})
    torch.testing.assert_close(logits(model), logits(family("llama").build()))
    assert "give one" in refused(models.load, folder, device="cpu", device_map="auto")


def test_loading_is_silent_and_leaves_logging_as_it_was(folder, gguf, capfd):
    before = (
        logging.root.manager.disable,
        transformers_logging.is_progress_bar_enabled(),
    )
    models.load(folder)
    models.load(gguf)
    models.load_config(folder)
    assert capfd.readouterr() == ("", "")
    assert (
        logging.root.manager.disable,
        transformers_logging.is_progress_bar_enabled(),
    ) == before


def test_what_is_quiet_are_the_loggers_of_transformers_alone(caplog, monkeypatch):
    theirs, other = map(logging.getLogger, ("transformers.models", "somebody"))
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    caplog.set_level(logging.WARNING, "transformers")
    with quiet():
        theirs.warning("unheard")
        theirs.error("a failure")
        other.warning("heard")
    theirs.warning("heard again")
    messages = [*dict.fromkeys(caplog.messages)]  # one may be seen by two handlers
    assert messages == ["a failure", "heard", "heard again"]
    assert logging.getLogger("transformers").level == logging.WARNING


def test_a_pickle_is_never_opened(folder, tmp_path):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "sprung",)

    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    assert "no safetensors" in refused(models.load, folder)
    (folder / "other.safetensors").touch()  # one that is not the model's
    refused(models.load, folder)
    assert not (tmp_path / "sprung").exists()


def test_a_models_own_code_runs_only_when_trusted(folder, tmp_path):
    marker = tmp_path / "ran"
    code = (
        f"open({str(marker)!r}, 'w')\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class Own(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    (folder / "own.py").write_text(code)
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "own"}
    config["auto_map"] = {
        "AutoConfig": "own.OwnConfig",
        "AutoModelForCausalLM": "own.Own",
    }
    (folder / "config.json").write_text(json.dumps(config))
    for function in (models.load, models.load_config):
        assert "trust_remote_code" in refused(function, folder)
        assert not marker.exists()
    config = models.load_config(folder, trust_remote_code=True)
    assert type(weightless.build_empty(config)).__name__ == "Own"
    model, _ = models.load(folder, dtype="float32", trust_remote_code=True)
    assert type(model).__name__ == "Own"
    torch.testing.assert_close(logits(model), logits(family("llama").build()))


def test_missing_weights_are_refused_not_invented(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert "lacks weights (1, first model.layers.1.mlp.up_proj.weight)" in refused(
        models.load, folder
    )


def test_weights_that_are_not_used_are_said_once_and_by_us(folder, monkeypatch, caplog):
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.q_norm.weight"] = torch.ones(8)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    caplog.set_level(logging.WARNING, "transformers")
    with pytest.warns(
        UserWarning,
        match=r"does not use \(1, first model.layers.0.self_attn.q_norm.weight\)",
    ):
        models.load(folder)
    assert not caplog.records


def truncate(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def reshape(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 7}))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (truncate, "cannot load"),
        (reshape, "cannot load"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot load"),
        (lambda folder: (folder / "config.json").write_text("[1]"), "cannot load"),
        (lambda folder: (folder / "config.json").write_text("{}"), "cannot load"),
        (
            lambda folder: (folder / "config.json").write_text(
                '{"model_type": "nonesuch"}'
            ),
            "nonesuch",
        ),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "cannot load"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "cannot load"),
    ],
)
def test_a_damaged_folder_is_refused_in_one_line(folder, damage, says):
    damage(folder)
    assert says in refused(models.load, folder)
    if says == "no config.json":  # for what needs no weights, too
        assert "or its .gguf file itself" in refused(models.load_config, folder)


@pytest.mark.any_transformers  # 4.57 says nothing of a tokenizer there
def test_a_folder_without_a_tokenizer_names_what_to_save(folder):
    (folder / "tokenizer.json").unlink()
    assert "save it there with tokenizer.save_pretrained" in refused(
        models.load, folder
    )


def test_a_missing_shard_is_named_and_is_no_pickle(folder):
    family("llama").build().save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink()
    victim = sorted(folder.glob("*.safetensors"))[1]
    victim.unlink()
    said = refused(models.load, folder)
    assert victim.name in said
    assert "download it again" in said
    assert "pickle" not in said


@pytest.mark.parametrize(
    "lacking",
    [
        {"missing_keys": {"head.weight"}},
        {"mismatched_keys": {("head.weight", torch.Size([2]), torch.Size([3]))}},
    ],
    ids=["absent", "of another shape"],
)
def test_what_transformers_would_make_up_is_refused_where_it_only_reports_it(lacking):
    report = {"missing_keys": set(), "mismatched_keys": set(), "unexpected_keys": set()}
    check_weights("tiny", report)
    said = refused(check_weights, "tiny", report | lacking)
    assert "tiny lacks weights (1, first" in said
    assert "head.weight" in said


@pytest.mark.parametrize(
    ("error", "fix"),
    [
        (MemoryError(), "free some memory"),
        (MemoryError("Cannot allocate memory (os error 12)"), "free some memory"),
        (
            RuntimeError(
                "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4"
                " bytes"
            ),
            "free some memory",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
            "free some memory",
        ),
        (OSError(28, "No space left on device"), "free some disk space"),
        (
            SafetensorError("I/O error: No space left on device (os error 28)"),
            "free some disk space",
        ),
    ],
)
def test_too_little_room_is_not_the_files_fault(folder, error, fix, monkeypatch):
    def full(*_, **__):
        raise error

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", full)
    said = refused(models.load, folder)
    assert fix in said
    assert "check its files" not in said


def test_a_lora_beside_a_model_is_refused(folder):
    """transformers merges it in silence where peft is installed, and not where it is
    not.
    """
    (folder / "adapter_config.json").write_text("{}")
    assert "merge it with peft" in refused(models.load, folder)


@pytest.mark.parametrize("name", ["adapter_model.bin", "../tiny/model.safetensors", 7])
def test_weights_that_a_config_names_are_safetensors_of_its_folder(folder, name):
    torch.save(load_file(folder / "model.safetensors"), folder / "adapter_model.bin")
    config = json.loads((folder / "config.json").read_text()) | {
        "transformers_weights": name
    }
    (folder / "config.json").write_text(json.dumps(config))
    assert "take transformers_weights out" in refused(models.load, folder)


def test_a_config_of_a_million_layers_is_refused_at_once(folder):
    config = json.loads((folder / "config.json").read_text()) | {
        "num_hidden_layers": 10**6
    }
    (folder / "config.json").write_text(json.dumps(config))
    for function in (models.load, models.load_config):
        assert "num_hidden_layers = 1000000" in refused(function, folder)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("./absent", "there is no ./absent here"),
        ("absent/model.gguf", "there is no absent/model.gguf here"),
        ("/absent/config.json", "there is no /absent/config.json here"),
        (Path("a/b/c"), "there is no a/b/c here"),
        ("org/unknown", "cannot load org/unknown"),
        ("not a name", "cannot load not a name"),
    ],
)
def test_an_unknown_model_is_refused_in_one_line(spec, says):
    for function in (models.load, models.load_config, identity.identify):
        assert says in refused(function, spec)


def test_without_a_network_a_hub_id_names_what_works_without():
    for function in (models.load, models.load_config, identity.identify):
        assert "without a network give a folder" in refused(function, "org/unknown")


@pytest.mark.parametrize(
    ("spec", "near"),
    [
        ("smolm2", "smollm2"),
        ("lama-2-7b", "llama-2-7b"),
        ("models/tinny", "tiny"),
        ("models/tinny.gguf", "tiny.gguf"),
        ("./models/tinny", "tiny"),
    ],
)
def test_a_misspelt_model_names_the_one_that_is_like_it(
    tmp_path, monkeypatch, spec, near
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    (tmp_path / "models" / "tiny.gguf").touch()
    for function in (models.load_config, identity.identify):
        assert f"(did you mean {near}?)" in refused(function, spec)
    assert "did you mean" not in refused(models.load_config, "org/unknown")


def test_what_is_no_model_is_refused(folder):
    assert "is a shape without weights" in refused(models.load, "llama-2-7b")
    assert "is no model" in refused(models.load, folder / "config.json")
    assert "no revisions" in refused(models.load, folder, revision="v1")


@pytest.mark.skipif(
    not TRANSFORMERS_4, reason="transformers 5 reads its own RoPE settings"
)
def test_transformers_4_refuses_rope_settings_that_it_would_ignore(folder):
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6}
    (folder / "config.json").write_text(json.dumps(config))
    for function in (models.load, models.load_config):
        assert "saved by transformers 5" in refused(function, folder)


# --- device and dtype ---


def test_auto_is_the_fastest_here():
    device = models.resolve_device()
    assert device.type == ("cuda" if torch.cuda.is_available() else device.type)
    fast = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert models.resolve_dtype("auto", torch.device("cpu")) == (
        torch.bfloat16 if fast else torch.float32
    )


@pytest.mark.parametrize("name", ["tpu9", "cuda:99", "", "privateuseone"])
def test_a_device_that_is_not_here_is_refused(name):
    assert "give cpu, cuda" in refused(models.resolve_device, name)


def test_an_unknown_dtype_is_refused(folder):
    assert "give auto, float32, bfloat16, float16" in refused(
        models.load, folder, dtype="int3"
    )


# --- configs and models without weights ---


def test_a_config_needs_no_weights(folder):
    (folder / "model.safetensors").unlink()
    expected = family("llama").build().config
    for spec in (folder, str(folder / "config.json")):
        config = models.load_config(spec)
        assert type(config) is type(expected)
        assert (config.hidden_size, config.num_hidden_layers) == (32, 4)


@pytest.mark.parametrize(
    ("shape", "parameters"),
    [
        ("llama-2-7b", 6_738_415_616),
        ("llama-2-13b", 13_015_864_320),
        ("llama-2-70b", 68_976_648_192),
    ],
)
def test_shapes_have_the_papers_sizes_and_take_no_memory(shape, parameters):
    model = weightless.build_empty(models.load_config(shape))
    assert sum(weight.numel() for weight in model.parameters()) == parameters
    assert {
        tensor.device.type for tensor in (*model.parameters(), *model.buffers())
    } == {"meta"}


@pytest.mark.parametrize(
    "name", ["llama", "qwen2", "gemma2", "gemma3", "gpt2", "mixtral"]
)
def test_dummy_weights_make_a_model_that_runs(name):
    real = family(name).build()
    build = {"dtype": torch.float32, "device": "cpu"}
    model, same = (weightless.build_random(real.config, **build) for _ in range(2))
    assert not model.training
    assert logits(model).isfinite().all()
    assert torch.equal(logits(model), logits(same))
    assert not torch.equal(
        logits(model), logits(weightless.build_random(real.config, **build, seed=1))
    )
    shapes = {key: weight.shape for key, weight in real.state_dict().items()}
    assert {key: weight.shape for key, weight in model.state_dict().items()} == shapes
    buffers = dict(model.named_buffers())
    for key, buffer in AutoModelForCausalLM.from_config(real.config).named_buffers():
        assert torch.equal(buffers[key], buffer), key
    tied = [
        m.get_input_embeddings().weight is m.get_output_embeddings().weight
        for m in (real, model)
    ]
    assert tied[0] == tied[1]


def test_dummy_matrices_repeat_no_row_and_take_the_dtype():
    config = models.load_config("llama-2-7b")
    config.update({"num_hidden_layers": 1, "vocab_size": 4096})
    model = weightless.build_random(config, dtype=torch.bfloat16, device="cpu")
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    for weight in model.parameters():
        assert weight.dim() == 1 or len(weight.unique(dim=0)) == len(weight)


def test_dummy_weights_that_do_not_fit_are_refused(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    config = family("llama").build().config
    monkeypatch.setattr(torch.Tensor, "split", full)  # by which a matrix is filled
    assert "give a smaller dtype" in refused(
        weightless.build_random, config, dtype=torch.float32, device="cpu"
    )


# --- GGUF ---


def test_a_gguf_file_gives_its_model_and_tokenizer(gguf, cache):
    model, tokenizer = models.load(gguf, dtype="float32", device="cpu")
    torch.testing.assert_close(
        logits(model), logits(family("llama").build(vocab_size=len(WORDS)))
    )
    base = (
        model.config.rope_theta
        if TRANSFORMERS_4
        else model.config.rope_parameters["rope_theta"]
    )
    assert base == 10_000
    pieces = [
        "t",
        "he",
        "ĠĠ",
        "1",
        "2",
        "ĊĊ",
        "3",
        "Ġthe",
        "<|im_end|>",
    ]  # digits alone, whole runs of space
    encoded = tokenizer("the  12\n\n3 the<|im_end|>")
    assert tokenizer.convert_ids_to_tokens(encoded["input_ids"]) == pieces
    assert tokenizer.decode(encoded["input_ids"]) == "the  12\n\n3 the<|im_end|>"
    assert sorted(encoded) == ["attention_mask", "input_ids"]
    special = (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
        tokenizer.unk_token_id,
    )
    assert special == (1, 2, 2, 0)
    assert (
        tokenizer.apply_chat_template(
            [{"role": "user", "content": "hi"}], tokenize=False
        )
        == "hi"
    )


def test_a_gguf_file_is_copied_once(gguf, cache, monkeypatch):
    models.load(gguf)
    (copy,) = (found for found in (cache / "gguf").iterdir() if found.is_dir())
    assert str(gguf.parent) not in (copy / "config.json").read_text()
    monkeypatch.setattr(gguf_copies, "_write_plain_copy", None)
    models.load(gguf)
    models.load(gguf.rename(gguf.with_name("other.gguf")))  # the same bytes


def test_the_config_of_a_gguf_file_makes_no_copy(gguf, cache):
    config = models.load_config(gguf)
    assert (config.hidden_size, config.num_hidden_layers) == (32, 4)
    assert not (cache / "gguf").exists()
    models.load(gguf)
    assert models.load_config(gguf).hidden_size == 32


def test_those_who_want_a_copy_at_once_share_it(gguf, monkeypatch):
    write, calls = gguf_copies._write_plain_copy, []

    def slowly(*paths):
        calls.append(paths)
        time.sleep(0.2)
        write(*paths)

    monkeypatch.setattr(gguf_copies, "_write_plain_copy", slowly)
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(gguf_copies.convert_gguf, [gguf] * 4))
    assert len(calls) == 1
    assert (folders.pop() / "model.safetensors").is_file()


def test_a_copy_that_was_killed_is_made_again(gguf):
    folder = gguf_copies.converted_folder(gguf)
    with files.temporary(folder) as partial, subprocess.Popen(["true"]) as ended:
        ended.wait()
    partial = partial.with_name(
        partial.name.replace(f".{os.getpid()}.", f".{ended.pid}.")
    )
    partial.mkdir(parents=True)
    (partial / "config.json").write_text("{")
    (partial / "half of it").touch()
    models.load(gguf)
    assert not partial.exists()
    assert not (folder / "half of it").exists()


def test_a_copy_that_fails_leaves_nothing(gguf, cache, monkeypatch):
    def full(_, folder):
        folder.mkdir()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf_copies, "_write_plain_copy", full)
    said = refused(models.load, gguf)
    assert "No space left on device" in said
    assert "set NOTALL_CACHE" in said
    assert not any(found.is_dir() for found in (cache / "gguf").iterdir())


def test_a_bad_gguf_file_is_refused(gguf, tmp_path):
    model = family("llama").build(vocab_size=len(WORDS))
    lacking = write_gguf(
        model, tmp_path / "lacking.gguf", without="blk.1.attn_v.weight"
    )
    assert "lacks weights (1, first model.layers.1.self_attn.v_proj.weight)" in refused(
        models.load, lacking
    )
    whole = gguf.read_bytes()
    for bad in (whole[: len(whole) // 2], b"no GGUF at all", b""):
        gguf.write_bytes(bad)
        for function in (models.load, models.load_config):
            assert re.search("cannot load|no whole GGUF file", refused(function, gguf))


def test_a_cache_that_cannot_be_made_names_the_variable(gguf, monkeypatch):
    monkeypatch.setenv("NOTALL_CACHE", str(gguf / "cache"))
    for function in (models.load, models.load_config, identity.identify):
        assert "set NOTALL_CACHE" in refused(function, gguf)


def test_without_a_home_directory_the_message_says_what_to_set(gguf, monkeypatch):
    monkeypatch.delenv("NOTALL_CACHE")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda _: {}["nobody"])
    for function in (models.load, models.load_config, identity.identify):
        assert "set NOTALL_CACHE" in refused(function, gguf)
        assert "write the path without ~" in refused(function, "~/tiny")
    assert "write the path without ~" in refused(read_text, "~/book.txt")


# --- identify ---


def test_a_folder_is_known_by_its_weights_wherever_it_is(folder, tmp_path, monkeypatch):
    first = identity.identify(folder)
    assert first["model"] == "tiny"
    assert first["revision"].startswith("sha256:")
    (folder / "README.md").touch()
    (tmp_path / "elsewhere").mkdir()
    moved = folder.rename(tmp_path / "elsewhere" / "tiny")
    monkeypatch.chdir(moved)
    assert identity.identify(".") == first
    weights = load_file("model.safetensors")
    weights["lm_head.weight"][0, 0] += 1
    save_file(weights, "model.safetensors", {"format": "pt"})
    assert identity.identify(".")["revision"] != first["revision"]


def test_a_folder_is_known_by_its_config_too(folder):
    """The same weights with another constant in their norms are another model."""
    first = identity.identify(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    assert identity.identify(folder)["revision"] != first["revision"]


def test_a_file_and_a_shape_are_known(gguf):
    digest = hashlib.sha256(gguf.read_bytes()).hexdigest()
    assert identity.identify(gguf) == {
        "model": "tiny.gguf",
        "revision": f"sha256:{digest}",
    }
    assert identity.identify("llama-2-7b") == {
        "model": "llama-2-7b",
        "revision": "built-in",
    }


@pytest.mark.slow
def test_a_hub_model_is_known_by_its_commit(folder, tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    stored = tmp_path / "hub" / "models--org--tiny"
    (stored / "refs").mkdir(parents=True)
    (stored / "refs" / "main").write_text(commit)
    (stored / "snapshots").mkdir()
    folder.rename(stored / "snapshots" / commit)
    program = (
        "from api import identity, loading; print(identity.identify('org/tiny'),"
        " loading.load('org/tiny')[0].num_parameters())"
    )
    environment = os.environ | {
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-c", program]
    ran = subprocess.run(
        command,
        cwd=Path(__file__).parent,
        env=environment,
        capture_output=True,
        text=True,
    )
    parameters = family("llama").build().num_parameters()
    assert (
        ran.stdout == f"{{'model': 'org/tiny', 'revision': '{commit}'}} {parameters}\n"
    ), ran.stderr


def test_a_hash_is_computed_again_only_for_another_file(tmp_path, cache, monkeypatch):
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    assert digests.digest_of_file(file) == hashlib.sha256(b"one").hexdigest()
    with monkeypatch.context() as patch:
        read = Path.open
        patch.setattr(
            Path,
            "open",
            lambda path, *how, **more: path != file and read(path, *how, **more),
        )
        assert digests.digest_of_file(file) == hashlib.sha256(b"one").hexdigest()
    (note,) = (cache / "sha256").glob("*/*")
    other = hashlib.sha256(b"two").hexdigest().encode()
    for torn in (b"", b"2d", b"\xff" * 64, other, other + other[:-1] + b"_"):
        note.write_bytes(torn)
        assert (
            digests.digest_of_file(file)
            == note.read_text()[64:]
            == hashlib.sha256(b"one").hexdigest()
        )
    file.write_bytes(b"two")
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    assert digests.digest_of_file(file) == hashlib.sha256(b"two").hexdigest()


@pytest.mark.parametrize("way", ["in place", "renamed over"])
def test_a_file_of_the_same_size_and_date_is_another_one(tmp_path, way):
    file, other = tmp_path / "weights.gguf", tmp_path / "other.gguf"
    file.write_bytes(b"one")
    date = file.stat()
    assert digests.digest_of_file(file) == hashlib.sha256(b"one").hexdigest()
    target = file if way == "in place" else other
    time.sleep(0.05)  # clocks of file systems tick every few milliseconds
    target.write_bytes(b"two")
    os.utime(target, ns=(date.st_atime_ns, date.st_mtime_ns))  # as cp -p and rsync do
    target.replace(file)
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (
        date.st_size,
        date.st_mtime_ns,
    )
    assert digests.digest_of_file(file) == hashlib.sha256(b"two").hexdigest()


def test_a_tokenizer_that_cannot_be_used_is_refused_before_anything_runs(tmp_path):
    folder = save_tiny_checkpoint(tmp_path / "tiny")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": {}}))
    with pytest.raises(
        UsageError, match=r"cannot load .*'>' not supported .*; check its files"
    ):
        models.load(folder)


# --- the default model ---


def test_the_default_model_is_the_one_we_know(default_model):
    model, _ = default_model
    assert model.num_parameters() == 134_515_008
    revision = "sha256:b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    assert identity.identify() == {"model": "smollm2", "revision": revision}


def test_the_default_tokenizer_is_the_one_we_know(default_model):
    _, tokenizer = default_model
    ids = [
        19556,
        905,
        216,
        33,
        34,
        35,
        36,
        37,
        28,
        357,
        506,
        256,
        34,
        5600,
        1116,
        35,
        15236,
        79,
        6299,
    ]
    assert (
        tokenizer("Hello world 12345, it's  2 spaces\n\n3foo_bar")["input_ids"] == ids
    )
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")


def test_the_default_model_answers(default_model):
    model, tokenizer = default_model
    question = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(
        question, tokenize=False, add_generation_prompt=True
    )
    encoded = tokenizer(text, return_tensors="pt")
    output = model.generate(**encoded, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(
        output[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True
    )
    assert answer == "The capital of France is Paris."


def test_the_default_models_nll_is_the_one_we_know(default_model):
    model, tokenizer = default_model
    text = (
        "When in the course of human events it becomes necessary for one people to"
        " dissolve their bands"
    )
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        nll = model(ids, labels=ids).loss.item()
    assert nll == pytest.approx(4.45246, abs=1e-3)


@pytest.mark.slow  # of a tiny model test_grid compares all lines each time
@torch.no_grad()
def test_the_default_models_lines_equal_zeroed_output_projections(default_model):
    """All 19 plans on the real model, against plain transformers with zeros in o_proj
    and down_proj.
    """
    model, tokenizer = default_model
    tokens = tokenizer(
        "Attention is all you need, but you do not need all of it.", return_tensors="pt"
    )["input_ids"]
    rows = paper_grid(locate(model))
    found = score(model, [row.plan for row in rows[1:]], tokens)
    dense = model(tokens).logits[:, :-1].log_softmax(-1)
    for row, scores in zip(rows, found):
        logits = _zeroed(model, row.plan, tokens)[:, :-1]
        assert scores.nll[0] == pytest.approx(
            float(cross_entropy(logits[0], tokens[0, 1:])), rel=1e-4
        )
        kl = (dense.exp() * (dense - logits.log_softmax(-1))).sum(-1).mean()
        assert scores.kl[0] == pytest.approx(float(kl), rel=1e-3, abs=1e-5)
    golden = {
        row.name: summarize(scores, found[0]).nll for row, scores in zip(rows, found)
    }
    for name, nll in GOLDEN.items():
        assert golden[name] == pytest.approx(nll, rel=2e-3), golden


# Of the sentence above, float32, on the default model.
GOLDEN = {
    "dense": 2.9261,
    "attention 10%": 3.0632,
    "MLP 10%": 4.1516,
    "block 10%, last layer kept": 11.6462,
}


def _zeroed(model, plan: Plan, tokens):
    kept = {}
    layers = model.model.layers
    for weight in (
        *(layers[i].self_attn.o_proj.weight for i in plan.attention),
        *(layers[i].mlp.down_proj.weight for i in plan.mlp),
    ):
        kept[weight] = weight.clone()
        weight.zero_()
    logits = model(tokens).logits
    for weight, before in kept.items():
        weight.copy_(before)
    return logits
