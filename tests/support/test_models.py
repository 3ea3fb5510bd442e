"""Models: families, what is refused in one line, stop tokens, chat templates."""

import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from helpers import ALONE, config_of, tiny_model
from mathematics import folder, tokenizer
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2ForCausalLM,
)

import data
from rollout import rescore, sample
from support import models
from support.config import UserError
from toy import make_tokenizer

# ---------------------------------------------------------------- families

USUAL = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    tie_word_embeddings=True,
)
GROUPED = USUAL | dict(num_key_value_heads=2)
WINDOWS = dict(sliding_window=6, layer_types=["sliding_attention", "full_attention"])
FAMILIES = {
    "Qwen2": GROUPED,
    "Qwen3": GROUPED | dict(head_dim=8),
    "Llama": GROUPED | dict(tie_word_embeddings=False),
    "Mistral": GROUPED | dict(sliding_window=6),
    "Gemma": GROUPED | dict(head_dim=8),
    "Gemma3Text": GROUPED | dict(head_dim=8) | WINDOWS,
    "GPT2": dict(n_embd=32, n_layer=2, n_head=4, n_positions=128),
    "GPTNeoX": USUAL,
    "Olmo2": GROUPED,
    "SmolLM3": GROUPED,
}


def make_family(path, family):
    """Save a random model of a family whose distributions are not flat."""
    words = tokenizer("qwen", chat=False)
    torch.manual_seed(0)
    special = dict(eos_token_id=1, pad_token_id=0, bos_token_id=None)
    length = dict(max_position_embeddings=128) if family != "GPT2" else {}
    config_class = getattr(transformers, f"{family}Config")
    shape = config_class(vocab_size=len(words), **special, **length, **FAMILIES[family])
    model = AutoModelForCausalLM.from_config(shape)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    model.save_pretrained(path)
    words.save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_sampled_and_scored(family, tmp_path):
    """Recorded log-probabilities are the model's own, row by row, whatever its positions, windows
    and scales.
    """
    name = make_family(tmp_path / "model", family)
    policy, _ = models.load(name)
    config = config_of("micro_batch_tokens=60", "logits_chunk=7")
    prompts = []
    for i in range(12):
        prompts += [[2 + i % 3] * (2 + i % 3)] * 2
    settings = dict(stop=[1], max_new_tokens=10, seed=0, step=0, batch_size=7, segment=3)
    rollout = sample(policy, prompts, list(range(24)), **settings)
    for row, prompt in enumerate(prompts):
        completion = rollout.tokens[row, : rollout.lengths[row]]
        tokens = torch.cat([torch.tensor(prompt), completion])[None]
        with torch.no_grad():
            logits = policy(tokens).logits
            from_hidden = policy.get_output_embeddings()(models.hidden_states(policy, tokens))
        assert torch.equal(logits, from_hidden)
        logprobs = logits[0, len(prompt) - 1 : -1].log_softmax(dim=-1)
        expected = logprobs.gather(1, completion[:, None]).squeeze(1)
        recorded = rollout.logprobs[row, : len(completion)]
        torch.testing.assert_close(recorded, expected, rtol=0, atol=2e-4)
    scored = rescore(policy, rollout, config, ALONE)
    torch.testing.assert_close(scored.logprobs, rollout.logprobs, rtol=0, atol=2e-4)

    blank, _ = models.load_blank(name)
    assert {p.device.type for p in blank.parameters()} == {"meta"}
    shapes = {key: p.shape for key, p in policy.named_parameters()}
    assert {key: p.shape for key, p in blank.named_parameters()} == shapes
    assert blank.generation_config.eos_token_id == policy.generation_config.eos_token_id


