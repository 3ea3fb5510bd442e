"""Tests of data.py: Countdown, problem files and their errors, held-out problems, and prompts."""

import random
import sys
from types import SimpleNamespace

import pytest
from helpers import config_of, write_jsonl
from mathematics import GSM8K, MATH, tokenizer
from tokenizers.processors import TemplateProcessing

import data
import evaluate
from rewards import is_equal
from support.config import UserError

COUNTDOWN = {"numbers": 4, "largest": 20, "limit": 99}

# ---------------------------------------------------------------- Countdown


def test_random_chains_stay_in_range():
    rng = random.Random(0)
    for _ in range(1000):
        problem, chain = data.random_chain(rng, **COUNTDOWN)
        results = [int(step.split("=")[1]) for step in chain.split(",")]
        assert all(0 <= result <= 99 for result in results)
        assert results[-1] == problem["target"]
        assert all(1 <= number <= 20 for number in problem["numbers"])


def test_training_never_meets_a_heldout_problem():
    heldout = {data.problem_key(p) for p in data.countdown(300, heldout=True, **COUNTDOWN)}
    training = {data.problem_key(p) for p in data.countdown(5000, heldout=False, **COUNTDOWN)}
    assert len(heldout) == 300
    assert len(training) == 5000
    assert not heldout & training


def test_the_split_ignores_the_order_of_the_numbers():
    rng = random.Random(0)
    for _ in range(200):
        problem, _ = data.random_chain(rng, **COUNTDOWN)
        shuffled = rng.sample(problem["numbers"], 4)
        assert data.is_heldout(shuffled, problem["target"]) == data.is_heldout(**problem)


def test_too_few_countdown_problems_are_an_error():
    with pytest.raises(UserError, match="fewer than 100"):
        data.countdown(100, heldout=True, numbers=2, largest=2, limit=4)


# ---------------------------------------------------------------- files and data sets


def test_sets_as_their_authors_publish_them(tmp_path):
    problems = data.read_problems(write_jsonl(tmp_path / "gsm8k.jsonl", GSM8K))
    assert [problem["answer"] for problem in problems[:2]] == ["119", "162"]
    assert problems[0]["problem"] == GSM8K[0]["question"]
    assert problems[-1]["answer"] == "1,614"
    problems = data.read_problems(write_jsonl(tmp_path / "math.jsonl", MATH))
    assert problems[0] == {
        "problem": "Find the root of $7x - 2 = 0$ as a fraction.",
        "answer": r"\frac{2}{7}",
    }
    others = [
        {
            "problem": "1+1?",
            "solution": r"It is \boxed{3}, no.",
            "answer": "2",  # MATH-500
            "subject": "Algebra",
            "level": 3,
        },
        {"problem": "27?", "answer": 27.0},  # AMC, AIME
        {"problem": "big", "answer": 10**22 + 1},
        {"problem": "0.1?", "answer": 0.1},
        {"problem": "25?", "answer": "025"},
        {"Problem": "9?", "Answer": 9},
        {"prompt": "Half?", "answer": None, "solution": r"\boxed{\frac{1}{2}}"},
    ]
    problems = data.read_problems(write_jsonl(tmp_path / "others.jsonl", others))
    answers = [problem["answer"] for problem in problems]
    assert answers == ["2", "27", str(10**22 + 1), "0.1", "025", "9", r"\frac{1}{2}"]
    assert is_equal("25", answers[4])


def test_a_byte_order_mark_and_odd_line_ends(tmp_path):
    line = '{"problem": "a\u2028b", "answer": "1"}\r\n\r\n'.encode()
    (tmp_path / "p.jsonl").write_bytes(b"\xef\xbb\xbf" + 2 * line)
    problems = data.read_problems(str(tmp_path / "p.jsonl"))
    assert [problem["problem"] for problem in problems] == ["a\u2028b"] * 2


