"""The model card: ``README.md`` of a saved folder, as hubs read it."""

from __future__ import annotations

import yaml

from curvprune.record import ModelCard, Trial, Verdict
from curvprune.report.figures import clean, count, fixed, percent, plus_minus, size
from curvprune.report.verdict import bound_text, claim, drop_text

PIPELINES = {  # how a class of transformers ends → the hub's word for its task
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForImageClassification": "image-classification",
    "ForConditionalGeneration": "text2text-generation",
}
CONTROLS_SHOWN = 4


def model_card(card: ModelCard) -> str:
    """Markdown with a head of hub metadata: verdict, sizes, what it was held against, how to load
    it. Ends with a newline."""
    parts = [
        _head(card),
        f"# {_text(card.title)}",
        _verdict(card.verdict),
        _sizes(card),
        _options(card),
        _held_against(card),
        _loading(card),
        f"Made with curvprune {_text(card.curvprune)}. `curvprune.json` lists every file with its "
        "hash, and the option of every layer.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _text(value: object) -> str:
    """On one line; what Markdown or HTML would take for markup is escaped."""
    line = " ".join(clean(value).split())
    for mark in "\\`*_[]<>|#":
        line = line.replace(mark, f"\\{mark}")
    return line


def _head(card: ModelCard) -> str:
    """The metadata, as YAML between two rules."""
    found: dict[str, object] = {"library_name": "curvprune"}
    if card.portable:
        found["library_name"] = "transformers"
    for ending, task in PIPELINES.items():
        if card.architecture.endswith(ending):
            found["pipeline_tag"] = task
    if card.base_model:
        found["base_model"] = card.base_model
    tags = ["curvprune", "compressed"]
    if any(option.startswith("int") or "+int" in option for option in card.options):
        tags.append("quantized")
    if card.packed:
        tags.append("compressed-tensors")
    if any(option.startswith("prune") for option in card.options):
        tags.append("pruned")
    found["tags"] = tags
    return f"---\n{yaml.safe_dump(found, sort_keys=False, allow_unicode=True)}---"


def _verdict(verdict: Verdict | None) -> str:
    if verdict is None:
        return "No accuracy budget was asked, so nothing was certified."
    return "\n".join(
        [
            f"**{_text(verdict.status)}**: {claim(verdict)}",
            "",
            "| | |",
            "|---|---|",
            f"| drop of {_text(verdict.metric)} | {drop_text(verdict)} {_text(verdict.measure)} |",
            f"| its {percent(verdict.confidence)} bound | {bound_text(verdict)} |",
            f"| items | {count(verdict.items)} |",
            f"| test | {_text(verdict.method)} |",
        ]
    )


def _sizes(card: ModelCard) -> str:
    """The weights beside the file they came from, and beside 16 bits a weight."""
    lines = ["## Size", "", "| weights | bytes | times smaller |", "|---|---|---|"]
    if card.source_bytes:
        lines.append(_size_row("the file it was made from", card.source_bytes, card.bytes))
    lines.append(_size_row("16 bits a weight", 2 * card.parameters, card.bytes))
    bits = fixed(8 * card.bytes / max(1, card.parameters), 2)
    lines.append(f"| **here** | {size(card.bytes)} | {bits} bits a weight |")
    return "\n".join(lines)


def _size_row(what: str, before: int, after: int) -> str:
    return f"| {what} | {size(before)} | {fixed(before / max(1, after), 2)} |"


def _options(card: ModelCard) -> str:
    if not card.options:
        return ""
    said = [f"{count(number)} × `{_text(key)}`" for key, number in card.options.items()]
    return f"Layers: {', '.join(said)}."


def _held_against(card: ModelCard) -> str:
    """The plan beside the controls, on the split that chose among them."""
    plans = [trial for trial in card.trials if trial.kind == "applied"]
    controls = [trial for trial in card.trials if trial.kind == "control" and not trial.note]
    if not plans or not controls:
        return ""
    lines = [
        "## Held against",
        "",
        "On the split that chose the plan, not the one that the verdict is about:",
        "",
        "| plan | bytes | rise of the loss |",
        "|---|---|---|",
    ]
    lines += [_trial_row(trial) for trial in (*plans[-1:], *controls[:CONTROLS_SHOWN])]
    return "\n".join(lines)


def _trial_row(trial: Trial) -> str:
    lost = plus_minus(trial.loss, trial.loss_stderr)
    return f"| {_text(trial.name)} | {size(trial.bytes)} | {lost} |"


def _loading(card: ModelCard) -> str:
    """Code for whoever can read the folder."""
    ways = ["## Load it", ""]
    if card.portable:
        ways += _block(
            "With transformers (compressed-tensors decompresses it at the first pass):",
            f"from transformers import {card.architecture}\n\n"
            f'model = {card.architecture}.from_pretrained("FOLDER")',
        )
    own = '"FOLDER"' if card.builds_itself else '"FOLDER", model=model'
    ways += _block(
        "With curvprune, packed in memory or dense:",
        f"import curvprune as cp\n\nmodel = cp.load({own}, packed=True)",
    )
    if card.portable == "engines":
        ways += _block("With vLLM:", "vllm serve FOLDER", "bash")
    if card.architecture.endswith("ForCausalLM"):
        ways += _block(
            "As GGUF, for llama.cpp and what is built on it:",
            "curvprune export FOLDER model.gguf --target gguf",
            "bash",
        )
    return "\n".join(ways).rstrip()


def _block(title: str, code: str, language: str = "python") -> list[str]:
    return [title, "", f"```{language}", code, "```", ""]
