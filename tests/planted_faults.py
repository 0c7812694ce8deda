"""Faults that tests must see: `plant_faults.py` plants those of `FAULTS`, and
`test_planted_faults.py` those of `DEVICE_FAULTS`, one by one in a copy of the package.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).parent
SOURCE = TESTS.parent / "src" / "notall"


@dataclass(frozen=True)
class Fault:
    """`wrong` in place of `right`, which the file has once."""

    file: str  # below the package
    right: str
    wrong: str
    tests: str  # files of tests, with a space between
    seen_by: str = ""  # tests of these, as for pytest -k; all of them where it is empty

    def __str__(self) -> str:
        return f"{self.file}: {self.tests} {self.seen_by}".rstrip()

    def planted(self, content: str) -> str:
        """`content` of the file with the fault. Raises `AssertionError` where it is
        written in another way now.
        """
        count = content.count(self.right)
        assert count == 1, f"{self.file} has {self.right!r} {count} times"
        return content.replace(self.right, self.wrong)


def _of(file: str, *rows: tuple[str, ...]) -> list[Fault]:
    return [Fault(file, *row) for row in rows]


RUNNING = [
    # the prompt's own keys and values for one token fewer, or of no rows of a projection
    *_of(
        "structure/key_values.py",
        (
            "early = inputs.shape[1] - self.last()",
            "early = inputs.shape[1] - self.last() - 1",
            "test_stand_ins.py",
            "two_calls",
        ),
        (
            "outputs[:, :early, self.rows.to(own.device)] = own",
            "own.sum()",
            "test_stand_ins.py",
            "two_calls",
        ),
    ),
    # a map of the stream as it is, for one token more, or at what was added already
    *_of(
        "running/stand_in.py",
        ("linear(normalised(hidden),", "linear(hidden,", "test_stand_ins.py"),
        (
            "early = hidden.shape[1] - last",
            "early = hidden.shape[1] - last + 1",
            "test_stand_ins.py",
            "two_calls",
        ),
    ),
    *_of(
        "running/prefill.py",
        (
            "self.stand_ins[part.name].added(hidden, total, last)",
            "self.stand_ins[part.name].added(total, total, last)",
            "test_stand_ins.py",
            "two_calls",
        ),
        # attentions that run keep their own keys and values
        (
            "with with_modules(holder, self.early.get(part.name, {})):",
            "with with_modules(holder, {}):",
            "test_stand_ins.py",
            "two_calls",
        ),
    ),
    *_of(
        "running/last_tokens.py",
        # the mask of the last tokens, one token too early
        ("seen.tril(tokens - last)", "seen.tril(tokens - last - 1)", "test_prefill.py"),
        # one token fewer writes keys and values
        (
            "early, rows = slice(0, tokens - last)",
            "early, rows = slice(0, tokens - last - 1)",
            "test_prefill.py",
            "one_pass",
        ),
        # what is added to of a parallel block
        (
            "added(branch, holder, end, total[:, rows], ending)",
            "added(branch, holder, end, end, ending)",
            "test_prefill.py",
            "one_pass",
        ),
        # without last tokens nothing is written
        (
            "        if not last:\n            _write(written, slot, attention)\n",
            "",
            "test_prefill.py",
            "chunks",
        ),
    ),
    *_of(
        "running/prefill.py",
        (
            "self.end - self.last_tokens - past()",
            "self.end - self.last_tokens - past() + 1",
            "test_prefill.py",
            "one_pass or chunks",
        ),
        # a declaration outlasts its `with`
        (
            "declared.end, declared.whole = around, None",
            "declared.whole = None",
            "test_prefill.py",
            "ends_with_its_with",
        ),
    ),
    *_of(
        "running/recording.py",
        (
            "tokens - self.prompt_tokens + last_tokens",
            "tokens - self.prompt_tokens + last_tokens - 1",
            "test_prefill_quality.py",
            "it_is_what_two_calls_say",
        ),
    ),
    *_of(
        "running/cutting.py",
        # the config is not put back
        (
            "        undo.put_fields(config)\n    if structure.in_place",
            "        pass\n    if structure.in_place",
            "test_skipping.py",
            "config_counts or skipping_changes",
        ),
        # inside a skip the model is looked at anew
        (
            "undo.put(LOCATED, model, (layers_in(model, structure), structure))",
            "undo.put(LOCATED, model, ABSENT)",
            "test_skipping.py",
            "locate_inside",
        ),
        # weights of a repair that are removed with stay another model's
        (
            "weight.clone() if for_good else weight",
            "weight",
            "test_repaired_plans.py",
            "removed_for_good",
        ),
    ),
    *_of(
        "running/regrouping.py",
        (
            "layer.mlp = layer.after.pop(0)",
            "layer.mlp = layer.after.pop()",
            "test_plan.py",
            "several_mlps",
        ),
        (
            "late = math.prod(scales[: layer.attention]) if number == 0 else 1.0",
            "late = 1.0",
            "test_mixer_exports.py",
            "multiply_by",
        ),
    ),
    *_of(
        "running/skipping.py",
        (
            "mine.plan = around[-1].plan | plan if around else plan",
            "mine.plan = plan",
            "test_skipping.py",
            "nested",
        ),
    ),
    *_of(
        "running/replay.py",
        # a step of a repair is another repair's
        (
            'name = f"{name} {plan.digest}" if weights else name',
            "name = name",
            "test_repaired_plans.py",
            "replay_answers",
        ),
        (
            'last = f"last {plan.prefill.last_tokens}"',
            'last = "last"',
            "test_prefill_quality.py",
            "last_tokens",
        ),
    ),
    *_of(
        "running/steps.py",
        ("if place < shared}", "if place <= shared}", "test_searching.py", "prefix"),
    ),
    *_of(
        "running/generating.py",
        ("return row[: place + 1]", "return row[:place]", "test_generating.py", "ends"),
        (
            "[0] * (width - len(row)) + [*row] for row",
            "[*row] + [0] * (width - len(row)) for row",
            "test_generating.py",
            "together",
        ),
    ),
]

STRUCTURE = [
    *_of(
        "structure/key_values.py",
        # keys where values belong
        (
            "self.found = key_states, value_states",
            "self.found = value_states, key_states",
            "test_prefill.py",
            "one_pass",
        ),
        (
            "outputs[..., self.rows.to(made.device)] = made",
            "outputs[..., : made.shape[-1]] = made",
            "test_prefill.py test_prefill_repair.py",
        ),
    ),
    *_of(
        "structure/slicing.py",
        (
            "undo.put(inner.__dict__, name, index)",
            "inner.__dict__[name] = index",
            "test_skipping.py",
            "leaving_restores",
        ),
    ),
    *_of(
        "structure/undoing.py",
        # an interrupted undo stops
        (
            "            if self.entries:\n                Undo.__exit__(self)",
            "            pass",
            "test_torn_undo.py",
            "goes_on",
        ),
    ),
    *_of(
        "structure/in_place.py",
        (
            "value.new_zeros(*value.shape[:-1], self.width)",
            "value.new_ones(*value.shape[:-1], self.width)",
            "test_in_place.py",
            "evaluated",
        ),
    ),
    *_of(
        "structure/branches.py",
        # what a layer adds, added to its own residual twice
        (
            "total = value if branch.adds_itself else total + value",
            "total = total + value",
            "test_architectures.py",
            "bloom or mpt",
        ),
    ),
]

MEASURING = [
    *_of(
        "measuring/quality.py",
        (
            "predicting = hidden[:, start - 1 : -1]",
            "predicting = hidden[:, start:]",
            "test_quality.py",
            "definitions",
        ),
        # the first of the answer's tokens is not scored
        (
            "start = prompt_tokens or 1 ",
            "start = prompt_tokens + 1 if prompt_tokens else 1 ",
            "test_prefill_quality.py",
            "only_what_follows",
        ),
        (
            "zip(scores.nll, dense.nll)",
            "zip(dense.nll, scores.nll)",
            "test_quality.py",
            "definitions",
        ),
        (
            "start = before if block.parallel else after",
            "start = after",
            "test_passages.py",
            "every_state",
        ),
    ),
    *_of(
        "measuring/token_scores.py",
        (
            "terms = log_p.exp() * (log_p - log_q)",
            "terms = log_q.exp() * (log_q - log_p)",
            "test_token_scores.py",
            "whole_rows",
        ),
        (
            "targets = torch.searchsorted(self.words, targets)",
            "pass",
            "test_token_scores.py",
            "likely_words",
        ),
    ),
    *_of(
        "measuring/statistics.py",
        # one-sided 95 % for a two-sided interval
        (
            "below = (1 + level) / 2",
            "below = level",
            "test_statistics.py",
            "students_t",
        ),
        (
            "variance_of_sum = count / (count - 1) * squares",
            "variance_of_sum = squares",
            "test_quality.py test_statistics.py",
            "by_hand or robust",
        ),
        (
            "fewer = min(above, of - above)",
            "fewer = above",
            "test_statistics.py",
            "mcnemar",
        ),
        (
            "sums[document] += value",
            "sums[document] = value",
            "test_statistics.py",
            "document",
        ),
    ),
    *_of(
        "measuring/speed.py",
        # the warm-up counts
        ("found[1:] for name, found", "found for name, found", "test_speed.py"),
        (
            "[slow / fast for",
            "[fast / slow for",
            "test_speed.py",
            "speedup",
        ),
        (
            "            in_turn.reverse()\n",
            "            pass\n",
            "test_speed.py",
            "alternate",
        ),
    ),
    *_of(
        "measuring/acceptance.py",
        (
            "torch.minimum(p, q)",
            "torch.maximum(p, q)",
            "test_draft.py",
            "overlap",
        ),
        (
            "start + drafted, count - 1",
            "start + drafted - 1, count - 1",
            "test_draft.py",
            "rounds_are_told",
        ),
    ),
]

REPAIRING = [
    *_of(
        "repairing/prompt_refit.py",
        # the streams part by what the prompt skips, and not by what runs otherwise
        (
            "with with_modules(self.text.layers[line.block.index], own):",
            "with with_modules(self.text.layers[line.block.index], {}):",
            "test_stand_ins.py",
        ),
        # what stands in is fitted and then left out of the stream
        (
            "behind = self._standing_in(skipped, self._refit(part, solve))",
            "self._refit(part, solve)",
            "test_stand_ins.py",
        ),
        # the normalised stream of what runs, where the skipped MLP reads another
        (
            "inputs = normalised(before).flatten(0, 1)",
            "inputs = before.flatten(0, 1)",
            "test_stand_ins.py",
        ),
    ),
    *_of(
        "exporters/prompt_modeling.template",
        (
            "early = early + self.prompt_mlp(normalised(early))",
            "early = early + self.prompt_mlp(early)",
            "test_prefill_export.py",
        ),
        (
            "output[:, early.shape[1] :]",
            "output[:, early.shape[1] :] * 1.01",
            "test_prefill_export.py",
        ),
    ),
    *_of(
        "repairing/least_squares.py",
        (
            "self.gram.diagonal()[: len(self.gram) - self.biased]",
            "self.gram.diagonal()[: len(self.gram)]",
            "test_least_squares.py",
        ),
        ("        self.kernels.clear()\n", "", "test_least_squares.py", "second"),
    ),
    *_of(
        "repairing/refitting.py",
        (
            "self.ahead * (end / to_end - start / to_start)",
            "self.ahead * (end - here)",
            "test_repairing.py",
            "slow_twin",
        ),
        # a repaired plan of a folder forgets that an earlier step was refit
        (
            "self.states, made = self.passed[-1]",
            "self.states, made = self.passed[0]",
            "test_after_repair.py",
        ),
    ),
    *_of(
        "repairing/solving.py",
        (
            "chosen = rows if held else ~rows",
            "chosen = rows",
            "test_repairing.py",
            "slow_twin",
        ),
        (
            "share = change[:, -1] / (one.scale * self.biases)",
            "share = change[:, -1] / self.biases",
            "test_repairing.py",
            "bias_is_shared",
        ),
    ),
    *_of(
        "repairing/streams.py",
        (
            "torch.arange(1, sequences + 1) % min(one_in, sequences) == 0",
            "torch.arange(sequences) % min(one_in, sequences) == 0",
            "test_repairing.py",
            "one_sequence_in_eight",
        ),
    ),
    *_of(
        "repairing/held_fit.py",
        (
            "counts[:, 0] = SINK",
            "counts[:, -1] = SINK",
            "test_prefill_repair.py",
            "ridge",
        ),
    ),
    *_of(
        "repairing/training_loop.py",
        (
            "order[number * self.size :][: self.size]",
            "order[: self.size]",
            "test_minutes.py",
            "another_order",
        ),
        # waiting begins in the warm-up
        (
            "elif not self.is_warming:  # the warm-up aims at something else",
            "else:",
            "test_healing.py",
            "patience",
        ),
        (
            "return rate * (done / self.rise)",
            "return rate",
            "test_minutes.py",
            "rate_rises",
        ),
    ),
    *_of(
        "repairing/texts.py",
        (
            "apart=[*fitted, *used], fewer",
            "apart=[*fitted], fewer",
            "test_repair_texts.py",
            "used_before",
        ),
    ),
]

CHOOSING = [
    *_of(
        "choosing/criteria/search.py",
        ("if cost < self.cost:", "if cost > self.cost:", "test_searching.py", "swap"),
        (
            "if best in fresh:",
            "if best in self.rises:",
            "test_searching.py",
            "plain_greedy",
        ),
    ),
    *_of(
        "choosing/criteria/data_free.py",
        (
            "return {unit: -float(place)",
            "return {unit: float(place)",
            "test_criteria.py",
            "deepest",
        ),
        (
            "layers[last - count : last]",
            "layers[last - count :]",
            "test_criteria.py",
            "papers_rule",
        ),
        (
            "keys = heads.repeat_interleave(shared_by, dim=0)",
            "keys = heads.repeat(shared_by, 1, 1)",
            "test_criteria.py",
            "gate_norm",
        ),
    ),
    *_of(
        "choosing/budget.py",
        (
            "rise / worth if rise > 0",
            "rise * worth if rise > 0",
            "test_searching.py",
            "saves_more",
        ),
    ),
    *_of(
        "choosing/evaluator.py",
        # guesses on any part of the text are one
        (
            'return skipped, "all" if numbers == self.all else len(numbers)',
            'return skipped, "all"',
            "test_searching.py",
            "guess_is_never",
        ),
    ),
    *_of(
        "choosing/latency.py",
        (
            'about["attention"] = text_config(model)._attn_implementation',
            "pass",
            "test_latency.py",
            "another_attention",
        ),
        (
            "[prefill + tokens * decode for",
            "[prefill + decode for",
            "test_latency.py",
            "many_new_tokens",
        ),
    ),
]

EXPORTING = [
    *_of(
        "exporters/layout.py",
        (
            'f"{start}{place}.{slot}."',
            'f"{start}{place}.{len(indices) - 1 - slot}."',
            "test_export_hf.py",
            "keep_their_order",
        ),
    ),
    *_of(
        "exporters/config_cuts.py",
        (
            "settings[depth] = len(layers)",
            "pass",
            "test_export_files.py",
            "lists_by_layer",
        ),
        (
            "sum(index < count for index in sources.mlps)",
            "count",
            "test_export_files.py",
            "leading",
        ),
    ),
    *_of(
        "exporters/dense.py",
        # the new dtype is in the weights, and not in the config
        (
            "says: str(dtype).removeprefix",
            "says: str(self.dtype).removeprefix",
            "test_export_command.py",
            "another_dtype",
        ),
    ),
    *_of(
        "exporters/gguf_cut.py",
        (
            "mlps if any(word in name for word in OF_MLPS) else attentions",
            "attentions",
            "test_export_gguf.py",
            "lists_by_layer",
        ),
        (
            "left = sum(index < dense_first for index in mlps)",
            "left = dense_first",
            "test_export_gguf.py",
            "leading",
        ),
    ),
    *_of(
        "exporters/gguf_prompts.py",
        (
            "            elif stored is not None:\n                tensors[own] = stored\n",
            "",
            "test_prefill_gguf.py",
            "bias_of_its_own",
        ),
    ),
    *_of(
        "exporters/hf.py",
        (
            'manifest | {"breaks_period": structure.period}',
            "manifest",
            "test_hybrid_choosing.py",
        ),
    ),
]

RECORDING = [
    *_of(
        "digests.py",
        ("        state.st_ctime_ns,\n", "", "test_models.py", "same_size_and_date"),
    ),
    *_of(
        "results/ledger.py",
        ("and held.what.get(name) != value", "and False", "test_results.py", "header"),
    ),
    *_of(
        "results/columns.py",
        (
            "        value /= 1024\n",
            "        value /= 1000\n",
            "test_columns.py",
            "bytes",
        ),
    ),
    *_of(
        "results/record.py",
        (
            "numpy.quantile(samples, (0.25, 0.5, 0.75))",
            "numpy.quantile(samples, (0.05, 0.5, 0.95))",
            "test_speed.py",
            "quartiles",
        ),
    ),
    *_of(
        "plan/plan.py",
        (
            "{*self.prefill.mlp, *other.prefill.mlp} - mlp",
            "{*self.prefill.mlp, *other.prefill.mlp} - attention",
            "test_prefill_plan.py",
            "together",
        ),
        (
            "last_tokens=max(self",
            "last_tokens=min(self",
            "test_prefill_plan.py",
            "together",
        ),
    ),
    *_of(
        "models/windows.py",
        ("places * width, width)", "places, width)", "test_windows.py"),
        ("half = -(-min(", "half = (min(", "test_windows.py", "larger_half"),
    ),
    *_of(
        "models/retrieval.py",
        (
            "sentences.insert(place + shift,",
            "sentences.insert(0,",
            "test_own_checks.py test_keeping_recovery.py",
        ),
    ),
    *_of(
        "experiments/paper/claims.py",
        (
            "-record.prompt_tokens, record.concurrency",
            "record.prompt_tokens, record.concurrency",
            "test_paper.py",
            "longest_prompt",
        ),
        (
            'return "does not hold" if high <',
            'return "does not hold" if low <',
            "test_paper.py",
            "claims_that_hold",
        ),
    ),
    *_of(
        "experiments/paper/scoreboard.py",
        (
            "if all(column in row for row in every)",
            "if any(column in row for row in every)",
            "test_paper.py",
            "lack",
        ),
    ),
    *_of(
        "evaluation/task_scores.py",
        ("zip(values, theirs)]", "zip(theirs, values)]", "test_harness.py", "paired"),
    ),
]

FAULTS = [
    *RUNNING,
    *STRUCTURE,
    *MEASURING,
    *REPAIRING,
    *CHOOSING,
    *EXPORTING,
    *RECORDING,
]
