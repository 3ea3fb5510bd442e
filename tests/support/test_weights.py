"""Weights of a model folder: whole, or refused in one line; nothing is made up."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from mathematics import folder
from safetensors.torch import load_file, save_file

from support import models
from support.config import UserError

NORM, BIAS = "model.norm.weight", "model.layers.1.self_attn.q_proj.bias"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "made"
    return Path(folder(path, "qwen2", chat=False))


@pytest.fixture(scope="module")
def sharded(made):
    model, words = models.load(str(made))
    model.save_pretrained(made.with_name("sharded"), max_shard_size="40KB")
    words.save_pretrained(made.with_name("sharded"))
    return made.with_name("sharded")


def tensors(change):
    def apply(path):
        found = load_file(path / "model.safetensors")
        change(found)
        save_file(found, path / "model.safetensors", metadata={"format": "pt"})
    return apply


def setting(**changes):
    def apply(path):
        shape = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(shape | changes))
    return apply


def content(data, name="model.safetensors"):
    return lambda path: (path / name).write_bytes(data)


def pickled(path):
    (path / "model.safetensors").unlink()
    torch.save({}, path / "pytorch_model.bin")


def bad_header(path):
    content = bytearray((path / "model.safetensors").read_bytes())
    content[0:8] = (2**62).to_bytes(8, "little")
    (path / "model.safetensors").write_bytes(content)


def own_code(path):
    setting(auto_map={"AutoModelForCausalLM": "modeling.Evil", "AutoConfig": "modeling.Evil"})(path)
    (path / "modeling.py").write_text("open('executed', 'w')\nEvil = None\n")


REFUSED = {
    "two missing": (tensors(lambda t: (t.pop(NORM), t.pop(BIAS))), f"2 not there ({BIAS}, {NORM})"),
    "embeddings missing": (tensors(lambda t: t.pop("model.embed_tokens.weight")), "model.embed_tokens.weight"),
    "none": (tensors(lambda t: t.clear()), "not there ("),
    "one too many": (tensors(lambda t: t.update(other=torch.ones(3))), "1 not this model's (other)"),
    "another layer": (tensors(lambda t: t.update({NORM.replace("norm", "layers.2.norm"): torch.ones(3)})), "layers.2."),
    "another shape": (tensors(lambda t: t.update({NORM: torch.ones(31)})), f"1 of another shape ({NORM} [31] for ["),
    "NaN": (tensors(lambda t: t[NORM][:1].fill_(torch.nan)), "its logits are not finite"),
    "empty": (content(b""), "header too small"),
    "cut": (lambda path: os.truncate(path / "model.safetensors", 20_000), "file not fully covered"),
    "cut in the header": (lambda path: os.truncate(path / "model.safetensors", 200), "invalid header length"),
    "longer": (lambda path: (path / "model.safetensors").open("ab").write(b"1234"), "file not fully covered"),
    "garbage": (content(b"garbage " * 100), "header too large"),
    "a header of 4 EiB": (bad_header, "header too large"),
    "a pointer": (content(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"), "header too large"),
    "pickle alone": (pickled, "no file named model.safetensors"),
    "no weights": (lambda path: (path / "model.safetensors").unlink(), "no file named model.safetensors"),
    "code": (own_code, "brings code of its own (auto_map in its config.json)"),
    "another architecture": (setting(model_type="llama", architectures=["LlamaForCausalLM"]), "not this model's ("),
    "more layers": (setting(num_hidden_layers=3, layer_types=None), "not there (model.layers.2."),
    "fewer layers": (setting(num_hidden_layers=1, layer_types=None), "not this model's (model.layers.1."),
    "unknown architecture": (setting(model_type="nosuch"), "cannot be loaded"),
    "garbage config": (content(b"\x80garbage", "config.json"), "cannot be loaded"),
    "garbage tokenizer": (content(b"{", "tokenizer.json"), "cannot be loaded"),
    "empty tokenizer": (content(b"{}", "tokenizer.json"), "cannot be loaded"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_weights_that_are_not_whole_are_refused(made, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    path = Path(shutil.copytree(made, tmp_path / "model"))
    damage, words = REFUSED[case]
    damage(path)
    with pytest.raises(UserError) as refused:
        models.load(str(path))
    told = str(refused.value)
    assert told.startswith(f"model={path}") and words in told and "\n" not in told and refused.value.status == 2
    assert not Path("executed").exists() and "modeling" not in sys.modules


SECOND = "model-00002-of-00003.safetensors"


def half_an_index(path):
    file = path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"] = {key: shard for key, shard in index["weight_map"].items() if shard != SECOND}
    file.write_text(json.dumps(index))


SHARDS = {
    "a shard missing": (lambda path: (path / SECOND).unlink(), "No such file or directory: "),
    "a shard cut": (lambda path: os.truncate(path / SECOND, 99), "invalid header length"),
    "an index of nothing": (content(b"{}", "model.safetensors.index.json"), "cannot be loaded"),
    "an index of garbage": (content(b"[", "model.safetensors.index.json"), "cannot be loaded"),
    "an index of half the shards": (half_an_index, "not there ("),
    "no index": (lambda path: (path / "model.safetensors.index.json").unlink(), "no file named model.safetensors"),
}


@pytest.mark.parametrize("case", SHARDS)
def test_shards_that_are_not_all_there_are_refused(sharded, tmp_path, case):
    path = Path(shutil.copytree(sharded, tmp_path / "model"))
    damage, words = SHARDS[case]
    assert models.load(str(path))
    damage(path)
    with pytest.raises(UserError) as refused:
        models.load(str(path))
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_what_is_known_to_be_idle_may_be_there_or_not(made, tmp_path):
    """The head of tied embeddings, and the rotary frequencies that old files hold."""
    path = Path(shutil.copytree(made, tmp_path / "model"))
    assert "lm_head.weight" not in load_file(path / "model.safetensors")
    expected = models.load(str(path))[0].state_dict()
    for layer in (0, 1):
        name = f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"
        tensors(lambda t, name=name: t.update({name: torch.ones(4)}))(path)
    tensors(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))(path)
    for name, weight in models.load(str(path))[0].state_dict().items():
        assert torch.equal(weight, expected[name])


def test_a_digest_tells_weights_apart(made):
    model, other = (models.load(str(made))[0] for _ in range(2))
    assert models.digest(model) == models.digest(other)
    with torch.no_grad():
        other.model.norm.weight[3] += 1e-6
    assert models.digest(model) != models.digest(other)
    assert models.digest(model.bfloat16()) != models.digest(other)
