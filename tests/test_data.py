"""Problems of mathematics: fields, gold answers, filters, splits, files out of reach; and their prompts."""

import http.server
import json
import threading

import huggingface_hub
import pytest
from helpers import config_of
from mathematics import GSM8K, MATH, tokenizer, write

import data
from grading import GraderError
from rewards import is_equal
from support.config import UserError


def test_sets_as_their_owners_publish_them(tmp_path):
    problems, unusable = data.read_problems(write(tmp_path / "gsm8k.jsonl", GSM8K))
    assert not unusable and [problem["answer"] for problem in problems[:2]] == ["119", "162"]
    assert problems[0]["problem"] == GSM8K[0]["question"] and problems[-1]["answer"] == f"{26 * 63 - 24:,}" == "1,614"
    problems, unusable = data.read_problems(write(tmp_path / "math.jsonl", MATH))
    assert not unusable and problems[0] == {
        "problem": "Find the root of $7x - 2 = 0$ as a fraction.", "answer": r"\frac{2}{7}", "level": 1,
        "subject": "Number Theory",
    }
    others = [
        {"problem": "1+1?", "solution": r"It is \boxed{3}, no.", "answer": "2", "subject": "Algebra", "level": 3},
        # MATH-500
        {"problem": "27?", "answer": 27.0}, {"problem": "big", "answer": 10**22 + 1},
        {"problem": "0.1?", "answer": 0.1}, {"problem": "25?", "answer": "025"}, {"Problem": "9?", "Answer": 9},
        # AMC, AIME
        {"prompt": "Half?", "answer": None, "solution": r"\boxed{\frac{1}{2}}", "level": "Level ?"},
    ]
    problems, _ = data.read_problems(write(tmp_path / "others.jsonl", others))
    assert [problem["answer"] for problem in problems] == ["2", "27", str(10**22 + 1), "0.1", "025", "9",
                                                           r"\frac{1}{2}"]
    assert (problems[0]["level"], problems[0]["subject"], problems[-1]["level"]) == (3, "Algebra", None)
    assert is_equal("25", problems[4]["answer"])


def test_a_byte_order_mark_line_ends_and_odd_line_separators(tmp_path):
    (tmp_path / "p.jsonl").write_bytes(b"\xef\xbb\xbf" + '{"problem": "a\u2028b", "answer": "1"}\r\n\r\n'.encode() * 2)
    problems, _ = data.read_problems(str(tmp_path / "p.jsonl"))
    assert [problem["problem"] for problem in problems] == ["a\u2028b"] * 2


def test_fields_may_be_named(tmp_path):
    file = write(tmp_path / "p.jsonl", [{"text": "1+1?", "gold": 2, "answer": "a distractor"}])
    problems, _ = data.read_problems(file, problem_field="text", answer_field="gold")
    assert problems == [{"problem": "1+1?", "answer": "2", "level": None, "subject": ""}]
    with pytest.raises(UserError, match=r'p.jsonl, line 1 .*no "problem".* text, gold, answer.*data.problem_field='):
        data.read_problems(file)


@pytest.mark.parametrize(
    "row, words",
    [({"problem": 5, "answer": "1"}, '"problem" must be text, not 5'),
     ({"problem": "", "answer": "1"}, '"problem" must be'),
     ({"problem": "x", "answer": [1]}, r'"answer" must be text or a number, not \[1\]'), ([1], "no JSON object"),
     ({"problem": "x", "answer": float("nan")}, "text or a number, not NaN"), ({"problem": "\ud800"}, "must be text"),
     ({"problem": "x", "answer": True}, '"answer" must be text or a number, not true'),
     ({"answer": "1"}, 'no "problem"'),
     ({"numbers": [1], "target": 1}, "do not go into one file"), ({}, "its fields are none")],
)
def test_wrong_types_name_file_and_line(tmp_path, row, words):
    file = write(tmp_path / "p.jsonl", [{"problem": "1+1?", "answer": "2"}, row])
    with pytest.raises(UserError, match=rf"p\.jsonl, line 2 is no problem: .*{words}"):
        data.read_problems(file)