@pytest.mark.parametrize("family", ["Qwen2", "Mistral", "Gemma3Text", "GPT2"])
def test_a_common_beginning_is_read_once(family, tmp_path, monkeypatch):
    """Hidden states and gradients are those of whole rows, which checkpointing still needs."""
    model, _ = models.load(make_family(tmp_path / "model", family))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, 300, (5, 31), generator=generator)
    tokens[:, :20] = tokens[0, :20]
    direction = torch.randn(31, 32, generator=generator)
    read = []
    model.get_input_embeddings().register_forward_hook(
        lambda *call: read.append(call[1][0].numel())
    )

    def states_and_gradient():
        model.zero_grad()
        hidden = models.hidden_states(model, tokens)
        (hidden.tanh() * direction).sum().backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        return hidden.detach(), torch.cat(gradients)

    hidden, gradient = states_and_gradient()
    assert read == [20, 55]
    with monkeypatch.context() as patch:
        patch.setattr(models, "LONG_PREFIX", 21)
        whole_hidden, whole_gradient = states_and_gradient()
    torch.testing.assert_close(hidden, whole_hidden, rtol=1e-5, atol=1e-5)
    assert (gradient - whole_gradient).norm() < 3e-6 * whole_gradient.norm()
    model.train().activation_checkpointing_enable({"use_reentrant": False})
    checkpointed_hidden, checkpointed_gradient = states_and_gradient()
    assert torch.equal(checkpointed_hidden, whole_hidden)
    assert (checkpointed_gradient - whole_gradient).norm() < 3e-6 * whole_gradient.norm()
    assert set(read[2:]) == {155}
    tokens[:] = tokens[0]  # equal rows leave the last token
    with torch.no_grad():
        states = models.hidden_states(model.eval(), tokens)
    assert read[-2:] == [30, 5]
    torch.testing.assert_close(states[3], states[0])
    models.hidden_states(model, tokens[:1])
    assert read[-1] == 31


def test_nothing_waits_for_tokens_that_are_not_on_the_cpu():
    """A comparison of meta tensors cannot be read, and a GPU would have to wait for it."""
    model = tiny_model()
    model.base_model.forward = lambda tokens, use_cache: SimpleNamespace(last_hidden_state=tokens)
    tokens = torch.zeros(5, 31, dtype=torch.long, device="meta")
    assert models.hidden_states(model, tokens) is tokens


def test_bf16_weights_have_fp32_logits(tmp_path):
    model, _ = models.load(folder(tmp_path, "qwen2", chat=False), torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(torch.arange(8)[None]).logits.dtype == torch.float32


@pytest.mark.parametrize(
    "make",
    [
        lambda: GPT2LMHeadModel(
            GPT2Config(
                vocab_size=40,
                n_embd=16,
                n_layer=1,
                n_head=2,
                resid_pdrop=0.5,
                embd_pdrop=0.5,
                attn_pdrop=0.5,
            )
        ),
        lambda: tiny_model(attention_dropout=0.5),
        lambda: MixtralForCausalLM(
            MixtralConfig(
                vocab_size=40,
                num_local_experts=4,
                router_jitter_noise=0.5,
                **GROUPED | dict(tie_word_embeddings=False),
            )
        ),
    ],
    ids=["of modules", "of functions", "of routers"],
)
def test_dropout_is_off_whatever_its_name(tmp_path, make):
    make().save_pretrained(tmp_path)
    make_tokenizer(20).save_pretrained(tmp_path)
    model, _ = models.load(str(tmp_path))
    tokens = torch.arange(10)[None]
    assert torch.equal(model.train()(tokens).logits, model(tokens).logits)


def test_a_fingerprint_tells_weights_apart(tmp_path):
    name = folder(tmp_path, "qwen2", chat=False)
    model, _ = models.load(name)
    other, _ = models.load(name)
    assert models.fingerprint(model) == models.fingerprint(other)
    with torch.no_grad():
        other.model.norm.weight[3] += 1e-6
    assert models.fingerprint(model) != models.fingerprint(other)
    assert models.fingerprint(model.bfloat16()) != models.fingerprint(other)
    same, _ = models.load(shutil.copytree(name, tmp_path / "copy"))
    other, _ = models.load(name)
    assert models.fingerprint(same) == models.fingerprint(other)
    other.config.rms_norm_eps *= 2
    assert models.fingerprint(same) != models.fingerprint(other)


def test_prompts_and_completions_must_fit_the_context():
    shape = SimpleNamespace(max_position_embeddings=10)
    models.check_lengths(shape, [[1], [1, 2, 3]], 7)
    with pytest.raises(UserError, match="max_new_tokens=8: .* longest prompt of 3 tokens"):
        models.check_lengths(shape, [[1], [1, 2, 3]], 8)


# ---------------------------------------------------------------- what is refused


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return Path(folder(tmp_path_factory.mktemp("models") / "whole", "qwen2", chat=False))


def tensors(change):
    """Return a function that changes the tensors of a folder."""

    def apply(path):
        weights = load_file(path / "model.safetensors")
        change(weights)
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})

    return apply


