"""Models: architectures, what is refused, stop tokens, chat templates, a hub out of reach."""

import json
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from helpers import ALONE, config_of, tiny_model
from mathematics import MATH, folder, tokenizer, write
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen2ForCausalLM,
)

import data
import rollout
import toy
import train
from support import config as configs
from support import models
from support.config import UserError

PROBLEM = {"problem": r"What is $\frac{4}{2}$, {dear}?", "answer": "2"}


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "math.jsonl", MATH)
    return tmp_path


# ---------------------------------------------------------------- architectures

GEMMA = dict(vocab_size=40, hidden_size=32, intermediate_size=32, num_hidden_layers=2, head_dim=8,
             num_attention_heads=4,
             num_key_value_heads=1, eos_token_id=1, bos_token_id=None, pad_token_id=0)


@pytest.mark.parametrize("model_class, shape", [
    (GemmaForCausalLM, GemmaConfig(**GEMMA)),
    (Gemma3ForCausalLM,
     Gemma3TextConfig(**GEMMA, sliding_window=4, layer_types=["sliding_attention", "full_attention"])),
], ids=["gemma", "gemma3"])
def test_gemmas_without_soft_caps_are_right(tmp_path, model_class, shape):
    """Scaled embeddings and sliding windows: recorded log-probabilities are the model's own, row by row."""
    torch.manual_seed(0)
    shape.vocab_size = 400
    made = model_class(shape)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(3 if parameter.ndim == 2 else 1)
    made.save_pretrained(tmp_path)
    tokenizer("qwen", chat=False).save_pretrained(tmp_path)
    model, _ = models.load(str(tmp_path))
    prompts = [[2, 3, 4, 5, 6], [7, 8], [9, 10, 11]]
    sampled = rollout.sample(model, prompts, [0, 1, 2], stop=[1], max_new_tokens=14, seed=1, step=0, segment=3)
    for row, prompt in enumerate(prompts):
        length = int(sampled.lengths[row])
        ids = torch.tensor([prompt + sampled.tokens[row, :length].tolist()])
        with torch.no_grad():
            logp = torch.log_softmax(model(ids).logits[0, len(prompt) - 1 : -1].float(), dim=-1)
        own = logp.gather(1, ids[0, len(prompt) :, None]).squeeze(1)
        torch.testing.assert_close(sampled.logprobs[row, :length], own, rtol=1e-3, atol=1e-4)
    scored = rollout.rescore(model, sampled, config_of(), ALONE)
    torch.testing.assert_close(scored.logprobs, sampled.logprobs, rtol=1e-3, atol=1e-4)


def test_a_gemma_with_a_soft_cap_is_refused_with_one_line(in_tmp):
    Gemma2ForCausalLM(Gemma2Config(**GEMMA | {"vocab_size": 400},
                                   final_logit_softcapping=3.0)).save_pretrained("capped")
    tokenizer("qwen", chat=False).save_pretrained("capped")
    with pytest.raises(configs.UserError, match="^model=./capped post-processes its logits[^\n]*$"):
        train.main(configs.training_keys(["model=./capped", "data=math.jsonl", "prompts_per_step=4"]))
    assert not Path("runs").exists()


def test_a_model_that_sees_is_refused(tmp_path):
    folder(tmp_path / "model", "qwen2", chat=True)
    Gemma3Config(text_config={"vocab_size": 40}, vision_config={"hidden_size": 32}).save_pretrained(tmp_path / "model")
    for load in (models.load, models.load_blank):
        with pytest.raises(UserError, match=r"several parts \(gemma3\).*text alone"):
            load(str(tmp_path / "model"))


def test_a_model_that_is_not_in_the_cache_of_a_machine_without_a_network(in_tmp, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(in_tmp / "hf"))
    with pytest.raises(UserError, match=r"^model=owner/name cannot be loaded: [^\n]*check the name and the network"):
        train.main(configs.training_keys(["model=owner/name", "data=math.jsonl", "prompts_per_step=4"]))


@pytest.mark.parametrize("made", [
    lambda: GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0.5, embd_pdrop=0.5,
                                       attn_pdrop=0.5)),
    lambda: tiny_model(attention_dropout=0.5)], ids=["of modules", "of functions"])
def test_dropout_is_off_whatever_its_name(tmp_path, made):
    made().save_pretrained(tmp_path)
    toy.make_tokenizer(20).save_pretrained(tmp_path)
    model, _ = models.load(str(tmp_path))
    tokens = torch.arange(10)[None]
    assert torch.equal(model.train()(tokens).logits, model(tokens).logits)