def test_rows_without_a_gold_answer_are_counted_and_named(tmp_path):
    empty = [{"problem": "a", "answer": ""}, {"problem": "b"}, {"problem": "c", "solution": r"so \boxed{}"},
             {"problem": "d", "solution": "prose alone"}, {"problem": "e", "answer": None}]
    file = write(tmp_path / "p.jsonl", [*MATH[:3], *empty, *MATH[3:]])
    problems, unusable = data.read_problems(file)
    assert len(problems) == len(MATH) and unusable == [f"line {i}" for i in range(4, 9)]
    *_, notes = data.problem_sets(config_of(f"data={file}"))
    places = "line 4, line 5, line 6, line 7, line 8"
    assert notes[0] == f"5 rows of {file} have no usable gold answer and are left out: {places}"
    with pytest.raises(UserError, match="no problem.* gold answer"):
        data.read_problems(write(tmp_path / "empty.jsonl", empty))


def test_filter():
    problem = {"problem": "x", "answer": "1", "level": 3, "subject": "Number Theory"}
    for conditions in ("", "level=3", "level=1-3", "level=1, 3", "subject=number theory",
                       "subject=Algebra,Number Theory",
                       "level=3-5; subject=Number Theory"):
        assert data.matches(problem, conditions), conditions
    for conditions in ("level=4-5", "level=1,2", "subject=Algebra", "level=3; subject=Algebra"):
        assert not data.matches(problem, conditions), conditions
    assert not data.matches(problem | {"level": None}, "level=1-5")
    for conditions in ("level", "colour=red", "level=high", "level="):
        with pytest.raises(UserError, match="data.filter="):
            data.matches(problem, conditions)


def test_training_and_evaluation_never_overlap(tmp_path):
    file = write(tmp_path / "math.jsonl", MATH)
    training, heldout, notes = data.problem_sets(config_of(f"data={file}", "data.validation=0.3"))
    heldout = heldout["auto"]
    assert len(training) + len(heldout) == len(MATH) and 3 < len(heldout) < 16
    assert f"{len(heldout)} of 30 problems" in notes[0]
    shuffled = write(tmp_path / "again.jsonl", MATH[::-1])
    again = data.problem_sets(config_of(f"data={shuffled}", "data.validation=0.3"))
    assert again[1] == {"auto": heldout[::-1]}  # the problem decides, not the file or its order
    filtered = data.problem_sets(config_of(f"data={file}", "data.validation=0.3", "data.filter=subject=Algebra"))
    assert filtered[1]["auto"] == [problem for problem in heldout if problem["subject"] == "Algebra"]

    with pytest.raises(UserError, match="filter=level=9 leaves no problem.* 1, 2, 3, 4, 5, .*Algebra, Number"):
        data.problem_sets(config_of(f"data={file}", "data.filter=level=9"))

    same = [row | {"solution": "x", "answer": "0", "problem": row["problem"].replace(" ", " \n ")} for row in MATH[:4]]
    other = write(tmp_path / "other.jsonl", [*same, *GSM8K[:3]])  # spaces make no other problem
    training, heldout, notes = data.problem_sets(config_of(f"data={file}", f"evaluation.data={other}"))
    assert len(heldout[str(other)]) == 7 and len(training) == 26
    assert "4 of 30 problems" in notes[0] and "evaluation.data" in notes[0]
    several = config_of(f"data={file}", f"evaluation.data=[{other},auto]", "data.validation=0.3")
    training, heldout, notes = data.problem_sets(several)
    assert list(heldout) == [str(other), "auto"] and "4 of 30" in notes[0] and "of 26 problems" in notes[1]
    assert len(training) + len(heldout["auto"]) == 26
    (tmp_path / "more").mkdir()
    twice = write(tmp_path / "more" / "other.jsonl", GSM8K), write(tmp_path / "more-other.jsonl", GSM8K)
    with pytest.raises(UserError, match="called the same"):
        data.problem_sets(config_of(f"data={file}", f"evaluation.data=[{twice[0]},{twice[1]}]"))
    with pytest.raises(UserError, match="data.validation=0.0 .*evaluation.data=FILE"):
        data.problem_sets(config_of(f"data={file}", "data.validation=0.0"))