def setting(**changes):
    """Return a function that changes the config.json of a folder."""

    def apply(path):
        shape = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(shape | changes))

    return apply


def content(text, name="model.safetensors"):
    return lambda path: (path / name).write_bytes(text)


def pickle_alone(path):
    (path / "model.safetensors").unlink()
    torch.save({}, path / "pytorch_model.bin")


def own_code(path):
    setting(auto_map={"AutoModelForCausalLM": "modeling.Evil", "AutoConfig": "modeling.Evil"})(path)
    (path / "modeling.py").write_text("open('executed', 'w')\nEvil = None\n")


def soft_cap(path):
    shape = USUAL | dict(head_dim=8, num_key_value_heads=2, vocab_size=400)
    model = Gemma2ForCausalLM(Gemma2Config(**shape, final_logit_softcapping=3.0))
    model.save_pretrained(path)


def several_parts(path):
    parts = {"text_config": {"vocab_size": 40}, "vision_config": {"hidden_size": 32}}
    Gemma3Config(**parts).save_pretrained(path)


NORM = "model.norm.weight"
BIAS = "model.layers.1.self_attn.q_proj.bias"
REFUSED = {
    "two missing": (
        tensors(lambda t: (t.pop(NORM), t.pop(BIAS))),
        f"missing_keys ['{BIAS}', '{NORM}']",
    ),
    "one too many": (tensors(lambda t: t.update(x=torch.ones(3))), "unexpected_keys ['x']"),
    "another shape": (
        tensors(lambda t: t.update({NORM: torch.ones(31)})),
        f"mismatched_keys [\"('{NORM}', ",
    ),
    "NaN": (tensors(lambda t: t[NORM][:1].fill_(torch.nan)), "damaged: not finite"),
    "cut": (lambda path: os.truncate(path / "model.safetensors", 20_000), "cannot be loaded"),
    "garbage": (content(b"garbage " * 100), "cannot be loaded"),
    "pickle alone": (pickle_alone, "it needs config.json, tokenizer.json and model.safetensors"),
    "code": (own_code, "brings its own code (auto_map in config.json), which is never run"),
    "another architecture": (
        setting(model_type="llama", architectures=["LlamaForCausalLM"]),
        "unexpected_keys",
    ),
    "more layers": (
        setting(num_hidden_layers=3, layer_types=None),
        "missing_keys ['model.layers.2.",
    ),
    "unknown architecture": (setting(model_type="nosuch"), "cannot be loaded"),
    "several parts": (several_parts, "multimodal model (gemma3): give a model for text only"),
    "soft cap": (soft_cap, "changes its logits after the vocabulary projection"),
    "garbage tokenizer": (content(b"{", "tokenizer.json"), "cannot be loaded"),
    "large tokenizer": (setting(vocab_size=300), "its tokenizer has 400 tokens and the model only"),
}


@pytest.mark.parametrize("damage, words", REFUSED.values(), ids=REFUSED)
def test_a_model_that_is_not_whole_is_refused(whole, tmp_path, monkeypatch, capfd, damage, words):
    monkeypatch.chdir(tmp_path)
    path = Path(shutil.copytree(whole, tmp_path / "model"))
    damage(path)
    with pytest.raises(UserError) as caught:
        models.load(str(path))
    line = str(caught.value)
    assert line.startswith(f"model={path}")
    assert words in line
    assert "\n" not in line
    assert capfd.readouterr() == ("", "")
    assert not Path("executed").exists()
    assert "modeling" not in sys.modules


def test_shards_that_are_not_all_there_are_refused(whole, tmp_path):
    path = tmp_path / "sharded"
    model, words = models.load(str(whole))
    model.save_pretrained(path, max_shard_size="40KB")
    words.save_pretrained(path)
    assert models.fingerprint(models.load(str(path))[0]) == models.fingerprint(model)
    (path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match="^model=[^\n]* cannot be loaded [^\n]*$"):
        models.load(str(path))