@pytest.mark.parametrize(
    "row, words",
    [
        ({"problem": 5, "answer": "1"}, '"problem" must be text, not 5'),
        ({"problem": "", "answer": "1"}, '"problem" must be text'),
        ({"problem": "\ud800"}, '"problem" must be text'),
        ({"problem": "x", "answer": [1]}, '"answer" must be text or a number'),
        ({"problem": "x", "answer": float("nan")}, '"answer" must be text or a number'),
        ({"problem": "x", "answer": True}, '"answer" must be text or a number'),
        ({"answer": "1"}, 'no "problem"'),
        ({}, "its fields are none"),
        ([1], "not a JSON object"),
        ({"numbers": [1], "target": 1}, "cannot be in one file"),
        ({"numbers": [], "target": 1}, '"numbers"'),
        ({"numbers": [1.5], "target": 1}, '"numbers"'),
        ({"numbers": [True], "target": 1}, '"numbers"'),
        ({"numbers": [1e999], "target": 1}, '"numbers"'),
        ({"numbers": [1]}, '"target"'),
        ({"numbers": "12", "target": 1}, '"numbers"'),
    ],
)
def test_a_wrong_row_is_named_by_file_and_line(tmp_path, row, words):
    file = write_jsonl(tmp_path / "p.jsonl", [{"problem": "1+1?", "answer": "2"}, row])
    with pytest.raises(UserError, match=rf"p\.jsonl, line 2 is not a problem: .*{words}"):
        data.read_problems(file)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"{",
        b"[" * 10**6,
        b"\xff\xfe{\x00}\x00",
        b"\x1f\x8b\x08\x00\x00",
        b"\x00" * 99,
        b'{"problem": "a", "answer": ' + b"9" * 10**6 + b"}",
        b"version https://git-lfs",
    ],
)
def test_a_file_that_holds_no_problems_is_an_error_in_one_line(tmp_path, content):
    (tmp_path / "p.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=r"p\.jsonl") as caught:
        data.read_problems(str(tmp_path / "p.jsonl"))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_rows_without_a_gold_answer_are_left_out_with_a_note(tmp_path, capsys):
    empty = [
        {"problem": "a", "answer": ""},
        {"problem": "b"},
        {"problem": "c", "solution": r"so \boxed{}"},
        {"problem": "d", "solution": "prose alone"},
        {"problem": "e", "answer": None},
    ]
    file = write_jsonl(tmp_path / "p.jsonl", [*MATH[:3], *empty, *MATH[3:]])
    assert len(data.read_problems(file)) == len(MATH)
    places = "line 4, line 5, line 6, line 7, line 8"
    notes = capsys.readouterr().err
    assert (
        notes == f"note: 5 rows of {file} have no usable gold answer and are left out: {places}\n"
    )
    with pytest.raises(UserError, match="no problem with a gold answer"):
        data.read_problems(write_jsonl(tmp_path / "empty.jsonl", empty))


def test_other_files_and_hub_data_sets_are_loaded_by_datasets(tmp_path, monkeypatch):
    """The library takes a local folder for a data set of that name, so no network is needed."""
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "owner" / "name").mkdir(parents=True)
    expected = data.read_problems(write_jsonl(tmp_path / "owner" / "name" / "train.jsonl", MATH))
    write_jsonl(tmp_path / "owner" / "name" / "test.jsonl", MATH[:2])
    table = datasets.Dataset.from_list(MATH)
    table.to_parquet(tmp_path / "p.parquet")
    for source in ("owner/name@train", "p.parquet"):
        assert data.read_problems(source) == expected, source
    monkeypatch.setitem(data.BENCHMARKS, "math500", "owner/name@test")
    assert data.read_problems("math500") == expected[:2]
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "p.parquet").read_bytes()[:-9])
    for source in ("owner/name@no", "cut.parquet"):
        with pytest.raises(
            UserError, match=f"{source} cannot be loaded .*check the name"
        ) as caught:
            data.read_problems(source)
        assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="p.parquet: pip install datasets"):
        data.read_problems("p.parquet")