def test_a_model_without_a_stop_token_is_told():
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=None))
    with pytest.raises(UserError, match="stop token"):
        models.stop_ids(model, SimpleNamespace(eos_token_id=None, chat_template=None, get_added_vocab=dict))


def test_a_model_that_is_to_sample_but_does_not_say_so_can_be_saved(tmp_path):
    """A generation_config.json of temperature without do_sample, as that of Llama 2."""
    source, saved = folder(tmp_path / "model", "llama", chat=False), tmp_path / "saved"
    (Path(source) / "generation_config.json").write_text(json.dumps(
        {"temperature": 0.6, "top_p": 0.9, "bos_token_id": 3, "pad_token_id": 4, "eos_token_id": 5}))
    model, _ = models.load(source)
    models.set_stop(model, [5, 6])
    model.save_pretrained(saved)
    own = GenerationConfig.from_pretrained(saved)
    assert (own.eos_token_id, own.bos_token_id, own.pad_token_id) == ([5, 6], 3, 4)
    own = GenerationConfig(do_sample=True, temperature=0.6, eos_token_id=5)
    model.generation_config = own
    models.set_stop(model, [5])
    assert model.generation_config is own and own.temperature == 0.6


def test_models_that_post_process_logits_are_refused(tmp_path):
    shape = Gemma2Config(vocab_size=40, hidden_size=32, intermediate_size=32, num_hidden_layers=1, head_dim=8,
                         num_attention_heads=4, num_key_value_heads=2, final_logit_softcapping=0.1)
    Gemma2ForCausalLM(shape).save_pretrained(tmp_path)
    toy.make_tokenizer(20).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="post-processes its logits"):
        models.load(str(tmp_path))


def test_logits_that_are_not_those_of_the_hidden_states_are_refused(tmp_path, monkeypatch):
    """Also where no field of the config says so."""
    made = folder(tmp_path, "qwen2", chat=False)
    forward = Qwen2ForCausalLM.forward

    def scaled(self, *arguments, **named):
        output = forward(self, *arguments, **named)
        output.logits = 1.5 * output.logits
        return output

    models.load(made)
    monkeypatch.setattr(Qwen2ForCausalLM, "forward", scaled)
    with pytest.raises(UserError, match="post-processes its logits"):
        models.load(made)


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path):
    made = folder(tmp_path, "qwen2", chat=False, weights=False)
    shape = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(shape | {"vocab_size": shape["vocab_size"] - 1}))
    with pytest.raises(UserError, match=r"its tokenizer has \d+ tokens, the model only \d+"):
        models.load(made)


# ---------------------------------------------------------------- stop tokens and chat templates


def test_stop_ids_are_all_of_the_models_and_the_tokenizers():
    class Tokenizer:
        eos_token_id = 9
        chat_template = None
        get_added_vocab = dict

    model = tiny_model()
    for eos, expected in ((1, [1, 9]), ([1, 5], [1, 5, 9]), (None, [9])):
        model.generation_config.eos_token_id = eos
        assert models.stop_ids(model, Tokenizer) == expected


def test_a_template_that_refuses_a_system_message_is_told():
    words = tokenizer("qwen", chat=True)
    words.chat_template = ("{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
                           "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}")
    assert words.decode(data.prompt_ids(words, [PROBLEM], config_of().prompt)[0]).endswith("<|im_end|>")
    with pytest.raises(UserError, match="no system role.*prompt.system"):
        data.prompt_ids(words, [PROBLEM], config_of("prompt.system=Think.").prompt)


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("family, ends", [("qwen", ["<|endoftext|>", "<|im_end|>"]),
                                          ("llama", ["<|end_of_text|>", "<|eot_id|>"])])
def test_the_end_of_a_turn_and_of_a_text_both_stop(family, ends, chat):
    words = tokenizer(family, chat=chat)
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=words.eos_token_id))
    assert models.stop_ids(model, words) == sorted(words.convert_tokens_to_ids(ends))


LLAMA_31 = "{% if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}Today: {{ date_string }}"
LLAMA_32 = LLAMA_31.replace("'26 Jul 2024'", "strftime_now('%d %b %Y')")


@pytest.mark.parametrize("own", [LLAMA_31, LLAMA_32])
def test_llamas_templates_say_the_same_date_every_day(own):
    words = tokenizer("qwen", chat=True)
    words.chat_template = own
    assert models.from_template(words, [{"role": "user", "content": "?"}]) == "Today: 26 Jul 2024"


def test_a_chat_templates_own_end_of_turn_stops():
    words = tokenizer("qwen", chat=True)
    words.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}<|im_start|>{% endfor %}"
    assert words.convert_tokens_to_ids("<|im_start|>") == models.turn_end(words)
    words.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"  # none: a line break
    assert models.turn_end(words) is None