def test_tensors_without_an_effect_may_be_there_or_not(whole, tmp_path):
    """The projection of tied embeddings, and the rotary frequencies that old files hold."""
    path = Path(shutil.copytree(whole, tmp_path / "model"))
    expected = models.load(str(path))[0].state_dict()

    def change(weights):
        assert "lm_head.weight" not in weights
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        for layer in range(2):
            weights[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    tensors(change)(path)
    for name, weight in models.load(str(path))[0].state_dict().items():
        assert torch.equal(weight, expected[name])


def test_logits_that_are_not_those_of_the_hidden_states_are_refused(whole, monkeypatch):
    """Also where no field of the config says so."""
    forward = Qwen2ForCausalLM.forward

    def scaled(self, *arguments, **named):
        output = forward(self, *arguments, **named)
        output.logits = 1.5 * output.logits
        return output

    monkeypatch.setattr(Qwen2ForCausalLM, "forward", scaled)
    with pytest.raises(UserError, match="changes its logits after the vocabulary projection"):
        models.load(str(whole))


def test_a_name_that_the_hub_does_not_give_is_one_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for load in (models.load, models.load_blank):
        with pytest.raises(
            UserError, match="^model=owner/name cannot be loaded [^\n]*network[^\n]*$"
        ):
            load("owner/name")


# ---------------------------------------------------------------- stop tokens


def without_template(eos_token_id):
    return SimpleNamespace(eos_token_id=eos_token_id, chat_template=None, get_added_vocab=dict)


def test_stop_ids_are_those_of_the_model_and_of_the_tokenizer():
    model = tiny_model()
    for eos, expected in ((1, [1, 9]), ([1, 5], [1, 5, 9]), (None, [9])):
        model.generation_config.eos_token_id = eos
        assert models.stop_ids(model, without_template(9)) == expected
    with pytest.raises(UserError, match="the model has no stop token"):
        models.stop_ids(model, without_template(None))


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize(
    "family, ends",
    [("qwen", ["<|endoftext|>", "<|im_end|>"]), ("llama", ["<|end_of_text|>", "<|eot_id|>"])],
)
def test_the_end_of_a_turn_and_of_a_text_both_stop(family, ends, chat):
    words = tokenizer(family, chat=chat)
    eos = SimpleNamespace(eos_token_id=words.eos_token_id)
    stop = models.stop_ids(SimpleNamespace(generation_config=eos), words)
    assert stop == sorted(words.convert_tokens_to_ids(ends))
    assert all(repr(end) in models.describe_ids(stop, words) for end in ends)


def test_stop_ids_are_saved_with_the_model(tmp_path):
    """Also if transformers refuses to save its generation settings, as those of Llama 2: a
    temperature without do_sample.
    """
    source = folder(tmp_path / "model", "llama", chat=False)
    settings = {"temperature": 0.6, "bos_token_id": 3, "pad_token_id": 4, "eos_token_id": 5}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(settings))
    model, _ = models.load(source)
    models.set_stop(model, [5, 6])
    model.save_pretrained(tmp_path / "saved")
    saved = GenerationConfig.from_pretrained(tmp_path / "saved")
    assert (saved.eos_token_id, saved.bos_token_id, saved.pad_token_id) == ([5, 6], 3, 4)
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.6, eos_token_id=5)
    models.set_stop(model, [5])
    assert model.generation_config.temperature == 0.6
    assert model.generation_config.eos_token_id == [5]


# ---------------------------------------------------------------- chat templates


def test_a_template_that_prints_the_date_prints_the_same_tomorrow():
    words = tokenizer("qwen", chat=True)
    date = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b') %}"
    words.chat_template = date + "{% endif %}Today is {{ date_string }}."
    assert models.render_chat(words, [{"role": "user", "content": "?"}]) == "Today is 26 Jul 2024."


@pytest.mark.parametrize(
    "error", ["{{ raise_exception('no system role') }}", "{{ 1 / 0 }}", "{% x"]
)
def test_a_template_that_fails_is_one_line(error):
    """Such as Gemma's, which refuses a system message."""
    words = tokenizer("qwen", chat=True)
    turn = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    condition = "{% if messages[0].role == 'system' %}"
    words.chat_template = f"{condition}{error}{{% endif %}}{turn}"
    problem = {"problem": r"What is $\frac{4}{2}$, {dear}?", "answer": "2"}
    if error != "{% x":
        ids = data.prompt_ids(words, [problem], config_of().prompt)[0]
        assert words.decode(ids).endswith("<|im_end|>")
    with pytest.raises(UserError, match="chat template refuses the prompt [^\n]*prompt.system"):
        data.prompt_ids(words, [problem], config_of("prompt.system=Think.").prompt)