def test_a_file_on_the_web(tmp_path):
    write(tmp_path / "math.jsonl", MATH[:2])

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(tmp_path))

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        place = f"http://127.0.0.1:{server.server_port}"
        assert len(data.read_problems(f"{place}/math.jsonl")[0]) == 2
        with pytest.raises(UserError, match=rf"{place}/no.jsonl .*404.*local path"):
            data.read_problems(f"{place}/no.jsonl")
        server.shutdown()
    with pytest.raises(UserError, match=r"https://127.0.0.1:1/p.jsonl .*local path"):
        data.read_problems("https://127.0.0.1:1/p.jsonl")


def test_a_file_on_the_hub(monkeypatch):
    asked = []

    class Hub:
        def read_bytes(self, path):
            asked.append(path)
            if "gone" in path:
                raise ConnectionError("no route")
            return json.dumps(MATH[0]).encode()

    monkeypatch.setattr(huggingface_hub, "HfFileSystem", Hub)
    assert data.read_problems("hf://datasets/owner/name/test.jsonl")[0][0]["answer"] == r"\frac{2}{7}"
    assert asked == ["hf://datasets/owner/name/test.jsonl"]
    with pytest.raises(UserError,
                       match=r"hf://datasets/owner/gone/test.jsonl \(ConnectionError: no route\).*local path"):
        data.read_problems("hf://datasets/owner/gone/test.jsonl")


def test_json_and_parquet_hold_the_same_rows(tmp_path):
    from pyarrow import parquet, table  # slow to import: not for the tests beside this one

    expected = data.read_problems(write(tmp_path / "p.jsonl", MATH))
    (tmp_path / "list.json").write_text(json.dumps(MATH, indent=1))
    (tmp_path / "object.json").write_text(json.dumps({"version": 1, "data": MATH}))
    columns = {key: [str(row[key]) for row in MATH] for key in MATH[0]}
    parquet.write_table(table(columns), tmp_path / "p.parquet")
    for name in ("list.json", "object.json", "p.parquet"):
        assert data.read_problems(str(tmp_path / name)) == expected, name
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "p.parquet").read_bytes()[:-9])
    (tmp_path / "two.json").write_text('{"a": [], "b": []}')
    for name, words in (("cut.parquet", "cannot read"), ("two.json", "holds 2 lists of rows")):
        with pytest.raises(UserError, match=f"{name}.*{words}|{words}.*{name}"):
            data.read_problems(str(tmp_path / name))


def test_a_data_set_of_the_hub_by_its_name(tmp_path, monkeypatch):
    """The library takes a folder for a data set of that name: no network is needed."""
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "owner" / "name").mkdir(parents=True)
    write(tmp_path / "owner" / "name" / "train.jsonl", MATH)
    write(tmp_path / "owner" / "name" / "test.jsonl", MATH[:2])
    problems, _ = data.read_problems("owner/name@train")
    assert [problem["answer"] for problem in problems] == [
        problem["answer"] for problem in data.read_problems("owner/name/train.jsonl")[0]]
    config = config_of("benchmarks.math500=owner/name@test")
    assert len(data.problems_of(config, "math500")[0]) == 2
    with pytest.raises(UserError, match=r"owner/name@no \(ValueError: Unknown split.*local path"):
        data.read_problems("owner/name@no")


