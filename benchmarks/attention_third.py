"""A third of the attentions of the default model against dense: prefill and decode, short and long prompts."""

from __future__ import annotations

import notall
from notall.measuring.plan_times import Timed, time_plan
from notall.measuring.speed import machine
from notall.records.bench import BenchRecord
from notall.records.columns import plain
from notall.reporting.console import show


def main() -> None:
    model, _ = notall.load()
    about = machine(model.device)
    plan = notall.deepest(notall.locate(model), "attention", 0.33, keep_last=True)
    for prompt in (128, 1024):
        times = time_plan(model, plan, Timed(prompt, 24, rounds=7))
        rows = [{"model": name, **figures} for name, figures in times.items()]
        title = f"33 % of attentions, prompt {prompt}, {about['cpu']}, {about['threads']} threads, {model.dtype}"
        show(rows, [plain("model"), *BenchRecord.columns[1:]], title=title)


if __name__ == "__main__":
    main()