@pytest.mark.parametrize(
    "source, words",
    [
        ("no.jsonl", "cannot be read"),
        ("no.parquet", "no such file"),
        ("owner/name:x", "owner/name@split"),
        ("problems", "no such file"),
    ],
)
def test_a_missing_source_is_named(source, words):
    with pytest.raises(UserError, match=f"{source}.*{words}"):
        data.read_problems(source)


# ---------------------------------------------------------------- training and held-out problems


def load(*arguments):
    return data.load_problems(config_of(*arguments, "prompts_per_step=4"))


def test_training_and_evaluation_never_overlap(tmp_path, capsys):
    file = write_jsonl(tmp_path / "math.jsonl", MATH)
    training, heldout = load(f"data={file}", "validation_fraction=0.3")
    assert len(training) + len(heldout["auto"]) == len(MATH)
    assert 3 < len(heldout["auto"]) < 16
    assert f"{len(heldout['auto'])} of 30 problems" in capsys.readouterr().err
    reverse = write_jsonl(
        tmp_path / "reverse.jsonl", MATH[::-1]
    )  # the problem decides, not the order
    assert load(f"data={reverse}", "validation_fraction=0.3")[1] == {"auto": heldout["auto"][::-1]}

    same = []  # spaces and another answer do not make another problem
    for row in MATH[:4]:
        same.append({"problem": row["problem"].replace(" ", " \n "), "answer": "0"})
    other = write_jsonl(tmp_path / "other.jsonl", [*same, *GSM8K[:3]])
    capsys.readouterr()
    training, heldout = load(f"data={file}", f"evaluation.data={other}")
    assert len(heldout[other]) == 7
    assert len(training) == 26
    assert "4 of 30 problems" in capsys.readouterr().err
    training, heldout = load(
        f"data={file}", f"evaluation.data=[{other},auto]", "validation_fraction=0.3"
    )
    assert list(heldout) == [other, "auto"]
    assert len(training) + len(heldout["auto"]) == 26


def test_the_spaces_of_a_problem_do_not_change_its_side(tmp_path):
    spaced = [row | {"problem": f" {row['problem']} ".replace(" ", "  ")} for row in MATH]
    file = write_jsonl(tmp_path / "twice.jsonl", MATH + spaced)
    training, heldout = load(f"data={file}", "validation_fraction=0.3")
    sides = [
        {data.problem_key(problem) for problem in side} for side in (training, heldout["auto"])
    ]
    assert not sides[0] & sides[1]
    assert len(heldout["auto"]) % 2 == 0


def test_evaluation_takes_problems_of_the_whole_file_by_hash(tmp_path, capsys):
    """A file sorted by subject must not give one subject; training and evaluate.py agree."""
    file = write_jsonl(
        tmp_path / "sorted.jsonl", [{"problem": str(i), "answer": "1"} for i in range(400)]
    )
    _, heldout = load(f"evaluation.data={file}", "evaluation.problems=40")
    assert f"{file}: 40 of 400 problems, chosen by a hash" in capsys.readouterr().err
    numbers = [int(problem["problem"]) for problem in heldout[file]]
    assert len(set(numbers)) == 40
    assert 120 < sum(numbers) / 40 < 280
    settings = config_of().__dict__ | {"problems": 40}
    assert evaluate.load_file(file, SimpleNamespace(**settings)) == heldout[file]
    reverse = write_jsonl(tmp_path / "sorted.jsonl", data.read_problems(file)[::-1])
    assert load(f"evaluation.data={reverse}", "evaluation.problems=40")[1][file] == heldout[file]


