"""A modifier for llm-compressor: it leaves out what a plan of notall names, before
later modifiers quantise the rest.

    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor_skip import SkipModifier

    folder = "smollm2"  # of a checkpoint
    recipe = [SkipModifier(plan="plan.json"), QuantizationModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"])]
    oneshot(model=folder, recipe=recipe, output_dir="smaller")

`plan` is a file, a folder that `notall repair` wrote, or published:NAME. It must be
portable, so that an ordinary checkpoint is left, which is saved and served as any
other. Written against llm-compressor 0.14.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmcompressor.core.state import State
from llmcompressor.modifiers import Modifier

import notall
from notall.running.regrouping import is_portable


class SkipModifier(Modifier):
    """Removes sublayers in place. Raises `notall.UsageError` for a plan that is not
    portable, or of another model.
    """

    plan: str

    def on_initialize(self, state: State, **_: Any) -> bool:
        plan = (
            notall.RepairedPlan.load(self.plan)
            if Path(self.plan).is_dir()
            else notall.Plan.load(self.plan)
        )
        if not is_portable(notall.locate(state.model), plan):
            raise notall.UsageError(
                f"{self.plan} leaves no ordinary checkpoint: give a portable plan"
            )
        notall.remove(state.model, plan)
        # else the config that is there is written again, with all layers
        state.model.config._name_or_path = ""
        return True
