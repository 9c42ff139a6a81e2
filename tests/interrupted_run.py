"""Interrupts at random lines of everything that hangs something on a model, and what each of them left behind.

`python -m tests.interrupted_run CLASS SEED INTERRUPTS` raises KeyboardInterrupt as Ctrl-C does, in each operation at
lines drawn at random: half of them among all lines that run, half among all places in the code, since most lines that
run are those of a forward pass. After each one the model's modules, hooks, weights, attributes and the global
generators are compared with what they were, at once, and then the operation is run again and its result compared. It
prints what it did as JSON.
"""

import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests import tiny

PLACES = ("persona_lens/", "contextlib.py", "torch/nn/modules/module.py", "torch/utils/hooks.py", "peft/tuners/")
PROMPTS = [[5, 17, 100, 33, 8], [9, 40, 41], [7, 7, 12, 60]]


class Interrupter:
    """Traces a run: counts the lines of each place, or interrupts it at one of them."""

    def __init__(self, at: int | None = None, place: tuple[str, int] | None = None, occurrence: int = 1):
        self.at, self.place, self.occurrence = at, place, occurrence
        self.lines = 0
        self.places: Counter[tuple[str, int]] = Counter()

    def run(self, function: Callable[[], Any]) -> Any:
        """What the function gives; None where it was interrupted."""
        before = sys.gettrace()
        try:
            sys.settrace(self._trace)
            return function()
        except KeyboardInterrupt:
            return None
        finally:
            sys.settrace(before)

    def _trace(self, frame: Any, _event: str, _value: Any) -> Any:
        return self._trace_line if any(part in frame.f_code.co_filename for part in PLACES) else None

    def _trace_line(self, frame: Any, event: str, _value: Any) -> Any:
        if event == "line":
            here = (frame.f_code.co_filename, frame.f_lineno)
            self.lines += 1
            self.places[here] += 1
            if self.lines == self.at or (here == self.place and self.places[here] == self.occurrence):
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._trace_line


def operations(model: Any, folder: Path) -> dict[str, Callable[[], Any]]:
    """What is interrupted; each gives a result to compare."""
    import persona_lens as pl
    from persona_lens.activations.means import stream_means
    from persona_lens.chat.batches import ChatTokens
    from persona_lens.generation.decoding import generate
    from persona_lens.models.structure import is_bridge
    from persona_lens.monitoring.live import stream_watched
    from tests.finetuning_cases import QUICK, dataset, random_adapter
    from tests.intervention_cases import some_vectors

    vectors = some_vectors(model)
    rows = [ChatTokens(tuple(prompt), (50, 51, 52 + n)) for n, prompt in enumerate(PROMPTS)]

    def extract() -> Any:
        return [found.means for found in stream_means(model, rows, token_budget=16)]

    def steer() -> Any:
        with pl.steer(model, vectors.at(2), 2.0), pl.ablate(model, vectors.at(1)), torch.no_grad():
            return model(torch.tensor([PROMPTS[0]]))

    def generate_steered() -> Any:
        with pl.steer(model, vectors.at(1), 1.0, at="response"):
            return generate(model, PROMPTS, max_new_tokens=3, read_up_to=3)

    def stream() -> Any:
        with pl.steer(model, vectors.at(1), 1.0):
            return [token.token for token in stream_watched(model, PROMPTS[0], vectors.at(2), max_new_tokens=3)]

    def judge() -> Any:
        with pl.steer(model, vectors.at(1), 1.0), pl.suspended(model):
            return [found.means for found in stream_means(model, rows, position="prompt_last")]

    found: dict[str, Callable[[], Any]] = {
        "extract": extract,
        "steer": steer,
        "generate": generate_steered,
        "stream": stream,
        "judge": judge,
    }
    if is_bridge(model):
        adapter = random_adapter(model)

        def adapted() -> Any:
            with pl.adapted(model, adapter), torch.no_grad():
                return model(torch.tensor([PROMPTS[0]]))

        def finetune() -> Any:
            settings = QUICK | {"epochs": 1}
            tuned = pl.finetune(model, dataset()[:2], during=[pl.Steer(vectors.at(1), 1.0)], max_length=64, **settings)
            return [tuned.adapter.weights[name] for name in sorted(tuned.adapter.weights)]

        found |= {"adapted": adapted, "finetune": finetune}
    return found


def equal(one: Any, other: Any) -> bool:
    """Whether two results are the same to the last bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, list):
        return len(one) == len(other) and all(equal(*pair) for pair in zip(one, other, strict=True))
    return bool(one == other)


def state(model: Any) -> Any:
    """All that could have been left in a model and in the process."""
    from tests.finetuning_cases import generators, state_of

    whole = model if hasattr(model, "original_model") else _AsBridge(model)
    return state_of(whole), generators()


class _AsBridge:
    """What `state_of` reads of a bridge, of a model that is none."""

    def __init__(self, model: Any):
        from types import SimpleNamespace

        self.model = model
        config = SimpleNamespace(to_dict=lambda: str(model.cfg.to_dict()))
        self.original_model = SimpleNamespace(config=config, generation_config=None, named_modules=model.named_modules)
        self.named_modules = model.named_modules


def main(model_class: str, seed: int, interrupts: int) -> dict[str, Any]:
    """Interrupt each operation in turn until there were so many; gives what was left, by operation and place."""
    from persona_lens.models.loading import bridge_from_transformers, hooked_from_transformers

    torch.set_num_threads(1)
    draw, struck, left, unequal = random.Random(seed), Counter(), [], []
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = tiny.tokenizer(Path(scratch))
        load = bridge_from_transformers if model_class == "TransformerBridge" else hooked_from_transformers
        model = load(tiny.llama(tokenizer), tokenizer)
        runs = operations(model, Path(scratch))
        expected, counted = {}, {}
        for name, run in runs.items():
            run()  # imports, and what a bridge wires in its first pass
            counted[name] = Interrupter()
            expected[name] = counted[name].run(run)
        before = state(model)
        names = list(runs)
        while sum(struck.values()) < interrupts:
            name = names[sum(struck.values()) % len(names)]
            if draw.random() < 0.5:
                interrupter = Interrupter(at=draw.randint(1, counted[name].lines))
            else:
                place = draw.choice(sorted(counted[name].places))
                interrupter = Interrupter(place=place, occurrence=draw.randint(1, counted[name].places[place]))
            interrupter.run(runs[name])
            struck[name] += 1
            where = [name, interrupter.at, interrupter.place and [*interrupter.place, interrupter.occurrence]]
            if state(model) != before:
                left.append(where)
                before = state(model)
            if not equal(runs[name](), expected[name]):
                unequal.append(where)
            if state(model) != before:
                left.append([*where, "after the next use"])
                before = state(model)
    return {"class": model_class, "seed": seed, "interrupts": dict(struck), "left": left, "unequal": unequal}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