def test_countdown_rows_of_the_heldout_side_are_left_out(tmp_path, capsys):
    problems = data.countdown(30, heldout=True, **COUNTDOWN) + data.countdown(
        50, heldout=False, **COUNTDOWN
    )
    file = write_jsonl(tmp_path / "p.jsonl", problems)
    training, heldout = load(f"data={file}")
    assert training == problems[30:]
    assert len(heldout["auto"]) == 200
    assert all(data.is_heldout(**problem) for problem in heldout["auto"])
    assert "30 of 80 problems" in capsys.readouterr().err
    mine = write_jsonl(tmp_path / "mine.jsonl", problems[:4])
    assert load(f"data={file}", f"evaluation.data={mine}") == (problems[4:], {mine: problems[:4]})


def test_settings_that_leave_no_problems_are_named(tmp_path):
    file = write_jsonl(tmp_path / "math.jsonl", MATH)
    with pytest.raises(UserError, match="validation_fraction=0.0 .*evaluation.data=FILE"):
        load(f"data={file}", "validation_fraction=0")
    with pytest.raises(UserError, match="prompts_per_step=4: there are only 0 problems"):
        load(f"data={file}", f"evaluation.data={file}")


# ---------------------------------------------------------------- prompts

PROBLEM = {"problem": r"What is $\frac{4}{2}$, {dear}?", "answer": "2"}


def test_prompts_use_the_chat_template_or_the_plain_one():
    prompt = config_of("prompt.system=Think.").prompt
    chat = tokenizer("qwen", chat=True)
    plain = tokenizer("qwen", chat=False)
    text = prompt.math.replace("{problem}", PROBLEM["problem"])
    assert r"$\frac{4}{2}$, {dear}?" in text
    assert chat.decode(data.prompt_ids(chat, [PROBLEM], prompt)[0]) == (
        "<|im_start|>system\nThink.<|im_end|>\n"
        f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    )
    text = prompt.plain.replace("{problem}", PROBLEM["problem"])
    assert plain.decode(data.prompt_ids(plain, [PROBLEM], prompt)[0]) == text
    without_system = chat.decode(data.prompt_ids(chat, [PROBLEM], config_of().prompt)[0])
    assert without_system.startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>")
    for with_chat in (True, False):  # one bos: the template's, or the tokenizer's
        llama = tokenizer("llama", chat=with_chat)
        ids = data.prompt_ids(llama, [PROBLEM], prompt)[0]
        assert ids[0] == llama.bos_token_id
        assert ids.count(llama.bos_token_id) == 1


def test_a_plain_prompt_has_not_ended():
    """Some tokenizers write their end of text behind every text."""
    words = tokenizer("qwen", chat=False)
    end = words.eos_token
    words.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, words.eos_token_id)]
    )
    assert words("4").input_ids[-1] == words.eos_token_id
    ids = data.prompt_ids(words, [PROBLEM], config_of().prompt)[0]
    assert words.decode(ids) == config_of().prompt.plain.replace("{problem}", PROBLEM["problem"])


@pytest.mark.parametrize(
    "template, words",
    [
        (
            "{% for part in messages[-1].content %}{{ part.text }}{% endfor %}",
            "does not write the user's message",
        ),
        ("{{ messages[-1].content }}", "ignores prompt.system"),
    ],
)
def test_a_template_that_drops_a_message_is_one_line(template, words):
    chat = tokenizer("qwen", chat=True)
    chat.chat_template = template
    with pytest.raises(UserError, match=words):
        data.prompt_ids(chat, [PROBLEM], config_of("prompt.system=Think.").prompt)


def test_prompts_that_do_not_fit_the_context_are_left_out(tmp_path, capsys):
    plain = tokenizer("qwen", chat=False)
    config = config_of("prompts_per_step=2", "max_new_tokens=100")
    short = PROBLEM | {"problem": "1+1?"}
    problems = [short, PROBLEM | {"problem": 300 * "long "}, short]
    assert data.drop_long_prompts(problems, plain, 256, config) == [short, short]
    assert "2 of 3 problems fit" in capsys.readouterr().err
    with pytest.raises(UserError, match="max_new_tokens=100: .* 0 of 3 problems fit"):
        data.drop_long_prompts(problems, plain, 101, config)
