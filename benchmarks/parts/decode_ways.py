"""What the ways of a step cost: one order of sums against the quickest, the native kernel against torch."""

from __future__ import annotations

from pathlib import Path

from parts.decode_features import Add, seconds
from parts.decode_inputs import prompts

from microlm.core.records import Sampling
from microlm.engine import Engine

ROWS = (8, 16, 32, 48, 64, 96)
FIRST = Sampling(max_tokens=1, ignore_eos=True)


def invariant(model: Path, add: Add, rounds: int) -> None:
    """`batch_invariant` over without it, in seconds: a prompt of 512 ids, 64 new tokens of one, of eight."""
    engines = {
        on: Engine(model, dtype="bfloat16", max_seqs=8, prefix_caching=False, threads=1, batch_invariant=on)
        for on in (True, False)
    }
    jobs = {"prompt_512": (1, 512, 1), "batch1": (1, 16, 64), "batch8": (8, 16, 64)}
    for name, (size, length, new) in jobs.items():
        found: dict[bool, list[float]] = {True: [], False: []}
        for number in range(rounds + 1):
            asked, sampling = prompts(size, length, name, number), Sampling(max_tokens=new, ignore_eos=True)
            for on, engine in engines.items():
                taken = seconds(lambda e=engine, a=asked, s=sampling: e.generate(a, s))
                if number:
                    found[on].append(taken)
        ratios = [a / b for a, b in zip(found[True], found[False], strict=True)]
        add(f"batch_invariant_cost.{name}", ratios, "times the seconds without")


def cut_over(model: Path, add: Add, rounds: int, rows: tuple[int, ...] = ROWS) -> None:
    """One step of some rows, the native kernel's seconds over torch's: above 1 torch is the quicker one."""
    for kind, options in {"bf16": {}, "packed": {}, "int8": {"quantize": "int8"}}.items():
        engines = {
            native: Engine(
                model, dtype="bfloat16", max_seqs=1, max_seq_len=256, prefix_caching=False, threads=1,
                native=native, **options,
            )
            for native in (True, False)
        }  # fmt: skip
        if kind == "packed":
            for engine in engines.values():
                engine._runner.pack()
        engines[True]._runner._cut_over = 1 << 30
        for count in rows:
            found: dict[bool, list[float]] = {True: [], False: []}
            for number in range(rounds + 1):
                asked = prompts(1, count, "cut", number)
                for native, engine in engines.items():
                    taken = seconds(lambda e=engine, a=asked: e.generate(a, FIRST))
                    if number:
                        found[native].append(taken)
            ratios = [a / b for a, b in zip(found[True], found[False], strict=True)]
            add(f"native_over_torch.{kind}.rows_{count}", ratios, "seconds of a step over torch's")
