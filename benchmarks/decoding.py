"""Tokens per second of text generation, beside ``transformers.generate`` on the same weights.

    python benchmarks/decoding.py [CASE ...] --torch-python .venv-parity/bin/python --output FILE

GPT-2 small and T5 small at their published sizes with random weights, float32, greedily and with 4
beams, 1 and 8 rows; 128 prompt (or source) tokens, 128 new ones, and no end token. Each side runs
in its own process, and both take turns. The first call of each case compiles and is not counted.
torch and transformers can be in another environment than this package (``--torch-python``).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from about import about

PROMPT, NEW_TOKENS, VOCAB = 128, 128, 30_000
"""Tokens of a prompt, new tokens, and the number of ids that prompts are drawn from."""


@dataclass(frozen=True)
class Case:
    model: str
    rows: int
    beams: int

    @property
    def name(self) -> str:
        return f"{self.model}-b{self.rows}-{'greedy' if self.beams == 1 else f'beam{self.beams}'}"


CASES = [Case(m, rows, beams) for m in ("gpt2", "t5") for rows in (1, 8) for beams in (1, 4)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=" ".join(c.name for c in CASES))
    parser.add_argument("--torch-python", default=sys.executable)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="a file for the JSON lines")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        serve(SIDES[options.side], options.folder)
        return
    chosen = [case for case in CASES if not options.cases or case.name in options.cases]
    results = measured(chosen, options.torch_python, options.repeats)
    if options.output:
        options.output.write_text("".join(json.dumps(result) + "\n" for result in results))
    print(table(results))


def measured(cases: list[Case], torch_python: str, repeats: int) -> list[dict[str, Any]]:
    """Seconds of each call, by side, of each case."""
    results = []
    with tempfile.TemporaryDirectory() as folder:
        commands = {"transformers": torch_python, "ours": sys.executable}
        sides = {}
        for side, python in commands.items():  # the first one saves the weights
            arguments = [python, __file__, "--side", side, "--folder", folder]
            sides[side] = subprocess.Popen(
                arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            _answer(sides[side])
        for case in cases:
            seconds: dict[str, list[float]] = {side: [] for side in sides}
            cpu_seconds: dict[str, list[float]] = {side: [] for side in sides}
            for repeat in range(repeats + 1):
                for side, process in sides.items():
                    assert process.stdin is not None
                    process.stdin.write(json.dumps(asdict(case)) + "\n")
                    process.stdin.flush()
                    taken = _answer(process)
                    if repeat:
                        seconds[side].append(taken["wall"])
                        cpu_seconds[side].append(taken["cpu"])
            taken = {"seconds": seconds, "cpu_seconds": cpu_seconds}
            results.append({"case": case.name, **asdict(case), **taken, "about": about()})
            print(table(results[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
        for process in sides.values():
            process.communicate()
    return results


def _answer(process: subprocess.Popen[str]) -> dict[str, float]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit("a side of the comparison ended; see its error above")
    answer: dict[str, float] = json.loads(line)
    return answer


def table(results: list[dict[str, Any]]) -> str:
    """Tokens per second of the median call, the ratio of both sides, and that of CPU time, which
    depends less on other jobs of the machine."""
    lines = [
        "| case | ours, tokens/s | transformers, tokens/s | ratio | ratio by CPU time |",
        "|---|---|---|---|---|",
    ]
    for result in results:
        tokens = result["rows"] * NEW_TOKENS
        (ours, theirs), (our_cpu, their_cpu) = (
            [tokens / statistics.median(result[field][side]) for side in ("ours", "transformers")]
            for field in ("seconds", "cpu_seconds")
        )
        lines.append(
            f"| {result['case']} | {ours:.1f} | {theirs:.1f} | {ours / theirs:.2f} | "
            f"{our_cpu / their_cpu:.2f} |"
        )
    return "\n".join(lines)


Generator = Callable[[Case, Any], Any]


def serve(make: Callable[[Path], Generator], folder: Path) -> None:
    """Answer each case on the standard input with the seconds of a call."""
    import numpy as np

    generate = make(folder)
    print(json.dumps({}), flush=True)
    for line in sys.stdin:
        case = Case(**json.loads(line))
        ids = np.random.default_rng(0).integers(5, VOCAB, (case.rows, PROMPT))
        started, started_cpu = time.perf_counter(), time.process_time()
        shape = generate(case, ids)
        taken = {"wall": time.perf_counter() - started, "cpu": time.process_time() - started_cpu}
        assert shape == (case.rows, NEW_TOKENS), shape
        print(json.dumps(taken), flush=True)


def transformers_side(folder: Path) -> Generator:
    """Makes and saves the models, and generates with transformers."""
    import torch
    import transformers

    torch.manual_seed(0)
    models = {
        "gpt2": transformers.GPT2LMHeadModel(transformers.GPT2Config()),
        "t5": transformers.T5ForConditionalGeneration(
            transformers.T5Config(decoder_start_token_id=0)
        ),
    }
    for name, model in models.items():
        model.eval().save_pretrained(folder / name)

    def generate(case: Case, ids: Any) -> tuple[int, ...]:
        model = models[case.model]
        answers = model.config.is_encoder_decoder
        model.generation_config = transformers.GenerationConfig(
            max_new_tokens=NEW_TOKENS, num_beams=case.beams, do_sample=False, pad_token_id=0,
            eos_token_id=None, decoder_start_token_id=0 if answers else None,
        )  # fmt: skip
        with torch.inference_mode():
            inputs = torch.tensor(ids)
            texts = model.generate(inputs, attention_mask=torch.ones_like(inputs))
        return tuple(texts[:, 1 if answers else PROMPT :].shape)

    return generate


def our_side(folder: Path) -> Generator:
    import jax

    from flax_transformers.generation.beams import Beams
    from flax_transformers.generation.decode import generate
    from flax_transformers.generation.program import arranged
    from flax_transformers.generation.sampling import Sampling
    from flax_transformers.generation.translate import generate_target
    from flax_transformers.pretrained import load_pretrained

    functions: dict[str, Any] = {"gpt2": generate, "t5": generate_target}
    loaded = {}
    for name, function in functions.items():
        model, params = load_pretrained(folder / name)
        loaded[name] = partial(function, model, arranged(params))  # once, as the commands do

    def run(case: Case, ids: Any) -> tuple[int, ...]:
        choice = Sampling() if case.beams == 1 else Beams(num_beams=case.beams)
        found = loaded[case.model](
            ids, max_new_tokens=NEW_TOKENS, eos_id=(), pad_id=0, choice=choice
        )
        return tuple(jax.block_until_ready(found).shape)

    return run


SIDES = {"ours": our_side, "transformers": transformers_side}

if __name__ == "__main__":
    main()