@pytest.mark.parametrize("content", [b"", b"\xff\xfe{\x00}\x00", b"\x1f\x8b\x08\x00\x00", b"\x00" * 99, b"[" * 10**6,
                                     b'{"problem": "a", "answer": ' + b"9" * 10**6 + b"}", b"version https://git-lfs",
                                     b'{"problem": "1+1?", "answer": "2", "answer": "3"}', b'{"numbers": [1e999]}'])
def test_files_that_are_no_data(tmp_path, content):
    for name in ("p.jsonl", "p.json", "p.parquet"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError) as caught:
            data.read_problems(str(tmp_path / name))
        assert name in str(caught.value) and len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 500


def test_verdicts():
    problem = {"problem": "Half?", "answer": r"\frac{1}{2}", "level": None, "subject": ""}
    for text, right in ((r"so \boxed{0.5}", True), (r"\boxed{1/2}, not \boxed{2}", False), ("", False)):
        assert data.is_correct(problem, text, "exact") == right
        assert data.is_correct(problem, text, "math_verify") == right
    assert not data.is_correct(problem, "so it is $1/2$", "exact")
    assert data.is_correct(problem, "so it is $1/2$", "math_verify")
    assert not data.is_correct(problem, "so it is $1/3$", "math_verify")


def test_a_grader_that_does_not_start_is_a_mistake_of_the_user(monkeypatch):
    def grade(text, gold):
        raise GraderError("the library does not start")

    monkeypatch.setitem(data.GRADERS, "math_verify", grade)
    with pytest.raises(UserError, match="^reward.grader=math_verify: the library does not start$"):
        data.is_correct({"problem": "1?", "answer": "1"}, "1", "math_verify")


def test_answers_that_count_as_one():
    problem = {"problem": "Half?", "answer": r"\frac{1}{2}", "level": None, "subject": ""}

    def answer(text, grader="exact"):
        return data.answer_of(problem, text, grader)

    assert answer(r"\boxed{0.5}") == answer(r"thus \boxed{\frac{2}{4}}")
    assert answer("no box") == answer("none") != answer(r"\boxed{2}")
    assert answer("it is 1", "math_verify") != answer("it is 2", "math_verify")


PROBLEM = {"problem": r"What is $\frac{4}{2}$, {dear}?", "answer": "2", "level": None, "subject": ""}


def test_prompts_go_through_the_chat_template_or_the_plain_one():
    config = config_of("prompt.system=Think.")
    chat, plain = tokenizer("qwen", chat=True), tokenizer("qwen", chat=False)
    assert chat.decode(data.prompt_ids(chat, [PROBLEM], config.prompt)[0]) == (
        "<|im_start|>system\nThink.<|im_end|>\n<|im_start|>user\n" + config.prompt.math.replace("{problem}",
                                                                                                PROBLEM["problem"])
        + "<|im_end|>\n<|im_start|>assistant\n")
    assert r"$\frac{4}{2}$, {dear}?" in chat.decode(data.prompt_ids(chat, [PROBLEM], config.prompt)[0])
    assert plain.decode(data.prompt_ids(plain, [PROBLEM], config.prompt)[0]) == config.prompt.plain.replace(
        "{problem}", PROBLEM["problem"])
    own = chat.decode(data.prompt_ids(chat, [PROBLEM], config_of().prompt)[0])
    assert own.startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>")  # what the template itself says
    llama = tokenizer("llama", chat=True)
    ids = data.prompt_ids(llama, [PROBLEM], config.prompt)[0]
    assert ids.count(llama.bos_token_id) == 1 and ids[0] == llama.bos_token_id  # the template's, and no second one
    llama = tokenizer("llama", chat=False)
    ids = data.prompt_ids(llama, [PROBLEM], config.prompt)[0]
    assert ids.count(llama.bos_token_id) == 1 and ids[0] == llama.bos_token_id  # the tokenizer's own
