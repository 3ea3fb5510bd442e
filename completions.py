"""An evaluation's completions on disk: drawn in chunks, kept as they come, read back.

evaluations/<model>--<data>-<label>/completions.jsonl, the label a checksum of all that the draws depend on. Every file
begins with a line that holds a checksum of the rest: what a crash or an editor changed is drawn anew, or refused.
"""

import json
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

import data
import rollout
import step as steps
from support import distributed, models
from support.config import print_notes, require
from support.files import file_name, replace_text
from support.processes import only_one

STEP = -1  # the `step` of every evaluation's draws: no training step has it, and all models face the same noise


@dataclass
class Completions:
    """n samples of each of P problems, problem by problem."""

    problems: list[dict]  # [P]
    rows: list[dict]  # [P * n], as `lines_of` writes them
    samples: int

    @classmethod
    def parse(cls, problems: list[dict], text: str, samples: int) -> "Completions":
        rows = []
        for line in text.splitlines():
            rows.append(json.loads(line))  # lists of numbers would take ten times the memory of arrays
            rows[-1]["entropies"] = np.array(rows[-1]["entropies"], dtype=np.float32)
        return cls(problems, rows, samples)

    def drop_entropies(self) -> None:
        """What is left takes little memory."""
        for row in self.rows:
            del row["entropies"]

    def column(self, name: str) -> np.ndarray:
        """[P, n]"""
        return np.array([row[name] for row in self.rows]).reshape(-1, self.samples)

    def of(self, problem: int) -> list[dict]:
        return self.rows[problem * self.samples : (problem + 1) * self.samples]


def sample_and_grade(model, tokenizer, problems, prompts, rows, world, config, *, samples, seed, progress):
    """Rows (problem * samples + sample) drawn and graded: the rollout, correct [len(rows)] bool, and the texts."""
    with world.autocast():
        sampled = rollout.sample(
            model, [prompts[row // samples] for row in rows], list(rows), stop=models.stop_ids(model, tokenizer),
            max_new_tokens=config.max_new_tokens, temperature=config.temperature, seed=seed, step=STEP,
            batch_size=config.rollout.batch_size, segment=config.rollout.segment, progress=progress)
    asked = [problems[row // samples] for row in rows]
    return sampled, *steps.grade(tokenizer, asked, sampled, config.reward.grader)


def settings_of(path: str, file: str, model, tokenizer, problems, prompts, world, config) -> dict:
    """All that a completion and its verdict depend on."""
    asked = [problems, prompts, models.stop_ids(model, tokenizer)]
    settings = {"model": path, "weights": models.digest(model), "data": file, "asked": crc(json.dumps(asked)),
                "grader": config.reward.grader, "batch_size": config.rollout.batch_size, "precision": world.precision}
    return settings | {key: getattr(config, key) for key in ("seed", "max_new_tokens", "temperature", "samples")}


def draw(path: str, file: str, model, tokenizer, problems, world, config) -> Completions:
    """Every completion of one model on one problem file, drawn as far as it is not there yet.

    Rows go in chunks of several batches, each a file of its own once it is done: a kill loses the chunks in hand. A
    chunk is always the same rows together, so that a kill changes no byte, and the number of ranks no draw.
    """
    prompts = data.prompt_ids(tokenizer, problems, config.prompt)
    models.check_lengths(model.config, prompts, config.max_new_tokens)
    settings = settings_of(path, file, model, tokenizer, problems, prompts, world, config)
    folder = Path("evaluations") / f"{file_name(path)}--{file_name(file)}-{crc(json.dumps(settings))}"
    done = folder / "completions.jsonl"
    with only_one(folder / "lock", world.rank):
        if not distributed.from_main(world.is_main and done.is_file()):
            rows, batch = range(len(problems) * config.samples), config.rollout.batch_size
            size = max(batch, min(8 * batch, len(rows) // 8))  # long chunks wait less; each rank has its share of 8
            chunks = [rows[first : first + size] for first in range(0, len(rows), size)]
            parts = [folder / f"part-{i:06d}.jsonl" for i in range(len(chunks))]
            draw_chunks(chunks, parts, model, tokenizer, problems, prompts, world, config)
            if world.is_main:
                whole = [read(part) for part in parts]
                require(all(header for header, _ in whole), f"{folder} has parts that cannot be read: give the command "
                                                            "again")
                write(done, settings, "".join(text for _, text in whole))
                for part in parts:
                    part.unlink()
        distributed.barrier()
        header, text = read(done)
        require(header is not None, f"{done} is damaged: delete its folder, to have it drawn anew")
    return Completions.parse(problems, text, config.samples)


def draw_chunks(chunks, parts, model, tokenizer, problems, prompts, world, config) -> None:
    """This rank's chunks, each into its part."""
    mine = range(world.rank, len(chunks), world.size)
    with tqdm(total=sum(len(chunks[i]) for i in mine), desc=parts[0].parent.name, unit="sample",
              disable=world.no_bar) as bar:
        for i in mine:
            rows, part = chunks[i], parts[i]
            header = {"rows": [rows.start, rows.stop]}
            if part.is_file() and read(part)[0] == header:
                bar.update(len(rows))
                continue
            print_notes([f"{part} is damaged: drawn anew"] * part.is_file())
            sampled, correct, texts = sample_and_grade(model, tokenizer, problems, prompts, rows, world, config,
                                                       samples=config.samples, seed=config.seed, progress=bar.update)
            write(part, header, lines_of(rows, sampled, texts, correct, config.samples))
    distributed.barrier()


def lines_of(rows, sampled, texts, correct, samples: int) -> str:
    """One JSON object a completion; entropies (to 1e-5 nats) are what d_collapse is made of."""
    lines = []
    for i, (row, mask) in enumerate(zip(rows, sampled.mask)):
        entropies = [round(h, 5) for h in sampled.entropy[i][mask].tolist()]
        lines.append(json.dumps({
            "problem": row // samples, "sample": row % samples, "text": texts[i], "correct": bool(correct[i]),
            "length": len(entropies), "stopped": bool(sampled.stopped[i]),
            "entropy": round(sum(entropies) / len(entropies), 5), "entropies": entropies,
        }) + "\n")
    return "".join(lines)


def crc(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


def write(file: Path, header: dict, text: str) -> None:
    replace_text(file, json.dumps(header | {"crc": crc(text)}) + "\n" + text)


def read(file: Path) -> tuple[dict | None, str]:
    """The header without its checksum, and the rest; (None, "") where the two do not fit."""
    try:
        first, _, text = file.read_text(encoding="utf-8").partition("\n")
        header = json.loads(first)
        if header.pop("crc") == crc(text):
            return header, text
    except (OSError, ValueError, KeyError, AttributeError, RecursionError):
        pass
    return None, ""
